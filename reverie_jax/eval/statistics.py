"""Bootstrap intervals over clusters, and over training seeds too.

Questions about one image are dependent, so whole clusters are resampled. Counts of several seeds of a training, [S, N, K],
are resampled by seed and by cluster at once (Owen's pigeonhole bootstrap, arXiv 0712.1111): an interval then covers another
training on other images. It is conservative where what a seed changes differs from image to image, since that part of the
variance is counted up to three times. The part that a seed changes for all images alike is underestimated by the factor
(S - 1) / S: with fewer than about 5 seeds an interval is too narrow, and one seed says nothing about others.
"""

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
_POWER = 1.96 + 0.84
"""Standard errors in a detectable difference: normal quantiles of 97.5 % (the test) and 80 % (its power)."""
_SEED_DRAWS = (0, 1)
"""Random seed of the draws of training seeds: other numbers than those of the clusters."""


class Estimate(NamedTuple):
    """A metric, its 95 % percentile interval, and its standard error (the standard deviation over resamples)."""

    value: float
    low: float
    high: float
    error: float

    @property
    def detectable(self) -> float:
        """The smallest true difference from 0 that a two-sided test at 5 % would find with a power of 80 %.

        It is unknown, not 0, where no resample differs and `error` is 0.
        """
        return _POWER * self.error

    def json(self, name: str, *, power: bool = False) -> dict[str, float | list[float]]:
        """Return the estimate for a JSON file, with four digits.

        Args:
            name: Key of the value.
            power: Add the standard error and the detectable difference.
        """
        content: dict[str, float | list[float]] = {
            name: round(self.value, 4),
            "ci95": [round(self.low, 4), round(self.high, 4)],
        }
        if power:
            content |= {"error": round(self.error, 4), "detectable": round(self.detectable, 4)}
        return content

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resamples(clusters: int, *, draws: int = DRAWS, seed: int | Sequence[int] = 0) -> Iterator[Int[np.ndarray, "R N"]]:
    """Yield how often each cluster is drawn in each resample, some resamples at a time.

    They depend on the number of clusters and the seed alone: differences of two models are paired.
    """
    rng = np.random.default_rng(seed)
    chance = np.full(clusters, 1 / clusters)
    for start in range(0, draws, _CHUNK):
        yield rng.multinomial(clusters, chance, size=min(_CHUNK, draws - start))


def _sums(counts: Float[np.ndarray, "*S N K"], draws: int) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "R K"]]:
    """Return the sums over clusters, as the mean of the seeds, of all counts and of each resample."""
    counts = counts[None] if counts.ndim == 2 else counts
    seeds, clusters, width = counts.shape
    table = counts.transpose(1, 0, 2).reshape(clusters, seeds * width)
    chunks = zip(resamples(clusters, draws=draws), resamples(seeds, draws=draws, seed=_SEED_DRAWS), strict=True)
    sums = [
        np.einsum("rs,rsk->rk", of_seeds / seeds, (of_clusters @ table).reshape(-1, seeds, width))
        for of_clusters, of_seeds in chunks
    ]
    return counts.mean(0).sum(0), np.concatenate(sums)


def _estimate(value: Any, drawn: Float[np.ndarray, "R"]) -> Estimate:
    drawn = drawn[~np.isnan(drawn)]  # resamples in which the metric is undefined
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), float(drawn.std()) if len(drawn) else np.nan)


def bootstrap(
    counts: Float[np.ndarray, "*S N K"], metrics: Mapping[str, Statistic], *, draws: int = DRAWS
) -> dict[str, Estimate]:
    """Return every metric with its interval, over the same resamples.

    Args:
        counts: What each cluster adds to the K sums that every metric is a function of; [S, N, K] for S seeds of a training,
            of which a metric takes the mean sums.
        metrics: Functions of the sums, by name.
        draws: Number of resamples.
    """
    total, sums = _sums(counts, draws)
    return {name: _estimate(metric(total), metric(sums)) for name, metric in metrics.items()}


def differences(
    ours: Float[np.ndarray, "*S N K"],
    theirs: Float[np.ndarray, "*T M L"],
    metrics: Mapping[str, Statistic],
    *,
    draws: int = DRAWS,
) -> dict[str, Estimate]:
    """Return every metric of `ours` minus that of `theirs`; the same clusters and seeds are resampled for both.

    Args:
        ours: Counts as for `bootstrap`; the n-th seed of both sides has the same order of data and the like.
        theirs: Counts of the same clusters; without an axis of seeds, what each seed of `ours` is compared with.
        metrics: Functions of the sums, by name.
        draws: Number of resamples.

    Raises:
        ValueError: They have other seeds, clusters or sums than each other.
    """
    width = ours.shape[-1]
    if ours.shape[-2:] != theirs.shape[-2:] or (ours.ndim == theirs.ndim and ours.shape != theirs.shape):
        raise ValueError(
            f"counts {ours.shape} and {theirs.shape} are not paired: seeds, clusters and sums must be the same"
        )
    total, sums = _sums(np.concatenate(np.broadcast_arrays(ours, theirs), axis=-1), draws)

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
