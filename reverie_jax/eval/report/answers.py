"""Rescore a benchmark's answers beside its files: differences, rules, categories, yes rates."""

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
from reverie_jax.eval.benchmarks import answer_files, find_benchmark, inputs
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, Question
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer
from reverie_jax.eval.judge_replies import REPLIES
from reverie_jax.eval.score import Score, agreement, compare, score

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RescoredRun:
    """A benchmark's answers of several runs, scored again beside its files.

    Attributes:
        benchmark: The benchmark.
        data: Its questions.
        scores: By run and its own rule, without intervals; runs that could not be scored are missing.
        paths: By run, its answer file.
        rows: By run, rows of the answer file by question.
        notes: Problems, one sentence each.
    """

    benchmark: Benchmark
    data: BenchmarkData
    scores: Mapping[str, Score]
    paths: Mapping[str, Path]
    rows: Mapping[str, Mapping[str, Row]]
    notes: Sequence[str]

    @functools.cached_property
    def questions(self) -> dict[str, Question]:
        """Questions by id."""
        return {str(question.id): question for question in self.data.questions}

    @functools.cached_property
    def parsed_answers(self) -> dict[str, dict[str, ParsedAnswer]]:
        """By run and question."""
        return {run: {str(p.id): p for p in score.scored.parsed_answers} for run, score in self.scores.items()}

    def text(self, run: str, id: str) -> str:
        """Return a run's answer to a question; "" without one."""
        return self.scores[run].answers.get(id, "")


def rescore(
    name: str, folders: Mapping[str, Path], stored: Mapping[str, Row], data: Path, images: Path | None
) -> RescoredRun:
    """Score a benchmark's answers of several runs again.

    Args:
        name: Of the benchmark.
        folders: By run, the folder of its answers.
        stored: By run, its scores.json.
        data: The benchmark's files, or a folder of such folders by benchmark.
        images: Folder of images that are not with the data.

    Raises:
        UserError: The benchmark's files cannot be used.
    """
    benchmark = find_benchmark(name)
    questions = inputs.with_images(inputs.load(benchmark, data), images)
    scores, rows, notes = {}, {}, []
    paths = {run: folder / answer_files.PREDICTIONS for run, folder in folders.items()}
    for run, path in paths.items():
        rule, replies = stored[run]["rule"], path.with_name(REPLIES)
        judged = rule in benchmark.judged_rules
        partial = stored[run].get("missing", 0) > 0
        try:
            rows[run] = _rows(path, benchmark, questions)
            if judged and not replies.exists():
                raise UserError(f"the rule {rule} needs a judge's replies; {replies}: no such file")
            scores[run] = score(
                *(benchmark, questions, path, rule), replies=replies if judged else None, partial=partial, draws=0
            )
        except UserError as error:
            notes.append(f"{run} was not scored again: {error}")
            continue
        metrics = stored[run]["metrics"]
        differs = [key for key, value in scores[run].metrics.items() if not _equal(value, metrics.get(key))]
        if differs or scores[run].items != stored[run]["items"]:
            notes.append(
                f"{run}: scores.json does not match its answers ({', '.join(differs[:3]) or 'questions'} differ); "
                "the answers have changed, or the files in --data are of another version"
            )
    return RescoredRun(benchmark, questions, scores, paths, rows, notes)


def _equal(value: float, stored: Any) -> bool:
    if not isinstance(stored, int | float):
        return False
    return math.isclose(value, stored, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(value) and math.isnan(stored))


def _rows(path: Path, benchmark: Benchmark, data: BenchmarkData) -> dict[str, Row]:
    return answer_files.read_answer_file(path, benchmark, data, partial=True).rows


def differences(rescored: RescoredRun, first: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return `score.compare` with the first run and the number of clusters, by other run; and notes on what is missing."""
    results: dict[str, dict[str, Any]] = {}
    notes = []
    for run, theirs in rescored.scores.items():
        if run != first and first in rescored.scores:
            try:
                comparison = compare(theirs, rescored.scores[first])
            except UserError as error:
                notes.append(f"{run} is not compared with {first}: {error}")
            else:
                results[run] = comparison | {"clusters": len(theirs.scored.clusters)}
    return results, notes


def rules(rescored: RescoredRun) -> list[dict[str, Any]]:
    """Return, by run, its headline by every rule that needs no judge, and how far every two rules agree on who is right."""
    results = []
    benchmark = rescored.benchmark
    names = [rule for rule in benchmark.rules if rule not in benchmark.judged_rules]
    for run, own in rescored.scores.items() if len(names) > 1 else ():
        scores = []
        for rule in names:
            try:
                partial = own.missing > 0
                scores.append(
                    own
                    if rule == own.rule
                    else score(benchmark, rescored.data, rescored.paths[run], rule, partial=partial, draws=0)
                )
            except UserError:
                continue  # a package or model that the rule needs is not installed
        if len(scores) > 1:
            heads = {(s.rule, next(iter(s.metrics))): (next(iter(s.metrics.values())), s.unparsed) for s in scores}
            agree = {" and ".join(row["rules"]): (row["agree"], row["items"]) for row in agreement(scores)}
            results.append({"run": run, "heads": heads, "agree": agree})
    return results


def truth(question: Question, parsed: ParsedAnswer | None = None) -> str:
    """Return the right answer by the benchmark's files, or as a graded yes/no answer implies it; "" if it is unknown."""
    metadata = question.metadata
    label = next((metadata[key] for key in ("label", "yes", "truth", "answer", "reference") if key in metadata), None)
    options = metadata.get("options") or metadata.get("choices")
    if isinstance(label, bool):
        return "yes" if label else "no"
    if isinstance(options, Mapping) and label not in (None, ""):
        letter = list(options)[label] if isinstance(label, int) and label < len(options) else str(label)
        return f"{letter}. {options[letter]}" if letter in options else letter
    if "answers" in metadata:
        label = list(dict.fromkeys(metadata["answers"]))
    if label is not None:
        return ", ".join(map(str, label)) if isinstance(label, list | tuple) else str(label)
    if parsed is not None and parsed.parsed in ("yes", "no") and parsed.right in (0.0, 1.0):
        return parsed.parsed if parsed.right else {"yes": "no", "no": "yes"}[parsed.parsed]
    return ""


def categories(rescored: RescoredRun) -> dict[str, dict[str, statistics.Estimate]]:
    """Return the share of right answers by category and run, with its interval over the benchmark's clusters."""
    results: dict[str, dict[str, statistics.Estimate]] = {}
    for run, parsed_answers in rescored.parsed_answers.items():
        tables: dict[str, CountTable] = {}
        for id, parsed in parsed_answers.items():
            if parsed.category and parsed.right is not None:
                table = tables.setdefault(parsed.category, CountTable(("right", "all")))
                table.add(rescored.questions[id].cluster, {"right": parsed.right, "all": 1})
        for category, table in tables.items():
            estimate = statistics.bootstrap(table.counts, {"right": statistics.ratio(0, 1)})["right"]
            results.setdefault(category, {})[run] = estimate
    return results if len(results) > 1 else {}


def yes_no(rescored: RescoredRun) -> list[dict[str, Any]]:
    """Return, by run and over questions whose truth is yes or no: how often yes is answered and is right; calibration."""
    results = []
    for run, parsed_answers in rescored.parsed_answers.items():
        pairs = [
            (parsed_answers[id].parsed, truth(question, parsed_answers[id]))
            for id, question in rescored.questions.items()
            if id in parsed_answers
        ]
        pairs = [(word, label) for word, label in pairs if label in ("yes", "no") and word in ("yes", "no", "")]
        if not any(word for word, _ in pairs):
            continue
        no = [word for word, label in pairs if label == "no"]
        results.append(
            {
                "run": run,
                "questions": len(pairs),
                "yes": [word for word, _ in pairs].count("yes") / len(pairs),
                "truth": 1 - len(no) / len(pairs),
                "false": no.count("yes") / len(no) if no else None,
                "bins": _calibration(rescored, run),
            }
        )
    return results


def _calibration(rescored: RescoredRun, run: str) -> list[tuple[float, float, int]]:
    """Return `statistics.calibration_bins` of the model's recorded probability of yes."""
    pairs = []
    for id, row in rescored.rows[run].items():
        chance, question = (row.get("metadata") or {}).get("yes"), rescored.questions.get(id)
        if question is not None and isinstance(chance, int | float):
            label = truth(question, rescored.parsed_answers[run].get(id))
            if label in ("yes", "no"):
                pairs.append((float(chance), float(label == "yes")))
    return statistics.calibration_bins(*np.asarray(pairs).T) if pairs else []
