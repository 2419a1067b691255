"""Writing that fails, at every step and in every format: the folder is there whole, or nothing is.

Failures come from Python's audit events (any opening, folder or renaming may be the one that fails) and from the system's
limit on the size of a file, which holds below Python too.
"""

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading

import pytest

from reverie_jax.convert import convert
from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import base_checksums, read_model
from tests.models import makers


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One folder of each kind, all from the same parts."""
    room, part = tmp_path_factory.mktemp("sound"), makers.parts()
    makers.hf_folder(room / "hf", makers.hf(part))
    makers.lora_folder(room / "lora", part)
    makers.llm_folder(room / "llm", part)
    makers.clip_folder(room / "clip", part)
    makers.peft_folder(room / "adapter", makers.hf(part), modules_to_save=["multi_modal_projector"])
    return room


FORMATS = {
    "llava-hf": {"src": "hf", "shard_bytes": 30_000},
    "llava": {"src": "hf", "shard_bytes": 30_000},
    "orbax": {"src": "hf"},
    "peft": {"src": "hf", "adapter": "adapter"},
    "llava-lora": {"src": "lora", "components": ["llm", "clip"]},
}
EVERY_FORMAT = pytest.mark.parametrize("to", FORMATS)


def write(room, to, dst):
    options = dict(FORMATS[to])
    src = room / options.pop("src")
    for name in ("adapter", "components"):
        if name in options:
            value = options[name]
            options[name] = room / value if isinstance(value, str) else [room / x for x in value]
    convert(src, dst, to=to, **options)


class Steps:
    """Python's own openings for writing, new folders and renamings below a place, in order; raises at one of them."""

    def __init__(self):
        self.place, self.at, self.error, self.seen = None, None, None, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.place is None or threading.current_thread() is not threading.main_thread():
            return
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        elif event == "os.mkdir":
            writes = not os.path.isdir(args[0])  # one that is there already needs none: its failure is no failure
        else:
            writes = event == "os.rename"
        if (
            writes
            and isinstance(args[0], str | bytes | os.PathLike)
            and os.fsdecode(args[0]).startswith(self.place + os.sep)
        ):
            self.seen.append((event, os.fsdecode(args[0])))
            if len(self.seen) - 1 == self.at:
                self.place = None
                raise self.error

    def watch(self, place, at=None, error=None):
        self.place, self.at, self.error, self.seen = str(place), at, error, []


@pytest.fixture(scope="module")
def steps():
    watcher = Steps()
    yield watcher
    watcher.place = None


@EVERY_FORMAT
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=repr)
def test_interrupted_writing_leaves_nothing(to, error, sound, steps, tmp_path):
    steps.watch(tmp_path)
    write(sound, to, tmp_path / "whole")
    steps.place, count = None, len(steps.seen)
    assert count >= 4, steps.seen  # the folder, some files, the renaming
    shutil.rmtree(tmp_path / "whole")
    for at in sorted({0, 1, 2, count // 3, count // 2, 2 * count // 3, count - 2, count - 1}):
        steps.watch(tmp_path, at, error)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
        try:
            with pytest.raises(expected) as caught:
                write(sound, to, tmp_path / "out")
        except pytest.fail.Exception:
            # Orbax goes on without a file that it can do without; then what was written must be whole.
            assert to == "orbax"
            steps.place = None
            assert base_checksums(read_model(tmp_path / "out")) == base_checksums(read_model(sound / "hf"))
            shutil.rmtree(tmp_path / "out")
            continue
        finally:
            steps.place = None
        assert list(tmp_path.iterdir()) == [], steps.seen[at]
        if expected is CheckpointError:
            message = str(caught.value)
            assert "\n" not in message
            assert str(tmp_path / "out") in message
            assert "No space left" in message
    write(sound, to, tmp_path / "out")  # and nothing stands in the way of the next try


@EVERY_FORMAT
def test_the_name_appears_when_all_is_written(to, sound, steps, tmp_path):
    steps.watch(tmp_path)
    write(sound, to, tmp_path / "out")
    steps.place = None
    assert steps.seen[-1][0] == "os.rename"
    assert not any(path == str(tmp_path / "out") or "/out/" in path for _, path in steps.seen[:-1])
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(file.stat().st_mode & 0o444 == 0o444 & ~umask for file in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "orbax"])
def test_files_that_cannot_grow(to, sound, tmp_path):
    # The system's own refusal, below Python: files of this process may not be longer than so many bytes.
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for limit in (0, 1_000, 4_000, 7_000, 12_000, 25_000):
        dst = tmp_path / str(limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, whole[1]))
        try:
            write(sound, to, dst)
        except CheckpointError as error:
            message, failed = str(error), failed + 1
            assert "\n" not in message
            assert str(dst) in message
            assert not dst.exists()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        assert all(x.name.isdecimal() for x in tmp_path.iterdir())
    assert failed >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [0, 12])
def test_files_that_cannot_grow_under_orbax(kilobytes, sound, tmp_path):
    # In a process of its own: Orbax's other writers go on after the first error, and complain as they are collected.
    command = [
        sys.executable,
        "-m",
        "reverie_jax.cli",
        "convert",
        str(sound / "hf"),
        str(tmp_path / "out"),
        "--to",
        "orbax",
    ]
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("reverie: error:")]
    assert len(said) == 1
    assert str(tmp_path / "out") in said[0]
    assert list(tmp_path.iterdir()) == []


@EVERY_FORMAT
def test_what_is_there_stays(to, sound, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError) as caught:
            write(sound, to, tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    assert (tmp_path / "full" / "work.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "full", "work.txt"]


def test_onto_its_own_source(sound, tmp_path):
    src = shutil.copytree(sound / "hf", tmp_path / "src")
    before = sorted((x.name, x.read_bytes()) for x in src.iterdir())
    with pytest.raises(CheckpointError):
        convert(src, src)
    assert sorted((x.name, x.read_bytes()) for x in src.iterdir()) == before


def test_an_empty_folder_may_be_filled(sound, tmp_path):
    (tmp_path / "out").mkdir()
    convert(sound / "hf", tmp_path / "out")
    read_model(tmp_path / "out")


def test_parents_are_made(sound, tmp_path, monkeypatch):
    convert(sound / "hf", tmp_path / "a" / "b" / "out")
    read_model(tmp_path / "a" / "b" / "out")
    monkeypatch.chdir(tmp_path)
    convert(sound / "hf", "here")
    read_model(tmp_path / "here")


def test_a_parent_that_is_a_file(sound, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError) as caught:
        convert(sound / "hf", tmp_path / "a" / "out")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("to", ["llava-hf", "orbax"])
def test_a_broken_source_leaves_nothing(to, sound, tmp_path):
    src = shutil.copytree(sound / "hf", tmp_path / "src")
    (src / "model.safetensors").write_bytes((src / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert(src, tmp_path / "out", to=to)
    assert [x.name for x in tmp_path.iterdir()] == ["src"]
