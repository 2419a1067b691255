"""MMBench: prompts and passes as LLaVA's, a hit only if all rotations are right. Parsers are in `test_rules.py`."""

from __future__ import annotations

import base64
import dataclasses

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks.interface import NotScorable
from tests.eval.benchmarks.makers import LETTER, MMBENCH, encoded, mmbench, rotations
from tests.eval.benchmarks.samples import CARS, answer_all, check, headline, ids, load, refused, value

FILE = "mmbench_dev_20230712.tsv"
QUESTIONS = [
    *rotations(4, "What is in the picture?", CARS, "B", hint="Look at the road."),
    *rotations(7, "Is it day?", ["yes", "no"], "A", category="image_scene", level="coarse_perception"),
    *rotations(9, "How many?", ["one", "two", "three"], "C", category="image_scene", level="coarse_perception"),
]
RIGHT = [row["answer"] for row in QUESTIONS]
ONE = rotations(4, "What?", CARS, "B", passes=1)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("mmbench", mmbench(tmp_path_factory.mktemp("mmbench") / FILE, QUESTIONS).parent)


COMPANION = rotations(99, "Is it so?", ["yes", "no"], "A")
"""A question with its passes as rows: without any in the file, passes would be made."""


def single(folder, row, columns=MMBENCH):
    """Load a file with one pass of one question, and keep that question alone."""
    bench, loaded = load("mmbench", mmbench(folder / FILE, [row, *COMPANION], columns).parent)
    return bench, dataclasses.replace(loaded, questions=[q for q in loaded.questions if str(q.id) == str(row["index"])])


def test_prompts_are_those_of_llava(sample):
    _, loaded = sample
    texts = {str(q.id): q.text for q in loaded.questions}
    assert list(texts) == [str(row["index"]) for row in QUESTIONS]
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", CARS, strict=True))
    assert texts["4"] == f"Look at the road.\nWhat is in the picture?\n{lines}\n{LETTER}"
    assert texts["1000004"].splitlines()[2:6] == ["A. A blue truck", "B. A green bus", "C. A dog", "D. A red car"]
    assert texts["7"] == f"Is it day?\nA. yes\nB. no\n{LETTER}"
    assert texts["2000009"] == f"How many?\nA. three\nB. one\nC. two\n{LETTER}"
    assert [q.cluster for q in loaded.questions] == [str(int(q.id) % 1_000_000) for q in loaded.questions]
    assert loaded.read_image(loaded.questions[0].image) == encoded(4, "JPEG")


def test_chinese_prompt_has_llavas_chinese_suffix(tmp_path):
    rows = rotations(1, "\u56fe\u4e2d\u662f\u4ec0\u4e48\uff1f", ["\u72d7", "\u732b"], "A")
    bench, loaded = load("mmbench-cn", mmbench(tmp_path / "mmbench_dev_cn_20231003.tsv", rows).parent)
    suffix = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
    assert loaded.questions[0].text == f"\u56fe\u4e2d\u662f\u4ec0\u4e48\uff1f\nA. \u72d7\nB. \u732b\n{suffix}"
    for answers in ({"1": "A", "1000001": "B"}, {"1": "\u662f\u72d7", "1000001": "\u72d7"}):
        assert headline(check(bench, loaded, answers)) == 100


@pytest.mark.parametrize("empty", ["", "nan", "NaN", "None", "none"])
def test_options_stop_at_the_first_empty_one(tmp_path, empty):
    (row,) = rotations(1, "Which?", ["one", "two", "x", "four"], "A", passes=1)
    (question,) = single(tmp_path, {**row, "C": empty, "hint": empty})[1].questions
    assert question.text == f"Which?\nA. one\nB. two\n{LETTER}"


def test_short_image_cell_is_the_index_of_the_row_with_the_image(tmp_path):
    rows = rotations(4, "What?", CARS, "B")
    _, loaded = load(
        "mmbench", mmbench(tmp_path / FILE, [rows[0], *({**row, "image": "4"} for row in rows[1:])]).parent
    )
    assert [loaded.read_image(q.image) for q in loaded.questions] == [encoded(4, "JPEG")] * 4


def test_columns_may_be_in_any_order_and_cells_quoted_or_large(tmp_path):
    image = base64.b64encode(bytes(300_000)).decode()
    changed = {**ONE[0], "question": '"What is it?\nSay ""one"" word."', "image": image}
    (question,) = (loaded := single(tmp_path, changed, MMBENCH[::-1])[1]).questions
    assert question.text.startswith('What is it?\nSay "one" word.\nA. A red car')
    assert loaded.read_image(question.image) == bytes(300_000)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (ONE, [column for column in MMBENCH if column != "question"]),
        *(
            ([ONE[0] | change], MMBENCH)
            for change in (
                *({"index": "four"}, {"index": -1}, {"index": 5_000_004}, {"answer": "E"}, {"image": ""}),
                {"image": "7"},
            )
        ),
        ([*ONE, *ONE], MMBENCH),
        ([], MMBENCH),
        ([{"index": "1"}], ["index", "question\tA\tB\timage\n1"]),  # fewer cells than columns
    ],
)
def test_invalid_table_is_named(tmp_path, rows, columns):
    with refused(FILE):
        load("mmbench", mmbench(tmp_path / FILE, rows, columns).parent)


def test_image_that_is_not_base64_is_named(tmp_path):
    (question,) = (loaded := single(tmp_path, {**ONE[0], "image": "*" * 80})[1]).questions
    with refused(FILE):
        loaded.read_image(question.image)


@pytest.mark.parametrize("answer", ["none", "Not really", "I know", "no", "No", "C"])
def test_options_are_looked_for_within_words_and_letters_among_the_options(tmp_path, answer):
    bench, loaded = single(tmp_path, rotations(7, "Is it?", ["yes", "no"], "A", passes=1)[0])
    assert bench.score(loaded, {"7": answer}).parsed_answers[0].parsed == ("" if answer == "C" else "B")


def test_passes_are_made_where_the_file_has_none(tmp_path, sample):
    """The same rows result from files of VLMEvalKit, which have one row per question."""
    mmbench(tmp_path / FILE, [row for row in QUESTIONS if row["index"] < 1_000_000])
    bench, loaded = load("mmbench", tmp_path)
    made, given = ({q.id: (q.text, q.cluster) for q in some.questions} for some in (loaded, sample[1]))
    assert made == given
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


def test_test_split_without_answers_is_read_for_upload(tmp_path):
    rows = [{**row, "answer": "", "split": "test"} for row in QUESTIONS]
    columns = [column for column in MMBENCH if column != "answer"]
    bench, loaded = load("mmbench", mmbench(tmp_path / "mmbench_test_en_20231003.tsv", rows, columns).parent)
    with pytest.raises(NotScorable, match="mmbench_test_en"):
        bench.score(loaded, answer_all(loaded, "B"))
    frame = pandas.read_excel(*bench.export(loaded, answer_all(loaded, "B"), tmp_path / "out"))
    assert "answer" not in frame.columns
    assert list(frame["prediction"]) == ["B"] * 9


def test_upload_has_the_columns_of_llavas_script(sample, tmp_path):
    bench, loaded = sample
    (path,) = bench.export(loaded, answer_all(loaded, [f"{a}. <&> \u00e9\x00" for a in RIGHT]), tmp_path / "out")
    frame = pandas.read_excel(path)
    assert path.suffix == ".xlsx"
    assert list(frame.columns) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [str(index) for index in frame["index"]] == ids(loaded)
    assert list(frame["prediction"]) == [f"{answer}. <&> \u00e9" for answer in RIGHT]
    assert list(frame["answer"]) == RIGHT
    assert frame["A"][0] == "A red car"
    assert pandas.isna(frame["C"][4])
