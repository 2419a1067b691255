"""What all annotation files share: rows with their places, talk about a picture, and pictures by name."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.llava_tokenization import move_image_first
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError

_NAMELESS = {"image", "img", "picture", "photo"}
"""File names that say nothing: a picture is not found by them alone."""


class BadRow(ValueError):
    """Why a row cannot be used."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation as a file gives it.

    Attributes:
        image: the picture's name; empty where there is none.
        where: file and row, for errors.
        encoded: the picture itself, where the file holds it.
    """

    image: str
    conversation: Conversation
    where: str
    encoded: bytes = b""


@dataclasses.dataclass
class ReadLog:
    """What was found in a file besides talk.

    Attributes:
        notes: what a user should know, line by line.
        problems: (where, why) of rows that cannot be used.
    """

    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def unknown(self, row: dict[str, Any], known: Collection[str]) -> None:
        """Notes fields that are not used, each once."""
        for key in row.keys() - known:
            if (note := f"unknown field {key!r} is not used") not in self.notes:
                self.notes.append(note)

    def settle(self) -> None:
        """Raises DataError: some rows cannot be used; the first is named."""
        if self.problems:
            where, why = self.problems[0]
            more = f"; {len(self.problems) - 1} more rows" if len(self.problems) > 1 else ""
            raise DataError(f"{where}: {why}{more}")


class Pictures:
    """A folder of pictures, by the names that annotation files use.

    A name is a path below the folder. Where there is no such file, and exactly one file in the folder has that file name, it
    is meant: releases differ in the folders that they put before a name.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of pictures")
        self.folder, self._root = folder, folder.resolve()
        self._found: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """The file of a name.

        Raises:
            DataError: there is none, or several, or the name leaves the folder.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Path:
        try:
            path = (self._root / name).resolve()
            there = path.exists()
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{self.folder}: {name[:80]!r} is no file name ({error})") from None
        if not path.is_relative_to(self._root):
            raise DataError(f"{name}: leaves the picture folder {self.folder}")
        if there:
            return path
        if self._by_name is None:
            self._by_name = {}
            for file in self._root.rglob("*"):
                self._by_name.setdefault(file.name, []).append(file)
        same = [] if path.stem.lower() in _NAMELESS else self._by_name.get(path.name, [])
        if len(same) != 1:
            why = "No such file or directory" if not same else f"{len(same)} files have that name, none lies there"
            raise DataError(f"{self.folder / name}: cannot be read ({why})")
        found = same[0].resolve()
        if not found.is_relative_to(self._root):
            raise DataError(f"{name}: leaves the picture folder {self.folder}")
        return found

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is known to open.

        Raises:
            DataError: there is none.
        """
        try:
            encoded = self.find(name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.folder / name}: cannot be read ({error.strerror})") from None
        return opened(encoded, str(self.folder / name))


def opened(encoded: bytes, name: str) -> bytes:
    """The bytes of a picture, which were opened once.

    Raises:
        DataError: they are none.
    """
    try:
        decode(encoded, name)
    except BrokenImage as error:
        raise DataError(f"{error}; replace the file or remove its rows") from None
    return encoded


def embedded(value: Any, path: Any) -> tuple[str, bytes]:
    """(name, encoded file) of a picture as Parquet files hold it: `{"bytes", "path"}`; or a name alone.

    One that has no name is named by its content.

    Raises:
        BadRow: it is neither.
    """
    if value is not None and not isinstance(value, str | bytes | dict):
        raise BadRow("'image' must be a file name or a picture")
    if isinstance(value, dict) and not value.keys() & {"bytes", "path"}:
        raise BadRow("'image' has neither 'bytes' nor 'path'")
    encoded = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if encoded is not None and not isinstance(encoded, bytes):
        raise BadRow("the picture's 'bytes' are none")
    named = [value.get("path") if isinstance(value, dict) else value, path]
    name = next((one for one in reversed(named) if isinstance(one, str) and one), "")
    if encoded and not name:
        name = content_name(encoded)
    return name, encoded or b""


def content_name(content: bytes) -> str:
    """Names a content: 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def each(
    rows: Rows, log: ReadLog, known: Collection[str], make: Callable[[dict[str, Any], str], Iterable[Example]]
) -> Iterator[Example]:
    """The talk that `make` finds in each row. Rows that raise `BadRow` go to `reading.problems`.

    Args:
        known: fields that are used, or known and of no use; others are noted.
    """
    for number, row in enumerate(rows):
        where = rows.locate(number, row)
        try:
            if not isinstance(row, dict):
                raise BadRow("not an object")
            log.unknown(row, {*known, "pid"})
            found = list(make(row, where))
        except BadRow as error:
            log.problems.append((where, str(error)))
        except RecursionError:
            log.problems.append((where, "nested too deep"))
        else:
            yield from found


def conversation(turns: Sequence[Turn], **options: Any) -> Conversation:
    """The turns about one picture, which each marker shows.

    Raises:
        BadRow: they do not alternate, or an answer holds a marker.
    """
    try:
        return Conversation(tuple(turns), (0,) * sum(turn.text.count(IMAGE) for turn in turns), **options)
    except ValueError as error:
        raise BadRow(str(error)) from None


def shown(text: str) -> Turn:
    """A question about a picture, which it shows first where it does not say where."""
    turn = Turn("user", text if IMAGE in text else f"{IMAGE}\n{text}")
    return once(turn)


def once(turn: Turn) -> Turn:
    """A question that shows its picture once."""
    return Turn(turn.role, move_image_first(turn.text)) if turn.text.count(IMAGE) > 1 else turn
