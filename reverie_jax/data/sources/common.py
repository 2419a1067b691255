"""Shared by the readers of annotation files: parsed rows, what is noted while reading, and folders of images."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.llava_tokenization import move_image_first
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError
from reverie_jax.files import files_below, well_formed

_GENERIC_NAMES = {"image", "img", "picture", "photo"}
"""File names without a folder that do not identify an image."""
_LONG_NAME = 200
"""Characters of an image name that messages show."""
_UNKNOWN = "unknown field"
_IMAGE_FIELDS = {"image", "images", "image_id", "image_path"}


class InvalidRow(ValueError):
    """A row that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation of an annotation file.

    Attributes:
        image: name of the image; empty if there is none.
        conversation: the conversation.
        where: file and row, for errors.
        encoded: the image itself, if the file contains it.
    """

    image: str
    conversation: Conversation
    where: str
    encoded: bytes = b""


@dataclasses.dataclass
class ReadLog:
    """What is noted while annotation files are read.

    Attributes:
        notes: messages for the user.
        problems: (where, reason) of rows that cannot be used.
    """

    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def note_unknown_fields(self, row: dict[str, Any], known: Collection[str]) -> None:
        """Note each field that is not known, once."""
        for key in row.keys() - known:
            if (note := f"{_UNKNOWN} {key!r} is ignored") not in self.notes:
                self.notes.append(note)

    def merge(self, notes: Iterable[str]) -> None:
        """Take over the notes of another log; a field that is not known is noted once."""
        self.notes += [note for note in notes if not (note.startswith(_UNKNOWN) and note in self.notes)]

    def raise_problems(self) -> None:
        """Raise the first problem, if there are any.

        Raises:
            DataError: Some rows cannot be used.
        """
        if self.problems:
            where, reason = self.problems[0]
            more = f" ({len(self.problems) - 1} more rows cannot be used)" if len(self.problems) > 1 else ""
            raise DataError(f"{where}: {reason}{more}; `reverie data check --fix` writes a file without such rows")


class ImageFolder:
    """A folder of images, found by the names that annotation files use.

    A name is a path relative to the folder, and may lead through links that are in it. If there is no such file, the only
    file of that name anywhere below the folder is used: releases of a dataset differ in the folders before a name.

    Raises:
        DataError: The folder does not exist.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"{folder}: image folder does not exist")
        self.folder = folder
        self._found: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DataError: No file or several files match, or the name leaves the folder.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Path:
        roots = (self.folder.absolute(), self.folder.resolve())
        names = [os.path.relpath(name, root) for root in roots] if os.path.isabs(name) else [os.path.normpath(name)]
        relative = next((one for one in names if one.split(os.sep)[0] != os.pardir), None)
        if relative is None:
            raise DataError(f"{name}: leaves the image folder {self.folder}")
        try:
            path = (self.folder / relative).resolve()
            exists = path.is_file()
        except (ValueError, OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.folder}: {name[:80]!r} is not a file name ({reason})") from None
        if not exists and "\\" in name:  # as Windows writes folders
            return self._find(name.replace("\\", "/"))
        if not exists:
            same = set() if path.stem.lower() in _GENERIC_NAMES else self._files_named(Path(relative).name)
            if len(same) != 1:
                reason = "no such file" if not same else f"no such file, and {len(same)} files of that name elsewhere"
                shown = name if len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]}…"  # an image in base64, say
                raise DataError(f"{self.folder / shown}: {reason}")
            (path,) = same
        return path

    def _files_named(self, name: str) -> set[Path]:
        """Return the files of that name anywhere below the folder, also behind links to folders.

        Names are compared in Unicode's composed form: macOS and its archives write accents apart.
        """
        if self._by_name is None:
            self._by_name = {}
            for file in files_below(self.folder):
                self._by_name.setdefault(unicodedata.normalize("NFC", file.name), []).append(file)
        named = self._by_name.get(unicodedata.normalize("NFC", name), [])
        return {file.resolve() for file in named if file.is_file()}


def validate_image(encoded: bytes, name: str) -> bytes:
    """Return an encoded image unchanged if it can be decoded.

    Raises:
        DataError: It cannot.
    """
    try:
        decode(encoded, name)
    except BrokenImage as error:
        raise DataError(f"{error}; replace the file or remove its rows") from None
    return encoded


def first_given(row: dict[str, Any], *keys: str) -> Any:
    """Return the first of some fields that is neither missing, null nor empty; None without one."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)


def answer_text(value: Any) -> str | None:
    """Return an answer as text, also if it is a number (7.0 is 7, as tables write it); None for anything else.

    A truth value is not taken for a word: nothing says whether it stands for "yes", "true" or "True".
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def parse_image(value: Any, path: Any) -> tuple[str, bytes]:
    """Return (name, encoded file) of an image as Parquet files hold it: `{"bytes", "path"}`, or a name alone.

    An image without a name is named by its content.

    Args:
        value: the row's image.
        path: the row's own field for the name, which comes first.

    Raises:
        InvalidRow: It is neither.
    """
    if value is not None and not isinstance(value, str | bytes | dict):
        raise InvalidRow("'image' must be a file name or an image")
    if isinstance(value, dict) and not value.keys() & {"bytes", "path"}:
        raise InvalidRow("'image' has neither 'bytes' nor 'path'")
    encoded = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if encoded is not None and not isinstance(encoded, bytes):
        raise InvalidRow("'bytes' of 'image' must be bytes")
    names = [path, value.get("path") if isinstance(value, dict) else value]
    name = next((name for name in names if isinstance(name, str) and name), "")
    if encoded and not name:
        name = content_digest(encoded)
    return name, encoded or b""


def content_digest(content: bytes) -> str:
    """Return 32 hexadecimal digits that identify a content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def parse_rows(
    rows: Rows, log: ReadLog, known: Collection[str], parse: Callable[[dict[str, Any], str], Iterable[Example]]
) -> Iterator[Example]:
    """Yield the examples that `parse` returns for each row. Rows for which it raises `InvalidRow` go to `log.problems`.

    Args:
        rows: The file.
        log: Gets problems and notes.
        known: Fields that are used, or are known to have no use; others are noted.
        parse: Called with a row and its place, for errors.
    """
    cleaned = 0
    for where, row in rows.located():
        try:
            whole = well_formed(row)
            if whole is not row and any(whole[key] is not row[key] for key in _IMAGE_FIELDS & row.keys()):
                raise InvalidRow("the name of its image has half of a character (a lone surrogate)")
            cleaned += whole is not row
            row = whole
            if not isinstance(row, dict):
                raise InvalidRow("not an object")
            log.note_unknown_fields(row, {*known, "pid"})
            examples = list(parse(row, where))
        except InvalidRow as error:
            log.problems.append((where, str(error)))
        except RecursionError:
            log.problems.append((where, "nested too deep"))
        else:
            yield from examples
    if cleaned:
        log.notes.append(f"{rows.path}: dropped halves of characters (lone surrogates) from {cleaned} rows")


def image_conversation(turns: Sequence[Turn], **fields: Any) -> Conversation:
    """Return a conversation about one image, which every marker shows.

    Args:
        turns: Its turns.
        fields: Other fields of `Conversation`.

    Raises:
        InvalidRow: The turns do not alternate, or an answer contains a marker.
    """
    try:
        return Conversation(tuple(turns), (0,) * sum(turn.text.count(IMAGE) for turn in turns), **fields)
    except ValueError as error:
        raise InvalidRow(str(error)) from None


def image_question(text: str) -> Turn:
    """Return a question that shows its image once: before the text, unless the text has a marker."""
    return with_one_marker(Turn("user", text if IMAGE in text else f"{IMAGE}\n{text}"))


def with_one_marker(turn: Turn) -> Turn:
    """Return a question with at most one image marker."""
    return Turn(turn.role, move_image_first(turn.text)) if turn.text.count(IMAGE) > 1 else turn
