"""Journal: a SQLite file of every request and reply, so that a paid reply is never lost and never requested again.

A request is recorded before it is sent, and its reply as soon as it arrives. Requests are identified by their content
(image, question, prompt, model), never by their position in a list.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reverie_jax.errors import UserError
from reverie_jax.hosted.identity import RequestIdentity, digest_bytes
from reverie_jax.hosted.interface import Reply
from reverie_jax.hosted.thoughts import split_thoughts

ORIGINAL = "original"
"""Provider of replies adopted from the output of REVERIE's own scripts."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY,
    item TEXT NOT NULL,           -- identity: content, provider, model, prompt
    content TEXT NOT NULL,        -- digest of the content alone
    stage TEXT NOT NULL,
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,         -- version of the prompt
    state TEXT NOT NULL,          -- sent, usable, unusable, failed, lost
    reason TEXT NOT NULL DEFAULT '',
    reply TEXT,                   -- raw
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    price REAL NOT NULL DEFAULT 0,
    version TEXT NOT NULL DEFAULT '',
    started REAL NOT NULL,
    seconds REAL,
    batch TEXT                    -- label of its batch
);
CREATE INDEX IF NOT EXISTS by_item ON attempts (item, state);
CREATE INDEX IF NOT EXISTS by_content ON attempts (content, state);
CREATE TABLE IF NOT EXISTS batches (
    label TEXT PRIMARY KEY,
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    name TEXT,                    -- the provider's; NULL while unknown
    state TEXT NOT NULL,          -- open, ended
    started REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS pictures (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, digest TEXT);
PRAGMA user_version = 2;
"""


class RecordedReply(NamedTuple):
    """The words of a usable reply, without thoughts; `started` is the request's time (Unix seconds)."""

    text: str
    version: str
    started: float


class Spent(NamedTuple):
    """Sums over attempts; `price` is in the currency of the price list."""

    requests: int
    tokens_in: int
    tokens_out: int
    price: float


class OpenBatch(NamedTuple):
    """A submitted batch whose results were not collected; `name` (the provider's) is None while unknown."""

    label: str
    provider: str
    model: str
    name: str | None


class JournalReader:
    """Read a journal without locking it; another process may be writing.

    Raises:
        UserError: The file is missing or not a journal.
    """

    _db: sqlite3.Connection

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such journal to replay")
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            self.find_reply("")
        except sqlite3.Error as error:
            self._db.close()
            raise UserError(f"{path}: not a journal to replay ({error})") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def find_reply(self, content: str) -> RecordedReply | None:
        """Return the first usable reply of any model to a content."""
        return self._first_reply("content = ?", content)

    def get_reply(self, identity: RequestIdentity) -> RecordedReply | None:
        """Return the first usable reply to a request, or one adopted from the original scripts' output."""
        where = "(item = ? OR (content = ? AND provider = 'original'))"
        return self._first_reply(where, identity.key, identity.content)

    def _first_reply(self, where: str, *values: str) -> RecordedReply | None:
        query = f"SELECT reply, version, started FROM attempts WHERE state = 'usable' AND {where} ORDER BY id"
        for text, version, started in self._db.execute(query, values):
            if words := split_thoughts(text)[1]:
                return RecordedReply(words, version, started)
        return None


class Journal(JournalReader):
    """A journal open for writing, by one process at a time.

    Args:
        path: Created if missing.

    Attributes:
        lost: Requests that were in flight when the last run was killed; only these are paid for twice.

    Raises:
        UserError: Another process uses it, or the file is not a journal.
    """

    def __init__(self, path: Path):
        self.path, self._new, self._new_folder = path, False, not path.parent.exists()
        new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115  (locked until `close`)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if not isinstance(error, BlockingIOError):  # some network file systems have no locks
                raise UserError(f"{path}: cannot be locked ({error.strerror}); name a folder on another disk") from None
            raise UserError(f"{path}: another run is using this folder; wait for it or stop it") from None
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            self._lock.close()
            raise UserError(f"{path}: cannot be opened ({error})") from None
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a journal, or broken ({reason}); move it away") from None
        except UserError:
            self.close()
            raise
        self._new = new

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a paid reply survives a power cut
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 2):
            raise UserError(f"{self.path}: written by another version of reverie-jax; use that one, or another folder")
        self._db.executescript(_SCHEMA)
        if (check := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(check)
        self.lost = self._db.execute(
            "UPDATE attempts SET state = 'lost', reason = 'in flight when the run ended' WHERE state = 'sent'"
            " AND batch IS NULL"
        ).rowcount

    def close(self) -> None:
        """Close the file and release its lock; a new journal that nothing was recorded in is removed."""
        unused, self._new = self._new and self.is_empty(), False
        super().close()
        if unused:
            for path in (self.path, Path(self._lock.name)):
                path.unlink(missing_ok=True)
            if self._new_folder:
                with contextlib.suppress(OSError):  # somebody else's files are in it
                    self.path.parent.rmdir()
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Read or write.

        Raises:
            UserError: The disk is full, or the file is gone or broken.
        """
        try:
            return self._db.execute(sql, values)
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path}: cannot be written ({error}); the run is stopped, nothing recorded is lost"
            ) from None

    def record_request(self, identity: RequestIdentity, batch: str | None = None) -> int:
        """Record that a request is about to be sent, alone or in a batch, and return the attempt's number."""
        names = (identity.stage, identity.provider, identity.model, identity.prompt)
        cursor = self._execute(
            "INSERT INTO attempts (item, content, stage, provider, model, prompt, state, started, batch)"
            " VALUES (?, ?, ?, ?, ?, ?, 'sent', ?, ?)",
            (identity.key, identity.content, *names, time.time(), batch),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def record_result(
        self, attempt: int, state: str, reply: Reply | None = None, *, price: float = 0.0, reason: str = ""
    ) -> None:
        """Record the result of an attempt: usable, unusable (a reply that cannot be used) or failed (no reply)."""
        text = None if reply is None else reply.text
        reply = reply or Reply("")
        values = (state, reason.encode("utf-8", "replace").decode(), text, reply.tokens_in, reply.tokens_out)
        self._execute(
            "UPDATE attempts SET state = ?, reason = ?, reply = ?, tokens_in = ?, tokens_out = ?, version = ?, price = ?,"
            " seconds = ? - started WHERE id = ?",
            (*values, reply.version, price, time.time(), attempt),
        )

    def adopt(self, identity: RequestIdentity, reply: str) -> bool:
        """Record a reply from the original scripts' output, if the request has none; return whether it was recorded.

        It counts for every model and prompt; a verdict counts for the named judge only.
        """
        missing = self.get_reply(identity) is None
        if missing:
            if identity.stage != "judge":
                identity = RequestIdentity(identity.stage, identity.content, ORIGINAL, "", "")
            self.record_result(self.record_request(identity), "usable", Reply(reply, version=ORIGINAL))
        return missing

    def has_usable(self, identity: RequestIdentity) -> bool:
        """Return whether any request of the same stage, model and prompt has a usable reply."""
        query = (
            "SELECT 1 FROM attempts WHERE state = 'usable' AND stage = ? AND provider = ? AND model = ? AND prompt = ?"
            " LIMIT 1"
        )
        values = (identity.stage, identity.provider, identity.model, identity.prompt)
        return self._execute(query, values).fetchone() is not None

    def is_original(self, identity: RequestIdentity) -> bool:
        """Return whether a request's reply was adopted from the original scripts' output."""
        query = "SELECT 1 FROM attempts WHERE content = ? AND provider = ?"
        return self._execute(query, (identity.content, ORIGINAL)).fetchone() is not None

    def is_empty(self) -> bool:
        """Return whether the journal has no attempts."""
        return self._execute("SELECT 1 FROM attempts LIMIT 1").fetchone() is None

    def spent(self) -> Spent:
        """Return the sums over all attempts, adopted replies excluded."""
        row = self._execute(
            "SELECT COUNT(*), TOTAL(tokens_in), TOTAL(tokens_out), TOTAL(price) FROM attempts"
            " WHERE version != 'original'"
        ).fetchone()
        return Spent(int(row[0]), int(row[1]), int(row[2]), float(row[3]))

    def mean_tokens(self) -> dict[str, tuple[float, float]]:
        """Return the mean (input, output) tokens of a request by stage; stages without a counted reply are left out."""
        rows = self._execute(
            "SELECT stage, AVG(tokens_in), AVG(tokens_out) FROM attempts WHERE tokens_in > 0 GROUP BY stage"
        )
        return {stage: (tokens_in, tokens_out) for stage, tokens_in, tokens_out in rows}

    def image_digest(self, path: Path) -> str:
        """Return the digest of a file's bytes (see `digest_bytes`); the file is read only if it changed."""
        stat, name = path.stat(), os.fspath(path.resolve())
        row = self._execute("SELECT size, changed, digest FROM pictures WHERE path = ?", (name,)).fetchone()
        if row is not None and row[:2] == (stat.st_size, stat.st_mtime_ns):
            return str(row[2])
        value = digest_bytes(path.read_bytes())
        self._execute(
            "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?)", (name, stat.st_size, stat.st_mtime_ns, value)
        )
        return value

    def record_batch(self, label: str, provider: str, model: str, identities: Iterable[RequestIdentity]) -> None:
        """Record that a batch is about to be submitted, with its requests."""
        with self.transaction():
            self._execute(
                "INSERT INTO batches (label, provider, model, state, started) VALUES (?, ?, ?, 'open', ?)",
                (label, provider, model, time.time()),
            )
            for identity in identities:
                self.record_request(identity, label)

    def name_batch(self, label: str, name: str) -> None:
        """Record the provider's name of a submitted batch."""
        self._execute("UPDATE batches SET name = ? WHERE label = ?", (name, label))

    def end_batch(self, label: str, reason: str) -> None:
        """Record that a batch ended; its requests without a result failed for `reason`."""
        with self.transaction():
            self._execute("UPDATE batches SET state = 'ended' WHERE label = ?", (label,))
            self._execute(
                "UPDATE attempts SET state = 'failed', reason = ?, seconds = ? - started"
                " WHERE batch = ? AND state = 'sent'",
                (reason, time.time(), label),
            )

    def open_batches(self) -> list[OpenBatch]:
        """Return the batches that did not end, the oldest first."""
        query = "SELECT label, provider, model, name FROM batches WHERE state = 'open' ORDER BY started"
        return [OpenBatch(*row) for row in self._execute(query)]

    def pending(self, label: str) -> dict[str, tuple[int, str]]:
        """Return (attempt, stage) by identity key of a batch's requests without a result."""
        rows = self._execute("SELECT item, id, stage FROM attempts WHERE batch = ? AND state = 'sent'", (label,))
        return {key: (attempt, stage) for key, attempt, stage in rows}

    def pending_keys(self) -> set[str]:
        """Return the identity keys of all requests in open batches."""
        rows = self._execute("SELECT item FROM attempts WHERE batch NOT NULL AND state = 'sent'")
        return {key for (key,) in rows}

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Group many small writes into one transaction."""
        self._execute("BEGIN")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # on a full disk it is undone already
                self._db.execute("ROLLBACK")
            raise
        self._execute("COMMIT")
