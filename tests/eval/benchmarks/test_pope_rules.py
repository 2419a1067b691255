"""POPE as a benchmark: its files, prompts and ids as LLaVA's, three rules, both versions of the labels."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.benchmarks.pope import Pope
from tests.eval.benchmarks.makers import SHORT, check, everyone, headline, ids, lines, opened, pope, shade

SPLITS = ("random", "popular", "adversarial")

ROWS = [
    ("COCO_val2014_000000310196.jpg", "Is there a snowboard in the image?", "yes"),
    ("COCO_val2014_000000310196.jpg", "Is there an airplane in the imange?", "no"),
    ("COCO_val2014_000000210789.jpg", "Is there a dog in the image?", "no"),
]


@pytest.fixture
def data(tmp_path):
    return pope(tmp_path, random=ROWS, popular=ROWS, adversarial=ROWS)


def made(splits: dict[str, list[tuple[str, bool]]]) -> BenchmarkData:
    """Questions without files: of each split, (image, label)."""
    first = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}
    questions = [
        Question(first[split] + number, image, f"Is it?\n{SHORT}", image, {"label": label, "split": split, "plain": ""})
        for split, rows in splits.items()
        for number, (image, label) in enumerate(rows)
    ]
    return BenchmarkData(questions, lambda name: b"")


def test_ids_are_those_of_llavas_file(data):
    _, loaded = opened("pope", data)
    assert {q.metadata["split"]: q.id for q in loaded.questions[::3]} == {
        "random": 10_000_001,
        "popular": 20_000_001,
        "adversarial": 1,
    }
    assert sorted(q.id for q in loaded.questions) == [
        *(1, 2, 3),
        *(10_000_001, 10_000_002, 10_000_003),
        *(20_000_001, 20_000_002, 20_000_003),
    ]


def test_prompts_are_llavas_to_the_character(data):
    _, loaded = opened("pope", data)
    by_id = {q.id: q for q in loaded.questions}
    wanted = "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."
    assert by_id[1].text == by_id[10_000_001].text == by_id[20_000_001].text == wanted
    assert by_id[2].text == "Is there an airplane in the imange?\nAnswer the question using a single word or phrase."
    assert all(q.image == q.cluster for q in loaded.questions)


def test_suffix_that_is_there_is_not_doubled(tmp_path):
    pope(tmp_path, random=[("a.jpg", f"Is there a cup in the image?\n{SHORT}", "yes")] * 2)
    question, _ = opened("pope", tmp_path)[1].questions
    assert question.text == f"Is there a cup in the image?\n{SHORT}"


def test_pictures_are_found_by_name(data):
    _, loaded = opened("pope", data)
    assert loaded.read_image(ROWS[0][0])[:2] == b"\xff\xd8"
    assert shade(loaded.read_image(ROWS[0][0])) < 9
    with pytest.raises(BenchmarkError, match=r"COCO_none\.jpg"):
        loaded.read_image("COCO_none.jpg")


def test_question_files_may_be_lists(tmp_path):
    rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "no"}]
    (tmp_path / "aokvqa_pope_seem_random.json").write_text(json.dumps(rows, indent=4), "utf-8")
    (question,) = opened("pope", tmp_path)[1].questions
    assert question.metadata["label"] is False


@pytest.mark.parametrize(("number", "an", "old"), [(2910, "imange", True), (3000, "image", False)])
def test_version_of_labels_is_told(tmp_path, number, an, old):
    rows = [
        {
            "question_id": n,
            "image": f"{n // 6}.jpg",
            "text": f"Is there an oven in the {an}?" if n % 20 == 0 else "Is there a cup in the image?",
            "label": "yes" if n % 2 else "no",
        }
        for n in range(1, number + 1)
    ]
    lines(tmp_path / "coco_pope_random.json", rows)
    protocol = opened("pope", tmp_path)[1].protocol
    assert protocol["questions/random"] == number
    assert ("August 2023" in str(protocol["labels"])) is old
    assert protocol["imange"] == (145 if old else 0)
    json.dumps(dict(protocol))


def test_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"coco_pope_random\.json") as error:
        Pope().load(tmp_path)
    assert "\n" not in str(error.value)


def test_two_files_of_one_split_are_refused(data):
    (data / "old_pope_random.json").write_text((data / "coco_pope_random.json").read_text("utf-8"), "utf-8")
    with pytest.raises(BenchmarkError, match=r"coco_pope_random\.json.*old_pope_random\.json"):
        Pope().load(data)


@pytest.mark.parametrize(
    "row", ["{", {"question_id": 9}, {"question_id": 9, "image": "a", "text": "?", "label": "maybe"}]
)
def test_broken_question_is_refused_in_one_line(tmp_path, row):
    lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a", "text": "?", "label": "no"}, row])
    with pytest.raises(BenchmarkError, match=r"coco_pope_random\.json") as error:
        Pope().load(tmp_path)
    assert "\n" not in str(error.value)


def test_repeated_id_is_refused(tmp_path):
    row = {"question_id": 1, "image": "a", "text": "?", "label": "no"}
    lines(tmp_path / "coco_pope_random.json", [row, row])
    with pytest.raises(BenchmarkError, match="twice"):
        Pope().load(tmp_path)


# Each answer to a question: what the three rules read. "" is neither.
READ = {
    "Yes": ("yes", "yes", "yes"),
    "No": ("no", "no", "no"),
    "yes": ("yes", "yes", "yes"),
    "NO": ("yes", "no", "no"),
    " No ": ("no", "no", "no"),
    "\nno\n": ("yes", "no", "no"),  # LLaVA splits on spaces alone
    "Yes.": ("yes", "", "yes"),
    "No.": ("no", "", "no"),
    "No!": ("yes", "", "no"),
    "(No)": ("yes", "", "no"),
    "No;": ("yes", "", "no"),
    "No, there is not.": ("no", "", "no"),
    "Yes, there is no doubt.": ("no", "", ""),
    "Yes, but not quite": ("no", "", "yes"),
    "No\nYes": ("yes", "", ""),
    "There isn't": ("yes", "", ""),
    "There is not a cup": ("no", "", ""),
    "cannot": ("yes", "", ""),
    "None": ("yes", "", ""),
    "": ("yes", "", ""),
    ".no": ("yes", "", "no"),
    "1. No": ("yes", "", "no"),
    "Dr. No": ("yes", "", "no"),
    "Yes. No": ("yes", "", ""),
    "I see no cup. Yes": ("no", "", ""),
    "nein": ("yes", "", ""),
    "\u4e0d\u662f": ("yes", "", ""),
    "S\u00ed": ("yes", "", ""),
}


@pytest.mark.parametrize("rule", Pope.rules)
@pytest.mark.parametrize("answer", READ, ids=repr)
def test_answers_are_read_by_each_rule(answer, rule):
    loaded = made({"random": [("a", True), ("b", False)]})
    scored = Pope().score(loaded, everyone(loaded, answer), rule)
    wanted = READ[answer][Pope.rules.index(rule)]
    assert [reading.parsed for reading in scored.parsed_answers] == [wanted] * 2
    assert [reading.right for reading in scored.parsed_answers] == [wanted == "yes", wanted == "no"]


# VLMEvalKit takes away the signs of VQA's scorer alone: those that are none of them stay at the word.
@pytest.mark.parametrize("answer", ["**No**", "'No'", "No:", "# No", "Yes.No"], ids=repr)
def test_vlmevalkit_leaves_other_signs_at_the_word(answer):
    loaded = made({"random": [("a", False)]})
    (reading,) = Pope().score(loaded, everyone(loaded, answer), "vlmevalkit").parsed_answers
    assert (reading.parsed, reading.right) == (("no", 1.0) if answer == "# No" else ("", 0.0))


@pytest.mark.parametrize(
    ("answer", "unparsed"),
    [
        ("Yes", False),
        ("No.", False),
        ("There is not a cup", False),
        ("", True),
        ("a cup", True),
        ("There isn't", True),
        ("**No**", False),
    ],
    ids=repr,
)
def test_answers_that_say_neither_are_counted_apart(answer, unparsed):
    loaded = made({"random": [("a", True)]})
    (reading,) = Pope().score(loaded, everyone(loaded, answer)).parsed_answers
    assert reading.unparsed is unparsed
    assert reading.parsed  # the official rule takes a side nevertheless


def official(labels: list[bool], answers: list[str]) -> dict[str, float]:
    """The published steps over lists in file order."""
    guesses = []
    for answer in answers:
        first = answer[: answer.find(".")] if "." in answer else answer
        tokens = first.replace(",", "").split(" ")
        guesses.append(not any(token in ("No", "not", "no") for token in tokens))
    tp = sum(g and label for g, label in zip(guesses, labels, strict=True))
    fp = sum(g and not label for g, label in zip(guesses, labels, strict=True))
    tn = sum(not g and not label for g, label in zip(guesses, labels, strict=True))
    fn = sum(not g and label for g, label in zip(guesses, labels, strict=True))
    precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn) if tp + fn else 0.0
    return {
        "accuracy": (tp + tn) / len(labels),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(guesses) / len(labels),
    }


ANSWERS = ["Yes", "No", "no", "Yes, but not", "NO", "", "No. Yes", "cannot", "**No**", "no way"]
asked = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from(ANSWERS)), min_size=1, max_size=8)


@given(st.tuples(asked, asked, asked))
def test_official_metrics_are_those_of_the_published_steps(drawn):
    splits = dict(zip(SPLITS, drawn, strict=True))
    loaded = made({split: [(f"{i}.jpg", label) for i, label, _ in rows] for split, rows in splits.items()})
    texts = [answer for rows in drawn for _, _, answer in rows]
    scored = check(Pope(), loaded, dict(zip(ids(loaded), texts, strict=True)))
    wanted = {
        split: official([label for _, label, _ in rows], [a for _, _, a in rows]) for split, rows in splits.items()
    }
    values = scored.values()
    assert headline(scored) == pytest.approx(np.mean([wanted[split]["f1"] for split in SPLITS]))
    assert next(iter(values)) == "f1"
    for split in SPLITS:
        for name, value in wanted[split].items():
            assert values[f"{split}/{name}"] == pytest.approx(value)


@given(asked, asked)
def test_lmms_eval_pools_and_counts_bare_words_only(first, second):
    rows = [*first, *second]
    loaded = made(
        {"random": [(str(i), yes) for i, yes, _ in first], "popular": [(str(i), yes) for i, yes, _ in second]}
    )
    scored = check(Pope(), loaded, dict(zip(ids(loaded), [a for *_, a in rows], strict=True)), "lmms-eval")
    bare = [(label, answer.strip().lower()) for _, label, answer in rows]
    tp, fp, fn = bare.count((True, "yes")), bare.count((False, "yes")), bare.count((True, "no"))
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    values = scored.values()
    assert values["pope_accuracy"] == pytest.approx((tp + bare.count((False, "no"))) / len(rows))
    assert values["pope_precision"] == pytest.approx(precision)
    assert values["pope_recall"] == pytest.approx(recall)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert values["pope_f1_score"] == pytest.approx(f1)
    # It is a share of the labels: what the model says does not change it.
    assert values["pope_yes_ratio"] == pytest.approx(sum(label for label, _ in bare) / len(rows))


@given(asked, asked)
def test_vlmevalkit_pools_in_percent_and_unknown_is_not_yes(first, second):
    rows = [*first, *second]
    loaded = made(
        {"random": [(str(i), yes) for i, yes, _ in first], "popular": [(str(i), yes) for i, yes, _ in second]}
    )
    plain = {"Yes, but not": "yes", "Yes": "yes", "": "", "cannot": "", "No. Yes": "", "**No**": "?"}
    answers = ["Yes" if a == "**No**" else a for *_, a in rows]
    scored = check(Pope(), loaded, dict(zip(ids(loaded), answers, strict=True)), "vlmevalkit")
    said = [(label, plain.get(answer, "no")) for (_, label, _), answer in zip(rows, answers, strict=True)]

    def four(pairs):
        tp, fp = pairs.count((True, "yes")), pairs.count((False, "yes"))
        fn = sum(label and word != "yes" for label, word in pairs)
        right = sum((word == "yes") if label else (word == "no") for label, word in pairs)
        precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
        return [100 * value for value in (f1, right / len(pairs), precision, recall)]

    values, names = scored.values(), ("Overall", "acc", "precision", "recall")
    assert headline(scored) == values["Overall"]
    assert [values[name] for name in names] == pytest.approx(four(said))
    assert [values[f"random/{name}"] for name in names] == pytest.approx(four(said[: len(first)]))
    assert [values[f"popular/{name}"] for name in names] == pytest.approx(four(said[len(first) :]))


# LLaVA-1.5's published run (evaluation notes of LLaVA, issue 626 there).
def test_published_counts_give_the_published_values():
    cells = [(True, "Yes", 1183), (False, "Yes", 31), (False, "No", 1379), (True, "No", 317)]
    loaded = made({"random": [(f"{n % 500}", label) for label, _, times in cells for n in range(times)]})
    texts = [word for _, word, times in cells for _ in range(times)]
    values = Pope().score(loaded, dict(zip(ids(loaded), texts, strict=True))).values()
    assert len(loaded.questions) == 2910
    assert round(values["random/f1"], 4) == round(values["f1"], 4) == 0.8718
    assert round(values["random/accuracy"], 4) == 0.8804
    assert round(values["random/precision"], 4) == 0.9745
    assert round(values["random/recall"], 4) == 0.7887


@pytest.mark.parametrize(("answer", "label"), [("No", True), ("No", False), ("Yes", False)])
@pytest.mark.parametrize("rule", Pope.rules)
def test_nothing_to_divide_by_gives_zero(rule, answer, label):
    loaded = made({"random": [("a", label)] * 2})
    assert headline(check(Pope(), loaded, everyone(loaded, answer), rule)) == 0


def test_all_right_gives_one(data):
    bench, loaded = opened("pope", data)
    right = everyone(loaded, lambda q: "Yes" if q.metadata["label"] else "No")
    assert [headline(check(bench, loaded, right, rule)) for rule in bench.rules] == [1, 1, 100]


def test_missing_answer_is_no_yes_from_nothing(data):
    """Upstream, a missing line shifts all that follow; here it is one question that reads as the empty text does."""
    bench, loaded = opened("pope", data)
    right = everyone(loaded, lambda q: "Yes" if q.metadata["label"] else "No")
    del right["3"]
    with_empty = bench.score(loaded, {**right, "3": ""}).values()
    assert bench.score(loaded, right).values() == with_empty


def test_upload_is_question_and_answer_in_file_order(data, tmp_path):
    bench, loaded = opened("pope", data)
    answers = everyone(loaded, lambda q: f"No {q.id}")
    paths = bench.export(loaded, answers, tmp_path / "out")
    assert len(paths) == 3
    rows = {path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths}
    (adversarial,) = [made for name, made in rows.items() if "adversarial" in name]
    assert [row["answer"] for row in adversarial] == ["No 1", "No 2", "No 3"]
    assert [row["question"] for row in adversarial] == [text for _, text, _ in ROWS]
    assert all(set(row) == {"question", "answer"} for made in rows.values() for row in made)


def test_score_of_other_labels_is_another(tmp_path):
    """The same answers by the labels of the other version: the trap that destroys the random split."""
    bench, loaded = opened("pope", pope(tmp_path, random=ROWS))
    other = [dataclasses.replace(q, metadata={**q.metadata, "label": not q.metadata["label"]}) for q in loaded.questions]
    right = everyone(loaded, lambda q: "Yes" if q.metadata["label"] else "No")
    assert headline(bench.score(dataclasses.replace(loaded, questions=other), right)) == 0


def test_needs_says_which_files():
    assert re.search(r"coco_pope_random\.json.*popular.*adversarial", Pope.required_files)
    assert Pope.max_new_tokens == 128  # LLaVA's cap
