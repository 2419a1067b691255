"""POPE: its files, prompts and ids as LLaVA's; three rules against the published steps and counts made by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files, pope
from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.benchmarks.pope import Pope, PopeQuestion
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.makers import SHORT, answer_row, shade, write_json, write_lines
from tests.eval.benchmarks.samples import answer_all, by_answer, check, headline, load

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
    assert sorted(by_id) == [offset + n for offset in (0, 10_000_000, 20_000_000) for n in (1, 2, 3)]
    assert {by_id[n].metadata["split"] for n in (1, 2, 3)} == {"adversarial"}
    assert {by_id[10_000_000 + n].metadata["split"] for n in (1, 2, 3)} == {"random"}
    assert by_id[1].text == by_id[10_000_001].text == f"Is there a snowboard in the image?\n{SHORT}"
    assert all(question.image == question.cluster for question in loaded.questions)
    assert shade(loaded.read_image(ROWS[0][0])) < 9


def test_existing_suffix_is_not_repeated(tmp_path):
    make.pope(tmp_path, random=[("a.jpg", f"Is there a cup in the image?\n{SHORT}", "yes")] * 2)
    question, _ = load("pope", tmp_path)[1].questions
    assert question.text == f"Is there a cup in the image?\n{SHORT}"


def test_question_files_may_be_lists_and_have_any_character(tmp_path):
    text = "Is there a \u2028 caf\u00e9\x85?"
    rows = [{"question_id": 1, "image": "a.jpg", "text": text, "label": "No"}]
    path = write_json(tmp_path / "aokvqa_pope_seem_random.json", rows)
    assert pope.read_questions(path) == [PopeQuestion(1, "a.jpg", text, False)]
    (question,) = load("pope", tmp_path)[1].questions
    assert question.metadata["label"] is False


@pytest.mark.parametrize(("number", "word", "old"), [(2910, "imange", True), (3000, "image", False)])
def test_version_of_labels_is_recorded(tmp_path, number, word, old):
    rows = [
        {
            "question_id": n,
            "image": f"{n // 6}.jpg",
            "text": f"Is there an oven in the {word}?" if n % 20 == 0 else "Is there a cup in the image?",
            "label": "yes" if n % 2 else "no",
        }
        for n in range(1, number + 1)
    ]
    write_lines(tmp_path / "coco_pope_random.json", rows)
    protocol = load("pope", tmp_path)[1].protocol
    assert protocol["questions/random"] == number
    assert ("August 2023" in str(protocol["labels"])) is old
    assert protocol["imange"] == (145 if old else 0)


def test_two_files_of_one_split_are_an_error(data):
    (data / "old_pope_random.json").write_text((data / "coco_pope_random.json").read_text("utf-8"), "utf-8")
    with pytest.raises(BenchmarkError, match=r"coco_pope_random\.json.*old_pope_random\.json"):
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
        with pytest.raises(BenchmarkError, match=file.name):
            answer_files.read_answers(file, bench, newer)


# What the three rules parse; "" is neither. LLaVA splits on spaces alone; VLMEvalKit deletes only the signs of VQA's scorer.
PARSED = by_answer(
    {
        ("yes", "yes", "yes"): ["Yes", "yes"],
        ("no", "no", "no"): ["No", " No "],
        ("yes", "no", "no"): ["NO", "nO", "\nno\n"],
        ("yes", "", "yes"): ["Yes."],
        ("no", "", "no"): ["No.", ",No", "No no", "no cup", "No, there is not.", "# No"],
        ("yes", "", "no"): ["No!", "(No)", "No;", "No\tway", "No\nThere is none", ".no", "1. No", "Dr. No"],
        ("no", "", ""): ["Yes, there is no doubt.", "Yes, no", "There is not a cup", "I see no cup. Yes"],
        ("no", "", "yes"): ["Yes, but not quite"],
        ("yes", "", ""): [
            *("No\nYes", "There isn't", "cannot", "None", "Nothing", "Not", "", "Yes. No", "nein"),
            *("\u4e0d\u662f", "S\xed", "**No**", "'No'", "No:", "Yes.No"),
        ],
    }
)


@pytest.mark.parametrize("answer", PARSED, ids=repr)
def test_answers_are_parsed_by_each_rule(answer):
    loaded = questions(random=[("a", True), ("b", False)])
    for rule, word in zip(Pope.rules, PARSED[answer], strict=True):
        parsed = Pope().score(loaded, answer_all(loaded, answer), rule).parsed_answers
        assert [(p.parsed, p.right) for p in parsed] == [(word, word == "yes"), (word, word == "no")]
        assert rule == "official" or [p.unparsed for p in parsed] == [word == ""] * 2


UNPARSED = {"Yes": False, "No.": False, "There is not a cup": False, "**No**": False}
UNPARSED |= {"": True, "a cup": True, "There isn't": True}


@pytest.mark.parametrize("answer", UNPARSED, ids=repr)
def test_answers_without_a_verdict_are_counted_apart(answer):
    loaded = questions(random=[("a", True)])
    (parsed,) = Pope().score(loaded, answer_all(loaded, answer)).parsed_answers
    assert parsed.unparsed is UNPARSED[answer]
    assert parsed.parsed  # the official rule takes a side nevertheless


def published_steps(text: str) -> bool:
    first = text[: text.find(".")] if "." in text else text
    tokens = first.replace(",", "").split(" ")
    return not any(token in ("No", "not", "no") for token in tokens)


@given(st.lists(st.sampled_from(["No", "no", "not", "Yes", " ", ".", ",", "\n", "!", "N", "o", "a"]), max_size=8))
def test_any_answer_is_parsed_by_the_published_steps(pieces):
    text = "".join(pieces)
    assert pope.says_yes(text) == published_steps(text)


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


cells = st.tuples(st.integers(0, 3), st.booleans(), st.booleans())  # image, label, predicted yes


@given(st.lists(cells, min_size=1, max_size=30))
def test_counts_of_images_are_the_confusion_matrix(rows):
    images = [f"{n}.png" for n in range(4)]
    asked = [PopeQuestion(7 * n, images[image], "?", label) for n, (image, label, _) in enumerate(rows)]
    answers = {7 * n: "Yes." if yes else "No, there is none." for n, (_, _, yes) in enumerate(rows)}
    table = pope.counts(asked, answers, images)
    assert table.sum(1).tolist() == [sum(image == n for image, _, _ in rows) for n in range(4)]
    sums = table.sum(0)
    assert {name: float(metric(sums)) for name, metric in pope.METRICS.items()} == pytest.approx(
        by_hand([(label, yes) for _, label, yes in rows])
    )
    answers.pop(0)
    with pytest.raises(BenchmarkError, match="0"):
        pope.counts(asked, answers, images)


def test_metrics_by_hand():
    sums = np.asarray([30.0, 10.0, 50.0, 20.0])
    values = {name: float(metric(sums)) for name, metric in pope.METRICS.items()}
    assert values == pytest.approx(
        {"accuracy": 80 / 110, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes_ratio": 40 / 110}
    )
    for metric in pope.METRICS.values():  # nothing to divide by, many sums at once
        assert metric(np.zeros((3, 2, 4))).tolist() == [[0, 0]] * 3
    sums = np.asarray([[8, 2, 9, 1, 3, 3, 3, 3, 0, 0, 5, 5], [1, 0, 0, 0, 1, 1, 1, 1, 4, 4, 0, 0]], float)
    # F1 by hand: 16/19, 6/12, 0 and 1, 2/4, 8/12.
    assert pope.mean_f1(sums).tolist() == pytest.approx([(16 / 19 + 0.5 + 0) / 3, (1 + 0.5 + 8 / 12) / 3])


ANSWERS = ["Yes", "No", "no", "Yes, but not", "NO", "", "No. Yes", "cannot", "**No**", "no way"]
rows = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from(ANSWERS)), min_size=1, max_size=8)


def scored_rows(drawn, rule: str):
    splits = {split: [(f"{i}.jpg", label) for i, label, _ in part] for split, part in zip(SPLITS, drawn, strict=False)}
    loaded = questions(**splits)
    return Pope().score(loaded, answer_all(loaded, [answer for part in drawn for *_, answer in part]), rule)


@given(st.tuples(rows, rows, rows))
def test_official_metrics_are_those_of_the_published_steps(drawn):
    values = scored_rows(drawn, "official").values()
    expected = {
        f"{split}/{name}": number
        for split, part in zip(SPLITS, drawn, strict=True)
        for name, number in by_hand([(label, published_steps(answer)) for _, label, answer in part]).items()
    }
    assert next(iter(values)) == "f1"
    assert values.pop("f1") == pytest.approx(np.mean([expected[f"{split}/f1"] for split in SPLITS]))
    assert values == pytest.approx(expected)


@given(st.tuples(rows, rows))
def test_lmms_eval_pools_splits_and_counts_only_bare_words(drawn):
    bare = [(label, answer.strip().lower()) for part in drawn for _, label, answer in part]
    tp, fp, fn = bare.count((True, "yes")), bare.count((False, "yes")), bare.count((True, "no"))
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    assert scored_rows(drawn, "lmms-eval").values() == pytest.approx(
        {
            "pope_f1_score": 2 * precision * recall / (precision + recall) if precision + recall else 0,
            "pope_accuracy": (tp + bare.count((False, "no"))) / len(bare),
            "pope_precision": precision,
            "pope_recall": recall,
            "pope_yes_ratio": sum(label for label, _ in bare) / len(bare),  # of the labels, whatever the answers
        }
    )


@given(st.tuples(rows, rows))
def test_vlmevalkit_pools_splits_in_percent_and_unknown_is_not_yes(drawn):
    words = {"Yes, but not": "yes", "Yes": "yes", "": "", "cannot": "", "No. Yes": "", "**No**": ""}

    def four(part, prefix: str = ""):
        pairs = [(label, words.get(answer, "no")) for _, label, answer in part]
        values = by_hand([(label, word == "yes") for label, word in pairs])
        accuracy = sum(word == ("yes" if label else "no") for label, word in pairs) / len(pairs)
        names = {"Overall": values["f1"], "acc": accuracy, "precision": values["precision"], "recall": values["recall"]}
        return {prefix + name: 100 * number for name, number in names.items()}

    scored = scored_rows(drawn, "vlmevalkit")
    expected = four(drawn[0] + drawn[1]) | four(drawn[0], "random/") | four(drawn[1], "popular/")
    assert headline(scored) == scored.values()["Overall"]
    assert scored.values() == pytest.approx(expected)


# LLaVA-1.5's published run (evaluation notes of LLaVA, issue 626 there).
def test_published_counts_give_the_published_values():
    counts = [(True, "Yes", 1183), (False, "Yes", 31), (False, "No", 1379), (True, "No", 317)]
    loaded = questions(random=[(f"{n % 500}", label) for label, _, times in counts for n in range(times)])
    values = (
        Pope().score(loaded, answer_all(loaded, [word for _, word, times in counts for _ in range(times)])).values()
    )
    assert len(loaded.questions) == 2910
    assert round(values["random/f1"], 4) == round(values["f1"], 4) == 0.8718
    assert round(values["random/accuracy"], 4) == 0.8804
    assert round(values["random/precision"], 4) == 0.9745
    assert round(values["random/recall"], 4) == 0.7887


def test_all_right_and_other_labels(data):
    """The labels of the other version destroy the score."""
    bench, loaded = load("pope", data)
    answers = answer_all(loaded, right)
    assert [headline(check(bench, loaded, answers, rule)) for rule in bench.rules] == [1, 1, 100]
    other = [
        dataclasses.replace(q, metadata={**q.metadata, "label": not q.metadata["label"]}) for q in loaded.questions
    ]
    assert headline(bench.score(dataclasses.replace(loaded, questions=other), answers)) == 0


def test_missing_answer_is_wrong(data):
    """In the official script a missing line shifts all that follow; here it is one wrong answer."""
    bench, loaded = load("pope", data)
    for question in loaded.questions[:2]:
        answers = answer_all(loaded, right)
        opposite = answers | {str(question.id): "No" if question.metadata["label"] else "Yes"}
        answers.pop(str(question.id))
        assert bench.score(loaded, answers).values() == bench.score(loaded, opposite).values()


def test_answer_files_are_in_the_order_of_the_questions(data, tmp_path):
    bench, loaded = load("pope", data)
    answers = answer_all(loaded, lambda question: f"No {question.id}")
    paths = bench.export(loaded, answers, tmp_path / "out")
    assert [path.name for path in paths] == [f"pope_{split}_answers.json" for split in SPLITS]
    written = [json.loads(line) for line in paths[2].read_text("utf-8").splitlines()]
    assert written == [{"question": text, "answer": f"No {n}"} for n, (_, text, _) in enumerate(ROWS, 1)]
    answers.popitem()
    with pytest.raises(BenchmarkError):  # the official script joins by position
        bench.export(loaded, answers, tmp_path / "out")
