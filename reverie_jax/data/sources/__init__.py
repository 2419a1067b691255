"""Annotation files that the field uses, one file a dataset; `read` recognises them by content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.files import read_list
from reverie_jax.data.sources import llava, lrv, reverie
from reverie_jax.data.sources.reverie import Answers
from reverie_jax.data.sources.rows import Pictures, Reading, Talk, records
from reverie_jax.errors import DataError

__all__ = ["Answers", "Pictures", "Reading", "Talk", "read", "recognise", "records"]


def recognise(rows: Sequence[Any], path: Path) -> str:
    """`reverie`, `llava` or `lrv`, by the rows' content.

    Raises:
        DataError: it is none of them.
    """
    keys: set[Any] = next((set(row) for row in rows if isinstance(row, dict)), set())
    if {"conversations", "messages"} & keys:
        return "reverie" if reverie.is_reflective(rows) else "llava"
    if {"image_id", "answer"} <= keys and {"question", "instruction"} & keys:
        return "lrv"
    known = "LLaVA's and REVERIE's have 'conversations', LRV's 'image_id' and 'question'"
    raise DataError(f"{path}: rows of no known form; {known}")


def read(path: Path, reading: Reading, *, answers: Answers = "once") -> list[Talk]:
    """A file's talk. Rows that cannot be used go to `reading.problems`; `reading.settle()` makes them an error.

    Raises:
        DataError: the file cannot be read, or is of no known form.
    """
    rows = read_list(path)
    match recognise(rows, path):
        case "reverie":
            return list(reverie.talks(str(path), rows, reading, answers=answers))
        case "lrv":
            return list(lrv.talks(str(path), rows, reading))
        case _:
            return list(llava.talks(str(path), rows, reading))
