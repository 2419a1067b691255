"""Answers to scores: a rule's metrics with intervals, pairs of answer files against each other, and agreement of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.errors import UserError
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, NotScorable, Scored
from reverie_jax.eval.judge_replies import of_answers, read_replies
from reverie_jax.files import write_json

DRAWS = 2000
LISTED = 20
"""Ids of unread answers that a score names; all are in the items' file."""


@dataclasses.dataclass(frozen=True)
class Score:
    """What `reverie score --json` prints, and the readings behind it.

    Attributes:
        metrics: the rule's own names and scale; the first is the headline.
        intervals: 95 % percentile intervals of a bootstrap over units.
        unparsed: questions whose answers say nothing that the rule looks for; they count as the rule has it.
        missing: questions without an answer; they count as the rule has it.
    """

    benchmark: str
    rule: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    items: int
    unparsed: int
    unparsed_ids: Sequence[Any]
    missing: int
    scored: Scored
    answers: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        kept = [field.name for field in dataclasses.fields(self) if field.name not in ("scored", "answers")]
        found = {name: getattr(self, name) for name in kept}
        found["metrics"] = {name: _round(value) for name, value in self.metrics.items()}
        found["intervals"] = {name: [_round(low), _round(high)] for name, (low, high) in self.intervals.items()}
        return found

    def write_items(self, path: Path) -> None:
        """A JSON line a question: its answer, and what the rule took it for."""
        rows = [
            {
                "question_id": reading.id,
                "text": self.answers.get(str(reading.id)),
                "parsed": reading.parsed,
                "right": reading.right,
                "unparsed": reading.unparsed,
                "category": reading.category,
            }
            for reading in self.scored.parsed_answers
        ]
        files.write_lines(path, rows)


def _round(value: float) -> float:
    return round(value, 6)


def score(
    benchmark: Benchmark,
    loaded: BenchmarkData,
    predictions: Path,
    rule: str | None = None,
    *,
    replies: Path | None = None,
    partial: bool = False,
    draws: int = DRAWS,
) -> Score:
    """Scores an answer file, ours or another's; no model, no network.

    Args:
        rule: the benchmark's own by default.
        replies: a judge's, where the rule needs them.
        partial: questions without an answer count as the rule says.

    Raises:
        BenchmarkError: the rule is none of the benchmark's; files are missing or broken; see `files.read_answers`.
    """
    rule = benchmark.rules[0] if rule is None else rule
    if rule not in benchmark.rules:
        raise BenchmarkError(f"--rule {rule}: {benchmark.name} has {', '.join(benchmark.rules)}")
    if rule in benchmark.judged and replies is None:
        raise NotScorable(
            f"{benchmark.name} by the rule {rule} needs a judge's replies: `reverie judge {benchmark.name}` writes them; "
            "name the file with --replies"
        )
    answers = files.read_answers(predictions, benchmark, loaded, partial=partial)
    if not any(key in answers for key in loaded.left_out):
        loaded = dataclasses.replace(loaded, questions=loaded.asked)
    said, judge = (None, {}) if replies is None else read_replies(replies)
    if judge.get("judge/answers", of_answers(answers)) != of_answers(answers):
        raise BenchmarkError(f"{replies}: the judge saw other answers than those of {predictions}; judge these first")
    scored = benchmark.score(loaded, answers, rule, said)
    values = scored.values()
    enough = draws and len(scored.counts) > 1
    intervals = statistics.intervals(scored.counts, scored.metrics, draws=draws) if enough else {}
    unparsed = [reading.id for reading in scored.parsed_answers if reading.unparsed]
    protocol = {**loaded.protocol, **scored.protocol, **judge, **_run(predictions)}
    protocol |= _yes_no(predictions, benchmark, loaded, scored)
    return Score(
        benchmark=benchmark.name,
        rule=rule,
        protocol=protocol,
        metrics=values,
        intervals=intervals,
        items=len(scored.parsed_answers),
        unparsed=len(unparsed),
        unparsed_ids=unparsed[:LISTED],
        missing=sum(str(question.id) not in answers for question in loaded.questions),
        scored=scored,
        answers=answers,
    )


def _run(predictions: Path) -> dict[str, Any]:
    """How our own answers were made, from the record beside them."""
    path = predictions.parent / files.RUN
    if predictions.name != files.PREDICTIONS or not path.exists():
        return {}
    found = files.read_json(path)
    kept = ("model", "identity", "dtype", "template", "tokens", "aspect", "decoding", "new_tokens", "reflect")
    return {f"run/{key}": found[key] for key in kept if key in found}


def _yes_no(predictions: Path, benchmark: Benchmark, loaded: BenchmarkData, scored: Scored) -> dict[str, Any]:
    """Of yes and no: how often each is said and is right; and, where our engine recorded it, how far the model's own
    probability of yes is from how often yes is right (ten equal bins).
    """
    if not benchmark.yes_no:
        return {}
    truth = {str(q.id): {"yes": True, "no": False}.get(q.known["label"], q.known["label"]) for q in loaded.questions}
    found = {
        "yes/said": _round(float(np.mean([reading.parsed == "yes" for reading in scored.parsed_answers]))),
        "yes/right": _round(float(np.mean([truth[str(reading.id)] for reading in scored.parsed_answers]))),
    }
    chances: dict[str, float] = {}

    def take(row: Any) -> None:
        noted = row.get("metadata") if isinstance(row, Mapping) else None
        chance = noted.get("yes") if isinstance(noted, dict) else None
        if isinstance(chance, float | int) and (key := benchmark.key(row, loaded)) in truth:
            chances[str(key)] = float(chance)

    if files.by_id(predictions) is None:  # texts by id say no more than that
        files.parse_rows(predictions, "answer", take)
    if not chances:
        return found
    chance = np.asarray(list(chances.values()))
    label = np.asarray([float(truth[key]) for key in chances])
    place = np.minimum((chance * 10).astype(int), 9)
    gaps = [abs(chance[place == b].sum() - label[place == b].sum()) for b in range(10)]
    return found | {
        "calibration/error": _round(float(sum(gaps) / len(chances))),
        "calibration/brier": _round(float(np.mean((chance - label) ** 2))),
        "calibration/mean_yes": _round(float(chance.mean())),
    }


def compare(ours: Score, theirs: Score, *, draws: int = DRAWS) -> dict[str, Any]:
    """Two answer files to the same questions by the same rule: differences of metrics over the same resampled units, and
    McNemar's exact test of who is right where.

    Raises:
        UserError: they are not of the same questions and rule.
    """
    same = [str(reading.id) for reading in ours.scored.parsed_answers] == [
        str(r.id) for r in theirs.scored.parsed_answers
    ]
    if (ours.benchmark, ours.rule) != (theirs.benchmark, theirs.rule) or not same:
        raise UserError(
            f"{ours.benchmark} by {ours.rule} and {theirs.benchmark} by {theirs.rule}: only answers to the same questions, "
            "by the same rule, are compared"
        )
    if list(ours.scored.units) != list(theirs.scored.units) or list(ours.metrics) != list(theirs.metrics):
        raise UserError(f"{ours.benchmark} by {ours.rule}: the two files are counted in different units")
    apart = statistics.differences(ours.scored.counts, theirs.scored.counts, ours.scored.metrics, draws=draws)
    found: dict[str, Any] = {
        "benchmark": ours.benchmark,
        "rule": ours.rule,
        "differences": {
            name: {"value": _round(one.value), "ci95": [_round(one.low), _round(one.high)]}
            for name, one in apart.items()
        },
    }
    pairs = [
        (mine.right, yours.right)
        for mine, yours in zip(ours.scored.parsed_answers, theirs.scored.parsed_answers, strict=True)
        if mine.right in (0.0, 1.0) and yours.right in (0.0, 1.0)
    ]
    if pairs:
        found["mcnemar"] = statistics.mcnemar(
            sum(mine > yours for mine, yours in pairs), sum(mine < yours for mine, yours in pairs)
        )._asdict()
    return found


def agreement(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Of every two rules over the same answers: the share of questions on which they agree who is right."""
    rows = []
    for number, one in enumerate(scores):
        for other in scores[number + 1 :]:
            right = {str(reading.id): reading.right for reading in other.scored.parsed_answers}
            pairs = [
                (reading.right, right[str(reading.id)])
                for reading in one.scored.parsed_answers
                if reading.right is not None and right.get(str(reading.id)) is not None
            ]
            if pairs:
                same = sum(mine == yours for mine, yours in pairs)
                rows.append({"rules": [one.rule, other.rule], "items": len(pairs), "agree": _round(same / len(pairs))})
    return rows


def write_score(found: Score, path: Path) -> None:
    """The score as JSON, in one move."""
    write_json(path, found.json())
