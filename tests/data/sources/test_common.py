"""Images by the names of annotation files: found below their folder, never outside it, and refused if they are broken."""

import unicodedata
import zlib

import pytest
from PIL import Image

from reverie_jax.data import check as checking
from reverie_jax.data.images import MAX_PIXELS
from reverie_jax.data.mixture import MixtureEntry
from reverie_jax.data.sources import ImageFolder
from reverie_jax.data.sources.common import InvalidRow, content_digest, parse_image
from reverie_jax.errors import DataError
from tests.data.fakes import (
    assert_one_line,
    llava_row,
    png,
    png_of_size,
    read_records,
    saved,
    write_json_rows,
    write_parquet,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    for name in ("a.png", "image.png", "vg/VG_100K/1.jpg", "x/2.jpg", "y/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside.png").write_bytes(png((7, 7, 7)))
    (tmp_path / "outside" / "o.png").write_bytes(png((7, 7, 7)))
    (folder / "link.png").symlink_to(tmp_path / "outside" / "o.png")
    (folder / "door").symlink_to(tmp_path / "outside")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "vg" / "named.png").symlink_to(tmp_path / "outside.png")
    (folder / "circle").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["vg/VG_100K/1.jpg", "1.jpg", "VG_100K/1.jpg", "other/1.jpg", r"C:\vg\1.jpg", r"VG_100K\1.jpg"]
)
def test_folders_before_a_name_may_differ(folder, name):
    assert ImageFolder(folder).find(name) == (folder / "vg/VG_100K/1.jpg").resolve()


def test_names_in_several_folders_need_their_folder(folder):
    images = ImageFolder(folder)
    assert images.find("x/2.jpg") != images.find("y/2.jpg")
    for name in ("2.jpg", "z/2.jpg", "z/image.png"):
        with pytest.raises(DataError) as error:
            images.find(name)
        assert_one_line(error, folder / name)


def test_a_folder_is_needed_for_images(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(DataError) as error:
        read_records(write_json_rows(tmp_path / "a.json", [llava_row("a.png")]))
    assert_one_line(error, tmp_path / "a.json", "row 0", "a.png")


ESCAPES = ["../outside.png", "x/../../outside.png", "/etc/hostname", "./../outside.png", "images/../../outside.png"]
ESCAPES += ["door/../../outside.png", r"..\outside.png"]
FORMATS = {
    "llava": llava_row,
    "annotated": lambda name: {
        **{"image": name, "question": "Q?", "correct_answer": "A.", "confusing_answer": "B."},
        **{"correct_rationale": "C.", "incorrect_rationale": "D.", "gemini_pro_judge": "no"},
    },
    "lrv": lambda name: {"image_id": name, "question": "Q?", "answer": "A."},
}


@pytest.mark.parametrize(
    "name", ["link.png", "door/o.png", "other/o.png", "named.png", "door/../link.png", "circle/link.png"]
)
def test_links_in_the_folder_are_followed(folder, name):
    """Whoever links pictures into a folder means them: the pictures of COCO lie beside most people's projects."""
    assert ImageFolder(folder).find(name).read_bytes() == png((7, 7, 7))
    absolute = folder.absolute() / "a.png"
    assert ImageFolder(folder).find(str(absolute)) == absolute.resolve()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_no_name_leaves_the_folder(tmp_path, folder, form):
    for name in ESCAPES:
        with pytest.raises(DataError) as error:
            read_records(write_json_rows(tmp_path / "a.json", [form(name)]))
        assert_one_line(error, name.replace("\\", "/"), "leaves")


BAD_NAMES = ["none.png", "images", ".", "a.png/none.png", " a.png", "A.PNG", "nul\0.png", "loop.png"]
BAD_NAMES += ["gone.png", "other/gone.png", "iVBO" * 60, "a" * 300 + ".png", "a/" * 3000]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_names_without_a_file_are_one_line(tmp_path, folder, name):
    with pytest.raises(DataError) as error:
        read_records(write_json_rows(tmp_path / "a.jsonl", [llava_row(name)]))
    assert_one_line(error, tmp_path / "a.jsonl", "row 0", folder)
    assert len(str(error.value)) < 600
    report = checking.check(tmp_path / "a.jsonl", folder)
    assert [problem.kind for problem in report.problems] == ["missing image"]


@pytest.mark.parametrize(("on_disk", "in_the_row"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_written_apart_as_macos_does(folder, on_disk, in_the_row):
    file = folder / unicodedata.normalize(on_disk, "été 1.png")
    file.write_bytes(png())
    assert ImageFolder(folder).find(unicodedata.normalize(in_the_row, "été 1.png")) == file.resolve()


def damaged(kind, damage, mode="RGB"):
    """An image file of 16 x 16, with bytes from some places on replaced."""
    content = bytearray(saved(Image.new(mode, (16, 16), 3), kind))
    for place, value in damage(content).items():
        start = place % len(content)
        content[start : start + len(value)] = value
    return bytes(content)


def inflating(size):
    """A PNG with a compressed text of some size."""
    packed = b"Comment\0\0" + zlib.compress(bytes(size), 9)
    chunk = len(packed).to_bytes(4, "big") + b"zTXt" + packed + zlib.crc32(b"zTXt" + packed).to_bytes(4, "big")
    whole = png(size=(8, 8))
    return whole[:33] + chunk + whole[33:]


BROKEN_IMAGES = {
    "png of 50,000 x 50,000": png_of_size(50_000, 50_000),
    "png just too large": png_of_size(MAX_PIXELS // 8_000 + 1, 8_000),
    "png that inflates": png_of_size(12_000, 12_000, zlib.compress(bytes(12_000 * 400), 9)),
    "png whose text inflates": inflating(200_000_000),
    "gif of 65,535 x 65,535": damaged("GIF", lambda content: {6: b"\xff" * 4}),
    "bmp of 50,000 x 50,000": damaged("BMP", lambda content: {18: (50_000).to_bytes(4, "little") * 2}),
    "jpeg of 60,000 x 60,000": damaged(
        "JPEG", lambda content: {content.index(b"\xff\xc0") + 5: (60_000).to_bytes(2, "big") * 2}
    ),
    "damaged avif": damaged("AVIF", lambda content: {-30: b"\xff" * 30}),
    "damaged dds": damaged("DDS", lambda content: {80: b"\0" * 4}),
    "damaged blp": damaged("BLP", lambda content: {4: b"\x7f" * 4}, "P"),
    "truncated": png()[:40],
    "text": b"words",
    "empty": b"",
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_broken_images_are_named(tmp_path, name):
    assert len(BROKEN_IMAGES[name]) < 250_000
    (tmp_path / f"{name}.png").write_bytes(BROKEN_IMAGES[name])
    path = write_json_rows(tmp_path / "a.json", [llava_row(f"{name}.png")])
    with pytest.raises(DataError) as error:
        read_records(MixtureEntry(file=path, images=tmp_path))
    assert_one_line(error, tmp_path / f"{name}.png")
    (problem,) = checking.check(path, tmp_path).problems
    assert problem.fatal
    assert name in problem.reason
    if not BROKEN_IMAGES[name]:
        return
    row = {"image": {"bytes": BROKEN_IMAGES[name], "path": f"{name}.png"}, "question": "Q?"}
    write_parquet(tmp_path / "a.parquet", [row | {"chosen": "A", "rejected": "B", "idx": "0"}])
    with pytest.raises(DataError) as error:
        read_records(tmp_path / "a.parquet")
    assert_one_line(error, tmp_path / "a.parquet", f"{name}.png")


@pytest.mark.parametrize(
    ("value", "path", "expected"),
    [
        ("a.png", None, ("a.png", b"")),
        ("a.png", "b.png", ("b.png", b"")),
        ({"bytes": b"x", "path": "a.png"}, None, ("a.png", b"x")),
        ({"bytes": b"x", "path": "a.png"}, "b.png", ("b.png", b"x")),
        ({"bytes": b"x"}, "", (content_digest(b"x"), b"x")),
        ({"path": "a.png", "bytes": None}, None, ("a.png", b"")),
        (b"x", None, (content_digest(b"x"), b"x")),
        (None, None, ("", b"")),
    ],
)
def test_images_of_rows(value, path, expected):
    assert parse_image(value, path) == expected


@pytest.mark.parametrize("value", [5, ["a.png"], {"name": "a.png"}, {"bytes": "x"}], ids=repr)
def test_other_values_are_not_images(value):
    with pytest.raises(InvalidRow):
        parse_image(value, None)
