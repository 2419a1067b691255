"""The steps of the pipeline: what is requested, what is written, what is dropped, and what is never paid for twice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections import Counter

import pytest

from reverie_jax.annotate.files import DROPPED, JUDGED, QUESTIONS, RATIONALES, RELEASED
from reverie_jax.annotate.pipeline import AnnotationJob, Outcome, Pipeline, decide, export
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import RequestSettings
from reverie_jax.hosted.throttle import Limits
from tests.annotate import helpers
from tests.annotate.conftest import QUICK
from tests.annotate.helpers import FILES, JOURNAL, Memory, answer, check_files, expected, load, spec_of, stage_of
from tests.data.fakes import png
from tests.hosted.faults import Fault, share
from tests.hosted.server import Server
from tests.hosted.wires import Call

pytestmark = pytest.mark.usefixtures("keys", "sdks")
STEPS = ("questions", "rationales", "judge")


def run(job: AnnotationJob, *steps: str) -> dict[str, Outcome]:
    """Run some steps, or all of them and the export."""
    with Pipeline(job, os.environ) as pipeline:
        outcomes = {step: getattr(pipeline, step)() for step in steps or STEPS}
    if not steps:
        export(job.folder)
    return outcomes


def stages_of(server: Server | Memory) -> Counter[str]:
    return Counter(map(stage_of, server.calls))


@pytest.mark.parametrize(("provider", "batch"), [("openai", False), ("gemini", False), ("openai", True)])
def test_every_file_is_right_in_spite_of_all_faults(make, images, provider, batch):
    """Every whole answer is requested once; a further run requests nothing; the export can be read."""
    plans = {"lines" if batch else "faults": share(0.35, 3)}
    limits = dataclasses.replace(QUICK, batch=batch, poll_seconds=0.01)
    with Server(answer, **plans, retry_after=0.01, is_judge=lambda call: stage_of(call) == "judge") as server:
        job = make(server, provider, images=tuple(images)[::-1], questions=2, confusing=2, limits=limits)
        outcomes = run(job)
        assert batch or set(server.served.values()) == {1}
        assert sum(server.faulted.values()) > 15
        usable = sum(outcome.usable for outcome in outcomes.values())
        assert usable == len({call.digest for call in server.calls}) == 6 + 6 * 2 + 6 * 2 * 2 + 6 * 2 * 2
        assert all(len(call.images) == (stage_of(call) != "judge") for call in server.calls)
        assert all(call.structured == (stage_of(call) == "questions") for call in server.calls)
        backwards = dict(reversed(images.items()))
        check_files(job.folder, expected(backwards, job.writer, count=2, confusing=2))
        calls = len(server.calls)
        again = run(job)
        assert len(server.calls) == calls
    assert all(not outcome.failed and not outcome.stopped for outcome in (*outcomes.values(), *again.values()))
    assert sum(outcome.cached for outcome in again.values()) == usable
    columns = ["image", "question", "correct_answer", "confusing_answer", "question_type", "correct_rationale"]
    assert list(load(job.folder, JUDGED)[0]) == [*columns, "incorrect_rationale", "gemini_pro_judge", "judges"]
    records = list(read_mixture([MixtureEntry(file=job.folder / RELEASED, images=job.images_folder)], ReadLog()))
    assert sum(len(record.conversations) for record in records) == len(load(job.folder, RELEASED))


def test_built_in_prompts(make, tmp_path):
    """They contain what the stage needs, and nothing that it must not know. One of them can be replaced."""

    def reply(call: Call) -> str:
        kind = "questions\n2\n2" if call.structured else "judge" if "contradict" in call.text else "positive"
        return helpers.write_reply(kind, call.digest[:16])

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "positive.txt").write_text("Warum ist {{ answer }} richtig? {{ question }} Größe ✓", "utf-8")
    with Memory(reply) as server:
        job = make(server, questions=2, confusing=2, prompts=None)
        run(job)
        texts, rows = [call.text for call in server.calls], load(job.folder, RATIONALES)
        run(dataclasses.replace(job, prompts=tmp_path / "mine"), "rationales")
        mine = [call.text for call in server.calls[len(texts) :]]
    assert len(mine) == 12
    assert all(re.fullmatch(r"Warum ist right [01] richtig\? .* Größe ✓", text) for text in mine)
    assert len(texts) == 6 + 12 + 24 + 24
    assert not any("{{" in text or "{%" in text or "None" in text for text in texts)
    assert sum("JSON" in text and ("2" in text or "two" in text) for text in texts) == 6
    for row in rows:
        about = [text for text in texts if row["question"] in text]
        judge = ("correct_rationale", "incorrect_rationale", "confusing_answer", "correct_answer")
        assert sum(all(row[key] in text for key in judge) for text in about) == 1
        others = [text for text in about if "contradict" not in text]
        assert len(others) == 3  # one positive, a negative for each wrong answer
        assert sum(row["confusing_answer"] in text for text in others) == 1
        # The prompt about a wrong answer does not contain the right one.
        assert not any(row["confusing_answer"] in text and row["correct_answer"] in text for text in others)


def test_each_step_alone(make, images):
    """Each continues from the file of the one before, as a user may have edited it."""
    with Memory(answer) as server:
        job = make(server, out="deep/er/out")
        for step, file in (("rationales", QUESTIONS), ("judge", RATIONALES)):
            with pytest.raises(UserError, match=file):
                run(job, step)
        with pytest.raises(UserError, match=JUDGED):
            export(job.folder)
        assert server.calls == []
        counts = {"questions": 6, "positive": 6, "negative": 6, "judge": 6}
        for number, step in enumerate(STEPS):
            run(job, step)
            assert stages_of(server) == dict([*counts.items()][: (1, 3, 4)[number]])
        assert not (job.folder / RELEASED).exists()
        export(job.folder)
        check_files(job.folder, expected(images, job.writer))
        rows = load(job.folder, QUESTIONS)[:2]
        rows[0]["question"] = "Is it mended?"
        (job.folder / QUESTIONS).write_text(json.dumps(rows))
        run(job, "rationales")
        assert stages_of(server)["positive"] == 7
    assert [row["question"] for row in load(job.folder, RATIONALES)] == [row["question"] for row in rows]


@pytest.mark.parametrize("text", ["", "[", "3", '[{"image": "a"}]', "[3]", '[{"image": 1}]'])
def test_a_broken_file_of_the_step_before_is_named(make, text):
    job = make()
    job.folder.mkdir()
    (job.folder / JOURNAL).touch()
    (job.folder / QUESTIONS).write_text(text)
    with Memory(answer), pytest.raises(UserError, match=QUESTIONS):
        run(job, "rationales")


def test_thoughts_are_in_no_file(make, images):
    """Of a model behind a server that leaves them; the journal has the replies whole."""
    with Memory(lambda call: f"No? Yes? <image>\n</think>\n\n{answer(call)}") as server:
        job = make(server)
        assert not any(outcome.failed for outcome in run(job).values())
        check_files(job.folder, expected(images, job.writer))
    assert all("</think>" in reply for (reply,) in helpers.rows_of(job.folder / JOURNAL, "reply"))


def test_half_characters_in_an_edited_file_are_left_out(make):
    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        rows = load(job.folder, QUESTIONS)
        rows[0]["question"] += "\ud83d"
        (job.folder / QUESTIONS).write_text(json.dumps(rows))
        assert not run(job, "rationales")["rationales"].failed
    assert load(job.folder, RATIONALES)[0]["question"] == rows[0]["question"][:-1]


# Judges.


@pytest.mark.parametrize("rule", ["majority", "any", "all"])
def test_votes(rule):
    """All votes of up to five judges, some of them missing: a verdict is one that the missing votes could not change."""

    def complete(votes: list[str]) -> str:
        yes = votes.count("yes")
        return "yes" if {"majority": yes >= len(votes) / 2, "any": yes > 0, "all": yes == len(votes)}[rule] else "no"

    for judges in range(1, 6):
        for row in itertools.product(("yes", "no", None), repeat=judges):
            votes = [vote for vote in row if vote is not None]
            rest = itertools.product(("yes", "no"), repeat=judges - len(votes))
            verdicts = {complete([*votes, *more]) for more in rest}
            assert decide(votes, judges, rule) == (verdicts.pop() if len(verdicts) == 1 else None), row


SAID = {  # of three judges to the rows one to six
    "a": ("No", "Yes", "Yes", "No", "Not sure", "Yes"),
    "b": ("No", "No", "Yes", "No", "Yes", "Not sure"),
    "c": ("No", "No", "No", "Hm", "No", "Yes"),
}
VERDICTS = {
    "majority": ("no", "no", "yes", "no", None, "yes"),
    "any": ("no", "yes", "yes", None, "yes", "yes"),
    "all": ("no", "no", "no", "no", "no", None),
}


def test_several_judges(make):
    """An unusable vote is requested again in the next run. A row without a verdict is in no file."""
    order = {}
    number = lambda call: order[call.text.split("\n")[1]]  # noqa: E731
    reply = lambda call: answer(call) if call.model == "writer" else SAID[call.model][number(call)]  # noqa: E731
    silent = {(model, n) for model, said in SAID.items() for n, text in enumerate(said) if text in ("Not sure", "Hm")}
    with Memory(reply) as server:
        judges = [spec_of(server, "openai", model) for model in SAID]
        job = make(server, writer=spec_of(server, "openai", "writer"), judges=tuple(judges))
        run(job, "questions", "rationales")
        rows = load(job.folder, RATIONALES)
        order |= {row["question"]: number for number, row in enumerate(rows)}
        for tries, (rule, verdicts) in enumerate(VERDICTS.items(), 1):
            outcome = run(dataclasses.replace(job, votes=rule), "judge")["judge"]
            counts = Counter((call.model, number(call)) for call in server.calls if call.model in SAID)
            assert counts == {(m, n): 3 * tries if (m, n) in silent else 1 for m in SAID for n in range(6)}
            assert [count for _, count in outcome.reasons()] == [3]
            judged = {order[row["question"]]: row for row in load(job.folder, JUDGED)}
            assert [judged.get(n, {}).get("gemini_pro_judge") for n in range(6)] == list(verdicts)
            for n, row in judged.items():
                said = {judge: SAID[model][n] for judge, model in zip(judges, SAID, strict=True)}
                assert row["judges"] == {judge: text.lower() for judge, text in said.items() if text in ("Yes", "No")}
            dropped = [order[row["question"]] for row in load(job.folder, DROPPED)]
            assert dropped == [n for n in range(6) if verdicts[n] == "yes"]
            export(job.folder)
            released = {row["conversations"][0]["value"] for row in load(job.folder, RELEASED)}
            assert {order[text.removeprefix("<image>\n")] for text in released} == {
                n for n in range(6) if verdicts[n] == "no"
            }


def test_judges_with_the_same_name(make):
    """The same judge twice counts once; one model at two addresses is refused. A password is written nowhere."""
    with Memory(answer) as server:
        spec = spec_of(server, "openai", "a").replace("http://", "http://me:secret@")
        job = make(server, judges=(spec,) * 2)
        assert not run(job)["judge"].failed
        assert all(list(row["judges"]) == [spec_of(server, "openai", "a")] for row in load(job.folder, JUDGED))
        assert not any(b"secret@" in path.read_bytes() for path in job.folder.iterdir())
        calls = len(server.calls)
        with pytest.raises(UserError, match="--judge"):
            run(make(server, out="two", judges=(spec, "openai:a@http://elsewhere/v1")))
        assert len(server.calls) == calls


def test_a_judge_can_see_the_image(make, images):
    """A verdict without the image does not count for it."""
    with Memory(answer) as server:
        job = make(server)
        run(job)
        run(dataclasses.replace(job, judge_sees_image=True), "judge")
        judged = [call for call in server.calls if stage_of(call) == "judge"]
    assert [len(call.images) for call in judged] == [0] * 6 + [1] * 6
    assert {call.images[0] for call in judged[6:]} == set(images.values())


# What identifies a request.


def test_images_that_come_and_go_do_not_shift_rows(make, images, tmp_path):
    """New images before, between and behind, rows in any order, moved folders: no reply is requested again."""
    with Memory(answer) as server:
        job = make(server, images=("0003.png", "0001.png"))
        run(job)
        (tmp_path / "images").rename(tmp_path / "moved")
        job.folder.rename(tmp_path / "notes")
        job = make(server, out="notes", images_folder=tmp_path / "moved")
        run(job)
        assert stages_of(server) == dict.fromkeys(("questions", "positive", "negative", "judge"), 6)
        wanted = expected(images, job.writer)
        check_files(job.folder, wanted)
        assert not any(str(tmp_path) in (job.folder / name).read_text("utf-8") for name in FILES)
        rows = load(job.folder, RATIONALES)
        new = rows[2] | {"incorrect_rationale": "Another one."}
        (job.folder / RATIONALES).write_text(json.dumps([new, *rows[3:], *rows[:2]]))
        run(job, "judge")
        assert stages_of(server)["judge"] == 7
    assert load(job.folder, JUDGED)[1:] == [*wanted[JUDGED][3:], *wanted[JUDGED][:2]]


def test_what_is_requested_again(make, tmp_path, prompts):
    """Changed prompts, models, settings, counts and bytes; not speed, names, places and other stages' prompts."""
    folder = tmp_path / "images"
    three = ("0000.png", "0001.png", "0002.png")

    def count(images=three, **changes) -> int:
        with Memory(answer) as server:
            outcome = run(make(images=images, **changes), "questions")["questions"]
            assert not outcome.failed
            assert [row["image"] for row in load(tmp_path / "out", QUESTIONS)][:: changes.get("confusing", 1)] == [
                name for name in images for _ in range(changes.get("questions", 1))
            ]
            return len(server.calls)

    assert [count(), count()] == [3, 0]
    assert count(limits=Limits(concurrency=1)) == 0
    assert count(settings=RequestSettings(timeout=3.0)) == 0
    helpers.write_prompts(prompts, questions="questions in other words")
    assert count() == 3
    helpers.write_prompts(prompts, judge="judge in other words")
    assert count() == 0
    with Memory(answer) as server:
        for first in ({}, {"positive": "positive in other words"}, {"negative": "negative in other words"}):
            helpers.write_prompts(prompts, **first)
            run(make(images=three), "rationales")
    assert stages_of(server) == {"positive": 6, "negative": 6}
    assert count(writer="openai:n") == 3
    assert count(writer="openai:n@http://elsewhere/v1") == 0
    for settings in (RequestSettings(temperature=0.0), RequestSettings(temperature=0.5)):
        assert [count(settings=settings), count(settings=settings)] == [3, 0]
    assert [count(questions=2), count(confusing=2), count()] == [3, 3, 0]
    (folder / "0001.png").write_bytes(png((1, 2, 3), (8, 8)))
    assert [count(), count()] == [1, 0]
    os.utime(folder / "0001.png", (1, 1))
    (folder / "sub").mkdir()
    (folder / "0001.png").rename(folder / "sub" / "new name.png")
    shutil.copy(folder / "0002.png", folder / "copy.png")
    assert count(("0002.png", "0000.png", "sub/new name.png", "copy.png")) == 0


def test_duplicates_are_paid_for_once(make, images, tmp_path):
    """An image under two names, a question twice in a reply; no more questions than requested are used."""
    (tmp_path / "images" / "twin.png").write_bytes(images["0000.png"])
    question = {"question": "Which?", "type": "short", "correct_answer": "this", "confusing_answers": ["that", "that"]}
    more = [question | {"question": f"Which {n}?"} for n in range(3)]

    def reply(call: Call) -> str:
        return json.dumps([question, question, *more]) if stage_of(call) == "questions" else answer(call)

    with Memory(reply) as server:
        job = make(server, images=("0000.png", "0001.png", "twin.png"), confusing=2, questions=2)
        run(job)
        assert stages_of(server) == {"questions": 2, "positive": 4, "negative": 4, "judge": 4}
    images_of_rows = [row["image"] for row in load(job.folder, JUDGED)]
    assert images_of_rows == [name for name in job.images for _ in range(2)]


# Failures.


def test_a_positive_is_kept_when_its_negative_fails(make, images):
    with Memory(answer, lambda call: Fault.EMPTY if stage_of(call) == "negative" else None) as server:
        job = make(server)
        run(job, "questions")
        outcome = run(job, "rationales")["rationales"]
        assert (outcome.usable, len(outcome.failed)) == (6, 6)
        assert load(job.folder, RATIONALES) == []
        server.faults = lambda call: None
        run(job)
        assert stages_of(server) == {"questions": 6, "positive": 6, "negative": 6 * 3 + 6, "judge": 6}
    check_files(job.folder, expected(images, job.writer))


def test_a_broken_image_stops_no_other(make, images, tmp_path):
    """Missing, broken or outside the folder, also in a row that a user edited."""
    (tmp_path / "secret.png").write_bytes(png((1, 1, 1)))
    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        (tmp_path / "images" / "0001.png").unlink()
        (tmp_path / "images" / "0003.png").write_bytes(images["0003.png"][:40])
        rows = load(job.folder, QUESTIONS)
        rows[5]["image"] = "../secret.png"
        (job.folder / QUESTIONS).write_text(json.dumps(rows))
        outcome = run(job, "rationales")["rationales"]
        assert stages_of(server) == {"questions": 6, "positive": 3, "negative": 3}
        assert {name.split()[0] for name in outcome.failed} == {"0001.png", "0003.png", "../secret.png"}
        assert not any("\n" in reason for reason in outcome.failed.values())
        assert png((1, 1, 1)) not in {image for call in server.calls for image in call.images}
    assert [row["image"] for row in load(job.folder, RATIONALES)] == ["0000.png", "0002.png", "0004.png"]


def test_a_full_disk_leaves_the_old_file(make, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with Memory(answer) as server:
        job = make(server)
        run(job, "questions")
        (job.folder / QUESTIONS).write_text("[]")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=QUESTIONS):
                run(job, "questions")
        assert (job.folder / QUESTIONS).read_text() == "[]"
    assert {path.suffix for path in job.folder.iterdir()} <= {".json", ".sqlite", ".lock"}


# Prompts.


@pytest.mark.parametrize(
    "text", ["{{ no_such }}", "{{ question", "{% if %}", "{{ 1 / 0 }}", "{{ count + 1 }}", "Größe"]
)
def test_a_bad_prompt_is_named_and_nothing_is_sent(make, tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "questions.txt").write_text(text, "latin-1")
    with Memory(answer) as server:
        with pytest.raises(UserError, match=r"questions\.txt"):
            run(make(server, prompts=tmp_path / "mine"))
        assert server.calls == []
    for folder in (tmp_path / "gone", tmp_path / "images"):
        with pytest.raises(UserError, match=folder.name):
            run(make(prompts=folder))
