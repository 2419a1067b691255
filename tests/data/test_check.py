"""Problems of an annotation file and its images are found, named, counted and removed."""

import dataclasses
import json
import zlib

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie_jax import loading
from reverie_jax.data import check as checking
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.mixture import MixtureEntry
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.survey import find_sizes, survey
from reverie_jax.data.tokenization import Encoder
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import (
    IMAGE_ID,
    WordTokenizer,
    llava_row,
    png,
    png_of_size,
    read_records,
    saved,
    write_json_rows,
    write_parquet,
)

WHY_WRONG = "Explain why this answer is wrong: {}"
NAMES = ("a.png", "none.png", "cut.png", "words.jpg", "really.png", "huge.png", "bomb.png", "../outside.png")
USABLE_NAMES = ("gray.png", "clear.png", "opaque.png", "colors.png")
ROWS = [
    *(llava_row(name, f"{IMAGE}\nWhat?", "A cup.") for name in NAMES),
    llava_row("a.png", f"{IMAGE}\nWhat?", "A cup."),
    llava_row("a.png", f"{IMAGE}\nWho?", " "),
    "row",
    llava_row(None, "Two and two?", "Four."),
    *(llava_row(name, f"{IMAGE}\nWhat?", "A cup.") for name in USABLE_NAMES),
]
EXPECTED = {
    1: ("missing image", True),
    2: ("unreadable image", True),
    3: ("unreadable image", True),
    4: ("mislabeled image", False),
    5: ("oversized image", True),
    6: ("oversized image", True),
    7: ("image outside folder", True),
    8: ("duplicate", False),
    9: ("empty answer", True),
    10: ("invalid row", True),
    12: ("deep image", False),
    13: ("transparent image", False),
    15: ("deep image", False),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "cut.png").write_bytes(png(size=(60, 60))[:60])
    (folder / "words.jpg").write_text("not an image")
    (folder / "really.png").write_bytes(saved(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG"))
    (folder / "gray.png").write_bytes(saved(Image.new("I;16", (8, 8), 4000)))
    (folder / "colors.png").write_bytes(png_of_size(2, 2, zlib.compress(bytes(2 * (1 + 2 * 6))), bits=16))
    for name, alpha in (("clear.png", 0), ("opaque.png", 255)):
        (folder / name).write_bytes(saved(Image.new("RGBA", (8, 8), (9, 9, 9, alpha))))
    (folder / "huge.png").write_bytes(png_of_size(50_000, 50_000))
    (folder / "bomb.png").write_bytes(png_of_size(12_000, 12_000, zlib.compress(bytes(12_000 * 400), 9)))
    (tmp_path / "outside.png").write_bytes(png())
    return folder


@pytest.fixture
def annotations(tmp_path, folder):
    return write_json_rows(tmp_path / "rows.json", ROWS)


def test_every_problem_is_reported_once(annotations, folder):
    report = checking.check(annotations, folder)
    assert {problem.where: (problem.kind, problem.fatal) for problem in report.problems} == {
        f"{annotations}: row {number}": kind for number, kind in EXPECTED.items()
    }
    assert len(report.problems) == len(EXPECTED)
    assert (report.rows, report.usable, report.has_unusable_rows) == (16, 8, True)
    assert all("\n" not in problem.reason for problem in report.problems)


def test_without_an_image_folder_only_texts_are_checked(annotations):
    report = checking.check(annotations, None)
    assert [problem.kind for problem in report.problems] == ["empty answer", "invalid row", "duplicate"]


@pytest.mark.parametrize("by_id", [False, True])
def test_usable_rows_are_written_unchanged(annotations, folder, tmp_path, by_id):
    rows = [row | {"pid": "same"} if isinstance(row, dict) else row for row in ROWS]  # which identifies nothing
    named = {f"id{number}": row for number, row in enumerate(rows)}
    write_json_rows(annotations, named if by_id else rows)
    before, path = annotations.read_bytes(), tmp_path / "clean.json"
    assert checking.write_usable_rows(checking.check(annotations, folder), annotations, path) == 8
    kept = (0, 4, 8, 11, 12, 13, 14, 15)
    assert json.loads(path.read_text()) == ({f"id{n}": rows[n] for n in kept} if by_id else [rows[n] for n in kept])
    assert annotations.read_bytes() == before
    assert not checking.check(path, folder).has_unusable_rows


@pytest.mark.parametrize(
    ("source", "path"),
    [("rows.json", "rows.json"), ("a.parquet", "b.json"), ("a.json", "b.jsonl"), ("a.json", "taken")],
)
def test_files_that_cannot_be_written(tmp_path, source, path):
    row = {"question": "Q?", "chosen": "A", "rejected": "B", "image": "a.png"}
    (tmp_path / "taken").mkdir()
    (write_parquet if source == "a.parquet" else write_json_rows)(tmp_path / source, [row])
    with pytest.raises(UserError, match=path):
        checking.write_usable_rows(checking.check(tmp_path / source, None), tmp_path / source, tmp_path / path)


# What a training run refuses.

PROCESSOR = Processor(Encoder(WordTokenizer(), "llava-hf", 4, IMAGE_ID), 8, context=60)
LONG = "cup " * 30
ANSWERS = st.sampled_from(["Yes", "A cup.", " ", "", "cup " * 12, LONG, "cup " * 80, "half \ud83d"])
ROW = st.builds(
    lambda image, question, answer, more: llava_row(image, question, answer, *more),
    *(st.sampled_from(["a.png", ""]), st.sampled_from(["Q?", f"Q? {LONG}"]), ANSWERS),
    st.just(()) | st.tuples(st.sampled_from(["Explain why.", "Explain why this answer is wrong: No"]), ANSWERS),
)
TOGETHER = [  # rationales of one answer that fit alone, but not in one conversation
    llava_row("a.png", "Q?", "Yes", why, "cup " * 18)
    for why in ("Explain why.", "Explain why this answer is wrong: No")
]
PAIR = st.builds(
    lambda *texts: dict(zip(("image", "question", "chosen", "rejected"), ("a.png", *texts), strict=True)),
    *(st.just("Q?"), ANSWERS, ANSWERS),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(ROW, min_size=1, max_size=6) | st.lists(PAIR, min_size=1, max_size=4),
    st.sampled_from(["separate", "positive-first"]),
    st.booleans(),
)
@example(TOGETHER, "positive-first", True)
def test_what_check_passes_train_takes(tmp_path_factory, rows, context, sharing):
    folder = tmp_path_factory.mktemp("train")
    (folder / "a.png").write_bytes(png())
    pairs = "chosen" in rows[0]
    shape = SequenceShape(length=50, edges=30, questions=2 * pairs)
    builder = TreeBuilder(PROCESSOR, shape, DPOConfig() if pairs else Supervision(context=context), sharing)
    path, fixed = write_json_rows(folder / "rows.jsonl", rows), folder / "fixed.jsonl"
    report = checking.check(path, folder, PROCESSOR, builder)

    def train(file):
        survey(read_records(MixtureEntry(file=file, images=folder)), builder)

    if report.has_unusable_rows:
        with pytest.raises(UserError):
            train(path)
        if not report.usable:
            with pytest.raises(UserError, match="none of its"):
                checking.write_usable_rows(report, path, fixed)
            assert not fixed.exists()
            return
        assert checking.write_usable_rows(report, path, fixed) < len(rows)
        path = fixed
    train(path)
    assert not checking.check(path, folder, PROCESSOR, builder).has_unusable_rows


class MaskingEncoder(Encoder):
    """Masks what holds an end token, as original LLaVA does."""

    def __call__(self, conversation):
        tokens = super().__call__(conversation)
        masked = any("</s>" in turn.text for turn in conversation.turns)
        return dataclasses.replace(tokens, weights=0 * tokens.weights) if masked else tokens


def test_conversations_that_teach_nothing_are_reported_by_check_and_train(tmp_path, caplog):
    rows = [llava_row(None, "Q?", "A."), llava_row(None, "Q?", "One</s>two"), llava_row(None, "Q? </s>", "A.")]
    processor = dataclasses.replace(PROCESSOR, encoder=MaskingEncoder(WordTokenizer(), "llava-hf", 4, IMAGE_ID))
    path = write_json_rows(tmp_path / "rows.json", rows)
    report = checking.check(path, None, processor)
    assert [(problem.where[-5:], problem.kind) for problem in report.problems] == [
        ("row 1", "untaught"),
        ("row 2", "untaught"),
    ]
    builder = TreeBuilder(processor, SequenceShape(length=50, edges=30), Supervision())
    found = read_records(path)
    find_sizes(found, found, builder)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 of 3 conversations" in caplog.text
    assert "row 1" in caplog.text
    write_json_rows(path, rows[1:])
    with pytest.raises(DataError, match="2 conversations"):
        survey(read_records(path), builder)


def test_conversations_beyond_the_context_are_reported(tmp_path, folder):
    rows = [llava_row("a.png"), llava_row("a.png", "What?", "there is a red cup. " * 2000)]
    report = checking.check(
        write_json_rows(tmp_path / "rows.json", rows), folder, loading.load_processor("scenes-base")
    )
    assert [(problem.where[-5:], problem.kind) for problem in report.problems] == [("row 1", "too long")]
    assert len(report.lengths) == 2
    assert report.lengths[1] > 4000


def test_numbers_of_a_dataset_card(tmp_path):
    rows = [
        llava_row("a.png", "Is it red?", "Yes", "Explain why.", "It is as red as can be."),
        llava_row("a.png", "Is it red?", "Yes", WHY_WRONG.format("No"), "It is red."),
        llava_row("a.png", "Is it red?", "Yes", WHY_WRONG.format("Maybe"), "It is plainly red."),
        llava_row("b.png", "What is there?", "A cup that stands on a table.", "Explain why.", "A cup stands there."),
        llava_row("b.png", "Which? A. cup B. jug", "A", WHY_WRONG.format("B"), "No jug."),
    ]
    report = checking.check(write_json_rows(tmp_path / "rows.json", rows), None)
    assert report.stats == {
        "images": 2,
        "without image": 0,
        "conversations": 5,
        "by dataset": {"reverie": 5},
        "by kind": {"negative": 3, "positive": 2},
        "instructions": 3,
        "negatives per instruction": 1.0,
        "question types": {"yes/no": 0.333, "open": 0.333, "choice": 0.333},
        "words per rationale": {"mean": 4.0, "median": 4, "p95": 7, "max": 7},
    }


def test_the_command(annotations, tmp_path, reverie):
    details, clean = tmp_path / "problems.jsonl", tmp_path / "clean.json"
    code, out, _ = reverie("data", "check", annotations, "--details", details)  # `images` beside the file is found
    assert (code, "16 rows, 8 usable" in out) == (1, True)
    problems = [json.loads(line) for line in details.read_text().splitlines()]
    assert {problem["kind"] for problem in problems} == {kind for kind, _ in EXPECTED.values()}
    code, out, _ = reverie("data", "check", annotations, "--fix", clean)
    assert (code, "8 rows" in out) == (0, True)
    hopeless, none = write_json_rows(tmp_path / "bad.json", ROWS[9:11]), tmp_path / "none.json"
    code, _, err = reverie("data", "check", hopeless, "--fix", none)
    assert (code, str(hopeless) in err, none.exists()) == (2, True, False)


INPUTS = {
    "details": ["check", "rows.json", "--details", "rows.json"],
    "fix": ["check", "rows.json", "--fix", "images/../rows.json"],
    "one output twice": ["check", "rows.json", "--details", "new", "--fix", "new"],
    "a page": ["visualize", "rows.json=images", "--model", "scenes-base", "--out", "rows.json"],
    "matches": ["contamination", "rows.json", "--eval-images", "images", "--details", "rows.json"],
    "questions": ["contamination", "rows.json", "--eval-images", "new", "--details", "new"],
    "no folder": ["check", "rows.json", "--fix", "none/clean.json"],
}


@pytest.mark.parametrize("arguments", INPUTS.values(), ids=INPUTS)
def test_no_output_replaces_an_input(annotations, tmp_path, reverie, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    before = annotations.read_bytes()
    code, _, err = reverie("data", *arguments)
    assert (code, arguments[-1] in err, err.count("\n")) == (2, True, 1)
    assert annotations.read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_a_file_without_a_conversation_is_refused_by_check_and_build(tmp_path, reverie):
    row = {"question": "Q?", "choices": ["a", "b"], "answer": 0, "split": "val", "hint": "", "solution": ""}
    path = write_json_rows(tmp_path / "problems.json", {"1": row})
    code, out, _ = reverie("data", "check", path)
    assert (code, "nothing to train on" in out) == (1, True)
    code, _, err = reverie("data", "build", path, "--out", tmp_path / "records")
    assert (code, str(path) in err.splitlines()[-1], (tmp_path / "records").exists()) == (2, True, False)


def test_special_tokens_in_texts_are_said(tmp_path):
    rows = [llava_row(None), llava_row(None, "Q?", "One</s>two"), llava_row(None, "<s>Q?", "A.")]
    report = checking.check(write_json_rows(tmp_path / "rows.json", rows), None, loading.load_processor("scenes-base"))
    assert [(problem.where[-5:], problem.kind, problem.fatal) for problem in report.problems] == [
        ("row 1", "special token", False), ("row 2", "special token", False)
    ]  # fmt: skip


def test_the_command_takes_the_recipe_of_the_run(tmp_path, reverie):
    path = write_json_rows(
        tmp_path / "rows.json", [llava_row(None), llava_row(None, "Q?", "there is a red cup. " * 60)]
    )
    model = ["--model", "scenes-base"]
    for options, expected in (
        (model, 0),
        ([*model, "--recipe", "scenes-rationales"], 1),
        ([*model, "--recipe", "scenes-rationales", "--set", "sequence.length=2000", "sequence.edges=2000"], 0),
        ([*model, "--recipe", "rlaifv-dpo-lora"], 1),  # no pairs of answers
        (["--recipe", "scenes-rationales"], 2),
        ([*model, "--set", "sequence.length=2000"], 2),
    ):
        assert reverie("data", "check", path, *options)[0] == expected
