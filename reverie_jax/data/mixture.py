"""Merge several annotation files into one set of records: all conversations about an image become one record.

Rows pass one by one into a database beside the records; memory holds none of them.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, NamedTuple

import pydantic

from reverie_jax.data import sources
from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.images import downscale
from reverie_jax.data.sources import Example, ImageFolder, ReadLog, validate_image
from reverie_jax.data.sources.common import content_digest
from reverie_jax.data.sources.marks import Marks
from reverie_jax.errors import DataError, UserError
from reverie_jax.files import read_json


class MixtureEntry(pydantic.BaseModel):
    """One annotation file of a mixture.

    Attributes:
        file: the annotation file.
        images: folder that its image names are relative to; `images` beside the file by default.
        cap: maximum number of conversations; the seed and their content decide which, not their order. Pairs stay whole.
        weight: factor of its loss.
        filtered: of the annotation pipeline's rows, keep only those that the judge accepted.
        splits: of rows that name their split, keep only these.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    file: Path
    images: Path | None = None
    cap: pydantic.PositiveInt | None = None
    weight: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] = 1.0
    filtered: bool = True
    splits: tuple[str, ...] = ("train",)

    @property
    def folder(self) -> Path:
        """The image folder."""
        return self.images or self.file.parent / "images"

    def open_folder(self) -> ImageFolder | None:
        """Return the image folder; None if none was named and there is none beside the file.

        Raises:
            DataError: The folder that was named does not exist.
        """
        return None if self.images is None and not self.folder.is_dir() else ImageFolder(self.folder)

    def read(self, log: ReadLog, marks: Marks | None = None) -> Iterator[Example]:
        """Yield the file's examples; see `sources.read`.

        Raises:
            DataError: The file or one of its rows cannot be used.
        """
        yield from sources.read(self.file, log, filtered=self.filtered, splits=self.splits, marks=marks)
        log.raise_problems()


def read_mixture_file(path: Path) -> list[MixtureEntry]:
    """Return the entries of a mixture file, a JSON list; its paths are relative to the file.

    Raises:
        UserError: The file cannot be read, or an entry is invalid.
    """
    try:
        entries = pydantic.TypeAdapter(list[MixtureEntry]).validate_python(read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'mixture'}: {first['msg']}") from None
    if not entries:
        raise UserError(f"{path}: names no annotation file")
    for entry in entries:
        entry.file = path.parent / entry.file
        entry.images = None if entry.images is None else path.parent / entry.images
    return entries


class StoredRecord(NamedTuple):
    """A record before its image is read.

    Attributes:
        id: name of the image.
        path: the image's file; empty if there is none.
        encoded: the image, if the annotation file contains it.
        version: changes with the image's file; for an image in the annotation file, its row.
        conversations: as JSON text.
    """

    id: str
    path: str
    encoded: bytes
    version: str
    conversations: str


class StoredRecords(abc.ABC):
    """Records whose images are read when they are asked for; subclasses give `__len__` and `stored`.

    Args:
        max_side: Larger images are scaled down; all stay as they are by default.
    """

    def __init__(self, max_side: int | None = None):
        self._max_side = max_side

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def stored(self, index: int) -> StoredRecord:
        """Return a record before its image is read, by its number from 0."""

    def __getitem__(self, index: int) -> ImageRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        stored = self.stored(index % len(self))
        encoded = stored.encoded
        if encoded:
            validate_image(encoded, f"{stored.version}: {stored.id}")
        elif stored.path:
            try:
                encoded = validate_image(Path(stored.path).read_bytes(), stored.path)
            except OSError as error:
                raise DataError(f"{stored.path}: cannot be read ({error.strerror})") from None
        if encoded and self._max_side is not None:
            encoded = downscale(encoded, stored.id, self._max_side)
        return ImageRecord.from_parts(stored.id, encoded, stored.conversations)

    def digest(self, start: int, stop: int) -> str:
        """Return a digest of some records: their images' paths, sizes and times, and their conversations."""
        digest = hashlib.blake2b(str(self._max_side).encode(), digest_size=16)
        for index in range(start, stop):
            stored = self.stored(index)
            digest.update(repr((*stored._replace(encoded=b""), content_digest(stored.encoded))).encode())
        return digest.hexdigest()


class Mixture(StoredRecords):
    """The records of several annotation files, in the order of their images' first rows; those without an image last.

    To be closed, or used in a `with` statement.

    Args:
        entries: (examples, their image folder, cap, weight) of each file.
        store: Database file; in memory or a temporary file by default.
        seed: For caps.
        max_side: Larger images are scaled down; all stay as they are by default.
        on_progress: Gets the number of conversations read so far, now and then.

    Raises:
        DataError: An image cannot be found, or no folder was given for it.
    """

    def __init__(
        self,
        entries: Iterable[tuple[Iterable[Example], ImageFolder | None, int | None, float]],
        store: Path | None = None,
        *,
        seed: int = 0,
        max_side: int | None = None,
        on_progress: Callable[[int], object] = lambda count: None,
    ):
        super().__init__(max_side)
        if store is not None:
            store.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(store or "", check_same_thread=False, isolation_level=None)
        try:
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN")
            count = 0
            for number, (examples, folder, cap, weight) in enumerate(entries):
                for example in examples:
                    self._insert(number, example, folder, seed, weight)
                    count += 1
                    if count % 1000 == 0:
                        on_progress(count)
                if cap is not None:
                    self._apply_cap(number, cap)
            on_progress(count)
            self._db.executescript(_ORDER)
            self._records = self._count("records")
            self.image_count = self._count("records WHERE image NOT NULL")
            self.conversation_count = self._count("examples")
        except sqlite3.Error as error:
            self.close()
            raise DataError(f"{store or 'a temporary file'}: cannot be written ({error})") from None
        except BaseException:
            self.close()
            raise

    def _insert(self, entry: int, example: Example, folder: ImageFolder | None, seed: int, weight: float) -> None:
        image = None
        if example.encoded:
            key = f"embedded {content_digest(example.encoded)}"
            image = self._image_id(key, example.image, example.encoded, example.where)
        elif example.image and folder is None:
            raise DataError(f"{example.where}: has the image {example.image}; give the image folder, as FILE=FOLDER")
        elif example.image and folder is not None:
            try:
                file = folder.find(example.image)
                stat = file.stat()
            except (DataError, OSError) as error:
                raise DataError(f"{example.where}: {error}") from None
            image = self._image_id(str(file), example.image, b"", f"{stat.st_size} {stat.st_mtime_ns}")
        conversation = example.conversation
        content = conversation.pair or json.dumps(conversation.to_json())
        draw = content_digest(f"{seed} {'' if example.encoded else example.image} {content}".encode())
        text = json.dumps(_scale_weights(conversation, weight).to_json(), separators=(",", ":"))
        self._db.execute(
            "INSERT INTO examples (entry, image, location, draw, pair, conversation) VALUES (?, ?, ?, ?, ?, ?)",
            (entry, image, example.where, draw, bool(conversation.pair), text),
        )

    def _apply_cap(self, entry: int, cap: int) -> None:
        """Delete conversations beyond a cap, and the other side of pairs that it would split."""
        self._db.execute(
            "DELETE FROM examples WHERE entry = ? AND id NOT IN"
            " (SELECT id FROM examples WHERE entry = ? ORDER BY draw, id LIMIT ?)",
            (entry, entry, cap),
        )
        self._db.execute(
            "DELETE FROM examples WHERE entry = ? AND pair AND draw IN"
            " (SELECT draw FROM examples WHERE entry = ? AND pair GROUP BY draw HAVING count(*) % 2)",
            (entry, entry),
        )

    def _count(self, table: str) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def _image_id(self, key: str, name: str, encoded: bytes, version: str) -> int:
        row = self._db.execute("SELECT id FROM images WHERE key = ?", (key,)).fetchone()
        if row is not None:
            return int(row[0])
        insert = "INSERT INTO images (key, name, encoded, version) VALUES (?, ?, ?, ?)"
        return int(self._db.execute(insert, (key, name, encoded, version)).lastrowid or 0)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def __enter__(self) -> Mixture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._records

    def conversations(self) -> Iterator[tuple[str, Conversation]]:
        """Yield (image name, conversation), in the order of the rows; no image is read."""
        rows = self._db.cursor().execute(
            "SELECT coalesce(name, ''), conversation FROM examples LEFT JOIN images ON images.id = image"
            " ORDER BY examples.id"
        )
        for name, text in rows:
            yield name, Conversation.from_json(json.loads(text))

    def images(self) -> Iterator[tuple[int, str, str, bytes, str]]:
        """Yield (number, key, name, encoded, version) of each image, in order; also of those whose rows a cap drops."""
        yield from self._db.cursor().execute("SELECT id, key, name, encoded, version FROM images ORDER BY id")

    def examples(self) -> Iterator[tuple[int, str | None, str, str]]:
        """Yield (number, key of its image, location, conversation as JSON text) of each row, in order."""
        yield from self._db.cursor().execute(
            "SELECT examples.id, key, location, conversation FROM examples LEFT JOIN images ON images.id = image"
            " ORDER BY examples.id"
        )

    def stored(self, index: int) -> StoredRecord:
        """Return a record before its image is read."""
        with self._lock:
            query = "SELECT image, example FROM records WHERE number = ?"
            image, example = self._db.execute(query, (index + 1,)).fetchone()
            if image is None:
                query = "SELECT conversation, location FROM examples WHERE id = ?"
                text, location = self._db.execute(query, (example,)).fetchone()
                return StoredRecord(location, "", b"", "", f"[{text}]")
            key, name, encoded, version, ambiguous = self._db.execute(
                "SELECT key, name, encoded, version,"
                " (SELECT id FROM images AS other WHERE other.name = this.name"
                " AND EXISTS (SELECT 1 FROM examples WHERE image = other.id) ORDER BY id LIMIT 1) != this.id"
                " FROM images AS this WHERE id = ?",
                (image,),
            ).fetchone()
            query = "SELECT conversation FROM examples WHERE image = ? ORDER BY id"
            texts = ",".join(row[0] for row in self._db.execute(query, (image,)))
        # The first of two files that have the same name keeps it; the path identifies the other.
        return StoredRecord(key if ambiguous else name, "" if encoded else key, encoded, version, f"[{texts}]")


def read_mixture(
    entries: Sequence[MixtureEntry],
    log: ReadLog,
    store: Path | None = None,
    *,
    seed: int = 0,
    max_side: int | None = None,
    marks: Marks | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Mixture:
    """Read annotation files into a `Mixture`, which takes the other arguments.

    Args:
        entries: The files.
        log: Gets notes.
        store: Database file.
        seed: For caps.
        max_side: Larger images are scaled down.
        marks: Of reviewers; the log gets notes of what became of them.
        on_progress: Gets the number of conversations read so far.

    Raises:
        DataError: A file, a row or an image's name cannot be used; the message names the first.
    """
    folders = [entry.open_folder() for entry in entries]
    mixture = Mixture(
        (
            (entry.read(log, marks), folder, entry.cap, entry.weight)
            for entry, folder in zip(entries, folders, strict=True)
        ),
        store,
        seed=seed,
        max_side=max_side,
        on_progress=on_progress,
    )
    if marks is not None:
        log.notes += marks.notes()
    return mixture


def _scale_weights(conversation: Conversation, factor: float) -> Conversation:
    if factor == 1:
        return conversation
    turns = tuple(dataclasses.replace(turn, weight=turn.weight * factor) for turn in conversation.turns)
    return dataclasses.replace(conversation, turns=turns)


_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -65536;
CREATE TABLE images (id INTEGER PRIMARY KEY, key TEXT UNIQUE, name TEXT, encoded BLOB, version TEXT);
CREATE TABLE examples
    (id INTEGER PRIMARY KEY, entry INTEGER, image INTEGER, location TEXT, draw TEXT, pair INTEGER, conversation TEXT);
"""
_ORDER = """
CREATE INDEX by_image ON examples (image, id);
CREATE INDEX by_name ON images (name, id);
CREATE TABLE records (number INTEGER PRIMARY KEY, image INTEGER, example INTEGER);
INSERT INTO records (image) SELECT image FROM examples WHERE image NOT NULL GROUP BY image ORDER BY min(id);
INSERT INTO records (example) SELECT id FROM examples WHERE image IS NULL ORDER BY id;
"""
