"""Annotation files that the field uses, one file a dataset; `read` recognises them by content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.files import Rows
from reverie_jax.data.sources import choices, judged, llava, lrv, preferences, reverie
from reverie_jax.data.sources.rows import Pictures, Reading, Talk, opened
from reverie_jax.errors import DataError

__all__ = ["Pictures", "Reading", "Rows", "Talk", "opened", "read", "recognise"]

_SAMPLE = 10_000
"""Rows that say which form a file has."""


def recognise(rows: Rows) -> str:
    """`reverie`, `llava`, `lrv`, `judged`, `preferences`, `scienceqa` or `aokvqa`, by the content of the first rows.

    Raises:
        DataError: it is none of them.
    """
    sample: list[Any] = list(itertools.islice(rows, _SAMPLE))
    row: dict[str, Any] = next((row for row in sample if isinstance(row, dict)), {})
    if {"conversations", "messages"} & row.keys():
        return "reverie" if reverie.is_reflective(sample) else "llava"
    if preferences.is_one(row):
        return "preferences"
    if {"correct_rationale", "incorrect_rationale"} <= row.keys():
        return "judged"
    if kind := choices.is_one(row):
        return kind
    if {"image_id", "answer"} <= row.keys() and {"question", "instruction"} & row.keys():
        return "lrv"
    known = (
        "LLaVA's and REVERIE's have 'conversations', LRV's 'image_id' and 'question', RLHF-V's 'chosen' and 'rejected',"
        " ScienceQA's and A-OKVQA's 'choices', the annotation pipeline's 'correct_rationale'"
    )
    raise DataError(f"{rows.path}: rows of no known form; {known}")


def read(path: Path, reading: Reading, *, filtered: bool = True, splits: Sequence[str] = ("train",)) -> Iterator[Talk]:
    """A file's talk, row by row. Rows that cannot be used go to `reading.problems`; `reading.settle()` makes them an error.

    Args:
        filtered: of the annotation pipeline's rows, those that the judge keeps.
        splits: of rows that name their split, these.

    Raises:
        DataError: the file cannot be read, or is of no known form.
    """
    rows, name = Rows(path), str(path)
    match recognise(rows):
        case "reverie":
            return reverie.talks(name, rows, reading)
        case "judged":
            return judged.talks(name, rows, reading, filtered=filtered)
        case "preferences":
            return preferences.talks(name, rows, reading)
        case "scienceqa" | "aokvqa" as source:
            return choices.talks(name, rows, reading, source=source, splits=splits)
        case "lrv":
            return lrv.talks(name, rows, reading)
        case _:
            return llava.talks(name, rows, reading)
