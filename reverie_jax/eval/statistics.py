"""Intervals by the bootstrap over images: questions about one image stand or fall together, so images are resampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


_CHUNK = 200
"""Resamples that are drawn together: of a hundred thousand units, all of them would take gigabytes."""


def resampled(counts: Float[np.ndarray, "N K"], *, draws: int = 2000, seed: int = 0) -> Float[np.ndarray, "R K"]:
    """The sums of each resample of the units: those of `resamples(N)`, a part at a time."""
    rng = np.random.default_rng(seed)
    chance = np.full(len(counts), 1 / len(counts))

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, draws, _CHUNK):
            yield rng.multinomial(len(counts), chance, size=min(_CHUNK, draws - start)) @ counts

    return np.concatenate(list(parts()))


def interval(drawn: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Of a metric's values in all resamples: where the middle 95 % lie."""
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def intervals(
    counts: Float[np.ndarray, "N K"], metrics: Mapping[str, Statistic], *, draws: int = 2000
) -> dict[str, tuple[float, float]]:
    """The interval of every metric, over the same resamples."""
    sums = resampled(counts, draws=draws)
    return {name: interval(metric(sums)) for name, metric in metrics.items()}


def differences(
    ours: Float[np.ndarray, "N K"],
    theirs: Float[np.ndarray, "N K"],
    metrics: Mapping[str, Statistic],
    *,
    draws: int = 2000,
) -> dict[str, Estimate]:
    """Every metric of `ours` minus that of `theirs`, the same units resampled for both."""
    width = ours.shape[1]
    sums = resampled(np.concatenate([ours, theirs], axis=1), draws=draws)
    found = {}
    for name, metric in metrics.items():
        value = float(metric(ours.sum(0)) - metric(theirs.sum(0)))
        found[name] = Estimate(value, *interval(metric(sums[:, :width]) - metric(sums[:, width:])))
    return found


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


def share(
    over: int | Sequence[int], under: int | Sequence[int], *, scale: float = 1.0, empty: float = 0.0
) -> Statistic:
    """Sum of the columns `over`, divided by that of the columns `under`, times `scale`; `empty` where that is nothing."""
    above, below = ([c] if isinstance(c, int) else list(c) for c in (over, under))

    def statistic(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        bottom = sums[..., below].sum(-1)
        return np.where(bottom > 0, scale * sums[..., above].sum(-1) / np.where(bottom > 0, bottom, 1.0), empty)

    return statistic
