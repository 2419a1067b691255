"""`reverie data build`: everything arrives once, whatever stops it on the way, and what is there already stays readable."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reverie_jax.cli.data_options import Build

from reverie_jax.data import records as records_module
from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.images import encode_png
from reverie_jax.data.mixture import MixtureEntry, mixture
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import records

SHARD = 3
"""Records of a shard in these tests."""
JudgeReply = tuple[str, str, str, str]
Held = dict[str, tuple[bytes, list[JudgeReply]]]
"""By name: the picture, and what is said of it; or, of one without a picture, by what is said."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(records_module, "SHARD", SHARD)


def picture(number: int, side: int = 8) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))


def as_long_as(other: bytes) -> bytes:
    """Another picture of the same number of bytes."""
    return next(one for number in range(500, 5000) if len(one := picture(number)) == len(other))


def row(image: str, *said: str) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]
    return {"id": image, "image": image, "conversations": turns} if image else {"conversations": turns}


@dataclasses.dataclass
class World:
    """Two annotation files and their pictures; some pictures are in both, some rows show nothing."""

    folder: Path
    side: int = 8

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / "one.json", self.folder / "two.json"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def hidden(self) -> Path:
        return self.folder / ".out.building"

    def picture(self, number: int) -> Path:
        return self.folder / "images" / f"{number:03d}.png"

    def make(self, count: int, *, silent: int = 2) -> World:
        (self.folder / "images").mkdir(parents=True)
        rng = random.Random(count)
        rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for number in range(count):
            self.picture(number).write_bytes(picture(number, self.side))
            for question in range(rng.randint(1, 3)):
                rows[0].append(
                    row(f"{number:03d}.png", f"<image>\nq{number} {question}?", f"a{number} \u2028ü{question}")
                )
            if number % 3 == 0:
                rows[1].append(row(f"{number:03d}.png", f"<image>\nother {number}?", "茶"))
        rows[1].extend(row("", f"silent {number}?", "yes", "why?", "so") for number in range(silent))
        rng.shuffle(rows[0])
        for file, part in zip(self.files, rows, strict=True):
            file.write_text(json.dumps(part))
        return self

    def rows(self) -> list[dict[str, Any]]:
        return [one for file in self.files for one in json.loads(file.read_text())]

    def change(self, number: int, text: str) -> None:
        """Gives the first row of a picture another answer."""
        rows = json.loads(self.files[0].read_text())
        next(one for one in rows if one.get("image") == f"{number:03d}.png")["conversations"][1]["value"] = text
        self.files[0].write_text(json.dumps(rows))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(f"{file}={self.folder / 'pictures'}" for file in self.files)

    def build(self, **options: Any) -> None:
        Build(self.sources, self.out, **options).run()

    def wanted(self) -> Held:
        """What the annotation files hold, read by hand."""
        found: Held = {}
        for one in self.rows():
            said = tuple(turn["value"] for turn in one["conversations"])
            name = one.get("image", "")
            encoded = (self.folder / "images" / name).read_bytes() if name else b""
            found.setdefault(name or " | ".join(said), (encoded, []))[1].append((*said, "", "")[:4])
        return {name: (encoded, sorted(talks)) for name, (encoded, talks) in found.items()}


def held(source: RecordSource) -> Held:
    """What records hold; each name once."""
    found: Held = {}
    for index in range(len(source)):
        record = source[index]
        said = [tuple(turn.text for turn in talk.turns) for talk in record.conversations]
        name = record.id if record.image else " | ".join(said[0])
        assert name not in found
        found[name] = (record.image, sorted((*one, "", "")[:4] for one in said))
    return found


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.array_record-*"))


def contents(folder: Path) -> list[tuple[str, bytes]]:
    return [(file.name, file.read_bytes()) for file in sorted(folder.glob("**/*")) if file.is_file()]


def finished(world: World) -> dict[str, tuple[int, int]]:
    """Shards that an earlier run has made: by name, inode and time."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in world.hidden.glob("*.shard")}


def kept(world: World, before: dict[str, tuple[int, int]]) -> int:
    """How many of the shards of an earlier run are those of the records."""
    now = {(file.stat().st_ino, file.stat().st_mtime_ns) for file in shards(world.out)}
    return len(now & set(before.values()))


def beside(world: World) -> list[str]:
    """What a run left beside its records."""
    return sorted(file.name for file in world.folder.iterdir() if file.name.startswith("."))


# Everything arrives.


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 13])
def test_every_conversation_and_every_byte_arrives_once(tmp_path, capsys, count, jobs):
    world = World(tmp_path / "w").make(count)
    world.build(jobs=jobs)
    source = RecordSource(world.out)
    assert held(source) == world.wanted()
    assert len(source) == count + 2
    assert len(shards(world.out)) == -(-(count + 2) // SHARD)
    assert beside(world) == []
    said = capsys.readouterr()
    assert said.out.startswith(f"{count + 2} images, {len(world.rows())} conversations: {world.out}")
    assert said.err == ""


@pytest.mark.parametrize("jobs", [2, 3, 16, None])
def test_jobs_change_no_byte(tmp_path, jobs):
    world = World(tmp_path / "w").make(14)
    world.build(jobs=1)
    one = contents(world.out)
    assert len(one) == 6 + 2
    shutil.rmtree(world.out)
    world.build(jobs=jobs)
    assert contents(world.out) == one


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 11), st.integers(1, 12), st.integers(1, 4))
def test_records_of_any_number_come_back_in_their_order(tmp_path_factory, count, size, jobs):
    folder, found = tmp_path_factory.mktemp("any"), records(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "SHARD", size)
        told: list[int] = []
        source = RecordSource(write_records(folder, {"train": found}, jobs=jobs, on_progress=told.append))
    assert list(source) == found
    assert sum(told) == count
    assert told[:-1] == [size] * (len(told) - 1)


def test_tfds_reads_what_was_built(tmp_path):
    world = World(tmp_path / "w").make(7)
    world.build()
    (folder,) = {file.parent for file in shards(world.out)}
    source = tfds.builder_from_directory(str(folder)).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    found = {
        one["id"].decode(): (one["image"], len(json.loads(one["conversations"])))
        for one in (source[index] for index in range(len(source)))
    }
    wanted = {name: (encoded, len(talks)) for name, (encoded, talks) in world.wanted().items() if encoded}
    assert {name: one for name, one in found.items() if one[0]} == wanted
    assert len(found) == 9
    decoded = tfds.builder_from_directory(str(folder)).as_data_source("train")
    assert all(decoded[n]["image"].shape == (8, 8, 3) for n in range(len(decoded)) if source[n]["image"])


def test_new_records_take_the_place_of_old_ones(tmp_path):
    world = World(tmp_path / "w").make(8)
    world.build()
    old = held(RecordSource(world.out))
    world.change(3, "another answer")
    world.picture(4).write_bytes(picture(99))
    for file in world.files:
        file.write_text(json.dumps([one for one in json.loads(file.read_text()) if one.get("image") != "007.png"]))
    world.build()
    new = held(RecordSource(world.out))
    assert new == world.wanted() != old
    assert "007.png" not in new
    assert len(shards(world.out)) == 3
    assert beside(world) == []


def test_two_files_of_one_name_keep_their_own_talk(tmp_path):
    rows = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(picture(ord(folder)))
        (tmp_path / f"{folder}.json").write_text(json.dumps([row("x.png", f"<image>\n{folder}?", "yes")]))
        rows.append(f"{tmp_path / folder}.json={tmp_path / folder}")
    Build(tuple(rows), tmp_path / "out").run()
    one, other = RecordSource(tmp_path / "out")
    assert [record.conversations[0].turns[0].text for record in (one, other)] == ["<image>\na?", "<image>\nb?"]
    assert [record.image for record in (one, other)] == [picture(ord("a")), picture(ord("b"))]
    assert one.id == "x.png" != other.id


def test_a_picture_alone_in_its_name_is_called_by_it(tmp_path):
    parts = []
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        rows = [row(name, "<image>\nWhat?", f"{name} {n}") for name in ("x.png", f"{folder}.png") for n in range(1)]
        for one in rows:
            (tmp_path / folder / one["image"]).write_bytes(picture(number))
        (tmp_path / f"{folder}.json").write_text(json.dumps(rows))
        parts.append(tmp_path / f"{folder}.json")
    for seed in range(20):  # until the cap takes x.png of the first part away
        caps = [
            MixtureEntry(file=parts[0], pictures=tmp_path / "a", cap=1),
            MixtureEntry(file=parts[1], pictures=tmp_path / "b"),
        ]
        with mixture(caps, ReadLog(), seed=seed) as found:
            ids = [record.id for record in found]
        if ids[0] == "a.png":
            assert ids == ["a.png", "x.png", "b.png"]
            return
    pytest.fail("no seed leaves the other row")


# What stops a run in the same process.


class Stop(Exception):
    """A run ends here, as if someone had pulled the plug."""


@contextlib.contextmanager
def stopped_before_the_end() -> Iterator[None]:
    """All shards are made, and the records are not."""

    def stop(**options: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.folder_dataset, "write_metadata", stop)
        with contextlib.suppress(Stop):
            yield
            pytest.fail("did not stop")


CHANGED: dict[str, tuple[Callable[[World], object], Callable[[World], set[str]]]] = {
    "nothing": (lambda world: None, lambda world: set()),
    "a picture": (lambda world: world.picture(5).write_bytes(picture(77)), lambda world: {"005.png"}),
    "a picture of the same size": (
        lambda world: world.picture(5).write_bytes(as_long_as(world.picture(5).read_bytes())),
        lambda world: {"005.png"},
    ),
    "two pictures": (
        lambda world: [world.picture(number).write_bytes(picture(77)) for number in (1, 9)],
        lambda world: {"001.png", "009.png"},
    ),
    "an answer": (lambda world: world.change(2, "other"), lambda world: {"002.png"}),
}


@pytest.mark.parametrize(("change", "who"), CHANGED.values(), ids=CHANGED)
def test_exactly_the_shards_that_changed_are_made_anew(tmp_path, change, who):
    world = World(tmp_path / "w").make(13)
    with stopped_before_the_end():
        world.build()
    before = finished(world)
    assert len(before) == 5
    change(world)
    world.build(jobs=2)
    source = RecordSource(world.out)
    affected = {index // SHARD for index in range(len(source)) if source[index].id in who(world)}
    assert kept(world, before) == 5 - len(affected)
    for number, file in enumerate(shards(world.out)):
        same = (file.stat().st_ino, file.stat().st_mtime_ns) in before.values()
        assert same == (number not in affected)
    assert held(source) == world.wanted()
    assert beside(world) == []


def test_a_row_added_changes_its_pictures_shard_alone(tmp_path):
    world = World(tmp_path / "w").make(13, silent=0)
    with stopped_before_the_end():
        world.build()
    before = finished(world)
    rows = json.loads(world.files[1].read_text())
    world.files[1].write_text(json.dumps([*rows, row("008.png", "<image>\nnew?", "new")]))
    world.build()
    assert kept(world, before) == 4
    assert held(RecordSource(world.out)) == world.wanted()


def test_a_finished_run_leaves_nothing_to_take_up(tmp_path):
    world = World(tmp_path / "w").make(6)
    world.build()
    inodes = {file.stat().st_ino for file in shards(world.out)}
    held_open = [file.open("rb") for file in shards(world.out)]  # so that no inode is used again
    world.build()
    assert not inodes & {file.stat().st_ino for file in shards(world.out)}
    for file in held_open:
        file.close()


def test_what_an_interrupted_run_left_of_other_rows_does_not_arrive(tmp_path):
    world = World(tmp_path / "w").make(7)
    with stopped_before_the_end():
        world.build()
    for file in world.files:
        file.write_text(json.dumps(json.loads(file.read_text())[:2]))
    world.build()
    assert held(RecordSource(world.out)) == world.wanted()
    assert beside(world) == []


def test_a_bad_picture_leaves_the_old_records_and_one_line(tmp_path, capsys):
    world = World(tmp_path / "w").make(13)
    world.build()
    old = contents(world.out)
    world.change(1, "newer")
    world.picture(6).write_bytes(picture(6)[:50])
    for jobs in (1, 3):
        with pytest.raises(DataError) as error:
            world.build(jobs=jobs)
        assert str(world.picture(6)) in str(error.value)
        assert "\n" not in str(error.value)
        assert contents(world.out) == old
        assert len(RecordSource(world.out)) == 15
        assert not list(world.hidden.glob("*.part"))
        assert not list(world.hidden.glob("**/dataset_info.json"))
    before = finished(world)
    assert before
    world.picture(6).write_bytes(picture(6))
    world.build()
    assert kept(world, before) == len(before)
    assert held(RecordSource(world.out)) == world.wanted()
    assert capsys.readouterr().err == ""


def test_a_picture_that_goes_away_is_one_line(tmp_path):
    world = World(tmp_path / "w").make(4)
    parts = [MixtureEntry(file=file, pictures=tmp_path / "w" / "images") for file in world.files]
    with mixture(parts, ReadLog()) as found:
        world.picture(2).unlink()
        with pytest.raises(DataError) as error:
            write_records(world.out, {"train": found})
    assert str(error.value) == f"{world.picture(2)}: cannot be read (No such file or directory)"
    assert not world.out.exists()


def test_a_folder_of_records_beside_what_a_stopped_run_left_is_read(tmp_path):
    world = World(tmp_path / "w").make(4)
    world.build()
    with stopped_before_the_end():
        world.build()
    assert held(RecordSource(world.out)) == world.wanted()
    assert held(RecordSource(world.folder)) == world.wanted()


def test_hidden_folders_are_not_looked_for_records_in(tmp_path):
    world = World(tmp_path / "w").make(4)
    world.build()

    def stop(path: Any, *more: Any, **options: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module.shutil, "rmtree", stop)  # the last step but one
        with pytest.raises(Stop):
            world.build()
    assert held(RecordSource(world.out)) == world.wanted()
    assert held(RecordSource(world.folder)) == world.wanted()


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_old_records_come_back_where_new_ones_cannot_take_their_place(tmp_path, error):
    world = World(tmp_path / "w").make(4)
    world.build()
    old = contents(world.out)
    world.change(1, "newer")
    move = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target).is_relative_to(world.out):
            raise error
        return move(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises((DataError, KeyboardInterrupt)):
            world.build()
    assert held(RecordSource(world.out))
    assert contents(world.out) == old


@pytest.mark.parametrize("moment", ["half deleted", "deleted"])
def test_at_no_moment_are_there_no_records(tmp_path, monkeypatch, moment):
    world = World(tmp_path / "w").make(9)
    world.build()
    old = held(RecordSource(world.out))
    world.change(1, "newer")
    delete = shutil.rmtree

    def stop(path: Any, *more: Any, **options: Any) -> None:
        if moment == "deleted":
            delete(path, *more, **options)
        else:
            for file in shards(Path(path))[:1]:
                file.unlink()
        raise Stop

    monkeypatch.setattr(records_module.shutil, "rmtree", stop)
    with pytest.raises(Stop):
        world.build()
    assert held(RecordSource(world.out)) in (old, world.wanted())


INTERLEAVED = ("a shard", "metadata", "the old records' end")


@pytest.mark.parametrize("moment", INTERLEAVED)
def test_a_run_within_a_run_fails_at_worst_with_a_line_and_leaves_records(tmp_path, moment):
    world = World(tmp_path / "w").make(9)
    world.build()
    world.change(1, "newer")
    others: list[BaseException | None] = []

    def other() -> None:
        if not others:
            others.append(None)
            try:
                world.build(jobs=1)
            except UserError as error:
                others[0] = error

    write, move = tfds.folder_dataset.write_metadata, Path.rename
    make = records_module._Shards.make

    def writing(**options: Any) -> None:
        write(**options)
        other()

    def moving(self: Path, target: Path) -> Path:
        if self.is_relative_to(world.out):
            other()
        return move(self, target)

    def making(self: Any, start: int) -> Any:
        found = make(self, start)
        if start:
            other()
        return found

    with pytest.MonkeyPatch.context() as patch:
        if moment == "metadata":
            patch.setattr(tfds.folder_dataset, "write_metadata", writing)
        elif moment == "a shard":
            patch.setattr(records_module._Shards, "make", making)
        else:
            patch.setattr(Path, "rename", moving)
        failed: UserError | None = None
        try:
            world.build(jobs=1)
        except UserError as error:
            failed = error
        except (OSError, RuntimeError) as error:
            raise AssertionError("not a line") from error
    assert others
    assert failed is None or others[0] is None
    assert held(RecordSource(world.out)) == world.wanted()


def test_splits_have_shards_of_their_own(tmp_path):
    source = write_records(tmp_path, {"train": records(7), "test": records(4, seed=1)}, jobs=3)
    assert list(RecordSource(source)) == records(7)
    assert list(RecordSource(source, "test")) == records(4, seed=1)
    assert len(shards(tmp_path)) == 3 + 2


def test_splits_of_the_same_records_share_their_shards(tmp_path):
    world = World(tmp_path / "w").make(4, silent=0)
    parts = [MixtureEntry(file=file, pictures=world.folder / "images") for file in world.files]
    with mixture(parts, ReadLog()) as found:
        folder = write_records(world.out, {"train": found, "test": found}, jobs=2)
    assert held(RecordSource(folder)) == held(RecordSource(folder, "test")) == world.wanted()


def test_a_file_in_the_records_place_is_one_line(tmp_path):
    world = World(tmp_path / "w").make(2)
    world.out.write_text("mine")
    with pytest.raises(UserError):
        world.build()


def test_a_negative_number_of_jobs_is_one_line(tmp_path):
    world = World(tmp_path / "w").make(2)
    with pytest.raises(UserError):
        world.build(jobs=-1)


# What stops a process.

HELPER = """
import json, os, resource, sys, time
from reverie_jax import cli
from reverie_jax.data import records
import reverie_jax.cli.data, tensorflow_datasets
print(json.dumps("ready"), flush=True)
running = set()
for line in sys.stdin:
    what, *rest = json.loads(line)
    if what == "start":
        shard, log, arguments, hold, limit = rest
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                null, file = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(null, 0), os.dup2(null, 1), os.dup2(file, 2)
                records.SHARD, sys.argv = shard, ["reverie", *arguments]
                if limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                if hold:
                    make, made = records._Shards.make, []
                    def holding(self, start):
                        if len(made) == hold[0]:
                            time.sleep(hold[1])
                        made.append(make(self, start))
                        return made[-1]
                    records._Shards.make = holding
                try:
                    cli.main()
                    code = 0
                except SystemExit as end:
                    code = end.code or 0
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    code = 1
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(pid), flush=True)
    else:
        _, status = os.waitpid(rest[0], 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""
"""Imports the package once; every run is a process that it forks, so a run costs no start."""


class Runs:
    """Runs of `reverie data build` as processes of their own."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.helper = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HELPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.helper.stdout is not None
        return json.loads(self.helper.stdout.readline())

    def ask(self, *what: Any) -> Any:
        assert self.helper.stdin is not None
        self.helper.stdin.write(json.dumps(what) + "\n")
        self.helper.stdin.flush()
        return self.answer()

    def start(
        self, world: World, *more: str, hold: tuple[int, float] | None = None, limit: int = 0
    ) -> tuple[int, Path]:
        """(process, file of what it says on stderr)

        Args:
            hold: after so many shards, wait for so many seconds.
            limit: most bytes of a file.
        """
        self.number += 1
        log = self.folder / f"{self.number}.log"
        arguments = ["data", "build", *world.sources, "--out", str(world.out), *more]
        return self.ask("start", SHARD, str(log), arguments, hold, limit), log

    def wait(self, pid: int) -> int:
        return self.ask("wait", pid)

    def run(self, world: World, *more: str) -> tuple[int, str]:
        """(exit code, stderr)"""
        pid, log = self.start(world, *more)
        return self.wait(pid), log.read_text()

    def close(self) -> None:
        self.helper.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("logs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> tuple[World, float]:
    """A world of sixteen shards with its records, and how long a run takes."""
    world = World(tmp_path_factory.mktemp("undisturbed") / "w", side=40).make(46)
    runs.run(world)
    start = time.monotonic()
    assert runs.run(world) == (0, "")
    return world, time.monotonic() - start


def fresh(world: World, folder: Path) -> World:
    """A copy without its records. Digests name files by place, so each copy makes its own shards."""
    shutil.copytree(world.folder / "images", folder / "images")
    for file in world.files:
        shutil.copy2(file, folder / file.name)
    return World(folder, world.side)


def placeless(folder: Path) -> list[tuple[str, bytes, str]]:
    """Records without the places of those that show nothing."""
    return [(one.id if one.image else "", one.image, one.talks_json()) for one in RecordSource(folder)]


@pytest.mark.parametrize(
    ("seed", "jobs"),
    [(0, "2"), *[pytest.param(seed, jobs, marks=pytest.mark.slow) for seed in (1, 2) for jobs in "13"]],
)
def test_a_killed_run_is_taken_up_where_it_was(runs, undisturbed, tmp_path, seed, jobs):
    model, took = undisturbed
    world, rng = fresh(model, tmp_path / "w"), random.Random(seed)
    before: dict[str, tuple[int, int]] = {}
    for _ in range(8):
        pid, _ = runs.start(world, "--jobs", jobs)
        while not world.hidden.exists() and not world.out.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.6) * took)
        os.kill(pid, signal.SIGKILL)
        assert runs.wait(pid) in (-signal.SIGKILL, 0)
        now = finished(world)
        if world.out.exists():  # the shards were all made
            shutil.rmtree(world.out)
        else:
            assert before.items() <= now.items()  # nothing that was finished is made again
        before = now
    assert runs.run(world, "--jobs", jobs) == (0, "")
    assert kept(world, before) == len(before)
    assert placeless(world.out) == placeless(model.out)
    assert held(RecordSource(world.out)) == world.wanted()
    assert beside(world) == []


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_killed_with_every_number_of_shards_is_taken_up(runs, undisturbed, tmp_path, jobs):
    model, _ = undisturbed
    world, before = fresh(model, tmp_path / "w"), {}
    for wanted in (0, 1, 4, 9, 15):
        pid, _ = runs.start(world, "--jobs", jobs, hold=(wanted, 60))
        await_shards(world, wanted)
        os.kill(pid, signal.SIGKILL)
        assert runs.wait(pid) == -signal.SIGKILL
        now = finished(world)
        assert len(now) == wanted if jobs == "1" else len(now) >= wanted
        assert before.items() <= now.items()
        before = now
    assert runs.run(world) == (0, "")
    assert kept(world, before) == len(before)
    assert placeless(world.out) == placeless(model.out)
    assert beside(world) == []


def test_a_killed_run_leaves_the_old_records(runs, undisturbed, tmp_path):
    world = fresh(undisturbed[0], tmp_path / "w")
    assert runs.run(world) == (0, "")
    old = contents(world.out)
    world.change(3, "newer")
    for wanted in (0, 2, 15):
        pid, _ = runs.start(world, "--jobs", "1", hold=(wanted, 60))
        await_shards(world, wanted)
        os.kill(pid, signal.SIGKILL)
        assert runs.wait(pid) == -signal.SIGKILL
        assert contents(world.out) == old
    assert runs.run(world) == (0, "")
    assert held(RecordSource(world.out)) == world.wanted()


def await_shards(world: World, count: int) -> None:
    """Waits until a run has made so many; it has begun to make them where none is asked for."""
    until = time.monotonic() + 60
    while not world.hidden.exists() or len(list(world.hidden.glob("*.shard"))) < count:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_an_interrupted_run_ends_without_a_word(runs, undisturbed, tmp_path):
    world = fresh(undisturbed[0], tmp_path / "w")
    pid, log = runs.start(world, "--jobs", "1", hold=(4, 1))
    await_shards(world, 4)
    os.kill(pid, signal.SIGINT)
    assert (runs.wait(pid), log.read_text()) == (130, "")
    assert not list(world.hidden.glob("*.part"))
    before = finished(world)
    assert 4 <= len(before) <= 6
    assert runs.run(world) == (0, "")
    assert kept(world, before) == len(before)
    assert held(RecordSource(world.out)) == world.wanted()


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def two_at_once(runs, undisturbed, tmp_path_factory) -> tuple[World, list[tuple[int, str]]]:
    """A run that stands still in the middle while another goes from beginning to end: (the world, how both ended)."""
    world = fresh(undisturbed[0], tmp_path_factory.mktemp("two") / "w")
    first, log = runs.start(world, "--jobs", "1", hold=(3, 1))
    await_shards(world, 3)
    os.kill(first, signal.SIGSTOP)
    second, other_log = runs.start(world, "--jobs", "1")
    until = time.monotonic() + 3 + 3 * undisturbed[1]  # it may wait for the first
    while time.monotonic() < until and Path(f"/proc/{second}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    os.kill(first, signal.SIGCONT)
    return world, [(runs.wait(pid), file.read_text()) for pid, file in ((first, log), (second, other_log))]


def test_two_runs_at_once_leave_whole_records(two_at_once):
    world, ends = two_at_once
    assert 0 in [code for code, _ in ends]
    assert held(RecordSource(world.out)) == world.wanted()


def test_of_two_runs_at_once_one_fails_at_worst_with_a_line(two_at_once):
    for code, said in two_at_once[1]:
        assert code in (0, 2)
        assert len(lines(said)) == (code == 2)


@dataclasses.dataclass
class Full:
    """How a run on a full disk ended, and what it left."""

    world: World
    old: list[tuple[str, bytes]]
    code: int
    said: str
    left: list[Path]


@pytest.fixture(scope="module")
def full_disk(runs, tmp_path_factory) -> Full:
    """Files can be of 256 KiB at most: the annotations' database fits, a shard with a large picture does not."""
    world = World(tmp_path_factory.mktemp("full") / "w").make(8)
    assert runs.run(world) == (0, "")
    old = contents(world.out)
    world.picture(5).write_bytes(picture(5, 400))
    pid, log = runs.start(world, "--jobs", "2", limit=256 * 1024)
    code = runs.wait(pid)
    return Full(world, old, code, log.read_text(), sorted(world.hidden.glob("**/*")))


def test_a_full_disk_leaves_the_old_records(full_disk):
    assert full_disk.code != 0
    assert "too large" in full_disk.said
    assert contents(full_disk.world.out) == full_disk.old
    assert len(RecordSource(full_disk.world.out)) == 10


def test_a_full_disk_leaves_nothing_that_looks_whole(full_disk):
    assert len([file for file in full_disk.left if file.suffix == ".shard"]) < 4
    assert not [file for file in full_disk.left if file.name == "dataset_info.json"]


def test_a_full_disk_is_one_line(full_disk):
    assert full_disk.code == 2
    assert len(lines(full_disk.said)) == 1


def test_a_full_disk_is_not_kept_full_by_what_was_not_finished(full_disk):
    assert not [file for file in full_disk.left if file.suffix == ".part"]


def test_after_a_full_disk_the_run_is_taken_up(full_disk, runs):
    world, before = full_disk.world, finished(full_disk.world)
    assert runs.run(world) == (0, "")
    assert kept(world, before) == len(before) < 4
    assert held(RecordSource(world.out)) == world.wanted()
    assert beside(world) == []


def test_a_bad_picture_is_one_line_of_the_command(runs, tmp_path):
    world = World(tmp_path / "w").make(8)
    world.picture(4).write_bytes(b"no picture")
    code, said = runs.run(world)
    assert code == 2
    assert lines(said)[0].startswith(f"reverie: error: {world.picture(4)}: ")
    assert len(lines(said)) == 1
    assert not world.out.exists()


def test_records_without_digests_are_made_anew(tmp_path):
    found = records(7)

    class Failing:
        """Records of which the last cannot be had."""

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> ImageRecord:
            if index == 6:
                raise DataError("the seventh")
            return found[index]

    with pytest.raises(DataError, match="the seventh"):
        write_records(tmp_path / "out", {"train": Failing()})
    left = {file.stat().st_ino for file in (tmp_path / ".out.building").glob("*.shard")}
    assert len(left) == 2
    folder = write_records(tmp_path / "out", {"train": found})
    assert not left & {file.stat().st_ino for file in shards(folder)}
    assert list(RecordSource(folder)) == found
    assert not (tmp_path / ".out.building").exists()
