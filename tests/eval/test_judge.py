"""Judges: requests arrive, replies are in the file, and nothing that was paid for is requested again.

A loopback server, or one in memory, replaces the services; the tests count what arrives there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import BenchmarkData
from reverie_jax.eval.benchmarks.mm_vet import MmVet
from reverie_jax.eval.benchmarks.mmhal import MmHal
from reverie_jax.eval.judge import LOCAL, JudgeRun, load_prompts
from reverie_jax.eval.judge_replies import answers_digest, read_replies
from reverie_jax.hosted.session import RequestConfig
from reverie_jax.hosted.throttle import Limits
from tests.data.fakes import png
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import SAMPLES, answer_all, headline, load, refused
from tests.hosted import helpers
from tests.hosted.fixtures import keys  # noqa: F401  (a fixture)
from tests.hosted.helpers import Memory, spec_of
from tests.hosted.server import Server
from tests.hosted.wires import Call

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
COUNT = 16
ANSWERS = {str(n): f"Answer {n}." for n in range(COUNT)}
QUICK = Limits(concurrency=4, backoff=0.001, max_backoff=0.001)


def number(call: Call) -> int:
    """Return the number of the question in a request."""
    match = re.search(r"number (\d+)\?", call.text)
    assert match
    return int(match[1])


def rating(call: Call) -> str:
    return f"Seen. ✓\nRating: {number(call) % 7}"


@pytest.fixture
def data(tmp_path) -> BenchmarkData:
    return MmHal().load(make.write_json(tmp_path / "data" / "response_template.json", make.mmhal_rows()[:COUNT]))


@pytest.fixture
def job(data, tmp_path):
    """Return a function that makes a `JudgeRun` about the sixteen answers."""

    def build(*judges, out="out", limits=QUICK, **fields):
        defaults = {"benchmark": MmHal(), "data": data, "answers": ANSWERS, "rule": "official"}
        config = RequestConfig(limits=limits)
        defaults |= {"environment": os.environ, "config": config, "out": tmp_path / out}
        return JudgeRun(judges=judges, **defaults | fields)

    return build


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out" / "replies.jsonl"


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_replies_are_written_in_order_and_scored(job, data, path, provider, tmp_path):
    with Server(rating) as server:
        first = job(spec_of(server, provider)).run()
        assert len(server.calls) == COUNT
        assert all(not call.images for call in server.calls)
        assert all(f"Answer {number(call)}." in call.text for call in server.calls)
        assert first.complete
        assert first.outcome.usable == first.spent.requests == COUNT
        second = job(spec_of(server, provider)).run()
        assert (len(server.calls), second.outcome.cached) == (COUNT, COUNT)
    assert first.files == second.files == {f"{provider}:tiny": path}
    written = rows(path)
    assert [row["id"] for row in written] == list(ANSWERS)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) for row in written)
    replies, protocol = read_replies(path)
    expected = {"judge": f"{provider}:tiny", "judge/version": "tiny-2026-01-01"}
    assert (expected | {"judge/answers": answers_digest(ANSWERS)}).items() <= protocol.items()
    values = MmHal().score(data, ANSWERS, "official", replies).values()
    assert values["score"] == pytest.approx(sum(n % 7 for n in range(COUNT)) / COUNT)
    assert str(server.url) not in path.read_text("utf-8")
    # A recorded run replies the same.
    replay = job(f"replay:{tmp_path / 'out' / 'journal.sqlite'}", out="again", environment={})
    assert replay.run().complete
    for one, other in zip(written, rows(tmp_path / "again" / "replies.jsonl"), strict=True):
        assert all(one[key] == other[key] for key in ("id", "reply", "version", "prompt", "answers"))


def test_only_changes_are_requested_again(job, path, tmp_path):
    with Memory(rating) as server:
        judge = spec_of(server)
        job(judge).run()
        changed = ANSWERS | {"3": "Another answer."}
        job(judge, answers=changed).run()
        assert [number(call) for call in server.calls[COUNT:]] == [3]
        protocol = read_replies(path)[1]
        assert protocol["judge/answers"] == answers_digest(changed) != answers_digest(ANSWERS)
        prompts = tmp_path / "prompts"
        prompts.mkdir()
        (prompts / "mmhal.txt").write_text("Größe? {question} {gt_answer} {model_answer} {image_content}", "utf-8")
        job(judge, answers=changed, prompts=prompts).run()
        assert len(server.calls) == 2 * COUNT + 1
        assert all(call.text.startswith("Größe?") for call in server.calls[-COUNT:])
        assert read_replies(path)[1]["judge/prompt"] != protocol["judge/prompt"]
        job(judge, answers={"5": "{question} {x}"}).run()  # braces in an answer are not placeholders
        assert "{question} {x}" in server.calls[-1].text
        assert [row["id"] for row in rows(path)] == ["5"]


def test_a_budget_stops_and_a_larger_one_resumes(job, path):
    limits = dataclasses.replace(QUICK, concurrency=1, price_in=5.0, price_out=5.0, max_cost=0.02)
    with Memory(rating) as server:
        estimate = job(spec_of(server), f"{LOCAL}mine", limits=limits).estimate()
        assert [(row.stage, row.cached, row.to_request) for row in estimate] == [("openai:tiny", 0, COUNT)]
        assert estimate[0].price > 0
        assert server.calls == []
        result = job(spec_of(server), limits=limits).run()
        assert "budget" in result.outcome.stopped
        requested = len(server.calls)
        assert 0 < requested < COUNT
        assert result.spent.price <= 0.02
        assert len(rows(path)) == requested
        assert job(spec_of(server), limits=limits).run().outcome.usable == 0
        assert job(spec_of(server), limits=dataclasses.replace(limits, max_cost=1.0)).run().complete
    assert Counter(map(number, server.calls)) == Counter(range(COUNT))


def test_keys_are_never_shown(job, path, capfd):
    openai, gemini = helpers.SECRETS["OPENAI_API_KEY"], helpers.SECRETS["GEMINI_API_KEY"]
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        job("openai:tiny", environment={"GEMINI_API_KEY": gemini}).run()
    assert gemini not in str(caught.value)
    assert not path.exists()
    denied = []
    fault = lambda call: (401, f"Incorrect API key provided: {openai}.") if denied else None  # noqa: E731
    with Server(rating, fault) as server:
        job(spec_of(server)).run()
        before = path.read_text("utf-8")
        denied.append(True)
        with pytest.raises(UserError, match="401") as caught:
            job(spec_of(server), answers={n: f"{text} More." for n, text in ANSWERS.items()}).run()
    assert openai not in str(caught.value) + "".join(capfd.readouterr())
    assert path.read_text("utf-8") == before
    assert not any(openai.encode() in file.read_bytes() for file in path.parent.iterdir())
    run = job("openai:tiny@http://user:letmein@127.0.0.1/v1", environment={"OPENAI_API_KEY": "sk-secret"})
    assert not any(secret in repr(run) for secret in ("sk-secret", "letmein"))


def test_several_judges_have_a_file_each(job):
    with Server(rating) as server:
        result = job(spec_of(server), spec_of(server, "gemini")).run()
        assert Counter(call.provider for call in server.calls) == {"openai": COUNT, "gemini": COUNT}
    assert len(set(result.files.values())) == 2
    judges = {judge: read_replies(file)[1]["judge"] for judge, file in result.files.items()}
    assert judges == {judge: judge for judge in ("openai:tiny", "gemini:tiny")}


def test_repeats_are_requested_each(job, path, tmp_path):
    data = MmVet().load(make.mm_vet(tmp_path / "vet", [["rec"], ["ocr"]]))
    with Memory(lambda call: f"0.{len(server.calls) % 2}") as server:
        job(spec_of(server), benchmark=MmVet(3), data=data, answers={"v1_0": "a", "v1_1": "b"}).run()
        assert len(server.calls) == 6
    assert set(read_replies(path)[0]) == {f"v1_{n}#{run}" for n in range(2) for run in range(3)}


class WithImages(MmHal):
    """MMHal whose judge sees the image."""

    def judge_requests(self, *args):
        return [dataclasses.replace(r, image=f"{r.id}.png") for r in super().judge_requests(*args)]


def test_the_judge_sees_the_image_unless_it_is_hidden(job, data):
    shown = dataclasses.replace(data, read_image=lambda name: png((int(name.split(".")[0]), 0, 0)))
    with Memory(rating) as server:
        with_images = {"benchmark": WithImages(), "data": shown}
        job(spec_of(server), **with_images).run()
        assert all(call.images == [png((number(call), 0, 0))] for call in server.calls)
        job(spec_of(server), **with_images, show_image=False).run()
        assert len(server.calls) == 2 * COUNT
        assert all(not call.images for call in server.calls[COUNT:])


def test_prompts_of_the_user_replace_the_built_in_ones(job, tmp_path):
    built_in = load_prompts()
    expected = {"mmhal", "llava_bench_conv", "llava_bench_detail", "llava_bench_complex", "mm_vet", "gavie"}
    assert expected <= built_in.keys()
    with refused(tmp_path, "mmhal.txt", error=UserError):
        load_prompts(tmp_path)
    (tmp_path / "gavie.txt").write_text("mine", "utf-8")
    assert load_prompts(tmp_path) == built_in | {"gavie": "mine"}
    (tmp_path / "gavie.txt").write_bytes("Größe".encode("latin-1"))
    with refused("gavie.txt", error=UserError):
        load_prompts(tmp_path)
    (tmp_path / "gavie.txt").unlink()
    with Memory(rating) as server:
        for text in ("{verdict}", "{}", "{question", "}", "{question.x}"):
            (tmp_path / "mmhal.txt").write_text(text, "utf-8")
            with refused("mmhal.txt", "{model_answer}"):
                job(spec_of(server), prompts=tmp_path).run()
        assert server.calls == []


@pytest.mark.parametrize(
    ("judges", "fields", "match"),
    [
        (["openai:tiny"], {"rule": "other"}, "other.*official"),
        (["tiny"], {}, "PROVIDER:MODEL"),
        ([], {}, "openai:MODEL"),
        (["local:mine"], {}, "local"),
        (["openai:tiny"], {"benchmark": WithImages()}, r"0\.png"),
        (["openai:tiny@http://a/v1", "openai:tiny@http://b/v1"], {}, "one file"),
    ],
    ids=["rule", "judge", "no judge", "no model", "missing image", "one file"],
)
def test_mistakes_are_reported(job, judges, fields, match):
    with pytest.raises(UserError, match=match):
        job(*judges, **fields).run()


REPLY = {"id": "0", "reply": "Rating: 3", "judge": "openai:tiny", "version": "v", "date": "2026-01-02", "prompt": "p"}


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        ([REPLY, REPLY], ["reply 0"]),
        ([REPLY, {"id": "1"}], ["row 1", "reply"]),
        ([REPLY, {"id": "1", "reply": 3}], ["row 1"]),
        ([REPLY, ["1"]], ["row 1"]),
        ([REPLY, {"pid": "1", "score": [0.5]}], ["row 1", "pid, score"]),
        ([REPLY, {"question_id": 1, "content": None}], ["row 1", "reply to 1 is None"]),
        ([REPLY, {"choices": []}], ["row 1", "content"]),
        ([REPLY, {"choices": [{"message": {"content": None}}]}], ["row 1", "content"]),
        ([REPLY, REPLY | {"id": "1", "judge": "gemini:tiny"}], ["judges", "gemini:tiny, openai:tiny"]),
        ([REPLY, REPLY | {"id": "1", "prompt": "q"}], ["prompts"]),
        ([REPLY, REPLY | {"id": "1", "answers": "a"}], ["answers"]),
        ([REPLY, REPLY | {"id": "1", "temperature": 0.2}], ["temperatures"]),
        (['{"id": "0", "reply'], ["line 1"]),
        (None, ["no such file"]),
    ],
)
def test_broken_reply_files_are_reported(tmp_path, lines, facts):
    path = tmp_path / "replies.jsonl"
    if lines is not None:
        make.write_lines(path, lines)
    with refused(path, *facts):
        read_replies(path)


def test_reply_files_from_elsewhere_need_ids_and_replies_only(tmp_path):
    path = tmp_path / "replies.jsonl"
    assert read_replies(make.write_lines(path, []))[0] == {}
    plain = make.write_lines(path, [{"id": 7, "reply": "Rating: 3"}])
    assert read_replies(plain) == ({"7": "Rating: 3"}, {"judge": "unknown"})
    assert read_replies(make.write_lines(path, [{"id": 7.0, "reply": "Rating: 3"}]))[0] == {"7": "Rating: 3"}
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Rating: "}, {"type": "text", "text": "3"}]
    completion = {"choices": [{"message": {"content": parts}}]}
    assert read_replies(make.write_lines(path, [completion]))[0] == {"0": "Rating: 3"}
    make.write_lines(path, [REPLY | {"id": str(n), "date": f"2026-01-0{n}"} for n in (5, 3, 4)])
    assert read_replies(path)[1]["judge/date"] == "2026-01-03 to 2026-01-05"


THOUGHT = "<think>Is it incorrect? Rating: 1, 0.2, 2 9.</think>\n"
COMPLETION = {"id": "chatcmpl-1", "object": "chat.completion", "usage": {"total_tokens": 9}}
OFFICIAL_FILES = {
    # LLaVA's reviews: their own id is a line number.
    "llava-bench": (
        lambda ids, texts: [
            {"id": n, "question_id": int(id), "answer1_id": "a", "answer2_id": "b", "category": "conv", "content": text}
            for n, (id, text) in enumerate(zip(ids, texts, strict=True), 1)
        ],
        ["8 6\nSo.", f"{THOUGHT}8 4"],
        100 * (6 + 4) / (8 + 8),
    ),
    # LLaVA-RLHF's completions, in the order of the questions.
    "mmhal": (
        lambda ids, texts: [
            {**COMPLETION, "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
            for text in texts
        ],
        ["Rating: 5", f"{THOUGHT}Rating: 3"],
        4,
    ),
    # MM-Vet's grades.
    "mm-vet": (
        lambda ids, texts: {
            id: {"model": ["gpt-4"], "content": [text], "score": [0.5]} for id, text in zip(ids, texts, strict=True)
        },
        ["0.5\n", f"{THOUGHT}0.7"],
        60,
    ),
}


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_files_of_official_judges_are_read(tmp_path, name):
    bench, loaded = load(name, SAMPLES[name](tmp_path))
    rows, texts, expected = OFFICIAL_FILES[name]
    answers = answer_all(loaded, "So.")
    texts = [texts[n % 2] for n in range(len(answers))]
    content = rows(list(answers), texts)
    path = (make.write_lines if name == "llava-bench" else make.write_json)(tmp_path / "judged.json", content)
    replies, protocol = read_replies(path, loaded)
    assert protocol == {"judge": "unknown"}
    found = headline(bench.score(loaded, answers, replies=replies))
    assert found == pytest.approx(expected)
    if name == "mmhal":  # their order alone tells which is whose
        with refused(path, "95 completions for 96 questions"):
            read_replies(make.write_json(path, content[1:]), loaded)


def test_thoughts_of_a_judge_are_no_verdict(job, tmp_path):
    path = make.write_lines(tmp_path / "replies.jsonl", [REPLY | {"reply": "<think>It is correct"}])
    with refused(path, "reply to 0", "thoughts"):
        read_replies(path)
    with Memory(lambda call: f"{THOUGHT}Rating: 3" if number(call) else "<think>Rating: 3") as server:
        result = job(spec_of(server)).run()
    assert set(result.outcome.failed) == {"0"}
    replies, _ = read_replies(tmp_path / "out" / "replies.jsonl")
    assert set(replies.values()) == {"Rating: 3"}
