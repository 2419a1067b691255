"""Marks are kept once each, whoever writes at the same time and whatever is killed."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reverie_jax.data.sources.marks import Mark
from reverie_jax.errors import UserError
from reverie_jax.review import marks_file
from reverie_jax.review.marks_file import MarksFile

ROW = "0" * 32
WRITER = """
import sys
from pathlib import Path
from reverie_jax.data.sources.marks import Mark
from reverie_jax.review.marks_file import MarksFile
file, name = MarksFile(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
for number in range(10**9):
    file.append(Mark(row=f"{number:032x}", reviewer=name, note=f"{name} {number} " + "ü" * 3000))
    print(number, flush=True)
"""


def bad(row: str = ROW, **fields) -> Mark:
    return Mark.model_validate({"row": row, "reviewer": "a", "mark": "bad"} | fields)


def test_killed_writers_lose_and_double_nothing(tmp_path):
    """Two processes write one file until they are killed: all that was reported is in it, once, and each line is whole."""
    path, words = tmp_path / "m", [sys.executable, "-c", WRITER, str(tmp_path / "m")]
    root = Path(marks_file.__file__).parents[2]
    writers = [
        subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ))
        for name in "ab"
    ]
    reported = {}
    for writer, name in zip(writers, "ab", strict=True):
        assert writer.stdout.readline() == "ready\n"
        lines = [writer.stdout.readline() for _ in range(20)]
        writer.kill()
        reported[name] = [int(line) for line in lines + writer.communicate()[0].splitlines() if line.strip()]
    with path.open("ab") as file:
        file.write(b'{"row":"00')  # as of a disk that was full
    before = path.read_bytes()
    MarksFile(path).append(bad(reviewer="d"))
    *lines, last = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines) == before.removesuffix(b'{"row":"00')
    assert Mark.model_validate_json(last).reviewer == "d"
    found = collections.Counter((mark.reviewer, int(mark.row, 16)) for mark in map(Mark.model_validate_json, lines))
    assert set(found.values()) == {1}
    for name, numbers in reported.items():
        kept = [number for reviewer, number in found if reviewer == name]
        assert numbers == kept[: len(numbers)]
        assert len(kept) - len(numbers) <= 1  # the one that was killed after it was written


def test_two_at_once_see_each_other(tmp_path):
    one, two = MarksFile(tmp_path / "new" / "m"), MarksFile(tmp_path / "new" / "m")
    one.append(bad())
    two.append(bad(reviewer="b", mark="good"))
    one.append(bad())  # again, as a browser that got no answer
    one.append(bad(mark=None, edits={"x": None}))  # is so already
    assert one.changed() == two.changed() == {ROW}
    assert one.changed() == set()
    assert one.rows == two.rows
    assert one.get(ROW).marks == {"a": "bad", "b": "good"}
    assert one.get("1" * 32).marks == {}
    assert len((tmp_path / "new" / "m").read_text().splitlines()) == 2


def test_a_file_that_an_editor_changed_is_read_anew(tmp_path):
    path = tmp_path / "m"
    file = MarksFile(path)
    file.append(bad())
    file.append(bad("1" * 32))
    file.changed()
    lines = path.read_bytes().splitlines(keepends=True)
    (tmp_path / "other").write_bytes(lines[1].rstrip())
    (tmp_path / "other").rename(path)
    file.append(bad("2" * 32))
    assert file.changed() == {ROW, "1" * 32, "2" * 32}
    assert file.rows.keys() == {"1" * 32, "2" * 32}
    path.write_bytes(b"nonsense\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"m: line 1:"):
            file.append(bad())
    path.write_bytes(lines[0])
    assert file.changed() >= {ROW}


@pytest.mark.parametrize("content", ['[{"image": "a.png"}]', '[{"image": "a.png"}]\n', '{"a": 1}', "{}\n[]"])
def test_other_files_stay_as_they_are(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"rows.json: line 1:"):
        MarksFile(path)
    assert path.read_text() == content


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = MarksFile(tmp_path / "m")
    file.append(bad())
    before, write = (tmp_path / "m").read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(marks_file.os, "write", lambda descriptor, content: write(descriptor, content[:30]))
        with pytest.raises(UserError, match="m: cannot be written"):
            file.append(bad("1" * 32))
    assert (tmp_path / "m").read_bytes() == before
    file.append(bad("1" * 32))
    assert len(file.rows) == 2


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "m"):
        with pytest.raises(UserError, match=path.name):
            MarksFile(path)
