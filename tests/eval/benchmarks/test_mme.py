"""MME: folders of texts and images, two scores a task."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks.mme import COGNITION, PERCEPTION
from tests.eval.benchmarks.makers import SHORT, mme, shade
from tests.eval.benchmarks.samples import answer_all, check, find_question, headline, load, refused, yes_no_pair

YES_NO = "Please answer yes or no."


@pytest.fixture
def data(tmp_path):
    return mme(
        tmp_path / "MME_Benchmark_release_version",
        {
            "artwork": {"10002.jpg": yes_no_pair("a still life"), "10881.jpg": yes_no_pair("a portrait")},
            "OCR": {"0001.jpg": yes_no_pair("a price")},
            "code_reasoning": {"0020.png": yes_no_pair("Python")},
        },
    )


def label(question) -> str:
    return question.metadata["label"].capitalize()


def test_both_kinds_of_folders_are_read(data):
    _, loaded = load("mme", data.parent)
    assert len(loaded.questions) == 8
    assert len(loaded.clusters) == 4  # both questions of an image are one cluster
    assert label(find_question(loaded, "Is this a still life")) == "Yes"
    assert label(find_question(loaded, "Is this not Python")) == "No"
    for text, number in (("Is this a still life", 0), ("Is this a portrait", 1), ("Is this Python", 0)):
        assert abs(shade(loaded.read_image(find_question(loaded, text).image)) - number) < 9
    assert find_question(loaded, "Is this a price").text == f"Is this a price?\n{SHORT}"


@pytest.mark.parametrize("gap", ["  ", ""])
def test_sentence_that_asks_for_yes_or_no_is_removed(tmp_path, gap):
    pair = [(f"Is it red?{gap}{YES_NO}", "Yes"), (f"Is it blue?{gap}{YES_NO}", "No")]
    _, loaded = load("mme", mme(tmp_path, {"color": {"1.jpg": pair}}))
    assert [q.text.replace(" \n", "\n") for q in loaded.questions] == [f"Is it red?\n{SHORT}", f"Is it blue?\n{SHORT}"]


def test_same_image_name_in_two_tasks_is_two_images(tmp_path):
    color = {"0.jpg": yes_no_pair("red"), "1.jpg": yes_no_pair("blue")}
    bench, loaded = load("mme", mme(tmp_path, {"count": {"1.jpg": yes_no_pair("one")}, "color": color}))
    assert len(loaded.clusters) == 3
    one, blue = find_question(loaded, "Is this one"), find_question(loaded, "Is this blue")
    assert loaded.read_image(one.image) != loaded.read_image(blue.image)
    check(bench, loaded, answer_all(loaded, label))


def test_last_line_may_lack_its_end_and_three_lines_are_an_error(data):
    path = data / "OCR" / "0001.txt"
    path.write_text(path.read_text("utf-8").rstrip("\n"), "utf-8")
    assert len(load("mme", data)[1].questions) == 8
    ask = f"Is it? {YES_NO}"
    for text in (f"{ask}\tYes\n", f"{ask}\tYes\n{ask}\n", f"{ask}\tYes\n{ask}\tPerhaps\n", f"{ask}\tYes\n" * 3):
        path.write_text(text, "utf-8")
        with refused("0001.txt"):
            load("mme", data)


def by_hand(rows: list[tuple[str, str, str, str]]) -> dict[str, float]:
    """Return the published scores of (task, image, label, parsed answer)."""
    scores = {}
    for task in {task for task, *_ in rows}:
        mine = [(image, truth == parsed) for name, image, truth, parsed in rows if name == task]
        both = [all(right for name, right in mine if name == image) for image in {image for image, _ in mine}]
        scores[task] = 100 * sum(right for _, right in mine) / len(mine) + 100 * sum(both) / len(both)
    return scores


TASKS = ["existence", "artwork", "OCR", "code_reasoning", "text_translation"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    tasks = {task: {f"{n}.jpg": yes_no_pair(f"{task} {n}") for n in range(2)} for task in TASKS}
    return load("mme", mme(tmp_path_factory.mktemp("many"), tasks))


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["Yes", "No", "Not sure", "The answer is yes"]), min_size=20, max_size=20))
def test_scores_are_those_of_the_published_arithmetic(many, texts):
    """An unparsed answer stays in the denominator."""
    bench, loaded = many
    scored = check(bench, loaded, answer_all(loaded, texts))
    parse = {"Yes": "Yes", "No": "No", "Not sure": "No", "The answer is yes": ""}
    tasks = by_hand(
        [
            (question.metadata["task"], question.cluster, label(question), parse[text])
            for question, text in zip(loaded.questions, texts, strict=True)
        ]
    )
    values = scored.values()
    assert headline(scored) == values["perception"] == pytest.approx(sum(tasks[t] for t in TASKS[:3]))
    assert values["cognition"] == pytest.approx(sum(tasks[t] for t in TASKS[3:]))
    assert {task: values[task] for task in TASKS} == pytest.approx(tasks)


def test_counts_of_a_published_task_give_its_score():
    """41 of 60 and 15 of 30 images: the score of a task is the sum of both shares in percent."""
    rows = [("count", str(n), "Yes", "Yes" if n < 15 else "") for n in range(30)]
    rows += [("count", str(n), "No", "No" if n < 26 else "") for n in range(30)]
    assert by_hand(rows)["count"] == pytest.approx(100 * 41 / 60 + 100 * 15 / 30)


def test_all_right_is_two_thousand_and_eight_hundred(tmp_path):
    data = mme(tmp_path, {task: {"1.jpg": yes_no_pair(task)} for task in [*PERCEPTION, *COGNITION]})
    bench, loaded = load("mme", data)
    for rule in bench.rules:
        scored = check(bench, loaded, answer_all(loaded, label), rule)
        assert headline(scored) == 2000
        assert sorted(scored.values().values())[-3:] == [200, 800, 2000]


def test_result_folder_is_that_of_the_official_tool(data, tmp_path):
    bench, loaded = load("mme", data)
    paths = bench.export(loaded, answer_all(loaded, lambda q: f"{label(q)}\tbecause\nit is\r\nso"), tmp_path / "out")
    assert sorted(path.name for path in paths) == ["OCR.txt", "artwork.txt", "code_reasoning.txt"]
    text = "".join(path.read_text("utf-8") for path in paths if path.name == "artwork.txt")
    asked = [
        (f"{n}.jpg", *row) for n, what in ((10002, "a still life"), (10881, "a portrait")) for row in yes_no_pair(what)
    ]
    assert text == "".join(f"{name}\t{ask}\t{truth}\t{truth} because it is  so\n" for name, ask, truth in asked)
