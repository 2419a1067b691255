"""Problems of an annotation file and its images are found, named, counted and removed."""

import io
import json
import zlib

import pytest
from PIL import Image

from reverie_jax import loading
from reverie_jax.data import check as checking
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.row_files import Rows
from reverie_jax.data.stats import compute_stats
from reverie_jax.errors import UserError
from tests.data.fakes import llava_row, png, png_of_size, write_json_rows

WHY_WRONG = "Explain why this answer is wrong: {}"
NAMES = ("a.png", "none.png", "cut.png", "words.jpg", "really.png", "huge.png", "bomb.png", "../outside.png")
ROWS = [
    *(llava_row(name, f"{IMAGE}\nWhat?", "A cup.") for name in NAMES),
    llava_row("a.png", f"{IMAGE}\nWhat?", "A cup."),
    llava_row("a.png", f"{IMAGE}\nWho?", " "),
    "row",
    llava_row(None, "Two and two?", "Four."),
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
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "cut.png").write_bytes(png(size=(60, 60))[:60])
    (folder / "words.jpg").write_text("not an image")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer := io.BytesIO(), format="JPEG")
    (folder / "really.png").write_bytes(buffer.getvalue())
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
    assert (report.rows, len(report.examples), report.has_unusable_rows) == (12, 4, True)
    assert all("\n" not in problem.reason for problem in report.problems)


def test_without_an_image_folder_only_texts_are_checked(annotations):
    report = checking.check(annotations, None)
    assert [problem.kind for problem in report.problems] == ["invalid row", "duplicate", "empty answer"]


@pytest.mark.parametrize("by_id", [False, True])
def test_usable_rows_are_written_unchanged(annotations, folder, tmp_path, by_id):
    rows = {f"id{number}": row for number, row in enumerate(ROWS)} if by_id else ROWS
    write_json_rows(annotations, rows)
    before, path = annotations.read_bytes(), tmp_path / "clean.json"
    report = checking.check(annotations, folder)
    if by_id:  # a row that is not an object has no id
        rows.pop("id10")
        write_json_rows(annotations, rows)
        before, report = annotations.read_bytes(), checking.check(annotations, folder)
    assert checking.write_usable_rows(report, annotations, path) == 4
    kept = {f"id{n}": ROWS[n] for n in (0, 4, 8, 11)} if by_id else [ROWS[n] for n in (0, 4, 8, 11)]
    assert json.loads(path.read_text()) == kept
    assert annotations.read_bytes() == before
    assert not checking.check(path, folder).has_unusable_rows
    assert len(list(Rows(path))) == 4


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_files_that_cannot_be_rewritten(annotations, folder, name):
    source, report = annotations.with_name(name), checking.check(annotations, folder)
    with pytest.raises(UserError, match=name):
        checking.write_usable_rows(report, source, annotations.with_name("rows.json" if name == "rows.json" else "new"))


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
    stats = compute_stats((example.image, example.conversation) for example in report.examples)
    assert stats == {
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
    assert (code, "12 rows, 4 usable" in out) == (1, True)
    problems = [json.loads(line) for line in details.read_text().splitlines()]
    assert {problem["kind"] for problem in problems} == {kind for kind, _ in EXPECTED.values()}
    code, out, _ = reverie("data", "check", annotations, "--fix", clean)
    assert (code, "4 rows" in out) == (0, True)
