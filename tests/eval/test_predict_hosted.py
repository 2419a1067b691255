"""Models that others serve: what is asked is what our engine asks, and nothing that was paid for is requested again.

A loopback server with both wire formats, or a service in memory, replaces them; the tests count what arrives there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter

import pytest

from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.reflection import WHY
from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.answer_files import RUN, read_answers
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.predict import RATIONALE_TOKENS, REVISE, build_conversation
from reverie_jax.eval.predict_hosted import HostedRun, prediction_settings
from reverie_jax.hosted.interface import RequestSettings
from reverie_jax.hosted.session import RequestConfig, Session
from reverie_jax.hosted.throttle import Limits
from tests.eval.benchmarks.samples import SAMPLES, build
from tests.hosted.faults import Fault, dress
from tests.hosted.fixtures import keys  # noqa: F401  (a fixture)
from tests.hosted.helpers import JOURNAL, Memory, rows_of, spec_of
from tests.hosted.server import Server
from tests.hosted.wires import Call

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
QUICK = Limits(concurrency=4, backoff=0.001, max_backoff=0.001)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answer(call: Call) -> str:
    """Return an answer that depends on all that was asked, with a model's thoughts before it."""
    return f"<think>Hm.</think>\n{call.text[-30:]} {len(call.text)} {len(call.images)} é"


@pytest.fixture
def job(cases, tmp_path):
    """Return a function that asks about a benchmark's sample; what it returns is (result, path of the folder)."""

    def run(spec, name="pope", *, out="out", limits=QUICK, length=None, temperature=0.0, estimate=False, **fields):
        settings = prediction_settings(RequestSettings(temperature=temperature), length)
        with Session(tmp_path / out, RequestConfig(settings, limits), os.environ) as session:
            defaults = {"benchmark": build(name), "data": cases(name).loaded, "out": tmp_path / out}
            one = HostedRun(session=session, model=spec, **defaults | fields)
            return one.estimate() if estimate else (one.run(), tmp_path / out)

    return run


def asked(body: dict) -> list[tuple[str, list[str]]]:
    """Return (role, kinds and texts of its parts) of each turn on either wire."""
    turns = []
    for turn in body.get("messages") or body["contents"]:
        parts = turn.get("content") or turn["parts"]
        parts = [{"text": parts}] if isinstance(parts, str) else parts
        role = {"model": "assistant"}.get(turn["role"], turn["role"])
        turns.append((role, [part.get("text", "IMAGE") for part in parts]))
    return turns


def settings_of(body: dict) -> tuple[float, int]:
    config = body.get("generationConfig", body)
    return config["temperature"], config.get("maxOutputTokens", config.get("max_completion_tokens"))


@pytest.mark.parametrize("provider", ["openai", "gemini"])
@pytest.mark.parametrize("name", ["pope", "hallusionbench", "amber", "mmbench"])
def test_questions_arrive_as_our_engine_asks_them(job, cases, provider, name):
    loaded, benchmark = cases(name).loaded, build(name)
    with Server(answer) as server:
        result, out = job(spec_of(server, provider), name)
        arrived = {(call.images[0] if call.images else b"", call.text): call.body for call in server.calls}
        again, _ = job(spec_of(server, provider), name)
    assert len(arrived) == len(server.calls), "a question was sent twice"
    assert again.outcomes["answers"].cached == len(arrived)
    assert (result.missing, result.stopped, again.path) == (0, "", result.path)
    written = rows(result.path)
    assert [row["question_id"] for row in written] == [question.id for question in loaded.questions]
    for question, row in zip(loaded.questions, written, strict=True):
        body = arrived[b"" if question.image is None else loaded.read_image(question.image), question.text]
        whole = build_conversation(question).turns[0].text
        text = whole.removeprefix(f"{IMAGE}\n")
        assert asked(body) == [("user", ["IMAGE"] * (text != whole) + [text])]
        assert settings_of(body) == (0.0, question.max_new_tokens or benchmark.max_new_tokens)
        expected = f"{text[-30:]} {len(text)} {int(question.image is not None)} é".strip()
        assert (row["text"], row["prompt"], row["model_id"]) == (expected, question.text, f"{provider}:tiny")
    assert len(read_answers(result.path, benchmark, loaded)) == len(written)
    record = json.loads((out / RUN).read_text())
    assert record["versions"] == ["tiny-2026-01-01"]
    assert record["request"]["temperature"] == 0.0
    assert record["max_new_tokens"] == benchmark.max_new_tokens
    assert server.url not in "".join(path.read_text("utf-8") for path in (out / RUN, result.path))


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_reflection_is_a_conversation(job, cases, provider):
    questions = cases("pope").loaded.questions
    with Server(answer) as server:
        result, _ = job(spec_of(server, provider), reflect=True)
        calls = [call.body for call in server.calls]
        assert job(spec_of(server, provider), reflect=True)[0].path == result.path
    assert len(server.calls) == len(calls)
    limits = Counter(settings_of(body)[1] for body in calls)
    assert set(limits) == {128, RATIONALE_TOKENS}
    last = {tuple(turn[1][-1] for turn in asked(body)): asked(body) for body in calls if len(asked(body)) == 5}
    for question, row in zip(questions, rows(result.path), strict=True):
        texts = (question.text, row["first_text"], WHY, row["rationale"], REVISE.format(question=question.text))
        roles = [role for role, _ in last[texts]]
        assert roles == ["user", "assistant"] * 2 + ["user"]
        assert last[texts][0][1][0] == "IMAGE"
        assert row["text"].startswith(texts[-1][-30:])


def test_an_answer_that_never_came_is_left_out_and_asked_again(job, cases):
    broken = [True]
    loaded = cases("mme").loaded
    odd = loaded.questions[1].text
    faults = lambda call: Fault.BLOCKED if broken and call.text == odd else None  # noqa: E731
    with Memory(answer, faults) as server:
        for reflect, out in ((False, "out"), (True, "reflect")):
            broken[:] = [True]
            result, _ = job(spec_of(server), "mme", out=out, reflect=reflect)
            stage = "first" if reflect else "answers"
            assert list(result.outcomes[stage].failed) == [str(loaded.questions[1].id)]
            assert (result.missing, len(rows(result.path))) == (1, len(loaded.questions) - 1)
            with pytest.raises(BenchmarkError, match="1 of"):
                read_answers(result.path, build("mme"), loaded)
            broken.clear()
            before = len(server.calls)
            assert job(spec_of(server), "mme", out=out, reflect=reflect)[0].missing == 0
            assert len(server.calls) - before == (3 if reflect else 1)


def test_a_budget_stops_and_a_larger_one_resumes(job, cases):
    limits = dataclasses.replace(QUICK, concurrency=1, price_in=5.0, price_out=5.0, max_cost=0.002)
    count = len({(q.image, q.text) for q in cases("seed").loaded.questions})
    with Memory(answer) as server:
        assert [(row.stage, row.to_request) for row in job(spec_of(server), "seed", estimate=True)] == [
            ("answers", count)
        ]
        assert server.calls == []
        result, out = job(spec_of(server), "seed", limits=limits, reflect=True)
        assert "budget" in result.stopped
        sent = len(server.calls)
        assert 0 < sent < count * 3
        steps = job(spec_of(server), "seed", reflect=True, estimate=True)
        assert [(row.stage, row.cached + row.to_request) for row in steps] == [
            (stage, count) for stage in ("first", "rationales", "answers")
        ]
        assert sum(row.cached for row in steps) == sent
        result, _ = job(spec_of(server), "seed", reflect=True)
    assert (result.missing, result.stopped) == (0, "")
    assert len(server.calls) == 3 * count
    assert {(row[0], row[1]) for row in rows_of(out / JOURNAL, "stage, state")} == {
        ("predict", "usable"),
        ("explain", "usable"),
    }


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_long_answers_are_cut_and_thoughts_alone_are_not_an_answer(job, provider):
    thinking = [False]
    with Server(lambda call: "<think>Let me" if thinking[0] else "Yes it", lambda call: Fault.TRUNCATED) as server:
        result, _ = job(spec_of(server, provider), "mme")
        assert {row["text"] for row in rows(result.path)} == {dress("Yes it", Fault.TRUNCATED)}
        thinking[0] = True
        result, _ = job(spec_of(server, provider), "mme", out="thoughts", length=700)
        assert result.path is None
        assert all("--max-new-tokens" in reason for reason in result.outcomes["answers"].failed.values())
    assert {settings_of(call.body)[1] for call in server.calls} == {128, 700}, "a longer limit leaves room for thoughts"


def test_duplicates_are_asked_once_unless_they_are_samples(job, cases):
    questions = cases("pope").loaded.questions
    once = len({(question.image, question.text) for question in questions})
    assert once < len(questions)
    for temperature, count in ((0.0, once), (0.7, len(questions)), (None, len(questions))):
        with Memory(answer) as server:
            assert job(spec_of(server), out=f"out{temperature}", temperature=temperature)[0].missing == 0
        assert len(server.calls) == count


def test_batches_and_recordings(job, tmp_path):
    with Server(answer) as server:
        batched, out = job(spec_of(server), limits=dataclasses.replace(QUICK, batch=True, poll_seconds=0.01))
        assert server.direct == 0
    replayed, _ = job(f"replay:{out / JOURNAL}", out="again")
    texts = [[row["text"] for row in rows(result.path)] for result in (batched, replayed)]
    assert texts[0] == texts[1]


OTHERS = {
    "temperature": ({"temperature": 0.5}, "request"),
    "length": ({"length": 900}, "max_new_tokens"),
    "reflect": ({"reflect": True}, "reflect"),
    "benchmark": ({"name": "mme"}, "benchmark"),
    "fewer": ({"limit": 2}, "questions"),
    "model": ({"spec": "gemini:tiny"}, "model"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_folder_of_another_run_is_refused(job, kind):
    change, named = OTHERS[kind]
    with Memory(answer) as server:
        _, out = job(spec_of(server))
        before = (len(server.calls), (out / RUN).read_bytes())
        with pytest.raises(UserError, match=rf"{out}.*{named}"):
            job(change.pop("spec", spec_of(server)), **change)
        assert (len(server.calls), (out / RUN).read_bytes()) == before


def test_nothing_is_sent_where_an_image_is_missing_or_a_key(job, cases, tmp_path, monkeypatch):
    data = build("pope").load(SAMPLES["pope"](tmp_path / "data"))
    (tmp_path / "data" / "val2014" / "2.jpg").unlink()
    with Memory(answer) as server:
        with pytest.raises(BenchmarkError, match=r"2\.jpg"):
            job(spec_of(server), data=data)
        assert server.calls == []
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        job("openai:tiny", out="keyless")
    with pytest.raises(UserError, match="http"):
        job("openai:tiny@127.0.0.1:8000/v1", out="address")
