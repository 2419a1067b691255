"""Output folders of `reverie eval`, as a page takes them: runs, and their parts by benchmark."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import files, names


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's answers and score in a run: `scores` is its scores.json, `day` when the answers were written."""

    folder: Path
    scores: Mapping[str, Any]
    day: str


@dataclasses.dataclass(frozen=True)
class Run:
    """An output folder of `reverie eval`: its parts by benchmark, and sub-folders with answers but no score."""

    name: str
    folder: Path
    parts: Mapping[str, BenchmarkResult]
    unscored: Sequence[str] = ()


def read_runs(texts: Sequence[str]) -> list[Run]:
    """Runs from "[NAME=]FOLDER" each; a name is the folder's own by default.

    Raises:
        UserError: a folder is missing, holds no scores or broken ones, or no answers; a name or a benchmark is there twice.
    """
    runs = [_read_run(text) for text in texts]
    names = [run.name for run in runs]
    if not runs:
        raise UserError("name at least one output folder of `reverie eval`")
    twice = next((run for run in runs if names.count(run.name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice.folder}: two runs are called {twice.name}; name them as NAME=FOLDER")
    return runs


def _read_run(text: str) -> Run:
    name, equals, path = text.partition("=")
    # A folder whose own name has a "=" is meant as it stands.
    if not equals or not name or Path(text).is_dir():
        name, path = "", text
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    inside = sorted(place for place in folder.iterdir() if place.is_dir() and (place / files.PREDICTIONS).is_file())
    if any((folder / file).exists() for file in (files.SCORES, files.PREDICTIONS)):
        inside = [folder]
    parts: dict[str, BenchmarkResult] = {}
    unscored = []
    for place in inside:
        if place is not folder and not (place / files.SCORES).exists():
            unscored.append(place.name)
            continue
        part = _read_part(place)
        if part.scores["benchmark"] in parts:
            raise UserError(
                f"{folder}: {part.scores['benchmark']} is there twice; name its sub-folders as runs of their own"
            )
        parts[part.scores["benchmark"]] = part
    if not parts:
        raise UserError(
            f"{folder}: no {files.SCORES} beside a {files.PREDICTIONS}, there or one folder deeper; {_MAKE}"
        )
    return Run(name or folder.resolve().name, folder, parts, unscored)


_MAKE = "`reverie eval` writes both, `reverie score --out` the score"


def _read_part(folder: Path) -> BenchmarkResult:
    for file in (files.SCORES, files.PREDICTIONS):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: has no {file}; {_MAKE}")
    found = files.read_json(folder / files.SCORES)
    try:
        metrics, intervals = found["metrics"], found["intervals"]
        good = found["benchmark"] in names() and isinstance(found["rule"], str) and isinstance(found["protocol"], dict)
        good &= bool(metrics) and all(isinstance(value, int | float) for value in metrics.values())
        good &= all(isinstance(end, int | float) for low, high in intervals.values() for end in (low, high))
        good &= all(isinstance(found[key], int) for key in ("items", "unparsed", "missing"))
        good &= isinstance(found["unparsed_ids"], list)
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{folder / files.SCORES}: is no score of a benchmark; {_MAKE}")
    written = datetime.date.fromtimestamp((folder / files.PREDICTIONS).stat().st_mtime)
    return BenchmarkResult(folder, found, written.isoformat())
