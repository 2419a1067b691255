"""Marks of reviewers on rows of annotation files: which are good or bad, and corrected texts.

A row is known by its content, so files may be reordered, cut and merged. A marks file is JSON lines (`Mark`) that are added
and never changed; what a later line sets replaces what an earlier one did.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic

from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.annotated import RATIONALE_KEYS, VERDICT
from reverie_jax.data.sources.common import content_digest
from reverie_jax.errors import DataError

_INSIDE = ("conversations", "messages", "prompt", "completion", "choices", "rationales")
TEXT_KEYS = (
    *(*_INSIDE, "question", "instruction", "hint", "correct_answer", "correct_rationale", "confusing_answer"),
    *("incorrect_rationale", "answer", "chosen", "rejected", "lecture", "solution", "value", "content", "text"),
)
"""Keys, in any format, of what is read and can be edited, in the order in which it is shown."""
_ORDER = {key: place for place, key in enumerate(TEXT_KEYS)}
_REPORTED = 5
"""Marks without a row that are listed; the others are counted."""


class Mark(pydantic.BaseModel):
    """A line of a marks file: what a reviewer sets for a row. What is None or missing stays as it was.

    Attributes:
        row: digest of the row (`row_digest`).
        reviewer: who marks it.
        mark: good, bad, or empty to take the mark back.
        note: a remark; empty to take it back.
        edits: new texts by their path in the row; None for the original.
        where: file and row, for messages.
        image: name of the image, for messages.
        time: when, in ISO 8601.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    row: str = pydantic.Field(pattern=r"^[0-9a-f]{32}$")
    reviewer: str = pydantic.Field(min_length=1)
    mark: Literal["good", "bad", ""] | None = None
    note: str | None = None
    edits: dict[str, str | None] = pydantic.Field(default_factory=dict)
    where: str = ""
    image: str = ""
    time: str = ""


@dataclasses.dataclass
class RowMarks:
    """All that reviewers set for a row.

    Attributes:
        line: number of the last line about it, from 1.
        where: file and row, for messages.
        image: name of the image, for messages.
        marks: good or bad, by reviewer.
        notes: remarks, by reviewer.
        edits: new texts, by path.
        editors: who edited a text, by path.
    """

    line: int = 0
    where: str = ""
    image: str = ""
    marks: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    edits: dict[str, str] = dataclasses.field(default_factory=dict)
    editors: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    @property
    def is_bad(self) -> bool:
        """Whether a reviewer marks it bad."""
        return "bad" in self.marks.values()

    @property
    def is_disputed(self) -> bool:
        """Whether some mark it good and others bad."""
        return len(set(self.marks.values())) > 1

    def changes(self, mark: Mark) -> bool:
        """Return whether a line would change anything."""
        return (
            (mark.mark is not None and mark.mark != self.marks.get(mark.reviewer, ""))
            or (mark.note is not None and mark.note != self.notes.get(mark.reviewer, ""))
            or any(text != self.edits.get(path) for path, text in mark.edits.items())
        )

    def add(self, mark: Mark, line: int) -> None:
        """Take over what a line sets."""
        self.line, self.where, self.image = line, mark.where or self.where, mark.image or self.image
        for kept, value in ((self.marks, mark.mark), (self.notes, mark.note)):
            if value is not None:
                kept[mark.reviewer] = value
            if not value and value is not None:
                del kept[mark.reviewer]
        for path, text in mark.edits.items():
            self.editors.setdefault(path, set()).add(mark.reviewer)
            if text is None:
                self.edits.pop(path, None)
            else:
                self.edits[path] = text


class Marks:
    """What a marks file says, by row.

    Args:
        path: The file; `read` reads it.

    Attributes:
        found: Digests of the marked rows that were read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, RowMarks] = {}
        self.lines = 0
        self.found: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> Marks:
        """Return the marks of a file. A last line that is cut off, as by a full disk, says nothing.

        Raises:
            DataError: The file cannot be read, or a line is not a mark.
        """
        marks = cls(path)
        try:
            *lines, last = path.read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        for line in lines if is_cut_off(last) else [*lines, last]:
            marks.add_line(line)
        return marks

    def add_line(self, line: bytes) -> str:
        """Take over what a line sets; return the digest of its row. Blank lines are skipped.

        Raises:
            DataError: It is not a mark.
        """
        self.lines += 1
        if not line.strip():
            return ""
        try:
            mark = Mark.model_validate_json(line)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            reason = f"{field}: {first['msg']}" if field else first["msg"]
            raise DataError(f"{self.path}: line {self.lines}: not a mark ({reason}); correct or delete it") from None
        self.rows.setdefault(mark.row, RowMarks()).add(mark, self.lines)
        return mark.row

    def apply(self, row: Any) -> Any:
        """Return a row with its edits, accepted if it is marked good whatever a judge said; None if it is marked bad.

        Raises:
            DataError: An edit is of a text that the row does not have.
        """
        try:
            digest = row_digest(row)
        except RecursionError:  # the format's reader says so
            return row
        marked = self.rows.get(digest)
        if marked is None:
            return row
        self.found.add(digest)
        if marked.is_bad:
            return None
        try:
            row = edit(row, marked.edits)
        except LookupError as error:
            raise DataError(
                f"{self.path}: line {marked.line}: {marked.where}: no text {error} in the row; delete this edit"
            ) from None
        accepted = isinstance(row, dict) and row.keys() >= {*RATIONALE_KEYS} and "good" in marked.marks.values()
        return {**row, VERDICT: "no"} if accepted else row

    def notes(self) -> list[str]:
        """Return what was done to the rows that were read, and the marks that fit none."""
        found = [self.rows[digest] for digest in self.found]
        lost = [marked for digest, marked in self.rows.items() if digest not in self.found]
        kept = [marked for marked in found if not marked.is_bad]
        counts = {
            "rows are marked bad and left out": len(found) - len(kept),
            "of these are marked good by others": sum(marked.is_disputed for marked in found),
            "rows have edited texts": sum(bool(marked.edits) for marked in kept),
            "texts were edited by several reviewers; the last edit counts": sum(
                len(names) > 1 and path in one.edits for one in kept for path, names in one.editors.items()
            ),
            "marks fit no row: it was changed, or is in no file of this command; review it again": len(lost),
        }
        notes = [f"{self.path}: {count} {what}" for what, count in counts.items() if count]
        notes += [
            f"{self.path}: line {one.line}: fits no row any more: {one.where} {one.image}" for one in lost[:_REPORTED]
        ]
        return notes


class MarkedRows(Rows):
    """The rows of a file as reviewers left them: without bad ones, with edited texts.

    Args:
        path: The file.
        marks: The marks.
    """

    def __init__(self, path: Path, marks: Marks):
        super().__init__(path)
        self._marks = marks

    def located(self) -> Iterator[tuple[str, Any]]:
        """Yield ("FILE: row ID", row); see `Rows.located`."""
        for where, row in super().located():
            if (marked := self._marks.apply(row)) is not None:
                yield where, marked


class Text(NamedTuple):
    """A text of a row.

    Attributes:
        path: keys and indices that lead to it, joined by slashes.
        key: whose it is (`gpt`), or what (`question`).
        text: the text.
    """

    path: str
    key: str
    text: str


def texts(row: Any) -> list[Text]:
    """Return the texts of a row that readers use, whatever its format: also those in JSON within a text, as RLHF-V's."""
    found: list[Text] = []

    def walk(value: Any, path: tuple[str, ...], name: str) -> None:
        inner = _parsed(value) if path[-1:] == ("text",) else value
        if isinstance(inner, dict):
            role = inner.get("from", inner.get("role"))
            for key in sorted(inner.keys() & _ORDER.keys(), key=_ORDER.__getitem__):
                walk(inner[key], (*path, key), role if isinstance(role, str) else name if key == "text" else key)
        elif isinstance(inner, list):
            for index, item in enumerate(inner):
                walk(item, (*path, str(index)), name)
        elif isinstance(inner, str | int | float) and not isinstance(inner, bool) and path:
            found.append(Text("/".join(path), name or path[-1], str(inner)))

    walk(row, (), "")
    return found


def edit(row: Any, edits: Mapping[str, str]) -> Any:
    """Return a copy of a row with other texts.

    Args:
        row: The row.
        edits: New texts by `Text.path`.

    Raises:
        LookupError: The row has no such text; the message is its path.
    """
    for path, text in edits.items():
        try:
            row = _replace(row, path.split("/"), text)
        except (LookupError, TypeError, ValueError):
            raise LookupError(path) from None
    return row


def _replace(value: Any, path: list[str], text: str) -> Any:
    if not path:
        return text
    key, *rest = path
    if isinstance(value, str):
        return json.dumps(_replace(json.loads(value), path, text), ensure_ascii=False)
    if isinstance(value, list):
        return [*value[: int(key)], _replace(value[int(key)], rest, text), *value[int(key) + 1 :]]
    return {**value, key: _replace(value[key], rest, text)}


def _parsed(value: Any) -> Any:
    """Return the object that a text holds as JSON, or the text itself."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, dict) else value
    return value


def canonical(row: Any) -> str:
    """Return a row as JSON that does not depend on the order of its keys; images within it are their digests."""

    def plain(value: Any) -> str:
        return content_digest(value) if isinstance(value, bytes) else str(value)

    return json.dumps(row, sort_keys=True, default=plain, separators=(",", ":"))


def row_digest(row: Any) -> str:
    """Return what identifies a row: 32 hexadecimal digits of its content, its id in the file included.

    Raises:
        RecursionError: It is nested too deep.
    """
    return content_digest(canonical(row).encode())


def is_cut_off(line: bytes) -> bool:
    """Return whether a last line is only the beginning of a mark, as a kill or a full disk leaves it."""
    start = b'{"row":"'
    try:
        Mark.model_validate_json(line)
    except pydantic.ValidationError:
        return line[: len(start)] == start[: len(line)]
    return False
