"""LLaVA-Bench: the pair of numbers on a reply's first line, and the ratio of means by the official arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.llava_bench import FAILED, first_two, scores
from tests.eval.benchmarks.makers import IMAGE, llava_bench, llava_bench_coco, write_lines
from tests.eval.benchmarks.samples import answer_all, by_answer, check, headline, load, value

KINDS = ("conv", "detail", "complex")

# LLaVA: the first line, commas to spaces, split at each space: two numbers or nothing. lmms-eval: the first two numbers.
PAIRS = by_answer(
    {
        ((8, 7), (8, 7)): ["8 7", "8 7\nBecause it is so: 9 1", "8,7", "8 7.", "8 7\r\nBecause"],
        ((8.5, 7), (8.5, 7)): ["8.5 7"],
        ((10, 10), (10, 10)): ["10 10"],
        (FAILED, (8, 7)): [
            *("8, 7", "8 7 ", " 8 7", "8  7", "\n8 7", "8\t7", "8 7 6", "8 and 7", "Scores: 8 7", "**8 7**"),
            "[8 7]",
        ],
        (FAILED, (8, 10)): ["8/10 7/10"],
        (FAILED, FAILED): ["8", "eight seven", ""],
        (FAILED, (1, 8)): ["Assistant 1: 8 Assistant 2: 7", "Assistant 1: 8\nAssistant 2: 7"],
    }
)


def test_first_line_is_parsed_as_llava_and_as_lmms_eval():
    assert {reply: (scores(reply), first_two(reply)) for reply in PAIRS} == PAIRS
    assert scores("8 inf") == FAILED


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("llava-bench", llava_bench(tmp_path_factory.mktemp("wild")))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return load("llava-bench-coco", llava_bench_coco(tmp_path_factory.mktemp("coco")))


def score(sample, replies, rule: str = "official"):
    bench, loaded = sample
    return check(bench, loaded, answer_all(loaded, "Well."), rule, replies=answer_all(loaded, replies))


def relative(pairs) -> float:
    """Return the ratio of the means, rounded to three decimals, in percent."""
    ours, theirs = (round(float(np.mean([pair[side] for pair in pairs])), 3) for side in (1, 0))
    return ours / theirs * 100


@pytest.mark.parametrize("seed", range(3))
def test_ratio_of_means(sample, seed):
    pairs = np.random.default_rng(seed).integers(1, 11, (6, 2)).tolist()
    replies = [f"{x} {y}\nSo." for x, y in pairs]
    scored, other = score(sample, replies), score(sample, replies, "lmms-eval")
    assert headline(scored) == value(scored, "all") == pytest.approx(relative(pairs))
    assert headline(other) == value(other, "gpt_eval_llava_all") == pytest.approx(relative(pairs))
    kinds = [question.metadata["category"] for question in sample[1].questions]
    for kind in KINDS:
        expected = relative([pair for pair, other_kind in zip(pairs, kinds, strict=True) if other_kind == kind])
        assert value(scored, f"llava_bench_{kind}") == pytest.approx(expected)
        assert value(other, f"gpt_eval_llava_{kind}") == pytest.approx(expected)


def test_both_means_are_shown_times_ten(sample):
    scored = score(sample, ["8 6"] * 6)
    assert [value(scored, name) for name in ("all", "all/reference", "all/model")] == pytest.approx([75, 80, 60])


def test_failed_replies_are_averaged_in(sample):
    scored = score(sample, ["8 6"] * 4 + ["8, 6"] * 2)
    assert headline(scored) == pytest.approx(relative([(8, 6)] * 4 + [FAILED] * 2))
    assert headline(scored) == pytest.approx(100 * 3.667 / 5)
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [False] * 4 + [True] * 2
    # -1 over -1 is 100, as officially: the number of failed replies must be shown beside it.
    assert headline(score(sample, ["no"] * 6)) == pytest.approx(100)
    assert math.isfinite(headline(score(sample, ["1 5", "no"] * 3)))  # the mean of the reference is 0


def test_means_are_rounded_before_they_are_divided(tmp_path):
    bench, loaded = load("llava-bench", llava_bench(tmp_path, {"conv": 7}))
    rng = np.random.default_rng(0)
    pairs = next(
        pairs
        for pairs in (rng.integers(1, 11, (7, 2)) for _ in range(20000))
        if round(relative(pairs), 1) != round(pairs[:, 1].sum() / pairs[:, 0].sum() * 100, 1)
    )
    scored = score((bench, loaded), [f"{x} {y}" for x, y in pairs])
    assert round(headline(scored), 1) == round(relative(pairs), 1)


def test_missing_answer_counts_as_failed(sample):
    bench, loaded = sample
    answers = dict(list(answer_all(loaded, "Well.").items())[1:])
    scored = bench.score(loaded, answers, replies=answer_all(loaded, "8 6"))
    assert headline(scored) == pytest.approx(relative([(8, 6)] * 5 + [FAILED]))


def test_questions_are_bare(sample):
    _, loaded = sample
    assert [question.text for question in loaded.questions] == [f"Question {number}?" for number in range(6)]
    assert [question.image for question in loaded.questions] == ["001.jpg"] * 2 + ["002.jpg"] * 2 + ["003.jpg"] * 2
    assert len(loaded.clusters) == 3
    assert loaded.read_image("002.jpg") == IMAGE


TEMPLATES = {
    f"llava_bench_{kind}": f"{kind} C[{{context}}] Q[{{question}}] R[{{reference}}] A[{{answer}}]"
    for kind in (*KINDS, "coco")
}


def test_judge_reads_context_question_reference_and_answer(sample, tmp_path):
    bench, loaded = sample
    answers = answer_all(
        loaded, [f"Answer {number}." for number in range(5)] + ["It has {question} and {nothing} in it."]
    )
    prompts = [request.prompt for request in bench.judge_requests(loaded, answers, "official", TEMPLATES)]
    assert prompts[0] == "conv C[Seen in 001.jpg.] Q[Question 0?] R[Reference 0.] A[Answer 0.]"
    assert prompts[3] == "detail C[Seen in 002.jpg.] Q[Question 3?] R[Reference 3.] A[Answer 3.]"
    assert prompts[5] == f"complex C[Seen in 003.jpg.] Q[Question 5?] R[Reference 5.] A[{answers['5']}]"
    path = llava_bench(tmp_path) / "answers_gpt4.jsonl"  # references are joined by id
    write_lines(path, [json.loads(line) for line in path.read_text().splitlines()][::-1])
    again = bench.judge_requests(bench.load(tmp_path), answers, "official", TEMPLATES)
    assert [request.prompt for request in again] == prompts


@pytest.mark.parametrize(("file", "kept", "named"), [("context.jsonl", 2, "003.jpg"), ("answers_gpt4.jsonl", 5, "5")])
def test_missing_context_or_reference_is_named(tmp_path, file, kept, named):
    path = llava_bench(tmp_path) / file
    path.write_text("\n".join(path.read_text().splitlines()[:kept]) + "\n")
    with pytest.raises(BenchmarkError, match=named):
        load("llava-bench", tmp_path)


def test_coco_leaves_failed_replies_out(coco):
    pairs = [(8, 6), FAILED, (8, 8), (4, 6), FAILED, (2, 2)]
    scored = score(coco, ["no" if pair == FAILED else f"{pair[0]} {pair[1]}" for pair in pairs])
    assert headline(scored) == pytest.approx(relative([pair for pair in pairs if pair != FAILED]))
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [pair == FAILED for pair in pairs]
    assert headline(score(coco, ["no"] * 6)) == 0


def test_coco_judge_reads_captions_and_boxes(coco):
    bench, loaded = coco
    requests = bench.judge_requests(loaded, answer_all(loaded, "So."), "official", TEMPLATES)
    assert "C[A dog.\nA brown dog.\n\ndog: [0.1, 0.2, 0.3, 0.4]] Q[Question 4?] R[Reference 4.]" in requests[4].prompt
    assert all(request.prompt.startswith("coco ") for request in requests)
