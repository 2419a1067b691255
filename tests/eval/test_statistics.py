"""The bootstrap against a slow loop, and properties of any interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.statistics import Estimate, bootstrap, calibration_bins, differences, ratio, resamples

RATIO = {"ratio": ratio(0, 1)}
DRAWS = 60
rows = st.tuples(st.integers(0, 5), st.integers(0, 6))


def percentile(values: list[float], percent: float) -> float:
    """Interpolate linearly between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def slow_ratios(rows, weights) -> list[float]:
    """Return the ratio of each resample, adding clusters one by one."""
    ratios = []
    for draw in weights:
        drawn = [row for times, row in zip(draw, rows, strict=True) for _ in range(times)]
        under = sum(row[1] for row in drawn)
        ratios.append(sum(row[0] for row in drawn) / under if under else 0.0)
    return ratios


def weights_of(clusters: int, **options) -> list[list[int]]:
    return np.concatenate(list(resamples(clusters, **options))).tolist()


@settings(max_examples=25)
@given(st.lists(st.tuples(rows, rows), min_size=1, max_size=8))
def test_intervals_equal_the_slow_loop(pairs):
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    weights, once = weights_of(len(pairs), draws=DRAWS), [[1] * len(pairs)]
    mine, yours = slow_ratios(ours, weights), slow_ratios(theirs, weights)
    one, other = np.asarray(ours, float), np.asarray(theirs, float)
    paired = [a - b for a, b in zip(mine, yours, strict=True)]
    value = slow_ratios(ours, once)[0]
    for estimate, drawn, expected in (
        (bootstrap(one, RATIO, draws=DRAWS)["ratio"], mine, value),
        (differences(one, other, RATIO, draws=DRAWS)["ratio"], paired, value - slow_ratios(theirs, once)[0]),
    ):
        assert estimate == pytest.approx((expected, percentile(drawn, 2.5), percentile(drawn, 97.5)))


def test_a_paired_difference_is_antisymmetric_and_narrower_than_its_sides():
    right = np.random.default_rng(2).random(200) < 0.5  # easy and hard images, the same for both models
    one = np.stack([10.0 * right, np.full(200, 10.0)], 1)
    other = one.copy()
    other[:6, 0] = 10 - other[:6, 0]
    paired, back = differences(one, other, RATIO)["ratio"], differences(other, one, RATIO)["ratio"]
    alone = bootstrap(one, RATIO)["ratio"]
    assert 0 < paired.high - paired.low < 0.6 * (alone.high - alone.low)
    assert paired == pytest.approx((-back.value, -back.high, -back.low))
    assert differences(one, one.copy(), RATIO)["ratio"] == Estimate(0, 0, 0)


def test_an_interval_covers_the_truth_about_as_often_as_it_claims():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(200):
        share = rng.beta(3, 2, 80)  # questions about one image are dependent
        counts = np.stack([rng.binomial(6, share), np.full(80, 6)], 1).astype(float)
        estimate = bootstrap(counts, RATIO, draws=400)["ratio"]
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_resamples_draw_as_many_clusters_as_there_are():
    weights = np.asarray(weights_of(30, draws=500))
    assert weights.shape == (500, 30)
    assert (weights.sum(1) == 30).all()
    assert np.array_equal(weights, np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=500))
    assert not np.array_equal(weights, weights_of(30, draws=500, seed=1))


def test_one_cluster_and_undefined_resamples():
    assert bootstrap(np.asarray([[1.0, 4.0]]), RATIO)["ratio"] == Estimate(0.25, 0.25, 0.25)
    undefined = {"ratio": ratio(0, 1, empty=float("nan"))}
    assert bootstrap(np.asarray([[1.0, 1.0], [0.0, 0.0]]), undefined)["ratio"] == Estimate(1, 1, 1)


@pytest.mark.parametrize(("over", "under"), [(3, 4), (2, 0), (0, 5)])
def test_ratio_divides_sums_or_is_empty(over, under):
    sums = np.asarray([over, 99, under], float)
    assert float(ratio(0, 2, empty=-1.0)(sums)) == pytest.approx(over / under if under else -1)
    assert float(ratio([0, 1], [1, 2], scale=10)(sums)) == pytest.approx(10 * (over + 99) / (99 + under))
    assert ratio(0, 2)(np.stack([sums, sums])).shape == (2,)


def test_calibration_bins_and_what_is_written():
    chance, label = np.asarray([0.0, 0.05, 0.95, 1.0]), np.asarray([0.0, 1.0, 1.0, 1.0])
    assert calibration_bins(chance, label) == [(0.025, 0.5, 2), (0.975, 1.0, 2)]  # empty ones are left out
    estimate = Estimate(0.123456, 0.1, 0.98765)
    assert estimate.json("f1") == {"f1": 0.1235, "ci95": [0.1, 0.9877]}
    assert str(estimate) == "0.123 [0.100, 0.988]"
