"""MMHal-Bench: the judge's rating by the official search, means and rates by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.mmhal import TYPES, rating
from tests.eval.benchmarks.makers import mmhal_rows, write_json
from tests.eval.benchmarks.samples import answer_all, check, headline, load, value

# Exactly one of "rating: 0" to "rating: 6" must be in the reply.
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
    "Rating: 5/6": 5,
    "Rating: 3\nRating: 30": 3,
    **dict.fromkeys(("Rating:5", "Rating: [4]", "Rating:  4", "Rating:\n4", "**Rating:** 4", "Rating is 4", "5", "")),
    **dict.fromkeys(("Score: 5", "Rating: 7", "Rating: -1", "Rating: five", "Rating: 2 or Rating: 5")),
    "Rating: 5 then rating: 3": None,
}


def test_replies_are_parsed_by_the_official_search():
    assert {reply: rating(reply) for reply in RATINGS} == RATINGS


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmhal")
    write_json(folder / "mine.json", mmhal_rows())
    return load("mmhal", folder / "mine.json")


def score(sample, replies):
    bench, loaded = sample
    return check(bench, loaded, answer_all(loaded, "So."), replies=answer_all(loaded, replies))


@pytest.mark.parametrize("seed", range(2))
def test_means_and_rates_by_hand(sample, seed):
    scores = np.random.default_rng(seed).integers(0, 7, 96)
    values = score(sample, [f"Why.\nRating: {number}, so" for number in scores]).values()
    informative = np.where(scores >= 3, scores - 3, scores)
    assert list(values)[:3] == ["score", "hallucination_rate", "informativeness"]
    assert values["score"] == pytest.approx(scores.mean())
    assert values["hallucination_rate"] == pytest.approx((scores < 3).mean())
    assert values["informativeness"] == pytest.approx(informative.mean() / 3 * 100)
    for number, kind in enumerate(TYPES):
        assert values[f"{kind}/score"] == pytest.approx(scores[number::8].mean())
        assert values[f"{kind}/hallucination_rate"] == pytest.approx((scores[number::8] < 3).mean())


def test_replies_without_a_rating_are_rated_zero(sample):
    scored = score(sample, ["Rating:5"] * 48 + ["Rating: 6"] * 48)
    assert (headline(scored), value(scored, "hallucination_rate")) == (3.0, 0.5)
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [True] * 48 + [False] * 48
    bench, loaded = sample
    names = [bench.hallucinated(loaded, q, "", p) for q, p in zip(loaded.questions, scored.parsed_answers, strict=True)]
    assert not any(names)


def test_judge_reads_contents_question_and_both_answers(sample):
    bench, loaded = sample
    template = "C[{image_content}] Q[{question}] G[{gt_answer}] A[{model_answer}]"
    answers = answer_all(loaded, "So {question} it is.")
    requests = bench.judge_requests(loaded, answers, "official", {"mmhal": template})
    expected = "C[Chair, Thing41] Q[What is there, number 41?] G[Thing 41.] A[So {question} it is.]"
    assert requests[41].prompt == expected
    assert [question.text for question in loaded.questions] == [row["question"] for row in mmhal_rows()]


def test_answers_are_written_into_the_official_list(sample, tmp_path):
    bench, loaded = sample
    texts = [f"Answer {number}." for number in range(96)]
    (path,) = bench.export(loaded, answer_all(loaded, texts), tmp_path)
    rows = [{**row, "model_answer": text} for row, text in zip(mmhal_rows(), texts, strict=True)]
    assert json.loads(path.read_text("utf-8")) == rows
    with pytest.raises(LookupError):
        bench.match_question({**rows[0], "question": "Another?"}, loaded)
    assert bench.match_question({"model_answer": "x"}, loaded) is None


def test_images_may_be_named_by_id(tmp_path):
    write_json(tmp_path / "response_template.json", mmhal_rows())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{1:016x}.jpg").write_bytes(b"by id")
    (tmp_path / "2_o.jpg").write_bytes(b"by name")
    _, loaded = load("mmhal", tmp_path)
    assert [loaded.read_image(loaded.questions[n].image) for n in (1, 2)] == [b"by id", b"by name"]
    with pytest.raises(BenchmarkError, match=r"3_o\.jpg"):
        loaded.read_image(loaded.questions[3].image)
