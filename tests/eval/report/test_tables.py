"""What a page's tables and galleries are made of: groups, axes, verdicts, truths, flags, published scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import NAMES, benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkData, ParsedAnswer, Question, Scored
from reverie_jax.eval.report import answers as page_answers
from reverie_jax.eval.report import gallery, published, tables
from reverie_jax.eval.score import Score


@pytest.mark.parametrize(
    ("low", "high", "units", "says"),
    [
        (0.1, 0.2, 100, "higher"),
        (-0.2, -0.1, 100, "lower"),
        (0.0, 0.2, 100, "no difference beyond the interval"),
        (-0.1, 0.1, 100, "no difference beyond the interval"),
        (0.1, 0.1, 1, "no interval"),
        (math.nan, 0.1, 100, "no interval"),
        (0.1, 0.2, 5, "higher (rough: 5 units)"),
    ],
)
def test_verdict(low, high, units, says):
    assert page_answers.verdict(low, high, units) == says


def test_published_scores_are_of_metrics_and_sources_that_exist():
    for one in published.SCORES:
        assert one.benchmark in NAMES
        assert one.source in published.SOURCES
        assert one.value > 0
    keys = [(one.model, one.benchmark, one.metric) for one in published.SCORES]
    assert len(set(keys)) == len(keys)


def test_metrics_in_groups():
    whole, groups = tables.grouped(["perception", "cognition", "OCR", "OCR/acc", "OCR/acc+", "count", "count/acc"])
    assert whole == ["perception", "cognition"]
    assert groups["OCR"] == {"score": "OCR", "acc": "OCR/acc", "acc+": "OCR/acc+"}
    assert list(groups) == ["OCR", "count"]
    assert tables.grouped(["pope/f1", "chair_i"]) == (["pope/f1", "chair_i"], {})
    _, listed = tables.grouped(["total", "capability/rec", "capability/ocr"])
    assert list(listed) == ["capability/rec", "capability/ocr"]


@pytest.mark.parametrize(
    "values", [[0.5], [0.0, 0.0], [], [None, math.nan], [-3.0, 2000.0], [0.801, 0.802], [12.5, 87.1]]
)
def test_an_axis_holds_its_values(values):
    found = tables.axis(values)
    assert found["low"] < found["high"]
    assert 2 <= len(found["ticks"]) <= 8
    real = [value for value in values if value is not None and not math.isnan(value)]
    slack = 1e-9 * max(1.0, *map(abs, (found["low"], found["high"])))
    assert all(found["low"] - slack <= value <= found["high"] + slack for value in real)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"label": True}, "yes"),
        ({"label": "no"}, "no"),
        ({"yes": False}, "no"),
        ({"answer": "B", "options": {"A": "cat", "B": "dog"}}, "B. dog"),
        ({"answer": 1, "choices": {"A": "cat", "B": "dog"}}, "B. dog"),
        ({"answer": "", "options": {"A": "cat"}}, ""),
        ({"answers": ("red", "red", "blue")}, "red, blue"),
        ({"truth": ["dog", "cat"]}, "dog, cat"),
        ({"reference": "two cups"}, "two cups"),
        ({}, ""),
    ],
)
def test_truth_of_a_question(known, says):
    assert page_answers.truth(Question(1, None, "?", "u", known)) == says


def test_truth_follows_from_a_reading():
    assert page_answers.truth(Question(1, None, "?", "u"), ParsedAnswer(1, "yes", 0.0)) == "no"
    assert page_answers.truth(Question(1, None, "?", "u"), ParsedAnswer(1, "no", 1.0)) == "no"


def test_descriptions_that_name_what_is_not_there_are_shown():
    questions = [Question(number, None, "Describe it.", str(number)) for number in range(3)]
    parsed_answers = [
        ParsedAnswer(0, "cat, not: dog, not: tie", 0.0),
        ParsedAnswer(1, "cat", 1.0),
        ParsedAnswer(2, "", None, True),
    ]
    scored = Scored(parsed_answers, ["0", "1", "2"], np.zeros((3, 1)), {})
    answers = {"0": "A cat, a dog and a tie.", "1": "A cat.", "2": ""}
    found = Score("chair", "official", {}, {}, {}, 3, 1, [2], 0, scored, answers)
    loaded = BenchmarkData(questions, lambda name: b"")
    again = page_answers.RescoredRun(benchmark("chair"), loaded, {"run": found}, {}, {"run": {}}, [])
    (shown,) = gallery.galleries(again, "run", 6)
    assert (shown["title"], shown["questions"]) == ("run names what is not there", 1)
    (card,) = shown["cards"]
    assert card["picture"] is None
    assert card["rows"][0]["answers"][0]["flagged"] == ["dog", "tie"]
