"""Leaks: a picture under other names, sizes and formats is found; one that but shares a name or looks a bit alike is not."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reverie_jax.cli.data_options import Match as Command

from reverie_jax.data.contamination import (
    COLOURS,
    Evaluation,
    ImageHash,
    Match,
    canonical_name,
    distances,
    evaluation,
    find,
    image_hash,
)
from reverie_jax.data.images import BrokenImage
from reverie_jax.data.records import write_records
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import png, records

SIDE = 192


@functools.cache
def natural(seed: int, side: int = SIDE) -> Image.Image:
    """A picture as cameras make them: most power in low frequencies, three colours that go together."""
    rng = np.random.default_rng(seed)
    across = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    across[0, 0] = 1
    planes = []
    grey = rng.normal(size=(side, side))
    for _ in range(3):
        waves = np.fft.fft2(0.8 * grey + 0.2 * rng.normal(size=(side, side))) / across**1.2
        plane = np.fft.ifft2(waves).real
        planes.append(np.clip(128 + 55 * (plane - plane.mean()) / plane.std(), 0, 255))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def against(**pictures: bytes | None) -> Evaluation:
    """Evaluation pictures by name; None where only the name is known. Two underscores are a dot."""
    return Evaluation(
        {
            name.replace("__", "."): None if picture is None else image_hash(picture, name)
            for name, picture in pictures.items()
        }
    )


def leaks(name: str, picture: bytes, known: Evaluation, distance: int = 4) -> list[Match]:
    return list(find([(name, picture)], known, distance=distance, threads=2))


# Names.

NUMBER = "000000123456"
SAME = [
    f"COCO_val2014_{NUMBER}.jpg",
    f"COCO_train2014_{NUMBER}.jpg",
    f"COCO_test2015_{NUMBER}.png",
    f"{NUMBER}.jpg",
    NUMBER,
    f"train2017/{NUMBER}.jpg",
    f"coco/images/val2017/{NUMBER}.JPG",
    f"coco_val2014_{NUMBER}.jpeg",
]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("other", SAME)
def test_a_coco_picture_is_known_by_its_number_in_every_release(name, other):
    assert canonical_name(name) == canonical_name(other)
    assert leaks(name, b"", Evaluation({other: None})) == [Match(name, other, "name", None)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
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
def test_other_pictures_are_known_by_their_names(one, other, same):
    assert bool(leaks(one, b"", Evaluation({other: None}))) == same
    assert bool(leaks(other, b"", Evaluation({one: None}))) == same


@given(
    st.integers(0, 10**12 - 1),
    st.sampled_from(("", "COCO_train2014_", "COCO_val2014_", "coco_test2015_", "COCO_")),
    st.sampled_from(("", "a/", "train2017/", "x/y/")),
    st.sampled_from((".jpg", ".JPG", ".png", "")),
)
def test_the_number_of_any_coco_name_is_found(number, prefix, folder, suffix):
    assert canonical_name(f"{folder}{prefix}{number:012d}{suffix}") == f"{number:012d}"


def test_a_name_alone_is_a_leak_where_either_picture_is_not_at_hand():
    picture, other = encoded(natural(1)), encoded(natural(2))
    assert leaks("a.png", picture, against(a__jpg=None)) == [Match("a.png", "a.jpg", "name", None)]
    assert leaks("a.png", b"", against(a__jpg=other)) == [Match("a.png", "a.jpg", "name", None)]


def test_one_name_for_two_pictures_is_no_leak_where_both_are_at_hand():
    assert leaks("a.png", encoded(natural(1)), against(a__jpg=encoded(natural(2)))) == []


def test_one_name_for_one_picture_is_found_by_both():
    picture = encoded(natural(1))
    assert leaks("x/a.png", picture, against(a__jpg=picture)) == [Match("x/a.png", "a.jpg", "name and look", 0)]


def test_another_name_is_found_by_its_look_alone():
    picture = encoded(natural(1))
    assert leaks("x.png", picture, against(a__jpg=picture)) == [Match("x.png", "a.jpg", "look", 0)]


def test_every_likeness_is_told():
    picture = encoded(natural(1))
    known = against(a__jpg=picture, b__png=picture, c__png=encoded(natural(2)), a__gif=None)
    found = leaks("a.png", picture, known)
    assert {(leak.evaluation, leak.how) for leak in found} == {
        ("a.jpg", "name and look"),
        ("b.png", "look"),
    }  # and not a.gif: what a picture of that name looks like decides


# Looks.

CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "half the size": lambda image: encoded(image.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS)),
    "twice the size": lambda image: encoded(image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)),
    "another shape": lambda image: encoded(image.resize((SIDE + 40, SIDE - 30), Image.Resampling.BILINEAR)),
    "recompressed": lambda image: encoded(image, "JPEG", quality=40),
    "recompressed twice": lambda image: encoded(
        Image.open(io.BytesIO(encoded(image, "JPEG", quality=60))), "JPEG", quality=50
    ),
    "webp": lambda image: encoded(image, "WEBP", quality=60),
    "gif": lambda image: encoded(image, "GIF"),
    "bmp": lambda image: encoded(image, "BMP"),
    "grey": lambda image: encoded(image.convert("L")),
    "with transparency": lambda image: encoded(image.convert("RGBA")),
    "a little brighter": lambda image: encoded(image.point(lambda value: min(255, value + 12))),
    "small and poor": lambda image: encoded(image.resize((64, 64)), "JPEG", quality=30),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("seed", range(4))
def test_a_changed_copy_is_found(change, seed):
    known = against(eval__jpg=encoded(natural(seed)), other__jpg=encoded(natural(90)))
    found = leaks("train.png", change(natural(seed)), known)
    assert [(leak.evaluation, leak.how) for leak in found] == [("eval.jpg", "look")]
    assert found[0].distance is not None
    assert found[0].distance <= 4


def test_different_pictures_do_not_look_alike():
    looks = [image_hash(encoded(natural(seed)), "x") for seed in range(24)]
    hashes = np.asarray([one.bits for one in looks], np.uint64)
    apart = [distances(int(one), np.delete(hashes, number)).min() for number, one in enumerate(hashes)]
    assert min(apart) > 8
    known = Evaluation({f"{number}.png": one for number, one in enumerate(looks[:12])})
    pictures = [(f"t{seed}.png", encoded(natural(seed))) for seed in range(12, 24)]
    assert list(find(pictures, known, distance=4, threads=2)) == []


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_distances_count_the_bits_that_differ(one, others):
    wanted = [bin(one ^ other).count("1") for other in others]
    assert distances(one, np.asarray(others, np.uint64)).tolist() == wanted


GREY = np.full((8, 8, 3), 100, np.int16)


@pytest.mark.parametrize(("more", "alike"), [(0, True), (COLOURS, True), (COLOURS + 1, False), (-COLOURS - 1, False)])
def test_looks_of_other_colours_are_others(more, alike):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reverie_jax.data.contamination.look", lambda encoded, name: ImageHash(7, GREY))
        found = leaks("t.png", b"x", Evaluation({"e.png": ImageHash(7, (GREY + more).astype(np.int16))}))
    assert bool(found) == alike


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=8), st.integers(0, 8))
def test_the_distance_is_the_last_that_counts(own, flipped, distance):
    other = own ^ sum(1 << bit for bit in flipped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reverie_jax.data.contamination.look", lambda encoded, name: ImageHash(own, GREY))
        found = leaks("t.png", b"x", Evaluation({"e.png": ImageHash(other, GREY)}), distance)
    assert found == ([Match("t.png", "e.png", "look", len(flipped))] if len(flipped) <= distance else [])


def test_distance_zero_finds_only_the_same_look():
    picture, known = natural(3), against(e__png=encoded(natural(3)))
    assert leaks("t.bmp", encoded(picture, "BMP"), known, 0) == [Match("t.bmp", "e.png", "look", 0)]
    squeezed = next(
        one
        for one in (
            encoded(picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)))
            for angle in np.linspace(0.2, 3, 20).tolist()
        )
        if image_hash(one, "x").bits != image_hash(encoded(picture), "x").bits
    )
    assert leaks("t.png", squeezed, known, 0) == []
    assert leaks("t.png", squeezed, known, 63)


def test_pictures_of_different_single_colours_are_no_leak():
    assert leaks("red.png", png((255, 0, 0)), against(blue__png=png((0, 0, 255)))) == []


def test_black_and_white_are_no_leak():
    assert leaks("black.png", png((0, 0, 0)), against(white__png=png((255, 255, 255)))) == []


def test_a_flat_picture_looks_like_no_natural_one():
    known = Evaluation({str(n): image_hash(encoded(natural(n)), "x") for n in range(10)})
    assert leaks("flat.png", png(), known) == []


def test_a_broken_training_picture_is_one_line():
    with pytest.raises(BrokenImage) as error:
        leaks("t.png", png()[:40], against(e__png=png()))
    assert str(error.value).startswith("t.png: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_leaks_come_in_the_order_of_the_pictures(threads):
    known = Evaluation({f"{n}.jpg": None for n in range(200)})
    found = list(find([(f"{n}.png", b"") for n in range(199, -1, -1)], known, distance=4, threads=threads))
    assert [leak.training for leak in found] == [f"{n}.png" for n in range(199, -1, -1)]


def test_pictures_are_taken_one_by_one():
    """A training set does not fit into memory: few pictures wait at a time."""
    ahead, taken = [0], [0]

    def pictures():
        for number in range(300):
            taken[0] += 1
            ahead[0] = max(ahead[0], taken[0] - number)
            yield f"{number}.png", b""

    found = find(pictures(), Evaluation({f"{n}.jpg": None for n in range(300)}), distance=4, threads=2)
    first = next(found)
    assert first.training == "0.png"
    assert taken[0] <= 17
    assert len(list(found)) == 299


# Evaluation pictures.


def place(path: Path, **pictures: bytes) -> Path:
    for name, content in pictures.items():
        file = path / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def test_pictures_of_a_folder_are_found_at_any_depth(tmp_path):
    place(tmp_path / "e" / "deep", a__png=png(), b__JPG=encoded(natural(1), "JPEG"))
    place(tmp_path / "e", c__webp=encoded(natural(2), "WEBP"), notes__txt=b"no picture", data__json=b"{}")
    found = evaluation([tmp_path / "e"], 2)
    values = {Path(name).name: value for name, value in found.looks.items()}
    assert set(values) == {"a.png", "b.JPG", "c.webp"}
    assert values["a.png"].bits == image_hash(png(), "x").bits
    assert found.unreadable == []


def test_an_unreadable_file_is_named_and_the_others_are_compared(tmp_path):
    place(tmp_path / "e", good__png=png(), cut__png=png()[:40], text__jpg=b"hello", empty__gif=b"")
    (tmp_path / "e" / "folder.png").mkdir()
    found = evaluation([tmp_path / "e"], 2)
    assert [Path(name).name for name in found.looks] == ["good.png"]
    assert len(found.unreadable) == 4
    for name in ("cut.png", "text.jpg", "empty.gif", "folder.png"):
        assert sum(str(tmp_path / "e" / name) in why for why in found.unreadable) == 1
    assert not any("\n" in why for why in found.unreadable)


def test_a_place_without_a_picture_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", place(tmp_path / "e", cut__png=png()[:40])):
        with pytest.raises(DataError, match="no picture"):
            evaluation([path], 2)
    with pytest.raises(DataError, match="nowhere"):
        evaluation([tmp_path / "nowhere"], 2)


ROWS: list[dict[str, Any]] = [
    {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a snowboard?", "label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000000001.jpg", "text": "Ist da\u2028ein Törtchen?", "label": "no"},
    {"question_id": 3, "image": "COCO_val2014_000000000002.jpg", "text": "茶?", "label": "no"},
]
NAMED = {"COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"}
LINES = "\n".join(json.dumps(row) for row in ROWS)
QUESTION_FILES = {
    "list": ("q.json", json.dumps(ROWS)),
    "indented list": ("q.json", json.dumps(ROWS, indent=4)),
    "by id": ("q.json", json.dumps({str(row["question_id"]): row for row in ROWS})),
    "lines": ("q.jsonl", LINES),
    "lines that end": ("q.jsonl", LINES + "\n\n"),
    "lines in a .json file": ("pope.json", LINES + "\n"),
    "windows lines": ("pope.json", LINES.replace("\n", "\r\n")),
    "names": ("q.json", json.dumps(sorted(NAMED))),
    "image_id": ("q.jsonl", "\n".join(json.dumps({"image_id": row["image"]}) for row in ROWS)),
}


@pytest.mark.parametrize(("name", "text"), QUESTION_FILES.values(), ids=QUESTION_FILES)
def test_question_files_of_every_form_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    assert evaluation([tmp_path / name], 1).looks == dict.fromkeys(NAMED)


def test_lines_that_are_not_escaped_are_read(tmp_path):
    """U+2028 ends a line for `str.splitlines`, and not for JSON."""
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "q.jsonl").write_text(text, "utf-8")
    assert set(evaluation([tmp_path / "q.jsonl"], 1).looks) == NAMED


def test_lines_that_are_not_escaped_are_read_in_a_json_file(tmp_path):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "pope.json").write_text(text, "utf-8")
    assert set(evaluation([tmp_path / "pope.json"], 1).looks) == NAMED


def test_lines_with_an_object_in_them_are_read_in_a_json_file(tmp_path):
    lines = [json.dumps({"meta": {"source": "coco"}, **row}) for row in ROWS]
    (tmp_path / "pope.json").write_text("\n".join(lines))
    assert set(evaluation([tmp_path / "pope.json"], 1).looks) == NAMED


@pytest.mark.parametrize("text", ["{", "[1, ", "not json", '{"image": "a.jpg"}\n{"image": ', ""], ids=repr)
@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_file_that_is_none_is_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        evaluation([tmp_path / name], 1)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_coco_number_is_a_coco_name(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"image_id": 123456}]))
    known = evaluation([tmp_path / "q.json"], 1)
    assert leaks(f"COCO_val2014_{NUMBER}.jpg", b"", known)


def test_two_folders_may_have_pictures_of_one_name(tmp_path):
    first = place(tmp_path / "mme", a__png=encoded(natural(1)), x__png=encoded(natural(3)))
    second = place(tmp_path / "pope", a__png=encoded(natural(2)), y__png=encoded(natural(4)))
    known = evaluation([first, second], 2)
    for seed in (1, 2):
        assert leaks(f"t{seed}.png", encoded(natural(seed)), known), seed


def test_several_question_files_may_name_the_same_pictures(tmp_path):
    """As POPE's three files do."""
    for split in ("random", "popular", "adversarial"):
        (tmp_path / f"{split}.json").write_text(LINES)
    places = [tmp_path / f"{split}.json" for split in ("random", "popular", "adversarial")]
    assert set(evaluation(places, 1).looks) == NAMED


def test_a_place_may_be_named_twice(tmp_path):
    folder = place(tmp_path / "val", a__png=encoded(natural(1)))
    assert leaks("t.png", encoded(natural(1)), evaluation([folder, folder], 1))


def test_a_folder_and_the_questions_about_it_go_together(tmp_path):
    """The names of the questions are those of the folder's pictures: both pictures are at hand, and differ."""
    name = "COCO_val2014_000000000001.jpg"
    folder = place(tmp_path / "val", **{name.replace(".", "__"): encoded(natural(1))})
    (tmp_path / "pope.json").write_text(LINES)
    known = evaluation([folder, tmp_path / "pope.json"], 1)
    assert leaks(name, encoded(natural(2)), known) == []


# The command.


@dataclasses.dataclass
class World:
    """Three training pictures: one is an evaluation picture by look, one by name, one is neither."""

    rows: Path
    folder: Path
    records: Path
    out: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    path = tmp_path_factory.mktemp("leak")
    training = {"seen.png": natural(1), f"coco/train2017/{NUMBER}.png": natural(2), "other.png": natural(3)}
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]
    for name, image in training.items():
        file = path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))
    rows = [{"id": name, "image": name, "conversations": said} for name in training]
    rows.append({"id": "text", "conversations": said})
    (path / "rows.json").write_text(json.dumps(rows))
    place(path / "eval", unseen__jpg=encoded(natural(1), "JPEG", quality=60), other__png=encoded(natural(9)))
    (path / "questions.jsonl").write_text(json.dumps({"image": f"COCO_val2014_{NUMBER}.jpg"}))
    return World(path / "rows.json", path / "eval", path / "built", path / "found.jsonl")


def run(capsys: pytest.CaptureFixture[str], command: Command) -> tuple[int, str, str]:
    """(exit code, what it prints, what it prints as errors)"""
    code: Any = 0
    try:
        command.run()
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    return code, said.out, said.err


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_command_names_what_it_finds_and_ends_with_one(world, capsys):
    both = (world.folder, world.rows.parent / "questions.jsonl")
    code, out, _ = run(capsys, Command((str(world.rows),), both, details=world.out))
    assert code == 1
    assert "2 of 4 records show one of 3 evaluation pictures" in out
    found = {row["training"]: row for row in written(world.out)}
    assert set(found) == {"seen.png", f"coco/train2017/{NUMBER}.png"}
    image_hash, name = found["seen.png"], found[f"coco/train2017/{NUMBER}.png"]
    assert (Path(image_hash["evaluation"]).name, image_hash["how"]) == ("unseen.jpg", "look")
    assert 0 <= image_hash["distance"] <= 4
    assert (name["evaluation"], name["how"], name["distance"]) == (f"COCO_val2014_{NUMBER}.jpg", "name", None)


def test_the_command_ends_with_zero_where_there_is_none(world, capsys, tmp_path):
    clean = place(tmp_path / "clean", a__png=encoded(natural(40)), other__png=encoded(natural(41)))
    out = tmp_path / "none.jsonl"
    code, said, _ = run(capsys, Command((str(world.rows),), (clean,), details=out))
    assert code == 0
    assert "0 of 4 records show one of 2 evaluation pictures" in said
    assert out.read_text() == ""


def test_records_are_compared_as_their_annotation_files_are(world, capsys):
    from reverie_jax.data.mixture import MixtureEntry, mixture
    from reverie_jax.data.sources import ReadLog

    with mixture([MixtureEntry(file=world.rows)], ReadLog()) as found:
        write_records(world.records, {"train": found})
    sources = (str(world.records), str(world.rows))
    results = []
    for source in sources:
        assert run(capsys, Command((source,), (world.folder,), details=world.out))[0] == 1
        results.append(written(world.out))
    assert results[0] == results[1]
    assert len(results[0]) == 1


def test_the_command_says_what_it_could_not_compare(world, capsys, tmp_path):
    folder = place(tmp_path / "e", good__png=encoded(natural(50)), cut__png=png()[:40])
    code, out, err = run(capsys, Command((str(world.rows),), (folder,)))
    assert code == 0
    assert "of 1 evaluation pictures" in out
    assert [line for line in err.splitlines() if str(folder / "cut.png") in line]
    assert len(err.splitlines()) == 1


def test_the_distance_of_the_command_is_kept(world, capsys, tmp_path):
    far = place(tmp_path / "e", far__png=encoded(natural(1).rotate(4, Image.Resampling.BICUBIC)))
    bits = distances(
        image_hash(encoded(natural(1)), "x").bits,
        np.asarray([image_hash((far / "far.png").read_bytes(), "x").bits], np.uint64),
    ).item()
    assert bits > 0
    assert run(capsys, Command((str(world.rows),), (far,), distance=bits))[0] == 1
    assert run(capsys, Command((str(world.rows),), (far,), distance=bits - 1))[0] == 0


def test_more_than_twenty_leaks_are_counted(tmp_path, capsys):
    write_records(tmp_path / "records", {"train": records(23)})
    (tmp_path / "q.json").write_text(json.dumps([f"r{n}.jpg" for n in range(22)]))
    code, out, _ = run(
        capsys, Command((str(tmp_path / "records"),), (tmp_path / "q.json",), details=tmp_path / "o.jsonl")
    )
    assert code == 1
    assert "22 of 23 records" in out
    assert "2 more" in out
    assert [row["training"] for row in written(tmp_path / "o.jsonl")] == [f"r{n}" for n in range(22)]


def test_files_and_records_do_not_mix(world, tmp_path):
    write_records(tmp_path / "records", {"train": records(1)})
    with pytest.raises(UserError, match="not both"):
        Command((str(tmp_path / "records"), str(world.rows)), (world.folder,)).run()


def test_no_source_is_no_success(world):
    with pytest.raises(UserError):
        Command((), (world.folder,)).run()


def test_offenders_that_cannot_be_written_are_one_line(world, tmp_path):
    with pytest.raises((UserError, SystemExit)):
        Command((str(world.rows),), (world.folder,), details=tmp_path / "no" / "such" / "folder.jsonl").run()


def test_the_command_line_gives_the_exit_codes(world, tmp_path):
    command = [sys.executable, "-m", "reverie_jax.cli", "data", "contamination", str(world.rows), "--eval-images"]
    running = [
        subprocess.Popen([*command, str(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for place in (world.folder, tmp_path / "nowhere")
    ]
    (out, err), (no_out, no_err) = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [1, 2]
    assert ("1 of 4 records" in out, err) == (True, "")
    assert (no_out, no_err) == ("", f"reverie: error: {tmp_path / 'nowhere'}: no such file\n")
