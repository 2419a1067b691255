"""MMBench: letters and texts inferred as the leaderboard does, a hit only if all rotations are right."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
from collections.abc import Sequence

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import choice_parsing
from reverie_jax.eval.benchmarks.interface import BenchmarkError, NotScorable
from tests.eval.benchmarks.makers import LETTER, MMBENCH, encoded, mmbench, rotations
from tests.eval.benchmarks.samples import answer_all, check, headline, ids, load, value

FILE = "mmbench_dev_20230712.tsv"
CARS = ["A red car", "A blue truck", "A green bus", "A dog"]
OPTIONS = dict(zip("ABCD", CARS, strict=True))
QUESTIONS = [
    *rotations(4, "What is in the picture?", CARS, "B", hint="Look at the road."),
    *rotations(7, "Is it day?", ["yes", "no"], "A", category="image_scene", level="coarse_perception"),
    *rotations(9, "How many?", ["one", "two", "three"], "C", category="image_scene", level="coarse_perception"),
]
RIGHT = [row["answer"] for row in QUESTIONS]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmbench")
    mmbench(folder / FILE, QUESTIONS)
    return load("mmbench", folder)


COMPANION = rotations(99, "Is it so?", ["yes", "no"], "A")
"""A question with its passes as rows: without any in the file, passes would be made."""


def single(folder, row, columns=MMBENCH):
    """Load a file with one pass of one question, and keep that question alone."""
    mmbench(folder / FILE, [row, *COMPANION], columns)
    bench, loaded = load("mmbench", folder)
    return bench, dataclasses.replace(loaded, questions=[q for q in loaded.questions if str(q.id) == str(row["index"])])


def test_prompts_are_those_of_llava(sample):
    _, loaded = sample
    texts = {str(q.id): q.text for q in loaded.questions}
    assert list(texts) == [str(row["index"]) for row in QUESTIONS]
    lines = "\n".join(f"{letter}. {text}" for letter, text in OPTIONS.items())
    assert texts["4"] == f"Look at the road.\nWhat is in the picture?\n{lines}\n{LETTER}"
    assert texts["1000004"].splitlines()[2:6] == ["A. A blue truck", "B. A green bus", "C. A dog", "D. A red car"]
    assert texts["7"] == f"Is it day?\nA. yes\nB. no\n{LETTER}"
    assert texts["2000009"] == f"How many?\nA. three\nB. one\nC. two\n{LETTER}"
    assert [q.cluster for q in loaded.questions] == [str(int(q.id) % 1_000_000) for q in loaded.questions]
    assert loaded.read_image(loaded.questions[0].image) == encoded(4, "JPEG")


def test_chinese_prompt_has_llavas_chinese_suffix(tmp_path):
    rows = rotations(1, "\u56fe\u4e2d\u662f\u4ec0\u4e48\uff1f", ["\u72d7", "\u732b"], "A")
    mmbench(tmp_path / "mmbench_dev_cn_20231003.tsv", rows)
    bench, loaded = load("mmbench-cn", tmp_path)
    suffix = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
    assert loaded.questions[0].text == f"\u56fe\u4e2d\u662f\u4ec0\u4e48\uff1f\nA. \u72d7\nB. \u732b\n{suffix}"
    assert headline(check(bench, loaded, {"1": "A", "1000001": "B"})) == 100
    assert headline(check(bench, loaded, {"1": "\u662f\u72d7", "1000001": "\u72d7"})) == 100


@pytest.mark.parametrize("empty", ["", "nan", "NaN", "None", "none"])
def test_options_stop_at_the_first_empty_one(tmp_path, empty):
    (row,) = rotations(1, "Which?", ["one", "two", "x", "four"], "A", passes=1)
    (question,) = single(tmp_path, {**row, "C": empty, "hint": empty})[1].questions
    assert question.text == f"Which?\nA. one\nB. two\n{LETTER}"


def test_short_image_cell_is_the_index_of_the_row_with_the_image(tmp_path):
    rows = rotations(4, "What?", CARS, "B")
    for row in rows[1:]:
        row["image"] = "4"
    mmbench(tmp_path / FILE, rows)
    _, loaded = load("mmbench", tmp_path)
    assert [loaded.read_image(q.image) for q in loaded.questions] == [encoded(4, "JPEG")] * 4


def test_columns_may_be_in_any_order_and_cells_quoted_or_large(tmp_path):
    (row,) = rotations(4, "What?", CARS, "B", passes=1)
    image = base64.b64encode(bytes(300_000)).decode()
    changed = {**row, "question": '"What is it?\nSay ""one"" word."', "image": image}
    (question,) = (loaded := single(tmp_path, changed, MMBENCH[::-1])[1]).questions
    assert question.text.startswith('What is it?\nSay "one" word.\nA. A red car')
    assert loaded.read_image(question.image) == bytes(300_000)


ONE = rotations(4, "What?", CARS, "B", passes=1)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (ONE, [column for column in MMBENCH if column != "question"]),
        ([{**ONE[0], "index": "four"}], MMBENCH),
        ([{**ONE[0], "index": -1}], MMBENCH),
        ([{**ONE[0], "index": 5_000_004}], MMBENCH),
        ([*ONE, *ONE], MMBENCH),
        ([{**ONE[0], "answer": "E"}], MMBENCH),
        ([{**ONE[0], "image": ""}], MMBENCH),
        ([{**ONE[0], "image": "7"}], MMBENCH),
        ([], MMBENCH),
        ([{"index": "1"}], ["index", "question\tA\tB\timage\n1"]),  # fewer cells than columns
    ],
)
def test_invalid_table_is_named(tmp_path, rows, columns):
    mmbench(tmp_path / FILE, rows, columns)
    with pytest.raises(BenchmarkError, match=FILE):
        load("mmbench", tmp_path)


def test_image_that_is_not_base64_is_named(tmp_path):
    (question,) = (loaded := single(tmp_path, {**ONE[0], "image": "*" * 80})[1]).questions
    with pytest.raises(BenchmarkError, match=FILE):
        loaded.read_image(question.image)


# What the leaderboard infers for CARS without a judge; "" is nothing, "Z" is none of the options.
PARSED = {
    "A": "A",
    **dict.fromkeys(("B.", "(B)", "[B]", "**B**", "# B", "{B}", "B: A blue truck", "B: a blue one"), "B"),
    "B. A blue truck": "B",  # two letters among its tokens, so the text decides
    "The answer is B": "B",
    "A blue truck.": "A",  # the article
    "It is a blue truck": "B",
    "It is A BLUE TRUCK, is it not": "B",  # its A is the third of eight tokens, so the text decides
    "the picture shows a blue truck": "B",
    "B because it is": "B",
    "The correct answer is **B** since one clearly sees that it is blue": "B",
    "THE ANSWER IS D as everyone can see in it": "D",
    "B because I think that it really is B": "",  # the first of them counts
    **dict.fromkeys(("blue truck", "a red car, a blue truck", "b", "(b)", "'B'", '"B"', "`B`", "A or B", "E", ""), ""),
    "B\nbecause it is blue": "",
    "Z": "Z",
    "None, so Z": "Z",
    "Sorry, I can't help with images of people yet.": "Z",
    "I can't process this file.": "Z",
    "I'm sorry, but without the image provided I cannot tell if B": "Z",
    "Cannot determine the answer": "Z",
    "\u7b54\u6848\u662fB": "",
    "\u7b54\u6848\u662f B": "B",
    "Antwort: C": "C",
    # Twice the options' text is 74 characters: no text is looked for in longer answers.
    "it is a blue truck".ljust(74, "."): "B",
    "it is a blue truck".ljust(75, "."): "",
}


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    return single(tmp_path_factory.mktemp("cars"), ONE[0])


@pytest.mark.parametrize("answer", PARSED, ids=repr)
def test_option_is_inferred_as_by_the_leaderboard(cars, answer):
    bench, loaded = cars
    (parsed,) = bench.score(loaded, {"4": answer}).parsed_answers
    letter = PARSED[answer]
    assert (parsed.parsed, parsed.right, parsed.unparsed) == (letter, float(letter == "B"), letter == "")
    if "nswer is " not in answer.lower():  # `published_steps` lacks the search for "answer is X"
        assert published_steps(answer, CARS) == letter


def published_steps(answer: str, options: Sequence[str]) -> str:
    """Infer again, in other words."""
    letters = "ABCD"[: len(options)]
    refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.")
    refusals += ("I'm sorry, but without the image provided", "Cannot determine the answer")
    if any(refusal in answer for refusal in refusals):
        return "Z"
    tokens = "".join(" " if sign in ".()[],:;!*#{}" else sign for sign in answer).split()
    named = [letter for letter in letters if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - 4:
        return named[0]
    if not named and "Z" in tokens:
        return "Z"
    lower = answer.lower()
    if len(lower) > 2 * sum(map(len, options)):
        return ""
    held = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in lower]
    return held[0] if len(held) == 1 else ""


PIECES = ["A", "B", "a", "Z", "It is ", "a blue truck", "a dog", " ", ".", "*", "(", ")", "\n", "so ", "and ", "`"]


@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_any_answer_is_inferred_by_the_published_steps(pieces):
    answer = "".join(pieces)
    assert choice_parsing.vlmevalkit(answer, OPTIONS) == published_steps(answer, CARS)


LMMS_EVAL = {
    **dict.fromkeys(("B", "(B)", "B.", ":B", "(B).", "B: so", "a blue truck", "It is a blue truck"), "B"),
    **dict.fromkeys(("My answer is C", "C\nor so", "so C"), "C"),
    "A dog is there": "D",  # a bare A among more than three words is an article
    "A": "A",
    "A it is": "A",
    "A or B": "A",  # the start of an answer ranks above its end
    "The correct answer is D, not A": "D",
    "xyz": "",
    "": "",
}


@pytest.mark.parametrize("answer", LMMS_EVAL, ids=repr)
def test_option_is_inferred_as_by_lmms_eval(cars, answer):
    bench, loaded = cars
    (parsed,) = bench.score(loaded, {"4": answer}, "lmms-eval").parsed_answers
    assert parsed.parsed == LMMS_EVAL[answer]


@pytest.mark.parametrize("answer", ["none", "Not really", "I know", "no", "No", "C"])
def test_options_are_looked_for_within_words_and_letters_among_the_options(tmp_path, answer):
    bench, loaded = single(tmp_path, rotations(7, "Is it?", ["yes", "no"], "A", passes=1)[0])
    assert bench.score(loaded, {"7": answer}).parsed_answers[0].parsed == ("" if answer == "C" else "B")


def test_passes_are_made_where_the_file_has_none(tmp_path, sample):
    """The same rows result from files of VLMEvalKit, which have one row per question."""
    mmbench(tmp_path / FILE, [row for row in QUESTIONS if row["index"] < 1_000_000])
    bench, loaded = load("mmbench", tmp_path)
    assert {q.id: (q.text, q.cluster) for q in loaded.questions} == {
        q.id: (q.text, q.cluster) for q in sample[1].questions
    }
    assert all(loaded.read_image(q.image) == encoded(int(q.id) % 1_000_000, "JPEG") for q in loaded.questions)
    assert headline(check(bench, loaded, answer_all(sample[1], RIGHT))) == 100


KINDS = st.lists(st.sampled_from(["right", "right", "right", "A", "B", "?", None]), min_size=9, max_size=9)


@settings(max_examples=25)
@given(KINDS)
def test_accuracy_is_that_of_circular_groups(sample, kinds):
    """One wrong or missing pass loses the question, not a share of it."""
    bench, loaded = sample
    pairs = zip(QUESTIONS, kinds, strict=True)
    answers = {str(row["index"]): row["answer"] if kind == "right" else kind for row, kind in pairs if kind}
    groups: dict[int, list[bool]] = {}
    for row in QUESTIONS:
        groups.setdefault(row["index"] % 1_000_000, []).append(answers.get(str(row["index"])) == row["answer"])
    hit = {index: all(good) for index, good in groups.items()}
    scored = check(bench, loaded, answers)
    assert headline(scored) == pytest.approx(100 * sum(hit.values()) / 3)
    assert value(scored, "first_pass") == pytest.approx(100 * sum(good[0] for good in groups.values()) / 3)
    # No macro average: two of the three questions are of one category.
    for name in ("object_localization", "FP-S"):
        assert value(scored, f"{name}/accuracy") == 100.0 * hit[4]
    for name in ("image_scene", "CP"):
        assert value(scored, f"{name}/accuracy") == pytest.approx(50 * (hit[7] + hit[9]))


def test_judge_decides_what_cannot_be_inferred(sample):
    """Unless another pass has missed the question anyway."""
    bench, loaded = sample
    answers = answer_all(loaded, RIGHT) | {"4": "the blue one", "7": "daylight", "1000007": "A"}
    prompts = {"mmbench": "{question} | {options} | {answer}"}
    (request,) = bench.judge_requests(loaded, answers, "judged", prompts)
    assert request.id == "4"
    assert request.prompt.endswith("D. A dog | the blue one")
    for reply, expected in (("B", 200 / 3), ("Z", 100 / 3), ("hm", 100 / 3)):
        for rule in ("judged", "official"):
            scored = bench.score(loaded, answers, rule, {"4": reply})
            assert headline(scored) == pytest.approx(expected)
            assert scored.protocol["replies of a judge"] == 1


@pytest.fixture
def workbooks(monkeypatch):
    """Data frames that are written as workbooks: their writer need not be installed."""
    frames: list[pandas.DataFrame] = []
    monkeypatch.setattr(pandas.DataFrame, "to_excel", lambda frame, path, **more: frames.append(frame))
    return frames


def test_test_split_without_answers_is_read_for_upload(tmp_path, workbooks):
    rows = [{**row, "answer": "", "split": "test"} for row in QUESTIONS]
    columns = [column for column in MMBENCH if column != "answer"]
    mmbench(tmp_path / "mmbench_test_en_20231003.tsv", rows, columns)
    bench, loaded = load("mmbench", tmp_path)
    with pytest.raises(NotScorable, match="mmbench_test_en"):
        bench.score(loaded, answer_all(loaded, "B"))
    bench.export(loaded, answer_all(loaded, "B"), tmp_path / "out")
    (frame,) = workbooks
    assert "answer" not in frame.columns
    assert list(frame["prediction"]) == ["B"] * 9


def test_upload_has_the_columns_of_llavas_script(sample, tmp_path, workbooks):
    bench, loaded = sample
    (path,) = bench.export(loaded, answer_all(loaded, [f"{a}. <&> \u00e9\x00" for a in RIGHT]), tmp_path / "out")
    (frame,) = workbooks
    assert path.suffix == ".xlsx"
    assert list(frame.columns) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [str(index) for index in frame["index"]] == ids(loaded)
    assert list(frame["prediction"]) == [f"{answer}. <&> \u00e9" for answer in RIGHT]
    assert list(frame["answer"]) == RIGHT
    assert frame["A"][0] == "A red car"
    assert pandas.isna(frame["C"][4])


def test_upload_is_a_workbook_or_names_the_missing_package(sample, tmp_path):
    bench, loaded = sample
    if importlib.util.find_spec("openpyxl") is None:
        with pytest.raises(BenchmarkError, match="openpyxl"):
            bench.export(loaded, answer_all(loaded, RIGHT), tmp_path / "out")
    else:
        (path,) = bench.export(loaded, answer_all(loaded, RIGHT), tmp_path / "out")
        assert list(pandas.read_excel(path)["prediction"]) == RIGHT
