"""ScienceQA: LLaVA's layout and its strict parser of letters; the share over questions with an image."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.scienceqa import official
from tests.eval.benchmarks.makers import LETTER, problem, scienceqa, shade, write_json
from tests.eval.benchmarks.samples import answer_all, by_answer, check, headline, ids, load, value

PROBLEMS = {
    "11": problem("Which is iron?", ["wood", "iron", "glass"], 1, hint="Look at the ring."),
    "4": problem("What is the capital?", ["Rome", "Paris"], 0, image=None, subject="social science", grade="grade8"),
    "25": problem("Which letter?", ["one", "two", "three", "four", "five"], 4, subject="language science"),
    "9": problem("Which word?", ["cat", "dog"], 1, hint="Read the text.", image=None),
}
MORE = {"77": problem("Trained on?", ["x", "y"], 0, image=None, split="train")}
RIGHT = ["B", "A", "E", "B"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scienceqa")
    return load("scienceqa", scienceqa(folder, PROBLEMS | MORE, train=["77"], test=list(PROBLEMS), minitest=["4"]))


def test_questions_are_those_of_llavas_file_in_the_order_of_the_split(sample):
    _, loaded = sample
    assert ids(loaded) == ["11", "4", "25", "9"]
    assert [q.text for q in loaded.questions] == [
        f"Context: Look at the ring.\nWhich is iron?\nA. wood\nB. iron\nC. glass\n{LETTER}",
        f"What is the capital?\nA. Rome\nB. Paris\n{LETTER}",
        f"Which letter?\nA. one\nB. two\nC. three\nD. four\nE. five\n{LETTER}",
        f"Context: Read the text.\nWhich word?\nA. cat\nB. dog\n{LETTER}",
    ]
    assert [q.image and shade(loaded.read_image(q.image)) for q in loaded.questions] == [11, None, 25, None]


def test_images_are_found_without_the_folder_of_the_split(tmp_path):
    data = scienceqa(tmp_path, PROBLEMS)
    (data / "images" / "test").rename(data / "moved")
    (data / "images").rmdir()
    (data / "moved").rename(data / "images")
    _, loaded = load("scienceqa", data)
    assert shade(loaded.read_image(loaded.questions[0].image)) == 11


@pytest.mark.parametrize("test", [["4", "6"], ["4", "4"], []], ids=["unknown id", "duplicate id", "empty"])
def test_invalid_split_is_named(tmp_path, test):
    scienceqa(tmp_path, PROBLEMS)
    write_json(tmp_path / "pid_splits.json", {"test": test})
    with pytest.raises(BenchmarkError, match=r"pid_splits\.json"):
        load("scienceqa", tmp_path)


# What LLaVA parses, and what lmms-eval parses, for a question with five choices.
PARSED = by_answer(
    {
        ("A", "A"): ["A", "A. wood. The answer is B."],
        ("E", "E"): ["E"],
        ("", ""): [
            *("F", "b. iron", "BB. iron", "(B)", "B)", "**B**", "iron", "", "Answer: B", "The answer is B"),
            *("The answer is B\n", "the answer is B.", "The answer is b.", "The answer is (B)."),
            *("The answer is B. The answer is C.", "The answer is B. The answer is B."),
            *("The correct answer is B.", "\u7b54\u6848\u662fB", "Die Antwort ist B."),
        ],
        ("", "B"): ["b", " B", "B\n", "B.", "B.iron"],
        ("B", "B"): ["B. ", "B. iron", "B. iron\nand more"],
        ("", "F"): ["F. iron"],
        ("B", ""): [
            *("The answer is B.", "The answer is B!", "The answer is B, since it is iron"),
            *("The answer is Basalt.", "So it is iron. The answer is B."),
        ],
    }
)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    return load("scienceqa", scienceqa(folder, {"1": problem("Which?", ["v", "w", "x", "y", "z"], 1)}))


@pytest.mark.parametrize("answer", PARSED, ids=repr)
def test_answers_are_parsed_by_each_rule(five, answer):
    bench, loaded = five
    for rule, letter in zip(("official", "lmms-eval"), PARSED[answer], strict=True):
        scored = bench.score(loaded, {"1": answer}, rule)
        (parsed,) = scored.parsed_answers
        assert (parsed.parsed, parsed.right, parsed.unparsed) == (letter, float(letter == "B"), letter == "")
        assert headline(scored) == 100 * (letter == "B")


PIECES = ["A", "B", "b", ".", " ", "The answer is ", "The answer is B", "(", ")", "\n", "F", "iron", ","]


@given(st.lists(st.sampled_from(PIECES), max_size=6))
def test_any_answer_is_parsed_by_the_published_steps(pieces):
    answer, start = "".join(pieces), "The answer is "
    if answer in tuple("ABCDE"):
        expected = answer
    elif len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        expected = answer[0]
    else:
        letters, place = [], answer.find(start)
        while place >= 0:
            letter, behind = answer[place + 14 : place + 15], answer[place + 15 : place + 16]
            hit = letter.isascii() and letter.isupper() and behind not in ("", "\n")
            letters += [letter] if hit else []
            place = answer.find(start, place + (16 if hit else 1))
        expected = letters[0] if len(letters) == 1 else ""
    assert official(answer) == expected


@pytest.mark.parametrize("answer", ["C", "E", "D. two", "The answer is D.", "The answer is Z."])
def test_letter_beyond_the_choices_is_wrong(sample, answer):
    bench, loaded = sample
    scored = bench.score(loaded, answer_all(loaded, RIGHT) | {"4": answer})
    assert [parsed.right for parsed in scored.parsed_answers] == [1, 0, 1, 1]


@given(st.lists(st.sampled_from(["A", "B", "E", "?"]), min_size=4, max_size=4))
def test_both_accuracies_by_hand(sample, texts):
    bench, loaded = sample
    scored = bench.score(loaded, answer_all(loaded, texts))
    right = [text == letter for text, letter in zip(texts, RIGHT, strict=True)]
    assert headline(scored) == pytest.approx(50 * (right[0] + right[2]))
    assert value(scored, "accuracy") == pytest.approx(25 * sum(right))
    assert value(scored, "grade_7_12/accuracy") == 100 * right[1]
    assert value(scored, "has_text/accuracy") == 50 * (right[0] + right[3])


def test_missing_answer_is_wrong_in_all_and_not_counted_with_images(sample):
    """LLaVA's script logs the prompt of a missing answer as "Unknown", which shows no image."""
    bench, loaded = sample
    answers = answer_all(loaded, RIGHT) | {"25": "A"}
    for missing, with_images, accuracy in ((None, 50, 75), ("25", 100, 75), ("9", 100, 50)):
        answers.pop(missing, None)
        scored = check(bench, loaded, answers)
        assert (headline(scored), value(scored, "accuracy")) == (with_images, accuracy)


def test_vlmevalkit_infers_as_for_mmbench_over_questions_with_an_image(sample):
    bench, loaded = sample
    answers = {"11": "It is iron.", "4": "B", "25": "(E)", "9": "A"}
    assert headline(check(bench, loaded, answers, "vlmevalkit")) == 100
    answers["11"] = "It is glass."
    assert headline(check(bench, loaded, answers, "vlmevalkit")) == 50


def test_result_is_in_the_layout_of_llavas_script(sample, tmp_path):
    bench, loaded = sample
    answers = answer_all(loaded, RIGHT) | {"11": "C. glass", "9": "dog"}
    (path,) = bench.export(loaded, answers, tmp_path)
    result = json.loads(path.read_text("utf-8"))
    assert (result["correct"], result["count"], result["acc"]) == (2, 4, 50)
    assert result["results"] == {"11": 2, "4": 0, "25": 4, "9": -1}
    assert result["outputs"] == answers
