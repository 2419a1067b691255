"""Writing files and folders as a whole, and reading JSON, with one line for whatever is wrong."""

import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax import files
from reverie_jax.errors import CheckpointError, DataError, UserError


@pytest.mark.parametrize("error", [UserError, DataError])
@pytest.mark.parametrize(
    "content",
    [None, "folder", b"", b"{", b'{"a": 1', b"\xff{}", b"[" * 200_000, b"{} {}"],
    ids=lambda content: repr(content)[:12],
)
def test_read_json_names_the_file(tmp_path, content, error):
    path = tmp_path / "broken.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=path.name) as caught:
        files.read_json(path, error)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_writers_create_parents_and_leave_only_their_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"b": [1, "é"]})
    assert files.read_json(path) == {"b": [1, "é"]}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows saves it
    assert files.read_json(path) == {"b": [1, "é"]}
    files.atomic_write(path, '["\ud83d"]')  # half of a character: only JSON can hold it
    assert files.read_json(path) == ["\ud83d"]
    files.atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    files.atomic_write(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(path.parent) == ["a.json"]


def fail(part, problem):
    part.write_text("half")
    raise DataError(f"{part}: bad") if isinstance(problem, DataError) else problem


@pytest.mark.parametrize("write", [files.atomic_path, files.atomic_folder])
@pytest.mark.parametrize(
    "problem",
    [KeyboardInterrupt(), ValueError("late"), OSError(28, "No space left on device"), DataError("in the block")],
    ids=repr,
)
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, write, problem):
    path, is_file = tmp_path / "out", write is files.atomic_path
    if is_file:
        path.write_text("old")
    expected = CheckpointError if isinstance(problem, OSError) else type(problem)
    with pytest.raises(expected) as caught, write(path, CheckpointError) as part:
        fail(part if is_file else part / "a", problem)
    assert os.listdir(tmp_path) == ["out"] * is_file
    assert not is_file or path.read_text() == "old"
    if isinstance(problem, OSError) or (isinstance(problem, DataError) and not is_file):
        assert str(caught.value).startswith(str(path))


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


def test_an_existing_folder_is_kept_unless_it_is_empty(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(CheckpointError, match=tmp_path.name), files.atomic_folder(tmp_path, CheckpointError):
        pass
    (tmp_path / "empty").mkdir()
    with files.atomic_folder(tmp_path / "empty") as part:
        (part / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_links_and_pipes_stay_what_they_are(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    files.atomic_write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.atomic_write(pipe, "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)


def test_files_are_found_behind_links_and_each_folder_once(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for file in (folder / "a", folder / "deep" / "b", elsewhere / "c"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "one").symlink_to(elsewhere)
    (folder / "two").symlink_to(elsewhere)
    (folder / "deep" / "circle").symlink_to(folder)
    assert sorted(file.name for file in files.files_below(folder)) == ["a", "b", "c"]


TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("\ud83d\ude00"), max_size=6)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(VALUES)
def test_lone_surrogates_are_dropped(value):
    written = json.dumps(value, ensure_ascii=False)
    result = files.well_formed(value)
    json.dumps(result, ensure_ascii=False).encode()
    assert (result is value) == (re.search("[\ud800-\udfff]", written) is None)
    if isinstance(value, str):
        pairs = value.replace("\ud83d\ude00", "\U0001f600")
        assert result == re.sub("[\ud800-\udfff]", "", pairs)
