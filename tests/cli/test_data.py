"""`reverie data build`: everything arrives once, whatever interrupts it, and previous records stay readable."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie_jax import progress
from reverie_jax.cli.data import Build
from reverie_jax.data import records as records_module
from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.images import encode_png
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import assert_one_line, llava_row, records, write_json_rows

SHARD = 3
"""Records per shard in these tests."""
Content = dict[str, tuple[bytes, list[tuple[str, ...]]]]
"""By name: an image and its conversations; a record without an image is named by its texts."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(records_module, "RECORDS_PER_SHARD", SHARD)


def make_image(number: int, side: int = 8) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))


def same_size_image(other: bytes) -> bytes:
    """Another image with the same number of bytes."""
    return next(image for number in range(500, 5000) if len(image := make_image(number)) == len(other))


@dataclasses.dataclass
class World:
    """Two annotation files and their images; some images are in both, some rows have none."""

    folder: Path

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / "one.json", self.folder / "two.json"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def work(self) -> Path:
        return self.folder / ".out.building"

    def image(self, number: int) -> Path:
        return self.folder / "images" / f"{number:03d}.png"

    def make(self, count: int, *, without_image: int = 2) -> World:
        (self.folder / "images").mkdir(parents=True)
        rng = random.Random(count)
        one: list[dict[str, Any]] = []
        two: list[dict[str, Any]] = []
        for number in range(count):
            name = self.image(number).name
            self.image(number).write_bytes(make_image(number))
            for question in range(rng.randint(1, 3)):
                one.append(llava_row(name, f"<image>\nq{number} {question}?", f"a{number} \u2028ü{question}"))
            if number % 3 == 0:
                two.append(llava_row(name, f"<image>\nother {number}?", "茶"))
        two += [llava_row(None, f"text {number}?", "yes", "why?", "so") for number in range(without_image)]
        rng.shuffle(one)
        for file, rows in zip(self.files, (one, two), strict=True):
            write_json_rows(file, rows)
        return self

    def rows(self) -> list[dict[str, Any]]:
        return [row for file in self.files for row in json.loads(file.read_text())]

    def change_answer(self, number: int, text: str) -> None:
        """Change the answer of the first row about an image."""
        rows = json.loads(self.files[0].read_text())
        row = next(row for row in rows if row.get("image") == self.image(number).name)
        row["conversations"][1]["value"] = text
        write_json_rows(self.files[0], rows)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(f"{file}={self.folder / 'images'}" for file in self.files)

    @property
    def entries(self) -> list[MixtureEntry]:
        return [MixtureEntry(file=file, images=self.folder / "images") for file in self.files]

    def build(self, **options: Any) -> None:
        Build(**{"sources": self.sources, "out": self.out, "overwrite": True} | options).run()

    def expected(self) -> Content:
        """What the annotation files contain, without the package's readers."""
        content: Content = {}
        for row in self.rows():
            texts = tuple(turn["value"] for turn in row["conversations"])
            name = row.get("image", "")
            encoded = (self.folder / "images" / name).read_bytes() if name else b""
            content.setdefault(name or " | ".join(texts), (encoded, []))[1].append(texts)
        return {name: (encoded, sorted(conversations)) for name, (encoded, conversations) in content.items()}


def content_of(source: RecordSource) -> Content:
    """What records contain; each name must be unique."""
    content: Content = {}
    for record in source:
        texts = [tuple(turn.text for turn in conversation.turns) for conversation in record.conversations]
        name = record.id if record.image else " | ".join(texts[0])
        assert name not in content
        content[name] = (record.image, sorted(texts))
    return content


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.array_record-*"))


def files_of(folder: Path) -> list[tuple[str, bytes]]:
    return [(file.name, file.read_bytes()) for file in sorted(folder.glob("**/*")) if file.is_file()]


def identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def finished(world: World) -> dict[str, tuple[int, int]]:
    """The shards that an interrupted run finished, by name."""
    return {file.name: identity(file) for file in world.work.glob("*.shard")}


def reused(world: World, before: dict[str, tuple[int, int]]) -> int:
    """How many of the finished shards are now the records'."""
    return len({identity(file) for file in shards(world.out)} & set(before.values()))


def assert_complete(world: World) -> None:
    """Check that the records have the annotation files' content, and that nothing is left beside them."""
    assert content_of(RecordSource(world.out)) == world.expected()
    assert [file.name for file in world.folder.iterdir() if file.name.startswith(".")] == []


# Everything arrives.


@pytest.mark.parametrize("count", [1, 3, 4, 14])
def test_every_conversation_and_every_byte_arrives_once_whatever_the_jobs(tmp_path, capsys, count):
    world, contents = World(tmp_path / "w").make(count), []
    for jobs in (1, 4, None):
        world.build(jobs=jobs)
        assert_complete(world)
        assert len(RecordSource(world.out)) == count + 2
        assert len(shards(world.out)) == -(-(count + 2) // SHARD)
        out, err = capsys.readouterr()
        assert out.startswith(
            f"{count} images, 2 texts without an image, {len(world.rows())} conversations: {world.out}"
        )
        assert err == ""
        contents.append(files_of(world.out))
        shutil.rmtree(world.out)
    assert contents[0] == contents[1] == contents[2]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 11), st.integers(1, 12), st.integers(1, 4))
def test_records_keep_their_order(tmp_path_factory, count, size, jobs):
    folder, written = tmp_path_factory.mktemp("any"), records(count)
    progress: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "RECORDS_PER_SHARD", size)
        source = RecordSource(write_records(folder, {"train": written}, jobs=jobs, on_progress=progress.append))
    assert list(source) == written
    assert sum(progress) == count
    assert progress[:-1] == [size] * (len(progress) - 1)


def test_tfds_reads_records(tmp_path):
    world = World(tmp_path / "w").make(7)
    world.build()
    (folder,) = {file.parent for file in shards(world.out)}
    builder = tfds.builder_from_directory(str(folder))
    encoded = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    rows = [encoded[index] for index in range(len(encoded))]
    found = {row["id"].decode(): (row["image"], len(json.loads(row["conversations"]))) for row in rows if row["image"]}
    assert found == {name: (image, len(texts)) for name, (image, texts) in world.expected().items() if image}
    assert len(rows) == 9
    decoded = builder.as_data_source("train")
    assert all(decoded[n]["image"].shape == (8, 8, 3) for n, row in enumerate(rows) if row["image"])


def test_new_records_replace_previous_ones(tmp_path):
    world = World(tmp_path / "w").make(8)
    world.build()
    inodes = {file.stat().st_ino for file in shards(world.out)}
    handles = [file.open("rb") for file in shards(world.out)]  # so that no inode is used again
    world.build()
    assert not inodes & {file.stat().st_ino for file in shards(world.out)}  # a finished run leaves nothing to reuse
    for handle in handles:
        handle.close()
    previous = content_of(RecordSource(world.out))
    world.change_answer(3, "another answer")
    world.image(4).write_bytes(make_image(99))
    for file in world.files:
        write_json_rows(file, [row for row in json.loads(file.read_text()) if row.get("image") != "007.png"])
    world.build()
    assert_complete(world)
    assert content_of(RecordSource(world.out)) != previous
    assert len(shards(world.out)) == 3


def test_splits_have_their_own_shards_or_share_them(tmp_path):
    source = write_records(tmp_path / "own", {"train": records(7), "test": records(4, seed=1)}, jobs=3)
    assert list(RecordSource(source)) == records(7)
    assert list(RecordSource(source, "test")) == records(4, seed=1)
    assert len(shards(tmp_path / "own")) == 3 + 2
    world = World(tmp_path / "w").make(4, without_image=0)
    with read_mixture(world.entries, ReadLog()) as mixture:
        folder = write_records(world.out, {"train": mixture, "test": mixture}, jobs=2)
    assert content_of(RecordSource(folder)) == content_of(RecordSource(folder, "test")) == world.expected()


@pytest.mark.parametrize("case", ["file in place", "records in place", "jobs", "max side"])
def test_the_command_refuses(tmp_path, case):
    world = World(tmp_path / "w").make(2)
    if case == "file in place":
        world.out.write_text("mine")
    if case == "records in place":
        world.build()
    options = {"jobs": {"jobs": -1}, "max side": {"max_side": 0}, "records in place": {"overwrite": False}}
    before = files_of(world.folder)
    with pytest.raises(UserError) as error:
        world.build(**options.get(case, {}))
    assert_one_line(error)
    assert files_of(world.folder) == before


# Interruptions in one process.


class Stop(Exception):
    """A run ends here, without cleaning up."""


@contextlib.contextmanager
def stopped_before_the_end() -> Iterator[None]:
    """All shards are finished, but not the records."""

    def stop(**options: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.folder_dataset, "write_metadata", stop)
        with contextlib.suppress(Stop):
            yield
            pytest.fail("did not stop")


def add_row(world: World, number: int) -> None:
    rows = json.loads(world.files[1].read_text())
    write_json_rows(world.files[1], [*rows, llava_row(world.image(number).name, "<image>\nnew?", "new")])


CHANGES: dict[str, tuple[Callable[[World], object], set[str]]] = {
    "nothing": (lambda world: None, set()),
    "an image": (lambda world: world.image(5).write_bytes(make_image(77)), {"005.png"}),
    "an image of the same size": (
        lambda world: world.image(5).write_bytes(same_size_image(world.image(5).read_bytes())),
        {"005.png"},
    ),
    "an answer": (lambda world: world.change_answer(2, "other"), {"002.png"}),
    "a row more": (lambda world: add_row(world, 8), {"008.png"}),
}


@pytest.mark.parametrize(("change", "changed"), CHANGES.values(), ids=CHANGES)
def test_only_changed_shards_are_written_again(tmp_path, change, changed):
    world = World(tmp_path / "w").make(13)
    with stopped_before_the_end():
        world.build()
    before = finished(world)
    assert len(before) == 5
    change(world)
    world.build(jobs=2)
    affected = {index // SHARD for index, record in enumerate(RecordSource(world.out)) if record.id in changed}
    assert [identity(file) in before.values() for file in shards(world.out)] == [n not in affected for n in range(5)]
    assert_complete(world)


def test_a_broken_image_keeps_previous_records(tmp_path, capsys):
    world = World(tmp_path / "w").make(13)
    world.build()
    previous = files_of(world.out)
    world.change_answer(1, "newer")
    world.image(6).write_bytes(make_image(6)[:50])
    for jobs in (1, 3):
        with pytest.raises(DataError) as error:
            world.build(jobs=jobs)
        assert_one_line(error, world.image(6))
        assert files_of(world.out) == previous
        assert len(RecordSource(world.out)) == 15
        assert not list(world.work.glob("*.part"))
        assert not list(world.work.glob("**/dataset_info.json"))
    before = finished(world)
    assert before
    world.image(6).write_bytes(make_image(6))
    world.build()
    assert reused(world, before) == len(before)
    assert_complete(world)
    assert capsys.readouterr().err == ""


MOMENTS = [
    "before the end",
    "replacement fails",
    "replacement interrupted",
    "before deletion",
    "half deleted",
    "deleted",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_there_are_records_at_every_moment(tmp_path, monkeypatch, moment):
    world = World(tmp_path / "w").make(9)
    world.build()
    previous, files = content_of(RecordSource(world.out)), files_of(world.out)
    world.change_answer(1, "newer")
    rename, rmtree = Path.rename, shutil.rmtree

    def fail(self: Path, target: Path) -> Path:
        if Path(target).is_relative_to(world.out):
            raise OSError("no") if moment == "replacement fails" else KeyboardInterrupt
        return rename(self, target)

    def stop(path: Any, *more: Any, **options: Any) -> None:
        if moment == "deleted":
            rmtree(path, *more, **options)
        elif moment == "half deleted":
            shards(Path(path))[0].unlink()
        raise Stop

    if moment == "before the end":
        with stopped_before_the_end():
            world.build()
    elif moment.startswith("replacement"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises((DataError, KeyboardInterrupt)):
                world.build()
        assert files_of(world.out) == files
    else:
        monkeypatch.setattr(records_module.shutil, "rmtree", stop)
        with pytest.raises(Stop):
            world.build()
    for folder in (world.out, world.folder):  # hidden folders are not searched for records
        assert content_of(RecordSource(folder)) in (previous, world.expected())


@pytest.mark.parametrize("moment", ["shard", "metadata", "replacement"])
def test_a_run_within_a_run_is_one_line(tmp_path, monkeypatch, moment):
    world = World(tmp_path / "w").make(9)
    world.build()
    world.change_answer(1, "newer")
    inner: list[UserError | None] = []

    def run_another() -> None:
        if not inner:
            inner.append(None)
            try:
                world.build(jobs=1)
            except UserError as error:
                inner[0] = error

    owner: Any
    owner, name = {
        "shard": (records_module.ShardWriter, "write_shard"),
        "metadata": (tfds.folder_dataset, "write_metadata"),
        "replacement": (Path, "rename"),
    }[moment]
    original = getattr(owner, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        if moment == "replacement" and arguments[0].is_relative_to(world.out):
            run_another()
        result = original(*arguments, **options)
        if moment == "metadata" or (moment == "shard" and arguments[1]):
            run_another()
        return result

    monkeypatch.setattr(owner, name, patched)
    outer: UserError | None = None
    try:
        world.build(jobs=1)
    except UserError as error:
        outer = error
    assert inner
    assert outer is None or inner[0] is None
    assert content_of(RecordSource(world.out)) == world.expected()


def test_records_without_digests_are_written_again(tmp_path):
    class Failing:
        """Records of which the last cannot be read."""

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> ImageRecord:
            if index == 6:
                raise DataError("a.json: row 3: bad")
            return records(7)[index]

    with pytest.raises(DataError, match=r"^a\.json: row 3: bad$"):
        write_records(tmp_path / "out", {"train": Failing()})
    left = {file.stat().st_ino for file in (tmp_path / ".out.building").glob("*.shard")}
    assert len(left) == 2
    assert [file.name for file in tmp_path.iterdir()] == [".out.building"]
    folder = write_records(tmp_path / "out", {"train": records(7)})
    assert not left & {file.stat().st_ino for file in shards(folder)}
    assert list(RecordSource(folder)) == records(7)
    assert not (tmp_path / ".out.building").exists()


# Runs that end in the middle.


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_killed_run_is_continued(tmp_path, monkeypatch, count):
    """A killed run leaves what is there at that moment: the files are linked then, and put back afterwards."""
    world, killed = World(tmp_path / "w").make(13), tmp_path / "killed"
    world.build()
    previous = files_of(world.out)
    world.change_answer(3, "newer")
    write = records_module.ShardWriter.write_shard

    def writing(self: Any, start: int) -> Any:
        if start == count * SHARD:
            shutil.copytree(world.folder, killed, copy_function=os.link)
        return write(self, start)

    with monkeypatch.context() as patch:
        patch.setattr(records_module.ShardWriter, "write_shard", writing)
        world.build(jobs=1)
    shutil.rmtree(world.folder)
    killed.rename(world.folder)
    assert files_of(world.out) == previous
    before = finished(world)
    assert len(before) == count
    world.build(jobs=2)
    assert reused(world, before) == count
    assert_complete(world)


def test_an_interrupted_run_ends_quietly_and_is_continued(tmp_path, monkeypatch, reverie):
    world = World(tmp_path / "w").make(13)

    def interrupt(self: Any, name: str, *more: Any) -> None:
        if name == "records written":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.ProgressBars, "update", interrupt)
        code, _, err = reverie("data", "build", *world.sources, "--out", world.out, "--jobs", 1)
        assert (code, err.count("\n") <= 1) == (130, True)
    assert not list(world.work.glob("*.part"))
    before = finished(world)
    assert 1 <= len(before) < 5
    world.build()
    assert reused(world, before) == len(before)
    assert_complete(world)


FULL_DISK = """
import resource, sys
from reverie_jax import cli
from reverie_jax.data import records
records.RECORDS_PER_SHARD = 3
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
cli.main()
"""
"""Files may have 256 KiB: the database fits, a shard with a large image does not."""


def test_a_full_disk_keeps_previous_records(tmp_path):
    world = World(tmp_path / "w").make(8)
    world.build()
    previous = files_of(world.out)
    world.image(5).write_bytes(make_image(5, 400))
    command = [sys.executable, "-W", "ignore", "-c", FULL_DISK, "data", "build", *world.sources, "--overwrite"]
    run = subprocess.run([*command, "--out", world.out, "--jobs", "2"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert files_of(world.out) == previous
    assert not [file for file in world.work.glob("**/*") if file.name == "dataset_info.json" or file.suffix == ".part"]
    before = finished(world)
    assert len(before) < 4
    world.build()
    assert reused(world, before) == len(before)
    assert_complete(world)
