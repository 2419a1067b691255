"""Readers of the field's annotation files, one module a format; `read` detects the format by content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import (
    annotated,
    llava,
    lrv,
    mplug_owl,
    multiple_choice,
    preference_pairs,
    reverie,
    stored,
)
from reverie_jax.data.sources.common import Example, ImageFolder, ReadLog, validate_image
from reverie_jax.data.sources.marks import MarkedRows, Marks
from reverie_jax.errors import DataError

__all__ = [
    "NO_CONVERSATION",
    "Example",
    "Format",
    "ImageFolder",
    "ReadLog",
    "Rows",
    "detect_format",
    "read",
    "read_row",
    "validate_image",
]

Format = Literal["turns", "lrv", "mplug_owl", "annotated", "preference_pairs", "choices", "records"]

NO_CONVERSATION = "no row gives a conversation; notes say which rows were skipped"
_SAMPLE = 10_000
"""Number of rows among which one has a known format."""


def detect_format(rows: Rows) -> Format:
    """Return the format of a file, from its first row of a known one.

    Raises:
        DataError: The format is unknown.
    """
    for row in itertools.islice(rows, _SAMPLE):
        if isinstance(row, dict) and (form := _row_format(row)):
            return form
    raise DataError(
        f"{rows.path}: unknown format; the readers expect 'conversations' (LLaVA, REVERIE), 'image_id' and 'question' (LRV),"
        " 'text' with lines of 'Human: ' and 'AI: ' (mPLUG-Owl),"
        " 'chosen' and 'rejected' (RLHF-V), 'choices' (ScienceQA, A-OKVQA) or 'correct_rationale' (reverie annotate)"
    )


def _row_format(row: dict[str, Any]) -> Format | None:
    if stored.is_record(row):
        return "records"
    if preference_pairs.is_preference_pair(row):
        return "preference_pairs"
    if llava.has_turns(row):
        return "turns"
    if {"correct_rationale", "incorrect_rationale"} <= row.keys():
        return "annotated"
    if {"image_id", "answer"} <= row.keys() and {"question", "instruction"} & row.keys() and "choices" not in row:
        return "lrv"
    if mplug_owl.is_conversation(row):
        return "mplug_owl"
    return "choices" if multiple_choice.detect_dataset(row) else None


def read(
    path: Path,
    log: ReadLog,
    *,
    filtered: bool = True,
    splits: Sequence[str] = ("train",),
    marks: Marks | None = None,
) -> Iterator[Example]:
    """Yield a file's examples, row by row. Rows that cannot be used go to `log.problems`; `log.raise_problems` raises them.

    Args:
        path: The annotation file.
        log: Gets problems and notes.
        filtered: Of the annotation pipeline's rows, keep only those that the judge accepted.
        splits: Of rows that name their split, keep only these.
        marks: What reviewers marked bad is left out, and what they edited is read as they wrote it.

    Raises:
        DataError: The file cannot be read, or its format is unknown.
    """
    form = detect_format(Rows(path))
    return _read(form, Rows(path) if marks is None else MarkedRows(path, marks), log, filtered, splits)


def read_row(form: Format, path: Path, where: str, row: Any) -> tuple[list[Example], str]:
    """Return the examples of a row by itself, whatever a judge said, and why it cannot be used (empty if it can).

    Args:
        form: Format of its file.
        path: Its file.
        where: Its place, for errors.
        row: The row.
    """
    log, rows = ReadLog(), _OneRow(path, where, row)
    read = reverie.split_rows(rows, log) if form == "turns" else _read(form, rows, log, False, ("train",))
    examples = list(read)
    return examples, log.problems[0][1] if log.problems else ""


class _OneRow(Rows):
    def __init__(self, path: Path, where: str, row: Any):
        super().__init__(path)
        self._row = where, row

    def located(self) -> Iterator[tuple[str, Any]]:
        yield self._row


def _read(form: Format, rows: Rows, log: ReadLog, filtered: bool, splits: Sequence[str]) -> Iterator[Example]:
    match form:
        case "turns":
            return reverie.read_examples(rows, log)
        case "annotated":
            return annotated.read_examples(rows, log, filtered=filtered)
        case "preference_pairs":
            return preference_pairs.read_examples(rows, log)
        case "choices":
            return multiple_choice.read_examples(rows, log, splits=splits)
        case "lrv":
            return lrv.read_examples(rows, log)
        case "mplug_owl":
            return mplug_owl.read_examples(rows, log)
        case "records":
            return stored.read_examples(rows, log)
