"""MMHal-Bench: the judge's rating by the official search, means and rates by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks import makers_free as make

# Reply, score. Exactly one of "rating: 0" … "rating: 6" must stand in it; everything else is 0.
RATINGS = {
    "Rating: 5": 5,
    "Explanation first.\n\nRating: 3, not informative, no hallucination": 3,
    "rating: 2": 2,
    "RATING: 6": 6,
    "**Rating: 3**": 3,
    "- Rating: 4": 4,
    "Rating: 0": 0,
    "Rating: 10": 1,
    "Rating: 4.5": 4,
    "Rating: 5, I say: Rating: 5": 5,
    "Overall rating: 1.": 1,
    "My rating: 3 of 6": 3,
    "Rating:5": 0,
    "Rating: [4]": 0,
    "Rating:  4": 0,
    "Rating:\n4": 0,
    "**Rating:** 4": 0,
    "Rating is 4": 0,
    "Score: 5": 0,
    "Rating: 7": 0,
    "Rating: -1": 0,
    "Rating: five": 0,
    "5": 0,
    "": 0,
    "Rating: 2 or Rating: 5": 0,
    "Rating: 5 then rating: 3": 0,
    "Rating: 5/6": 5,
    "Rating: 3\nRating: 30": 3,
}
# What says nothing of a rating, whatever it counts as.
SILENT = {"", "5", "Score: 5", "Rating is 4", "Rating: five", "Rating: 7", "Rating: 2 or Rating: 5"}


@pytest.fixture(scope="module")
def mmhal():
    return find_benchmark("mmhal")


@pytest.fixture(scope="module")
def loaded(mmhal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmhal")
    make.dump(folder / "response_template.json", make.mmhal_rows())
    return mmhal.load(folder)


def score(mmhal, loaded, replies):
    answers = {str(q.id): f"Answer {number}." for number, q in enumerate(loaded.questions)}
    return mmhal.score(loaded, answers, replies=make.by_question(loaded, replies))


def read(mmhal, loaded, reply: str):
    """Score and reading of one reply, the other 95 rated 0."""
    scored = score(mmhal, loaded, [reply, *["Rating: 0"] * 95])
    return make.headline(scored) * 96, scored.parsed_answers[0]


@pytest.mark.parametrize("reply", RATINGS, ids=repr)
def test_reply_is_read_as_the_official_search_does(mmhal, loaded, reply):
    found, reading = read(mmhal, loaded, reply)
    assert found == pytest.approx(RATINGS[reply])
    assert not (reading.unparsed and RATINGS[reply])
    if reply in SILENT:
        assert reading.unparsed


def by_hand(scores) -> dict[str, float]:
    scores = np.asarray(scores, float)
    informative = np.where(scores >= 3, scores - 3, scores)
    return {
        "average": scores.mean(),
        "rate": (scores < 3).mean(),
        "informativeness": informative.mean() / 3 * 100,
        **{f"type{kind}": scores[kind::8].mean() for kind in range(8)},
    }


def named(scored, word: str) -> float:
    (name,) = [name for name in scored.metrics if word in make.folded(name) and "/" not in name]
    return scored.values()[name]


@pytest.mark.parametrize("seed", range(3))
def test_means_and_rates(mmhal, loaded, seed):
    scores = np.random.default_rng(seed).integers(0, 7, 96)
    scored = score(mmhal, loaded, [f"Why.\nRating: {number}, so" for number in scores])
    wanted = by_hand(scores)
    assert make.headline(scored) == pytest.approx(wanted["average"])
    assert named(scored, "rate") == pytest.approx(wanted["rate"])
    assert named(scored, "informative") == pytest.approx(wanted["informativeness"])
    for kind, row in enumerate(make.mmhal_rows()[:8]):
        found = [scored.values()[name] for name in scored.metrics if name.startswith(f"{row['question_type']}/")]
        assert found[0] == pytest.approx(wanted[f"type{kind}"]), row["question_type"]
    make.sound(loaded, scored)


def test_hallucination_begins_below_three(mmhal, loaded):
    for number, rate in ((2, 1.0), (3, 0.0)):
        assert named(score(mmhal, loaded, [f"Rating: {number}"] * 96), "rate") == rate


def test_replies_that_cannot_be_read_count_as_hallucinations_of_nothing(mmhal, loaded):
    scored = score(mmhal, loaded, ["Rating:5"] * 48 + ["Rating: 6"] * 48)
    assert make.headline(scored) == pytest.approx(3.0)
    assert named(scored, "rate") == pytest.approx(0.5)


def test_questions_are_the_files_in_its_order(loaded):
    rows = make.mmhal_rows()
    assert [question.text for question in loaded.questions] == [row["question"] for row in rows]
    assert len({str(question.id) for question in loaded.questions}) == 96
    assert len({question.cluster for question in loaded.questions}) == 96


@pytest.mark.parametrize("replies", [None, {}], ids=["none", "empty"])
def test_replies_are_needed(mmhal, loaded, replies):
    with pytest.raises(BenchmarkError) as error:
        mmhal.score(loaded, {str(q.id): "So." for q in loaded.questions}, replies=replies)
    assert "\n" not in str(error.value)


def test_one_missing_reply_is_named(mmhal, loaded):
    some = {str(q.id): "Rating: 4" for q in loaded.questions}
    lost = str(loaded.questions[40].id)
    del some[lost]
    with pytest.raises(BenchmarkError, match=lost):
        mmhal.score(loaded, {str(q.id): "So." for q in loaded.questions}, replies=some)


def test_judge_sees_contents_question_and_both_answers(mmhal, loaded):
    said = {str(q.id): "So {question} it is." for q in loaded.questions}
    template = "C[{image_content}] Q[{question}] G[{gt_answer}] A[{model_answer}]"
    asked = mmhal.judge_requests(loaded, said, "official", {"mmhal": template})
    assert [request.id for request in asked] == [str(question.id) for question in loaded.questions]
    wanted = "C[Chair, Thing41] Q[What is there, number 41?] G[Thing 41.] A[So {question} it is.]"
    assert asked[41].prompt == wanted
    assert not any(request.image for request in asked)  # the judge reads words alone


def test_answers_are_written_into_the_official_list(mmhal, loaded, tmp_path):
    said = {str(q.id): f"Answer {number}." for number, q in enumerate(loaded.questions)}
    (path,) = mmhal.export(loaded, said, tmp_path / "out")
    wanted = [{**row, "model_answer": f"Answer {number}."} for number, row in enumerate(make.mmhal_rows())]
    assert json.loads(path.read_text("utf-8")) == wanted
    make.comes_back(mmhal, loaded, said, tmp_path / "out")


def test_a_file_itself_is_taken(mmhal, tmp_path):
    path = make.dump(tmp_path / "mine.json", make.mmhal_rows())
    assert len(mmhal.load(path).questions) == 96


def test_a_missing_file_says_what_is_needed(mmhal, tmp_path):
    assert mmhal.required_files in make.refused(mmhal, tmp_path, str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[3]", "[]", "\xff"], ids=["cut off", "numbers", "no rows", "no text"])
def test_a_broken_file_is_named(mmhal, tmp_path, text):
    (tmp_path / "response_template.json").write_bytes(text.encode("latin1"))
    make.refused(mmhal, tmp_path, "response_template.json")


@pytest.mark.parametrize("lost", ["question", "gt_answer", "image_content", "question_type"])
def test_a_row_that_lacks_something_is_named(mmhal, tmp_path, lost):
    rows = make.mmhal_rows()
    del rows[17][lost]
    make.dump(tmp_path / "response_template.json", rows)
    make.refused(mmhal, tmp_path, "response_template.json", "17", lost)


def test_a_question_without_an_answer_is_not_judged_and_counts_as_zero(mmhal, loaded):
    scored = make.partial(mmhal, loaded, {"mmhal": "{question}"}, "Rating: 6")
    assert make.headline(scored) == pytest.approx(6 * 95 / 96)
