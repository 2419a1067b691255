"""MM-Vet: the grade at the start of a reply, means over questions by capability and by sets of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.mm_vet import MmVet, grade
from tests.eval.benchmarks.makers import mm_vet, prompts
from tests.eval.benchmarks.samples import answer_all, check, headline, ids, load, value

CAPABILITIES = [["rec"], ["rec", "ocr"], ["ocr", "rec"], ["ocr", "math"], ["know", "rec", "gen"], ["ocr"]]

# Up to the first space, a number from 0 to 1. The official script asks again for anything else, and then takes 0.
GRADES = {
    **{"0.5": 0.5, "1.0": 1.0, "1": 1.0, "0": 0.0, "0.0": 0.0, ".7": 0.7, "0.35": 0.35, "0.5\n": 0.5},
    "0.5 because it is half": 0.5,
    **dict.fromkeys(("0.5\nbecause", " 0.5", "", "Correctness: 0.5", "1.1", "-0.1", "5", "0.5.", "0.5|", "50%")),
    **dict.fromkeys(("half", "nan")),
}


def test_replies_are_parsed_as_the_official_evaluator_does():
    assert {reply: grade(reply) for reply in GRADES} == GRADES


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("mm-vet", mm_vet(tmp_path_factory.mktemp("vet"), CAPABILITIES))


def score(sample, replies):
    bench, loaded = sample
    return check(bench, loaded, answer_all(loaded, "So."), replies=answer_all(loaded, replies))


@pytest.mark.parametrize("seed", range(2))
def test_means_over_all_and_by_capability(sample, seed):
    grades = np.random.default_rng(seed).integers(0, 11, 6) / 10
    values = score(sample, [f"{grade:.1f}" for grade in grades]).values()
    assert next(iter(values.values())) == values["total"] == pytest.approx(100 * grades.mean())
    for name in ("rec", "ocr", "math", "know", "gen"):
        expected = 100 * grades[[name in needed for needed in CAPABILITIES]].mean()
        assert values[f"capability/{name}"] == pytest.approx(expected)
    assert values["integration/rec_ocr"] == pytest.approx(100 * grades[[1, 2]].mean())
    assert values["integration/rec_know_gen"] == pytest.approx(100 * grades[4])


def test_reply_without_a_grade_is_zero(sample):
    scored = score(sample, ["half", *["0.6"] * 5])
    assert headline(scored) == pytest.approx(50)
    assert [(parsed.parsed, parsed.unparsed) for parsed in scored.parsed_answers] == [("?", True)] + [
        ("0.6", False)
    ] * 5


def test_several_runs_are_averaged(sample):
    """The total is the mean over up to five runs; a reply without a number is that of run 0."""
    _, loaded = sample
    replies = {f"{id}#{run}": f"0.{run}" for id in ids(loaded) for run in range(1, 5)} | answer_all(loaded, "0.0")
    scored = check(sample[0], loaded, answer_all(loaded, "So."), replies=replies)
    assert headline(scored) == pytest.approx(20)
    assert value(scored, "std") == pytest.approx(100 * np.std([0, 0.1, 0.2, 0.3, 0.4]))
    assert [value(scored, f"run {run}/total") for run in range(5)] == pytest.approx([0, 10, 20, 30, 40])
    del replies[f"{ids(loaded)[2]}#3"]
    with pytest.raises(BenchmarkError, match=r"v1_2#3"):
        sample[0].score(loaded, answer_all(loaded, "So."), replies=replies)


def test_judge_reads_question_truth_and_answer(sample):
    bench, loaded = sample
    answers = answer_all(loaded, [f"Answer {n}." for n in range(5)] + ["Both {answer} | {nothing}."])
    template = {"mm_vet": "few {question} | {answer} | {prediction} | \n"}
    requests = bench.judge_requests(loaded, answers, "official", template)
    assert requests[0].id == "v1_0#0"
    # Spaces are added around the marks of parts.
    assert requests[0].prompt == "few What is x in number 0? | -1 <AND> -5 <OR> 0 | Answer 0. | "
    assert "| Both {answer} | {nothing}. |" in requests[5].prompt
    repeated = bench.with_repeats(2).judge_requests(loaded, answers, "official", prompts())
    assert [request.id for request in repeated[:3]] == ["v1_0#0", "v1_0#1", "v1_1#0"]
    with pytest.raises(ValueError, match="6"):
        MmVet(6)


@pytest.mark.parametrize("form", [0, "0", "v1_0"])
def test_rows_of_llava_and_of_mm_vet_are_matched(sample, form):
    bench, loaded = sample
    assert bench.match_question({"question_id": form, "text": "So."}, loaded) == "v1_0"
    assert [question.text for question in loaded.questions] == [f"What is x in number {n}?" for n in range(6)]


def test_answers_are_written_by_their_official_ids(sample, tmp_path):
    bench, loaded = sample
    (path,) = bench.export(loaded, answer_all(loaded, [f"Answer {n}." for n in range(6)]), tmp_path)
    assert json.loads(path.read_text("utf-8")) == {f"v1_{number}": f"Answer {number}." for number in range(6)}
