"""ScienceQA: LLaVA's layout and its strict reading of letters; the share over items with a picture."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import (
    LETTER,
    check,
    dump,
    everyone,
    headline,
    ids,
    lines,
    opened,
    problem,
    said,
    scienceqa,
    shade,
)

PROBLEMS = {
    "11": problem("Which is iron?", ["wood", "iron", "glass"], 1, hint="Look at the ring."),
    "4": problem("What is the capital?", ["Rome", "Paris"], 0, image=None, subject="social science", grade="grade8"),
    "25": problem("Which letter?", ["one", "two", "three", "four", "five"], 4, subject="language science"),
    "9": problem("Which word?", ["cat", "dog"], 1, hint="Read the text.", image=None),
}
MORE = {"77": problem("Trained on?", ["x", "y"], 0, image=None, split="train")}


@pytest.fixture
def data(tmp_path):
    return scienceqa(tmp_path, PROBLEMS | MORE, train=["77"], val=[], test=list(PROBLEMS), minitest=["4"])


def right(question) -> str:
    return "ABCDE"[PROBLEMS[str(question.id)]["answer"]]


def test_questions_are_those_of_the_test_split_in_its_order(data):
    _, loaded = opened("scienceqa", data)
    assert ids(loaded) == ["11", "4", "25", "9"]
    assert [q.image is not None for q in loaded.questions] == [True, False, True, False]


def test_prompts_are_llavas_to_the_character(data):
    """As in its file of questions, not as the repository's converter writes them."""
    _, loaded = opened("scienceqa", data)
    assert [q.text for q in loaded.questions] == [
        "Context: Look at the ring.\nWhich is iron?\nA. wood\nB. iron\nC. glass\n"
        "Answer with the option's letter from the given choices directly.",
        f"What is the capital?\nA. Rome\nB. Paris\n{LETTER}",
        f"Which letter?\nA. one\nB. two\nC. three\nD. four\nE. five\n{LETTER}",
        f"Context: Read the text.\nWhich word?\nA. cat\nB. dog\n{LETTER}",
    ]


def test_pictures_are_found_by_id(data):
    _, loaded = opened("scienceqa", data)
    first, third = loaded.questions[0], loaded.questions[2]
    assert shade(loaded.read_image(first.image)) == 11
    assert shade(loaded.read_image(third.image)) == 25


def test_missing_and_broken_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match="problems") as error:
        opened("scienceqa", tmp_path)
    assert "\n" not in str(error.value)
    rows = [
        ({**PROBLEMS, "5": {**PROBLEMS["4"], "answer": 2}}, ["4", "5"]),  # no such choice
        ({**PROBLEMS, "5": {"question": "?"}}, ["4", "5"]),
        (PROBLEMS, ["4", "6"]),  # a test id without its problem
        (PROBLEMS, ["4", "4"]),
    ]
    for problems, test in rows:
        dump(tmp_path / "problems.json", problems)
        dump(tmp_path / "pid_splits.json", {"test": test})
        with pytest.raises(BenchmarkError) as error:
            opened("scienceqa", tmp_path)
        assert "\n" not in str(error.value)
    dump(tmp_path / "pid_splits.json", {"test": ["4"]})
    (tmp_path / "problems.json").write_text("{", "utf-8")
    with pytest.raises(BenchmarkError, match="problems") as error:
        opened("scienceqa", tmp_path)
    assert "\n" not in str(error.value)


# What LLaVA reads for a question with five choices; "" is FAILED.
READ = {
    "A": "A",
    "B": "B",
    "E": "E",
    "F": "",
    "B.": "",
    "B. ": "B",
    "B. iron": "B",
    "B.iron": "",
    "(B)": "",
    "B)": "",
    "b": "",
    "b. iron": "",
    " B": "",
    "B\n": "",
    "B. iron\nand more": "B",
    "BB. iron": "",
    "F. iron": "",
    "**B**": "",
    "iron": "",
    "": "",
    "Answer: B": "",
    "The answer is B.": "B",
    "The answer is B": "",
    "The answer is B\n": "",
    "The answer is B!": "B",
    "The answer is B, since it is iron": "B",
    "The answer is Basalt.": "B",
    "the answer is B.": "",
    "The answer is b.": "",
    "The answer is (B).": "",
    "So it is iron. The answer is B.": "B",
    "The answer is B. The answer is C.": "",
    "The answer is B. The answer is B.": "",
    "A. wood. The answer is B.": "A",
    "The correct answer is B.": "",
    "\u7b54\u6848\u662fB": "",
    "Die Antwort ist B.": "",
}


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    return opened("scienceqa", scienceqa(folder, {"1": problem("Which?", ["v", "w", "x", "y", "z"], 1)}))


@pytest.mark.parametrize("answer", READ, ids=repr)
def test_answers_are_read_as_llava_does(five, answer):
    bench, loaded = five
    scored = bench.score(loaded, {"1": answer})
    (reading,) = scored.parsed_answers
    assert reading.parsed == READ[answer]
    assert reading.right == float(READ[answer] == "B")
    assert reading.unparsed is (READ[answer] == "")
    assert headline(scored) == 100 * (READ[answer] == "B")


PIECES = ["A", "B", "b", ".", " ", "The answer is ", "The answer is B", "(", ")", "\n", "F", "iron", ","]


@given(st.lists(st.sampled_from(PIECES), max_size=6))
def test_any_answer_is_read_by_the_published_steps(five, pieces):
    answer, start = "".join(pieces), "The answer is "
    if answer in tuple("ABCDE"):
        wanted = answer
    elif len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        wanted = answer[0]
    else:
        found, place = [], answer.find(start)
        while place >= 0:
            letter, behind = answer[place + 14 : place + 15], answer[place + 15 : place + 16]
            hit = letter.isascii() and letter.isupper() and behind not in ("", "\n")
            found += [letter] if hit else []
            place = answer.find(start, place + (16 if hit else 1))
        wanted = found[0] if len(found) == 1 else ""
    bench, loaded = five
    (reading,) = bench.score(loaded, {"1": answer}).parsed_answers
    assert reading.right == float(wanted == "B")
    assert wanted == "F" or reading.parsed == wanted


@pytest.mark.parametrize("answer", ["C", "E", "D. two", "The answer is D.", "The answer is Z."])
def test_letter_beyond_the_choices_is_wrong(data, answer):
    bench, loaded = opened("scienceqa", data)
    answers = everyone(loaded, right) | {"4": answer}
    scored = bench.score(loaded, answers)
    assert [reading.right for reading in scored.parsed_answers] == [1, 0, 1, 1]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return opened("scienceqa", scienceqa(tmp_path_factory.mktemp("four"), PROBLEMS))


def total(values: dict[str, float]) -> float:
    """The share over all items, by its published name."""
    (found,) = [value for name, value in values.items() if name.lower() in ("accuracy", "acc", "avg", "all")]
    return found


@given(st.lists(st.sampled_from(["A", "B", "E", "?"]), min_size=4, max_size=4))
def test_both_accuracies_by_hand(four, texts):
    bench, loaded = four
    scored = check(bench, loaded, dict(zip(PROBLEMS, texts, strict=True)))
    good = [text == letter for text, letter in zip(texts, "BAEB", strict=True)]
    assert headline(scored) == pytest.approx(50 * (good[0] + good[2]))
    assert total(scored.values()) == pytest.approx(25 * sum(good))


def test_missing_answer_is_wrong_in_all_and_not_counted_with_pictures(data):
    """Upstream: its logged prompt is "Unknown", which shows no picture."""
    bench, loaded = opened("scienceqa", data)
    answers = everyone(loaded, right) | {"25": "A"}
    assert headline(check(bench, loaded, answers)) == 50
    assert total(bench.score(loaded, answers).values()) == 75
    answers.pop("25")
    scored = check(bench, loaded, answers)
    assert headline(scored) == 100
    assert total(scored.values()) == 75
    answers.pop("9")
    assert total(check(bench, loaded, answers).values()) == 50


def test_no_item_with_a_picture_is_zero(tmp_path):
    bench, loaded = opened("scienceqa", scienceqa(tmp_path, {"4": PROBLEMS["4"]}))
    scored = check(bench, loaded, {"4": "A"})
    assert headline(scored) == 0
    assert total(scored.values()) == 100


def test_published_counts_give_the_published_values():
    """LLaVA-1.5-13B: 3,155 of 4,241 and 1,445 of 2,017."""
    assert round(100 * 3155 / 4241, 2) == 74.39
    assert round(100 * 1445 / 2017, 2) == 71.64


LMMS = {
    "B": "B",
    "b": "B",
    "B.": "B",
    "B.iron": "B",
    "B. iron": "B",
    "The answer is B.": "",
    "(B)": "",
    "iron": "",
    "": "",
    "B)": "",
}


@pytest.mark.parametrize("answer", LMMS, ids=repr)
def test_lmms_eval_reads_letters_of_any_case(five, answer):
    bench, loaded = five
    assert "lmms-eval" in bench.rules
    (reading,) = bench.score(loaded, {"1": answer}, "lmms-eval").parsed_answers
    assert reading.right == float(LMMS[answer] == "B")


def test_vlmevalkit_infers_as_for_mmbench_over_items_with_a_picture(data):
    bench, loaded = opened("scienceqa", data)
    assert "vlmevalkit" in bench.rules
    answers = {"11": "It is iron.", "4": "B", "25": "(E)", "9": "A"}
    assert headline(check(bench, loaded, answers, "vlmevalkit")) == 100
    answers["11"] = "It is glass."
    assert headline(check(bench, loaded, answers, "vlmevalkit")) == 50


def test_answers_by_llava_are_joined_by_id(data, tmp_path):
    bench, loaded = opened("scienceqa", data)
    rows = [said(q.id, ("<image>\n" if q.image else "") + q.text, right(q)) for q in loaded.questions]
    found = answer_files.read_answers(lines(tmp_path / "a.jsonl", rows[::-1]), bench, loaded)
    assert found == everyone(loaded, right)


def test_result_is_in_the_layout_of_llavas_script(data, tmp_path):
    bench, loaded = opened("scienceqa", data)
    answers = everyone(loaded, right) | {"11": "C. glass", "9": "dog"}
    (path,) = bench.export(loaded, answers, tmp_path / "out")
    result = json.loads(path.read_text("utf-8"))
    assert {"acc", "correct", "count", "results", "outputs"} <= set(result)
    assert (result["correct"], result["count"], result["acc"]) == (2, 4, 50)
    assert result["results"] == {"11": 2, "4": 0, "25": 4, "9": -1}
    assert result["outputs"] == answers


def test_cap_is_llavas():
    from reverie_jax.eval.benchmarks import benchmark

    assert benchmark("scienceqa").max_new_tokens == 1024
