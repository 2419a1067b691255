"""One SQLite file that remembers every request and every reply: a paid reply is never lost, and never asked for again.

An attempt is written down before its request leaves, and its reply as soon as it is there. Items are known by their content
(picture, question, prompt, model), never by their place in a list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Reply, digest

ORIGINAL = "original"
"""Stands for REVERIE's own scripts."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY,
    item TEXT NOT NULL,           -- what was asked of whom: content, prompt, model
    content TEXT NOT NULL,        -- what was asked: content alone
    stage TEXT NOT NULL,
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,         -- version of the prompt
    state TEXT NOT NULL,          -- sent, usable, unusable, failed, lost
    reason TEXT NOT NULL DEFAULT '',
    reply TEXT,                   -- raw, as it came
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    price REAL NOT NULL DEFAULT 0,
    version TEXT NOT NULL DEFAULT '',
    started REAL NOT NULL,
    seconds REAL,
    batch TEXT                    -- label of the batch that it went with
);
CREATE INDEX IF NOT EXISTS by_item ON attempts (item, state);
CREATE INDEX IF NOT EXISTS by_content ON attempts (content, state);
CREATE TABLE IF NOT EXISTS batches (
    label TEXT PRIMARY KEY,
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    name TEXT,                    -- the provider's; NULL while it is not known
    state TEXT NOT NULL,          -- open, ended
    started REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS pictures (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, digest TEXT);
PRAGMA user_version = 2;
"""


@dataclasses.dataclass(frozen=True)
class Item:
    """What is asked of whom.

    Attributes:
        content: digest of stage, picture and fields; the same whoever is asked, in whatever words.
        prompt: version of the prompt, with all that changes a reply (temperature and the like).
    """

    stage: str
    content: str
    provider: str
    model: str
    prompt: str

    @property
    def key(self) -> str:
        return digest(self.content, self.provider, self.model, self.prompt)


@dataclasses.dataclass(frozen=True)
class Spent:
    """Sums over attempts; price in the currency of the price list."""

    requests: int
    tokens_in: int
    tokens_out: int
    price: float


class Journal:
    """The file, held by one process at a time.

    Args:
        path: made where it is not.

    Raises:
        UserError: another process holds it, or it is no journal.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115  (held as long as the journal is)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{path}: another run is using this folder; wait for it or stop it") from None
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            self._lock.close()
            raise UserError(f"{path}: cannot be opened ({error})") from None
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # what was paid for outlives a power cut
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, 1, 2):
                raise UserError(f"{path}: written by a newer version of reverie-jax")
            columns = {row[1] for row in self._db.execute("PRAGMA table_info(attempts)")}
            if columns and "batch" not in columns:  # version 1
                self._db.execute("ALTER TABLE attempts ADD COLUMN batch TEXT")
            self._db.executescript(_SCHEMA)
            if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            self.lost = self._db.execute(
                "UPDATE attempts SET state = 'lost', reason = 'in flight when the run ended' WHERE state = 'sent'"
                " AND batch IS NULL"
            ).rowcount
            """Requests that were in flight when the last run was killed: the only ones that are paid for twice."""
        except sqlite3.Error as error:
            self.close()
            raise UserError(
                f"{path}: not a journal, or broken ({' '.join(str(error).split())}); move it away"
            ) from None
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sent(self, item: Item, batch: str | None = None) -> int:
        """Writes down that a request is about to leave, alone or with a batch; returns the attempt's number."""
        row = (item.key, item.content, item.stage, item.provider, item.model, item.prompt, "sent", time.time(), batch)
        cursor = self._db.execute(
            "INSERT INTO attempts (item, content, stage, provider, model, prompt, state, started, batch)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def done(
        self, attempt: int, state: str, reply: Reply | None = None, *, price: float = 0.0, reason: str = ""
    ) -> None:
        """Writes down how an attempt ended: usable, unusable (a reply without use) or failed (none)."""
        reply_text = None if reply is None else reply.text
        tokens = (0, 0, "") if reply is None else (reply.tokens_in, reply.tokens_out, reply.version)
        self._db.execute(
            "UPDATE attempts SET state = ?, reason = ?, reply = ?, tokens_in = ?, tokens_out = ?, version = ?, price = ?,"
            " seconds = ? - started WHERE id = ?",
            (
                state,
                reason.encode("utf-8", "replace").decode("utf-8"),
                reply_text,
                *tokens,
                price,
                time.time(),
                attempt,
            ),
        )

    def usable(self, item: Item) -> str | None:
        """The raw reply that an item got; or one that was taken over from the original scripts' output."""
        row = self._db.execute(
            "SELECT reply FROM attempts WHERE state = 'usable' AND (item = ? OR (content = ? AND provider = 'original'))"
            " ORDER BY id LIMIT 1",
            (item.key, item.content),
        ).fetchone()
        return None if row is None else row[0]

    def recorded(self, content: str) -> tuple[str, str] | None:
        """(reply, version) of anybody's usable reply to a content."""
        return self._db.execute(
            "SELECT reply, version FROM attempts WHERE state = 'usable' AND content = ? ORDER BY id LIMIT 1", (content,)
        ).fetchone()

    def adopt(self, item: Item, reply: str) -> bool:
        """Takes over a reply that the original scripts got, unless there is one.

        It counts for whoever is to be asked, and in whatever words; a verdict is that of the judge alone who is named.
        """
        missing = self.usable(item) is None
        if missing:
            kept = item if item.stage == "judge" else Item(item.stage, item.content, ORIGINAL, "", "")
            self.done(self.sent(kept), "usable", Reply(reply, version=ORIGINAL))
        return missing

    def original(self, item: Item) -> bool:
        """Whether an item's reply is the original scripts'."""
        return bool(
            self._db.execute(
                "SELECT 1 FROM attempts WHERE content = ? AND provider = ?", (item.content, ORIGINAL)
            ).fetchone()
        )

    def empty(self) -> bool:
        """Whether nothing was ever asked."""
        return self._db.execute("SELECT 1 FROM attempts LIMIT 1").fetchone() is None

    def why(self, item: Item) -> str:
        """The reason of an item's last unhappy attempt."""
        row = self._db.execute(
            "SELECT reason FROM attempts WHERE item = ? AND state != 'usable' ORDER BY id DESC LIMIT 1", (item.key,)
        ).fetchone()
        return "not asked" if row is None else row[0]

    def spent(self, stage: str | None = None) -> Spent:
        """Sums over all attempts, or a stage's."""
        where, values = ("", ()) if stage is None else (" AND stage = ?", (stage,))
        row = self._db.execute(
            "SELECT COUNT(*), TOTAL(tokens_in), TOTAL(tokens_out), TOTAL(price) FROM attempts"
            f" WHERE version != 'original'{where}",
            values,
        ).fetchone()
        return Spent(int(row[0]), int(row[1]), int(row[2]), float(row[3]))

    def mean_tokens(self, stage: str) -> tuple[float, float] | None:
        """(in, out) of an average reply of the stage; None where there is none that says."""
        row = self._db.execute(
            "SELECT AVG(tokens_in), AVG(tokens_out) FROM attempts WHERE stage = ? AND tokens_in > 0", (stage,)
        ).fetchone()
        return None if row[0] is None else (row[0], row[1])

    def picture(self, path: Path, read: Any) -> str:
        """The digest of a file's content, read again only if the file changed."""
        found = path.stat()
        name = os.fspath(path.resolve())
        row = self._db.execute("SELECT size, changed, digest FROM pictures WHERE path = ?", (name,)).fetchone()
        if row is not None and row[:2] == (found.st_size, found.st_mtime_ns):
            return str(row[2])
        made = str(read(path))
        self._db.execute(
            "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?)", (name, found.st_size, found.st_mtime_ns, made)
        )
        return made

    def batch_begins(self, label: str, provider: str, model: str, items: Iterable[Item]) -> None:
        """Writes down that a batch is about to leave, with its items."""
        with self.together():
            self._db.execute(
                "INSERT INTO batches (label, provider, model, state, started) VALUES (?, ?, ?, 'open', ?)",
                (label, provider, model, time.time()),
            )
            for item in items:
                self.sent(item, label)

    def batch_named(self, label: str, name: str) -> None:
        """The provider has it, and calls it so."""
        self._db.execute("UPDATE batches SET name = ? WHERE label = ?", (name, label))

    def batch_ended(self, label: str, reason: str) -> None:
        """Nothing more will come of a batch; its requests without a result failed."""
        with self.together():
            self._db.execute("UPDATE batches SET state = 'ended' WHERE label = ?", (label,))
            self._db.execute(
                "UPDATE attempts SET state = 'failed', reason = ?, seconds = ? - started"
                " WHERE batch = ? AND state = 'sent'",
                (reason, time.time(), label),
            )

    def batches(self) -> list[tuple[str, str, str, str | None]]:
        """(label, provider, model, name) of the batches under way."""
        return self._db.execute(
            "SELECT label, provider, model, name FROM batches WHERE state = 'open' ORDER BY started"
        ).fetchall()

    def in_batch(self, label: str) -> dict[str, tuple[int, str]]:
        """(attempt, stage) by item's key of a batch's requests that have no result yet."""
        rows = self._db.execute("SELECT item, id, stage FROM attempts WHERE batch = ? AND state = 'sent'", (label,))
        return {item: (attempt, stage) for item, attempt, stage in rows}

    def under_way(self) -> set[str]:
        """Keys of the items that are in a batch under way."""
        rows = self._db.execute("SELECT item FROM attempts WHERE batch NOT NULL AND state = 'sent'")
        return {item for (item,) in rows}

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Many small writes as one."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
