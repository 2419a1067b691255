"""POPE: its files, prompts and ids as LLaVA's; three rules against counts made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files, pope
from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.benchmarks.pope import Pope, PopeQuestion
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.makers import SHORT, answer_row, shade, write_json, write_lines
from tests.eval.benchmarks.samples import answer_all, check, headline, load, refused
from tests.eval.benchmarks.test_rules import pope_steps

SPLITS = ("random", "popular", "adversarial")
ROWS = [
    ("COCO_val2014_000000310196.jpg", "Is there a snowboard in the image?", "yes"),
    ("COCO_val2014_000000310196.jpg", "Is there an airplane in the imange?", "no"),
    ("COCO_val2014_000000210789.jpg", "Is there a dog in the image?", "no"),
]


@pytest.fixture
def data(tmp_path):
    return make.pope(tmp_path, random=ROWS, popular=ROWS, adversarial=ROWS)


def questions(**splits: list[tuple[str, bool]]) -> BenchmarkData:
    """Return questions without files: (image, label) of each split."""
    first = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}
    rows = [
        Question(first[split] + number, image, f"Is it?\n{SHORT}", image, {"label": label, "split": split, "plain": ""})
        for split, pairs in splits.items()
        for number, (image, label) in enumerate(pairs)
    ]
    return BenchmarkData(rows, lambda name: b"")


def right(question: Question) -> str:
    return "Yes" if question.metadata["label"] else "No"


def test_ids_and_prompts_are_those_of_llava(data):
    _, loaded = load("pope", data)
    by_id = {question.id: question for question in loaded.questions}
    splits = {1: "adversarial", 10_000_001: "random", 20_000_001: "popular"}
    assert {id: q.metadata["split"] for id, q in by_id.items()} == {
        first + n: split for first, split in splits.items() for n in range(3)
    }
    assert by_id[1].text == by_id[10_000_001].text == f"Is there a snowboard in the image?\n{SHORT}"
    assert all(question.image == question.cluster for question in loaded.questions)
    assert shade(loaded.read_image(ROWS[0][0])) < 9


def test_question_files_may_be_lists_with_suffix_and_any_character(tmp_path):
    rows = [
        {"question_id": n, "image": "a.jpg", "text": text, "label": "No"}
        for n, text in enumerate(["Is there a \u2028 caf\u00e9\x85?", f"Is there a cup?\n{SHORT}"], 1)
    ]
    path = write_json(tmp_path / "aokvqa_pope_seem_random.json", rows)
    assert pope.read_questions(path) == [PopeQuestion(n, "a.jpg", rows[n - 1]["text"], False) for n in (1, 2)]
    first, second = load("pope", tmp_path)[1].questions
    assert (first.metadata["label"], second.text) == (False, rows[1]["text"])  # the suffix is not repeated


@pytest.mark.parametrize(("number", "word", "old"), [(2910, "imange", True), (3000, "image", False)])
def test_version_of_labels_is_recorded(tmp_path, number, word, old):
    texts = [f"Is there an oven in the {word if n % 20 == 0 else 'image'}?" for n in range(1, number + 1)]
    make.pope(tmp_path, random=[(f"{n // 600}.jpg", text, "yes") for n, text in enumerate(texts)])
    protocol = load("pope", tmp_path)[1].protocol
    assert protocol["questions/random"] == number
    assert ("August 2023" in str(protocol["labels"])) is old
    assert protocol["imange"] == (145 if old else 0)


def test_two_files_of_one_split_are_an_error(data):
    (data / "old_pope_random.json").write_text((data / "coco_pope_random.json").read_text("utf-8"), "utf-8")
    with refused("coco_pope_random.json", "old_pope_random.json"):
        Pope().load(data)


def test_older_questions_are_not_taken_for_newer_ones(tmp_path):
    """The first rows of the random split agree; afterwards an id is another question."""

    def rows(names: list[str]) -> list[tuple[str, str, str]]:
        return [("a.jpg", f"Is there a {name} in the image?", "yes") for name in names]

    bench, older = load("pope", make.pope(tmp_path / "old", random=rows(["cup", "dog", "car"])))
    _, newer = load("pope", make.pope(tmp_path / "new", random=rows(["cup", "car", "dog", "hat"])))
    path = write_lines(tmp_path / "a.jsonl", [answer_row(q.id, q.text, "Yes") for q in older.questions])
    assert len(answer_files.read_answers(path, bench, older)) == 3
    bare = write_lines(tmp_path / "b.jsonl", [{"question_id": q.id, "text": "Yes"} for q in older.questions])
    for file in (path, bare):
        with refused(file.name):
            answer_files.read_answers(file, bench, newer)


def by_hand(pairs: list[tuple[bool, bool]]) -> dict[str, float]:
    """Return the metrics of (label, whether the answer is yes)."""
    tp, fp, fn = pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False))
    precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn) if tp + fn else 0.0
    return {
        "accuracy": (tp + pairs.count((False, False))) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (tp + fp) / len(pairs),
    }


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))  # label, predicted yes
def test_cells_are_the_confusion_matrix(pairs):
    sums = np.zeros(4)
    for label, yes in pairs:
        sums[pope.cell(label, "Yes." if yes else "No, there is none.")] += 1
    values = {name: float(metric(sums)) for name, metric in pope.METRICS.items()}
    assert values == pytest.approx(by_hand(pairs))


def test_metrics_of_nothing():
    for metric in pope.METRICS.values():  # nothing to divide by, many sums at once
        assert metric(np.zeros((3, 2, 4))).tolist() == [[0, 0]] * 3


ANSWERS = ["Yes", "No", "no", "Yes, but not", "NO", "", "No. Yes", "cannot", "**No**", "no way"]
WORDS = {"Yes, but not": "yes", "Yes": "yes", "": "", "cannot": "", "No. Yes": "", "**No**": ""}
"""What VLMEvalKit takes them for; the others are no."""
rows = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from(ANSWERS)), min_size=1, max_size=8)


@given(st.tuples(rows, rows, rows))
def test_metrics_are_those_of_the_published_steps(drawn):
    """The official rule takes splits apart; the others pool them, and only bare words or known words are yes or no."""
    parts = [[(label, answer) for _, label, answer in part] for part in drawn]
    splits = {split: [(f"{i}.jpg", label) for i, label, _ in part] for split, part in zip(SPLITS, drawn, strict=True)}
    loaded = questions(**splits)
    answers = answer_all(loaded, [answer for part in parts for _, answer in part])
    official, lmms_eval, vlmevalkit = (Pope().score(loaded, answers, rule).values() for rule in Pope.rules)

    expected = {
        f"{split}/{name}": number
        for split, part in zip(SPLITS, parts, strict=True)
        for name, number in by_hand([(label, pope_steps(answer)) for label, answer in part]).items()
    }
    mean = np.mean([expected[f"{split}/f1"] for split in SPLITS])
    assert next(iter(official)) == "f1"
    assert official == pytest.approx({"f1": mean, **expected})

    bare = [(label, answer.strip().lower()) for part in parts for label, answer in part]
    told = by_hand([(label, word == "yes") for label, word in bare if word in ("yes", "no")] or [(False, False)])
    assert lmms_eval == pytest.approx(
        {
            "pope_f1_score": told["f1"],
            "pope_accuracy": sum(word == ("yes" if label else "no") for label, word in bare) / len(bare),
            "pope_precision": told["precision"],
            "pope_recall": told["recall"],
            "pope_yes_ratio": sum(label for label, _ in bare) / len(bare),  # of the labels, whatever the answers
        }
    )

    expected = {}
    pooled = [row for part in parts for row in part]
    for prefix, part in zip(("", *(f"{split}/" for split in SPLITS)), (pooled, *parts), strict=True):
        pairs = [(label, WORDS.get(answer, "no")) for label, answer in part]
        values = by_hand([(label, word == "yes") for label, word in pairs])
        accuracy = sum(word == ("yes" if label else "no") for label, word in pairs) / len(pairs)
        named = {"Overall": values["f1"], "acc": accuracy, "precision": values["precision"], "recall": values["recall"]}
        expected |= {prefix + name: 100 * number for name, number in named.items()}
    assert next(iter(vlmevalkit)) == "Overall"
    assert vlmevalkit == pytest.approx(expected)


# LLaVA-1.5's published run (evaluation notes of LLaVA, issue 626 there).
def test_published_counts_give_the_published_values():
    counts = [(True, "Yes", 1183), (False, "Yes", 31), (False, "No", 1379), (True, "No", 317)]
    loaded = questions(random=[(f"{n % 500}", label) for label, _, times in counts for n in range(times)])
    answers = answer_all(loaded, [word for _, word, times in counts for _ in range(times)])
    values = {name: round(number, 4) for name, number in Pope().score(loaded, answers).values().items()}
    assert len(loaded.questions) == 2910
    expected = {"accuracy": 0.8804, "precision": 0.9745, "recall": 0.7887, "f1": 0.8718}
    assert {name: values[f"random/{name}"] for name in expected} == expected
    assert values["f1"] == 0.8718


def test_other_labels_and_missing_answers(data):
    """The labels of the other version destroy the score; a missing answer is one wrong answer."""
    bench, loaded = load("pope", data)
    answers = answer_all(loaded, right)
    assert [headline(check(bench, loaded, answers, rule)) for rule in bench.rules] == [1, 1, 100]
    other = [
        dataclasses.replace(q, metadata={**q.metadata, "label": not q.metadata["label"]}) for q in loaded.questions
    ]
    assert headline(bench.score(dataclasses.replace(loaded, questions=other), answers)) == 0
    for question in loaded.questions[:2]:  # in the official script a missing line shifts all that follow
        opposite = answers | {str(question.id): "No" if question.metadata["label"] else "Yes"}
        fewer = {id: text for id, text in answers.items() if id != str(question.id)}
        assert bench.score(loaded, fewer).values() == bench.score(loaded, opposite).values()
        with pytest.raises(BenchmarkError):  # the official script joins by position
            bench.export(loaded, fewer, data / "out")
