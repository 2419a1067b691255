"""Read output folders of `reverie eval`: runs, and their results by benchmark."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import inputs, names
from reverie_jax.eval.benchmarks.answer_files import PREDICTIONS, SCORES

_FIX = "`reverie eval` writes both files, `reverie score --out` the score"


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's answers and score in a run: `scores` is its scores.json, `day` the date of the answers."""

    folder: Path
    scores: Mapping[str, Any]
    day: str


@dataclasses.dataclass(frozen=True)
class Run:
    """An output folder of `reverie eval`: results by benchmark, and names of sub-folders with answers but no score."""

    name: str
    folder: Path
    results: Mapping[str, BenchmarkResult]
    unscored: Sequence[str] = ()


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read runs from arguments "[NAME=]FOLDER"; the name defaults to the folder's.

    Raises:
        UserError: A folder is missing, has no scores, broken scores or no answers; or a name or a benchmark is a duplicate.
    """
    runs = [_read_run(argument) for argument in arguments]
    run_names = [run.name for run in runs]
    if not runs:
        raise UserError("no run; name at least one output folder of `reverie eval`")
    duplicate = next((run for run in runs if run_names.count(run.name) > 1), None)
    if duplicate is not None:
        raise UserError(f"{duplicate.folder}: duplicate run name {duplicate.name}; name the runs with NAME=FOLDER")
    return runs


def _read_run(argument: str) -> Run:
    name, equals, path = argument.partition("=")
    # A folder name may contain "=".
    if not equals or not name or Path(argument).is_dir():
        name, path = "", argument
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    candidates = sorted(inner for inner in folder.iterdir() if inner.is_dir() and (inner / PREDICTIONS).is_file())
    if any((folder / file).exists() for file in (SCORES, PREDICTIONS)):
        candidates = [folder]
    results: dict[str, BenchmarkResult] = {}
    unscored = []
    for candidate in candidates:
        if candidate is not folder and not (candidate / SCORES).exists():
            unscored.append(candidate.name)
            continue
        result = _read_result(candidate)
        benchmark = result.scores["benchmark"]
        if benchmark in results:
            raise UserError(f"{folder}: duplicate benchmark {benchmark}; name its sub-folders as runs of their own")
        results[benchmark] = result
    if not results:
        raise UserError(f"{folder}: no {SCORES} beside a {PREDICTIONS}, here or one folder deeper; {_FIX}")
    return Run(name or folder.resolve().name, folder, results, unscored)


def _read_result(folder: Path) -> BenchmarkResult:
    for file in (SCORES, PREDICTIONS):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: has no {file}; {_FIX}")
    scores = inputs.read_json(folder / SCORES)
    try:
        metrics, intervals = scores["metrics"], scores["intervals"]
        valid = (
            scores["benchmark"] in names()
            and isinstance(scores["rule"], str)
            and isinstance(scores["protocol"], dict)
            and bool(metrics)
            and all(isinstance(value, int | float) for value in metrics.values())
            and all(isinstance(end, int | float) for low, high in intervals.values() for end in (low, high))
            and all(isinstance(scores[key], int) for key in ("items", "unparsed", "missing"))
            and isinstance(scores["unparsed_ids"], list)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{folder / SCORES}: not a score of a benchmark; {_FIX}")
    written = datetime.date.fromtimestamp((folder / PREDICTIONS).stat().st_mtime)
    return BenchmarkResult(folder, scores, written.isoformat())
