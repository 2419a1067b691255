"""Providers that need no network: a model in memory, and a recorded run."""

from __future__ import annotations

from pathlib import Path

from reverie_jax.hosted.identity import request_digest
from reverie_jax.hosted.interface import AnnotationError, Annotator, Reply, Request, UnusableError
from reverie_jax.hosted.journal import JournalReader


class Local:
    """An annotator in memory as a provider."""

    def __init__(self, annotator: Annotator, model: str):
        self.name, self.model, self._annotator = annotator.name, model, annotator

    async def ask(self, request: Request) -> Reply:
        """Return the annotator's reply; see `Provider.ask`."""
        try:
            return Reply(self._annotator.reply(request), version=self.name)
        except AnnotationError as error:
            raise UnusableError(str(error)) from None

    async def close(self) -> None:
        """Do nothing: there are no connections."""


class Replay:
    """Replies of a journal, whichever model and prompt they came from.

    Raises:
        UserError: The journal is missing or broken.
    """

    name = "replay"

    def __init__(self, path: Path):
        self.model, self._journal = str(path), JournalReader(path)

    async def ask(self, request: Request) -> Reply:
        """Return the recorded reply; see `Provider.ask`."""
        recorded = self._journal.find_reply(request_digest(request))
        if recorded is None:
            raise UnusableError("not in the recording")
        return Reply(recorded.text, version=recorded.version)

    async def close(self) -> None:
        """Close the journal."""
        self._journal.close()
