"""Files of the annotation steps, with the names that REVERIE's own scripts use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reverie_jax.data.row_files import read_rows
from reverie_jax.errors import UserError
from reverie_jax.files import well_formed

QUESTIONS = "reasoning_instruct_data.json"
RATIONALES = "rationale_instruct_data.json"
JUDGED = "rationale_instruct_data_with_judge.json"
DROPPED = "dropped.json"
RELEASED = "reverie.json"

Row = dict[str, Any]


def read_step_rows(path: Path, keys: Iterable[str]) -> list[Row]:
    """Read a step's file: a list of objects with at least these keys, all strings.

    Raises:
        UserError: The file is missing or broken; the row is named.
    """
    if not path.exists():
        raise UserError(f"{path}: missing; run the step that writes it first (questions, then rationales, then judge)")
    rows: list[Row] = []
    keys = list(keys)
    for number, row in enumerate(read_rows(path, min_rows=0)):
        missing = [key for key in keys if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if missing:
            raise UserError(f"{path}: row {number}: missing {', '.join(missing)}")
        rows.append(well_formed(row))
    return rows
