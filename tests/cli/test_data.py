"""`reverie data build`: everything arrives once, whatever interrupts it, and previous records stay readable."""

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

from reverie_jax.cli.data import Build
from reverie_jax.data import records as records_module
from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.images import encode_png
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import assert_one_line, llava_row, read_records, records, write_json_rows

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


def build(*sources: str, out: Path, **options: Any) -> None:
    Build(sources=sources, out=out, **options).run()


@dataclasses.dataclass
class World:
    """Two annotation files and their images; some images are in both, some rows have none."""

    folder: Path
    side: int = 8

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
            self.image(number).write_bytes(make_image(number, self.side))
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
        build(*self.sources, out=self.out, **options)

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


@pytest.mark.parametrize(("count", "jobs"), [(1, 1), (1, 4), (2, 4), (3, 4), (4, 4), (13, 1), (13, 4)])
def test_every_conversation_and_every_byte_arrives_once(tmp_path, capsys, count, jobs):
    world = World(tmp_path / "w").make(count)
    world.build(jobs=jobs)
    assert_complete(world)
    assert len(RecordSource(world.out)) == count + 2
    assert len(shards(world.out)) == -(-(count + 2) // SHARD)
    out, err = capsys.readouterr()
    assert out.startswith(f"{count + 2} images, {len(world.rows())} conversations: {world.out}")
    assert err == ""


def test_the_number_of_jobs_changes_no_byte(tmp_path):
    world, contents = World(tmp_path / "w").make(14), []
    for jobs in (1, 3, 16, None):
        world.build(jobs=jobs)
        contents.append(files_of(world.out))
        shutil.rmtree(world.out)
    assert len(contents[0]) == 6 + 2
    assert all(content == contents[0] for content in contents)


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


def test_images_of_one_name_in_two_folders(tmp_path):
    sources, entries = [], []
    for folder in ("a", "b"):
        rows = [llava_row(name, f"<image>\n{folder}?", name) for name in ("x.png", f"{folder}.png")]
        (tmp_path / folder).mkdir()
        for row in rows:
            (tmp_path / folder / row["image"]).write_bytes(make_image(ord(folder)))
        file = write_json_rows(tmp_path / f"{folder}.json", rows)
        sources.append(f"{file}={tmp_path / folder}")
        entries.append(MixtureEntry(file=file, images=tmp_path / folder, cap=1 if folder == "a" else None))
    build(*sources, out=tmp_path / "out")
    one, _, other, _ = RecordSource(tmp_path / "out")
    assert [record.conversations[0].turns[0].text for record in (one, other)] == ["<image>\na?", "<image>\nb?"]
    assert [record.image for record in (one, other)] == [make_image(ord("a")), make_image(ord("b"))]
    assert one.id == "x.png" != other.id
    ids = [[record.id for record in read_records(*entries, seed=seed)] for seed in range(20)]
    assert ["a.png", "x.png", "b.png"] in ids  # the name is free where the cap drops the first file's row


def test_splits_have_their_own_shards_or_share_them(tmp_path):
    source = write_records(tmp_path / "own", {"train": records(7), "test": records(4, seed=1)}, jobs=3)
    assert list(RecordSource(source)) == records(7)
    assert list(RecordSource(source, "test")) == records(4, seed=1)
    assert len(shards(tmp_path / "own")) == 3 + 2
    world = World(tmp_path / "w").make(4, without_image=0)
    with read_mixture(world.entries, ReadLog()) as mixture:
        folder = write_records(world.out, {"train": mixture, "test": mixture}, jobs=2)
    assert content_of(RecordSource(folder)) == content_of(RecordSource(folder, "test")) == world.expected()


@pytest.mark.parametrize("case", ["file in place", "jobs", "max side"])
def test_the_command_refuses(tmp_path, case):
    world = World(tmp_path / "w").make(2)
    if case == "file in place":
        world.out.write_text("mine")
    options = {"jobs": {"jobs": -1}, "max side": {"max_side": 0}}
    with pytest.raises(UserError) as error:
        world.build(**options.get(case, {}))
    assert_one_line(error)


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
    "two images": (
        lambda world: [world.image(number).write_bytes(make_image(77)) for number in (1, 9)],
        {"001.png", "009.png"},
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


def test_shards_of_other_rows_do_not_arrive(tmp_path):
    world = World(tmp_path / "w").make(7)
    with stopped_before_the_end():
        world.build()
    for file in world.files:
        write_json_rows(file, json.loads(file.read_text())[:2])
    world.build()
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


def test_an_image_that_disappears_is_named(tmp_path):
    world = World(tmp_path / "w").make(4)
    with read_mixture(world.entries, ReadLog()) as mixture:
        world.image(2).unlink()
        with pytest.raises(DataError) as error:
            write_records(world.out, {"train": mixture})
    assert_one_line(error, world.image(2))
    assert not world.out.exists()


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_previous_records_are_restored(tmp_path, error):
    world = World(tmp_path / "w").make(4)
    world.build()
    previous = files_of(world.out)
    world.change_answer(1, "newer")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target).is_relative_to(world.out):
            raise error
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises((DataError, KeyboardInterrupt)):
            world.build()
    assert files_of(world.out) == previous


@pytest.mark.parametrize("moment", ["before the end", "before deletion", "half deleted", "deleted"])
def test_there_are_records_at_every_moment(tmp_path, monkeypatch, moment):
    world = World(tmp_path / "w").make(9)
    world.build()
    previous = content_of(RecordSource(world.out))
    world.change_answer(1, "newer")
    rmtree = shutil.rmtree

    def stop(path: Any, *more: Any, **options: Any) -> None:
        if moment == "deleted":
            rmtree(path, *more, **options)
        elif moment == "half deleted":
            shards(Path(path))[0].unlink()
        raise Stop

    if moment == "before the end":
        with stopped_before_the_end():
            world.build()
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
        "shard": (records_module._ShardWriter, "write_shard"),
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
                raise DataError("the seventh")
            return records(7)[index]

    with pytest.raises(DataError, match="the seventh"):
        write_records(tmp_path / "out", {"train": Failing()})
    left = {file.stat().st_ino for file in (tmp_path / ".out.building").glob("*.shard")}
    assert len(left) == 2
    folder = write_records(tmp_path / "out", {"train": records(7)})
    assert not left & {file.stat().st_ino for file in shards(folder)}
    assert list(RecordSource(folder)) == records(7)
    assert not (tmp_path / ".out.building").exists()


# Processes.

HELPER = """
import json, os, resource, sys, time
from reverie_jax import cli
from reverie_jax.data import records
import reverie_jax.cli.data, tensorflow_datasets
print(json.dumps("ready"), flush=True)
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
                records.RECORDS_PER_SHARD, sys.argv = shard, ["reverie", *arguments]
                if limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                if hold:
                    write, written = records._ShardWriter.write_shard, []
                    def holding(self, start):
                        if len(written) == hold[0]:
                            time.sleep(hold[1])
                        written.append(write(self, start))
                        return written[-1]
                    records._ShardWriter.write_shard = holding
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
"""Imports the package once; each run is a fork, so that it starts at once."""


class Runs:
    """Runs of `reverie data build` in processes of their own."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.helper = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HELPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self.helper.stdout is not None
        return json.loads(self.helper.stdout.readline())

    def _request(self, *what: Any) -> Any:
        assert self.helper.stdin is not None
        self.helper.stdin.write(json.dumps(what) + "\n")
        self.helper.stdin.flush()
        return self._answer()

    def start(
        self, world: World, *more: str, hold: tuple[int, float] | None = None, limit: int = 0
    ) -> tuple[int, Path]:
        """Start a run; return its process and the file of its stderr.

        Args:
            hold: wait for some seconds after some shards.
            limit: maximum bytes of a file.
        """
        self.number += 1
        log = self.folder / f"{self.number}.log"
        arguments = ["data", "build", *world.sources, "--out", str(world.out), *more]
        return self._request("start", SHARD, str(log), arguments, hold, limit), log

    def wait(self, pid: int) -> int:
        return self._request("wait", pid)

    def run(self, world: World, *more: str, **options: Any) -> tuple[int, str]:
        """Return (exit code, stderr)."""
        pid, log = self.start(world, *more, **options)
        return self.wait(pid), log.read_text()

    def kill_after(self, world: World, count: int, jobs: str) -> None:
        """Kill a run after some shards are finished."""
        pid, _ = self.start(world, "--jobs", jobs, hold=(count, 60))
        await_shards(world, count)
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid) == -signal.SIGKILL


def await_shards(world: World, count: int) -> None:
    until = time.monotonic() + 60
    while not world.work.exists() or len(list(world.work.glob("*.shard"))) < count:
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("logs"))
    yield found
    found.helper.communicate()


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory) -> tuple[World, float]:
    """A world of sixteen shards with its records, and the seconds of a run."""
    world = World(tmp_path_factory.mktemp("model") / "w", side=40).make(46)
    runs.run(world)
    start = time.monotonic()
    assert runs.run(world) == (0, "")
    return world, time.monotonic() - start


def copy_of(world: World, folder: Path) -> World:
    """A copy without records. Digests include paths: each copy writes its own shards."""
    shutil.copytree(world.folder / "images", folder / "images")
    for file in world.files:
        shutil.copy2(file, folder / file.name)
    return World(folder, world.side)


def without_paths(folder: Path) -> list[tuple[str, bytes, str]]:
    return [(one.id if one.image else "", one.image, one.conversations_json()) for one in RecordSource(folder)]


@pytest.mark.parametrize(
    ("seed", "jobs"),
    [(0, "2"), *[pytest.param(seed, jobs, marks=pytest.mark.slow) for seed in (1, 2) for jobs in "13"]],
)
def test_a_run_killed_at_any_time_is_continued(runs, model, tmp_path, seed, jobs):
    world, rng = copy_of(model[0], tmp_path / "w"), random.Random(seed)
    before: dict[str, tuple[int, int]] = {}
    for _ in range(6):
        pid, _ = runs.start(world, "--jobs", jobs)
        while not world.work.exists() and not world.out.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.6) * model[1])
        os.kill(pid, signal.SIGKILL)
        assert runs.wait(pid) in (-signal.SIGKILL, 0)
        now = finished(world)
        if world.out.exists():  # all shards were finished
            shutil.rmtree(world.out)
        else:
            assert before.items() <= now.items()  # no finished shard is written again
        before = now
    assert runs.run(world, "--jobs", jobs) == (0, "")
    assert reused(world, before) == len(before)
    assert without_paths(world.out) == without_paths(model[0].out)
    assert_complete(world)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_killed_after_any_number_of_shards_is_continued(runs, model, tmp_path, jobs):
    world, before = copy_of(model[0], tmp_path / "w"), {}
    for count in (0, 1, 9, 15):
        runs.kill_after(world, count, jobs)
        now = finished(world)
        assert len(now) == count if jobs == "1" else len(now) >= count
        assert before.items() <= now.items()
        before = now
    assert runs.run(world) == (0, "")
    assert reused(world, before) == len(before)
    previous = files_of(world.out)
    assert without_paths(world.out) == without_paths(model[0].out)
    world.change_answer(3, "newer")
    for count in (0, 15):
        runs.kill_after(world, count, jobs)
        assert files_of(world.out) == previous
    assert runs.run(world) == (0, "")
    assert_complete(world)


def test_an_interrupted_run_ends_quietly(runs, model, tmp_path):
    world = copy_of(model[0], tmp_path / "w")
    pid, log = runs.start(world, "--jobs", "1", hold=(4, 1))
    await_shards(world, 4)
    os.kill(pid, signal.SIGINT)
    assert (runs.wait(pid), log.read_text()) == (130, "")
    assert not list(world.work.glob("*.part"))
    before = finished(world)
    assert 4 <= len(before) <= 6
    assert runs.run(world) == (0, "")
    assert reused(world, before) == len(before)
    assert_complete(world)


def test_of_two_runs_at_once_one_ends_with_a_line(runs, model, tmp_path):
    """A run stops in the middle while another goes from its beginning to its end."""
    world = copy_of(model[0], tmp_path / "w")
    first, first_log = runs.start(world, "--jobs", "1", hold=(3, 1))
    await_shards(world, 3)
    os.kill(first, signal.SIGSTOP)
    second, second_log = runs.start(world, "--jobs", "1")
    second_code = runs.wait(second)
    os.kill(first, signal.SIGCONT)
    assert (runs.wait(first), first_log.read_text()) == (0, "")
    assert second_code == 2
    assert second_log.read_text().count("\n") == 1
    assert_complete(world)


def test_a_full_disk_keeps_previous_records(runs, tmp_path):
    """Files may have 256 KiB: the database fits, a shard with a large image does not."""
    world = World(tmp_path / "w").make(8)
    assert runs.run(world) == (0, "")
    previous = files_of(world.out)
    world.image(5).write_bytes(make_image(5, 400))
    code, err = runs.run(world, "--jobs", "2", limit=256 * 1024)
    assert code == 2
    assert err.count("\n") == 1
    assert files_of(world.out) == previous
    assert not [file for file in world.work.glob("**/*") if file.name == "dataset_info.json" or file.suffix == ".part"]
    before = finished(world)
    assert len(before) < 4
    assert runs.run(world) == (0, "")
    assert reused(world, before) == len(before)
    assert_complete(world)
