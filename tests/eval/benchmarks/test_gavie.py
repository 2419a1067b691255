"""GAVIE: scores under two headings, plain means, and the official prompt with its width for height."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks import makers_free as make


def reply(relevancy, accuracy, answer: int = 1) -> str:
    """The official skeleton, filled."""
    return (
        f"Relevancy:\nscore of the answer{answer}: {relevancy}\nreason: it does what is asked, 3 times.\n\n"
        f"Accuracy:\nscore of the answer{answer}: {accuracy}\nreason: 2 of 4 things are right."
    )


# Reply, relevancy and accuracy; None: that heading has no score that can be read.
REPLIES = {
    reply(8, 6): (8, 6),
    reply(0, 10): (0, 10),
    reply("8.5", "6.0"): (8.5, 6.0),
    reply(8, 6).replace("\n", "\r\n"): (8, 6),
    reply(8, 6).upper(): (8, 6),
    "Sure.\n\n" + reply(8, 6) + "\n\nThat is all, 1.": (8, 6),
    "Accuracy:\nscore of the answer1: 6\nreason: x\n\nRelevancy:\nscore of the answer1: 8\nreason: y": (8, 6),
    "Relevancy:\nScore of the Answer1:8\nReason: y\nAccuracy:\nScore of the Answer1:6\nReason: x": (8, 6),
    # The reason speaks of the other heading.
    "Relevancy:\nscore of the answer1: 8\nreason: its accuracy is another thing\n\n"
    "Accuracy:\nscore of the answer1: 6\nreason: relevancy aside": (8, 6),
    "": (None, None),
    "8 6": (None, None),
    "I cannot score this.": (None, None),
    "Relevancy:\nscore of the answer1: 8\nreason: cut": (8, None),
    "Accuracy:\nscore of the answer1: 6\nreason: cut": (None, 6),
    "Relevancy:\nscore of the answer1:\nreason: 7 of them\n\nAccuracy:\nscore of the answer1: 6\nreason: x": (None, 6),
    reply("eight", 6): (None, 6),
    reply(85, 6): (None, 6),
    reply(8, 11): (8, None),
}


@pytest.fixture(scope="module")
def bench():
    return find_benchmark("gavie")


@pytest.fixture(scope="module")
def loaded(bench, tmp_path_factory):
    return bench.load(make.gavie(tmp_path_factory.mktemp("gavie")))


def score(bench, loaded, replies):
    return bench.score(loaded, {str(q.id): "So." for q in loaded.questions}, replies=make.by_question(loaded, replies))


def both(scored) -> tuple[float, float]:
    return make.value(scored, "relevancy", "gavie-relevancy"), make.value(scored, "accuracy", "gavie-accuracy")


@pytest.mark.parametrize("text", REPLIES, ids=lambda text: repr(text)[:60])
def test_reply_is_read(bench, loaded, text):
    wanted = REPLIES[text]
    scored = score(bench, loaded, [text, *[reply(5, 5)] * 4])
    assert scored.parsed_answers[0].unparsed == (None in wanted)
    assert np.isfinite(list(scored.values().values())).all()
    if None not in wanted:
        assert both(scored) == pytest.approx(((wanted[0] + 20) / 5, (wanted[1] + 20) / 5))
    assert not any(reading.unparsed for reading in scored.parsed_answers[1:])


@pytest.mark.parametrize("seed", range(3))
def test_plain_means_over_questions(bench, loaded, seed):
    pairs = np.random.default_rng(seed).integers(0, 11, (5, 2))
    scored = score(bench, loaded, [reply(*pair) for pair in pairs])
    assert both(scored) == pytest.approx(tuple(pairs.mean(0)))
    assert make.headline(scored) in (pytest.approx(pairs[:, 1].mean()), pytest.approx(pairs[:, 0].mean()))
    make.sound(loaded, scored)


def test_questions_of_a_picture_are_one_cluster(loaded):
    assert len(loaded.questions) == 5
    assert len({str(question.id) for question in loaded.questions}) == 5
    units = [question.cluster for question in loaded.questions]
    assert units[0] == units[1] == units[4] != units[2] == units[3]


def test_questions_are_bare(loaded):
    wanted = ["What is at [11, 12]?", "Describe the sky.", "Who is it?", "Is it a man?", "Is there a dog?"]
    assert [question.text for question in loaded.questions] == wanted
    assert loaded.read_image(loaded.questions[2].image) == make.PICTURE


def test_judge_sees_regions_with_the_width_as_height(bench, loaded):
    """The official script writes bbox[2] twice; its published numbers rest on that."""
    said = make.by_question(loaded, ["So {regions}.", *["So."] * 4])
    asked = bench.judge_requests(loaded, said, "official", {"gavie": "R[{regions}] Q[{question}] A[{answer}]"})
    assert [request.id for request in asked] == [str(question.id) for question in loaded.questions]
    regions = "a red kite X:11 Y:12 Width:13 Height:13\nthe sky X:0 Y:0 Width:400 Height:400"
    assert asked[0].prompt == f"R[{regions}] Q[What is at [11, 12]?] A[So {{regions}}.]"
    assert asked[2].prompt == "R[a man X:5 Y:6 Width:7 Height:7] Q[Who is it?] A[So.]"
    assert not any(request.image for request in asked)


@pytest.mark.parametrize("replies", [None, {}, {"0": reply(1, 1)}], ids=["none", "empty", "one"])
def test_replies_are_needed(bench, loaded, replies):
    with pytest.raises(BenchmarkError) as error:
        bench.score(loaded, {str(q.id): "So." for q in loaded.questions}, replies=replies)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(bench, tmp_path):
    folder = make.gavie(tmp_path)
    (folder / "evaluation_set.json").unlink()
    make.refused(bench, folder, "evaluation_set.json")


def test_regions_are_missed_where_the_judge_needs_them(bench, tmp_path):
    """Replies that are there can be scored without them."""
    folder = make.gavie(tmp_path)
    (folder / "vg_annotation.json").unlink()
    with pytest.raises(BenchmarkError, match=r"vg_annotation\.json") as error:
        bench.judge_requests(bench.load(folder), dict.fromkeys("01234", "So."), "official", {"gavie": "{regions}"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["evaluation_set.json", "vg_annotation.json"])
@pytest.mark.parametrize("text", ["{", "3", "\xff"], ids=["cut off", "number", "no text"])
def test_a_broken_file_is_named(bench, tmp_path, name, text):
    folder = make.gavie(tmp_path)
    (folder / name).write_bytes(text.encode("latin1"))
    make.refused(bench, folder, name)


@pytest.mark.parametrize("lost", ["image_id", "question"])
def test_a_row_that_lacks_something_is_named(bench, tmp_path, lost):
    folder = make.gavie(tmp_path)
    rows = json.loads((folder / "evaluation_set.json").read_text())
    del rows[3][lost]
    make.dump(folder / "evaluation_set.json", rows)
    make.refused(bench, folder, "evaluation_set.json", "3", lost)


def test_a_picture_without_regions_is_refused(bench, tmp_path):
    folder = make.gavie(tmp_path)
    make.dump(folder / "vg_annotation.json", {"2331": [{"caption": "a kite", "bbox": [1, 2, 3, 4]}]})
    make.refused(bench, folder, "vg_annotation.json", "77")


@pytest.mark.parametrize(
    "region", [{"caption": "x"}, {"bbox": [1, 2, 3, 4]}, {"caption": "x", "bbox": [1, 2]}], ids=str
)
def test_a_broken_region_is_refused(bench, tmp_path, region):
    folder = make.gavie(tmp_path)
    regions = json.loads((folder / "vg_annotation.json").read_text())
    regions["77"] = [region]
    make.dump(folder / "vg_annotation.json", regions)
    make.refused(bench, folder, "vg_annotation.json", "77")


def test_numbers_for_image_ids_are_the_same(bench, tmp_path):
    folder = make.gavie(tmp_path)
    rows = json.loads((folder / "evaluation_set.json").read_text())
    make.dump(folder / "evaluation_set.json", [{**row, "image_id": int(row["image_id"])} for row in rows])
    assert len(bench.load(folder).questions) == 5


def test_rows_are_known_by_picture_and_question(bench, loaded):
    """The official list has no ids."""
    for place, question in enumerate(loaded.questions):
        row = {"image_id": question.image.split(".")[0], "question": question.text, "answer": "So."}
        assert bench.match_question(row, loaded) == str(place)
        assert bench.answer_text(row) == "So."


def test_a_question_without_an_answer_is_not_judged(bench, loaded):
    make.partial(bench, loaded, {"gavie": "{question}"}, reply(8, 6))
