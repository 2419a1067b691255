"""Writing that fails at any step and in any format: the folder is complete, or nothing is left.

Failures come from Python's audit events (any file that is opened, any folder or renaming may fail) and from the system's
limit on the size of a file, which also applies below Python.
"""

import errno
import functools
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
from tests.models.makers import assert_refused

FORMATS = ["llava-hf", "llava", "orbax", "peft", "llava-lora"]
EVERY_FORMAT = pytest.mark.parametrize("to", FORMATS)
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(to, dst):
    bench = makers.bench()
    if to == "llava-lora":
        convert(bench.lora, dst, to=to, components=[bench.llm, bench.clip])
    else:
        options = {"adapter": bench.full} if to == "peft" else {"shard_bytes": 30_000}
        convert(bench.hf, dst, to=to, **options)


class Steps:
    """Record Python's own opening of files for writing, new folders and renamings below a path; raise at one of them."""

    def __init__(self):
        self.path, self.at, self.error, self.seen = None, None, None, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.path is None or threading.current_thread() is not threading.main_thread():
            return
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        elif event == "os.mkdir":
            writes = not os.path.isdir(args[0])  # to create an existing folder may fail without harm
        else:
            writes = event == "os.rename"
        if not writes or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if os.fsdecode(args[0]).startswith(self.path + os.sep):
            self.seen.append((event, os.fsdecode(args[0])))
            if len(self.seen) - 1 == self.at:
                self.path = None
                raise self.error

    def watch(self, path, at=None, error=None):
        self.path, self.at, self.error, self.seen = str(path), at, error, []


@pytest.fixture(scope="module")
def steps():
    watcher = Steps()
    yield watcher
    watcher.path = None


@EVERY_FORMAT
def test_folder_appears_when_it_is_complete_and_an_interrupted_one_never(to, steps, tmp_path):
    steps.watch(tmp_path)
    write(to, tmp_path / "out")
    steps.path, seen = None, steps.seen
    assert seen[-1] == ("os.rename", seen[-1][1])
    assert not any(path == str(tmp_path / "out") or "/out/" in path for _, path in seen[:-1])
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(file.stat().st_mode & 0o444 == 0o444 & ~umask for file in (tmp_path / "out").rglob("*"))
    count = len(seen)
    assert count >= 4  # the folder, some files, the renaming
    for n, at in enumerate(sorted({0, 1, count // 3, count // 2, count - 2, count - 1})):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        interrupt = n % 2 == 0
        steps.watch(tmp_path, at, KeyboardInterrupt() if interrupt else NO_SPACE)
        try:
            with pytest.raises(KeyboardInterrupt if interrupt else CheckpointError) as caught:
                write(to, tmp_path / "out")
        except pytest.fail.Exception:
            # Orbax continues without a file that it does not need; then what was written must be complete.
            assert to == "orbax"
            assert base_checksums(read_model(tmp_path / "out")) == base_checksums(read_model(makers.bench().hf))
            continue
        finally:
            steps.path = None
        assert list(tmp_path.iterdir()) == [], seen[at]
        if not interrupt:
            message = str(caught.value)
            assert "\n" not in message
            assert str(tmp_path / "out") in message
            assert "No space left" in message


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "orbax"])
def test_files_that_cannot_grow(to, tmp_path):
    # The system's own error, below Python: files of this process may not exceed this number of bytes.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for limit in (0, 1_000, 7_000, 25_000):
        dst = tmp_path / str(limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write(to, dst)
        except CheckpointError as error:
            message, failed = str(error), failed + 1
            assert "\n" not in message
            assert str(dst) in message
            assert not dst.exists()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert all(x.name.isdecimal() for x in tmp_path.iterdir())
    assert failed >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [0, 12])
def test_files_that_cannot_grow_under_orbax(kilobytes, tmp_path):
    # In a process of its own: Orbax's threads run on after the first error, and warn when they are collected.
    command = [sys.executable, "-m", "reverie_jax.cli", "convert", str(makers.bench().hf), str(tmp_path / "out")]
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command, "--to", "orbax"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    # A thread of Orbax's may be writing its own traceback to the same line.
    (line,) = [line for line in done.stderr.splitlines() if "reverie: error:" in line]
    assert str(tmp_path / "out") in line
    assert list(tmp_path.iterdir()) == []


@EVERY_FORMAT
def test_existing_output_is_not_changed(to, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        assert_refused(functools.partial(write, to, tmp_path / name), tmp_path / name)
    assert_refused(lambda: write(to, tmp_path / "file" / "out"), tmp_path / "file" / "out")
    assert (tmp_path / "full" / "work.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "full", "work.txt"]


def test_empty_missing_and_relative_output_folders(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "out", tmp_path / "a" / "b" / "out", "here"):
        convert(makers.bench().hf, folder)
        read_model(folder)


@pytest.mark.parametrize("to", ["llava-hf", "orbax"])
def test_broken_source_leaves_nothing(to, tmp_path):
    src = shutil.copytree(makers.bench().hf, tmp_path / "src")
    (src / "model.safetensors").write_bytes((src / "model.safetensors").read_bytes()[:-10])
    assert_refused(lambda: convert(src, tmp_path / "out", to=to), src / "model.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["src"]
