"""Scores of several runs as a page's tables have them: metrics in groups, a row a metric, published models beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from reverie_jax.eval.benchmarks import benchmark as find_benchmark
from reverie_jax.eval.report import published
from reverie_jax.eval.report.answers import number
from reverie_jax.eval.report.runs import Run

_LISTS = ("capability", "integration")
"""What stands before "/" there is no group: MM-Vet's capabilities are."""


def grouped(metrics: Iterable[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Metrics of a whole benchmark, the headline first; and those of groups: by group, the metric's name by what it is."""
    names = list(metrics)
    homes = {name.rpartition("/")[0] for name in names[1:]}
    whole: list[str] = []
    groups: dict[str, dict[str, str]] = {}
    for place, name in enumerate(names):
        group, _, what = name.rpartition("/")
        if place == 0 or (not group and name not in homes):
            whole.append(name)
        elif group in _LISTS or not group:
            groups.setdefault(name, {})["score"] = name
        else:
            groups.setdefault(group, {})[what] = name
    return whole, groups


def metrics_of(runs: Sequence[Run], name: str) -> list[str]:
    """A benchmark's metrics in the order in which the runs have them."""
    return list(dict.fromkeys(m for run in runs if name in run.parts for m in run.parts[name].scores["metrics"]))


def _digits(values: Iterable[float | None]) -> int:
    """Decimals that suit a metric's scale: of 1, of 10, of 100 and more."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return 3 if largest <= 1.5 else 2 if largest <= 10 else 1


def row_of(runs: Sequence[Run], name: str, metric: str) -> dict[str, Any]:
    """A metric of a benchmark: of each run its value and its interval's ends, None where there is none."""
    cells: list[dict[str, Any]] = []
    for run in runs:
        scores = run.parts[name].scores if name in run.parts else {"metrics": {}, "intervals": {}}
        low, high = scores["intervals"].get(metric, (None, None))
        cells.append({"run": run.name, "value": scores["metrics"].get(metric), "low": low, "high": high})
    ends = [cell[key] for cell in cells for key in ("value", "low", "high")]
    return {"metric": metric, "digits": _digits(ends), "cells": cells}


def axis(values: Iterable[float | None]) -> dict[str, Any]:
    """An axis that holds the values: its ends, and places of its ticks from 0 to 100 with their words."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    wide = (high - low) or max(abs(high), 1.0)
    step = 10 ** math.floor(math.log10(wide / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if wide / (step * factor) <= 4)
    start, end = math.floor(low / step), math.ceil(high / step)
    end += start == end
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [(100 * (n - start) / (end - start), number(n * step, digits)) for n in range(start, end + 1)]
    return {"low": start * step, "high": end * step, "ticks": ticks}


def beside_published(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """A table of runs and published models: columns are metrics of both, by the official rule, of as many questions."""
    columns, apart = [], []
    for name in names:
        official = find_benchmark(name).rules[0]
        fits = {
            run.name for run in runs if name in run.parts and published.beside(name, official, run.parts[name].scores)
        }
        found = published.of(name)
        if found and not fits:
            asked = f"{published.ITEMS[name]:,} questions" if name in published.ITEMS else "the whole benchmark"
            apart.append((name, official, asked))
        there = {m for run in runs if run.name in fits for m in run.parts[name].scores["metrics"]}
        for metric in dict.fromkeys(score.metric for score in found if score.metric in there):
            row = row_of([run for run in runs if run.name in fits], name, metric)
            others = {score.model: score for score in found if score.metric == metric}
            columns.append({"benchmark": name, "models": others, **row, "cells": {c["run"]: c for c in row["cells"]}})
    rows = {model for column in columns for model in column["models"]}
    models = list(dict.fromkeys(score.model for score in published.SCORES if score.model in rows))
    used = list(dict.fromkeys(score.source for column in columns for score in column["models"].values()))
    sources = [(key, *published.SOURCES[key]) for key in published.SOURCES if key in used]
    here = {run for column in columns for run in column["cells"]}
    return {"columns": columns, "runs": here, "models": models, "sources": sources, "apart": apart}
