"""The samples of annotation files, indexed once in a database, so that large files open fast and pages stay small."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.reflection import classify_question
from reverie_jax.data.sources import Example, Format, ImageFolder, Rows, detect_format, read_row
from reverie_jax.data.sources.annotated import VERDICT
from reverie_jax.data.sources.common import content_digest
from reverie_jax.data.sources.marks import RowMarks, canonical, texts
from reverie_jax.errors import DataError

MARKS = ("unmarked", "good", "bad", "edited", "with a note", "disputed", "unusable")
CHOICES = ("source", "kind", "type", "verdict")
"""Columns with few values, to filter by."""


class Filters(pydantic.BaseModel):
    """Which samples to show; what is empty or None does not matter.

    Attributes:
        source: name of the annotation file.
        kind: kinds of rationales, or of a pair's sides.
        type: type of the question.
        verdict: of the judge.
        mark: one of `MARKS`, as the reviewer sees it.
        least: fewest words.
        most: most words.
    """

    model_config = pydantic.ConfigDict(extra="ignore")

    source: str = ""
    kind: str = ""
    type: str = ""
    verdict: str = ""
    mark: str = ""
    least: int | None = pydantic.Field(default=None, ge=0, lt=2**63)
    most: int | None = pydantic.Field(default=None, ge=0, lt=2**63)

    @pydantic.field_validator("least", "most", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    def sql(self) -> tuple[str, list[Any]]:
        """Return a condition, and its parameters."""
        parts = {f"{name} = ?": getattr(self, name) for name in CHOICES if getattr(self, name)}
        parts |= {"words >= ?": self.least} if self.least is not None else {}
        parts |= {"words <= ?": self.most} if self.most is not None else {}
        marked = {
            "": "1",
            "unmarked": "coalesce(mark, '') = ''",
            "edited": "edited",
            "with a note": "noted",
            "disputed": "disputed",
            "unusable": "problem != ''",
        }.get(self.mark)
        parts |= {"mark = ?": self.mark} if marked is None else {}
        return " AND ".join([marked or "1", *parts]), list(parts.values())


@dataclasses.dataclass(frozen=True)
class Source:
    """An annotation file.

    Attributes:
        path: the file.
        folder: the folder of its images; None without one.
        form: its format.
        name: how pages call it.
    """

    path: Path
    folder: ImageFolder | None
    form: Format
    name: str


class Sample(NamedTuple):
    """A row of an annotation file, as the index has it.

    Attributes:
        number: its number in the index, from 1.
        file: number of its source.
        position: its number in the file, from 0.
        where: its place in the file, as `row 7`.
        digest: identifies its content (`row_digest`).
        source: name of the file.
        image: name of the image; empty without one.
        embedded: whether the file contains the image.
        kind: kinds of its rationales, or of a pair's sides.
        type: type of its question.
        verdict: of the judge; empty without one.
        words: number of words of its texts.
        problem: why it cannot be used; empty if it can.
        content: the row as JSON, without an embedded image.
    """

    number: int
    file: int
    position: int
    where: str
    digest: str
    source: str
    image: str
    embedded: int
    kind: str
    type: str
    verdict: str
    words: int
    problem: str
    content: str


class Index:
    """The samples of annotation files, in their order.

    Args:
        entries: (file, folder of its images or None) of each.
        store: File to keep the index in, for the next time; a temporary one by default.
        on_progress: Gets the number of rows read so far, now and then.

    Raises:
        DataError: A file or folder cannot be read, or no row is a sample.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Path, Path | None]],
        store: Path | None = None,
        on_progress: Callable[[int], object] = lambda count: None,
    ):
        names = [path.name for path, _ in entries]
        self.sources = [
            Source(
                path,
                None if folder is None else ImageFolder(folder),
                detect_format(Rows(path)),
                path.name if names.count(path.name) == 1 else str(path),
            )
            for path, folder in entries
        ]
        self._lock = threading.Lock()
        self._db = self._open(store, on_progress)
        self._db.executescript(_MARKS)
        self.total = self.count(Filters())
        if not self.total:
            raise DataError(f"{', '.join(map(str, (source.path for source in self.sources)))}: no row to review")
        self.choices = {name: self._values(name) for name in CHOICES}

    def _open(self, store: Path | None, on_progress: Callable[[int], object]) -> sqlite3.Connection:
        """Return the index that an earlier run wrote, if the files are as they were; a new one otherwise."""
        stats = [(str(source.path.resolve()), source.path.stat()) for source in self.sources]
        about = repr([importlib.metadata.version("reverie-jax"), *((p, s.st_size, s.st_mtime_ns) for p, s in stats)])
        if store is not None and store.exists():
            database = sqlite3.connect(store, check_same_thread=False, isolation_level=None)
            with contextlib.suppress(sqlite3.Error):
                if database.execute("SELECT content FROM about").fetchall() == [(about,)]:
                    return database
            database.close()
        # A name of its own: another reviewer may start at the same time, or still use the old index.
        part = "" if store is None else tempfile.mkstemp(prefix=f"{store.name}.", dir=store.parent)[1]
        try:
            database = sqlite3.connect(part, check_same_thread=False, isolation_level=None)
            self._write(database, about, on_progress)
            if store is not None:
                os.replace(part, store)
        except BaseException:
            if part:
                os.unlink(part)
            raise
        return database

    def _write(self, database: sqlite3.Connection, about: str, on_progress: Callable[[int], object]) -> None:
        database.executescript(_SCHEMA)
        database.execute("BEGIN")
        for number, row in enumerate(self._rows(), 1):
            database.execute(f"INSERT INTO samples VALUES ({', '.join('?' * 13)})", (number, *row[:-1]))
            database.execute("INSERT INTO contents VALUES (?, ?)", (number, row[-1]))
            if number % 1000 == 0:
                on_progress(number)
        database.execute("INSERT INTO about VALUES (?)", (about,))
        database.execute("COMMIT")
        database.execute("CREATE INDEX by_digest ON samples (digest)")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the fields of each sample, but for its number."""
        for file, source in enumerate(self.sources):
            for position, (where, row) in enumerate(Rows(source.path).located()):
                examples, problem = read_row(source.form, source.path, where, row)
                if not examples and not problem:
                    continue  # of another split
                try:
                    content, shown = canonical(row), texts(row)
                except RecursionError:  # listed, as it cannot be used; there is no text to show
                    content, shown = "{}", []
                verdict = str(row.get(VERDICT, "")).strip().lower() if isinstance(row, dict) else ""
                yield (
                    *(file, position, where.removeprefix(f"{source.path}: "), content_digest(content.encode())),
                    *(source.name, examples[0].image if examples else "", bool(examples and examples[0].encoded)),
                    *(_kind(examples), _type(examples), {"no": "accepted", "": ""}.get(verdict, "dropped")),
                    *(sum(len(text.text.replace(IMAGE, " ").split()) for text in shown), problem, content),
                )

    def _query(self, sql: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, tuple(values)).fetchall()

    def _values(self, column: str) -> dict[str, int]:
        rows = self._query(
            f"SELECT {column}, count(*) FROM samples WHERE {column} != '' GROUP BY 1 ORDER BY min(number)"
        )
        return dict(rows)

    def count(self, filters: Filters, before: int | None = None) -> int:
        """Return the number of samples, or of those before a number."""
        where, values = filters.sql()
        limit = "" if before is None else f" AND number < {before}"
        return int(self._query(f"SELECT count(*) FROM {_JOINED} WHERE {where}{limit}", values)[0][0])

    def numbers(self, verdict: str) -> list[int]:
        """Return the numbers of the samples that a judge accepted or dropped, or of those that none judged (empty)."""
        return [number for (number,) in self._query("SELECT number FROM samples WHERE verdict = ?", [verdict])]

    def page(self, filters: Filters, size: int, *, after: int = 0, before: int | None = None) -> list[Sample]:
        """Return the first samples after a number, or the last ones before one.

        A page is found by number, not by how many come before it: marks change which samples a filter shows.
        """
        where, values = filters.sql()
        limit = f"number > {after} ORDER BY number" if before is None else f"number < {before} ORDER BY number DESC"
        sql = f"SELECT samples.*, content FROM {_JOINED} JOIN contents USING (number) WHERE {where} AND {limit} LIMIT {size}"
        return [Sample(*row) for row in self._query(sql, values)][:: 1 if before is None else -1]

    def find(self, number: int) -> Sample | None:
        """Return a sample; None if there is none of this number."""
        found = self.page(Filters(), 1, after=number - 1)
        return found[0] if found and found[0].number == number else None

    def row(self, sample: Sample) -> Any:
        """Return the row of a sample, its image included if the file contains it.

        Raises:
            DataError: The file, which contains the image, cannot be read any more.
        """
        path = self.sources[sample.file].path
        return Rows(path).parquet_row(sample.position) if sample.embedded else json.loads(sample.content)

    def examples(self, sample: Sample, row: Any) -> tuple[list[Example], str]:
        """Return the examples of a sample's row, edited or not, and why it cannot be used."""
        source = self.sources[sample.file]
        return read_row(source.form, source.path, f"{source.path}: {sample.where}", row)

    def image(self, sample: Sample) -> bytes:
        """Return the image of a sample.

        Raises:
            DataError: It has none, is not in its folder, or cannot be read.
        """
        folder = self.sources[sample.file].folder
        if sample.embedded:
            return next((example.encoded for example in self.examples(sample, self.row(sample))[0]), b"")
        if not sample.image or folder is None:
            raise DataError(f"{sample.where}: no image, or no folder of images; name it with --images")
        file = folder.find(sample.image)
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from None

    def set_marks(self, changed: Iterable[tuple[str, RowMarks]], reviewer: str) -> None:
        """Update what filters know of marks: (digest, marks) of rows."""
        rows = [
            (digest, row.marks.get(reviewer, ""), bool(row.edits), bool(row.notes), row.is_disputed)
            for digest, row in changed
        ]
        with self._lock:
            self._db.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?, ?)", rows)


def _kind(examples: Sequence[Example]) -> str:
    return " and ".join(sorted({example.conversation.kind or "no rationale" for example in examples}))


def _type(examples: Sequence[Example]) -> str:
    turns = [turn.text for example in examples[:1] for turn in example.conversation.turns[:2]]
    return classify_question(turns[0].replace(IMAGE, "").strip(), turns[1]) if len(turns) == 2 else ""


_JOINED = "samples LEFT JOIN marks USING (digest)"
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE samples (number INTEGER PRIMARY KEY, file INTEGER, position INTEGER, place TEXT, digest TEXT, source TEXT,
    image TEXT, embedded INTEGER, kind TEXT, type TEXT, verdict TEXT, words INTEGER, problem TEXT);
CREATE TABLE contents (number INTEGER PRIMARY KEY, content TEXT);
CREATE TABLE about (content TEXT);
"""
_MARKS = "CREATE TEMP TABLE marks (digest TEXT PRIMARY KEY, mark TEXT, edited INTEGER, noted INTEGER, disputed INTEGER)"
