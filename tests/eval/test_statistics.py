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
        error = math.sqrt(sum((x - sum(drawn) / DRAWS) ** 2 for x in drawn) / DRAWS)
        assert estimate == pytest.approx((expected, percentile(drawn, 2.5), percentile(drawn, 97.5), error), abs=1e-9)


def test_a_paired_difference_is_antisymmetric_and_narrower_than_its_sides():
    right = np.random.default_rng(2).random(200) < 0.5  # easy and hard images, the same for both models
    one = np.stack([10.0 * right, np.full(200, 10.0)], 1)
    other = one.copy()
    other[:6, 0] = 10 - other[:6, 0]
    paired, back = differences(one, other, RATIO)["ratio"], differences(other, one, RATIO)["ratio"]
    alone = bootstrap(one, RATIO)["ratio"]
    assert 0 < paired.high - paired.low < 0.6 * (alone.high - alone.low)
    assert paired == pytest.approx((-back.value, -back.high, -back.low, back.error))
    assert differences(one, one.copy(), RATIO)["ratio"] == Estimate(0, 0, 0, 0)


def test_an_interval_covers_the_truth_about_as_often_as_it_claims():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(200):
        share = rng.beta(3, 2, 80)  # questions about one image are dependent
        counts = np.stack([rng.binomial(6, share), np.full(80, 6)], 1).astype(float)
        estimate = bootstrap(counts, RATIO, draws=400)["ratio"]
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


@settings(max_examples=25)
@given(st.integers(1, 4), st.lists(st.lists(st.tuples(rows, rows), min_size=4, max_size=4), min_size=1, max_size=5))
def test_seeds_and_clusters_are_resampled_as_in_the_slow_loop(seeds, cells):
    ours, theirs = (np.asarray([[cell[n][side] for cell in cells] for n in range(seeds)], float) for side in (0, 1))
    draws = zip(weights_of(len(cells), draws=DRAWS), weights_of(seeds, draws=DRAWS, seed=(0, 1)), strict=True)

    def slow(counts, of_clusters, of_seeds) -> float:
        every = [
            counts[seed, cluster]
            for seed in range(seeds)
            for cluster in range(len(cells))
            for _ in range(of_seeds[seed] * of_clusters[cluster])
        ]
        over, under = sum(row[0] for row in every), sum(row[1] for row in every)
        return over / under if under else 0.0

    once = [1] * len(cells), [1] * seeds
    drawn = [(slow(ours, *weights), slow(theirs, *weights)) for weights in draws]
    for estimate, values, value in (
        (bootstrap(ours, RATIO, draws=DRAWS), [mine for mine, _ in drawn], slow(ours, *once)),
        (
            differences(ours, theirs, RATIO, draws=DRAWS),
            [mine - yours for mine, yours in drawn],
            slow(ours, *once) - slow(theirs, *once),
        ),
    ):
        expected = (value, percentile(values, 2.5), percentile(values, 97.5), np.std(values))
        assert estimate["ratio"] == pytest.approx(expected, abs=1e-9)


def test_one_seed_is_no_seeds_and_equal_seeds_add_nothing():
    ours, theirs = np.random.default_rng(1).integers(1, 9, (2, 30, 2)).astype(float)
    one, difference = bootstrap(ours, RATIO), differences(ours, theirs, RATIO)
    assert bootstrap(ours[None], RATIO) == one
    assert differences(ours[None], theirs[None], RATIO) == difference
    thrice = np.stack([ours] * 3)  # a base model has no seeds: it stands beside each seed of an arm
    assert bootstrap(thrice, RATIO)["ratio"] == pytest.approx(one["ratio"])
    assert differences(thrice, theirs, RATIO)["ratio"] == pytest.approx(difference["ratio"])


@pytest.mark.parametrize("other", [(2, 4, 2), (1, 4, 2), (3, 5, 2), (3, 4, 1), (5, 2), (1, 2)])
def test_counts_that_are_not_paired_are_refused(other):
    with pytest.raises(ValueError, match="seeds, clusters"):
        differences(np.ones((3, 4, 2)), np.ones(other), RATIO)


# Variance of seeds, of images and of both together, and the coverage of the interval and of one over images alone. Three
# standard errors of the simulation are 0.038. The last two rows are the limits that the docstring states.
COVERAGE = [
    (8, 0.0, 0.7, 0.5, (0.912, 0.988), (0.912, 0.988)),
    (8, 0.1, 0.7, 0.5, (0.912, 0.988), (0.85, 0.93)),
    (8, 0.1, 0.7, 1.0, (0.912, 1.0), (0.85, 0.93)),
    (8, 0.5, 0.1, 0.1, (0.84, 0.93), (0.0, 0.2)),
    (2, 0.3, 0.7, 0.5, (0.7, 0.85), (0.5, 0.7)),
]


@pytest.mark.parametrize(("seeds", "of_seeds", "of_images", "of_both", "crossed", "alone"), COVERAGE)
def test_an_interval_over_seeds_covers_another_training(seeds, of_seeds, of_images, of_both, crossed, alone):
    rng, images, trials = np.random.default_rng(5), 50, 300
    true = math.sqrt(of_seeds**2 / seeds + of_images**2 / images + of_both**2 / seeds / images)
    covered = np.zeros(3)
    for _ in range(trials):
        parts = (of_seeds, (seeds, 1)), (of_images, (1, images)), (of_both, (seeds, images))
        outcome = sum(scale * rng.normal(size=shape) for scale, shape in parts)
        counts = np.stack([outcome, np.ones_like(outcome)], -1)
        both, images_alone = (bootstrap(of, RATIO, draws=400)["ratio"] for of in (counts, counts.mean(0)))
        shift = 2.8 * true  # a true difference of that size is found in about four of five experiments
        covered += both.low <= 0 <= both.high, images_alone.low <= 0 <= images_alone.high, both.low + shift > 0
    shares = covered / trials
    assert crossed[0] <= shares[0] <= crossed[1]
    assert alone[0] <= shares[1] <= alone[1]
    if crossed[1] > 0.95:
        assert 0.7 <= shares[2] <= 0.9
        assert both.detectable == pytest.approx(2.8 * both.error)


def test_resamples_draw_as_many_clusters_as_there_are():
    weights = np.asarray(weights_of(30, draws=500))
    assert weights.shape == (500, 30)
    assert (weights.sum(1) == 30).all()
    assert np.array_equal(weights, np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=500))
    assert not np.array_equal(weights, weights_of(30, draws=500, seed=1))


def test_one_cluster_and_undefined_resamples():
    assert bootstrap(np.asarray([[1.0, 4.0]]), RATIO)["ratio"] == Estimate(0.25, 0.25, 0.25, 0)
    assert bootstrap(np.asarray([[[1.0, 4.0]], [[3.0, 4.0]]]), RATIO)["ratio"] == pytest.approx(
        (0.5, 0.25, 0.75, 0.18), abs=0.01
    )
    undefined = {"ratio": ratio(0, 1, empty=float("nan"))}
    nothing = bootstrap(np.zeros((2, 3, 2)), undefined)["ratio"]
    assert np.isnan((*nothing, nothing.detectable)).all()
    assert bootstrap(np.zeros((2, 3, 2)), RATIO)["ratio"] == Estimate(0, 0, 0, 0)
    assert bootstrap(np.asarray([[1.0, 1.0], [0.0, 0.0]]), undefined)["ratio"] == Estimate(1, 1, 1, 0)


@pytest.mark.parametrize(("over", "under"), [(3, 4), (2, 0), (0, 5)])
def test_ratio_divides_sums_or_is_empty(over, under):
    sums = np.asarray([over, 99, under], float)
    assert float(ratio(0, 2, empty=-1.0)(sums)) == pytest.approx(over / under if under else -1)
    assert float(ratio([0, 1], [1, 2], scale=10)(sums)) == pytest.approx(10 * (over + 99) / (99 + under))
    assert ratio(0, 2)(np.stack([sums, sums])).shape == (2,)


def test_calibration_bins_and_what_is_written():
    chance, label = np.asarray([0.0, 0.05, 0.95, 1.0]), np.asarray([0.0, 1.0, 1.0, 1.0])
    assert calibration_bins(chance, label) == [(0.025, 0.5, 2), (0.975, 1.0, 2)]  # empty ones are left out
    estimate = Estimate(0.123456, 0.1, 0.98765, 0.01)
    assert estimate.json("f1") == {"f1": 0.1235, "ci95": [0.1, 0.9877]}
    assert estimate.json("f1", power=True) == estimate.json("f1") | {"error": 0.01, "detectable": 0.028}
    assert str(estimate) == "0.123 [0.100, 0.988]"
