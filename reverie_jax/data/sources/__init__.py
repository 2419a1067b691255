"""Annotation files that the field uses, one file a dataset; `read` recognises them by content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import annotated, llava, lrv, multiple_choice, preference_pairs, reverie
from reverie_jax.data.sources.common import Example, Pictures, ReadLog, opened
from reverie_jax.errors import DataError

__all__ = ["Pictures", "Reading", "Rows", "Talk", "opened", "read", "recognise"]

_SAMPLE = 10_000
"""Rows that say which form a file has."""


def recognise(rows: Rows) -> str:
    """`reverie`, `llava`, `lrv`, `judged`, `preferences`, `scienceqa` or `aokvqa`, by the content of the first rows.

    Raises:
        DataError: it is none of them.
    """
    turns = reflective = 0
    for row in itertools.islice(rows, _SAMPLE):
        form = _form(row) if isinstance(row, dict) else ""
        if form == "turns":
            turns, reflective = turns + 1, reflective + reverie.is_reflective(row)
        elif form and not turns:
            return form
    if turns:
        return "reverie" if 2 * reflective > turns else "llava"
    known = (
        "LLaVA's and REVERIE's have 'conversations', LRV's 'image_id' and 'question', RLHF-V's 'chosen' and 'rejected',"
        " ScienceQA's and A-OKVQA's 'choices', the annotation pipeline's 'correct_rationale'"
    )
    raise DataError(f"{rows.path}: rows of no known form; {known}")


def _form(row: dict[str, Any]) -> str:
    if {"conversations", "messages"} & row.keys():
        return "turns"
    if preference_pairs.is_one(row):
        return "preferences"
    if {"correct_rationale", "incorrect_rationale"} <= row.keys():
        return "judged"
    if {"image_id", "answer"} <= row.keys() and {"question", "instruction"} & row.keys() and "choices" not in row:
        return "lrv"
    return multiple_choice.is_one(row)


def read(path: Path, log: ReadLog, *, filtered: bool = True, splits: Sequence[str] = ("train",)) -> Iterator[Example]:
    """A file's talk, row by row. Rows that cannot be used go to `reading.problems`; `reading.settle()` makes them an error.

    Args:
        filtered: of the annotation pipeline's rows, those that the judge keeps.
        splits: of rows that name their split, these.

    Raises:
        DataError: the file cannot be read, or is of no known form.
    """
    rows = Rows(path)
    match recognise(rows):
        case "reverie":
            return reverie.talks(rows, log)
        case "judged":
            return annotated.talks(rows, log, filtered=filtered)
        case "preferences":
            return preference_pairs.talks(rows, log)
        case "scienceqa" | "aokvqa" as source:
            return multiple_choice.talks(rows, log, dataset=source, splits=splits)
        case "lrv":
            return lrv.talks(rows, log)
        case _:
            return llava.talks(rows, log)
