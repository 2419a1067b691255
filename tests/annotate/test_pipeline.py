"""The stages against a server that misbehaves: what is asked, what is written, what is dropped.

Defects of REVERIE's scripts (numbers of sections and defects as in the project's notes), and the test that shows that each
cannot happen here:

| defect | test |
|---|---|
| frame: done is a file's name, whatever is in it | test_frame_done_is_a_reply_and_not_a_file_name |
| frame: `--num_tasks` makes more slices than asked | test_frame_as_many_requests_at_once_as_asked |
| frame: no retry | test_frame_what_fails_is_tried_again_in_the_same_run |
| frame: no timeout, backoff or limit of rate | test_end_to_end, tests/hosted/test_runner.py |
| frame: a client made anew for each item | test_frame_one_client_a_run |
| questions 1: fenced JSON is lost | test_questions_1_fenced_json |
| questions 2: true, false, null are lost | test_questions_2_json_words |
| questions 3: numbered keys are stored, then dropped | test_questions_3_numbered_keys |
| questions 4: sets leave a broken file that blocks for ever | test_questions_4_sets_are_asked_again_and_block_nothing |
| questions 5: `--num_tasks 0` spins for ever | test_questions_5_none_at_once_is_refused |
| questions 6: blocked and empty replies, no reason kept | test_questions_6_reasons_are_kept |
| questions 7: the folder is baked into the names | test_questions_7_names_are_relative |
| questions 8: order of the directory | test_order_is_that_of_the_list |
| rationales 1: one broken picture kills the rest; exit code 0 | test_rationales_1_a_broken_picture_stops_no_other |
| rationales 2: drift of the index | test_rationales_2_no_drift |
| rationales 3: a failed negative throws the positive away | test_rationales_3_a_positive_is_kept_when_its_negative_fails |
| rationales 4: one negative a question | test_rationales_4_several_wrong_answers |
| rationales 5: no conversion of pictures, files left open | test_rationales_5_any_kind_of_picture |
| rationales 6: files are not written at once | test_rationales_6_files_are_whole_or_old, test_kill.py |
| judge 1: the README's command fails for want of a second key | test_judge_1_one_key_is_enough |
| judge 2: a package is needed that is not used | test_judge_2_only_the_package_in_use |
| judge 3: " No" and "**No**" lost, "Not sure" and "None" kept | test_judge_3_whole_words |
| judge 4: drift of the index | test_judge_4_no_drift |
| judge 5: the judge sees no picture | test_judge_5_the_judge_can_see |
| judge: nothing is dropped | test_end_to_end, test_judge_drops_what_it_drops |
| judge: rows of `ocr_vqa` vanish | test_judge_no_path_vanishes |
| whole: folders are not made | test_whole_folders_are_made |
| whole: files opened in the locale's encoding | tests/annotate/test_kill.py (the children's locale is ASCII) |
| whole: no record of tokens, version, time, raw reply | test_whole_everything_is_recorded |
| whole: keys on the command line | tests/cli/test_annotate.py |
| whole: the same question or picture twice | test_whole_nothing_twice |
| whole: nothing makes reverie.json | test_end_to_end, test_whole_what_is_released_can_be_read |
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reverie_jax.annotate import pipeline as pipelines
from reverie_jax.annotate.pipeline import AnnotationJob, Pipeline, decide, export
from reverie_jax.data.mixture import MixtureEntry, mixture
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import RequestSettings
from reverie_jax.hosted.runner import Limits
from tests.annotate import helpers
from tests.annotate.helpers import (
    DROPPED,
    JOURNAL,
    JUDGED,
    QUESTIONS,
    RATIONALES,
    RELEASED,
    Memory,
    answer,
    load,
    rows_of,
    stage_of,
)
from tests.data.fakes import png
from tests.hosted import server as loopback
from tests.hosted.server import Call, Fault, Server, share

pytest.importorskip("openai")
pytest.importorskip("google.genai")
# google-genai derives a class from aiohttp's session where aiohttp is installed, which aiohttp discourages.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
QUICK = Limits(concurrency=8, backoff=0.01, longest=0.05)
STAGES = ("questions", "rationales", "judge")
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])


@pytest.fixture
def prompts(tmp_path) -> Path:
    return helpers.write_prompts(tmp_path / "prompts")


@pytest.fixture
def pictures(tmp_path) -> dict[str, bytes]:
    return helpers.write_pictures(tmp_path / "images", 6)


@pytest.fixture
def make(tmp_path, prompts, pictures):
    """A job over the six pictures; a server stands for who writes and judges."""

    def job(
        server: Server | Memory | None = None, provider: str = "openai", out: str = "out", **changes
    ) -> AnnotationJob:
        options = {
            "folder": tmp_path / out,
            "images": tmp_path / "images",
            "images": tuple(pictures),
            "model": "" if server is None else name_of(server, provider),
            "count": 1,
            "prompts": prompts,
            "limits": QUICK,
        }
        return AnnotationJob(**(options | changes))

    return job


def name_of(server: Server | Memory, provider: str = "openai", model: str = "tiny") -> str:
    return f"{provider}:{model}@{server.url}" + ("/v1" if provider == "openai" else "")


def run(job: AnnotationJob, *stages: str) -> dict[str, pipelines.Outcome]:
    with Pipeline(job, os.environ) as pipeline:
        found = {stage: getattr(pipeline, stage)() for stage in stages or STAGES}
    if not stages:
        export(job.folder)
    return found


def stages_of(server: Server | Memory) -> Counter[str]:
    return Counter(map(stage_of, server.calls))


def same(folder: Path, wanted: dict) -> bool:
    """All five files hold what was worked out by hand; the dropped rows say who said what."""
    for name in (QUESTIONS, RATIONALES, JUDGED, RELEASED):
        assert load(folder, name) == wanted[name], name
    found = load(folder, DROPPED)
    assert len(found) == len(wanted[DROPPED])
    for row, (before, said) in zip(found, wanted[DROPPED], strict=True):
        assert row["reason"]
        assert said in row["judges"].values()
        assert {key: value for key, value in row.items() if key not in ("reason", "judges")} == before
    return True


@PROVIDERS
def test_end_to_end(make, pictures, provider):
    """All faults at once: every file as it has to be, every whole answer asked for once, every key in its place."""
    plan = share(0.35, seed=3)
    with Server(answer, plan, hold=5.0, retry_after=0.05, is_judge=lambda call: stage_of(call) == "judge") as server:
        job = make(server, provider, count=2, confusing=2, settings=RequestSettings(timeout=1.0))
        outcomes = run(job)
        assert set(server.served.values()) == {1}
        assert sum(server.faulted.values()) > 15
        assert stages_of(server).keys() == {"questions", "positive", "negative", "judge"}
        assert {call.key for call in server.calls} == {helpers.SECRETS[f"{provider.upper()}_API_KEY"]}
        usable = sum(outcome.usable for outcome in outcomes.values())
        assert usable == len(server.served)
        assert same(job.folder, helpers.expected(pictures, job.model, count=2, confusing=2))
        calls = len(server.calls)
        again = run(job)
        assert len(server.calls) == calls
    assert usable == 6 + 6 * 2 + 6 * 2 * 2 + 6 * 2 * 2
    assert all(not outcome.failed and not outcome.stopped for outcome in (*outcomes.values(), *again.values()))
    assert sum(outcome.had for outcome in again.values()) == usable
    assert any(load(job.folder, DROPPED))
    first = load(job.folder, QUESTIONS)[0]
    assert list(first) == ["image", "question", "correct_answer", "confusing_answer", "question_type"]
    keys = ["correct_rationale", "incorrect_rationale", "gemini_pro_judge", "judges"]
    assert list(load(job.folder, JUDGED)[0]) == [*first, *keys]


@PROVIDERS
def test_what_arrives(make, provider, tmp_path):
    """The picture goes with questions and rationales, the schema with questions, and the settings with all."""
    with Server(answer) as server:
        run(make(server, provider, settings=RequestSettings(temperature=0.25)))
        for call in server.calls:
            stage = stage_of(call)
            assert call.structured == (stage == "questions")
            assert len(call.images) == (stage != "judge")
            settings = call.body if provider == "openai" else call.body["generationConfig"]
            assert settings["temperature"] == 0.25
        run(make(server, provider, out="plain", settings=RequestSettings(structured=False)), "questions")
        assert not server.calls[-1].structured


def test_the_schema_is_the_one_of_the_questions(make):
    with Server(answer) as server:
        run(make(server), "questions")
        sent = server.calls[0].body["response_format"]["json_schema"]
    assert sent["strict"] is True
    text = json.dumps(sent["schema"])
    for word in ("questions", "question", "type", "correct_answer", "confusing_answers", "yes/no", "choice"):
        assert f'"{word}"' in text


def test_our_own_prompts(make):
    """Those that ship say what the stage needs, and nothing of what it must not know."""

    def reply(call: Call) -> str:
        if call.structured:
            return helpers.say("questions\n2\n2", call.digest[:16])
        return helpers.say("judge" if "contradict" in call.text else "positive", call.digest[:16])

    with Memory(reply) as server:
        job = make(server, count=2, confusing=2, prompts=None)
        run(job)
        texts = [call.text for call in server.calls]
        assert stages_of(server).total() == 6 + 12 + 24 + 24
    rows = load(job.folder, RATIONALES)
    questions = [text for text in texts if "JSON" in text]
    assert len(questions) == 6
    assert all("2" in text or "two" in text for text in questions)
    assert not any("{{" in text or "{%" in text or "None" in text for text in texts)
    for row in rows:
        about = [text for text in texts if row["question"] in text]
        judged = [text for text in about if row["correct_rationale"] in text and row["incorrect_rationale"] in text]
        judged = [text for text in judged if row["confusing_answer"] in text and row["correct_answer"] in text]
        assert len(judged) == 1
        others = [text for text in about if "contradict" not in text]
        assert len(others) == 3  # one positive, a negative for each wrong answer
        assert sum(row["confusing_answer"] in text for text in others) == 1
        # Who explains why a wrong answer is wrong is not told the right one.
        assert not any(row["confusing_answer"] in text and row["correct_answer"] in text for text in others)


def test_order_is_that_of_the_list(make, pictures):
    """Whatever is asked at once, and whoever replies first."""
    names = sorted(pictures, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert names != sorted(names)
    jobs = []
    with Memory(answer, latency=lambda call: int(call.digest[:2], 16) / 20_000) as server:
        for at_once in (1, 16):
            limits = dataclasses.replace(QUICK, concurrency=at_once)
            jobs.append(make(server, out=f"out{at_once}", images=tuple(names), count=2, limits=limits))
            run(jobs[-1])
        assert server.peak > 4
    for name in helpers.FILES:
        one, many = ((job.folder / name).read_bytes() for job in jobs)
        assert one == many, name
    assert list(dict.fromkeys(row["image"] for row in load(jobs[0].folder, JUDGED))) == names
    listed = [row["image"] for row in load(jobs[0].folder, RELEASED)]
    assert list(dict.fromkeys(listed)) == [name for name in names if name in listed]


def test_each_stage_alone(make, pictures):
    """Each goes on from the file of the one before; none asks what is another's."""
    with Memory(answer) as server:
        job = make(server)
        wanted = helpers.expected(pictures, job.model)
        for stage in ("rationales", "judge"):
            with pytest.raises(UserError, match="not there"):
                run(job, stage)
        with pytest.raises(UserError, match="not there"):
            export(job.folder)
        assert server.calls == []
        run(job, "questions")
        assert stages_of(server) == {"questions": 6}
        run(job, "rationales")
        assert stages_of(server) == {"questions": 6, "positive": 6, "negative": 6}
        assert not (job.folder / JUDGED).exists()
        run(job, "judge")
        assert stages_of(server) == {"questions": 6, "positive": 6, "negative": 6, "judge": 6}
        assert not (job.folder / RELEASED).exists()
        export(job.folder)
    assert same(job.folder, wanted)


def test_a_file_edited_by_hand_is_what_the_next_stage_sees(make):
    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        rows = load(job.folder, QUESTIONS)[:2]
        rows[0]["question"] = "Is it mended?"
        (job.folder / QUESTIONS).write_text(json.dumps(rows))
        run(job, "rationales")
        assert {call.text.split("\n")[1] for call in server.calls if stage_of(call) == "positive"} == {
            "Is it mended?",
            rows[1]["question"],
        }
    assert [row["question"] for row in load(job.folder, RATIONALES)] == [row["question"] for row in rows]


@pytest.mark.parametrize("text", ["", "[", "{}", '[{"image": "a"}]', "[3]", '[{"image": 1}]'])
def test_a_broken_file_of_the_stage_before_is_named(make, text):
    with Memory(answer) as server:
        job = make(server)
        job.folder.mkdir()
        (job.folder / JOURNAL).touch()
        (job.folder / QUESTIONS).write_text(text)
        with pytest.raises(UserError, match=QUESTIONS):
            run(job, "rationales")


# Votes.


def by_hand(votes: list[str], rule: str) -> str:
    """What the documentation says of judges who have all spoken."""
    yes = votes.count("yes")
    drop = {"majority": yes >= len(votes) / 2, "any": yes > 0, "all": yes == len(votes)}[rule]
    return "yes" if drop else "no"


@pytest.mark.parametrize("rule", ["majority", "any", "all"])
def test_votes(rule):
    """Every way in which up to five judges can speak or be silent: a verdict is one that the silent could not turn."""
    for judges in range(1, 6):
        for said in itertools.product(("yes", "no", None), repeat=judges):
            spoken = [vote for vote in said if vote is not None]
            silent = judges - len(spoken)
            ends = {by_hand([*spoken, *rest], rule) for rest in itertools.product(("yes", "no"), repeat=silent)}
            assert decide(spoken, judges, rule) == (ends.pop() if len(ends) == 1 else None), said


TABLE = {
    # What three judges say to the rows one to six, and what becomes of these under each rule.
    "a": ("No", "Yes", "Yes", "No", "Not sure", "Yes"),
    "b": ("No", "No", "Yes", "No", "Yes", "Not sure"),
    "c": ("No", "No", "No", "Hm", "No", "Yes"),
}
ENDS = {
    "majority": ("no", "no", "yes", "no", None, "yes"),
    "any": ("no", "yes", "yes", None, "yes", "yes"),
    "all": ("no", "no", "no", "no", "no", None),
}


def test_several_judges(make):
    """Each is asked about each row; who says nothing usable is asked again. A row without a decision is in no file."""
    order = {}

    def reply(call: Call) -> str:
        if call.model == "writer":
            return answer(call)
        return TABLE[call.model][order[call.text.split("\n")[1]]]

    silent = {(model, n) for model, said in TABLE.items() for n, text in enumerate(said) if text in ("Not sure", "Hm")}
    with Memory(reply) as server:
        judges = tuple(name_of(server, "openai", model) for model in TABLE)
        job = make(server, model=name_of(server, "openai", "writer"), judges=judges)
        run(job, "questions", "rationales")
        rows = load(job.folder, RATIONALES)
        order |= {row["question"]: number for number, row in enumerate(rows)}
        for tries, rule in enumerate(ENDS, 1):
            outcome = run(dataclasses.replace(job, votes=rule), "judge")["judge"]
            calls = [call for call in server.calls if call.model in TABLE]
            asked = Counter((call.model, order[call.text.split("\n")[1]]) for call in calls)
            assert asked == {(m, n): 3 * tries if (m, n) in silent else 1 for m in TABLE for n in range(6)}
            assert outcome.reasons() == [("neither yes nor no", 3)]
            judged = {row["question"]: row for row in load(job.folder, JUDGED)}
            assert [judged.get(row["question"], {}).get("gemini_pro_judge") for row in rows] == list(ENDS[rule])
            for number, row in enumerate(rows):
                if row["question"] in judged:
                    said = {judge: TABLE[model][number].lower() for judge, model in zip(judges, TABLE, strict=True)}
                    spoken = {judge: vote for judge, vote in said.items() if vote in ("yes", "no")}
                    assert judged[row["question"]]["judges"] == spoken
            dropped = [row["question"] for row in load(job.folder, DROPPED)]
            assert dropped == [row["question"] for n, row in enumerate(rows) if ENDS[rule][n] == "yes"]
            export(job.folder)
            talks = [talk["conversations"][0]["value"] for talk in load(job.folder, RELEASED)]
            kept = {row["question"] for n, row in enumerate(rows) if ENDS[rule][n] == "no"}
            assert {text.removeprefix("<image>\n") for text in talks} == kept


def test_a_judge_named_twice_does_not_block_every_row(make):
    with Memory(answer) as server:
        job = make(server, judges=(name_of(server, "openai", "a"),) * 2)
        outcome = run(job)["judge"]
    assert not outcome.failed
    assert len(load(job.folder, JUDGED)) == 6


def test_the_same_model_at_two_addresses_is_refused_before_anything_is_asked(make):
    """Two servers of one model name would vote with one voice."""
    with Server(lambda call: "No") as mild, Server(lambda call: "Yes") as strict, Server(answer) as server:
        job = make(server, judges=(name_of(mild, "openai"), name_of(strict, "openai")), votes="all")
        with pytest.raises(UserError, match="two judges have one name"):
            run(job)
        assert not server.calls


def test_an_address_where_nobody_is_ends_the_run(make):
    """And not every item after all its retries."""
    with pytest.raises(UserError, match="nothing was ever reached there"):
        run(make(model="openai:m@http://127.0.0.1:9/v1"))


def test_a_password_in_a_judges_address_is_not_written_down(make):
    with Memory(answer) as server:
        who = name_of(server, "openai", "a").replace("http://", "http://me:secret@")
        job = make(server, judges=(who,))
        run(job)
    assert all(list(row["judges"]) == [who.replace("me:secret@", "")] for row in load(job.folder, JUDGED))
    assert not any(b"secret@" in path.read_bytes() for path in job.folder.iterdir())


def test_judge_drops_what_it_drops(make, pictures):
    """`yes` drops, and what is dropped is nowhere in reverie.json."""
    with Memory(answer) as server:
        job = make(server, count=3)
        run(job)
    judged = load(job.folder, JUDGED)
    dropped = {row["question"] for row in judged if row["gemini_pro_judge"] == "yes"}
    assert 0 < len(dropped) < len(judged)
    assert {row["question"] for row in load(job.folder, DROPPED)} == dropped
    text = (job.folder / RELEASED).read_text("utf-8")
    assert not any(question in text for question in dropped)
    assert all(row["question"] in text for row in judged if row["question"] not in dropped)


# The frame of the three scripts.


def test_frame_done_is_a_reply_and_not_a_file_name(make, pictures):
    """Files in the original's folders do not make anything done, unless they hold it."""
    with Memory(answer) as server:
        job = make(server)
        for folder in ("reasoning_instruct_raw_data", "rationale_raw_data", "check_results"):
            (job.folder / folder).mkdir(parents=True)
            for number, text in enumerate(["", "{", "[]", "null", '{"image": "0001.png"}', '{"content": 3}']):
                (job.folder / folder / f"{number}.json").write_text(text)
        assert not any(outcome.failed for outcome in run(job).values())
        assert stages_of(server) == dict.fromkeys(("questions", "positive", "negative", "judge"), 6)
    assert same(job.folder, helpers.expected(pictures, job.model))


@pytest.mark.parametrize(("at_once", "latency"), [(1, 0.01), (7, 0.25)])
def test_frame_as_many_requests_at_once_as_asked(make, at_once, latency, tmp_path):
    names = tuple(helpers.write_pictures(tmp_path / "images", 14))
    with Server(answer, latency=latency) as server:
        run(make(server, images=names, limits=dataclasses.replace(QUICK, concurrency=at_once)), "questions")
        assert server.peak == at_once
        assert len(server.calls) == 14


@PROVIDERS
def test_frame_what_fails_is_tried_again_in_the_same_run(make, provider, pictures):
    """Each item meets a fault of each kind once, and ends well."""
    faults = [*loopback.TRANSPORT, Fault.EMPTY, Fault.TRUNCATED]
    faults.remove(Fault.TIMEOUT)

    def plan(call: Call) -> Fault | None:
        return faults[call.attempt - 1] if call.attempt <= len(faults) else None

    with Server(answer, plan, retry_after=0.02) as server:
        job = make(server, provider)
        outcome = run(job, "questions")["questions"]
        assert (outcome.usable, outcome.failed) == (6, {})
        assert Counter(call.attempt for call in server.calls) == dict.fromkeys(range(1, len(faults) + 2), 6)
    assert load(job.folder, QUESTIONS) == helpers.expected(pictures, job.model)[QUESTIONS]
    assert helpers.states(job.folder / JOURNAL) == {"usable": 6, "unusable": 12, "failed": 30}


def test_frame_one_client_a_run(make):
    with Memory(answer) as server:
        run(make(server), "questions")
        assert len(server.calls) == 6
        assert (len(server.opened), server.closed) == (1, 1)


# The first script.


def dressed(make, pictures, dress) -> None:
    """Questions whose replies are all dressed so: read at once, and nothing asked twice."""

    def reply(call: Call) -> str:
        return dress(answer(call)) if stage_of(call) == "questions" else answer(call)

    with Server(reply) as server:
        job = make(server)
        run(job)
        assert stages_of(server)["questions"] == 6
    assert same(job.folder, helpers.expected(pictures, job.model))


def test_questions_1_fenced_json(make, pictures):
    dressed(make, pictures, lambda text: f"Certainly! Here it is:\n\n```json\n{text}\n```\n\nEnjoy.")


def test_questions_2_json_words(make):
    """`true`, `false` and `null` in an otherwise good reply."""
    asked = '[{"question": "Is it red?", "correct_answer": true, "confusing_answer": false, "hint": null}]'
    with Memory(lambda call: asked) as server:
        job = make(server)
        assert not run(job, "questions")["questions"].failed
        assert len(server.calls) == 6
    rows = load(job.folder, QUESTIONS)
    assert {(row["correct_answer"], row["confusing_answer"], row["question_type"]) for row in rows} == {
        ("Yes", "No", "yes/no")
    }


def test_questions_3_numbered_keys(make, pictures):
    """The prompt's own hint, taken by its word."""

    def renamed(text: str) -> str:
        (one,) = json.loads(text)["questions"]
        return json.dumps(
            [
                {
                    "question1": one["question"],
                    "correct answer1": one["correct_answer"],
                    "confusing answer1": one["confusing_answers"][0],
                }
            ]
        )

    dressed(make, pictures, renamed)


def test_questions_4_sets_are_asked_again_and_block_nothing(make, pictures):
    """A reply of sets is unusable, is kept, is tried again; nothing of it is left in the way of a later run."""
    stubborn = hashlib.sha256(pictures["0002.png"]).hexdigest()
    well = threading.Event()

    def reply(call: Call) -> str:
        image = hashlib.sha256(call.images[0]).hexdigest() if call.images else ""
        return '[{"what?", "a", "b"}]' if image == stubborn and not well.is_set() else answer(call)

    with Memory(reply) as server:
        job = make(server)
        outcome = run(job, "questions")["questions"]
        assert len(outcome.failed) == 1
        assert len(server.calls) == 5 + 3
        assert [row["image"] for row in load(job.folder, QUESTIONS)] == [n for n in pictures if n != "0002.png"]
        assert rows_of(job.folder / JOURNAL, "reply", "state = 'unusable'") == [('[{"what?", "a", "b"}]',)] * 3
        well.set()
        assert not run(job, "questions")["questions"].failed
        assert len(server.calls) == 5 + 3 + 1
        run(job)
    assert same(job.folder, helpers.expected(pictures, job.model))


def test_questions_5_none_at_once_is_refused(make, reverie, tmp_path):
    with Memory(answer) as server:
        for value in ("0", "-1"):
            words = ("--images", tmp_path / "images", "--out", tmp_path / "o", "--writer", name_of(server))
            code, out, err = reverie("annotate", "run", *words, "--concurrency", value)
            assert (code, out) == (2, "")
            assert "--concurrency" in err
            assert err.count("\n") == 1
        assert server.calls == []


@PROVIDERS
def test_questions_6_reasons_are_kept(make, provider, pictures):
    """Blocked, refused, empty, cut off: no exception, a reason each, and what came is in the journal."""
    faults = dict(
        zip(
            (hashlib.sha256(encoded).hexdigest() for encoded in pictures.values()),
            (Fault.BLOCKED, Fault.REFUSED, Fault.EMPTY, Fault.TRUNCATED, None, None),
            strict=True,
        )
    )
    with Server(answer, lambda call: faults[hashlib.sha256(call.images[0]).hexdigest()]) as server:
        job = make(server, provider)
        outcome = run(job, "questions")["questions"]
        assert len(server.calls) == 4 * 3 + 2
    reasons = sorted(outcome.failed.values())
    assert len(reasons) == 4
    assert sum("blocked" in reason for reason in reasons) == 2
    assert sum("empty" in reason for reason in reasons) == 1
    assert sum("cut off" in reason for reason in reasons) == 1
    kept = rows_of(job.folder / JOURNAL, "reason, reply, tokens_in", "state = 'unusable'")
    assert len(kept) == 12
    assert {reason for reason, _, _ in kept} == set(reasons)
    assert all(tokens > 100 for _, _, tokens in kept)  # they are paid for all the same
    assert {bool(reply) for reason, reply, _ in kept if "cut off" in reason} == {True}
    assert [row["image"] for row in load(job.folder, QUESTIONS)] == ["0004.png", "0005.png"]


def test_questions_7_names_are_relative(make, tmp_path, pictures):
    """No folder in any file: pictures and notes can be moved, and nothing is asked again."""
    with Memory(answer) as server:
        job = make(server)
        run(job)
        calls = len(server.calls)
        (tmp_path / "images").rename(tmp_path / "moved")
        job.folder.rename(tmp_path / "notes")
        elsewhere = dataclasses.replace(job, folder=tmp_path / "notes", images=tmp_path / "moved")
        run(elsewhere)
        assert len(server.calls) == calls
    assert same(elsewhere.folder, helpers.expected(pictures, job.model))
    for name in helpers.FILES:
        assert str(tmp_path) not in (elsewhere.folder / name).read_text("utf-8")


# The second script.


def test_rationales_1_a_broken_picture_stops_no_other(make, pictures, tmp_path, reverie, prompts):
    """Missing or broken after the questions were asked: all others are done, the exit code says that not all is well, and
    the pictures are named."""
    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        (tmp_path / "images" / "0001.png").unlink()
        (tmp_path / "images" / "0003.png").write_bytes(pictures["0003.png"][:40])
        words = ("--images", job.pictures, "--out", job.folder, "--writer", job.model, "--prompts", prompts)
        code, _, err = reverie("annotate", "rationales", "--questions", 1, *words)
        assert code == 1
        assert stages_of(server) == {"questions": 6, "positive": 4, "negative": 4}
    assert [row["image"] for row in load(job.folder, RATIONALES)] == ["0000.png", "0002.png", "0004.png", "0005.png"]
    assert "cannot be read" in err
    assert "not a readable picture" in err


def test_rationales_1_pictures_that_failed_are_named(make, pictures, tmp_path, reverie, prompts):
    """Among seventy thousand, a count of reasons does not help to find them: their names are printed or in a file."""
    (tmp_path / "images" / "0001.png").write_bytes(b"no picture")
    (tmp_path / "images" / "0003.png").write_bytes(pictures["0003.png"][:40])
    with Memory(answer) as server:
        out = tmp_path / "out"
        words = ("--images", tmp_path / "images", "--out", out, "--writer", name_of(server))
        code, printed, err = reverie("annotate", "run", "--questions", 1, "--prompts", prompts, *words)
    assert code == 1
    files = "".join(p.read_text("utf-8") for p in out.iterdir() if p.suffix in (".json", ".jsonl", ".txt", ".html"))
    for name in ("0001.png", "0003.png"):
        assert name in printed + err + files


def test_rationales_2_no_drift(make, pictures, tmp_path):
    """New pictures before, between and behind: every rationale stays with its question, none is asked for twice."""
    with Memory(answer) as server:
        job = make(server, images=("0003.png", "0001.png"))
        run(job)
        assert stages_of(server) == dict.fromkeys(("questions", "positive", "negative", "judge"), 2)
        more = dataclasses.replace(job, images=tuple(pictures))
        run(more)
        assert stages_of(server) == dict.fromkeys(("questions", "positive", "negative", "judge"), 6)
    assert same(job.folder, helpers.expected(pictures, job.model))


def test_rationales_3_a_positive_is_kept_when_its_negative_fails(make, pictures):
    well = threading.Event()

    def plan(call: Call) -> Fault | None:
        return None if well.is_set() or stage_of(call) != "negative" else Fault.EMPTY

    with Memory(answer, plan) as server:
        job = make(server)
        run(job, "questions")
        outcome = run(job, "rationales")["rationales"]
        assert (outcome.usable, len(outcome.failed)) == (6, 6)
        assert load(job.folder, RATIONALES) == []
        well.set()
        assert run(job, "rationales")["rationales"].failed == {}
        assert stages_of(server) == {"questions": 6, "positive": 6, "negative": 6 * 3 + 6}
        run(job)
    assert same(job.folder, helpers.expected(pictures, job.model))


def test_rationales_4_several_wrong_answers(make, pictures):
    """A negative for each, one positive for all: asked once, released once."""
    with Memory(answer) as server:
        job = make(server, count=2, confusing=3)
        run(job)
        assert stages_of(server) == {"questions": 6, "positive": 12, "negative": 36, "judge": 36}
    wanted = helpers.expected(pictures, job.model, count=2, confusing=3)
    assert same(job.folder, wanted)
    talks = [talk["conversations"] for talk in load(job.folder, RELEASED)]
    positives = Counter(turns[0]["value"] for turns in talks if turns[2]["value"].startswith("Explain why."))
    assert set(positives.values()) == {1}
    negatives = Counter(turns[0]["value"] for turns in talks if not turns[2]["value"].startswith("Explain why."))
    kept = Counter(f"<image>\n{row['question']}" for row in load(job.folder, JUDGED) if row["gemini_pro_judge"] == "no")
    assert negatives == kept
    assert set(kept.values()) >= {2, 3}
    assert all(len(turns) == 4 for turns in talks)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


GREY = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)
COLOUR = Image.fromarray(np.stack([GREY % 251, GREY // 16, GREY % 7 * 30], axis=-1).astype(np.uint8))
KINDS = {
    "plain.jpg": lambda: encoded(COLOUR, "JPEG"),
    "rgba.png": lambda: encoded(COLOUR.convert("RGBA"), "PNG"),
    "grey with alpha.png": lambda: encoded(COLOUR.convert("LA"), "PNG"),
    "palette.png": lambda: encoded(COLOUR.convert("P"), "PNG"),
    "bilevel.png": lambda: encoded(COLOUR.convert("1"), "PNG"),
    "grey.png": lambda: encoded(COLOUR.convert("L"), "PNG"),
    "16 bit.png": lambda: encoded(Image.fromarray(GREY * 21), "PNG"),
    "cmyk.jpg": lambda: encoded(COLOUR.convert("CMYK"), "JPEG"),
    "still.gif": lambda: encoded(COLOUR, "GIF"),
    "moving.gif": lambda: encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)]),
    "bitmap.bmp": lambda: encoded(COLOUR, "BMP"),
    "cmyk.tif": lambda: encoded(COLOUR.convert("CMYK"), "TIFF"),
    "16 bit.tiff": lambda: encoded(Image.fromarray(GREY * 21), "TIFF"),
    "webp.webp": lambda: encoded(COLOUR, "WEBP"),
    "really a png.jpg": lambda: encoded(COLOUR, "PNG"),
    "UPPER.PNG": lambda: encoded(COLOUR.rotate(180), "PNG"),
}
BROKEN = {
    "empty.png": b"",
    "text.jpg": b"not a picture",
    "page.png": b"<!DOCTYPE html><html></html>",
    "cut.png": encoded(COLOUR, "PNG")[:200],
    "cut.jpg": encoded(COLOUR, "JPEG")[:400],
    "header.png": encoded(COLOUR, "PNG")[:33],
}


@PROVIDERS
def test_rationales_5_any_kind_of_picture(make, provider, tmp_path):
    """Every service gets a format that it takes, in a mode that it takes; what is no picture is refused, alone."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    for name, draw in KINDS.items():
        (folder / name).write_bytes(draw())
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    (folder / "a folder.png").mkdir()
    names = (*KINDS, *BROKEN, "gone.png", "a folder.png")
    with Server(answer) as server:
        job = make(server, provider, pictures=folder, images=names)
        outcome = run(job, "questions")["questions"]
        assert outcome.usable == len(KINDS)
        assert len(outcome.failed) == len(BROKEN) + 2
        assert len(server.calls) == len(KINDS)
        for call in server.calls:
            (sent,) = call.images
            with Image.open(io.BytesIO(sent)) as image:
                image.load()
                assert image.format in ("JPEG", "PNG", "WEBP")
                assert image.size == (64, 48)
                deep = image.mode.startswith("I")
                near = np.asarray(image if deep else image.convert("RGB"), float).mean() / (257 if deep else 1)
            assert 20 < near < 235
            if provider == "openai":
                url = next(p for p in call.body["messages"][0]["content"] if p["type"] == "image_url")["image_url"][
                    "url"
                ]
                said = url.split(";")[0].removeprefix("data:")
            else:
                data = next(p["inlineData"] for p in call.body["contents"][0]["parts"] if "inlineData" in p)
                said = data.get("mimeType") or data["mime_type"]
            assert said == f"image/{image.format.lower()}"
    assert [row["image"] for row in load(job.folder, QUESTIONS)] == list(KINDS)
    assert all("picture" in reason for reason in outcome.failed.values())
    assert not any("\n" in reason or str(tmp_path) in reason for reason in outcome.failed.values())


def test_rationales_5_ink_is_not_sent(make, tmp_path):
    """A JPEG in CMYK is turned into colours of light: services differ in what they make of ink, and some refuse it."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "cmyk.jpg").write_bytes(KINDS["cmyk.jpg"]())
    with Server(answer) as server:
        run(make(server, pictures=folder, images=("cmyk.jpg",)), "questions")
        with Image.open(io.BytesIO(server.calls[0].images[0])) as image:
            assert image.mode in ("RGB", "RGBA", "L")


def test_rationales_6_files_are_whole_or_old(make, monkeypatch):
    """A disk that is full in the middle of a file leaves the file of before."""
    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        before = (job.folder / QUESTIONS).read_bytes()
        (job.folder / QUESTIONS).write_text("[]")

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises((OSError, UserError)):
                run(job, "questions")
        assert (job.folder / QUESTIONS).read_text() == "[]"
        run(job, "questions")
        assert (job.folder / QUESTIONS).read_bytes() == before
        assert len(server.calls) == 6
    assert {path.suffix for path in job.folder.iterdir()} <= {".json", ".sqlite", ".lock"}


# The third script.


@PROVIDERS
def test_judge_1_one_key_is_enough(make, provider, monkeypatch):
    """Who is asked needs a key, and nobody else."""
    for name in helpers.SECRETS:
        if not name.startswith(provider.upper()):
            monkeypatch.delenv(name)
    with Server(answer) as server:
        assert not any(outcome.failed for outcome in run(make(server, provider)).values())


@pytest.mark.parametrize("missing", ["openai", "gemini"])
def test_judge_2_only_the_package_in_use(make, missing, monkeypatch, zygote):
    """The other provider's package need not be there; one that is wanted is asked for by name, in one line."""
    assert zygote.imported == []
    gone = {"openai": ["openai"], "gemini": ["google.genai", "google.genai.errors", "google.genai.types"]}[missing]
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"reverie_jax.hosted.providers.{missing}", raising=False)
    monkeypatch.delattr(f"reverie_jax.hosted.providers.{missing}", raising=False)
    if missing == "gemini":
        monkeypatch.delattr("google.genai", raising=False)
    other = {"openai": "gemini", "gemini": "openai"}[missing]
    with Server(answer) as server:
        assert not run(make(server, other), "questions")["questions"].failed
        assert len(server.calls) == 6
        with pytest.raises(UserError, match=f"pip install .*{missing}") as caught:
            run(make(server, missing, out="other"), "questions")
        assert "\n" not in str(caught.value)
        assert len(server.calls) == 6


def test_judge_3_whole_words(make, pictures):
    """Marked and padded verdicts count; words that begin with `no` do not, and keep nothing."""
    said = dict(
        zip(pictures, (" No", "**No**", "Not sure, the analyses differ", "None", "Answer: Yes", "Nobody"), strict=True)
    )
    order = {}

    def reply(call: Call) -> str:
        return said[order[call.text.split("\n")[1]]] if stage_of(call) == "judge" else answer(call)

    with Memory(reply) as server:
        job = make(server)
        run(job, "questions", "rationales")
        order |= {row["question"]: row["image"] for row in load(job.folder, RATIONALES)}
        outcome = run(job, "judge")["judge"]
    verdicts = {row["image"]: row["gemini_pro_judge"] for row in load(job.folder, JUDGED)}
    assert verdicts == {"0000.png": "no", "0001.png": "no", "0004.png": "yes"}
    assert len(outcome.failed) == 3


def test_judge_4_no_drift(make, pictures):
    """Rows that go and come between two runs of the judge: each keeps its verdict, and none is judged twice."""
    with Memory(answer) as server:
        job = make(server)
        run(job)
        rows = load(job.folder, RATIONALES)
        new = rows[2] | {"incorrect_rationale": "Another one."}
        (job.folder / RATIONALES).write_text(json.dumps([new, *rows[3:], *rows[:2]]))
        run(job, "judge")
        assert stages_of(server)["judge"] == 7
    wanted = {row["question"]: row for row in helpers.expected(pictures, job.model)[JUDGED]}
    found = load(job.folder, JUDGED)
    assert [row["question"] for row in found] == [row["question"] for row in [new, *rows[3:], *rows[:2]]]
    assert all(row == wanted[row["question"]] for row in found[1:])


def test_judge_5_the_judge_can_see(make, pictures):
    """Asked for, the picture goes along; a verdict given blind does not count for it."""
    with Memory(answer) as server:
        job = make(server)
        run(job)
        run(dataclasses.replace(job, shown=True), "judge")
        judged = [call for call in server.calls if stage_of(call) == "judge"]
    assert [len(call.images) for call in judged] == [0] * 6 + [1] * 6
    assert {call.images[0] for call in judged[6:]} == set(pictures.values())


def test_judge_no_path_vanishes(make, tmp_path):
    """Neither `ocr_vqa` nor any other folder is passed over."""
    names = ("ocr_vqa/images/1.png", "coco/train2017/2.png", "vg/VG_100K/3.png")
    for number, name in enumerate(names):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(png((number, 9, 9)))
    with Memory(answer) as server:
        job = make(server, images=names)
        run(job)
    for name in (QUESTIONS, RATIONALES, JUDGED):
        assert [row["image"] for row in load(job.folder, name)] == list(names)


# The whole.


def test_whole_folders_are_made(make):
    with Memory(answer) as server:
        job = make(server, out="deep/er/out")
        run(job, "questions")
    assert (job.folder / QUESTIONS).exists()


@PROVIDERS
def test_whole_everything_is_recorded(make, provider):
    """Raw reply, tokens, price, time, the model's own version: of every attempt."""
    with Server(answer, latency=0.02) as server:
        job = make(server, provider, limits=dataclasses.replace(QUICK, price_in=2.0, price_out=10.0))
        start = time.time()
        run(job)
        told = {call.digest[:16]: loopback.usage(call, answer(call)) for call in server.calls}
        texts = {call.digest[:16]: answer(call) for call in server.calls}
    columns = "reply, tokens_in, tokens_out, price, version, started, seconds, model, provider, stage, reason, state"
    rows = rows_of(job.folder / JOURNAL, columns)
    assert len(rows) == len(told) == 24
    for reply, tokens_in, tokens_out, price, version, started, seconds, model, who, stage, reason, state in rows:
        (found,) = {name for name, text in texts.items() if text == reply}
        assert (tokens_in, tokens_out) == told[found]
        assert price == pytest.approx((2.0 * tokens_in + 10.0 * tokens_out) / 1e6)
        assert version == "tiny-2026-01-01"
        assert start <= started <= time.time()
        assert 0.02 <= seconds < 30
        assert (model, who, reason, state) == ("tiny", provider, "", "usable")
        assert stage in ("questions", "positive", "negative", "judge")


def test_whole_nothing_twice(make, pictures, tmp_path):
    """A name twice in the list, a picture under two names, a question twice in a reply: each is asked and paid for once."""
    (tmp_path / "images" / "twin.png").write_bytes(pictures["0000.png"])
    one = {"question": "Which?", "type": "short", "correct_answer": "this", "confusing_answers": ["that", "that"]}

    def reply(call: Call) -> str:
        return json.dumps([one, one]) if stage_of(call) == "questions" else answer(call)

    with Memory(reply) as server:
        job = make(server, images=("0000.png", "0001.png", "twin.png"), confusing=2)
        run(job)
        assert stages_of(server) == {"questions": 2, "positive": 2, "negative": 2, "judge": 2}
    assert [row["image"] for row in load(job.folder, JUDGED)] == ["0000.png", "0001.png", "twin.png"]


def test_whole_what_is_released_can_be_read(make, tmp_path):
    """By the importer, as `reverie build` does."""
    with Memory(answer) as server:
        job = make(server, count=2)
        run(job)
    records = list(mixture([MixtureEntry(file=job.folder / RELEASED, pictures=job.pictures)], ReadLog()))
    kept = [row for row in load(job.folder, JUDGED) if row["gemini_pro_judge"] == "no"]
    assert sum(len(record.conversations) for record in records) == 2 * len(kept)
    assert {record.id for record in records} == {row["image"] for row in kept}


# Prompts.


def test_a_changed_prompt_asks_again_and_only_that_stage(make, prompts, pictures):
    with Memory(answer) as server:
        job = make(server)
        run(job)
        helpers.write_prompts(prompts, negative="negative in other words")
        run(job)
        # The negatives are new, and with them what the judge is asked about.
        assert stages_of(server) == {"questions": 6, "positive": 6, "negative": 12, "judge": 12}
        wanted = helpers.expected(pictures, job.model, first={"negative": "negative in other words"})
        assert same(job.folder, wanted)
        helpers.write_prompts(prompts)
        run(job)
        assert len(server.calls) == 36
    assert same(job.folder, helpers.expected(pictures, job.model))


def test_one_prompt_of_ones_own_leaves_the_others(make, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "positive.txt").write_text("Warum ist {{ answer }} richtig? {{ question }} Größe ✓", "utf-8")

    def reply(call: Call) -> str:
        kind = "questions\n1\n1" if call.structured else "judge" if "contradict" in call.text else "positive"
        return helpers.say(kind, call.digest[:16])

    with Memory(reply) as server:
        run(make(server, prompts=mine))
        assert sum(call.text.startswith("Warum ist right 0 richtig?") for call in server.calls) == 6
        assert all(call.text.endswith("Größe ✓") for call in server.calls if call.text.startswith("Warum"))
        assert len(server.calls) == 24


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ picture_name }}", "picture_name"),
        ("{{ question", "questions.txt"),
        ("{% if %}", "questions.txt"),
        ("{{ 1 / 0 }}", "questions.txt"),
        ("{{ count + 1 }}", "questions.txt"),
    ],
)
def test_a_bad_prompt_is_one_line_and_nothing_is_asked(make, tmp_path, text, words):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "questions.txt").write_text(text)
    with Memory(answer) as server:
        with pytest.raises(UserError, match=words):
            run(make(server, prompts=tmp_path / "mine"))
        assert server.calls == []


def test_a_prompt_in_another_encoding_is_one_line(make, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "questions.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"questions\.txt"):
        run(make(model="openai:tiny", prompts=tmp_path / "mine"))


def test_no_prompts_there(make, tmp_path):
    for folder in (tmp_path / "gone", tmp_path / "images"):
        with pytest.raises(UserError, match="prompt"):
            run(make(model="openai:tiny", prompts=folder))


# What a model may write, and what must not stop the others.


@PROVIDERS
def test_half_a_character_stops_nobody(make, provider, pictures):
    """A surrogate without its other half, as a reply that is cut within an emoji holds."""
    (first, *_) = (hashlib.sha256(encoded).hexdigest() for encoded in pictures.values())

    def reply(call: Call) -> str:
        cut = stage_of(call) == "positive" and hashlib.sha256(call.images[0]).hexdigest() == first
        return "It is an apple \ud83c" if cut else answer(call)

    with Server(reply) as server:
        job = make(server, provider, limits=dataclasses.replace(QUICK, retries=1))
        run(job, "questions")
        outcome = run(job, "rationales")["rationales"]
    assert len(outcome.failed) <= 1
    assert len(load(job.folder, RATIONALES)) >= 5


def test_a_marker_in_a_reply_stops_no_export(make, pictures):
    """`<image>` in an answer: such a row cannot be trained on, and the others can."""
    (first, *_) = (hashlib.sha256(encoded).hexdigest() for encoded in pictures.values())

    def reply(call: Call) -> str:
        marked = stage_of(call) == "positive" and hashlib.sha256(call.images[0]).hexdigest() == first
        return "In the <image> it is red." if marked else "No" if stage_of(call) == "judge" else answer(call)

    with Memory(reply) as server:
        job = make(server)
        run(job)
    assert {row["image"] for row in load(job.folder, RELEASED)} >= set(pictures) - {"0000.png"}
    assert len(list(mixture([MixtureEntry(file=job.folder / RELEASED, pictures=job.pictures)], ReadLog()))) >= 5


def test_more_questions_than_asked_are_left_off(make):
    """Each would cost its rationales and its verdict."""

    def reply(call: Call) -> str:
        return helpers.say("questions\n9\n1", call.digest[:16]) if stage_of(call) == "questions" else answer(call)

    with Memory(reply) as server:
        job = make(server, count=2)
        run(job, "questions")
    assert len(load(job.folder, QUESTIONS)) == 6 * 2


def test_names_that_leave_the_folder_are_refused(make, tmp_path, reverie):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    listed = tmp_path / "list.json"
    with Memory(answer) as server:
        for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "sub/../../secret.png"):
            listed.write_text(json.dumps(["0000.png", name]))
            words = ("--images", tmp_path / "images", "--list", listed, "--out", tmp_path / "out")
            code, out, err = reverie("annotate", "run", *words, "--writer", name_of(server))
            assert (code, out) == (2, "")
            assert name in err
            assert err.count("\n") == 1
        assert server.calls == []


@pytest.mark.parametrize("name", ["a\0b.png", "n" * 400 + ".png", "\ud800.png"])
def test_names_that_are_none(tmp_path, reverie, pictures, name):
    """Refused in one line, or passed over with a reason; never a traceback."""
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(["0000.png", name]))
    with Memory(answer) as server:
        words = ("--images", tmp_path / "images", "--list", listed, "--out", tmp_path / "out", "--questions", 1)
        prompts = helpers.write_prompts(tmp_path / "prompts")
        code, _, _ = reverie("annotate", "questions", *words, "--prompts", prompts, "--writer", name_of(server))
    assert code in (1, 2)


def test_rows_about_pictures_outside_are_not_asked(make, tmp_path):
    """A stage's file is no way around the list."""
    (tmp_path / "secret.png").write_bytes(png((1, 1, 1)))
    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        rows = load(job.folder, QUESTIONS)
        rows[0]["image"] = "../secret.png"
        (job.folder / QUESTIONS).write_text(json.dumps(rows))
        outcome = run(job, "rationales")["rationales"]
        assert (tmp_path / "secret.png").read_bytes() not in {call.images[0] for call in server.calls}
    assert list(outcome.failed) == ["../secret.png"]
    assert len(load(job.folder, RATIONALES)) == 5
