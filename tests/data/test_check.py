"""What is wrong with an annotation file and its pictures is found, named, counted and taken out."""

import io
import json
import struct
import zlib

import pytest
from PIL import Image

from reverie_jax import loading
from reverie_jax.data import check as checking
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.stats import statistics_of
from tests.data.fakes import png

WHY_NOT = "Explain why this answer is wrong: {}"


def row(image, asked="What?", answer="A cup.", *more):
    texts = (f"{IMAGE}\n{asked}" if image else asked, answer, *more)
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": 1, "conversations": said} | ({"image": image} if image else {})


def claimed(width, height, packed=b""):
    """A PNG that says it is so large; its data are nothing, or zeros that unpack to gigabytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    (place / "a.png").write_bytes(png())
    (place / "cut.png").write_bytes(png(size=(60, 60))[:60])
    (place / "words.jpg").write_text("no picture")
    (place / "really.png").write_bytes(jpeg())
    (place / "huge.png").write_bytes(claimed(50_000, 50_000))
    (place / "bomb.png").write_bytes(claimed(12_000, 12_000, zlib.compress(bytes(12_000 * 400), 9)))
    (tmp_path / "outside.png").write_bytes(png())
    return place


NAMES = ("a.png", "none.png", "cut.png", "words.jpg", "really.png", "huge.png", "bomb.png", "../outside.png")


@pytest.fixture
def annotations(tmp_path, folder):
    rows = [row(name) for name in NAMES]
    rows += [row("a.png", "What?", "A cup."), row("a.png", "Who?", " "), "row", row("", "Two and two?", "Four.")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


EXPECTED = {
    1: ("missing picture", True),
    2: ("unreadable picture", True),
    3: ("unreadable picture", True),
    4: ("mislabelled picture", False),
    5: ("oversized picture", True),
    6: ("oversized picture", True),
    7: ("outside picture", True),
    8: ("repeated", False),
    9: ("empty answer", True),
    10: ("bad row", True),
}


def test_every_offender_is_named_once(annotations, folder):
    found = checking.check(annotations, folder)
    assert {offender.where: (offender.kind, offender.fatal) for offender in found.offenders} == {
        f"{annotations}: row {number}": kind for number, kind in EXPECTED.items()
    }
    assert len(found.offenders) == len(EXPECTED)
    assert (found.rows, len(found.talks)) == (12, 4)
    assert found.broken
    assert all("\n" not in offender.reason for offender in found.offenders)


def test_without_pictures_only_words_are_looked_at(annotations):
    found = checking.check(annotations, None)
    assert [offender.kind for offender in found.offenders] == ["bad row", "repeated", "empty answer"]


def test_a_clean_copy_is_clean_and_otherwise_the_same(annotations, folder, tmp_path):
    before = annotations.read_bytes()
    found = checking.check(annotations, folder)
    assert checking.write_clean(found, annotations, tmp_path / "clean.json") == 4
    rows = json.loads(before)
    assert json.loads((tmp_path / "clean.json").read_text()) == [rows[number] for number in (0, 4, 8, 11)]
    assert annotations.read_bytes() == before
    assert not checking.check(tmp_path / "clean.json", folder).broken


def test_the_file_itself_is_never_overwritten(annotations, folder):
    with pytest.raises(ValueError, match="is the file itself"):
        checking.write_clean(checking.check(annotations, folder), annotations, annotations)


@pytest.mark.parametrize("name", ["huge.png", "bomb.png"])
def test_pictures_that_would_fill_the_memory_are_refused_by_name(folder, name):
    with pytest.raises(BrokenImage, match=f"{name}: .*pixels"):
        decode((folder / name).read_bytes(), name)


def test_conversations_beyond_the_context_are_named(tmp_path, folder):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a.png"), row("a.png", "What?", "there is a red cup. " * 2000)]))
    found = checking.check(path, folder, loading.load_processor("scenes-base"))
    assert [(offender.where[-5:], offender.kind) for offender in found.offenders] == [("row 1", "too long")]
    assert len(found.lengths) == 2
    assert found.lengths[1] > 4000


def test_numbers_of_a_dataset_card(tmp_path):
    rows = [
        row("a.png", "Is it red?", "Yes", "Explain why.", "It is as red as can be."),
        row("a.png", "Is it red?", "Yes", WHY_NOT.format("No"), "It is red."),
        row("a.png", "Is it red?", "Yes", WHY_NOT.format("Maybe"), "It is plainly red."),
        row("b.png", "What is there?", "A cup that stands on a table.", "Explain why.", "A cup stands there."),
        row("b.png", "Which? A. cup B. jug", "A", WHY_NOT.format("B"), "No jug."),
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    numbers = statistics_of((talk.image, talk.conversation) for talk in checking.check(path, None).talks)
    assert numbers["images"] == 2
    assert numbers["instructions"] == 3
    assert numbers["by kind"] == {"negative": 3, "positive": 2}
    assert numbers["negatives an instruction"] == 1.0
    assert numbers["question types"] == {"yes/no": 0.333, "open": 0.333, "choice": 0.333}
    assert numbers["words a rationale"] == {"mean": 4.0, "median": 4, "p95": 7, "most": 7}


def test_the_command(annotations, folder, tmp_path, monkeypatch, capsys):
    from reverie_jax import cli

    def run(*words):
        monkeypatch.setattr("sys.argv", ["reverie", "data", "check", str(annotations), *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    assert run("--details", tmp_path / "offenders.jsonl") == 1  # `pictures` beside the file is found
    out = capsys.readouterr().out
    assert "12 rows, 4 usable" in out
    lines = [json.loads(line) for line in (tmp_path / "offenders.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {kind for kind, _ in EXPECTED.values()}
    assert run("--fix", tmp_path / "clean.json") == 0
    assert "4 rows" in capsys.readouterr().out
