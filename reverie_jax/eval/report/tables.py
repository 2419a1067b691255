"""Tables of a report: metrics in groups, one row for each metric, and published scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.published import SCORES, SOURCES, published_scores
from reverie_jax.eval.report.runs import Run
from reverie_jax.eval.report.template import number


def group_metrics(
    metrics: Iterable[str], list_metrics: frozenset[str] = frozenset()
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Split metrics into those of the whole benchmark, and those of groups.

    Args:
        metrics: Names, the headline first; "group/metric" is a metric of a group.
        list_metrics: See `Benchmark.list_metrics`.

    Returns:
        Names of metrics of the whole benchmark; and by group, full names by metric.
    """
    names = list(metrics)
    prefixes = {name.rpartition("/")[0] for name in names[1:]}
    whole: list[str] = []
    groups: dict[str, dict[str, str]] = {}
    for index, name in enumerate(names):
        group, _, metric = name.rpartition("/")
        if index == 0 or (not group and name not in prefixes):
            whole.append(name)
        elif group in list_metrics or not group:
            groups.setdefault(name, {})["score"] = name
        else:
            groups.setdefault(group, {})[metric] = name
    return whole, groups


def metric_groups(runs: Sequence[Run], name: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Return `group_metrics` of a benchmark's metrics, in the order in which the runs have them."""
    metrics = dict.fromkeys(m for run in runs if name in run.results for m in run.results[name].scores["metrics"])
    return group_metrics(metrics, find_benchmark(name).list_metrics)


def _digits(values: Iterable[float | None]) -> int:
    """Return decimals that suit a metric's scale: of 1, of 10, of 100 and more."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return 3 if largest <= 1.5 else 2 if largest <= 10 else 1


def metric_row(runs: Sequence[Run], name: str, metric: str) -> dict[str, Any]:
    """Return a metric of a benchmark with, for each run, its value and the ends of its interval (None if missing)."""
    cells: list[dict[str, Any]] = []
    for run in runs:
        scores = run.results[name].scores if name in run.results else {"metrics": {}, "intervals": {}}
        low, high = scores["intervals"].get(metric, (None, None))
        cells.append({"run": run.name, "value": scores["metrics"].get(metric), "low": low, "high": high})
    ends = [cell[key] for cell in cells for key in ("value", "low", "high")]
    return {"metric": metric, "digits": _digits(ends), "cells": cells}


def axis(values: Iterable[float | None]) -> dict[str, Any]:
    """Return an axis that holds the values: its ends, and its ticks as (position from 0 to 100, label)."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    width = (high - low) or max(abs(high), 1.0)
    step = 10 ** math.floor(math.log10(width / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 4)
    start, end = math.floor(low / step), math.ceil(high / step)
    end += start == end
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [(100 * (n - start) / (end - start), number(n * step, digits)) for n in range(start, end + 1)]
    return {"low": start * step, "high": end * step, "ticks": ticks}


def published_table(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """Return a table of runs and published models; its columns are the metrics of both (see `Benchmark.comparable`)."""
    columns, apart = [], []
    for name in names:
        benchmark, published = find_benchmark(name), published_scores(name)
        comparable = [run for run in runs if name in run.results and benchmark.comparable(run.results[name].scores)]
        if published and not comparable:
            count = benchmark.published_items
            apart.append((name, benchmark.rules[0], f"{count:,} questions" if count else "the whole benchmark"))
        metrics = {metric for run in comparable for metric in run.results[name].scores["metrics"]}
        for metric in dict.fromkeys(score.metric for score in published if score.metric in metrics):
            row = metric_row(comparable, name, metric)
            others = {score.model: score for score in published if score.metric == metric}
            columns.append({"benchmark": name, "models": others, **row, "cells": {c["run"]: c for c in row["cells"]}})
    models_with_scores = {model for column in columns for model in column["models"]}
    models = list(dict.fromkeys(score.model for score in SCORES if score.model in models_with_scores))
    used = {score.source for column in columns for score in column["models"].values()}
    sources = [(key, *source) for key, source in SOURCES.items() if key in used]
    runs_with_scores = {run for column in columns for run in column["cells"]}
    return {"columns": columns, "runs": runs_with_scores, "models": models, "sources": sources, "apart": apart}
