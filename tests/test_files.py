"""Writing files and folders as a whole, and reading JSON, with one line for whatever is wrong."""

import os

import pytest

from reverie_jax import files
from reverie_jax.errors import CheckpointError, DataError, UserError


@pytest.mark.parametrize("error", [UserError, DataError])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b'{"a": 1', b"\xff{}", b"[" * 200_000, b"{} {}"],
    ids=lambda content: repr(content)[:12],
)
def test_read_json_names_the_file(tmp_path, content, error):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=path.name) as caught:
        files.read_json(path, error)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_read_as_json(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        files.read_json(tmp_path)


def test_writers_create_parents_and_leave_only_their_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"b": [1, "é"]})
    assert files.read_json(path) == {"b": [1, "é"]}
    files.atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    files.atomic_write(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(path.parent) == ["a.json"]


def fail(part, problem):
    part.write_text("half")
    raise problem


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), ValueError("late"), OSError(28, "No space left on device")])
def test_a_failed_write_keeps_the_old_file(tmp_path, problem):
    path = tmp_path / "a.txt"
    path.write_text("old")
    expected = DataError if isinstance(problem, OSError) else type(problem)
    with pytest.raises(expected) as caught, files.atomic_path(path, DataError) as part:
        fail(part, problem)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
    assert not isinstance(problem, OSError) or str(path) in str(caught.value)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="inner"):
        files.atomic_write(tmp_path / "file" / "inner", "x", DataError)


def test_folder_appears_as_a_whole_with_usual_permissions(tmp_path):
    path = tmp_path / "new" / "out"
    with files.atomic_folder(path) as part:
        (part / "a").write_text("x")
        (part / "a").chmod(0o600)
        assert not path.exists()
    assert (path / "a").read_text() == "x"
    assert os.listdir(path.parent) == ["out"]
    (tmp_path / "usual").write_text("")
    assert (path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    "problem", [KeyboardInterrupt(), OSError(28, "No space left on device"), DataError("in the block")]
)
def test_a_failed_folder_leaves_nothing(tmp_path, problem):
    expected = CheckpointError if isinstance(problem, OSError) else type(problem)
    with pytest.raises(expected) as caught, files.atomic_folder(tmp_path / "out", CheckpointError) as part:
        fail(part / "a", DataError(f"{part}/a: bad") if isinstance(problem, DataError) else problem)
    assert os.listdir(tmp_path) == []
    assert isinstance(problem, KeyboardInterrupt) or str(caught.value).startswith(str(tmp_path / "out"))


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(CheckpointError, match=tmp_path.name), files.atomic_folder(tmp_path, CheckpointError):
        pass
    (tmp_path / "empty").mkdir()
    with files.atomic_folder(tmp_path / "empty") as part:
        (part / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_a_link_stays_and_its_target_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    files.atomic_write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_written_to_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.atomic_write(pipe, "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
