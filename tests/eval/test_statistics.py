"""The bootstrap against a slow loop, and what must hold of any interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.statistics import Estimate, bootstrap, difference, resamples, share

SHARE = share(0, 1)


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def slow(rows: list[tuple[float, float]], weights: np.ndarray) -> list[float]:
    """The ratio of each resample, drawing images one by one."""
    found = []
    for draw in weights.tolist():
        over = under = 0.0
        for times, row in zip(draw, rows, strict=True):
            for _ in range(times):
                over, under = over + row[0], under + row[1]
        found.append(over / under if under else 0.0)
    return found


tables = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=8)


@settings(max_examples=20)
@given(tables, st.integers(0, 99))
def test_interval_is_that_of_the_slow_loop(rows, seed):
    counts = np.asarray(rows, float)
    weights = resamples(len(rows), draws=60, seed=seed)
    drawn = slow(rows, weights)
    found = bootstrap(counts, SHARE, weights)
    total = sum(under for _, under in rows)
    assert found.value == pytest.approx(sum(over for over, _ in rows) / total if total else 0)
    assert found.low == pytest.approx(percentile(drawn, 2.5))
    assert found.high == pytest.approx(percentile(drawn, 97.5))


@settings(max_examples=20)
@given(tables, st.data(), st.integers(0, 99))
def test_difference_resamples_both_alike(rows, data, seed):
    other = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=len(rows), max_size=len(rows)))
    weights = resamples(len(rows), draws=60, seed=seed)
    drawn = [a - b for a, b in zip(slow(rows, weights), slow(other, weights), strict=True)]
    found = difference(np.asarray(rows, float), np.asarray(other, float), SHARE, weights)
    assert found.low == pytest.approx(percentile(drawn, 2.5))
    assert found.high == pytest.approx(percentile(drawn, 97.5))
    ones = np.ones((1, len(rows)), int)
    assert found.value == pytest.approx(slow(rows, ones)[0] - slow(other, ones)[0])


def test_a_model_differs_from_itself_by_nothing():
    counts = np.random.default_rng(0).integers(0, 7, (50, 2)).astype(float)
    assert difference(counts, counts.copy(), SHARE, resamples(50)) == Estimate(0, 0, 0)


def test_difference_changes_sign_with_its_sides():
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 7, (40, 2)).astype(float) for _ in range(2))
    weights = resamples(40)
    there, back = difference(one, other, SHARE, weights), difference(other, one, SHARE, weights)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_paired_interval_is_narrower_than_its_sides():
    rng = np.random.default_rng(2)
    right = rng.random(200) < 0.5  # hard and easy pictures, the same for both models
    one = np.stack([10.0 * right, np.full(200, 10.0)], 1)
    other = one.copy()
    other[:6, 0] = 10 - other[:6, 0]
    weights = resamples(200)
    paired, alone = difference(one, other, SHARE, weights), bootstrap(one, SHARE, weights)
    assert 0 < paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    weights = resamples(80, draws=400)
    covered = 0
    for _ in range(200):
        share = rng.beta(3, 2, 80)  # questions about one image stand together
        counts = np.stack([rng.binomial(6, share), np.full(80, 6)], 1).astype(float)
        found = bootstrap(counts, SHARE, weights)
        covered += found.low <= 0.6 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_resamples_draw_as_many_images_as_there_are():
    weights = resamples(30, draws=500)
    assert weights.shape == (500, 30)
    assert (weights.sum(1) == 30).all()
    assert (weights >= 0).all()
    assert abs(weights.mean(0) - 1).max() < 0.2
    assert np.array_equal(weights, resamples(30, draws=500))
    assert not np.array_equal(weights, resamples(30, draws=500, seed=1))


def test_one_image_leaves_no_doubt():
    assert bootstrap(np.asarray([[1.0, 4.0]]), SHARE, resamples(1)) == Estimate(0.25, 0.25, 0.25)


@given(st.integers(0, 9), st.integers(0, 9))
def test_ratio_divides_sums_or_says_empty(over, under):
    sums = np.asarray([over, 99, under], float)
    assert float(share(0, 2, empty=-1.0)(sums)) == pytest.approx(over / under if under else -1)
    assert share(0, 2)(np.stack([sums, sums])).shape == (2,)


def test_undefined_resamples_are_left_out():
    counts = np.asarray([[1.0, 1.0], [0.0, 0.0]])
    found = bootstrap(counts, share(0, 1, empty=float("nan")), resamples(2))
    assert found == Estimate(1, 1, 1)


def test_estimate_is_written_with_four_digits():
    estimate = Estimate(0.123456, 0.1, 0.98765)
    assert estimate.json("f1") == {"f1": 0.1235, "ci95": [0.1, 0.9877]}
    assert str(estimate) == "0.123 [0.100, 0.988]"
