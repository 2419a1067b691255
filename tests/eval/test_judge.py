"""Judges: what is asked arrives, what is replied is in the file, and what was paid for is not asked again.

A loopback server stands for the services; the test counts what arrived there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError, JudgeRequest
from reverie_jax.eval.benchmarks.mm_vet import MmVet
from reverie_jax.eval.benchmarks.mmhal import TYPES, MmHal
from reverie_jax.eval.judge import LOCAL
from reverie_jax.eval.judge_replies import answers_digest, read_replies
from reverie_jax.hosted.session import RequestConfig
from reverie_jax.hosted.throttle import Limits
from tests.annotate import helpers
from tests.data.fakes import png
from tests.hosted.fixtures import keys  # noqa: F401  (a fixture)
from tests.hosted.server import Call, Fault, Server

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
COUNT = 16
QUICK = Limits(concurrency=4, backoff=0.001, max_backoff=0.001)


def number(call: Call) -> int:
    """Of the question that a call is about."""
    found = re.search(r"Question number (\d+)\?", call.text)
    assert found
    return int(found[1])


def verdict(call: Call) -> str:
    return f"Seen. ✓\nRating: {number(call) % 7}"


def write_questions(folder: Path, count: int = COUNT) -> MmHal:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question_type": TYPES[n % 8],
            "question_topic": "food",
            "image_id": f"{n:04x}",
            "image_src": f"https://example.invalid/a/{n:04x}_o.jpg",
            "image_content": ["Table", "Bread"],
            "question": f"Question number {n}?",
            "gt_answer": f"Truth {n}.",
            "model_answer": "",
        }
        for n in range(count)
    ]
    (folder / "response_template.json").write_text(json.dumps(rows), "utf-8")
    return MmHal()


@pytest.fixture
def loaded(tmp_path) -> BenchmarkData:
    return write_questions(tmp_path / "data").load(tmp_path / "data")


ANSWERS = {str(n): f"Answer {n}." for n in range(COUNT)}


def address(server: Server, provider: str = "openai") -> str:
    return f"{provider}:tiny@{server.url}" + ("/v1" if provider == "openai" else "")


@pytest.fixture
def ask(loaded, tmp_path):
    """Asks about the sixteen answers; more goes to `judge`."""

    def run(*who, limits=QUICK, answers=ANSWERS, benchmark=None, environment=None, out="out", loaded=loaded, **more):
        return judge(
            benchmark or MmHal(),
            loaded,
            answers,
            "official",
            who=who,
            out=tmp_path / out,
            how=RequestConfig(limits=limits),
            environment=os.environ if environment is None else environment,
            prompts=more.pop("prompts", None),
            **more,
        )

    return run


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_replies_are_written_in_order_and_scored(ask, loaded, tmp_path, provider):
    with Server(verdict) as server:
        found = ask(address(server, provider))
        assert len(server.calls) == COUNT
        assert all(not call.images for call in server.calls)
        assert all(f"Answer {number(call)}." in call.text and "Table, Bread" in call.text for call in server.calls)
        assert found.complete
        assert found.outcome.usable == COUNT
        assert found.spent.requests == COUNT
        again = ask(address(server, provider))
        assert len(server.calls) == COUNT
        assert again.outcome.had == COUNT
    path = tmp_path / "out" / "replies.jsonl"
    assert found.files == again.files == {f"{provider}:tiny": path}
    made = rows(path)
    assert [row["id"] for row in made] == list(ANSWERS)
    assert {row["version"] for row in made} == {"tiny-2026-01-01"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) for row in made)
    replies, protocol = read_replies(path)
    assert protocol["judge"] == f"{provider}:tiny"
    assert protocol["judge/version"] == "tiny-2026-01-01"
    assert protocol["judge/answers"] == answers_digest(ANSWERS)
    values = MmHal().score(loaded, ANSWERS, "official", replies).values()
    assert values["score"] == pytest.approx(sum(n % 7 for n in range(COUNT)) / COUNT)
    assert str(server.url) not in path.read_text("utf-8")


def test_only_what_changed_is_asked_again(ask, tmp_path):
    with Server(verdict) as server:
        ask(address(server))
        changed = ANSWERS | {"3": "Another answer."}
        ask(address(server), answers=changed)
        assert [number(call) for call in server.calls[COUNT:]] == [3]
        first = read_replies(tmp_path / "out" / "replies.jsonl")[1]
        assert first["judge/answers"] == answers_digest(changed) != answers_digest(ANSWERS)
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "mmhal.txt").write_text("Größe? {question} {gt_answer} {model_answer} {image_content}", "utf-8")
        ask(address(server), answers=changed, prompts=mine)
        assert len(server.calls) == 2 * COUNT + 1
        assert all(call.text.startswith("Größe?") for call in server.calls[-COUNT:])
        assert read_replies(tmp_path / "out" / "replies.jsonl")[1]["judge/prompt"] != first["judge/prompt"]


def test_a_few_answers_alone(ask, tmp_path):
    with Server(verdict) as server:
        ask(address(server), answers={"5": "Answer 5."})
        assert [number(call) for call in server.calls] == [5]
    assert [row["id"] for row in rows(tmp_path / "out" / "replies.jsonl")] == ["5"]


def test_what_has_no_reply_is_told_and_asked_again(ask, loaded, tmp_path):
    broken = True
    with Server(verdict, lambda call: Fault.EMPTY if broken and number(call) in (2, 9) else None) as server:
        found = ask(address(server))
        assert not found.complete
        assert set(found.outcome.failed) == {"2", "9"}
        replies, _ = read_replies(tmp_path / "out" / "replies.jsonl")
        assert set(replies) == set(ANSWERS) - {"2", "9"}
        with pytest.raises(BenchmarkError, match=r"2 of 16 replies.*the first is 2"):
            MmHal().score(loaded, ANSWERS, "official", replies)
        broken, before = False, len(server.calls)
        assert ask(address(server)).complete
        assert {number(call) for call in server.calls[before:]} == {2, 9}
    assert [row["id"] for row in rows(tmp_path / "out" / "replies.jsonl")] == list(ANSWERS)


def test_a_budget_stops_and_a_larger_one_goes_on(ask, tmp_path):
    limits = dataclasses.replace(QUICK, concurrency=1, price_in=5.0, price_out=5.0, max_cost=0.02)
    with Server(verdict) as server:
        found = ask(address(server), limits=limits)
        assert "budget" in found.outcome.stopped
        asked = len(server.calls)
        assert 0 < asked < COUNT
        assert found.spent.price <= 0.02
        assert len(rows(tmp_path / "out" / "replies.jsonl")) == asked
        assert ask(address(server), limits=limits).outcome.usable == 0
        assert ask(address(server), limits=dataclasses.replace(limits, max_cost=1.0)).complete
        assert len(server.calls) == COUNT
        assert set(Counter(call.digest for call in server.calls).values()) == {1}


def test_what_it_would_take(loaded, tmp_path):
    with Server(verdict) as server:
        more = {"environment": os.environ, "prompts": None, "out": tmp_path / "out"}
        how = RequestConfig(limits=dataclasses.replace(QUICK, price_in=1.0, price_out=1.0))
        who = [address(server), f"{LOCAL}mine"]
        (row,) = estimate(MmHal(), loaded, ANSWERS, "official", who=who, how=how, **more)
        assert server.calls == []
    assert (row.stage, row.had, row.to_ask) == ("openai:tiny", 0, COUNT)
    assert row.price > 0


def test_a_missing_key_is_named_and_no_other_shown(ask, tmp_path):
    environment = {"GEMINI_API_KEY": helpers.SECRETS["GEMINI_API_KEY"]}
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        ask("openai:tiny", environment=environment)
    assert helpers.SECRETS["GEMINI_API_KEY"] not in str(caught.value)
    assert not (tmp_path / "out" / "replies.jsonl").exists()


def test_a_wrong_key_is_never_shown(ask, tmp_path, monkeypatch, capfd):
    secret = helpers.SECRETS["OPENAI_API_KEY"]
    with Server(verdict) as server:
        ask(address(server))
        before = (tmp_path / "out" / "replies.jsonl").read_text("utf-8")
        helpers.unhappy(monkeypatch, lambda call: (401, f"Incorrect API key provided: {secret}."))
        with pytest.raises(UserError, match="401") as caught:
            ask(address(server), answers={n: f"{text} More." for n, text in ANSWERS.items()})
    assert secret not in str(caught.value) + "".join(capfd.readouterr())
    assert (tmp_path / "out" / "replies.jsonl").read_text("utf-8") == before
    for path in (tmp_path / "out").iterdir():
        assert secret.encode() not in path.read_bytes(), path


def test_several_judges_have_a_file_each(ask, tmp_path):
    with Server(verdict) as server:
        found = ask(address(server), address(server, "gemini"))
        assert Counter(call.provider for call in server.calls) == {"openai": COUNT, "gemini": COUNT}
    assert set(found.files) == {"openai:tiny", "gemini:tiny"}
    assert len(set(found.files.values())) == 2
    for who, path in found.files.items():
        assert read_replies(path)[1]["judge"] == who
    both = tmp_path / "both.jsonl"
    some, others = (path.read_text("utf-8").splitlines(keepends=True) for path in found.files.values())
    both.write_text("".join(some[:8] + others[8:]), "utf-8")
    with pytest.raises(BenchmarkError, match=r"several judges.*gemini:tiny, openai:tiny"):
        read_replies(both)
    with pytest.raises(UserError, match="one file"):
        ask("openai:tiny@http://a/v1", "openai:tiny@http://b/v1")


def test_several_runs_are_asked_each(ask, tmp_path):
    data = {
        f"v1_{n}": {
            "imagename": "a.png",
            "question": f"Question number {n}?",
            "answer": "a<AND>b",
            "capability": ["rec"],
        }
        for n in range(2)
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(data), "utf-8")
    benchmark = MmVet(runs=3)
    questions = benchmark.load(tmp_path)
    answers = {"v1_0": "a", "v1_1": "b"}
    with Server(lambda call: f"0.{len(server.calls) % 2}") as server:
        ask(address(server), benchmark=benchmark, loaded=questions, answers=answers)
        assert len(server.calls) == 6
        assert all("a <AND> b" in call.text for call in server.calls)
    replies, _ = read_replies(tmp_path / "out" / "replies.jsonl")
    assert set(replies) == {f"v1_{n}#{run}" for n in range(2) for run in range(3)}


# A judge that is no service.


def test_a_recorded_run_replies_the_same(ask, tmp_path):
    with Server(verdict) as server:
        ask(address(server))
    found = ask(f"replay:{tmp_path / 'out' / 'journal.sqlite'}", out="again", environment={})
    assert found.complete
    first, second = (rows(tmp_path / out / "replies.jsonl") for out in ("out", "again"))
    same = ("id", "reply", "version", "prompt", "answers")
    assert [[row[k] for k in same] for row in first] == [[row[k] for k in same] for row in second]


def test_a_model_of_ones_own(ask, tmp_path):
    seen: list[JudgeRequest] = []

    def generate(requests):
        seen.extend(requests)
        return [f"Rating: {int(request.id) % 7}" for request in requests]

    found = ask(f"{LOCAL}runs/mine", generate=generate, environment={})
    assert found.complete
    assert found.outcome.usable == len(seen) == COUNT
    replies, protocol = read_replies(tmp_path / "out" / "replies.jsonl")
    assert replies["8"] == "Rating: 1"
    assert protocol["judge"] == protocol["judge/version"] == "local:runs/mine"
    assert not (tmp_path / "out" / "journal.sqlite").exists()
    with pytest.raises(UserError, match="local judge"):
        ask(f"{LOCAL}runs/mine")


# Pictures.


class Shown(MmHal):
    """MMHal whose judge sees the picture."""

    def judge_requests(self, loaded, answers, rule, prompts):
        found = super().requests(loaded, answers, rule, prompts)
        return [dataclasses.replace(request, image=f"{request.id}.png") for request in found]


def test_the_judge_sees_the_picture_unless_told_not_to(ask, loaded):
    seen = dataclasses.replace(loaded, read_image=lambda name: png((int(name.split(".")[0]), 0, 0)))
    with Server(verdict) as server:
        ask(address(server), benchmark=Shown(), loaded=seen)
        assert all(call.images == [png((number(call), 0, 0))] for call in server.calls)
        ask(address(server), benchmark=Shown(), loaded=seen, images=False)
        assert len(server.calls) == 2 * COUNT
        assert all(call.images == [] for call in server.calls[COUNT:])


def test_a_picture_that_is_missing_is_one_line_and_nothing_is_asked(ask, loaded):
    with Server(verdict) as server:
        with pytest.raises(BenchmarkError, match=r"picture 0\.png"):
            ask(address(server), benchmark=Shown())
        assert server.calls == []


# Prompts.


def test_a_folder_of_prompts_goes_before_ours(tmp_path):
    ours = prompts()
    assert {"mmhal", "llava_bench_conv", "llava_bench_detail", "llava_bench_complex", "mm_vet", "gavie"} <= set(ours)
    with pytest.raises(UserError, match=r"no prompt here.*mmhal\.txt"):
        prompts(tmp_path)
    (tmp_path / "gavie.txt").write_text("mine", "utf-8")
    assert prompts(tmp_path) == ours | {"gavie": "mine"}
    (tmp_path / "gavie.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"gavie\.txt"):
        prompts(tmp_path)


@pytest.mark.parametrize("text", ["{verdict}", "{}", "{question", "}", "{question.x}"])
def test_a_broken_prompt_is_one_line_and_nothing_is_asked(ask, tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mmhal.txt").write_text(text, "utf-8")
    with Server(verdict) as server:
        with pytest.raises(BenchmarkError, match=r"mmhal\.txt.*\{model_answer\}") as caught:
            ask(address(server), prompts=tmp_path / "mine")
        assert server.calls == []
    assert "\n" not in str(caught.value)


def test_braces_in_answers_are_no_placeholders(ask):
    with Server(verdict) as server:
        ask(address(server), answers={"0": "{question} {x}"})
        assert "{question} {x}" in server.calls[0].text


def test_a_rule_without_a_judge(loaded, tmp_path):
    more = {"how": RequestConfig(), "environment": {}, "prompts": None, "out": tmp_path, "who": ["openai:tiny"]}
    with pytest.raises(UserError, match="needs no judge; of its rules, official does"):
        judge(MmHal(), loaded, ANSWERS, "other", **more)
    with pytest.raises(UserError, match="PROVIDER:MODEL"):
        judge(MmHal(), loaded, ANSWERS, "official", **more | {"who": ["tiny"]})
    with pytest.raises(UserError, match="name a judge"):
        judge(MmHal(), loaded, ANSWERS, "official", **more | {"who": []})


# Files of replies.

GOOD = {"id": "0", "reply": "Rating: 3", "judge": "openai:tiny", "version": "v", "date": "2026-01-02", "prompt": "p"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, GOOD], "reply 0 stands there twice"),
        ([GOOD, {"id": "1"}], r"row 1 is no judge's reply .*reply"),
        ([GOOD, {"id": "1", "reply": 3}], "row 1"),
        ([GOOD, ["1"]], "row 1"),
        ([GOOD, GOOD | {"id": "1", "judge": "gemini:tiny"}], "several judges"),
        ([GOOD, GOOD | {"id": "1", "prompt": "q"}], "several prompts"),
        ([GOOD, GOOD | {"id": "1", "answers": "a"}], "several models' answers"),
        ([GOOD, GOOD | {"id": "1", "temperature": 0.2}], "several temperatures"),
    ],
)
def test_broken_files_of_replies(tmp_path, lines, words):
    path = tmp_path / "replies.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    with pytest.raises(BenchmarkError, match=words) as caught:
        read_replies(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_replies_from_elsewhere(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text("", "utf-8")
    assert read_replies(path)[0] == {}
    path.write_text('{"id": 7, "reply": "Rating: 3"}\n', "utf-8")
    assert read_replies(path) == ({"7": "Rating: 3"}, {"judge": "not said"})
    path.write_text("\n".join(json.dumps(GOOD | {"id": str(n), "date": f"2026-01-0{n}"}) for n in (5, 3, 4)), "utf-8")
    assert read_replies(path)[1]["judge/date"] == "2026-01-03 to 2026-01-05"
    path.write_text('{"id": "0", "reply', "utf-8")
    with pytest.raises(BenchmarkError, match=r"replies\.jsonl.*line 1"):
        read_replies(path)
    with pytest.raises(BenchmarkError, match="no such file"):
        read_replies(tmp_path / "gone.jsonl")


# SIGKILL, in a process of its own.

CHILD = """
import json, os, sys
from pathlib import Path
from reverie_jax.hosted.throttle import Limits
from reverie_jax.hosted.session import How
from reverie_jax.eval.benchmarks.mmhal import MmHal
from reverie_jax.eval.judge import judge
data, who, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
answers = {str(n): f"Answer {n}." for n in range(count)}
how = How(limits=Limits(concurrency=4))
benchmark = MmHal()
found = judge(benchmark, benchmark.load(data), answers, "official", who=[who], out=data / "out", how=how,
              environment=os.environ, prompts=None)
sys.exit(not found.complete)
"""


def test_what_was_paid_for_outlives_a_kill(tmp_path):
    """Killed twice: only the few requests in flight are asked twice, and each answered one is in the file once."""
    count, answered = 48, list[int]()
    write_questions(tmp_path, count)

    with Server(verdict, latency=0.05) as server:
        words = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), address(server), str(count)]
        for kill_at in (12, 30, None):
            child = subprocess.Popen(words, env=os.environ | helpers.SECRETS, stderr=subprocess.PIPE)
            try:
                if kill_at is not None:
                    helpers.until(lambda at=kill_at, run=child: len(server.calls) >= at or run.poll() is not None)
                    child.send_signal(signal.SIGKILL)
                _, log = child.communicate(timeout=60)
            finally:
                child.kill()
            assert child.returncode == (0 if kill_at is None else -signal.SIGKILL), log.decode()
            kept = helpers.rows_of(tmp_path / "out" / "journal.sqlite", "item", "state = 'usable'")
            assert len(set(kept)) == len(kept)  # nothing with a reply was asked again
            answered.append(len(kept))
        assert 0 < answered[0] < answered[1] < answered[2] == count
        times = Counter(number(call) for call in server.calls)
    assert set(times) == set(range(count))
    assert sum(times.values()) <= count + 2 * 4
    assert [row["id"] for row in rows(tmp_path / "out" / "replies.jsonl")] == [str(n) for n in range(count)]
