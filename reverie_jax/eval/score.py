"""Score answer files: a rule's metrics with intervals, comparisons of two answer files, and agreement of rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.errors import UserError
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import answer_files, inputs
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, NotScorable, Row
from reverie_jax.eval.benchmarks.scoring import Scored
from reverie_jax.eval.judge_replies import answers_digest, read_replies
from reverie_jax.files import write_json

LISTED = 20
"""Unparsed answers whose ids are in scores.json; the details file has all of them."""

_RUN_KEYS = (
    *("model", "checksums", "dtype", "template", "tokenization", "image_aspect_ratio", "decoding_protocol", "decoding"),
    *("max_new_tokens", "reflect", "request", "versions", "dates"),
)
"""Keys of run.json that a score records."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The content of scores.json, and the parsed answers that it summarizes.

    Attributes:
        benchmark: Name of the benchmark.
        rule: Name of the scoring rule.
        protocol: What the score depends on: questions, rule, judge, model.
        metrics: By the rule's own names and scale; the first is the headline.
        intervals: 95 % percentile intervals of a bootstrap over clusters.
        items: Number of questions.
        unparsed: Number of answers that contain nothing the rule looks for; they count as the rule defines.
        unparsed_ids: Question ids of the first `LISTED` of them.
        missing: Number of questions without an answer; they count as the rule defines.
        scored: The rule's result.
        answers: Texts by question id, as they are in the file.
        scale: Of the metrics.
        notes: For the user: what is odd about the answers.
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
    scale: str = ""
    notes: Sequence[str] = ()

    def json(self) -> dict[str, Any]:
        """Return the content of scores.json; numbers have six decimals."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("scored", "answers")]
        content = {name: getattr(self, name) for name in names}
        content["metrics"] = {name: _round(value) for name, value in self.metrics.items()}
        content["intervals"] = {name: [_round(low), _round(high)] for name, (low, high) in self.intervals.items()}
        return content

    def write_details(self, path: Path) -> None:
        """Write one JSON line for each question: its answer, and how the rule parsed it."""
        rows = [
            {
                "question_id": parsed.id,
                "text": self.answers.get(str(parsed.id)),
                "parsed": parsed.parsed,
                "right": parsed.right,
                "unparsed": parsed.unparsed,
                "category": parsed.category,
            }
            for parsed in self.scored.parsed_answers
        ]
        inputs.write_lines(path, rows)


def _round(value: float | np.floating[Any]) -> float:
    return round(float(value), 6)


def score(
    benchmark: Benchmark,
    data: BenchmarkData,
    predictions: Path,
    rule: str | None = None,
    *,
    replies: Path | None = None,
    partial: bool = False,
    draws: int = statistics.DRAWS,
) -> Score:
    """Score an answer file, of this package or another's; no model, no network.

    Args:
        benchmark: The benchmark.
        data: Its questions.
        predictions: The answer file.
        rule: Scoring rule; None for the benchmark's own.
        replies: File of a judge's replies, for rules that need them.
        partial: Accept missing answers; they count as the rule defines.
        draws: Resamples for the intervals; 0 for none.

    Raises:
        BenchmarkError: The benchmark has no such rule, or a file is missing or broken; see `answer_files.read_answers`.
        NotScorable: The rule needs a judge's replies.
    """
    rule = benchmark.rules[0] if rule is None else rule
    if rule not in benchmark.rules:
        raise BenchmarkError(f"--rule {rule}: unknown; {benchmark.name} has {', '.join(benchmark.rules)}")
    if rule in benchmark.judged_rules and replies is None:
        raise NotScorable(
            f"{benchmark.name}: the rule {rule} needs a judge's replies; write them with "
            f"`reverie judge {benchmark.name}` and name the file with --replies"
        )
    file = answer_files.read_answer_file(predictions, benchmark, data, partial=partial)
    answers = file.texts
    if not any(key in answers for key in data.unavailable):
        data = dataclasses.replace(data, questions=data.available)
    reply_texts, judge = (None, {}) if replies is None else read_replies(replies, data)
    digest = answers_digest(answers)
    if judge.get("judge/answers", digest) != digest:
        raise BenchmarkError(
            f"{replies}: these replies are about other answers than {predictions}; run `reverie judge`"
        )
    words = answer_files.for_rule(benchmark, answers, rule)
    scored = benchmark.score(data, words, rule, reply_texts)
    intervals: dict[str, tuple[float, float]] = {}
    if draws and len(scored.counts) > 1:
        estimates = statistics.bootstrap(scored.counts, scored.metrics, draws=draws)
        intervals = {name: (estimate.low, estimate.high) for name, estimate in estimates.items()}
    unparsed = [parsed.id for parsed in scored.parsed_answers if parsed.unparsed]
    protocol = {**data.protocol, **scored.protocol, **judge, **_run_record(predictions)}
    protocol |= _yes_no(file.rows, benchmark, data, scored)
    if thoughtful := answer_files.count_thoughts(answers):
        protocol["answers with thoughts"] = f"{thoughtful}, {'as they are' if words is answers else 'taken out'}"
    return Score(
        benchmark=benchmark.name,
        rule=rule,
        protocol=protocol,
        metrics=scored.values(),
        intervals=intervals,
        items=len(scored.parsed_answers),
        unparsed=len(unparsed),
        unparsed_ids=unparsed[:LISTED],
        missing=sum(str(question.id) not in answers for question in data.questions),
        scored=scored,
        answers=answers,
        scale=benchmark.scale_of(rule),
        notes=[*file.notes, *answer_files.thoughts_note(predictions, benchmark, answers, rule)],
    )


def _run_record(predictions: Path) -> dict[str, Any]:
    """Return how answers of `reverie eval` were made, from run.json beside them."""
    path = predictions.parent / answer_files.RUN
    if predictions.name != answer_files.PREDICTIONS or not path.exists():
        return {}
    record = inputs.read_json(path)
    return {f"run/{key}": record[key] for key in _RUN_KEYS if record.get(key) is not None}


def _yes_no(rows: Mapping[str, Row], benchmark: Benchmark, data: BenchmarkData, scored: Scored) -> dict[str, Any]:
    """Return the shares of answers and of labels that are yes, and the calibration of P(yes), if recorded."""
    if not benchmark.yes_no:
        return {}
    words = {"yes": True, "no": False}
    truth = {str(q.id): words.get(q.metadata["label"], q.metadata["label"]) for q in data.questions}
    counted = [parsed for parsed in scored.parsed_answers if parsed.right is not None]
    rates = {
        "yes/said": _round(np.mean([parsed.parsed == "yes" for parsed in counted])),
        "yes/right": _round(np.mean([truth[str(parsed.id)] for parsed in counted])),
    }
    recorded = {id: row["metadata"].get("yes") for id, row in rows.items() if isinstance(row.get("metadata"), Mapping)}
    chances = {id: float(yes) for id, yes in recorded.items() if isinstance(yes, float | int) and id in truth}
    if not chances:
        return rates
    chance = np.asarray(list(chances.values()))
    label = np.asarray([float(truth[key]) for key in chances])
    gaps = [count * abs(mean - share) for mean, share, count in statistics.calibration_bins(chance, label)]
    return rates | {
        "calibration/error": _round(sum(gaps) / len(chances)),
        "calibration/brier": _round(np.mean((chance - label) ** 2)),
        "calibration/mean_yes": _round(chance.mean()),
    }


def compare(ours: Score, theirs: Score, *, draws: int = statistics.DRAWS) -> dict[str, Any]:
    """Compare two answer files to the same questions by the same rule.

    Returns:
        Differences of metrics over the same resampled clusters, and McNemar's exact test of who is right where.

    Raises:
        UserError: They are not of the same questions, or not by the same rule.
    """
    ids = [[str(parsed.id) for parsed in one.scored.parsed_answers] for one in (ours, theirs)]
    if (ours.benchmark, ours.rule) != (theirs.benchmark, theirs.rule) or ids[0] != ids[1]:
        raise UserError(
            f"{ours.benchmark} by {ours.rule} cannot be compared with {theirs.benchmark} by {theirs.rule}: questions and "
            "rule must be the same"
        )
    if list(ours.scored.clusters) != list(theirs.scored.clusters) or list(ours.metrics) != list(theirs.metrics):
        raise UserError(f"{ours.benchmark} by {ours.rule}: the two files are counted in different clusters")
    differences = statistics.differences(ours.scored.counts, theirs.scored.counts, ours.scored.metrics, draws=draws)
    result: dict[str, Any] = {
        "benchmark": ours.benchmark,
        "rule": ours.rule,
        "differences": {
            name: {"value": _round(estimate.value), "ci95": [_round(estimate.low), _round(estimate.high)]}
            for name, estimate in differences.items()
        },
    }
    pairs = [
        (mine.right, yours.right)
        for mine, yours in zip(ours.scored.parsed_answers, theirs.scored.parsed_answers, strict=True)
        if mine.right in (0.0, 1.0) and yours.right in (0.0, 1.0)
    ]
    if pairs:
        only = sum(mine > yours for mine, yours in pairs), sum(mine < yours for mine, yours in pairs)
        result["mcnemar"] = statistics.mcnemar(*only)._asdict()
    return result


def agreement(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return, for every two rules over the same answers, the share of questions on which they agree who is right."""
    rows = []
    for one, other in itertools.combinations(scores, 2):
        right = {str(parsed.id): parsed.right for parsed in other.scored.parsed_answers}
        pairs = [
            (parsed.right, right[str(parsed.id)])
            for parsed in one.scored.parsed_answers
            if parsed.right is not None and right.get(str(parsed.id)) is not None
        ]
        if pairs:
            agree = sum(mine == yours for mine, yours in pairs) / len(pairs)
            rows.append({"rules": [one.rule, other.rule], "items": len(pairs), "agree": _round(agree)})
    return rows


def write_score(score: Score, path: Path) -> None:
    """Write scores.json atomically."""
    write_json(path, score.json())
