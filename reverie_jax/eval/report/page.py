"""One self-contained HTML page from output folders of `reverie eval`: protocol, scores, differences, images.

Without the benchmarks' files it has tables alone. No sentence claims more than the numbers.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import answer_files, find_benchmark, inputs
from reverie_jax.eval.report import answers
from reverie_jax.eval.report.answers import RescoredRun
from reverie_jax.eval.report.gallery import clip, galleries
from reverie_jax.eval.report.runs import BenchmarkResult, Run, read_runs
from reverie_jax.eval.report.tables import axis, metric_groups, metric_row, published_table
from reverie_jax.eval.report.template import COLORS, environment, verdict

__all__ = ["BenchmarkResult", "Run", "read_runs", "render"]

MAIN = 6
"""Metrics beneath a headline in the table of scores; the section of the benchmark has all of them."""

_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b")
_OUTCOMES = (
    "calibration/",
    "yes/",
    "run/model",
    "run/checksums",
    "run/versions",
    "run/dates",
    "judge/answers",
    "judge/date",
)
_COUNTS = ("not inferred", "replies of a judge", "unread_replies")
"""Parts of a protocol that are results of a run: they may differ between runs that were measured alike."""


def render(runs: Sequence[Run], *, data: Path | None, images: Path | None, count: int) -> str:
    """Return the page.

    Args:
        runs: From `read_runs`; the others are compared with the first.
        data: The benchmarks' files, or a folder of such folders by benchmark.
        images: Folder of images that are not with the data.
        count: Maximum number of images in a gallery.

    Raises:
        UserError: `data` or `images` does not exist, or fits none of the runs' benchmarks.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.results))
    rescored, failed = _rescored(runs, names, data, images)
    return (
        environment()
        .get_template("page.html")
        .render(
            day=datetime.date.today().isoformat(),
            runs=runs,
            colors={run.name: COLORS[index % len(COLORS)] for index, run in enumerate(runs)},
            measured=_properties(runs),
            protocols=[(name, *_protocols(runs, name)) for name in names],
            scores=[(name, _rule(runs, name), _rows(runs, name)) for name in names],
            published=published_table(runs, names),
            with_data=data is not None,
            failed=failed,
            differences=[_differences(runs, rescored[name]) for name in names if name in rescored],
            sections=[_section(runs, name, rescored.get(name), count) for name in names],
            lower={name: find_benchmark(name).lower_is_better for name in names},
        )
    )


def _rescored(
    runs: Sequence[Run], names: Sequence[str], data: Path | None, images: Path | None
) -> tuple[dict[str, RescoredRun], list[str]]:
    """Score answers again beside their files; return them by benchmark, and why others could not be scored."""
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    if data is None:
        return {}, []
    if not data.exists():
        raise UserError(f"--data {data}: no such folder")
    rescored: dict[str, RescoredRun] = {}
    failed = []
    for name in names:
        results = {run.name: run.results[name] for run in runs if name in run.results}
        folders = {run: result.folder for run, result in results.items()}
        stored = {run: result.scores for run, result in results.items()}
        try:
            rescored[name] = answers.rescore(name, folders, stored, data, images)
        except UserError as error:
            failed.append(f"{name}: {error}")
    if failed and not rescored:
        raise UserError(f"--data: {failed[0]}")
    return rescored, failed


def _properties(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return a table of what each run is: (property, its value by run)."""

    def each(value: Callable[[BenchmarkResult], str | None]) -> list[str]:
        values = [[value(result) for result in run.results.values()] for run in runs]
        return ["; ".join(dict.fromkeys(text for text in row if text is not None)) for row in values]

    def recorded(key: str) -> list[str]:
        def value(result: BenchmarkResult) -> str | None:
            found = result.scores["protocol"].get(f"run/{key}")
            # Digests are told apart by their beginnings; the protocol below has them whole.
            return None if found is None else _DIGEST.sub(r"\1", _plain(found))

        return each(value)

    rows = [
        ("model", recorded("model")),
        ("weights", recorded("checksums")),
        ("template", recorded("template")),
        ("image aspect ratio", recorded("image_aspect_ratio")),
        ("decoding protocol", recorded("decoding_protocol")),
        ("decoding", each(lambda result: _decoding(result.scores["protocol"]))),
        ("benchmarks", each(lambda result: f"{result.scores['benchmark']} ({result.scores['items']:,} questions)")),
        ("rules", each(lambda result: result.scores["rule"])),
        ("date of the answers", each(lambda result: result.day)),
        ("answers without a score", [", ".join(run.unscored) for run in runs]),
        ("folder", [str(run.folder) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def _decoding(protocol: Mapping[str, Any]) -> str:
    decoding, request = protocol.get("run/decoding"), protocol.get("run/request")
    if isinstance(request, Mapping):
        temperature = request.get("temperature")
        words = ["served elsewhere", f"temperature {'of the service' if temperature is None else temperature}"]
        return ", ".join(words + ["second answer, after a rationale"] * bool(protocol.get("run/reflect")))
    if not isinstance(decoding, Mapping):
        return "not recorded"
    words = [f"{decoding['beams']} beams"] if decoding.get("beams", 1) > 1 else []
    if decoding.get("temperature"):
        words.append(
            f"sampled at temperature {decoding['temperature']:g}, top-p {decoding.get('top_p', 1):g}, "
            + (f"top-k {decoding['top_k']}, " if decoding.get("top_k") else "")
            + f"seed {decoding.get('seed')}"
        )
    if (penalty := decoding.get("repetition_penalty", 1)) != 1:
        words.append(f"repetition penalty {penalty:g}" + " on the prompt too" * bool(decoding.get("penalize_prompt")))
    if decoding.get("no_repeat_ngram"):
        words.append(f"no {decoding['no_repeat_ngram']}-gram twice")
    if decoding.get("contrast"):
        words.append(
            f"contrast with {decoding['contrast']} (alpha {decoding.get('alpha')}, beta {decoding.get('beta')})"
        )
    if protocol.get("run/reflect"):
        words.append("second answer, after a rationale")
    return ", ".join(words or ["greedy"])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


def _protocols(runs: Sequence[Run], name: str) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """Return a benchmark's protocol as (property, value by run); and the rows in which the runs that have it differ."""
    tables = []
    for run in runs:
        table = {}
        if name in run.results:
            scores = run.results[name].scores
            table = {"rule": scores["rule"], "scale": scores.get("scale", ""), "questions": f"{scores['items']:,}"}
            for key, value in scores["protocol"].items():
                parts = value if isinstance(value, Mapping) and key != "run/checksums" else {"": value}
                table |= {f"{key}/{part}".rstrip("/"): _plain(inner) for part, inner in parts.items()}
        tables.append(table)
    rows = []
    differs = []
    for key in dict.fromkeys(key for table in tables for key in table):
        row = (key.removeprefix("run/").replace("/", ": "), [table.get(key, "–") or "–" for table in tables])
        rows.append(row)
        result = key.startswith(_OUTCOMES) or key in _COUNTS
        if not result and len({table.get(key) for table in tables if table}) > 1:
            differs.append(row)
    return rows, differs


def _rule(runs: Sequence[Run], name: str) -> str:
    return ", ".join(dict.fromkeys(run.results[name].scores["rule"] for run in runs if name in run.results))


def _rows(runs: Sequence[Run], name: str) -> list[dict[str, Any]]:
    whole, _ = metric_groups(runs, name)
    return [metric_row(runs, name, metric) for metric in whole[: MAIN + 1]]


def _differences(runs: Sequence[Run], rescored: RescoredRun) -> dict[str, Any]:
    """Return a benchmark's differences to the first run that has it."""
    name = rescored.benchmark.name
    first = next(run.name for run in runs if name in run.results)
    comparisons, notes = answers.differences(rescored, first)
    whole, _ = metric_groups(runs, name)
    pairs = []
    for run, comparison in comparisons.items():
        main: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for metric, estimate in comparison["differences"].items():
            low, high = estimate["ci95"]
            cell = {
                "metric": metric,
                "digits": metric_row(runs, name, metric)["digits"] + 1,
                "value": estimate["value"],
                "low": low,
                "high": high,
                "says": verdict(low, high, comparison["clusters"]),
            }
            (main if metric in whole else rest).append(cell)
        rest = [*main[MAIN + 1 :], *rest]
        pairs.append({"run": run, "main": main[: MAIN + 1], "rest": rest, "mcnemar": comparison.get("mcnemar")})
    return {"benchmark": name, "first": first, "pairs": pairs, "notes": [*rescored.notes, *notes]}


def _section(runs: Sequence[Run], name: str, rescored: RescoredRun | None, count: int) -> dict[str, Any]:
    """Return a benchmark's own section: categories, yes rates, rules, unparsed answers, galleries."""
    whole, _ = metric_groups(runs, name)
    results = {run.name: run.results[name] for run in runs if name in run.results}
    protocols = {run: result.scores["protocol"] for run, result in results.items()}
    unparsed = [_unparsed(run, result) for run, result in results.items()]
    return {
        "name": name,
        "rule": _rule(runs, name),
        "rest": [metric_row(runs, name, metric) for metric in whole[MAIN + 1 :]],
        "tables": _category_tables(runs, name, rescored),
        "yes_no": answers.yes_no(rescored) if rescored is not None else _yes_no(results),
        "calibration": {
            run: {key: protocol[f"calibration/{key}"] for key in ("error", "brier", "mean_yes")}
            for run, protocol in protocols.items()
            if "calibration/error" in protocol
        },
        "rules": answers.rules(rescored) if rescored is not None else [],
        "unparsed": [row for row in unparsed if row],
        "galleries": galleries(rescored, next(iter(results)), count) if rescored is not None else [],
    }


def _category_tables(runs: Sequence[Run], name: str, rescored: RescoredRun | None) -> list[dict[str, Any]]:
    """Return tables by category: of the rule's own metrics, or else of the share of right answers."""
    whole, groups = metric_groups(runs, name)
    headline = whole[0].rpartition("/")[2]
    tables: list[dict[str, Any]] = []
    for what in dict.fromkeys(what for group in groups.values() for what in group):
        rows = [{"name": group, **metric_row(runs, name, own[what])} for group, own in groups.items() if what in own]
        tables.append({"what": what, "rows": rows})
    tables.sort(key=lambda table: table["what"] not in (headline, "score"))
    right = answers.categories(rescored) if rescored is not None and not groups else {}
    if right:
        none = (None, None, None)
        rows = [
            {
                "name": category,
                "digits": 3,
                "cells": [
                    dict(zip(("run", "value", "low", "high"), (run.name, *row.get(run.name, none)[:3]), strict=True))
                    for run in runs
                ],
            }
            for category, row in right.items()
        ]
        tables.append({"what": "share of right answers", "rows": rows})
    for table in tables:
        ends = [cell[key] for row in table["rows"] for cell in row["cells"] for key in ("value", "low", "high")]
        table["scale"] = axis(ends)
    return tables


def _yes_no(results: Mapping[str, BenchmarkResult]) -> list[dict[str, Any]]:
    """Return what `answers.yes_no` does, from the scores alone."""
    rows = []
    for run, result in results.items():
        yes, truth = (result.scores["protocol"].get(f"yes/{key}") for key in ("said", "right"))
        if yes is not None and truth is not None:
            rates = {"yes": yes, "truth": truth, "false": None, "bins": []}
            rows.append({"run": run, "questions": result.scores["items"], **rates})
    return rows


def _unparsed(run: str, result: BenchmarkResult) -> dict[str, Any] | None:
    """Return the unparsed answers that the score lists, with their questions."""
    scores = result.scores
    if not scores["unparsed"]:
        return None
    rows: dict[str, Any] = {}
    path = result.folder / answer_files.PREDICTIONS
    inputs.parse_rows(path, "answer", lambda row: rows.update({str(row.get("question_id")): row}))
    listed = []
    for id in scores["unparsed_ids"]:
        row = rows.get(str(id), {})
        listed.append({"id": id, "question": clip(row.get("prompt")), "text": clip(row.get("text"))})
    return {"run": run, "count": scores["unparsed"], "items": scores["items"], "listed": listed}
