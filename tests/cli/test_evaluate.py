"""`reverie eval`, `score` and `judge` as their user meets them: in this process, on folders of a few questions."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from reverie_jax import cli
from reverie_jax.eval.benchmarks import names
from reverie_jax.eval.engine import Engine
from tests.eval.benchmarks.makers import SHORT, answer_row, mme, mmhal_rows, pope, write_image, write_json, write_lines
from tests.eval.benchmarks.samples import load
from tests.hosted.fixtures import keys  # noqa: F401  (a fixture)
from tests.hosted.server import Call, Fault, Server

THINGS = ("cup", "dog", "car")


@pytest.fixture
def reverie(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["reverie", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(result, *words):
    """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert str(word) in err
    return True


def asked(images):
    return [
        (image, f"Is there a {thing} in the image?", "yes" if n % 2 else "no")
        for image in images
        for n, thing in enumerate(THINGS)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of folders: POPE of nine questions, MME of four, MMHal of three."""
    root = tmp_path_factory.mktemp("data")
    pope(root / "pope", random=asked(["a.png", "b.png"]), popular=asked(["a.png"]))
    pair = [("Is it one? Please answer yes or no.", "Yes"), ("Is it two? Please answer yes or no.", "No")]
    mme(root / "mme", {"count": {"1.jpg": pair, "2.jpg": pair}})
    write_json(root / "mmhal" / "response_template.json", mmhal_rows()[:3])
    for number in range(3):
        write_image(root / "mmhal" / "images" / f"{number}_o.jpg", number)
    return root


def answers(folder, name, say, path):
    """An answer file as LLaVA writes it."""
    _, loaded = load(name, folder / name)
    return write_lines(path, [answer_row(q.id, q.text, say(n, q)) for n, q in enumerate(loaded.questions)])


@pytest.fixture
def mine(data, tmp_path):
    """Answers to POPE that each rule reads in its own way."""
    texts = ("Yes", "No", "Yes, there is.", "no", "A table.", "No, but a dog.")
    return answers(data, "pope", lambda n, q: texts[n % len(texts)], tmp_path / "mine.jsonl")


@pytest.fixture
def right(data, tmp_path):
    return answers(data, "pope", lambda n, q: "Yes" if q.metadata["label"] else "No", tmp_path / "right.jsonl")


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def never(monkeypatch):
    """No model is asked."""
    monkeypatch.setattr(Engine, "__init__", lambda *args, **more: pytest.fail("a model was asked"))


@pytest.mark.parametrize("command", ["eval", "score", "judge", "report"])
def test_help(reverie, command):
    code, out, err = reverie(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: reverie {command}")
    assert "None" not in out.replace("{None}", "").replace("(default: None)", "")
    wanted = {
        "eval": ("MODEL", "--benchmark", "--data", "--dump-prompts", "--reflect", "--against", "--limit"),
        "score": (
            "BENCHMARK",
            "--predictions",
            "--data",
            "--rule",
            "--json",
            "--details",
            "--export",
            "--partial",
        ),
        "judge": ("BENCHMARK", "--judge", "--dry-run", "--prompts", "--max-cost"),
        "report": ("--out",),
    }[command]
    assert all(word in out for word in wanted)


def test_eval_asks_scores_and_goes_on(reverie, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = (
        "eval",
        "--model",
        "scenes-base",
        "--benchmark",
        "pope",
        "--data",
        data / "pope",
        "--out",
        out,
        "--max-new-tokens",
        8,
    )
    code, shown, err = reverie(*words)
    assert (code, err) == (0, "")
    assert "pope by the rule official (9 questions)" in shown
    assert re.search(r"random/accuracy +│ +[\d.]+ │", shown)
    assert sorted(path.name for path in out.iterdir()) == [
        ".answers.jsonl", "predictions.jsonl", "run.json", "scores.json",
    ]  # fmt: skip
    made = rows(out / "predictions.jsonl")
    assert [row["question_id"] for row in made] == [10_000_001 + n for n in range(6)] + [
        20_000_001 + n for n in range(3)
    ]
    assert {row["model_id"] for row in made} == {"scenes-base"}
    assert all(0 <= row["metadata"]["yes"] <= 1 for row in made)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["protocol"]["run/model"] == "scenes-base"
    assert scores["protocol"]["run/identity"].keys() >= {"decoder", "vision", "projector"}
    assert 0 <= scores["protocol"]["calibration/brier"] <= 1
    code, shown, err = reverie("score", "pope", "--predictions", out / "predictions.jsonl", "--data",
                               data / "pope", "--json")  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(shown) == scores
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_answers", lambda *args: pytest.fail("asked again"))
        assert reverie(*words)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert refused(reverie(*words, "--temperature", 1), out, "decoding", "another run")
    assert refused(reverie(*words, "--limit", 3), out, "questions, content")
    assert reverie(*words, "--rule", "lmms-eval")[0] == 0
    assert json.loads((out / "scores.json").read_text())["rule"] == "lmms-eval"


def test_several_benchmarks_at_once(reverie, data, tmp_path):
    """One model, a folder each; what needs a judge is asked, and scored later."""
    out = tmp_path / "out"
    few = ("--max-new-tokens", 3, "--batch-size", 2)
    code, shown, err = reverie(
        "eval", "--model", "scenes-base", "--benchmark", "mme, mmhal", "--data", data, "--out", out, *few
    )
    assert (code, err) == (0, "")
    assert "mme by the rule official (4 questions)" in shown
    assert "mmhal/predictions.jsonl: not scored: " in " ".join(shown.split())
    assert "`reverie judge mmhal`" in shown
    assert [row["question_id"] for row in rows(out / "mmhal" / "predictions.jsonl")] == [0, 1, 2]
    assert not (out / "mmhal" / "scores.json").exists()
    assert json.loads((out / "mme" / "scores.json").read_text())["benchmark"] == "mme"
    assert len(rows(out / "mme" / "predictions.jsonl")) == 4


def test_a_limit_is_not_scored(reverie, data, tmp_path):
    words = (
        "eval",
        "scenes-base",
        "--benchmark",
        "mme",
        "--data",
        data,
        "--out",
        tmp_path,
        "--max-new-tokens",
        3,
        "--batch-size",
        2,
    )
    code, shown, _ = reverie(*words, "--limit", 4)
    assert code == 0
    assert shown == f"{tmp_path / 'predictions.jsonl'}: 4 of 4 answers, not scored\n"
    assert not (tmp_path / "scores.json").exists()


def test_prompts_are_dumped_and_nothing_is_asked(reverie, data, tmp_path, never):
    path = tmp_path / "deep" / "prompts.jsonl"
    words = ("--data", data, "--out", tmp_path / "out", "--dump-prompts", path)
    code, shown, err = reverie("eval", "--model", "scenes-base", "--benchmark", "pope,mmhal", *words)
    assert (code, shown, err) == (0, f"12 prompts: {path}\n", "")
    made = rows(path)
    assert made[0] == {
        "question_id": 10_000_001,
        "image": "a.png",
        "text": f"Is there a cup in the image?\n{SHORT}",
        "prompt": f"USER: <image>\nIs there a cup in the image?\n{SHORT} ASSISTANT:",
    }
    assert made[-1]["prompt"] == "USER: <image>\nWhat is there, number 2? ASSISTANT:"
    assert not (tmp_path / "out").exists()
    code, shown, _ = reverie(
        "eval", "--model", "scenes-base", "--benchmark", "pope", *words, "--limit", 2, "--template", "vicuna_v1"
    )
    assert (code, shown) == (0, f"2 prompts: {path}\n")
    assert all("A chat between" in row["prompt"] for row in rows(path))


def test_pictures_of_another_folder(reverie, data, tmp_path, never):
    words = ("eval", "--model", "scenes-base", "--benchmark", "pope", "--data", data, "--out", tmp_path / "out")
    assert refused(reverie(*words, "--images", tmp_path / "gone"), tmp_path / "gone", "no such folder")


WRONG = {
    "--benchmark": ("popes", ("unknown benchmark 'popes'", *names())),
    "--rule": ("strict", ("--rule strict", "official, lmms-eval, vlmevalkit")),
    "--against": ("noise", ("--against noise", "image or instruction")),
    "--mesh": ("batch_size=2", ("--mesh rows=2",)),
    "--dtype": ("float16", ("--dtype float16", "float32 or bfloat16")),
    "--distributed": ("here", ("--distributed here",)),
    "--template": ("v9", ("v9", "llava-hf")),
    "--adapter": ("/nowhere", ("/nowhere",)),
    "--data": ("/nowhere", ("/nowhere",)),
    "--beams": (0, ("beams",)),
    "--temperature": (-1, ("temperature",)),
    "--top-p": (0, ("top_p",)),
    "--max-new-tokens": (0, ("--new-tokens 0",)),
    "--limit": (-1, ("--limit -1",)),
    "--batch-size": (0, ("--rows 0",)),
    "--max-questions": (0, ("--leaves 0",)),
    "--max-length": (0, ("--row-tokens 0",)),
    "--noise": (1000, ("noise be 0 to 999",)),
}


@pytest.mark.parametrize("option", WRONG)
def test_wrong_words_are_one_line(reverie, data, tmp_path, option):
    value, words = WRONG[option]
    options = {"--benchmark": "pope", "--data": data / "pope", "--out": tmp_path / "out"} | {option: value}
    if option == "--noise":
        options["--against"] = "image"
    assert refused(
        reverie("eval", "--model", "scenes-base", *[word for pair in options.items() for word in pair]), *words
    )
    assert not (tmp_path / "out").exists()


def test_wrong_paths_are_one_line(reverie, data, mine, tmp_path):
    common = ("--data", data, "--out", tmp_path / "out")
    assert refused(reverie("eval", tmp_path / "gone", "--benchmark", "pope", *common), tmp_path / "gone")
    assert refused(reverie("eval", "--model", "scenes-base", "--benchmark", "pope,mme,pope", *common), "twice")
    assert refused(
        reverie("eval", "--model", "scenes-base", "--benchmark", "pope,", *common), "unknown benchmark ''", "scienceqa"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(
        reverie("eval", "--model", "scenes-base", "--benchmark", "pope", "--data", empty, "--out", empty),
        empty,
        "coco_pope",
    )
    found = ("--data", data / "pope")
    assert refused(reverie("score", "popes", "--predictions", mine, *found), "unknown benchmark 'popes'", *names())
    assert refused(reverie("score", "pope", "--predictions", tmp_path / "gone", *found), "gone", "no such file")
    assert refused(reverie("score", "pope", "--predictions", mine, "--data", empty), empty)
    assert refused(reverie("score", "pope", "--predictions", mine, *found, "--rule", "x"), "--rule x", "vlmevalkit")
    assert refused(reverie("judge", "x", "--predictions", mine, *found, "--out", empty, "--judge", "openai:x"), *names())


@pytest.mark.parametrize("option", ["--details", "--export", "--dump-prompts"])
def test_what_cannot_be_written_is_one_line(reverie, data, mine, tmp_path, option):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "deep"
    if option == "--dump-prompts":
        words = ("eval", "--model", "scenes-base", "--benchmark", "pope", "--data", data, "--out", tmp_path / "out")
    else:
        words = ("score", "pope", "--predictions", mine, "--data", data / "pope", "--json")
    assert refused(reverie(*words, option, place), place, "cannot be written")


def test_score_prints_one_object(reverie, data, mine, tmp_path, never):
    items, server = tmp_path / "deep" / "items.jsonl", tmp_path / "server"
    words = ("score", "pope", "--predictions", mine, "--data", data / "pope")
    code, shown, err = reverie(*words, "--json", "--details", items, "--export", server)
    assert (code, err) == (0, "")
    assert shown.count("\n") == 1
    made = json.loads(shown)
    assert made.keys() >= {"benchmark", "rule", "protocol", "metrics", "items", "unparsed"}
    assert (made["benchmark"], made["rule"], made["items"], made["missing"]) == ("pope", "official", 9, 0)
    assert made["metrics"]["random/yes_ratio"] == pytest.approx(3 / 6, abs=1e-6)
    found = rows(items)
    assert len(found) == 9
    assert [row["text"] for row in found][4] == "A table."
    assert sum(row["unparsed"] for row in found) == made["unparsed"] == len(made["unparsed_ids"]) == 1
    assert [row["answer"] for row in rows(server / "pope_random_answers.json")][:2] == ["Yes", "No"]
    assert sorted(path.name for path in server.iterdir()) == ["pope_popular_answers.json", "pope_random_answers.json"]
    code, shown, err = reverie(*words)
    assert (code, err) == (0, "")
    assert "pope by the rule official (9 questions)" in shown
    assert "1 answers say nothing that the rule looks for; 0 are missing" in " ".join(shown.split())


def test_score_against_another_file(reverie, data, mine, right):
    words = ("score", "pope", "--data", data / "pope", "--predictions")
    made = json.loads(reverie(*words, right, "--json", "--against", mine)[1])
    wrong = made["against"]["mcnemar"]["only_ours"]
    assert made["against"]["mcnemar"] == {"only_ours": wrong, "only_theirs": 0, "p": pytest.approx(2 * 0.5**wrong)}
    assert wrong == 9 * (1 - 0.0) - sum(row["right"] for row in _items(reverie, words, mine))
    apart = made["against"]["differences"]["f1"]
    assert apart["value"] == pytest.approx(
        made["metrics"]["f1"] - json.loads(reverie(*words, mine, "--json")[1])["metrics"]["f1"]
    )
    assert apart["ci95"][0] <= apart["value"] <= apart["ci95"][1]
    code, shown, err = reverie(*words, right, "--against", mine)
    assert (code, err) == (0, "")
    assert f"right here and wrong there: {wrong}; the other way: 0; McNemar's exact p" in " ".join(shown.split())
    same = json.loads(reverie(*words, mine, "--json", "--against", mine)[1])["against"]
    assert all(row == {"value": 0, "ci95": [0, 0]} for row in same["differences"].values())


def _items(reverie, words, predictions):
    path = predictions.with_name("items.jsonl")
    reverie(*words, predictions, "--details", path)
    return rows(path)


def test_score_by_every_rule(reverie, data, mine):
    words = ("score", "pope", "--predictions", mine, "--data", data / "pope", "--rule", "all")
    made = json.loads(reverie(*words, "--json")[1])
    assert [result["rule"] for result in made["rules"]] == ["official", "lmms-eval", "vlmevalkit"]
    assert [row["rules"] for row in made["agreement"]] == [
        ["official", "lmms-eval"], ["official", "vlmevalkit"], ["lmms-eval", "vlmevalkit"],
    ]  # fmt: skip
    code, shown, err = reverie(*words)
    assert (code, err) == (0, "")
    assert all(f"pope by the rule {rule} (9 questions)" in shown for rule in ("official", "lmms-eval", "vlmevalkit"))
    assert re.search(r"official and lmms-eval agree on [\d.]+% of 9 questions", shown)


def test_score_of_a_part(reverie, data, right, tmp_path):
    """Missing answers count as the rule says; an export that needs them says so."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(right.read_text().splitlines(keepends=True)[:-1]))
    words = ("score", "pope", "--predictions", few, "--data", data / "pope", "--json")
    assert refused(reverie(*words), few, "1 of 9 questions have no answer", "--partial")
    code, shown, _ = reverie(*words, "--partial")
    assert code == 0
    assert json.loads(shown)["missing"] == 1
    server = ("--partial", "--export", tmp_path / "server")
    assert refused(reverie(*words, *server), "--export", "20000003")


def test_a_benchmark_without_a_server_exports_nothing(reverie, tmp_path, data):
    scene = tmp_path / "scenes"
    assert reverie("scenes", "render", scene, "--split", "test", "--count", 2, "--size", 32)[0] == 0
    _, loaded = load("scenes", scene)
    path = write_lines(tmp_path / "a.jsonl", [answer_row(q.id, q.text, "Yes, a cup.") for q in loaded.questions])
    words = ("score", "scenes", "--predictions", path, "--data", scene, "--json")
    made = json.loads(reverie(*words)[1])
    assert made["benchmark"] == "scenes"
    assert made["metrics"].keys() >= {"pope/f1", "chair_i", "rationale_correct"}
    assert refused(reverie(*words, "--export", tmp_path / "server"), "scenes has no server")


def test_every_rule_of_a_judged_benchmark_needs_replies(reverie, data, tmp_path):
    path = answers(data, "mmhal", lambda n, q: f"Answer {n}.", tmp_path / "a.jsonl")
    words = ("score", "mmhal", "--predictions", path, "--data", data / "mmhal")
    assert refused(reverie(*words), "reverie judge mmhal", "--replies")
    assert refused(reverie(*words, "--rule", "all"), "--replies")


SDK = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]


@pytest.fixture
def judge(reverie, data, tmp_path):
    """`reverie judge mmhal` about three answers."""
    path = answers(data, "mmhal", lambda n, q: f"Answer {n}.", tmp_path / "a.jsonl")

    def run(*words, out="out"):
        common = ("--predictions", path, "--data", data / "mmhal", "--out", tmp_path / out)
        return reverie("judge", "mmhal", *common, *words)

    run.answers, run.out = path, tmp_path / "out"
    return run


def verdict(call: Call) -> str:
    return f"Seen.\nRating: {re.search(r'number ([0-9]+)[?]', call.text)[1]}"


class TestJudge:
    pytestmark = SDK

    def test_a_judge_is_asked_once_and_scored(self, judge, reverie, data):
        pytest.importorskip("openai")
        words = ("score", "mmhal", "--predictions", judge.answers, "--data", data / "mmhal", "--json")
        with Server(verdict) as server:
            who = ("--judge", f"openai:tiny@{server.url}/v1")
            code, shown, err = judge(*who, "--dry-run")
            assert code == 0
            assert "nothing was asked" in shown
            assert re.search(r"openai:tiny +│ 0 +│ 3 +│", shown), shown
            assert not server.calls
            assert not (judge.out / "replies.jsonl").exists()
            code, shown, err = judge(*who)
            assert (code, shown) == (0, f"openai:tiny: {judge.out / 'replies.jsonl'}\n")
            assert "3 new, 0 there already, 0 failed" in err
            assert judge(*who)[0] == 0
            assert len(server.calls) == 3
            assert all(call.body["temperature"] == 0 for call in server.calls)
        made = json.loads(reverie(*words, "--replies", judge.out / "replies.jsonl")[1])
        assert made["metrics"]["score"] == 1
        assert made["protocol"]["judge"] == "openai:tiny"
        code, shown, err = judge("--judge", f"replay:{judge.out / 'journal.sqlite'}", out="again")
        assert code == 0, err
        again = [row["reply"] for row in rows(judge.out.with_name("again") / "replies.jsonl")]
        assert again == [row["reply"] for row in rows(judge.out / "replies.jsonl")]

    def test_what_has_no_reply_is_exit_code_1(self, judge, reverie, data):
        pytest.importorskip("openai")
        broken = [True]

        def plan(call: Call) -> Fault | None:
            return Fault.BLOCKED if broken[0] and "number 1?" in call.text else None

        words = ("score", "mmhal", "--predictions", judge.answers, "--data", data / "mmhal", "--replies")
        with Server(verdict, faults=plan) as server:
            who = ("--judge", f"openai:tiny@{server.url}/v1")
            code, shown, err = judge(*who)
            assert code == 1
            assert shown == f"openai:tiny: {judge.out / 'replies.jsonl'}\n"
            assert "2 new, 0 there already, 1 failed" in err
            assert "without a usable reply" in err
            assert [row["id"] for row in rows(judge.out / "replies.jsonl")] == ["0", "2"]
            assert refused(reverie(*words, judge.out / "replies.jsonl"), "1 of 3 replies", "run `reverie judge` again")
            broken[0] = False
            assert judge(*who)[0] == 0
        assert reverie(*words, judge.out / "replies.jsonl")[0] == 0

    def test_mistakes_are_one_line(self, judge, reverie, mine, data, tmp_path):
        assert refused(judge("--judge", "nobody:x"), "nobody")
        assert refused(judge("--judge", "openai:x", "--rule", "lmms-eval"), "lmms-eval")
        assert refused(judge("--judge", "openai:x", "--prompts", tmp_path), "mmhal.txt")
        assert refused(judge("--judge", "local:/nowhere"), "/nowhere")
        assert refused(judge("--judge", "local:a", "--judge", "local:b"), "one local judge")
        words = ("judge", "pope", "--predictions", mine, "--data", data / "pope", "--out", tmp_path / "o")
        assert refused(reverie(*words, "--judge", "openai:x"), "pope", "needs no judge")

    def test_a_model_of_our_own_judges(self, judge, reverie, data):
        code, shown, err = judge("--judge", "local:scenes-base", "--max-new-tokens", 4)
        assert (code, shown) == (0, f"local:scenes-base: {judge.out / 'replies.jsonl'}\n")
        assert "3 new" in err
        made = rows(judge.out / "replies.jsonl")
        assert [row["id"] for row in made] == ["0", "1", "2"]
        assert all(row["judge"] == "local:scenes-base" and row["temperature"] == 0 for row in made)
        words = (
            "score",
            "mmhal",
            "--predictions",
            judge.answers,
            "--data",
            data / "mmhal",
            "--json",
            "--replies",
        )
        code, shown, _ = reverie(*words, judge.out / "replies.jsonl")
        assert code == 0
        assert json.loads(shown)["protocol"]["judge"] == "local:scenes-base"


@pytest.mark.slow
def test_two_processes_write_one_score(data, tmp_path):
    """Over the loopback: the first writes and prints, the others end well."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=1"
    words = [
        sys.executable,
        "-m",
        "reverie_jax.cli",
        "eval",
        "--model",
        "scenes-base",
        "--benchmark",
        "pope,mme",
        "--data",
        data,
    ]
    words += ["--max-new-tokens", 8, "--batch-size", 2]
    environment = {**os.environ, "XLA_FLAGS": flags}
    said = []
    for processes, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        children = []
        for number in range(processes):
            command = [*words, "--out", out, "--mesh", f"data={processes}"]
            command += ["--distributed", f"127.0.0.1:{port},{processes},{number}"] if processes > 1 else []
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            children.append(subprocess.Popen([*map(str, command)], env=environment, **pipe))
        ended = [child.communicate(timeout=300) for child in children]
        assert [child.returncode for child in children] == [0] * processes, ended
        said.append([shown for shown, _ in ended])
    assert "by the rule" not in said[1][1]
    assert said[1][0].count("by the rule official") == 2
    for name in ("pope", "mme"):
        texts = [[row["text"] for row in rows(tmp_path / out / name / "predictions.jsonl")] for out in ("one", "two")]
        assert texts[0] == texts[1]
        scores = [json.loads((tmp_path / out / name / "scores.json").read_text()) for out in ("one", "two")]
        assert scores[0]["metrics"] == scores[1]["metrics"]
        assert not list((tmp_path / "two" / name).glob(".*.part"))
