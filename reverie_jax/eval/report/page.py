"""One self-contained HTML page from output folders of `reverie eval`: what was measured, scores, differences, pictures.

It says what was measured; no sentence is ahead of the numbers. Without the benchmarks' files it has tables alone.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.report import answers
from reverie_jax.eval.report.answers import RescoredRun, number, verdict
from reverie_jax.eval.report.gallery import clip, galleries
from reverie_jax.eval.report.runs import BenchmarkResult, Run, read_runs
from reverie_jax.eval.report.tables import axis, beside_published, grouped, metrics_of, row_of

__all__ = ["BenchmarkResult", "Run", "read_runs", "render"]

COLOURS = ("#8a8f98", "#3b7dd8", "#c2571a", "#2a9d6f", "#a05bc4", "#b8901c", "#d0477a", "#3aa3b0")
MAIN = 6
"""Metrics beneath a headline in the table of scores; the section of the benchmark has all."""

_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b")
_OUTCOMES = ("calibration/", "yes/", "run/model", "run/identity", "judge/answers", "judge/date")
_COUNTED = ("not inferred", "replies of a judge", "unread_replies")
"""Parts of a protocol that are a run's own, and no way in which it was measured."""
_LOWER = frozenset(
    {"chair_i", "chair_s", "rationale_empty", "hallucination_rate", "unread"}
    | {"CHAIRs", "CHAIRi", "CHAIRs_refine", "CHAIR", "Hal", "Cog"}
)
"""Metrics of which less is better."""


def render(runs: Sequence[Run], *, data: Path | None, images: Path | None, shown: int) -> str:
    """The page.

    Args:
        runs: `read_runs(...)`; the first is what the others are compared with.
        data: the benchmarks' files, or a folder of such folders by benchmark.
        images: the pictures, where they are not with the data.
        shown: pictures in each gallery.

    Raises:
        UserError: `data` or `images` is no folder, or fits none of the runs' benchmarks.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.parts))
    again, failed = _again(runs, names, data, images)
    source = (Path(__file__).parent / "page.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number}
    return environment.from_string(source).render(
        day=datetime.date.today().isoformat(),
        runs=runs,
        colours={run.name: COLOURS[place % len(COLOURS)] for place, run in enumerate(runs)},
        measured=_measured(runs),
        protocols=[(name, *_protocols(runs, name)) for name in names],
        scores=[(name, _rule(runs, name), _rows(runs, name)) for name in names],
        published=beside_published(runs, names),
        with_data=data is not None,
        failed=failed,
        differences=[found for name in names if name in again for found in [_differences(runs, again[name])]],
        sections=[_section(runs, name, again.get(name), shown) for name in names],
        lower=_LOWER,
    )


def _again(
    runs: Sequence[Run], names: Sequence[str], data: Path | None, images: Path | None
) -> tuple[dict[str, RescoredRun], list[str]]:
    """Answers beside their files, by benchmark; and why the others could not be read so."""
    found: dict[str, RescoredRun] = {}
    failed = []
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    if data is not None and not data.exists():
        raise UserError(f"--data {data}: no such folder")
    for name in names if data is not None else ():
        folders = {run.name: run.parts[name].folder for run in runs if name in run.parts}
        stored = {run.name: run.parts[name].scores for run in runs if name in run.parts}
        try:
            found[name] = answers.read(name, folders, stored, data, images)  # type: ignore[arg-type]
        except UserError as error:
            failed.append(f"{name}: {error}")
    if failed and not found:
        raise UserError(f"--data: {failed[0]}")
    return found, failed


def _measured(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What each run is, a row a property."""

    def of(key: str) -> list[str]:
        values = [[part.scores["protocol"].get(f"run/{key}") for part in run.parts.values()] for run in runs]
        # Digests are told apart by their beginnings; the protocol below has them whole.
        short = [[_DIGEST.sub(r"\1", _plain(value)) for value in row if value is not None] for row in values]
        return ["; ".join(dict.fromkeys(row)) for row in short]

    def each(value: Any) -> list[str]:
        return ["; ".join(dict.fromkeys(value(part) for part in run.parts.values())) for run in runs]

    rows = [
        ("model", of("model")),
        ("weights", of("identity")),
        ("template", of("template")),
        ("picture", of("aspect")),
        ("decoding", each(lambda part: _decoding(part.scores["protocol"]))),
        ("benchmarks", each(lambda p: f"{p.scores['benchmark']} ({p.scores['items']:,} questions)")),
        ("rules", each(lambda part: part.scores["rule"])),
        ("answers written", each(lambda part: part.day)),
        ("answers without a score", [", ".join(run.unscored) for run in runs]),
        ("folder", [str(run.folder) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def _decoding(protocol: Mapping[str, Any]) -> str:
    how = protocol.get("run/decoding")
    if not isinstance(how, Mapping):
        return "not recorded"
    words = [f"{how['beams']} beams"] if how.get("beams", 1) > 1 else []
    if how.get("temperature"):
        words.append(
            f"drawn at temperature {how['temperature']:g}, top-p {how.get('top_p', 1):g}, seed {how.get('seed')}"
        )
    if how.get("against"):
        words.append(f"contrasted by {how['against']} (alpha {how.get('alpha')}, beta {how.get('beta')})")
    if protocol.get("run/reflect"):
        words.append("the second answer, behind a rationale")
    return ", ".join(words if words else ["greedy"])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


def _protocols(runs: Sequence[Run], name: str) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """A benchmark's protocol, a row a property and a value a run; and the rows in which the runs that have it differ."""
    tables = []
    for run in runs:
        table = {}
        if name in run.parts:
            scores = run.parts[name].scores
            table = {"rule": scores["rule"], "questions": f"{scores['items']:,}"}
            for key, value in scores["protocol"].items():
                parts = value if isinstance(value, Mapping) and key != "run/identity" else {"": value}
                table |= {f"{key}/{part}".rstrip("/"): _plain(inner) for part, inner in parts.items()}
        tables.append(table)
    rows = []
    differs = []
    for key in dict.fromkeys(key for table in tables for key in table):
        row = (key.removeprefix("run/").replace("/", ": "), [table.get(key, "–") or "–" for table in tables])
        rows.append(row)
        own = key.startswith(_OUTCOMES) or key in _COUNTED
        if not own and len({table.get(key) for table in tables if table}) > 1:
            differs.append(row)
    return rows, differs


def _rule(runs: Sequence[Run], name: str) -> str:
    return ", ".join(dict.fromkeys(run.parts[name].scores["rule"] for run in runs if name in run.parts))


def _rows(runs: Sequence[Run], name: str) -> list[dict[str, Any]]:
    whole, _ = grouped(metrics_of(runs, name))
    return [row_of(runs, name, metric) for metric in whole[: MAIN + 1]]


def _differences(runs: Sequence[Run], again: RescoredRun) -> dict[str, Any]:
    """A benchmark's differences to the first run that has it."""
    name = again.benchmark.name
    first = next(run.name for run in runs if name in run.parts)
    found, notes = answers.differences(again, first)
    whole, _ = grouped(metrics_of(runs, name))
    pairs = []
    for run, compared in found.items():
        rows = []
        for metric, estimate in compared["differences"].items():
            low, high = estimate["ci95"]
            says = verdict(low, high, compared["units"])
            digits = row_of(runs, name, metric)["digits"] + 1
            cell = {
                "metric": metric,
                "digits": digits,
                "value": estimate["value"],
                "low": low,
                "high": high,
                "says": says,
            }
            rows.append((metric in whole, cell))
        main = [cell for here, cell in rows if here]
        pairs.append(
            {
                "run": run,
                "main": main[: MAIN + 1],
                "rest": main[MAIN + 1 :] + [cell for here, cell in rows if not here],
                "mcnemar": compared.get("mcnemar"),
                "units": compared["units"],
            }
        )
    return {"benchmark": name, "first": first, "pairs": pairs, "notes": [*again.notes, *notes]}


def _section(runs: Sequence[Run], name: str, again: RescoredRun | None, shown: int) -> dict[str, Any]:
    """A benchmark's own section: categories, yes and no, rules, unread answers, pictures."""
    whole, groups = grouped(metrics_of(runs, name))
    headline = whole[0].rpartition("/")[2]
    tables: list[dict[str, Any]] = []
    for what in dict.fromkeys(what for group in groups.values() for what in group):
        rows = [{"name": group, **row_of(runs, name, here[what])} for group, here in groups.items() if what in here]
        tables.append({"what": what, "rows": rows})
    tables.sort(key=lambda table: table["what"] not in (headline, "score"))
    right = answers.categories(again) if again is not None and not groups else {}
    if right:
        none = (None, None, None)
        cells = [
            [
                dict(zip(("run", "value", "low", "high"), (run.name, *row.get(run.name, none)), strict=True))
                for run in runs
            ]
            for row in right.values()
        ]
        rows = [{"name": c, "digits": 3, "cells": cell} for c, cell in zip(right, cells, strict=True)]
        tables.append({"what": "share of right answers", "rows": rows})
    for table in tables:
        table["scale"] = axis(
            [c[key] for row in table["rows"] for c in row["cells"] for key in ("value", "low", "high")]
        )
    protocols = {run.name: run.parts[name].scores["protocol"] for run in runs if name in run.parts}
    first = next(iter(protocols))
    return {
        "name": name,
        "rule": _rule(runs, name),
        "rest": [row_of(runs, name, metric) for metric in whole[MAIN + 1 :]],
        "tables": tables,
        "yes_no": answers.yes_no(again) if again is not None else _yes_no(runs, name),
        "calibration": {
            run: {key: protocol[f"calibration/{key}"] for key in ("error", "brier", "mean_yes")}
            for run, protocol in protocols.items()
            if "calibration/error" in protocol
        },
        "rules": answers.rules(again) if again is not None else [],
        "unread": [
            found for run in runs if name in run.parts for found in [_unread(run.name, run.parts[name])] if found
        ],
        "galleries": galleries(again, first, shown) if again is not None else [],
    }


def _yes_no(runs: Sequence[Run], name: str) -> list[dict[str, Any]]:
    """How often each run says yes, as its scores have it: `page_answers.yes_no` without the benchmark's files."""
    found = []
    for run in runs:
        scores = run.parts[name].scores if name in run.parts else {"protocol": {}}
        said, right = (scores["protocol"].get(f"yes/{key}") for key in ("said", "right"))
        if said is not None and right is not None:
            row = {
                "run": run.name,
                "questions": scores["items"],
                "yes": said,
                "truth": right,
                "false": None,
                "bins": [],
            }
            found.append(row)
    return found


def _unread(run: str, part: BenchmarkResult) -> dict[str, Any] | None:
    """Answers that say nothing the rule looks for: those that the score names, with what was asked."""
    scores = part.scores
    if not scores["unparsed"]:
        return None
    rows: dict[str, Any] = {}
    files.parse_rows(
        part.folder / files.PREDICTIONS, "answer", lambda row: rows.update({str(row.get("question_id")): row})
    )
    listed = []
    for id in scores["unparsed_ids"]:
        row = rows.get(str(id), {})
        listed.append({"id": id, "question": clip(row.get("prompt")), "text": clip(row.get("text"))})
    return {"run": run, "count": scores["unparsed"], "items": scores["items"], "listed": listed}
