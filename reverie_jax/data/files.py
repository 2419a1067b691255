"""JSON files of rows: read with one line for whatever is wrong, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from reverie_jax.errors import DataError


def read_list(path: Path, *, least: int = 1) -> list[Any]:
    """A JSON list, or JSON objects line by line in a file that ends in `.jsonl`.

    Args:
        least: rows that must be there.

    Raises:
        DataError: the file is neither, or too short.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list) or len(rows) < least:
        raise DataError(f"{path}: expected a JSON list of rows{', and at least one' if least else ''}")
    return rows


def write_list(path: Path, rows: list[Any]) -> None:
    """The file is the old one or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=4)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
