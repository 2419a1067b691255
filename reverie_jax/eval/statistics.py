"""Bootstrap intervals over clusters: questions about one image are dependent, so whole images are resampled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

Statistic = Callable[[Float[np.ndarray, "... K"]], Float[np.ndarray, "..."]]
"""A metric as a function of summed counts: [..., K] to [...]."""

DRAWS = 2000
"""Number of resamples."""
_CHUNK = 200
"""Resamples drawn at a time: of a hundred thousand clusters, all of them together would take gigabytes."""


class Estimate(NamedTuple):
    """A metric and its 95 % percentile interval."""

    value: float
    low: float
    high: float

    def json(self, name: str) -> dict[str, float | list[float]]:
        """Return the estimate for a JSON file, with four digits; `name` is the key of the value."""
        return {name: round(self.value, 4), "ci95": [round(self.low, 4), round(self.high, 4)]}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resamples(clusters: int, *, draws: int = DRAWS, seed: int = 0) -> Iterator[Int[np.ndarray, "R N"]]:
    """Yield how often each cluster is drawn in each resample, some resamples at a time.

    They depend on the number of clusters and the seed alone: differences of two models are paired.
    """
    rng = np.random.default_rng(seed)
    chance = np.full(clusters, 1 / clusters)
    for start in range(0, draws, _CHUNK):
        yield rng.multinomial(clusters, chance, size=min(_CHUNK, draws - start))


def _resampled_sums(counts: Float[np.ndarray, "N K"], draws: int) -> Float[np.ndarray, "R K"]:
    return np.concatenate([weights @ counts for weights in resamples(len(counts), draws=draws)])


def _estimate(value: Any, drawn: Float[np.ndarray, "R"]) -> Estimate:
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high))


def bootstrap(
    counts: Float[np.ndarray, "N K"], metrics: Mapping[str, Statistic], *, draws: int = DRAWS
) -> dict[str, Estimate]:
    """Return every metric with its interval, over the same resamples.

    Args:
        counts: What each cluster adds to the K sums that every metric is a function of.
        metrics: Functions of the sums, by name.
        draws: Number of resamples.
    """
    total, sums = counts.sum(0), _resampled_sums(counts, draws)
    return {name: _estimate(metric(total), metric(sums)) for name, metric in metrics.items()}


def differences(
    ours: Float[np.ndarray, "N K"],
    theirs: Float[np.ndarray, "N K"],
    metrics: Mapping[str, Statistic],
    *,
    draws: int = DRAWS,
) -> dict[str, Estimate]:
    """Return every metric of `ours` minus that of `theirs`; the same clusters are resampled for both."""
    width = ours.shape[1]
    both = np.concatenate([ours, theirs], axis=1)
    total, sums = both.sum(0), _resampled_sums(both, draws)

    def difference(metric: Statistic, of: Float[np.ndarray, "... K"]) -> Any:
        return metric(of[..., :width]) - metric(of[..., width:])

    return {name: _estimate(difference(metric, total), difference(metric, sums)) for name, metric in metrics.items()}


class Mcnemar(NamedTuple):
    """Questions that only one of two models answers correctly, and the exact two-sided p-value."""

    only_ours: int
    only_theirs: int
    p: float


def mcnemar(only_ours: int, only_theirs: int) -> Mcnemar:
    """Return McNemar's exact test: if both models are equally good, each such question is either's with probability 1/2."""
    from scipy.stats import binomtest  # it takes two seconds to import

    together = only_ours + only_theirs
    p = float(binomtest(only_ours, together, 0.5).pvalue) if together else 1.0
    return Mcnemar(only_ours, only_theirs, p)


def ratio(
    over: int | Sequence[int], under: int | Sequence[int], *, scale: float = 1.0, empty: float = 0.0
) -> Statistic:
    """Return the statistic `scale` times the sum of columns `over` divided by that of columns `under`.

    Args:
        over: Columns of the numerator.
        under: Columns of the denominator.
        scale: Factor of the ratio, for instance 100.
        empty: Value where the denominator is 0.
    """
    above, below = ([c] if isinstance(c, int) else list(c) for c in (over, under))
    return functools.partial(_divide, above=above, below=below, scale=scale, empty=empty)


def _divide(
    sums: Float[np.ndarray, "... K"], above: list[int], below: list[int], scale: float, empty: float
) -> Float[np.ndarray, "..."]:
    bottom = sums[..., below].sum(-1)
    return np.where(bottom > 0, scale * sums[..., above].sum(-1) / np.where(bottom > 0, bottom, 1.0), empty)


def calibration_bins(
    chance: Float[np.ndarray, "N"], label: Float[np.ndarray, "N"], bins: int = 10
) -> list[tuple[float, float, int]]:
    """Return (mean probability, share of true labels, number of answers) of each equal bin that has answers."""
    index = np.minimum((chance * bins).astype(int), bins - 1)
    members = [index == number for number in range(bins)]
    return [(float(chance[at].mean()), float(label[at].mean()), int(at.sum())) for at in members if at.any()]
