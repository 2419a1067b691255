"""`reverie eval`, `score`, `judge` and `report` from the command line, in this process, on folders of a few questions."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from reverie_jax.data.templates import TEMPLATES
from reverie_jax.eval import protocols
from reverie_jax.eval.benchmarks import find_benchmark, names
from reverie_jax.eval.engine import Engine
from tests.cli.helpers import MODEL, assert_refused, plain, rows
from tests.eval.benchmarks import makers as make
from tests.hosted.faults import Fault
from tests.hosted.helpers import Memory, spec_of
from tests.hosted.wires import Call

pytestmark = pytest.mark.usefixtures("wide_terminal")
FEW = ("--max-new-tokens", 3, "--batch-size", 2)


def write_answers(path, name, folder, answer):
    """Write an answer file of LLaVA; answer: a function of the question's index and the question."""
    questions = find_benchmark(name).load(folder).questions
    return make.write_lines(path, [make.answer_row(q.id, q.text, answer(n, q)) for n, q in enumerate(questions)])


@pytest.fixture
def mixed(data, tmp_path):
    """Answers to POPE that each rule parses in its own way."""
    texts = ("Yes", "No", "Yes, there is.", "no", "A table.", "No, but a dog.")
    return write_answers(tmp_path / "mixed.jsonl", "pope", data / "pope", lambda n, q: texts[n % len(texts)])


@pytest.fixture
def right(data, tmp_path):
    words = {True: "Yes", False: "No"}
    return write_answers(tmp_path / "right.jsonl", "pope", data / "pope", lambda n, q: words[q.metadata["label"]])


OPTIONS = {
    "eval": ("--model", "--benchmark", "--data", "--dump-prompts", "--reflect", "--contrast", "--limit"),
    "score": ("--predictions", "--data", "--rule", "--json", "--details", "--export", "--partial", "--compare-to"),
    "judge": ("--judge", "--dry-run", "--prompts", "--max-cost"),
    "report": ("--out",),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help(reverie, command):
    code, out, err = reverie(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: reverie {command}")
    assert all(option in out for option in OPTIONS[command])


def test_eval_answers_scores_and_resumes(reverie, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = (*MODEL, "--benchmark", "pope", "--data", data / "pope", "--out", out, "--max-new-tokens", 8)
    code, shown, err = reverie(*words)
    assert (code, err) == (0, "")
    assert "pope, rule official (9 questions)" in shown
    assert re.search(r"random/accuracy +│ +[\d.]+ │", shown)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(files) == {".answers.jsonl", "predictions.jsonl", "run.json", "scores.json"}
    written = rows(out / "predictions.jsonl")
    ids = [10_000_001 + n for n in range(6)] + [20_000_001 + n for n in range(3)]
    assert [row["question_id"] for row in written] == ids
    assert all(row["model_id"] == "scenes-base" and 0 <= row["metadata"]["yes"] <= 1 for row in written)
    scores = json.loads(files["scores.json"])
    assert scores["protocol"]["run/model"] == "scenes-base"
    assert scores["protocol"]["run/checksums"].keys() >= {"decoder", "vision", "projector"}
    assert 0 <= scores["protocol"]["calibration/brier"] <= 1
    score = ("score", "pope", "--predictions", out / "predictions.jsonl", "--json", "--data")
    for folder in (data, data / "pope"):
        assert json.loads(reverie(*score, folder)[1]) == scores
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_answers", lambda *args: pytest.fail("decoded again"))
        assert reverie(*words)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert_refused(reverie(*words, "--temperature", 1), out, "decoding")
    assert reverie(*words, "--rule", "lmms-eval")[0] == 0
    assert json.loads((out / "scores.json").read_text())["rule"] == "lmms-eval"
    page = tmp_path / "deep" / "page.html"
    assert reverie("report", f"mine={out}", "--data", data, "--out", page) == (0, f"{page}\n", "")
    assert "pope · " in page.read_text("utf-8")


def test_several_benchmarks_and_a_limit(reverie, data, tmp_path):
    out = tmp_path / "out"
    code, shown, err = reverie(*MODEL, "--benchmark", "mme, mmhal", "--data", data, "--out", out, *FEW)
    assert (code, err) == (0, "")
    assert "mme, rule official (4 questions)" in shown
    assert f"{out}/mmhal/predictions.jsonl: not scored: " in plain(shown)
    assert "reverie judge mmhal" in shown
    assert [row["question_id"] for row in rows(out / "mmhal" / "predictions.jsonl")] == [0, 1, 2]
    assert not (out / "mmhal" / "scores.json").exists()
    assert json.loads((out / "mme" / "scores.json").read_text())["benchmark"] == "mme"
    words = (*MODEL, "--benchmark", "mme", "--data", data, "--out", tmp_path / "limit", *FEW, "--limit", 3)
    code, shown, _ = reverie(*words)
    assert code == 0
    assert "mme, rule official (3 questions)" in shown
    assert "partial: the first 3 of 4 questions" in plain(shown)
    assert not (tmp_path / "limit" / "scores.json").exists()
    answers = ("--predictions", tmp_path / "limit" / "predictions.jsonl")
    assert_refused(reverie("score", "mme", *answers, "--data", data), "1 of 4", "the first 3", "--limit")


def test_prompts_are_written_without_a_model(reverie, data, tmp_path, no_model):
    path = tmp_path / "deep" / "prompts.jsonl"
    words = ("--data", data, "--out", tmp_path / "out", "--dump-prompts", path)
    for several in (["pope,mmhal"], ["pope", "mmhal"], ["pope", "--benchmark", "mmhal"]):
        assert reverie(*MODEL, "--benchmark", *several, *words) == (0, f"12 prompts: {path}\n", "")
    written = rows(path)
    text = f"Is there a cup in the image?\n{make.SHORT}"
    prompt = f"USER: <image>\n{text} ASSISTANT:"
    assert written[0] == {"question_id": 10_000_001, "image": "a.png", "text": text, "prompt": prompt}
    assert written[-1]["prompt"] == "USER: <image>\nWhat is there, number 2? ASSISTANT:"
    assert not (tmp_path / "out").exists()
    words = (*MODEL, "--benchmark", "pope", *words, "--limit", 2, "--template", "vicuna_v1")
    assert reverie(*words)[:2] == (0, f"2 prompts: {path}\n")
    assert all("A chat between" in row["prompt"] for row in rows(path))


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_protocols(reverie, data, tmp_path, name):
    """A protocol sets template and decoding, options win over it, and the record names it."""
    published = protocols.PROTOCOLS[name]
    assert published["template"] in TEMPLATES
    for option, value in {"max_new_tokens": 2, "beams": 1, "temperature": 0.0}.items():
        chosen = protocols.decoding_of(name, {"max_new_tokens": 9, "seed": 3}, {option: value, "top_p": None})
        expected = {"seed": 3, **published, option: value, "template": None}
        assert {key: getattr(chosen, key, None) for key in expected} == expected
    options = ("--protocol", name, "--max-new-tokens", 2, "--template", "llava-hf")
    words = (*MODEL, "--benchmark", "pope", "--data", data / "pope", "--limit", 2, "--out", tmp_path / "out")
    assert reverie(*words, *options)[0] == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["decoding_protocol"], record["template"], record["max_new_tokens"]) == (name, "llava-hf", 2)
    assert record["decoding"]["beams"] == published.get("beams", 1)
    assert record["decoding"]["top_k"] == published.get("top_k", 0)
    path, template = tmp_path / "prompts.jsonl", TEMPLATES[published["template"]]
    result = reverie(*words, "--protocol", name, "--dump-prompts", path)
    if template.tokens:
        assert_refused(result, template.name, template.tokens[0])
    else:
        assert all(row["prompt"].startswith(template.system) for row in rows(path))


WRONG_OPTIONS = {
    "--model": ("/nowhere", ["/nowhere"]),
    "--benchmark": ("popes", ["popes", *names()]),
    "--rule": ("strict", ["--rule strict", "official, lmms-eval, vlmevalkit"]),
    "--contrast": ("noise", ["--contrast", "image", "instruction", "nothing"]),
    "--mesh": ("rows=2", ["--mesh", "rows=2"]),
    "--dtype": ("float16", ["--dtype", "float16", "bfloat16"]),
    "--distributed": ("here", ["--distributed", "here"]),
    "--template": ("v9", ["v9", "llava-hf"]),
    "--adapter": ("/nowhere", ["/nowhere"]),
    "--data": ("/nowhere", ["/nowhere"]),
    "--images": ("/nowhere", ["/nowhere"]),
    "--beams": (0, ["beams"]),
    "--temperature": (-1, ["temperature"]),
    "--top-p": (0, ["top_p"]),
    "--top-k": (-1, ["top_k"]),
    "--repetition-penalty": (0, ["repetition_penalty"]),
    "--no-repeat-ngram": (-1, ["no_repeat_ngram"]),
    "--protocol": ("lrv", ["--protocol lrv", "lrv-minigpt4", "lrv-mplug-owl", "rlhfv-muffin"]),
    "--noise-step": (1000, ["noise_step"]),
    "--max-new-tokens": (0, ["--max-new-tokens 0"]),
    "--limit": (-1, ["--limit -1"]),
    "--batch-size": (0, ["--batch-size 0"]),
    "--max-questions": (0, ["--max-questions 0"]),
    "--max-length": (0, ["--max-length 0"]),
}


@pytest.mark.parametrize("option", WRONG_OPTIONS)
def test_wrong_options_of_eval(reverie, data, tmp_path, option):
    value, facts = WRONG_OPTIONS[option]
    options = {"--model": "scenes-base", "--benchmark": "pope", "--data": data / "pope", "--out": tmp_path / "out"}
    words = [word for pair in (options | {option: value}).items() for word in pair]
    assert_refused(reverie("eval", *words), *facts)
    assert not (tmp_path / "out").exists()


def test_wrong_benchmarks_files_and_outputs(reverie, data, mixed, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    evaluate = (*MODEL, "--data", data, "--out", tmp_path / "out", "--benchmark")
    assert_refused(reverie(*evaluate, "pope,mme,pope"), "--benchmark pope,mme,pope")
    assert_refused(reverie(*evaluate, "pope,"), "''", "scienceqa")
    assert_refused(reverie(*MODEL, "--benchmark", "pope", "--data", empty, "--out", empty), empty, "coco_pope")
    answers, folder = ("--predictions", mixed), ("--data", data / "pope")
    assert_refused(reverie("score", "popes", *answers, *folder), "popes", *names())
    assert_refused(reverie("score", "pope", "--predictions", tmp_path / "gone", *folder), tmp_path / "gone")
    assert_refused(reverie("score", "pope", *answers, "--data", empty), empty)
    assert_refused(reverie("score", "pope", *answers, *folder, "--rule", "x"), "--rule x", "vlmevalkit")
    assert_refused(reverie("judge", "x", *answers, *folder, "--out", empty, "--judge", "openai:x"), *names())
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "deep"
    assert_refused(reverie(*evaluate, "pope", "--dump-prompts", place), place)
    for option in ("--details", "--export"):
        assert_refused(reverie("score", "pope", *answers, *folder, "--json", option, place), place)


def test_score_prints_one_object_and_writes_details_and_exports(reverie, data, mixed, tmp_path, no_model):
    details, server = tmp_path / "deep" / "details.jsonl", tmp_path / "server"
    words = ("score", "pope", "--predictions", mixed, "--data", data / "pope")
    code, shown, err = reverie(*words, "--json", "--details", details, "--export", server)
    assert (code, err, shown.count("\n")) == (0, "", 1)
    content = json.loads(shown)
    assert [content[key] for key in ("benchmark", "rule", "items", "missing")] == ["pope", "official", 9, 0]
    assert content["metrics"]["random/yes_ratio"] == pytest.approx(3 / 6, abs=1e-6)
    written = rows(details)
    assert [row["text"] for row in written][4] == "A table."
    assert sum(row["unparsed"] for row in written) == content["unparsed"] == len(content["unparsed_ids"]) == 1
    assert {path.name for path in server.iterdir()} == {"pope_popular_answers.json", "pope_random_answers.json"}
    code, shown, err = reverie(*words, "--rule", "all")
    assert (code, err) == (0, "")
    assert all(f"pope, rule {rule} (9 questions)" in shown for rule in ("official", "lmms-eval", "vlmevalkit"))
    assert re.search(r"1 answers could not be parsed.*0 are missing", plain(shown))
    assert "9 questions), from 0 to 1" in plain(shown)
    assert "9 questions), percent" in plain(shown)
    assert re.search(r"official and lmms-eval agree on [\d.]+% of 9 questions", shown)
    content = json.loads(reverie(*words, "--rule", "all", "--json")[1])
    rules = ["official", "lmms-eval", "vlmevalkit"]
    assert [result["rule"] for result in content["rules"]] == rules
    assert [row["rules"] for row in content["agreement"]] == [rules[:2], rules[::2], rules[1:]]


def test_score_compares_two_files(reverie, data, mixed, right, tmp_path):
    words = ("score", "pope", "--data", data / "pope", "--predictions")
    found = json.loads(reverie(*words, right, "--json", "--compare-to", mixed)[1])["comparison"]
    mine, yours = (
        json.loads(reverie(*words, file, "--json", "--details", tmp_path / "d")[1])["metrics"]["f1"]
        for file in (right, mixed)
    )
    wrong = sum(not row["right"] for row in rows(tmp_path / "d"))
    assert found["mcnemar"] == {"only_ours": wrong, "only_theirs": 0, "p": pytest.approx(2 * 0.5**wrong)}
    assert found["differences"]["f1"]["value"] == pytest.approx(mine - yours)
    code, shown, err = reverie(*words, right, "--compare-to", mixed)
    assert (code, err) == (0, "")
    assert f"right only here: {wrong}; right only there: 0; McNemar's exact p" in plain(shown)


def test_missing_answers(reverie, data, right, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(right.read_text().splitlines(keepends=True)[:-1]))
    words = ("score", "pope", "--predictions", few, "--data", data / "pope", "--json")
    assert_refused(reverie(*words), few, "1 of 9", "--partial")
    code, shown, err = reverie(*words, "--partial")
    assert (code, json.loads(shown)["missing"]) == (0, 1)
    assert "1 of 9 questions have no answer" in err
    assert_refused(reverie(*words, "--partial", "--export", tmp_path / "server"), "20000003")


def test_scenes_are_a_benchmark_without_an_export(reverie, tmp_path):
    scenes = tmp_path / "scenes"
    assert reverie("scenes", "render", scenes, "--split", "test", "--count", 2, "--size", 32)[0] == 0
    path = write_answers(tmp_path / "a.jsonl", "scenes", scenes, lambda n, q: "Yes, a cup.")
    words = ("score", "scenes", "--predictions", path, "--data", scenes, "--json")
    content = json.loads(reverie(*words)[1])
    assert content["benchmark"] == "scenes"
    assert content["metrics"].keys() >= {"pope/f1", "chair_i", "rationale_correct"}
    assert_refused(reverie(*words, "--export", tmp_path / "server"), "--export", "scenes")


@pytest.fixture
def judge(reverie, data, tmp_path):
    """`reverie judge mmhal` about three answers; and `reverie score mmhal` of them."""
    path = write_answers(tmp_path / "a.jsonl", "mmhal", data / "mmhal", lambda n, q: f"Answer {n}.")
    words = ("mmhal", "--predictions", path, "--data", data / "mmhal")

    def run(*more):
        return reverie("judge", *words, "--out", tmp_path / "out", *more)

    run.replies = tmp_path / "out" / "replies.jsonl"
    run.score = lambda *more: reverie("score", *words, *more)
    return run


def rating(call: Call) -> str:
    return f"Seen.\nRating: {re.search(r'number ([0-9]+)[?]', call.text)[1]}"


@pytest.mark.usefixtures("keys")
@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
class TestJudge:
    def test_a_judge_is_asked_once_and_its_replies_are_scored(self, judge):
        assert_refused(judge.score(), "reverie judge mmhal", "--replies")
        assert_refused(judge.score("--rule", "all"), "--replies")
        broken = [True]
        with Memory(rating, lambda call: Fault.BLOCKED if broken and "number 1?" in call.text else None) as server:
            options = ("--judge", spec_of(server))
            code, shown, _ = judge(*options, "--dry-run")
            assert code == 0
            assert re.search(r"openai:tiny +│ 0 +│ 3 +│", shown), shown
            assert not server.calls
            assert not judge.replies.exists()
            code, shown, err = judge(*options)
            assert (code, shown) == (1, f"openai:tiny: {judge.replies}\n")
            assert "1" in err
            assert [row["id"] for row in rows(judge.replies)] == ["0", "2"]
            assert_refused(judge.score("--replies", judge.replies), "1 of 3", "reverie judge")
            broken.clear()
            asked = len(server.calls)
            assert [judge(*options)[0] for _ in range(2)] == [0, 0]
            assert len(server.calls) == asked + 1
        content = json.loads(judge.score("--json", "--replies", judge.replies)[1])
        assert content["metrics"]["score"] == 1
        assert content["protocol"]["judge"] == "openai:tiny"
        assert content["protocol"]["judge/temperature"] == "0.0"

    @pytest.mark.parametrize(
        ("options", "facts"),
        [
            (["--judge", "nobody:x"], ["nobody"]),
            (["--judge", "openai:x", "--rule", "lmms-eval"], ["lmms-eval"]),
            (["--judge", "openai:x", "--prompts", "/"], ["mmhal.txt"]),
            (["--judge", "local:/nowhere"], ["/nowhere"]),
            (["--judge", "local:a", "--judge", "local:b"], ["local:a"]),
            (["--judge", "openai:x", "--repeats", 2], ["--repeats"]),
        ],
        ids=str,
    )
    def test_mistakes(self, judge, options, facts):
        assert_refused(judge(*options), *facts)

    def test_a_rule_without_a_judge(self, reverie, mixed, data, tmp_path):
        words = ("judge", "pope", "--predictions", mixed, "--data", data / "pope", "--out", tmp_path)
        assert_refused(reverie(*words, "--judge", "openai:x"), "pope", "official")

    def test_a_local_model_judges(self, judge):
        code, shown, _ = judge("--judge", "local:scenes-base", "--max-new-tokens", 3)
        assert (code, shown) == (0, f"local:scenes-base: {judge.replies}\n")
        written = rows(judge.replies)
        assert [row["id"] for row in written] == ["0", "1", "2"]
        assert all(row["judge"] == "local:scenes-base" and row["temperature"] == 0 for row in written)


@pytest.mark.slow
def test_two_processes_write_one_score(data, tmp_path):
    """Over the loopback: the first writes and prints, the others end well."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=1"
    words = [sys.executable, "-m", "reverie_jax.cli", *MODEL, "--benchmark", "pope,mme", "--data", data, *FEW]
    shown = {}
    for count in (1, 2):
        children = []
        for number in range(count):
            command = [*words, "--out", tmp_path / str(count), "--mesh", f"data={count}"]
            command += ["--distributed", f"127.0.0.1:{port},{count},{number}"] if count > 1 else []
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            children.append(subprocess.Popen([*map(str, command)], env=os.environ | {"XLA_FLAGS": flags}, **pipes))
        ended = [child.communicate(timeout=300) for child in children]
        assert [child.returncode for child in children] == [0] * count, ended
        shown[count] = [out for out, _ in ended]
    assert ", rule " not in shown[2][1]
    assert shown[2][0].count(", rule official") == 2
    for name in ("pope", "mme"):
        folders = [tmp_path / str(count) / name for count in (1, 2)]
        texts = [[row["text"] for row in rows(folder / "predictions.jsonl")] for folder in folders]
        assert texts[0] == texts[1]
        scores = [json.loads((folder / "scores.json").read_text())["metrics"] for folder in folders]
        assert scores[0] == scores[1]
        assert not list(folders[1].glob(".*.part"))


def test_data_of_the_hub(reverie, tmp_path, no_model, monkeypatch):
    """A benchmark without a dataset there is refused, and so is an unreachable hub; tests are offline."""
    monkeypatch.chdir("/")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = (*MODEL, "--data", "hub", "--out", tmp_path / "out", "--benchmark")
    assert_refused(reverie(*words, "amber"), "--data hub", "amber")
    assert_refused(reverie(*words, "pope,mme"), "--data hub", "lmms-lab-encoder/POPE", "offline")
    assert not (tmp_path / "out").exists()
    listed = reverie("benchmarks")[1]
    assert all(
        fact in listed for fact in ("8,910 questions, mean F1", "--data hub: lmms-lab-encoder/GQA, 68 MB, licence: mit")
    )
