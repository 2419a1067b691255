"""Intervals by the bootstrap over images: questions about one image stand or fall together, so images are resampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

Statistic = Callable[[Float[np.ndarray, "... K"]], Float[np.ndarray, "..."]]
"""A metric as a function of summed counts: [..., K] to [...]."""


class Estimate(NamedTuple):
    """A metric and its 95 % percentile interval."""

    value: float
    low: float
    high: float

    def json(self, name: str) -> dict[str, float | list[float]]:
        return {name: round(self.value, 4), "ci95": [round(self.low, 4), round(self.high, 4)]}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resamples(images: int, *, draws: int = 2000, seed: int = 0) -> Int[np.ndarray, "R N"]:
    """How often each image is drawn in each resample. Shared by all models, so differences are paired."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=draws)


def bootstrap(counts: Float[np.ndarray, "N K"], statistic: Statistic, weights: Int[np.ndarray, "R N"]) -> Estimate:
    """A metric of per-image counts.

    Args:
        counts: what each image adds to the K sums that the metric is a function of.
        weights: `resamples(N)`.
    """
    drawn = statistic(weights @ counts)
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Estimate(float(statistic(counts.sum(0))), float(low), float(high))


def difference(
    ours: Float[np.ndarray, "N K"],
    theirs: Float[np.ndarray, "N K"],
    statistic: Statistic,
    weights: Int[np.ndarray, "R N"],
) -> Estimate:
    """Metric of `ours` minus that of `theirs`, the same images resampled for both."""
    drawn = statistic(weights @ ours) - statistic(weights @ theirs)
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Estimate(float(statistic(ours.sum(0)) - statistic(theirs.sum(0))), float(low), float(high))


class Mcnemar(NamedTuple):
    """Of the questions that one of two is right on and the other not: how many each way, and the exact two-sided p."""

    only_ours: int
    only_theirs: int
    p: float


def mcnemar(only_ours: int, only_theirs: int) -> Mcnemar:
    """McNemar's exact test: were both equally good, each such question would be either's with probability one half."""
    together = only_ours + only_theirs
    p = float(binomtest(only_ours, together, 0.5).pvalue) if together else 1.0
    return Mcnemar(only_ours, only_theirs, p)


def ratio(over: int, under: int, empty: float = 0.0) -> Statistic:
    """Sum number `over` divided by sum number `under`; `empty` where there is nothing to divide by."""

    def statistic(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        below = sums[..., under]
        return np.where(below > 0, sums[..., over] / np.maximum(below, 1e-12), empty)

    return statistic
