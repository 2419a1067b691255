"""What all annotation files share: rows with their places, talk about a picture, and pictures by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Talk:
    """One conversation as a file gives it.

    Attributes:
        image: the picture's name; empty where there is none.
        where: file and row, for errors.
    """

    image: str
    conversation: Conversation
    where: str


@dataclasses.dataclass
class Reading:
    """What was found in a file besides talk.

    Attributes:
        notes: what a user should know, line by line.
        problems: (where, why) of rows that cannot be used.
    """

    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

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
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """The file of a name.

        Raises:
            DataError: there is none, or several, or the name leaves the folder.
        """
        try:
            path = (self._root / name).resolve()
        except (ValueError, OSError) as error:
            raise DataError(f"{self.folder}: {name!r} is no file name ({error})") from None
        if not path.is_relative_to(self._root):
            raise DataError(f"{name}: leaves the picture folder {self.folder}")
        if path.exists():
            return path
        if self._by_name is None:
            self._by_name = {}
            for file in self._root.rglob("*"):
                self._by_name.setdefault(file.name, []).append(file)
        same = self._by_name.get(path.name, [])
        if len(same) != 1:
            why = "No such file or directory" if not same else f"{len(same)} files have that name, none lies there"
            raise DataError(f"{self.folder / name}: cannot be read ({why})")
        return same[0]

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is known to open.

        Raises:
            DataError: there is none.
        """
        try:
            encoded = self.find(name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.folder / name}: cannot be read ({error.strerror})") from None
        try:
            decode(encoded, str(self.folder / name))
        except BrokenImage as error:
            raise DataError(f"{error}; replace the file or remove its rows") from None
        return encoded


def records(parts: Iterable[tuple[Iterable[Talk], Pictures | None]]) -> Iterator[ImageRecord]:
    """A record a picture, in the order of the pictures' first rows; a record a row where there is no picture.

    Args:
        parts: files' talk, each with the folder of its pictures; what several say about one picture becomes one record.

    Raises:
        DataError: a picture cannot be used.
    """
    by_file: dict[Path, tuple[str, Pictures, list[Conversation]]] = {}
    alone: list[Talk] = []
    for talks, pictures in parts:
        for talk in talks:
            if not talk.image:
                alone.append(talk)
            elif pictures is None:
                raise DataError(f"{talk.where}: shows {talk.image}; name the folder of pictures")
            else:
                file = pictures.find(talk.image)
                by_file.setdefault(file, (talk.image, pictures, []))[2].append(talk.conversation)
    seen: set[str] = set()
    for file, (name, pictures, conversations) in by_file.items():
        id = name if name not in seen else str(file)
        seen.add(id)
        yield ImageRecord(id, pictures.read(name), tuple(conversations))
    for talk in alone:
        yield ImageRecord(talk.where, b"", (talk.conversation,))
