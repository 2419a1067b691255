"""Folders of REVERIE's own scripts, complete and partial: adopted as they are, and nothing is requested a second time."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reverie_jax.annotate.files import JUDGED, QUESTIONS, RATIONALES, RELEASED
from reverie_jax.annotate.pipeline import AnnotationJob, Pipeline, export
from reverie_jax.errors import UserError
from reverie_jax.hosted.journal import Journal
from tests.annotate import helpers
from tests.annotate.helpers import JOURNAL, Memory, answer, check_files, load, stage_of

pytestmark = pytest.mark.usefixtures("keys")
KEYS = ("question", "correct_answer", "confusing_answer")
RAW = {QUESTIONS: "reasoning_instruct_raw_data", RATIONALES: "rationale_raw_data", JUDGED: "check_results"}
WRITTEN = (QUESTIONS, RATIONALES, JUDGED, RELEASED)


class Original:
    """A folder of the three scripts, with what our model would have replied.

    Attributes:
        rows: All rows by file, with the scripts' keys and the folder before each image's name.
    """

    def __init__(self, folder: Path, images: dict[str, bytes], prefix: Path, count: int):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "image_list.json").write_text(json.dumps(list(images)))
        self.wanted = helpers.expected(images, "openai:tiny", count=count)
        keep = {"image", *KEYS, "correct_rationale", "incorrect_rationale", "gemini_pro_judge"}
        self.rows = {
            file: [
                {key: value for key, value in row.items() if key in keep} | {"image": str(prefix / row["image"])}
                for row in self.wanted[file]
            ]
            for file in RAW
        }

    def combine(self, *files: str, rows: list[dict[str, Any]] | None = None) -> None:
        """Write combined files, the last image first."""
        for file in files or RAW:
            ordered = sorted(self.rows[file] if rows is None else rows, key=lambda row: str(row["image"]), reverse=True)
            (self.folder / file).write_text(json.dumps(ordered, indent=4 if file == JUDGED else None))

    def raw(self, *files: str, numbers: Any = None, spell: Callable[[str], str] = str) -> None:
        """Write files of single rows, all of them or some, whose names say nothing; the last one twice."""
        for file in files or RAW:
            folder = self.folder / RAW[file]
            folder.mkdir(exist_ok=True)
            items: list[Any] = self.rows[file]
            if file == QUESTIONS:
                by_image: dict[str, list[dict[str, str]]] = {}
                for row in items:
                    by_image.setdefault(row["image"], []).append({spell(key): row[key] for key in KEYS})
                items = [{"image": image, "content": content} for image, content in by_image.items()]
            for number in range(len(items)) if numbers is None else numbers:
                for name in (f"{len(items) - number}.json", "07.json"):
                    (folder / name).write_text(json.dumps(items[number]))
            (folder / "notes.txt").write_text("not a row")


@pytest.fixture
def original(tmp_path, images):
    return lambda prefix=tmp_path / "images", count=1: Original(tmp_path / "target", images, prefix, count)


@pytest.fixture
def job(make) -> AnnotationJob:
    return make(out="target")


def resume(job: AnnotationJob, *steps: str) -> tuple[dict[str, int], list[str]]:
    """Run all steps; return the number of requests by stage, and the notes."""
    with Memory(answer) as server:
        with Pipeline(job, os.environ) as pipeline:
            outcomes = [getattr(pipeline, step)() for step in steps or ("questions", "rationales", "judge")]
            notes = list(pipeline.notes)
        if not steps:
            export(job.folder)
        assert not any(outcome.failed or outcome.stopped for outcome in outcomes)
        assert set(Counter(call.digest for call in server.calls).values()) <= {1}
        return dict(Counter(map(stage_of, server.calls))), notes


@pytest.mark.parametrize("form", ["combined", "raw", "both"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_folder_is_continued_after_each_step(original, job, form, steps):
    """Every row is there, and only the later steps are requested; a further run requests nothing."""
    theirs, files = original(), [*RAW][:steps]
    if form != "raw":
        theirs.combine(*files)
    if form != "combined":
        theirs.raw(*files)
    requests, notes = resume(job)
    assert requests == {1: {"positive": 6, "negative": 6, "judge": 6}, 2: {"judge": 6}, 3: {}}[steps]
    assert len(notes) == 1
    assert "6 rows" in notes[0]
    check_files(job.folder, theirs.wanted, WRITTEN)
    assert resume(job) == ({}, [])


def test_each_step_alone_continues(original, job):
    theirs = original()
    theirs.combine(QUESTIONS, RATIONALES)
    assert [resume(job, step)[0] for step in ("judge", "rationales", "questions")] == [{"judge": 6}, {}, {}]
    assert load(job.folder, QUESTIONS) == theirs.wanted[QUESTIONS]


def killed_in_each_step(theirs: Original) -> None:
    """Write some raw files, some of them cut off, empty or of another kind, and no combined file."""
    theirs.raw(QUESTIONS, numbers=[0, 1, 2, 5])
    texts = ['{"image": "images/0003.png", "content"', "", "[]", "null", '{"image": "0001.png"}', '{"content": 3}']
    for number, text in enumerate(texts, 10):
        (theirs.folder / RAW[QUESTIONS] / f"{number}.json").write_text(text)
    theirs.raw(RATIONALES, numbers=[1, 5])
    (theirs.folder / RAW[RATIONALES] / "2.json").write_text('{"image": "pict')
    theirs.raw(JUDGED, numbers=[5])


def old_combined_files_beside_newer_raw_ones(theirs: Original) -> None:
    theirs.combine(QUESTIONS, rows=theirs.rows[QUESTIONS][:2])
    theirs.raw(QUESTIONS)
    theirs.combine(RATIONALES, rows=theirs.rows[RATIONALES][:1])
    theirs.raw(RATIONALES, numbers=[1, 2])


def numbered_keys(theirs: Original) -> None:
    """Write raw replies that the scripts stored, and could not combine."""
    theirs.raw(QUESTIONS, spell=lambda key: f"{key.replace('_', ' ')}1")
    theirs.combine(QUESTIONS, rows=[])


PARTIAL = [
    (killed_in_each_step, {"questions": 2, "positive": 4, "negative": 4, "judge": 5}, "7 broken"),
    (old_combined_files_beside_newer_raw_ones, {"positive": 3, "negative": 3, "judge": 6}, ""),
    (numbered_keys, {"positive": 6, "negative": 6, "judge": 6}, ""),
]


@pytest.mark.parametrize(("prepare", "requested", "note"), PARTIAL)
def test_a_part_of_a_folder(original, job, prepare, requested, note):
    theirs = original()
    prepare(theirs)
    requests, notes = resume(job)
    assert requests == requested
    assert note in notes[0]
    check_files(job.folder, theirs.wanted, WRITTEN)


def test_several_questions_and_judges(original, job):
    """Their verdict is the first judge's."""
    theirs = original(count=3)
    theirs.combine()
    assert resume(dataclasses.replace(job, questions=3))[0] == {}
    check_files(job.folder, theirs.wanted, WRITTEN)
    for path in job.folder.glob("*.sqlite*"):
        path.unlink()
    judges = dataclasses.replace(job, questions=3, judges=("openai:a", "openai:b"), votes="any")
    assert resume(judges)[0] == {"judge": 18}
    for row, before in zip(load(job.folder, JUDGED), theirs.wanted[JUDGED], strict=True):
        assert row["judges"]["openai:a"] == before["gemini_pro_judge"]
        assert set(row["judges"]) == {"openai:a", "openai:b"}


# Images.


@pytest.mark.parametrize("prefix", ["images", "imgs", "../images/all", "/home/somebody/else/coco/train2017"])
def test_paths_of_another_folder_or_machine(original, job, prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = original(Path(prefix))
    theirs.combine()
    assert resume(dataclasses.replace(job, images_folder=Path("images")))[0] == {}
    check_files(job.folder, theirs.wanted, WRITTEN)


def test_nothing_is_lost_before_the_images_are_found(original, job, tmp_path):
    """After a run with a wrong folder, after a kill that left an empty journal, or while an image is missing."""
    theirs = original()
    theirs.combine()
    (tmp_path / "wrong").mkdir()
    with Memory(answer), pytest.raises(UserError, match=r"0005\.png"):
        Pipeline(dataclasses.replace(job, images_folder=tmp_path / "wrong"), os.environ)
    with Journal(job.folder / JOURNAL):
        pass
    (tmp_path / "images" / "0002.png").rename(tmp_path / "away.png")
    with Memory(answer) as server, Pipeline(job, os.environ) as pipeline:
        for step in ("questions", "rationales", "judge"):
            getattr(pipeline, step)()
        assert server.calls == []
    (tmp_path / "away.png").rename(tmp_path / "images" / "0002.png")
    assert resume(job)[0] == {}
    check_files(job.folder, theirs.wanted, WRITTEN)


# Rows that somebody edited, or that a model filled badly.

ODD = [
    (QUESTIONS, {"question": ""}),
    (QUESTIONS, {"correct_answer": "  "}),
    (QUESTIONS, {"confusing_answer": ""}),
    (QUESTIONS, {"confusing_answer": " Right 0."}),
    (QUESTIONS, {"image": 3}),
    (QUESTIONS, {"image": "a\0b.png"}),
    (QUESTIONS, {"image": "../../etc/passwd"}),
    (RATIONALES, {"question": None}),
    (RATIONALES, {"correct_rationale": " \n"}),
    (RATIONALES, {"correct_rationale": "red \ud83d"}),
    (JUDGED, {"gemini_pro_judge": "maybe"}),
    (JUDGED, {"gemini_pro_judge": "No"}),
    (JUDGED, {"gemini_pro_judge": ""}),
    (JUDGED, {"chatgpt_judge": "yes"}),
]


@pytest.mark.parametrize(("file", "change"), ODD)
def test_one_odd_row_stops_no_other(original, job, file, change):
    """The other five are adopted; of the sixth, at most what is unusable is requested again."""
    theirs = original()
    row = theirs.rows[file][2] | change
    theirs.rows[file][2] = {key: value for key, value in row.items() if value is not None}
    theirs.combine()
    requests, _ = resume(job)
    assert all(count == 1 for count in requests.values())
    for name in (QUESTIONS, RATIONALES, JUDGED):
        images = {row["image"] for row in load(job.folder, name)}
        assert images >= {row["image"] for row in theirs.wanted[name]} - {"0002.png"}


@pytest.mark.parametrize("file", RAW)
@pytest.mark.parametrize("text", ["", "3", "[1, null]"])
def test_a_broken_combined_file(original, job, file, text):
    """It is named and left as it is, or its raw files are read instead."""
    theirs = original()
    theirs.combine()
    theirs.raw()
    (theirs.folder / file).write_text(text)
    if text != "[1, null]":  # such rows are skipped
        with pytest.raises(UserError, match=file):
            resume(job)
        assert (theirs.folder / file).read_text() == text
        (theirs.folder / file).unlink()
    assert resume(job)[0] == {}
    check_files(job.folder, theirs.wanted, WRITTEN)
