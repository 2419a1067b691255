"""Several annotation files as one set of records: a picture's talk from all of them becomes one record.

Rows pass through one by one into a database beside the records, so that memory holds none of them.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple

import pydantic

from reverie_jax.data import sources
from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.images import within
from reverie_jax.data.sources import Example, Pictures, ReadLog, opened
from reverie_jax.data.sources.common import content_name
from reverie_jax.errors import DataError, UserError


class MixtureEntry(pydantic.BaseModel):
    """One file of a mixture.

    Attributes:
        file: annotations.
        images: folder that its image names are relative to; `images` beside the file by default.
        cap: most of its conversations; which ones depends on the seed and their content, not their order. Pairs stay whole.
        weight: multiplies its loss.
        filtered: of the annotation pipeline's rows, those that the judge keeps.
        splits: of rows that name their split, these.
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
        return self.images or self.file.parent / "images"

    def talks(self, log: ReadLog) -> Iterator[Example]:
        """The file's talk; see `sources.read`."""
        return sources.read(self.file, log, filtered=self.filtered, splits=self.splits)


def read_parts(path: Path) -> list[MixtureEntry]:
    """A mixture file: a JSON list of parts; their paths are relative to the file.

    Raises:
        UserError: it is none.
    """
    try:
        parts = pydantic.TypeAdapter(list[MixtureEntry]).validate_json(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'not a mixture'}: {first['msg']}") from None
    beside = [
        part.model_copy(
            update={
                "file": path.parent / part.file,
                "images": None if part.images is None else path.parent / part.images,
            }
        )
        for part in parts
    ]
    if not beside:
        raise UserError(f"{path}: names no file")
    return beside


class _Row(NamedTuple):
    """A record before its picture is read. `stat` changes with the picture's file; of one within a file, it says where."""

    id: str
    file: str
    encoded: bytes
    stat: str
    talks: str


class Mixture:
    """Records of several files, in the order of their pictures' first rows; those without a picture last. Close it.

    Args:
        parts: (talk, folder of its pictures, cap, weight) of each file.
        store: database file; in memory or a temporary file by default.
        seed: for caps.
        side: pictures with a longer one are scaled down; all stay as they are by default.
        told: gets the number of rows read so far, now and then.

    Raises:
        DataError: a picture's name is none, or shown where no folder was named.
    """

    def __init__(
        self,
        parts: Iterable[tuple[Iterable[Example], Pictures | None, int | None, float]],
        store: Path | None = None,
        *,
        seed: int = 0,
        side: int | None = None,
        on_progress: Callable[[int], object] = lambda count: None,
    ):
        self._side = side
        if store is not None:
            store.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(store or "", check_same_thread=False, isolation_level=None)
        try:
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN")
            self._read(parts, seed, on_progress)
        except sqlite3.Error as error:
            self.close()
            raise DataError(f"{store or 'a temporary file'}: cannot be written ({error})") from None
        except BaseException:
            self.close()
            raise

    def _read(self, parts: Iterable[Any], seed: int, on_progress: Callable[[int], object]) -> None:
        count = 0
        for number, (talks, pictures, cap, weight) in enumerate(parts):
            for talk in talks:
                picture = None
                if talk.encoded:
                    key = f"within {content_name(talk.encoded)}"
                    picture = self._picture(key, talk.image, talk.encoded, talk.where)
                elif talk.image and pictures is None:
                    raise DataError(f"{talk.where}: shows {talk.image}; name the folder of pictures")
                elif talk.image:
                    file = pictures.find(talk.image)
                    stat = file.stat()
                    picture = self._picture(str(file), talk.image, b"", f"{stat.st_size} {stat.st_mtime_ns}")
                words = talk.conversation.pair or json.dumps(talk.conversation.to_json())
                draw = content_name(f"{seed} {'' if talk.encoded else talk.image} {words}".encode())
                said = json.dumps(_weighted(talk.conversation, weight).to_json(), separators=(",", ":"))
                self._db.execute(
                    "INSERT INTO talks (part, picture, place, draw, pair, said) VALUES (?, ?, ?, ?, ?, ?)",
                    (number, picture, talk.where, draw, bool(talk.conversation.pair), said),
                )
                count += 1
                if count % 1000 == 0:
                    on_progress(count)
            if cap is not None:
                self._db.execute(
                    "DELETE FROM talks WHERE part = ? AND id NOT IN"
                    " (SELECT id FROM talks WHERE part = ? ORDER BY draw, id LIMIT ?)",
                    (number, number, cap),
                )
                self._db.execute(
                    "DELETE FROM talks WHERE part = ? AND pair AND draw IN"
                    " (SELECT draw FROM talks WHERE part = ? AND pair GROUP BY draw HAVING count(*) % 2)",
                    (number, number),
                )
        on_progress(count)
        self._db.execute("DELETE FROM pictures WHERE id NOT IN (SELECT picture FROM talks WHERE picture NOT NULL)")
        self._db.executescript(_ORDER)
        (self._records,) = self._db.execute("SELECT count(*) FROM records").fetchone()
        (self.conversations,) = self._db.execute("SELECT count(*) FROM talks").fetchone()

    def _picture(self, key: str, name: str, encoded: bytes, stat: str = "") -> int:
        found = self._db.execute("SELECT id FROM pictures WHERE key = ?", (key,)).fetchone()
        if found is None:
            made = self._db.execute(
                "INSERT INTO pictures (key, name, encoded, stat) VALUES (?, ?, ?, ?)", (key, name, encoded, stat)
            )
            return int(made.lastrowid or 0)
        return int(found[0])

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Mixture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._records

    def talks(self) -> Iterator[tuple[str, Conversation]]:
        """(picture's name, conversation), in the order of the rows; no picture is read."""
        rows = self._db.cursor().execute(
            "SELECT coalesce(name, ''), said FROM talks LEFT JOIN pictures ON pictures.id = picture ORDER BY talks.id"
        )
        for name, said in rows:
            yield name, Conversation.from_json(json.loads(said))

    def _row(self, index: int) -> _Row:
        with self._lock:
            picture, talk = self._db.execute(
                "SELECT picture, talk FROM records WHERE number = ?", (index + 1,)
            ).fetchone()
            if picture is None:
                said, place = self._db.execute("SELECT said, place FROM talks WHERE id = ?", (talk,)).fetchone()
                return _Row(place, "", b"", "", f"[{said}]")
            key, name, encoded, stat, same = self._db.execute(
                "SELECT key, name, encoded, stat, (SELECT min(id) FROM pictures AS o WHERE o.name = p.name) != p.id"
                " FROM pictures AS p WHERE id = ?",
                (picture,),
            ).fetchone()
            rows = self._db.execute("SELECT said FROM talks WHERE picture = ? ORDER BY id", (picture,)).fetchall()
        # Two files that a mixture calls by one name are told apart by their places.
        return _Row(key if same else name, "" if encoded else key, encoded, stat, f"[{','.join(r[0] for r in rows)}]")

    def __getitem__(self, index: int) -> ImageRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self._row(index % len(self))
        if row.encoded:
            encoded = opened(row.encoded, f"{row.stat}: {row.id}")
        elif row.file:
            try:
                encoded = opened(Path(row.file).read_bytes(), row.file)
            except OSError as error:
                raise DataError(f"{row.file}: cannot be read ({error.strerror})") from None
        else:
            encoded = b""
        if encoded and self._side is not None:
            encoded = within(encoded, row.id, self._side)
        return ImageRecord.from_parts(row.id, encoded, row.talks)

    def digest(self, start: int, stop: int) -> str:
        """A name for the content of these records: their pictures' files by place, size and time, and all that is said."""
        found = hashlib.blake2b(str(self._side).encode(), digest_size=16)
        for index in range(start, stop):
            row = self._row(index)
            found.update(repr((row.id, row.file, row.stat, content_name(row.encoded), row.talks)).encode())
        return found.hexdigest()


def mixture(
    parts: Sequence[MixtureEntry],
    log: ReadLog,
    store: Path | None = None,
    *,
    seed: int = 0,
    side: int | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Mixture:
    """The records of a mixture's files.

    Args:
        reading: gets notes, and rows that cannot be used.

    Raises:
        DataError: a file, a row or a picture's name cannot be used; the first is named.
    """

    def read(part: MixtureEntry) -> Iterator[Example]:
        yield from part.talks(log)
        log.settle()

    folders = [Pictures(part.folder) if part.folder.is_dir() else None for part in parts]
    for part, folder in zip(parts, folders, strict=True):
        if folder is None and part.images is not None:
            raise DataError(f"{part.images}: no such folder of pictures")
    return Mixture(
        [(read(part), folder, part.cap, part.weight) for part, folder in zip(parts, folders, strict=True)],
        store,
        seed=seed,
        side=side,
        on_progress=on_progress,
    )


def _weighted(talk: Conversation, weight: float) -> Conversation:
    if weight == 1:
        return talk
    turns = [type(turn)(turn.role, turn.text, turn.weight * weight) for turn in talk.turns]
    return type(talk)(tuple(turns), talk.images, talk.dataset, talk.kind, talk.pair)


_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -65536;
CREATE TABLE pictures (id INTEGER PRIMARY KEY, key TEXT UNIQUE, name TEXT, encoded BLOB, stat TEXT);
CREATE TABLE talks (id INTEGER PRIMARY KEY, part INTEGER, picture INTEGER, place TEXT, draw TEXT, pair INTEGER, said TEXT);
"""
_ORDER = """
CREATE INDEX by_picture ON talks (picture, id);
CREATE INDEX by_name ON pictures (name, id);
CREATE TABLE records (number INTEGER PRIMARY KEY, picture INTEGER, talk INTEGER);
INSERT INTO records (picture) SELECT picture FROM talks WHERE picture NOT NULL GROUP BY picture ORDER BY min(id);
INSERT INTO records (talk) SELECT id FROM talks WHERE picture IS NULL ORDER BY id;
"""
