"""Annotation files and records folders that the data commands read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from reverie_jax.data.conversation import ImageRecord
    from reverie_jax.data.mixture import Mixture, MixtureEntry
    from reverie_jax.data.records import RecordSource

    Sources = Sequence[Mixture | RecordSource]


def split_sources(sources: Sequence[str]) -> tuple[list[MixtureEntry], list[str]]:
    """Return annotation files and records folders; one of them is empty.

    Raises:
        UserError: Nothing is named, or files and folders are mixed.
    """
    if not sources:
        raise UserError("name at least one annotation file, as FILE=FOLDER, or a records folder")
    folders = [source for source in sources if Path(source).is_dir()]
    if folders and len(folders) < len(sources):
        raise UserError("name either annotation files or records folders, not both")
    return ([], folders) if folders else (common.mixture_entries(sources), [])


@contextlib.contextmanager
def open_sources(sources: Sequence[str]) -> Iterator[Sources]:
    """Open annotation files as one mixture, or records folders.

    Raises:
        UserError: a source cannot be read, or files and folders are mixed.
    """
    from reverie_jax.data.mixture import read_mixture
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.sources import ReadLog

    entries, folders = split_sources(sources)
    if folders:
        yield [RecordSource(folder) for folder in folders]
        return
    log = ReadLog()
    with read_mixture(entries, log) as records:
        common.note(log.notes)
        yield [records]


def records_of(sources: Sources) -> Iterator[ImageRecord]:
    """Yield the records of all sources."""
    for source in sources:
        for index in range(len(source)):
            yield source[index]
