"""Results of a scoring rule: parsed answers, and counts by cluster that every metric is a function of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.eval.statistics import Statistic, ratio

__all__ = ["CountTable", "Key", "ParsedAnswer", "Scored", "Statistic", "mean", "ratio", "total"]

Key = int | str
"""A question's id as the benchmark's answer files have it: a number stays a number. Ids are compared as text."""


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer as a rule parses it.

    Attributes:
        parsed: the parsed value ("yes", "B", a score); "" for nothing.
        right: 1 for a right answer, 0 for a wrong one, between them for partial credit; None where it does not apply.
        unparsed: the answer contains nothing that the rule looks for, whatever it counts as.
        category: of the question, for tables.
    """

    id: Key
    parsed: str
    right: float | None = None
    unparsed: bool = False
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """The result of a rule.

    Attributes:
        parsed_answers: one for each question, in the order of the questions.
        clusters: names of the rows of `counts`.
        counts: what each cluster adds to the K sums that every metric is a function of.
        metrics: functions of the sums by official name, in the order of display; the first is the headline.
        protocol: what the score depends on beside the questions: parser, judge, options.
    """

    parsed_answers: Sequence[ParsedAnswer]
    clusters: Sequence[str]
    counts: Float[np.ndarray, "N K"]
    metrics: Mapping[str, Statistic]
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return every metric over all clusters."""
        sums = self.counts.sum(0)
        return {name: float(metric(sums)) for name, metric in self.metrics.items()}


class CountTable:
    """Counts by cluster, filled question by question.

    Args:
        columns: names of the K sums.
        clusters: in the order of the rows; later ones are appended.
    """

    def __init__(self, columns: Sequence[str], clusters: Sequence[str] = ()):
        self.columns = {name: number for number, name in enumerate(columns)}
        self.rows: dict[str, np.ndarray] = {cluster: np.zeros(len(self.columns)) for cluster in clusters}

    def add(self, cluster: str, amounts: Mapping[str, float]) -> None:
        """Add amounts by column to the row of a cluster."""
        row = self.rows.setdefault(cluster, np.zeros(len(self.columns)))
        for name, amount in amounts.items():
            row[self.columns[name]] += amount

    def __getitem__(self, name: str) -> int:
        """Return the number of a column."""
        return self.columns[name]

    @property
    def counts(self) -> Float[np.ndarray, "N K"]:
        """The counts, one row for each cluster."""
        return np.stack(list(self.rows.values())) if self.rows else np.zeros((0, len(self.columns)))

    def ratio(self, over: str | Sequence[str], under: str | Sequence[str], scale: float = 1.0) -> Statistic:
        """Return the metric `scale * over / under` of columns by name; several names are summed (see `statistics.ratio`)."""
        names = [[part] if isinstance(part, str) else part for part in (over, under)]
        numerator, denominator = ([self.columns[name] for name in part] for part in names)
        return ratio(numerator, denominator, scale=scale)

    def result(
        self, parsed_answers: Sequence[ParsedAnswer], metrics: Mapping[str, Statistic], protocol: Mapping[str, Any]
    ) -> Scored:
        """Return the result of a rule whose counts are this table."""
        return Scored(parsed_answers, list(self.rows), self.counts, metrics, protocol)


def mean(metrics: Sequence[Statistic]) -> Statistic:
    """Return the unweighted mean of metrics."""
    return lambda sums: np.asarray(np.mean([metric(sums) for metric in metrics], axis=0))


def total(metrics: Sequence[Statistic]) -> Statistic:
    """Return the sum of metrics."""
    return lambda sums: np.asarray(np.sum([metric(sums) for metric in metrics], axis=0))
