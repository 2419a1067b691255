"""Providers that need no network: anything that replies in memory, and a recorded run."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import AnnotationError, Annotator, Refused, Reply, Request
from reverie_jax.hosted.request_key import content


class Local:
    """An annotator in memory, asked as if it were far away."""

    def __init__(self, annotator: Annotator, model: str):
        self.name, self.model, self._annotator = annotator.name, model, annotator

    async def ask(self, request: Request) -> Reply:
        try:
            return Reply(self._annotator.reply(request), version=self.name)
        except AnnotationError as error:
            raise Refused(str(error)) from None

    async def close(self) -> None:
        pass


class Replay:
    """Replies of a journal, whoever gave them and in whatever words they were asked.

    Raises:
        UserError: there is no journal.
    """

    name = "replay"

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such journal to replay")
        self.model = str(path)
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            self._db.execute("SELECT reply, version, state, content FROM attempts LIMIT 1")
        except sqlite3.Error as error:
            self._db.close()
            raise UserError(f"{path}: not a journal to replay ({error})") from None

    async def ask(self, request: Request) -> Reply:
        row = self._db.execute(
            "SELECT reply, version FROM attempts WHERE state = 'usable' AND content = ? ORDER BY id LIMIT 1",
            (content(request),),
        ).fetchone()
        if row is None:
            raise Refused("not in the recording")
        return Reply(row[0], version=row[1])

    async def close(self) -> None:
        self._db.close()
