"""LLaVA-Bench: the pair of numbers on a reply's first line, and the ratio of means by the official arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks import makers_free as make

FAILED = (-1.0, -1.0)

# First line, commas to spaces, split at each space: two numbers or nothing.
PAIRS = {
    "8 7": (8, 7),
    "8 7\nBecause it is so: 9 1": (8, 7),
    "8.5 7": (8.5, 7),
    "8,7": (8, 7),
    "10 10": (10, 10),
    "8 7.": (8, 7),
    "8 7\r\nBecause": (8, 7),
    "8, 7": FAILED,
    "8 7 ": FAILED,
    " 8 7": FAILED,
    "8  7": FAILED,
    "\n8 7": FAILED,
    "8\t7": FAILED,
    "8/10 7/10": FAILED,
    "8": FAILED,
    "8 7 6": FAILED,
    "8 and 7": FAILED,
    "eight seven": FAILED,
    "Scores: 8 7": FAILED,
    "**8 7**": FAILED,
    "[8 7]": FAILED,
    "Assistant 1: 8 Assistant 2: 7": FAILED,
    "Assistant 1: 8\nAssistant 2: 7": FAILED,
    "": FAILED,
}


@pytest.fixture(scope="module")
def wild():
    return find_benchmark("llava-bench")


@pytest.fixture(scope="module")
def loaded(wild, tmp_path_factory):
    return wild.load(make.llava_bench(tmp_path_factory.mktemp("wild")))


def score(bench, loaded, replies, **more):
    answers = {str(q.id): "Well." for q in loaded.questions}
    return bench.score(loaded, answers, replies=make.by_question(loaded, replies), **more)


def relative(pairs) -> float:
    """Means rounded to three decimals, their ratio in percent."""
    ours, theirs = (round(float(np.mean([pair[side] for pair in pairs])), 3) for side in (1, 0))
    return ours / theirs * 100


def read(bench, loaded, reply: str) -> tuple[float, float]:
    """The pair that a reply is read as, from the numbers of a whole run: beside it stand five of 20 and 20.

    Two runs with other companions give the sum of either side.
    """
    one = make.headline(score(bench, loaded, [reply, *["20 20"] * 5])) / 100
    two = make.headline(score(bench, loaded, [reply, *["20 40"] * 5])) / 100
    # one = (y + 100) / (x + 100), two = (y + 200) / (x + 100)
    x = 100 / (two - one) - 100
    return x, one * (x + 100) - 100


@pytest.mark.parametrize("reply", PAIRS, ids=repr)
def test_first_line_is_read_as_llava_does(wild, loaded, reply):
    assert read(wild, loaded, reply) == pytest.approx(PAIRS[reply], abs=0.05)  # the means are rounded
    reading = score(wild, loaded, [reply, *["8 8"] * 5]).parsed_answers[0]
    assert reading.unparsed == (PAIRS[reply] == FAILED)


@pytest.mark.parametrize("seed", range(4))
def test_ratio_of_means(wild, loaded, seed):
    pairs = np.random.default_rng(seed).integers(1, 11, (6, 2)).tolist()
    scored = score(wild, loaded, [f"{x} {y}\nSo." for x, y in pairs])
    kinds = [question.metadata["category"] for question in loaded.questions]
    kinds = [kind.removeprefix("llava_bench_") for kind in kinds]
    assert round(make.headline(scored), 1) == round(relative(pairs), 1)
    for kind in ("conv", "detail", "complex"):
        wanted = relative([pair for pair, its in zip(pairs, kinds, strict=True) if its == kind])
        assert round(make.value(scored, f"llava_bench_{kind}", kind), 1) == round(wanted, 1)
    make.sound(loaded, scored)


def test_both_columns_are_shown(wild, loaded):
    """LLaVA prints both means times ten beside their ratio."""
    scored = score(wild, loaded, ["8 6"] * 6)
    shown = [round(number, 6) for number in scored.values().values()]
    assert make.headline(scored) == pytest.approx(75)
    assert {80.0, 60.0} <= set(shown) or {8.0, 6.0} <= set(shown)


def test_failed_replies_are_averaged_in(wild, loaded):
    replies = ["8 6"] * 4 + ["8, 6"] * 2
    wanted = relative([(8, 6)] * 4 + [FAILED] * 2)
    assert wanted == pytest.approx(100 * 3.667 / 5)
    assert make.headline(score(wild, loaded, replies)) == pytest.approx(wanted, abs=0.01)


def test_a_run_in_which_every_reply_failed(wild, loaded):
    """-1 over -1; upstream says 100, and so the number of failed replies must stand beside it."""
    scored = score(wild, loaded, ["no"] * 6)
    assert make.headline(scored) == pytest.approx(100)
    assert all(reading.unparsed for reading in scored.parsed_answers)


def test_nothing_to_divide_by(wild, loaded):
    assert math.isfinite(make.headline(score(wild, loaded, ["1 5", "no"] * 3)))


def test_means_are_rounded_before_they_are_divided(wild, tmp_path):
    """Three questions with a case in which the shown decimal tells."""
    loaded = wild.load(make.llava_bench(tmp_path, {"conv": 7}))
    rng = np.random.default_rng(0)
    for _ in range(20000):
        pairs = rng.integers(1, 11, (7, 2))
        exact = pairs[:, 1].sum() / pairs[:, 0].sum() * 100
        if round(relative(pairs), 1) != round(exact, 1):
            break
    else:
        pytest.skip("no such case")
    scored = score(wild, loaded, [f"{x} {y}" for x, y in pairs])
    assert round(make.headline(scored), 1) == round(relative(pairs), 1)


def test_lmms_eval_takes_the_first_two_numbers(wild, loaded):
    if "lmms-eval" not in wild.rules:
        pytest.skip("no such rule here")
    for reply, pair in (("8, 7", (8, 7)), ("Assistant 1: 8 Assistant 2: 7", (1, 8)), ("8/10 7/10", (8, 10))):
        scored = score(wild, loaded, [reply] * 6, rule="lmms-eval")
        assert make.headline(scored) == pytest.approx(100 * pair[1] / pair[0], abs=0.1), reply


def test_questions_are_bare(loaded):
    assert [question.text for question in loaded.questions] == [f"Question {number}?" for number in range(6)]
    assert [str(question.id) for question in loaded.questions] == [str(number) for number in range(6)]
    assert [question.image for question in loaded.questions] == ["001.jpg"] * 2 + ["002.jpg"] * 2 + ["003.jpg"] * 2
    assert len({question.cluster for question in loaded.questions}) == 3


def test_pictures_are_found(loaded):
    assert loaded.read_image("002.jpg") == make.PICTURE


TEMPLATE = "C[{context}] Q[{question}] R[{reference}] A[{answer}]"


def prompts() -> dict[str, str]:
    return {f"llava_bench_{kind}": f"{kind} {TEMPLATE}" for kind in ("conv", "detail", "complex", "coco")}


def test_judge_sees_context_question_reference_and_answer(wild, loaded):
    said = make.by_question(loaded, [f"Answer {number}." for number in range(6)])
    said["3"] = "It has {question} and {nothing} in it."
    asked = wild.judge_requests(loaded, said, "official", prompts())
    assert [request.id for request in asked] == [str(number) for number in range(6)]
    assert asked[0].prompt == "conv C[Seen in 001.jpg.] Q[Question 0?] R[Reference 0.] A[Answer 0.]"
    assert asked[3].prompt == f"detail C[Seen in 002.jpg.] Q[Question 3?] R[Reference 3.] A[{said['3']}]"
    assert asked[5].prompt.startswith("complex C[Seen in 003.jpg.]")
    assert not any(request.image for request in asked)


def test_references_are_joined_by_id(wild, tmp_path):
    folder = make.llava_bench(tmp_path)
    path = folder / "answers_gpt4.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    make.lines(path, rows[::-1])
    loaded = wild.load(folder)
    asked = wild.judge_requests(loaded, {str(q.id): "So." for q in loaded.questions}, "official", prompts())
    assert "R[Reference 4.]" in asked[4].prompt


@pytest.mark.parametrize("replies", [None, {}, {"0": "8 7"}], ids=["none", "empty", "one"])
def test_replies_are_needed(wild, loaded, replies):
    with pytest.raises(BenchmarkError) as error:
        wild.score(loaded, {str(q.id): "So." for q in loaded.questions}, replies=replies)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"])
def test_a_missing_file_is_named(wild, tmp_path, lost):
    folder = make.llava_bench(tmp_path)
    (folder / lost).unlink()
    make.refused(wild, folder, lost.split("_")[0].split(".")[0])


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("questions.jsonl", "question_id"),
        ("questions.jsonl", "image"),
        ("questions.jsonl", "text"),
        ("questions.jsonl", "category"),
        ("context.jsonl", "caption"),
        ("context.jsonl", "image"),
        ("answers_gpt4.jsonl", "text"),
        ("answers_gpt4.jsonl", "question_id"),
    ],
)
def test_a_row_that_lacks_something_is_named(wild, tmp_path, name, lost):
    folder = make.llava_bench(tmp_path)
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    del rows[1][lost]
    make.lines(folder / name, rows)
    make.refused(wild, folder, name, "1", lost)


def test_a_repeated_question_is_refused(wild, tmp_path):
    folder = make.llava_bench(tmp_path)
    path = folder / "questions.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[2] + "\n")
    make.refused(wild, folder, "questions.jsonl", "2", "twice")


def test_a_picture_without_context_is_refused(wild, tmp_path):
    folder = make.llava_bench(tmp_path)
    path = folder / "context.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    make.refused(wild, folder, "003.jpg")


def test_a_question_without_reference_is_refused(wild, tmp_path):
    folder = make.llava_bench(tmp_path)
    path = folder / "answers_gpt4.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + "\n")
    make.refused(wild, folder, "5")


def test_a_question_without_an_answer_is_not_judged_and_counts_as_failed(wild, loaded):
    scored = make.partial(wild, loaded, prompts(), "8 6")
    assert make.headline(scored) == pytest.approx(relative([(8, 6)] * 5 + [FAILED]), abs=0.01)


def test_answer_file_in_llavas_form(wild, loaded, tmp_path):
    make.comes_back(wild, loaded, {str(q.id): f"Answer {q.id}." for q in loaded.questions}, tmp_path)


# The other one: 90 questions about COCO, captions and boxes as context; failed replies are left out.


def coco_files(folder):
    rows = [
        {"question_id": number, "image": f"{number // 3:012d}.jpg", "text": f"Question {number}?", "category": kind}
        for number, kind in enumerate(["conv", "detail", "complex"] * 2)
    ]
    make.lines(folder / "qa90_questions.jsonl", rows)
    make.lines(
        folder / "caps_boxes_coco2014_val_80.jsonl",
        [
            {
                "id": f"{number:012d}",
                "image": f"{number:012d}.jpg",
                "captions": ["A dog.", "A brown dog."],
                "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}],
            }
            for number in range(2)
        ],
    )
    told = [{"question_id": number, "text": f"Reference {number}.", "answer_id": f"a{number}"} for number in range(6)]
    make.lines(folder / "qa90_gpt4_answer.jsonl", told)
    return folder


@pytest.fixture(scope="module")
def other():
    return find_benchmark("llava-bench-coco")


@pytest.fixture(scope="module")
def coco(other, tmp_path_factory):
    return other.load(coco_files(tmp_path_factory.mktemp("coco")))


def test_coco_leaves_failed_replies_out(other, coco):
    pairs = [(8, 6), FAILED, (8, 8), (4, 6), FAILED, (2, 2)]
    scored = score(other, coco, ["no" if pair == FAILED else f"{pair[0]} {pair[1]}" for pair in pairs])
    assert make.headline(scored) == pytest.approx(relative([pair for pair in pairs if pair != FAILED]), abs=0.01)
    assert [reading.unparsed for reading in scored.parsed_answers] == [pair == FAILED for pair in pairs]
    make.sound(coco, scored)


def test_coco_without_one_reply_that_can_be_read(other, coco):
    assert make.headline(score(other, coco, ["no"] * 6)) == 0


def test_coco_judge_sees_captions_and_boxes(other, coco):
    asked = other.judge_requests(coco, {str(q.id): "So." for q in coco.questions}, "official", prompts())
    assert len(asked) == 6
    assert "C[A dog.\nA brown dog.\n\ndog: [0.1, 0.2, 0.3, 0.4]]" in asked[4].prompt
    assert "R[Reference 4.]" in asked[4].prompt
