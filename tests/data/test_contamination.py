"""Contamination: an image under other names, sizes and formats is found; one that only shares a name is not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie_jax.cli.data import Contamination
from reverie_jax.data import contamination
from reverie_jax.data.contamination import (
    MAX_COLOR_DIFFERENCE,
    EvaluationImages,
    ImageHash,
    ImageMatch,
    find_matches,
    hamming_distances,
    hash_image,
    normalize_name,
    read_evaluation_images,
)
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.records import write_records
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import assert_one_line, llava_row, png, records, saved, write_json_rows

SIDE = 192


@functools.cache
def natural(seed: int) -> Image.Image:
    """An image like a photograph: most power in low frequencies, three correlated colors."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = 1
    planes = []
    gray = rng.normal(size=(SIDE, SIDE))
    for _ in range(3):
        waves = np.fft.fft2(0.8 * gray + 0.2 * rng.normal(size=(SIDE, SIDE))) / frequency**1.2
        plane = np.fft.ifft2(waves).real
        planes.append(np.clip(128 + 55 * (plane - plane.mean()) / plane.std(), 0, 255))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@functools.cache
def photo(seed: int) -> bytes:
    return saved(natural(seed))


def evaluation(**images: bytes | None) -> EvaluationImages:
    """Evaluation images by name; None if only the name is known. Two underscores are a dot."""
    return EvaluationImages(
        {name.replace("__", "."): None if image is None else hash_image(image, name) for name, image in images.items()}
    )


def matches(name: str, image: bytes, known: EvaluationImages, distance: int = 4) -> list[ImageMatch]:
    return list(find_matches([(name, image)], known, max_distance=distance, threads=2))


# Names.

NUMBER = "000000123456"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (f"COCO_val2014_{NUMBER}.jpg", f"coco/images/train2017/{NUMBER}.JPG", True),
        ("vg/VG_100K/2345.jpg", "VG_100K_2/2345.png", True),
        ("Cat Picture.JPG", "cat picture.png", True),
        ("a.b.jpg", "a.b.png", True),
        ("a.b.jpg", "a.c.jpg", False),
        ("a", "a.jpg", True),
        ("2345.jpg", "02345.jpg", False),
        (f"{NUMBER}.jpg", "000000123457.jpg", False),
        (f"{NUMBER}.jpg", f"9{NUMBER}.jpg", False),
        (f"{NUMBER}.jpg", "123456.jpg", False),
        (f"{NUMBER}.jpg", f"{NUMBER}x.jpg", False),
        ("x/y.jpg", "x.jpg", False),
        ("茶/ü.png", "ü.jpg", True),
    ],
)
def test_images_are_compared_by_coco_number_or_stem(one, other, same):
    for name, known in ((one, other), (other, one)):
        expected = [ImageMatch(name, known, "name", None)] if same else []
        assert matches(name, b"", EvaluationImages({known: None})) == expected


@settings(max_examples=40)
@given(
    st.integers(0, 10**12 - 1),
    st.sampled_from(("", "COCO_train2014_", "COCO_val2014_", "coco_test2015_", "COCO_")),
    st.sampled_from(("", "a/", "train2017/", "x/y/")),
    st.sampled_from((".jpg", ".JPG", ".png", "")),
)
def test_the_number_of_any_coco_name_is_found(number, prefix, folder, suffix):
    assert normalize_name(f"{folder}{prefix}{number:012d}{suffix}") == f"{number:012d}"


MATCHES = {
    "no evaluation image": ("a.png", photo(1), {"a__jpg": None}, [("a.jpg", "name", None)]),
    "no training image": ("a.png", b"", {"a__jpg": photo(2)}, [("a.jpg", "name", None)]),
    "same name, other image": ("a.png", photo(1), {"a__jpg": photo(2)}, []),
    "same name and image": ("x/a.png", photo(1), {"a__jpg": photo(1)}, [("a.jpg", "name and hash", 0)]),
    "other name, same image": ("x.png", photo(1), {"a__jpg": photo(1)}, [("a.jpg", "hash", 0)]),
    "several": (  # not a.gif: the hash of an image of that name decides
        "a.png",
        photo(1),
        {"a__jpg": photo(1), "b__png": photo(1), "c__png": photo(2), "a__gif": None},
        [("a.jpg", "name and hash", 0), ("b.png", "hash", 0)],
    ),
    "single colors": ("red.png", png((255, 0, 0)), {"blue__png": png((0, 0, 255))}, []),
    "black and white": ("black.png", png((0, 0, 0)), {"white__png": png((255, 255, 255))}, []),
    "plain and natural": ("plain.png", png(), {f"{n}": photo(n) for n in range(10)}, []),
}


@pytest.mark.parametrize(("name", "image", "known", "expected"), MATCHES.values(), ids=MATCHES)
def test_images_match_by_hash_if_both_are_available_else_by_name(name, image, known, expected):
    assert matches(name, image, evaluation(**known)) == [ImageMatch(name, *match) for match in expected]


# Hashes.

CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "half the size": lambda image: saved(image.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS)),
    "another shape": lambda image: saved(image.resize((SIDE + 40, SIDE - 30), Image.Resampling.BILINEAR)),
    "webp": lambda image: saved(image, "WEBP", quality=60),
    "gif": lambda image: saved(image, "GIF"),
    "with transparency": lambda image: saved(image.convert("RGBA")),
    "a little brighter": lambda image: saved(image.point(lambda value: min(255, value + 12))),
    "small, low quality": lambda image: saved(image.resize((64, 64)), "JPEG", quality=30),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_copy_is_found(change):
    for seed in range(2):
        known = evaluation(eval__jpg=photo(seed), other__jpg=photo(90))
        (match,) = matches("train.png", change(natural(seed)), known)
        assert (match.evaluation, match.matched_by) == ("eval.jpg", "hash")
        assert match.distance is not None
        assert match.distance <= 4


def test_different_images_do_not_match():
    hashes = [hash_image(photo(seed), "x") for seed in range(24)]
    bits = np.asarray([value.bits for value in hashes], np.uint64)
    assert min(hamming_distances(int(one), np.delete(bits, n)).min() for n, one in enumerate(bits)) > 8
    known = EvaluationImages({f"{number}.png": value for number, value in enumerate(hashes[:12])})
    images = [(f"t{seed}.png", photo(seed)) for seed in range(12, 24)]
    assert list(find_matches(images, known, max_distance=4, threads=2)) == []


GRAY = np.full((8, 8, 3), 100, np.int16)
LIMIT = MAX_COLOR_DIFFERENCE


@pytest.mark.parametrize(("more", "similar"), [(0, True), (LIMIT, True), (LIMIT + 1, False), (-LIMIT - 1, False)])
def test_plain_images_of_other_colors_do_not_match(monkeypatch, more, similar):
    monkeypatch.setattr(contamination, "hash_image", lambda encoded, name: ImageHash(7, GRAY))
    known = EvaluationImages({"e.png": ImageHash(7, (GRAY + more).astype(np.int16))})
    assert bool(matches("t.png", b"x", known)) == similar


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=8), st.integers(0, 8))
def test_the_maximum_distance_matches(bits, flipped, distance):
    other = bits ^ sum(1 << bit for bit in flipped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "hash_image", lambda encoded, name: ImageHash(bits, GRAY))
        found = matches("t.png", b"x", EvaluationImages({"e.png": ImageHash(other, GRAY)}), distance)
    expected = [ImageMatch("t.png", "e.png", "hash", len(flipped))] if len(flipped) <= distance else []
    assert found == expected


def test_images_are_read_one_by_one_and_matches_keep_their_order():
    """A training set does not fit in memory."""
    read = []

    def images():
        for number in range(299, -1, -1):
            read.append(f"{number}.png")
            yield read[-1], b""

    known = EvaluationImages({f"{n}.jpg": None for n in range(300)})
    found = find_matches(images(), known, max_distance=4, threads=2)
    first = next(found)
    assert len(read) <= 17
    assert [match.training for match in (first, *found)] == read


# Evaluation images.


def write_files(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def test_folders_are_searched_at_any_depth_and_broken_files_are_named(tmp_path):
    folder = tmp_path / "e"
    write_files(folder / "deep", a__png=png(), b__JPG=saved(natural(1), "JPEG"))
    write_files(folder, c__webp=saved(natural(2), "WEBP"), notes__txt=b"not an image", data__json=b"{}")
    write_files(folder, cut__png=png()[:40], text__jpg=b"hello", empty__gif=b"")
    (folder / "folder.png").mkdir()
    (folder / "link").symlink_to(write_files(tmp_path / "elsewhere", d__png=png()))
    (folder / "circle").symlink_to(folder)
    found = read_evaluation_images([folder], 2)
    hashes = {Path(name).name: value for name, value in found.hashes.items()}
    assert set(hashes) == {"a.png", "b.JPG", "c.webp", "d.png"}
    assert hashes["a.png"].bits == hash_image(png(), "x").bits
    assert len(found.unreadable) == 3
    for name in ("cut.png", "text.jpg", "empty.gif"):
        assert sum(str(folder / name) in reason for reason in found.unreadable) == 1
    assert not any("\n" in reason for reason in found.unreadable)


ROWS = [{"image": f"COCO_val2014_{n:012d}.jpg", "text": "Ist da\u2028ein Törtchen?"} for n in (1, 1, 2)]
QUESTION_FILES = {
    "lines in a .json file": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "names": json.dumps(sorted({row["image"] for row in ROWS})),
    "COCO's numbers": json.dumps([{"image_id": 1}, {"image_id": 2}]),
}


@pytest.mark.parametrize("text", QUESTION_FILES.values(), ids=QUESTION_FILES)
def test_question_files_name_images(tmp_path, text):
    paths = [tmp_path / "q.json", tmp_path / "again.json"]  # as POPE's three files do
    for path in paths:
        path.write_text(text, "utf-8")
    hashes = read_evaluation_images(paths, 1).hashes
    assert set(hashes.values()) == {None}
    assert {normalize_name(name) for name in hashes} == {f"{number:012d}" for number in (1, 2)}


@pytest.mark.parametrize("name", ["empty", "broken", "nowhere", "broken.json", "none.json"])
def test_paths_without_images_are_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "broken", cut__png=png()[:40])
    write_files(tmp_path, broken__json=b"[1, ", none__json=b'[{"text": "?"}]')
    with pytest.raises(DataError) as error:
        read_evaluation_images([tmp_path / name], 1)
    assert_one_line(error, tmp_path / name)


def test_folders_may_share_names_and_be_given_twice(tmp_path):
    first = write_files(tmp_path / "mme", a__png=photo(1), x__png=photo(3))
    second = write_files(tmp_path / "pope", a__png=photo(2), y__png=photo(4))
    known = read_evaluation_images([first, second, first], 2)
    assert all(matches(f"t{seed}.png", photo(seed), known) for seed in (1, 2))


# The command.


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder: of three training images, one is an evaluation image by hash, one by name."""
    folder = tmp_path_factory.mktemp("contamination")
    training = {"seen.png": 1, f"coco/train2017/{NUMBER}.png": 2, "other.png": 3}
    for name, seed in training.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(photo(seed))
    write_json_rows(folder / "rows.json", [*map(llava_row, training), llava_row(None)])
    write_files(folder / "eval", unseen__jpg=saved(natural(1), "JPEG", quality=60), other__png=photo(9))
    write_json_rows(folder / "questions.jsonl", [{"image": f"COCO_val2014_{NUMBER}.jpg"}])
    write_records(folder / "one", {"train": records(1)})
    with read_mixture([MixtureEntry(file=folder / "rows.json")], ReadLog()) as mixture:
        write_records(folder / "built", {"train": mixture})
    return folder


@pytest.fixture
def run(capsys, tmp_path) -> Callable[..., tuple[int, str, str, list[dict[str, Any]]]]:
    """Runs the command; returns (exit code, stdout, stderr, details)."""

    def run(sources: tuple[Path, ...], eval_images: tuple[Path, ...], **options: Any) -> Any:
        code, details = 0, tmp_path / "details.jsonl"
        try:
            Contamination(
                sources=tuple(map(str, sources)), eval_images=(eval_images,), **{"details": details} | options
            ).run()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr(), [json.loads(line) for line in details.read_text("utf-8").splitlines()]

    return run


@pytest.mark.parametrize("source", ["rows.json", "built"])
def test_the_command_lists_matches_and_exits_with_one(world, run, source):
    code, out, _, details = run((world / source,), (world / "eval", world / "questions.jsonl"))
    assert code == 1
    assert "2 of 4 records match one of 3 evaluation images" in out
    by_hash, by_name = details
    assert (by_hash["training"], Path(by_hash["evaluation"]).name) == ("seen.png", "unseen.jpg")
    assert by_hash["matched_by"] == "hash"
    assert 0 <= by_hash["distance"] <= 4
    assert by_name == {
        **{"training": f"coco/train2017/{NUMBER}.png", "evaluation": f"COCO_val2014_{NUMBER}.jpg"},
        **{"matched_by": "name", "distance": None},
    }


def test_the_command_exits_with_zero_without_matches_and_notes_broken_images(world, run, tmp_path):
    clean = write_files(tmp_path / "clean", a__png=photo(40), other__png=photo(41), cut__png=png()[:40])
    code, out, err, details = run((world / "rows.json",), (clean,))
    assert (code, details) == (0, [])
    assert "0 of 4 records match one of 2 evaluation images" in out
    assert len(err.splitlines()) == 1
    assert str(clean / "cut.png") in err


def test_the_distance_is_an_option(world, run, tmp_path):
    far = saved(natural(1).rotate(4, Image.Resampling.BICUBIC))
    folder = write_files(tmp_path / "e", far__png=far)
    bits = (hash_image(photo(1), "x").bits ^ hash_image(far, "x").bits).bit_count()
    assert bits > 0
    codes = [run((world / "rows.json",), (folder,), distance=distance)[0] for distance in (bits, bits - 1)]
    assert codes == [1, 0]


def test_matches_beyond_the_table_are_counted(run, tmp_path):
    write_records(tmp_path / "records", {"train": records(23)})
    write_json_rows(tmp_path / "q.json", [f"r{n}.jpg" for n in range(22)])
    code, out, _, details = run((tmp_path / "records",), (tmp_path / "q.json",))
    assert code == 1
    assert "22 of 23 records" in out
    assert "2 more" in out
    assert [row["training"] for row in details] == [f"r{n}" for n in range(22)]


@pytest.mark.parametrize("case", ["files and records", "no source", "missing images", "details", "distance"])
def test_the_command_refuses(world, run, tmp_path, case):
    sources = {"files and records": (world / "one", world / "rows.json"), "no source": ()}
    images = {"missing images": (tmp_path / "nowhere",)}
    options = {"details": {"details": tmp_path / "no" / "such.jsonl"}, "distance": {"distance": -1}}
    with pytest.raises(UserError) as error:
        run(sources.get(case, (world / "rows.json",)), images.get(case, (world / "eval",)), **options.get(case, {}))
    assert_one_line(error)
