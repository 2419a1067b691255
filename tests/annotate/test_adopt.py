"""Folders as REVERIE's own scripts leave them, whole and half: taken over as they stand, and nothing asked a second time."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reverie_jax.annotate.pipeline import AnnotationJob, Pipeline, export
from reverie_jax.errors import UserError
from reverie_jax.hosted.journal import Journal
from reverie_jax.hosted.runner import Limits
from tests.annotate import helpers
from tests.annotate.helpers import JOURNAL, JUDGED, QUESTIONS, RATIONALES, RELEASED, Memory, answer, load, stage_of

pytestmark = pytest.mark.usefixtures("keys")
WHO = "openai:tiny"
KEYS = ("question", "correct_answer", "confusing_answer")
STAGES = ("questions", "positive", "negative", "judge")
RAW = {QUESTIONS: "reasoning_instruct_raw_data", RATIONALES: "rationale_raw_data", JUDGED: "check_results"}


@pytest.fixture
def pictures(tmp_path) -> dict[str, bytes]:
    return helpers.write_pictures(tmp_path / "images", 6)


class Original:
    """A target folder of the three scripts, with what a model of ours would have replied.

    Attributes:
        rows: all rows by file, in the scripts' own keys, with the folder before the picture's name.
    """

    def __init__(self, folder: Path, pictures: dict[str, bytes], prefix: Path, count: int = 1):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "image_list.json").write_text(json.dumps(list(pictures)))
        self.wanted = helpers.expected(pictures, WHO, count=count)
        keep = {"image", *KEYS, "correct_rationale", "incorrect_rationale", "gemini_pro_judge"}
        self.rows = {
            file: [
                {key: value for key, value in row.items() if key in keep} | {"image": str(prefix / row["image"])}
                for row in self.wanted[file]
            ]
            for file in RAW
        }

    def combine(self, file: str, rows: list[dict[str, Any]] | None = None) -> None:
        """What a combine step writes."""
        text = json.dumps(self.rows[file] if rows is None else rows, indent=4 if file == JUDGED else None)
        (self.folder / file).write_text(text)

    def raw(self, file: str, numbers: Any = None) -> None:
        """The files of single items, by their places in the input; all of them, or some."""
        folder = self.folder / RAW[file]
        folder.mkdir(exist_ok=True)
        if file == QUESTIONS:
            by_image: dict[str, list[dict[str, str]]] = {}
            for row in self.rows[file]:
                by_image.setdefault(row["image"], []).append({key: row[key] for key in KEYS})
            items: list[Any] = [{"image": image, "content": content} for image, content in by_image.items()]
        else:
            items = self.rows[file]
        for number in range(len(items)) if numbers is None else numbers:
            (folder / f"{number}.json").write_text(json.dumps(items[number]))


@pytest.fixture
def original(tmp_path, pictures):
    def make(prefix: Path | None = None, count: int = 1) -> Original:
        return Original(tmp_path / "target", pictures, prefix or tmp_path / "images", count)

    return make


@pytest.fixture
def job(tmp_path, pictures) -> AnnotationJob:
    prompts = helpers.write_prompts(tmp_path / "prompts")
    limits = Limits(concurrency=4, backoff=0.001, longest=0.001)
    folder = tmp_path / "target"
    return AnnotationJob(folder, tmp_path / "images", tuple(pictures), WHO, count=1, prompts=prompts, limits=limits)


def go_on(job: AnnotationJob, *stages: str) -> tuple[dict[str, int], list[str]]:
    """Runs all stages; how many requests were made for each, and the notes."""
    with Memory(answer) as server:
        with Pipeline(job, os.environ) as pipeline:
            outcomes = [getattr(pipeline, stage)() for stage in stages or ("questions", "rationales", "judge")]
            notes = list(pipeline.notes)
        if not stages:
            export(job.folder)
        assert not any(outcome.failed or outcome.stopped for outcome in outcomes)
        assert set(Counter(call.digest for call in server.calls).values()) <= {1}
        return dict(Counter(map(stage_of, server.calls))), notes


def same(job: AnnotationJob, wanted: dict[str, Any]) -> bool:
    for name in (QUESTIONS, RATIONALES, JUDGED, RELEASED):
        assert load(job.folder, name) == wanted[name], name
    return True


@pytest.mark.parametrize("form", ["combined", "raw", "both"])
def test_a_complete_folder_is_done(original, job, form):
    """Nothing is asked, and every row is there; what is missing of ours is made of it."""
    theirs = original()
    for file in RAW:
        if form != "raw":
            theirs.combine(file)
        if form != "combined":
            theirs.raw(file)
    asked, notes = go_on(job)
    assert asked == {}
    assert len(notes) == 1
    assert "6 rows" in notes[0]
    assert same(job, theirs.wanted)
    assert go_on(job) == ({}, [])


def test_after_the_first_stage(original, job):
    theirs = original()
    theirs.raw(QUESTIONS)
    theirs.combine(QUESTIONS)
    assert go_on(job)[0] == {"positive": 6, "negative": 6, "judge": 6}
    assert same(job, theirs.wanted)


def test_after_the_second_stage(original, job):
    theirs = original()
    for file in (QUESTIONS, RATIONALES):
        theirs.raw(file)
        theirs.combine(file)
    assert go_on(job)[0] == {"judge": 6}
    assert same(job, theirs.wanted)


def test_each_stage_alone_goes_on(original, job):
    theirs = original()
    for file in (QUESTIONS, RATIONALES):
        theirs.combine(file)
    assert go_on(job, "judge")[0] == {"judge": 6}
    assert go_on(job, "rationales")[0] == {}
    assert go_on(job, "questions")[0] == {}
    assert load(job.folder, QUESTIONS) == theirs.wanted[QUESTIONS]


def test_killed_in_the_middle_of_each_stage(original, job):
    """Some raw files, one of them cut off where `json.dump` met a set, one empty, and no combined file."""
    theirs = original()
    theirs.raw(QUESTIONS, [0, 1, 2, 5])
    broken = theirs.folder / RAW[QUESTIONS]
    (broken / "3.json").write_text('{"image": "images/0003.png", "content"'[:38])
    (broken / "4.json").write_text("")
    theirs.raw(RATIONALES, [1, 5])
    (theirs.folder / RAW[RATIONALES] / "2.json").write_text('{"image": "pict')
    theirs.raw(JUDGED, [5])
    asked, notes = go_on(job)
    assert asked == {"questions": 2, "positive": 4, "negative": 4, "judge": 5}
    assert "3 broken" in notes[0]
    assert same(job, theirs.wanted)


def test_a_stale_combined_file_beside_newer_raw_ones(original, job):
    """The combine step crashed after the first run, so that the list is old and the files are new."""
    theirs = original()
    theirs.combine(QUESTIONS, theirs.rows[QUESTIONS][:2])
    theirs.raw(QUESTIONS)
    theirs.combine(RATIONALES, theirs.rows[RATIONALES][:1])
    theirs.raw(RATIONALES, [1, 2])
    assert go_on(job)[0] == {"positive": 3, "negative": 3, "judge": 6}
    assert same(job, theirs.wanted)


def test_drifted_indices_and_any_order(original, job):
    """Files under each other's numbers, rows twice or shuffled: known by what they say and not by where they stand."""
    theirs = original()
    shuffled = random.Random(5)
    for file in RAW:
        theirs.rows[file] = shuffled.sample(theirs.rows[file], 6)
        theirs.raw(file, [0, 1, 2, 3])
        folder = theirs.folder / RAW[file]
        (folder / "10.json").write_bytes((folder / "2.json").read_bytes())
        (folder / "2.json").rename(folder / "07.json")
        (folder / "notes.txt").write_text("not a row")
    done = [{row["image"] for row in theirs.rows[file][:4]} for file in RAW]
    asked, _ = go_on(job)
    assert asked.get("questions", 0) == 6 - len(done[0] | done[1] | done[2])  # a later stage's row has the question too
    assert asked.get("positive", 0) == asked.get("negative", 0) == 6 - len(done[1] | done[2])
    assert asked["judge"] == 2
    assert same(job, theirs.wanted)


def test_several_questions_a_picture(original, job):
    theirs = original(count=3)
    for file in RAW:
        theirs.combine(file)
    assert go_on(dataclasses.replace(job, count=3))[0] == {}
    assert same(job, theirs.wanted)


def test_rows_that_the_script_stored_and_then_dropped(original, job):
    """Raw replies with numbered keys, which its combine step could not read, are as good as any."""
    theirs = original()
    folder = theirs.folder / RAW[QUESTIONS]
    folder.mkdir()
    for number, row in enumerate(theirs.rows[QUESTIONS]):
        content = [
            {
                "question1": row["question"],
                "correct answer1": row["correct_answer"],
                "confusing answer1": row["confusing_answer"],
            }
        ]
        (folder / f"{number}.json").write_text(json.dumps({"image": row["image"], "content": content}))
    theirs.combine(QUESTIONS, [])
    assert go_on(job)[0] == {"positive": 6, "negative": 6, "judge": 6}
    assert same(job, theirs.wanted)


# Where the pictures are.


def test_joined_paths_relative_to_where_one_stands(original, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = original(Path("pictures"))
    for file in RAW:
        theirs.combine(file)
    assert go_on(dataclasses.replace(job, pictures=Path("pictures")))[0] == {}
    assert same(job, theirs.wanted)


@pytest.mark.parametrize("prefix", ["imgs", "../images/all", "/home/somebody/else/coco/train2017"])
def test_joined_paths_of_another_machine(original, job, prefix):
    """The folder that is baked into the rows is not here; the list and `--pictures` say where the pictures are now."""
    theirs = original(Path(prefix))
    for file in RAW:
        theirs.combine(file)
    assert go_on(job)[0] == {}
    assert same(job, theirs.wanted)


def test_the_wrong_folder_of_pictures_destroys_nothing(original, job, tmp_path, pictures):
    """A first run with a wrong `--pictures`, or one that is not mounted, loses nothing: the second takes it all over."""
    theirs = original()
    for file in RAW:
        theirs.combine(file)
    (tmp_path / "wrong").mkdir()
    with Memory(answer), pytest.raises(UserError, match="none of their pictures"):
        Pipeline(dataclasses.replace(job, images=tmp_path / "wrong"), os.environ)
    assert go_on(job)[0] == {}
    assert same(job, theirs.wanted)


def test_a_picture_that_comes_back_later(original, job, tmp_path, pictures):
    """Its questions were paid for: they are not asked again when it is there again."""
    theirs = original()
    for file in RAW:
        theirs.combine(file)
    (tmp_path / "images" / "0002.png").rename(tmp_path / "away.png")
    with Memory(answer) as server, Pipeline(job, os.environ) as pipeline:
        for stage in ("questions", "rationales", "judge"):
            getattr(pipeline, stage)()
        assert server.calls == []
    (tmp_path / "away.png").rename(tmp_path / "images" / "0002.png")
    assert go_on(job)[0] == {}
    assert same(job, theirs.wanted)


def test_taking_over_is_tried_again_after_a_kill(original, job):
    """Killed after the journal was made and before anything was in it."""
    theirs = original()
    for file in RAW:
        theirs.combine(file)
    with Journal(job.folder / JOURNAL):
        pass
    assert go_on(job)[0] == {}
    assert same(job, theirs.wanted)


def test_a_dry_run_before_takes_nothing_away(original, job, reverie, tmp_path):
    theirs = original()
    for file in RAW:
        theirs.combine(file)
    words = (
        "--images",
        job.pictures,
        "--out",
        job.folder,
        "--writer",
        WHO,
        "--prompts",
        job.prompts,
        "--questions",
        1,
    )
    code, out, _ = reverie("annotate", "run", *words, "--dry-run")
    assert code == 0
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in out.splitlines()]
    table = {row[0]: row[1:3] for row in rows if row and row[0] in STAGES}
    assert table == {stage: ["6", "0"] for stage in STAGES}
    assert go_on(job)[0] == {}


# What may stand in rows that somebody edited, or that a model filled badly.

ODD = {
    "an empty question": (QUESTIONS, {"question": ""}),
    "an empty right answer": (QUESTIONS, {"correct_answer": ""}),
    "a blank right answer": (QUESTIONS, {"correct_answer": "  "}),
    "an empty wrong answer": (QUESTIONS, {"confusing_answer": ""}),
    "wrong is right": (QUESTIONS, {"confusing_answer": "right 0"}),
    "wrong is right but for looks": (QUESTIONS, {"confusing_answer": " Right 0."}),
    "a blank rationale": (RATIONALES, {"correct_rationale": " \n"}),
    "an empty rationale": (RATIONALES, {"incorrect_rationale": ""}),
    "a verdict that is none": (JUDGED, {"gemini_pro_judge": "maybe"}),
    "a verdict in capitals": (JUDGED, {"gemini_pro_judge": "No"}),
    "an empty verdict": (JUDGED, {"gemini_pro_judge": ""}),
    "a key that is missing": (RATIONALES, {"question": None}),
    "a number for a name": (QUESTIONS, {"image": 3}),
    "a name with a zero byte": (QUESTIONS, {"image": "a\0b.png"}),
    "a name that leaves the folder": (QUESTIONS, {"image": "../../etc/passwd"}),
    "half a character": (RATIONALES, {"correct_rationale": "red \ud83d"}),
    "another judge's verdict too": (JUDGED, {"chatgpt_judge": "yes"}),
}


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_row_stops_nobody(original, job, odd):
    """The other five are taken over; of the sixth at most what is of no use is asked again."""
    theirs = original()
    changed, change = ODD[odd]
    for file in RAW:
        rows = [dict(row) for row in theirs.rows[file]]
        if file == changed:
            rows[2] |= change
            rows[2] = {key: value for key, value in rows[2].items() if value is not None}
        theirs.combine(file, rows)
    asked, _ = go_on(job)
    assert all(count == 1 for count in asked.values())
    for name in (QUESTIONS, RATIONALES, JUDGED):
        found = {row["image"] for row in load(job.folder, name)}
        assert found >= {row["image"] for row in theirs.wanted[name]} - {"0002.png"}


@pytest.mark.parametrize("file", RAW)
@pytest.mark.parametrize("text", ["", "{}", "[1, null]"])
def test_a_broken_combined_file(original, job, file, text):
    """One clear error, or its raw files are read instead; never a traceback, and never an empty list in its place."""
    theirs = original()
    for each in RAW:
        theirs.combine(each)
        theirs.raw(each)
    (theirs.folder / file).write_text(text)
    said = ""
    try:
        asked, _ = go_on(job)
    except UserError as error:
        said = str(error)
    if said:
        assert file in said
        assert (theirs.folder / file).read_text() == text
        (theirs.folder / file).unlink()
        asked, _ = go_on(job)
    assert asked == {}
    assert same(job, theirs.wanted)


def test_with_several_judges_theirs_is_the_firsts(original, job):
    theirs = original()
    for file in RAW:
        theirs.combine(file)
    asked, _ = go_on(dataclasses.replace(job, judges=("openai:a", "openai:b"), votes="any"))
    assert asked == {"judge": 6}
    for row, before in zip(load(job.folder, JUDGED), theirs.wanted[JUDGED], strict=True):
        assert row["judges"]["openai:a"] == before["gemini_pro_judge"]
        assert set(row["judges"]) == {"openai:a", "openai:b"}
