"""MMBench: every rotation a row, letters and texts inferred as the leaderboard does, a hit only if all passes are right."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
from collections.abc import Sequence

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import LETTER, MMBENCH, encoded, mmbench, rotations
from tests.eval.benchmarks.samples import answer_all, check, headline, load, value

CARS = ["A red car", "A blue truck", "A green bus", "A dog"]
QUESTIONS = [
    *rotations(4, "What is in the picture?", CARS, "B", hint="Look at the road."),
    *rotations(7, "Is it day?", ["yes", "no"], "A", category="image_scene", level="coarse_perception"),
    *rotations(9, "How many?", ["one", "two", "three"], "C", category="image_scene", level="coarse_perception"),
]


@pytest.fixture
def data(tmp_path):
    mmbench(tmp_path / "mmbench_dev_20230712.tsv", QUESTIONS)
    return tmp_path


COMPANION = rotations(99, "Is it so?", ["yes", "no"], "A")
"""A question with its passes as rows: a file without any has them made."""


def single(folder, row, columns=MMBENCH):
    """A file with one pass of one question, opened to that question alone."""
    mmbench(folder / "mmbench_dev_20230712.tsv", [row, *COMPANION], columns)
    bench, loaded = load("mmbench", folder)
    return bench, dataclasses.replace(loaded, questions=[q for q in loaded.questions if str(q.id) == str(row["index"])])


def right(question) -> str:
    row = next(row for row in QUESTIONS if str(row["index"]) == str(question.id))
    return row["answer"]


def test_passes_of_a_question_are_one_cluster(data):
    _, loaded = load("mmbench", data)
    units: dict[str, list[int]] = {}
    for question in loaded.questions:
        units.setdefault(question.cluster, []).append(int(question.id) % 1_000_000)
    assert sorted(map(tuple, map(set, units.values()))) == [(4,), (7,), (9,)]


def test_prompts_are_llavas_to_the_character(data):
    _, loaded = load("mmbench", data)
    texts = {str(q.id): q.text for q in loaded.questions}
    assert texts["4"] == (
        "Look at the road.\nWhat is in the picture?\nA. A red car\nB. A blue truck\nC. A green bus\nD. A dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert texts["1000004"].splitlines()[2:6] == ["A. A blue truck", "B. A green bus", "C. A dog", "D. A red car"]
    assert texts["7"] == f"Is it day?\nA. yes\nB. no\n{LETTER}"
    assert texts["2000009"] == f"How many?\nA. three\nB. one\nC. two\n{LETTER}"


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


def test_pictures_come_from_the_table(data):
    _, loaded = load("mmbench", data)
    assert loaded.read_image(loaded.questions[0].image) == encoded(4, "JPEG")


def test_short_cell_is_the_index_of_the_row_with_the_picture(tmp_path):
    rows = [dict(row) for row in rotations(4, "What?", CARS, "B")]
    for row in rows[1:]:
        row["image"] = "4"
    mmbench(tmp_path / "mmbench_dev_20230712.tsv", rows)
    _, loaded = load("mmbench", tmp_path)
    assert [loaded.read_image(q.image) for q in loaded.questions] == [encoded(4, "JPEG")] * 4


def test_columns_may_be_in_any_order_and_texts_may_be_quoted(tmp_path):
    (row,) = rotations(4, "What?", CARS, "B", passes=1)
    quoted = {**row, "question": '"What is it?\nSay ""one"" word."'}
    (question,) = single(tmp_path, quoted, MMBENCH[::-1])[1].questions
    assert question.text.startswith('What is it?\nSay "one" word.\nA. A red car')


def test_large_cells_are_read(tmp_path):
    (row,) = rotations(4, "What?", CARS, "B", passes=1)
    big = base64.b64encode(bytes(300_000)).decode()
    (question,) = (loaded := single(tmp_path, {**row, "image": big})[1]).questions
    assert loaded.read_image(question.image) == bytes(300_000)


def test_missing_and_broken_tables_are_refused_in_one_line(tmp_path):
    with pytest.raises(BenchmarkError) as error:
        load("mmbench", tmp_path)
    assert "\n" not in str(error.value)
    rows = rotations(4, "What?", CARS, "B", passes=1)
    broken = [
        lambda: mmbench(tmp_path / "mmbench_dev_20230712.tsv", rows, [c for c in MMBENCH if c != "question"]),
        lambda: mmbench(tmp_path / "mmbench_dev_20230712.tsv", [{**rows[0], "index": "four"}]),
        lambda: mmbench(tmp_path / "mmbench_dev_20230712.tsv", [*rows, *rows]),
        lambda: mmbench(tmp_path / "mmbench_dev_20230712.tsv", [{**rows[0], "answer": "E"}]),
        lambda: (tmp_path / "mmbench_dev_20230712.tsv").write_text("index\tquestion\n1\n", "utf-8"),
    ]
    for make in broken:
        make()
        with pytest.raises(BenchmarkError, match="mmbench_dev") as error:
            load("mmbench", tmp_path)
        assert "\n" not in str(error.value)


# What the leaderboard infers for CARS without a judge; "" is nothing, "Z" is none of the options.
READ = {
    "A": "A",
    "B.": "B",
    "(B)": "B",
    "[B]": "B",
    "**B**": "B",
    "# B": "B",
    "{B}": "B",
    "B: A blue truck": "B",
    "B: a blue one": "B",
    "B. A blue truck": "B",  # two letters among its tokens, so the text decides
    "The answer is B": "B",
    "A blue truck.": "A",  # the article
    "It is a blue truck": "B",
    "It is A BLUE TRUCK, is it not": "B",  # its A is the third of eight tokens, so the text decides
    "the picture shows a blue truck": "B",
    "blue truck": "",
    "a red car, a blue truck": "",
    "b": "",
    "(b)": "",
    "'B'": "",
    '"B"': "",
    "`B`": "",
    "B\nbecause it is blue": "",
    "B because it is": "B",
    "A or B": "",
    "E": "",
    "Z": "Z",
    "None, so Z": "Z",
    "": "",
    "The correct answer is **B** since one clearly sees that it is blue": "B",
    "THE ANSWER IS D as everyone can see in it": "D",
    "B because I think that it really is B": "",  # the first of them counts
    "Sorry, I can't help with images of people yet.": "Z",
    "I can't process this file.": "Z",
    "I'm sorry, but without the image provided I cannot tell if B": "Z",
    "Cannot determine the answer": "Z",
    "\u7b54\u6848\u662fB": "",
    "\u7b54\u6848\u662f B": "B",
    "Antwort: C": "C",
}


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    (row,) = rotations(4, "What?", CARS, "B", passes=1)
    return single(tmp_path_factory.mktemp("cars"), row)


@pytest.mark.parametrize("answer", READ, ids=repr)
def test_option_is_inferred_as_by_the_leaderboard(cars, answer):
    bench, loaded = cars
    (parsed,) = bench.score(loaded, {"4": answer}).parsed_answers
    assert parsed.parsed == READ[answer]
    assert parsed.right == float(READ[answer] == "B")
    assert parsed.unparsed is (READ[answer] == "")


def infer(answer: str, options: Sequence[str]) -> str:
    """The published inference again, in other words."""
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
def test_any_answer_is_inferred_by_the_published_steps(cars, pieces):
    bench, loaded = cars
    answer = "".join(pieces)
    assert bench.score(loaded, {"4": answer}).parsed_answers[0].parsed == infer(answer, CARS)


def test_table_agrees_with_the_published_steps():
    """The search for "answer is X" is not in `infer`: those rows are left out."""
    assert {answer: infer(answer, CARS) for answer in READ if "nswer is " not in answer.lower()} == {
        answer: letter for answer, letter in READ.items() if "nswer is " not in answer.lower()
    }


@pytest.mark.parametrize("length", [74, 75])
def test_text_is_looked_for_in_short_answers_only(cars, length):
    """Twice the options' text is 74 characters."""
    bench, loaded = cars
    answer = "it is a blue truck".ljust(length, ".")
    (parsed,) = bench.score(loaded, {"4": answer}).parsed_answers
    assert parsed.parsed == ("B" if length == 74 else "")


@pytest.mark.parametrize("answer", ["none", "Not really", "I know", "no", "No"])
def test_options_are_looked_for_within_words(tmp_path, answer):
    bench, loaded = single(tmp_path, rotations(7, "Is it?", ["yes", "no"], "A", passes=1)[0])
    assert bench.score(loaded, {"7": answer}).parsed_answers[0].parsed == "B"


def test_option_that_reads_as_none_is_no_option(tmp_path):
    """The text "none" in option D ends the options there, for the prompt and for the letters."""
    (row,) = rotations(7, "Which?", ["one", "two", "three", "None"], "A", passes=1)
    (question,) = single(tmp_path, row)[1].questions
    assert "D." not in question.text


def test_passes_are_made_where_the_file_has_none(tmp_path):
    """Another file of the same questions, as VLMEvalKit has some: the same rows come out, in whatever order."""
    mmbench(tmp_path / "one" / "mmbench_dev_20230712.tsv", [row for row in QUESTIONS if row["index"] < 1_000_000])
    mmbench(tmp_path / "all" / "mmbench_dev_20230712.tsv", QUESTIONS)
    bench, made = load("mmbench", tmp_path / "one")
    _, read = load("mmbench", tmp_path / "all")
    assert {str(q.id): (q.text, q.cluster) for q in made.questions} == {
        str(q.id): (q.text, q.cluster) for q in read.questions
    }
    assert all(made.read_image(q.image) == encoded(int(q.id) % 1_000_000, "JPEG") for q in made.questions)
    assert headline(check(bench, made, answer_all(read, right))) == 100


@pytest.mark.parametrize("wrong", range(4))
def test_one_wrong_pass_loses_the_question(data, wrong):
    """Not its share: that would score seven to eight points too high."""
    bench, loaded = load("mmbench", data)
    answers = answer_all(loaded, right)
    assert headline(check(bench, loaded, answers)) == 100
    id = str(4 + wrong * 1_000_000)
    answers[id] = "A" if answers[id] != "A" else "D"
    assert headline(check(bench, loaded, answers)) == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    mmbench(folder / "mmbench_dev_20230712.tsv", QUESTIONS)
    return load("mmbench", folder)


@given(st.lists(st.sampled_from(["right", "right", "right", "A", "B", "?"]), min_size=9, max_size=9))
def test_accuracy_is_that_of_circular_groups(whole, kinds):
    bench, loaded = whole
    answers = {
        str(row["index"]): row["answer"] if kind == "right" else kind
        for row, kind in zip(QUESTIONS, kinds, strict=True)
    }
    groups: dict[int, list[bool]] = {}
    for row in QUESTIONS:
        groups.setdefault(row["index"] % 1_000_000, []).append(answers[str(row["index"])] == row["answer"])
    hit = {index: all(good) for index, good in groups.items()}
    scored = check(bench, loaded, answers)
    values = scored.values()
    assert headline(scored) == pytest.approx(100 * sum(hit.values()) / 3)
    # No macro average: two of the three questions are of one category.
    for names, share in (
        (("object_localization", "finegrained_perception (instance-level)", "FP-S"), 100.0 * hit[4]),
        (("image_scene", "coarse_perception", "CP"), 100 * (hit[7] + hit[9]) / 2),
    ):
        found = [value for key, value in values.items() if key.split("/")[0] in names and "first" not in key]
        assert len(found) >= 2
        assert found == pytest.approx([share] * len(found))


@pytest.fixture
def written(monkeypatch):
    """Frames that are written as workbooks: their writer need not be installed."""
    found: list[pandas.DataFrame] = []
    monkeypatch.setattr(pandas.DataFrame, "to_excel", lambda frame, path, **more: found.append(frame))
    return found


def test_test_split_without_answers_is_read_for_upload(tmp_path, written):
    rows = [{**row, "answer": "", "split": "test"} for row in QUESTIONS]
    columns = [column for column in MMBENCH if column != "answer"]
    mmbench(tmp_path / "mmbench_test_en_20231003.tsv", rows, columns)
    bench, loaded = load("mmbench", tmp_path)
    assert len(loaded.questions) == 9
    with pytest.raises(BenchmarkError, match="test split") as error:
        bench.score(loaded, answer_all(loaded, "B"))
    assert "\n" not in str(error.value)
    bench.export(loaded, answer_all(loaded, "B"), tmp_path / "out")
    (uploaded,) = written
    assert "answer" not in uploaded.columns
    assert list(uploaded["prediction"]) == ["B"] * 9


def test_upload_has_the_columns_of_llavas_script(data, tmp_path, written):
    bench, loaded = load("mmbench", data)
    (path,) = bench.export(loaded, answer_all(loaded, lambda q: f"{right(q)}. <&> \u00e9\x00"), tmp_path / "out")
    (frame,) = written
    assert path.suffix == ".xlsx"
    assert list(frame.columns) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [int(index) for index in frame["index"]] == [row["index"] for row in QUESTIONS]
    assert list(frame["prediction"]) == [f"{row['answer']}. <&> \u00e9" for row in QUESTIONS]
    assert list(frame["answer"]) == [row["answer"] for row in QUESTIONS]
    assert frame["A"][0] == "A red car"
    assert pandas.isna(frame["C"][4])


@pytest.mark.skipif(importlib.util.find_spec("openpyxl") is not None, reason="openpyxl is there")
def test_upload_says_what_it_needs(data, tmp_path):
    bench, loaded = load("mmbench", data)
    with pytest.raises(BenchmarkError, match="openpyxl") as error:
        bench.export(loaded, answer_all(loaded, right), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_upload_is_read_back_as_workbook(data, tmp_path):
    pytest.importorskip("openpyxl")
    bench, loaded = load("mmbench", data)
    (path,) = bench.export(loaded, answer_all(loaded, right), tmp_path / "out")
    assert list(pandas.read_excel(path)["prediction"]) == [row["answer"] for row in QUESTIONS]
