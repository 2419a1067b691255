"""What a page says of answers, where the benchmark's files are at hand: differences, rules, yes and no."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.errors import UserError
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import benchmark as find_benchmark
from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, ParsedAnswer, Question, Table
from reverie_jax.eval.judge_replies import REPLIES
from reverie_jax.eval.score import Score, agreement, compare, score

FEW = 20
"""Fewer units than this make an interval that is only rough."""
BINS = 10

"""As `eval.predict` calls it, which needs a model to be imported."""

Row = Mapping[str, Any]


def number(value: float | None, digits: int, sign: str = "") -> str:
    """ "0.812"; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def verdict(low: float, high: float, units: int) -> str:
    """What an interval of a difference allows to say; `units` are what was resampled for it."""
    if units < 2 or not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    rough = "" if units >= FEW else f" (rough: {units} units)"
    return ("higher" if low > 0 else "lower" if high < 0 else "no difference beyond the interval") + rough


@dataclasses.dataclass(frozen=True)
class RescoredRun:
    """A benchmark's answers, read once more beside its files.

    Attributes:
        scores: by run, by its own rule, without intervals; runs that could not be scored are missing.
        paths: by run, its answer file.
        rows: by run, rows of the answer file by question.
        notes: what could not be done, a sentence each.
    """

    benchmark: Benchmark
    loaded: BenchmarkData
    scores: Mapping[str, Score]
    paths: Mapping[str, Path]
    rows: Mapping[str, Mapping[str, Row]]
    notes: Sequence[str]

    @functools.cached_property
    def questions(self) -> dict[str, Question]:
        return {str(question.id): question for question in self.loaded.questions}

    @functools.cached_property
    def parsed_answers(self) -> dict[str, dict[str, ParsedAnswer]]:
        """By run and question."""
        return {run: {str(r.id): r for r in found.scored.parsed_answers} for run, found in self.scores.items()}


def read(
    name: str, folders: Mapping[str, Path], stored: Mapping[str, Row], data: Path, images: Path | None
) -> RescoredRun:
    """Scores a benchmark's answers of several runs once more.

    Args:
        folders: by run, that of the answers.
        stored: by run, its scores.json.
        data: the benchmark's files, or a folder of such folders by benchmark.

    Raises:
        UserError: the benchmark's files cannot be used.
    """
    one = find_benchmark(name)
    loaded = files.with_images(one.load(data / name if (data / name).is_dir() else data), images)
    scores, rows, notes = {}, {}, []
    paths = {run: folder / files.PREDICTIONS for run, folder in folders.items()}
    for run, path in paths.items():
        rule, replies = stored[run]["rule"], path.with_name(REPLIES)
        try:
            rows[run] = _rows(path, one, loaded)
            if rule in one.judged and not replies.exists():
                raise UserError(f"the rule {rule} needs a judge's replies, and {replies} is not there")
            found = score(
                one,
                loaded,
                path,
                rule,
                replies=replies if rule in one.judged else None,
                partial=stored[run].get("missing", 0) > 0,
                draws=0,
            )
        except UserError as error:
            notes.append(f"{run} was not scored again: {error}")
            continue
        scores[run] = found
        old = stored[run]["metrics"]
        differs = [key for key, value in found.metrics.items() if not _same(value, old.get(key))]
        if differs or found.items != stored[run]["items"]:
            notes.append(
                f"{run}: scores.json and its answers beside these files differ ({', '.join(differs[:3]) or 'questions'}); "
                "the files are of another version, or the answers have changed"
            )
    return RescoredRun(one, loaded, scores, paths, rows, notes)


def _same(one: float, other: Any) -> bool:
    if not isinstance(other, int | float):
        return False
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(one) and math.isnan(other))


def _rows(path: Path, one: Benchmark, loaded: BenchmarkData) -> dict[str, Row]:
    found: dict[str, Row] = {}

    def take(row: Row) -> None:
        for part in one.unfold(row):
            key = one.key(part, loaded)
            if key is not None:
                found[key] = part

    files.parse_rows(path, "answer", take)
    return found


def differences(again: RescoredRun, first: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By other run, `score.compare` with the first one, and its number of units; and why the rest is not compared."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for run, theirs in again.scores.items():
        if run != first and first in again.scores:
            try:
                found[run] = compare(theirs, again.scores[first]) | {"units": len(theirs.scored.units)}
            except UserError as error:
                notes.append(f"{run} is not compared with {first}: {error}")
    return found, notes


def rules(again: RescoredRun) -> list[dict[str, Any]]:
    """By run: its headline by every rule that needs no judge, and how far every two of them agree on who is right."""
    found = []
    names = [rule for rule in again.benchmark.rules if rule not in again.benchmark.judged]
    for run, own in again.scores.items() if len(names) > 1 else ():
        made = []
        for rule in names:
            try:
                partial = own.missing > 0
                made.append(
                    own
                    if rule == own.rule
                    else score(again.benchmark, again.loaded, again.paths[run], rule, partial=partial, draws=0)
                )
            except UserError:
                continue  # what this rule needs (spaCy's vectors, say) is not installed
        if len(made) > 1:
            heads = {
                (one.rule, next(iter(one.metrics))): (next(iter(one.metrics.values())), one.unparsed) for one in made
            }
            agree = {" and ".join(row["rules"]): (row["agree"], row["items"]) for row in agreement(made)}
            found.append({"run": run, "heads": heads, "agree": agree})
    return found


def truth(question: Question, reading: ParsedAnswer | None = None) -> str:
    """The right answer by the benchmark's files, or as a yes/no reading that is right or wrong tells it; else ""."""
    known = question.known
    label = next((known[key] for key in ("label", "yes", "truth", "answer", "reference") if key in known), None)
    options = known.get("options") or known.get("choices")
    if isinstance(label, bool):
        return "yes" if label else "no"
    if isinstance(options, Mapping) and label not in (None, ""):
        letter = list(options)[label] if isinstance(label, int) and label < len(options) else str(label)
        return f"{letter}. {options[letter]}" if letter in options else letter
    if "answers" in known:
        label = list(dict.fromkeys(known["answers"]))
    if label is not None:
        return ", ".join(map(str, label)) if isinstance(label, list | tuple) else str(label)
    if reading is not None and reading.parsed in ("yes", "no") and reading.right in (0.0, 1.0):
        return reading.parsed if reading.right else {"yes": "no", "no": "yes"}[reading.parsed]
    return ""


def categories(again: RescoredRun) -> dict[str, dict[str, statistics.Estimate]]:
    """By category and run: the share of right answers, with its interval over the benchmark's units."""
    unit = {id: question.unit for id, question in again.questions.items()}
    found: dict[str, dict[str, statistics.Estimate]] = {}
    for run, parsed_answers in again.parsed_answers.items():
        tables: dict[str, Table] = {}
        for id, reading in parsed_answers.items():
            if reading.category and reading.right is not None:
                table = tables.setdefault(reading.category, Table(("right", "all")))
                table.add(unit[id], {"right": reading.right, "all": 1})
        for category, table in tables.items():
            weights = statistics.resamples(len(table.counts))
            estimate = statistics.bootstrap(table.counts, statistics.share(0, 1), weights)
            found.setdefault(category, {})[run] = estimate
    return found if len(found) > 1 else {}


def yes_no(again: RescoredRun) -> list[dict[str, Any]]:
    """By run, of questions whose truth is yes or no: how often it says yes, how often that is right, and its calibration."""
    found = []
    for run, parsed_answers in again.parsed_answers.items():
        pairs = [
            (parsed_answers[id].parsed, truth(question, parsed_answers[id]))
            for id, question in again.questions.items()
            if id in parsed_answers
        ]
        asked = [(said, label) for said, label in pairs if label in ("yes", "no") and said in ("yes", "no", "")]
        if not any(said for said, _ in asked):
            continue
        no = [said for said, label in asked if label == "no"]
        found.append(
            {
                "run": run,
                "questions": len(asked),
                "yes": [said for said, _ in asked].count("yes") / len(asked),
                "truth": 1 - len(no) / len(asked),
                "false": no.count("yes") / len(no) if no else None,
                "bins": _bins(again, run),
            }
        )
    return found


def _bins(again: RescoredRun, run: str) -> list[tuple[float, float, int]]:
    """Ten equal bins of the model's own probability of yes: its mean, the share where yes is right, and how many."""
    pairs = []
    for id, row in again.rows[run].items():
        said, question = (row.get("metadata") or {}).get("yes"), again.questions.get(id)
        if question is not None and isinstance(said, int | float):
            label = truth(question, again.parsed_answers[run].get(id))
            if label in ("yes", "no"):
                pairs.append((float(said), float(label == "yes")))
    if not pairs:
        return []
    chance, right = np.asarray(pairs).T
    place = np.minimum((chance * BINS).astype(int), BINS - 1)
    inside = [place == number for number in range(BINS)]
    return [(float(chance[at].mean()), float(right[at].mean()), int(at.sum())) for at in inside if at.any()]
