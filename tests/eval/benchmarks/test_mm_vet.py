"""MM-Vet: the grade that a reply begins with, means over questions by capability and by sets of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks import makers_free as make

CAPABILITIES = [["rec"], ["rec", "ocr"], ["ocr", "rec"], ["ocr", "math"], ["know", "rec", "gen"], ["ocr"]]

# Up to the first space, a number from 0 to 1; None: nothing that can be read, which is asked again upstream and ends as 0.
GRADES = {
    "0.5": 0.5,
    "1.0": 1.0,
    "1": 1.0,
    "0": 0.0,
    "0.0": 0.0,
    ".7": 0.7,
    "0.35": 0.35,
    "0.5\n": 0.5,
    "0.5 because it is half": 0.5,
    "0.5\nbecause": None,
    " 0.5": None,
    "": None,
    "Correctness: 0.5": None,
    "1.1": None,
    "-0.1": None,
    "5": None,
    "0.5.": None,
    "0.5|": None,
    "50%": None,
    "half": None,
    "nan": None,
}


@pytest.fixture(scope="module")
def vet():
    return find_benchmark("mm-vet")


@pytest.fixture(scope="module")
def loaded(vet, tmp_path_factory):
    return vet.load(make.mm_vet(tmp_path_factory.mktemp("vet"), CAPABILITIES))


def answers(loaded):
    return {str(q.id): f"Answer {number}." for number, q in enumerate(loaded.questions)}


PROMPTS = {"mm_vet": "few {question} | {answer} | {prediction} | "}


def score(vet, loaded, replies):
    """One reply a question, under the ids that the judge is asked with."""
    ids = [request.id for request in vet.judge_requests(loaded, answers(loaded), "official", PROMPTS)]
    first = [next(id for id in ids if id.split("#")[0] == str(question.id)) for question in loaded.questions]
    return vet.score(loaded, answers(loaded), replies=dict(zip(first, replies, strict=True)))


@pytest.mark.parametrize("reply", GRADES, ids=repr)
def test_reply_is_read_as_the_official_evaluator_does(vet, loaded, reply):
    grade = GRADES[reply]
    scored = score(vet, loaded, [reply, *["0.0"] * 5])
    assert make.headline(scored) == pytest.approx(100 * (grade or 0.0) / 6)
    assert scored.parsed_answers[0].unparsed == (grade is None)
    assert not any(reading.unparsed for reading in scored.parsed_answers[1:])


@pytest.mark.parametrize("seed", range(3))
def test_means_over_all_and_by_capability(vet, loaded, seed):
    grades = np.random.default_rng(seed).integers(0, 11, 6) / 10
    scored = score(vet, loaded, [f"{grade:.1f}" for grade in grades])
    assert make.headline(scored) == pytest.approx(100 * grades.mean())
    values = scored.values()
    for needed in ("rec", "ocr", "math", "know", "gen"):
        wanted = 100 * grades[[needed in all for all in CAPABILITIES]].mean()
        found = [number for name, number in values.items() if needed in name.split("/") and "integration" not in name]
        assert found, f"{needed} is not among {list(values)}"
        assert found[0] == pytest.approx(wanted)
    make.sound(loaded, scored)


def test_missing_answers_and_grades_are_not_the_same(vet, loaded):
    with pytest.raises(BenchmarkError) as error:
        vet.score(loaded, answers(loaded), replies={})
    assert "\n" not in str(error.value)
    with pytest.raises(BenchmarkError):
        vet.score(loaded, answers(loaded), replies=None)


def test_one_missing_reply_is_named(vet, loaded):
    ids = [request.id for request in vet.judge_requests(loaded, answers(loaded), "official", PROMPTS)]
    lost = str(loaded.questions[3].id)
    some = {id: "0.5" for id in ids if id.split("#")[0] != lost}
    with pytest.raises(BenchmarkError, match=lost):
        vet.score(loaded, answers(loaded), replies=some)


def test_several_runs_are_averaged(vet, loaded):
    """Up to five runs of the judge; the total is the mean over them."""
    ids = [str(question.id) for question in loaded.questions]
    replies = {f"{id}#{run}": f"0.{run}" for id in ids for run in range(1, 6)}
    replies |= dict.fromkeys(ids, "0.0")
    scored = vet.score(loaded, answers(loaded), replies=replies)
    wanted = {
        np.mean([0.0, 0.1, 0.2, 0.3, 0.4]),
        np.mean([0.1, 0.2, 0.3, 0.4, 0.5]),
        np.mean([0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    }
    assert any(math.isclose(make.headline(scored), 100 * mean) for mean in wanted)


def test_judge_sees_question_truth_and_answer(vet, loaded):
    said = answers(loaded)
    said[str(loaded.questions[1].id)] = "Both {answer} | {nothing}."
    asked = vet.judge_requests(loaded, said, "official", PROMPTS)
    first = {request.id.split("#")[0]: request for request in reversed(asked)}
    # Marks of parts stand between spaces.
    zero = first[str(loaded.questions[0].id)].prompt
    assert zero == "few What is x in number 0? | -1 <AND> -5 <OR> 0 | Answer 0. | "
    assert "| Both {answer} | {nothing}. |" in first[str(loaded.questions[1].id)].prompt
    assert not any(request.image for request in asked)


def test_questions_are_bare(loaded):
    assert [question.text for question in loaded.questions] == [f"What is x in number {n}?" for n in range(6)]
    assert len({question.cluster for question in loaded.questions}) == 6
    assert loaded.read_image(loaded.questions[2].image) == make.PICTURE


@pytest.mark.parametrize("prefix", ["", "v1_"], ids=["LLaVA's number", "MM-Vet's name"])
def test_rows_of_either_form_find_their_question(vet, loaded, prefix):
    """LLaVA's answer file numbers the questions; MM-Vet's own names are v1_ and that number."""
    ids = {str(question.id) for question in loaded.questions}
    for number in range(6):
        row = {"question_id": f"{prefix}{number}" if prefix else number, "text": "So."}
        assert vet.match_question(row, loaded) in ids
    assert len({vet.match_question({"question_id": f"{prefix}{n}"}, loaded) for n in range(6)}) == 6


def test_answers_are_written_by_their_official_names(vet, loaded, tmp_path):
    (path,) = vet.export(loaded, answers(loaded), tmp_path / "out")
    assert json.loads(path.read_text("utf-8")) == {f"v1_{number}": f"Answer {number}." for number in range(6)}


def test_a_missing_file_says_what_is_needed(vet, tmp_path):
    assert vet.required_files in make.refused(vet, tmp_path, "mm-vet.json")


@pytest.mark.parametrize("text", ["{", "3", "[]", "{}", "\xff"], ids=["cut off", "number", "list", "empty", "no text"])
def test_a_broken_file_is_named(vet, tmp_path, text):
    (tmp_path / "mm-vet.json").write_bytes(text.encode("latin1"))
    make.refused(vet, tmp_path, "mm-vet.json")


@pytest.mark.parametrize("lost", ["question", "answer", "capability", "imagename"])
def test_a_row_that_lacks_something_is_named(vet, tmp_path, lost):
    folder = make.mm_vet(tmp_path, CAPABILITIES)
    rows = json.loads((folder / "mm-vet.json").read_text())
    del rows["v1_3"][lost]
    make.dump(folder / "mm-vet.json", rows)
    make.refused(vet, folder, "mm-vet.json", "v1_3", lost)


def test_a_question_without_an_answer_is_not_judged_and_counts_as_zero(vet, loaded):
    assert make.headline(make.partial(vet, loaded, PROMPTS, "1.0")) == pytest.approx(100 * 5 / 6)
