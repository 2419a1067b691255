"""Pieces of a page: metric groups, axes, verdicts, truths, hallucinations, published scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import find_benchmark, names
from reverie_jax.eval.benchmarks.interface import BenchmarkData, Question
from reverie_jax.eval.benchmarks.published import SCORES, SOURCES
from reverie_jax.eval.benchmarks.scoring import ParsedAnswer, Scored
from reverie_jax.eval.report import gallery, tables
from reverie_jax.eval.report.answers import RescoredRun, truth
from reverie_jax.eval.report.template import number, verdict
from reverie_jax.eval.score import Score


@pytest.mark.parametrize(
    ("low", "high", "clusters", "expected"),
    [
        (0.1, 0.2, 100, "higher"),
        (-0.2, -0.1, 100, "lower"),
        (0.0, 0.2, 100, "no significant difference"),
        (0.1, 0.1, 1, "no interval"),
        (math.nan, 0.1, 100, "no interval"),
        (0.1, 0.2, 5, "higher (rough: 5 clusters)"),
    ],
)
def test_verdict_of_an_interval(low, high, clusters, expected):
    assert verdict(low, high, clusters) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.8125, "+0.81"), (-2.0, "−2.00"), (None, "–"), (math.inf, "–")])
def test_numbers(value, expected):
    assert number(value, 2, "+") == expected


def test_published_scores_have_a_benchmark_and_a_source():
    assert {score.benchmark for score in SCORES} <= set(names())
    assert {score.source for score in SCORES} == set(SOURCES)
    assert all(score.value > 0 for score in SCORES)
    keys = [(score.model, score.benchmark, score.metric) for score in SCORES]
    assert len(set(keys)) == len(keys)


def test_metrics_in_groups():
    metrics = ["perception", "cognition", "OCR", "OCR/acc", "OCR/acc+", "count", "count/acc"]
    whole, groups = tables.group_metrics(metrics)
    assert whole == ["perception", "cognition"]
    assert groups == {
        "OCR": {"score": "OCR", "acc": "OCR/acc", "acc+": "OCR/acc+"},
        "count": {"score": "count", "acc": "count/acc"},
    }
    assert tables.group_metrics(["pope/f1", "chair_i"]) == (["pope/f1", "chair_i"], {})
    listed = ["total", "capability/rec", "capability/ocr"]
    _, groups = tables.group_metrics(listed, find_benchmark("mm-vet").list_metrics)
    assert list(groups) == listed[1:]


@pytest.mark.parametrize(
    "values", [[0.5], [0.0, 0.0], [], [None, math.nan], [-3.0, 2000.0], [0.801, 0.802], [12.5, 87.1]]
)
def test_an_axis_holds_its_values(values):
    axis = tables.axis(values)
    assert axis["low"] < axis["high"]
    assert 2 <= len(axis["ticks"]) <= 8
    slack = 1e-9 * max(1.0, *map(abs, (axis["low"], axis["high"])))
    finite = [value for value in values if value is not None and not math.isnan(value)]
    assert all(axis["low"] - slack <= value <= axis["high"] + slack for value in finite)


@pytest.mark.parametrize(
    ("metadata", "parsed", "expected"),
    [
        ({"label": True}, None, "yes"),
        ({"label": "no"}, None, "no"),
        ({"yes": False}, None, "no"),
        ({"answer": "B", "options": {"A": "cat", "B": "dog"}}, None, "B. dog"),
        ({"answer": 1, "choices": {"A": "cat", "B": "dog"}}, None, "B. dog"),
        ({"answer": "", "options": {"A": "cat"}}, None, ""),
        ({"answers": ("red", "red", "blue")}, None, "red, blue"),
        ({"truth": ["dog", "cat"]}, None, "dog, cat"),
        ({"reference": "two cups"}, None, "two cups"),
        ({}, None, ""),
        ({}, ("yes", 0.0), "no"),
        ({}, ("no", 1.0), "no"),
    ],
)
def test_truth_of_a_question(metadata, parsed, expected):
    assert truth(Question(1, None, "?", "u", metadata), parsed and ParsedAnswer(1, *parsed)) == expected


HALLUCINATIONS = {
    "chair": (ParsedAnswer(0, "cat, not: dog, not: tie", 0.0), ["dog", "tie"]),
    "object-halbench": (ParsedAnswer(0, "not: dog", 0.0), ["dog"]),
    "amber": (ParsedAnswer(0, "dog, tie", 0.0, category="generative"), ["dog", "tie"]),
    "mmhal": (ParsedAnswer(0, "1", 1 / 6), ["rated 1"]),
    "gqa": (ParsedAnswer(0, "dog", 0.0), []),
}


@pytest.mark.parametrize("name", HALLUCINATIONS)
def test_answers_that_name_what_is_not_in_the_image_have_a_gallery(name):
    parsed, expected = HALLUCINATIONS[name]
    questions = [Question(number, None, "Describe it.", str(number)) for number in range(3)]
    parsed_answers = [parsed, ParsedAnswer(1, "cat", 1.0), ParsedAnswer(2, "", None, True)]
    scored = Scored(parsed_answers, ["0", "1", "2"], np.zeros((3, 1)), {})
    score = Score(name, "official", {}, {}, {}, 3, 1, [2], 0, scored, {"0": "A dog.", "1": "A cat.", "2": ""})
    data = BenchmarkData(questions, lambda name: b"")
    rescored = RescoredRun(find_benchmark(name), data, {"run": score}, {}, {"run": {}}, [])
    galleries = gallery.galleries(rescored, "run", 6)
    if not expected:
        assert galleries == []
        return
    assert [(shown["title"], shown["questions"]) for shown in galleries] == [("run names what is not in the image", 1)]
    (card,) = galleries[0]["cards"]
    assert card["image"] is None
    assert card["rows"][0]["answers"][0]["hallucinated"] == expected
