"""POPE: the official reading of answers, and metrics against counts made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import pope
from reverie_jax.eval.benchmarks.pope import BenchmarkError, PopeQuestion

READINGS = {
    "No": False,
    "no": False,
    "No.": False,
    "No, there is not": False,
    "no cup": False,
    "There is not a cup": False,
    "Yes, but not": False,
    "Yes, no": False,
    "I see no cup. Yes": False,
    ",No": False,
    "  No": False,
    "No no": False,
    "Yes": True,
    "yes.": True,
    "NO": True,
    "No!": True,
    "(No)": True,
    "**No**": True,
    "No;": True,
    "No\nThere is none": True,
    "No\tway": True,
    "There isn't": True,
    "I cannot see one": True,
    "": True,
    ".no": True,
    ". no": True,
    "1. No": True,
    "Dr. No": True,
    "Nothing": True,
    "Yes. No": True,
    "nO": True,
    "Not": True,
}


@pytest.mark.parametrize("answer", READINGS, ids=repr)
def test_answer_is_read_as_the_official_script_does(answer):
    assert pope.says_yes(answer) == READINGS[answer]


def official(text: str) -> str:
    """The published steps, one by one."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    text = text.replace(",", "")
    words = text.split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


@given(st.lists(st.sampled_from(["No", "no", "not", "Yes", " ", ".", ",", "\n", "!", "N", "o", "a"]), max_size=8))
def test_any_answer_is_read_as_the_official_script_does(pieces):
    text = "".join(pieces)
    assert pope.says_yes(text) == (official(text) == "yes")


cells = st.tuples(st.integers(0, 3), st.booleans(), st.booleans())  # (image, label, predicted yes)


@given(st.lists(cells, min_size=1, max_size=30))
def test_metrics_are_those_of_the_confusion_matrix(rows):
    images = [f"{n}.png" for n in range(4)]
    questions = [PopeQuestion(7 * n, images[image], "?", label) for n, (image, label, _) in enumerate(rows)]
    answers = {7 * n: "Yes." if yes else "No, there is none." for n, (_, _, yes) in enumerate(rows)}
    table = pope.counts(questions, answers, images)
    tp = sum(label and yes for _, label, yes in rows)
    fp = sum(not label and yes for _, label, yes in rows)
    tn = sum(not label and not yes for _, label, yes in rows)
    fn = sum(label and not yes for _, label, yes in rows)
    assert table.shape == (4, 4)
    assert table.sum(0).tolist() == [tp, fp, tn, fn]
    for image in range(4):
        assert table[image].sum() == sum(i == image for i, _, _ in rows)
    precision = tp / (tp + fp) if tp + fp else 0
    recall = tp / (tp + fn) if tp + fn else 0
    wanted = {
        "accuracy": (tp + tn) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0,
        "yes_ratio": (tp + fp) / len(rows),
    }
    found = {name: float(metric(table.sum(0))) for name, metric in pope.METRICS.items()}
    assert found == pytest.approx(wanted)


def test_metrics_by_hand():
    sums = np.asarray([30.0, 10.0, 50.0, 20.0])
    assert float(pope.accuracy(sums)) == pytest.approx(80 / 110)
    assert float(pope.precision(sums)) == pytest.approx(0.75)
    assert float(pope.recall(sums)) == pytest.approx(0.6)
    assert float(pope.f1(sums)) == pytest.approx(2 / 3)
    assert float(pope.yes_ratio(sums)) == pytest.approx(40 / 110)


@pytest.mark.parametrize("metric", pope.METRICS)
def test_dividing_by_nothing_gives_zero(metric):
    assert pope.METRICS[metric](np.zeros((3, 4))).tolist() == [0, 0, 0]
    assert float(pope.METRICS[metric](np.zeros(4))) == 0


def test_only_no_gives_zero_f1_and_no_warning():
    assert float(pope.f1(np.asarray([0.0, 0.0, 5.0, 5.0]))) == 0
    assert float(pope.precision(np.asarray([0.0, 0.0, 5.0, 5.0]))) == 0


@pytest.mark.parametrize("metric", pope.METRICS)
def test_metrics_take_many_sums_at_once(metric):
    sums = np.random.default_rng(0).integers(0, 9, (5, 2, 4)).astype(float)
    whole = pope.METRICS[metric](sums)
    assert whole.shape == (5, 2)
    assert whole[3, 1] == pytest.approx(float(pope.METRICS[metric](sums[3, 1])))


def test_mean_f1_is_the_mean_of_the_splits():
    sums = np.asarray([[8, 2, 9, 1, 3, 3, 3, 3, 0, 0, 5, 5], [1, 0, 0, 0, 1, 1, 1, 1, 4, 4, 0, 0]], float)
    # F1 by hand: 16/19, 6/12, 0 and 1, 2/4, 8/12.
    wanted = [(16 / 19 + 0.5 + 0) / 3, (1 + 0.5 + 8 / 12) / 3]
    assert pope.mean_f1(sums).tolist() == pytest.approx(wanted)
    assert float(pope.mean_f1(sums[0])) == pytest.approx(wanted[0])


QUESTIONS = [
    {"question_id": 1, "image": "a.png", "text": "Is there a cup in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.png", "text": "Is there a dog in the image?", "label": "no"},
]


def lines(path: Path, rows: list) -> Path:
    text = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(text) + "\n", "utf-8")
    return path


def test_questions_are_read_as_written(tmp_path):
    found = pope.read_questions(lines(tmp_path / "q.json", [QUESTIONS[0], "", QUESTIONS[2]]))
    assert found == [
        PopeQuestion(1, "a.png", "Is there a cup in the image?", True),
        PopeQuestion(3, "b.png", "Is there a dog in the image?", False),
    ]


def test_question_may_hold_any_character(tmp_path):
    text = "Is there a \u2028 caf\u00e9\x85?"
    found = pope.read_questions(lines(tmp_path / "q.json", [{**QUESTIONS[0], "text": text}, QUESTIONS[1]]))
    assert found[0].text == text


def test_question_is_asked_with_its_picture(tmp_path):
    talk = pope.conversation(PopeQuestion(1, "a.png", "Is there a cup?", True))
    assert talk.is_open
    assert [turn.text for turn in talk.turns] == ["<image>\nIs there a cup?"]


BROKEN = {
    "no json": "{",
    "no object": "3",
    "no label": {"question_id": 4, "image": "a.png", "text": "?"},
    "unknown label": {**QUESTIONS[0], "question_id": 4, "label": "maybe"},
    "no id": {"image": "a.png", "text": "?", "label": "no"},
    "id no number": {**QUESTIONS[0], "question_id": "four"},
    "id null": {**QUESTIONS[0], "question_id": None},
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_broken_question_is_named_with_its_line(tmp_path, line):
    with pytest.raises(BenchmarkError) as error:
        pope.read_questions(lines(tmp_path / "q.json", [QUESTIONS[0], line]))
    assert re.search(r"q\.json: (row 1 |not valid JSON \(line 2)", str(error.value))


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"none\.json"):
        pope.read_questions(tmp_path / "none.json")
    with pytest.raises(BenchmarkError):
        pope.read_questions(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(BenchmarkError, match=r"bytes\.json"):
        pope.read_questions(tmp_path / "bytes.json")


def test_file_without_questions_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"q\.json"):
        pope.read_questions(lines(tmp_path / "q.json", []))


def test_repeated_question_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="twice"):
        pope.read_questions(lines(tmp_path / "q.json", [QUESTIONS[0], QUESTIONS[0]]))


def test_missing_prediction_is_refused(tmp_path):
    questions = pope.read_questions(lines(tmp_path / "q.json", QUESTIONS))
    with pytest.raises(BenchmarkError, match=r"2 question\(s\).* 1"):
        pope.counts(questions, {2: "No"}, ["a.png", "b.png"])
