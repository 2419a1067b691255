"""MME: folders of texts and pictures, the first four characters, two scores a task."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files, benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import SHORT, asked, check, everyone, headline, lines, mme, opened, said, shade

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_NO = "Please answer yes or no."


def image(name: str, yes: str = "Yes", no: str = "No") -> list[tuple[str, str]]:
    return [(f"Is this {name}? {YES_NO}", yes), (f"Is this not {name}, but a hat? {YES_NO}", no)]


@pytest.fixture
def data(tmp_path):
    return mme(
        tmp_path / "MME_Benchmark_release_version",
        {
            "artwork": {"10002.jpg": image("a still life"), "10881.jpg": image("a portrait")},
            "OCR": {"0001.jpg": image("a price")},
            "code_reasoning": {"0020.png": image("Python")},
        },
    )


def known(question) -> str:
    """The label, whatever it is kept as."""
    label = question.metadata["label"]
    return {True: "Yes", False: "No"}.get(label, str(label).capitalize())


def test_questions_of_both_kinds_of_folder_are_read(data):
    _, loaded = opened("mme", data)
    assert len(loaded.questions) == 8
    assert len({str(q.id) for q in loaded.questions}) == 8
    labels = {q.text.splitlines()[0]: known(q) for q in loaded.questions}
    assert labels["Is this a still life?"] == "Yes"
    assert labels["Is this not Python, but a hat?"] == "No"


def test_prompt_is_llavas_to_the_character(data):
    _, loaded = opened("mme", data)
    wanted = "Is this a price?\nAnswer the question using a single word or phrase."
    assert asked(loaded, "Is this a price").text == wanted


@pytest.mark.parametrize("gap", ["  ", ""])
def test_sentence_goes_whatever_stands_before_it(tmp_path, gap):
    pair = [(f"Is it red?{gap}{YES_NO}", "Yes"), (f"Is it blue?{gap}{YES_NO}", "No")]
    _, loaded = opened("mme", mme(tmp_path, {"color": {"1.jpg": pair}}))
    assert [q.text.replace(" \n", "\n") for q in loaded.questions] == [f"Is it red?\n{SHORT}", f"Is it blue?\n{SHORT}"]


def test_both_questions_of_a_picture_are_one_cluster(data):
    _, loaded = opened("mme", data)
    units: dict[str, int] = {}
    for question in loaded.questions:
        units[question.cluster] = units.get(question.cluster, 0) + 1
    assert list(units.values()) == [2, 2, 2, 2]


def test_same_picture_name_in_two_tasks_is_two_pictures(tmp_path):
    tasks = {"count": {"1.jpg": image("one")}, "color": {"0.jpg": image("red"), "1.jpg": image("blue")}}
    bench, loaded = opened("mme", mme(tmp_path, tasks))
    assert len({q.cluster for q in loaded.questions}) == 3
    one, blue = asked(loaded, "Is this one"), asked(loaded, "Is this blue")
    assert loaded.read_image(one.image) != loaded.read_image(blue.image)
    check(bench, loaded, everyone(loaded, known))


def test_pictures_are_found_in_both_kinds_of_folder(data):
    _, loaded = opened("mme", data)
    for text, number in (("Is this a still life", 0), ("Is this a portrait", 1), ("Is this Python", 0)):
        assert abs(shade(loaded.read_image(asked(loaded, text).image)) - number) < 9


def test_last_line_may_lack_its_end(data):
    path = data / "OCR" / "0001.txt"
    path.write_text(path.read_text("utf-8").rstrip("\n"), "utf-8")
    assert len(opened("mme", data)[1].questions) == 8


@pytest.mark.parametrize(
    "text",
    [
        f"Is it? {YES_NO}\tYes\n",
        f"Is it? {YES_NO}\tYes\nIs it? {YES_NO}\n",
        f"Is it? {YES_NO}\tYes\nIs it not? {YES_NO}\tPerhaps\n",
    ],
    ids=["one line", "no tab", "label"],
)
def test_broken_text_is_named_in_one_line(data, text):
    (data / "OCR" / "0001.txt").write_text(text, "utf-8")
    with pytest.raises(BenchmarkError, match=r"0001\.txt") as error:
        opened("mme", data)
    assert "\n" not in str(error.value)


def test_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(BenchmarkError) as error:
        opened("mme", tmp_path)
    assert "\n" not in str(error.value)


# What the official tool, lmms-eval and VLMEvalKit read; "" is neither.
READ = {
    "Yes": ("yes", "yes", "yes"),
    "No": ("no", "no", "no"),
    "yes.": ("yes", "yes", "yes"),
    "NO!": ("no", "no", "no"),
    " Yes": ("yes", "yes", "yes"),
    "  No": ("no", "no", "no"),
    "   No": ("", "no", "no"),
    "   Yes": ("", "yes", "yes"),
    "Not sure": ("no", "no", ""),
    "None": ("no", "no", ""),
    "Know": ("no", "no", ""),
    "Eyes": ("yes", "yes", ""),
    "Yesterday": ("yes", "yes", ""),
    "The answer is yes": ("", "", "yes"),
    "It is no.": ("", "", "no"),
    "1. No": ("", "no", "no"),
    "1. Yes": ("", "", "yes"),
    "y": ("", "yes", ""),
    "N.": ("", "no", ""),
    "N/A": ("", "", ""),
    "": ("", "", ""),
    "(No)": ("no", "no", "no"),
    "**Yes**": ("", "", ""),
    "Yes and no": ("yes", "yes", ""),
    "No, yes": ("no", "no", ""),
    "Yes\nbecause it is": ("yes", "yes", "yes"),
    "S\u00ed": ("", "", ""),
    "\u662f": ("", "", ""),
    "Nein": ("", "", ""),
    "Non": ("no", "no", ""),
}
RULES = ("official", "lmms-eval", "vlmevalkit")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return opened("mme", mme(tmp_path_factory.mktemp("mme"), {"count": {"1.jpg": image("two")}}))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("answer", READ, ids=repr)
def test_answers_are_read_by_each_rule(two, answer, rule):
    bench, loaded = two
    wanted = READ[answer][RULES.index(rule)]
    parsed_answers = bench.score(loaded, everyone(loaded, answer), rule).parsed_answers
    assert [reading.parsed for reading in parsed_answers] == [wanted] * 2
    assert [reading.right for reading in parsed_answers] == [wanted == "yes", wanted == "no"]
    if rule == "official" and not wanted:
        assert all(reading.unparsed for reading in parsed_answers)


def by_hand(rows: list[tuple[str, str, str, str]]) -> dict[str, float]:
    """The published arithmetic over (task, picture, label, what was read)."""
    found = {}
    for task in {task for task, *_ in rows}:
        mine = [(picture, label == read) for name, picture, label, read in rows if name == task]
        pictures = {picture for picture, _ in mine}
        both = [all(right for name, right in mine if name == picture) for picture in pictures]
        found[task] = 100 * sum(right for _, right in mine) / len(mine) + 100 * sum(both) / len(both)
    return found


TASKS = ["existence", "artwork", "OCR", "code_reasoning", "text_translation"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    tasks = {task: {f"{n}.jpg": image(f"{task} {n}") for n in range(2)} for task in TASKS}
    return opened("mme", mme(tmp_path_factory.mktemp("many"), tasks))


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["Yes", "No", "Not sure", "The answer is yes"]), min_size=20, max_size=20))
def test_scores_are_those_of_the_published_arithmetic(many, texts):
    bench, loaded = many
    answers = dict(zip([str(q.id) for q in loaded.questions], texts, strict=True))
    scored = check(bench, loaded, answers)
    read = {"Yes": "Yes", "No": "No", "Not sure": "No", "The answer is yes": ""}
    rows = [(task_of(q.text), q.cluster, known(q), read[text]) for q, text in zip(loaded.questions, texts, strict=True)]
    tasks = by_hand(rows)
    values = scored.values()
    assert headline(scored) == pytest.approx(sum(tasks[task] for task in ("existence", "artwork", "OCR")))
    assert next(iter(values)) == "perception"
    assert values["cognition"] == pytest.approx(tasks["code_reasoning"] + tasks["text_translation"])
    for task in TASKS:
        assert values[task] == pytest.approx(tasks[task])


def task_of(text: str) -> str:
    return next(task for task in TASKS if f" {task} " in text)


@pytest.mark.parametrize("rule", RULES)
def test_all_right_is_two_thousand_and_eight_hundred(tmp_path, rule):
    data = mme(tmp_path, {task: {"1.jpg": image(task)} for task in [*PERCEPTION, *COGNITION]})
    bench, loaded = opened("mme", data)
    values = check(bench, loaded, everyone(loaded, known), rule).values()
    assert headline(bench.score(loaded, everyone(loaded, known), rule)) == 2000
    assert sorted(values.values())[-3:] == [200, 800, 2000]


def test_one_of_two_right_earns_half_a_hundred(two):
    bench, loaded = two
    assert headline(check(bench, loaded, everyone(loaded, "Yes"))) == 50
    assert headline(check(bench, loaded, everyone(loaded, known))) == 200
    assert headline(check(bench, loaded, everyone(loaded, "Perhaps"))) == 0


def test_other_stays_in_the_denominator(data):
    bench, loaded = opened("mme", data)
    first = asked(loaded, "Is this a still life")
    answers = everyone(loaded, lambda q: known(q) if "artwork" in q.cluster or "still" in q.text else "")
    answers |= {str(q.id): known(q) for q in loaded.questions if "portrait" in q.text}
    answers[str(first.id)] = "I think so"
    # Three of four right, one picture of two: 75 + 50.
    assert check(bench, loaded, answers).values()["artwork"] == pytest.approx(125)


def test_missing_answer_is_wrong(two):
    bench, loaded = two
    right = everyone(loaded, known)
    right.pop(str(loaded.questions[0].id))
    assert headline(check(bench, loaded, right)) == 50


def test_answers_by_llava_are_joined_by_question(data, tmp_path):
    """The same id stands there twice, once for each question of a picture; rows in any order."""
    bench, loaded = opened("mme", data)
    names = {"still life": "artwork/10002.jpg", "portrait": "artwork/10881.jpg"}
    names |= {"a price": "OCR/0001.jpg", "Python": "code_reasoning/0020.png"}
    rows = [
        said(next(id for text, id in names.items() if text in q.text), q.text, known(q), category="x")
        for q in loaded.questions
    ]
    wanted = everyone(loaded, known)
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        assert answer_files.read_answers(lines(tmp_path / "a.jsonl", order), bench, loaded) == wanted
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", [*rows, rows[0]]), bench, loaded)
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", rows[1:]), bench, loaded)
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", [{**rows[0], "prompt": "Is it?"}, *rows[1:]]), bench, loaded)


def test_own_answers_are_joined_by_our_id(data, tmp_path):
    bench, loaded = opened("mme", data)
    rows = [{"question_id": q.id, "text": known(q)} for q in loaded.questions]
    assert answer_files.read_answers(lines(tmp_path / "a.jsonl", rows), bench, loaded) == everyone(loaded, known)


def test_result_folder_is_the_official_tools(data, tmp_path):
    bench, loaded = opened("mme", data)
    answers = everyone(loaded, lambda q: f"{known(q)}\tbecause\nit is\r\nso")
    paths = bench.export(loaded, answers, tmp_path / "out")
    assert sorted(path.name for path in paths) == ["OCR.txt", "artwork.txt", "code_reasoning.txt"]
    for path in paths:
        rows = path.read_text("utf-8").split("\n")
        assert rows[-1] == ""
        cells = [row.split("\t") for row in rows[:-1]]
        assert all(len(row) == 4 for row in cells)
        assert len(cells) % 2 == 0
        for image_name, question, label, answer in cells:
            assert question.endswith(YES_NO)
            assert label in ("Yes", "No")
            assert answer.startswith(label)
            assert "/" not in image_name
        assert [row[0] for row in cells[::2]] == [row[0] for row in cells[1::2]]
        assert list(path.parent.glob("*.txt"))


def test_counts_of_a_published_task_give_its_score():
    """41 of 60 and 15 of 30 pictures: a task's score is the sum of both shares in percent."""
    assert by_hand([]) == {}
    rows = [("count", str(n), "Yes", "Yes" if n < 15 else "") for n in range(30)]
    rows += [("count", str(n), "No", "No" if n < 26 else "") for n in range(30)]
    assert by_hand(rows)["count"] == pytest.approx(100 * 41 / 60 + 100 * 15 / 30)


def test_rules_and_cap():
    bench = benchmark("mme")
    assert bench.rules[0] == "official"
    assert set(RULES) <= set(bench.rules)
    assert bench.max_new_tokens == 128
    assert np.isscalar(bench.max_new_tokens)
