"""`--engine beam`: whatever the number of workers, every byte that a command prints and writes is the local engine's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
from PIL import Image

pytest.importorskip("apache_beam")

from reverie_jax.data import records as records_module
from reverie_jax.data.reflection import WHY_WRONG
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.marks import row_digest
from tests.data.fakes import STORED_IMAGE, llava_row, png, saved, write_json_rows, write_parquet
from tests.hosted.fixtures import reverie

__all__ = ["reverie"]

# Apache Beam's own warnings, and files that its servers leave open.
pytestmark = pytest.mark.filterwarnings("default")
Reverie = Callable[..., tuple[int, str, str]]


class World(NamedTuple):
    """Annotation files and images that try every rule of the order of records, and what each command says of them."""

    folder: Path
    expected: dict[str, Any]

    def sources(self) -> list[str]:
        others = self.folder / "others"
        return [f"{self.folder / 'one.json'}", f"{others / 'two.json'}={others}", f"{self.folder / 'pairs.parquet'}"]

    def words(self, command: str, out: Path) -> list[Any]:
        """The words of a command that writes to a folder."""
        folder, details = self.folder, ["--details", out / "details.jsonl"]
        match command.split():
            case ["build", *seed]:
                marks = ["--marks", folder / "marks.jsonl"] if seed == ["0"] else []
                options = ["--mixture", folder / "mixture.json", "--max-side", 20, "--seed", *(seed or [3])]
                return ["build", "--out", out / "records", *options, *marks]
            case ["stats", *of]:
                return ["stats", *((of and [folder / "records"]) or self.sources()), "--json"]
            case ["check"]:
                fixed = ["--fix", out / "fixed.json"]
                return ["check", folder / "broken.json", "--images", folder / "images", *details, *fixed]
            case ["check", "texts"]:
                return ["check", folder / "others" / "two.json", *details]
            case ["check", file]:
                return ["check", folder / file, *details]
            case ["contamination", *of]:
                sources = (of and [folder / "records"]) or self.sources()
                evaluation = [folder / name for name in ("others", "eval", "named.json")]
                return ["contamination", *sources, "--eval-images", *evaluation, *details]
        raise ValueError(command)

    def run(self, reverie: Reverie, command: str, out: Path, *more: Any) -> tuple[int, str, list[str], dict]:
        """Run a command; return its exit code, what it prints, its notes (in no order) and the files that it writes."""
        out.mkdir(exist_ok=True)
        code, printed, err = reverie("data", *self.words(command, out), *more)
        written = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
        return code, printed.replace(str(out), ""), err.splitlines(), written

    def local(self, reverie: Reverie, command: str) -> Any:
        """What the local engine gives."""
        if command not in self.expected:
            self.expected[command] = self.run(reverie, command, self.folder / command.replace(" ", "-"))
        return self.expected[command]


def reflective(image: str, number: int, wrong: str = "") -> dict[str, Any]:
    why = WHY_WRONG.format(answer=wrong) if wrong else "Explain why."
    return llava_row(image, f"<image>\nIs it {number}?", "Yes", why, f"It is {'so ' * (number % 4)}plain.")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    for name, color in {"a": (1, 0, 0), "b": (0, 200, 0), "c": (0, 0, 90), "deep/d": (7, 7, 7)}.items():
        file = folder / "images" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(color, (40, 30)))
    (folder / "images" / "really.png").write_bytes(saved(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG"))
    rng = random.Random(0)
    # An image under two names; a second one of the same name; rows without images; caps that drop the first mention.
    one = [reflective(rng.choice(["a.png", "d.png", "deep/d.png", "b.png"]), n % 9, "No" * (n % 2)) for n in range(30)]
    one += [llava_row(None, f"Text {n}?", "Yes.", odd=1) for n in range(9)]
    rng.shuffle(one)
    write_json_rows(folder / "one.json", one)
    (folder / "others").mkdir()
    (folder / "others" / "a.png").write_bytes(png((0, 0, 91)))
    write_json_rows(
        folder / "others" / "two.json",
        [llava_row("a.png", odd=2), llava_row("a.png"), llava_row(None), llava_row(None)],
    )
    pairs = [
        {
            "question": f"What is {n}?",
            "chosen": "This.",
            "rejected": f"That {n}.",
            "image": {"bytes": png((n // 2, 5, 5)), "path": "same.png"},
        }
        for n in range(8)
    ]
    schema = pyarrow.schema([("image", STORED_IMAGE), *((key, pyarrow.string()) for key in list(pairs[0])[:3])])
    write_parquet(folder / "pairs.parquet", pairs, schema)
    write_json_rows(folder / "many.jsonl", [llava_row(None, f"Is it {n}?", "No.") for n in range(2100)])
    mixture = [
        {"file": "one.json", "cap": 20, "weight": 0.5},
        {"file": "others/two.json", "images": "others"},
        {"file": "pairs.parquet", "cap": 7},
        {"file": "many.jsonl", "cap": 2090},
        {"file": "one.json", "cap": 5},
    ]
    write_json_rows(folder / "mixture.json", mixture)
    bad, edited = (row_digest(row) for row in list(Rows(folder / "one.json"))[:2])
    marks = [
        {"row": bad, "reviewer": "r", "mark": "bad"},
        {"row": edited, "reviewer": "r", "edits": {"conversations/1/value": "Perhaps."}},
        {"row": "0" * 32, "reviewer": "r", "mark": "bad", "where": "lost"},
    ]
    write_json_rows(folder / "marks.jsonl", marks)
    broken = [*one, one[3], {"conversations": "none"}, llava_row("gone.png"), llava_row("really.png"), llava_row("")]
    write_json_rows(folder / "broken.json", broken)
    (folder / "eval").mkdir()
    (folder / "eval" / "renamed.png").write_bytes(png((0, 200, 0), (40, 30)))
    write_json_rows(folder / "named.json", [{"image": "b.png"}, {"image": "same.png"}])
    return World(folder, {})


@pytest.fixture
def stored(world, reverie) -> None:
    """Records of the world."""
    if not (world.folder / "records").exists():
        assert reverie("data", "build", *world.sources(), "--out", world.folder / "records")[0] == 0


WORKERS = ("build", "stats", "check", "contamination")
ALONE = (
    "build 0",
    "build 1",
    "build 2",
    "stats records",
    "check pairs.parquet",
    "check texts",
    "contamination records",
)


@pytest.mark.parametrize(
    ("command", "workers"), [*((c, n) for n in (1, 2, 4) for c in WORKERS), *((command, 1) for command in ALONE)]
)
def test_beam_gives_what_the_local_engine_gives(reverie, world, stored, tmp_path, command, workers):
    local = world.local(reverie, command)
    found = world.run(reverie, command, tmp_path, "--engine", "beam", "--beam", f"direct_num_workers={workers}")
    assert found == local
    assert local[0] == int(command.startswith("contamination"))
    if command == "build":
        assert sum("array_record-" in name for name in local[3]) == 3


def test_the_world_has_what_it_tries(reverie, world, stored):
    """Caps split pairs and hide names, two images share a name, and each command finds something."""
    problems = [json.loads(line)["kind"] for line in world.local(reverie, "check")[3]["details.jsonl"].splitlines()]
    assert {"invalid row", "missing image", "mislabeled image", "duplicate"} <= {*problems}
    matches = world.local(reverie, "contamination")[3]["details.jsonl"].decode()
    assert all(f'"{kind}"' in matches for kind in ("name", "hash"))
    ids = [record.id for record in records_module.RecordSource(world.folder / "records")]
    assert len({*ids}) == len(ids)
    assert any(id.startswith("embedded ") for id in ids)
    assert str(world.folder / "others" / "a.png") in ids


# What is wrong with data.

DROPPED = dict.fromkeys(
    ("image", "question", "correct_answer", "confusing_answer", "correct_rationale", "incorrect_rationale"), "x"
)
BROKEN: dict[str, dict[str, Any]] = {
    "an invalid row": {"one.json": [llava_row(None), {"conversations": 1}]},
    "a missing image": {"one.json": [llava_row("a.png"), llava_row("gone.png")]},
    "the first of two files": {"one.json": [{"conversations": 1}], "two.json": [llava_row("gone.png")]},
    "the other file": {"one.json": [llava_row("a.png")], "two.json": [llava_row("gone.png"), {"conversations": 1}]},
    "a broken image": {"one.json": [llava_row("a.png"), llava_row("cut.png"), llava_row("words.png")]},
    "no known format": {"one.json": [{"x": 1}]},
    "no conversation": {"one.json": [DROPPED]},
    "no file": {"one.json": None},
}


FINE = {("stats", "a broken image"), ("stats", "no conversation"), ("contamination", "no conversation")}


@pytest.mark.parametrize("command", ["build", "stats", "contamination"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_the_same_line(reverie, tmp_path, case, command):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "images" / "cut.png").write_bytes(png(size=(60, 60))[:60])
    (tmp_path / "images" / "words.png").write_text("no image")
    for name, rows in BROKEN[case].items():
        if rows is not None:
            write_json_rows(tmp_path / name, rows)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "z.png").write_bytes(png((9, 99, 9)))
    more = {"build": ["--out", tmp_path / "out"], "contamination": ["--eval-images", tmp_path / "eval"], "stats": []}
    words = ["data", command, *(tmp_path / name for name in BROKEN[case]), *more[command]]
    local = reverie(*words)
    assert reverie(*words, "--engine", "beam") == local
    assert local[0] == 2 or (command, case) in FINE
    assert not (tmp_path / "out").exists()


# Workers that fail.


def test_a_failed_run_is_one_line_and_the_next_one_finishes(reverie, world, tmp_path, monkeypatch):
    """The writer of the second shard fails once, half-way: the shards that were finished are not written again."""
    closed: list[str] = []

    class Writer(records_module.ArrayRecordWriter):
        def __init__(self, path: str, *options: Any):
            super().__init__(path, *options)
            self.path = path

        def close(self) -> None:
            super().close()
            closed.append(self.path)
            if len(closed) == 2:
                raise RuntimeError("the worker died")

    local = world.local(reverie, "build")
    monkeypatch.setattr(records_module, "ArrayRecordWriter", Writer)
    words = ["data", *world.words("build", tmp_path), "--engine", "beam"]
    code, out, err = reverie(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the worker died" in err
    work = tmp_path / ".records.building"
    assert not (tmp_path / "records").exists()
    assert [file.suffix for file in work.iterdir() if file.name != "lock"] == [".shard"]
    kept = len(closed)
    assert world.run(reverie, "build", tmp_path, "--engine", "beam") == local
    assert len(closed) == kept + 2
    assert not work.exists()


# Options.


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("stats one.json --engine spark", "--engine spark"),
        ("stats one.json --beam direct_num_workers=2", "--beam"),
        ("stats one.json --engine beam --beam direct_num_workers=two", "direct_num_workers"),
        ("stats one.json --engine beam --beam direct_workers=2", "direct_workers"),
        ("stats one.json --engine beam --beam direct_num_workers=-1", "direct_num_workers"),
        ("stats one.json --engine beam --beam runner=NoSuchRunner", "NoSuchRunner"),
        ("stats one.json --engine beam --beam runner=FlinkRunner", "temp_location"),
        ("stats one.json --engine beam --beam temp_location=no/such/folder", "no/such/folder"),
        ("build one.json --out out --engine beam --jobs 2", "--jobs"),
        ("check one.json --engine beam --model scenes-base", "--model"),
        ("check one.json --engine beam --recipe scenes-sft", "--recipe"),
        ("check one.json --engine beam --set length=9", "--set"),
    ],
)
def test_options_that_cannot_be_kept_are_named(reverie, world, monkeypatch, words, named):
    monkeypatch.chdir(world.folder)
    code, out, err = reverie("data", *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err
