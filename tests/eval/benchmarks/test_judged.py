"""Benchmarks that a judge rates: what it reads, and means of what it replies (MMHal, MM-Vet, GAVIE, LLaVA-Bench).

Replies are parsed in `test_rules.py`.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from reverie_jax.eval.benchmarks.gavie import regions
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.llava_bench import FAILED
from reverie_jax.eval.benchmarks.mm_vet import MmVet
from reverie_jax.eval.benchmarks.mmhal import TYPES
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import answer_all, check, headline, ids, load, value
from tests.eval.benchmarks.test_rules import gavie_reply

CAPABILITIES = [["rec"], ["rec", "ocr"], ["ocr", "rec"], ["ocr", "math"], ["know", "rec", "gen"], ["ocr"]]
KINDS = ("conv", "detail", "complex")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Each benchmark with its questions, by name."""
    root = tmp_path_factory.mktemp("judged")
    return {
        "mmhal": load("mmhal", make.write_json(root / "mine.json", make.mmhal_rows())),
        "mm-vet": load("mm-vet", make.mm_vet(root / "mm-vet", CAPABILITIES)),
        "gavie": load("gavie", make.gavie(root / "gavie")),
        "llava-bench": load("llava-bench", make.llava_bench(root / "wild")),
        "llava-bench-coco": load("llava-bench-coco", make.llava_bench_coco(root / "coco")),
    }


def score(sample, replies, rule: str = "official"):
    bench, loaded = sample
    return check(bench, loaded, answer_all(loaded, "So."), rule, replies=answer_all(loaded, replies))


TEMPLATES = {
    "mmhal": "C[{image_content}] Q[{question}] G[{gt_answer}] A[{model_answer}]",
    "mm_vet": "few {question} | {answer} | {prediction} | \n",
    "gavie": "R[{regions}] Q[{question}] A[{answer}]",
    **{
        f"llava_bench_{k}": f"{k} C[{{context}}] Q[{{question}}] R[{{reference}}] A[{{answer}}]"
        for k in (*KINDS, "coco")
    },
}
# The braces of an answer are kept. MM-Vet's marks of parts get spaces. GAVIE's script writes the width as the height.
SKY = "a red kite X:11 Y:12 Width:13 Height:13\nthe sky X:0 Y:0 Width:400 Height:400"
PROMPTS = {
    ("mmhal", "41"): "C[Chair, Thing41] Q[What is there, number 41?] G[Thing 41.] A[Answer {question} 41.]",
    ("mm-vet", "v1_0#0"): "few What is x in number 0? | -1 <AND> -5 <OR> 0 | Answer {question} v1_0. | ",
    ("gavie", "0"): f"R[{SKY}] Q[What is at [11, 12]?] A[Answer {{question}} 0.]",
    ("gavie", "2"): "R[a man X:5 Y:6 Width:7 Height:7] Q[Who is it?] A[Answer {question} 2.]",
    ("llava-bench", "0"): "conv C[Seen in 001.jpg.] Q[Question 0?] R[Reference 0.] A[Answer {question} 0.]",
    ("llava-bench", "3"): "detail C[Seen in 002.jpg.] Q[Question 3?] R[Reference 3.] A[Answer {question} 3.]",
    ("llava-bench", "5"): "complex C[Seen in 003.jpg.] Q[Question 5?] R[Reference 5.] A[Answer {question} 5.]",
    (
        "llava-bench-coco",
        "4",
    ): "coco C[A dog.\nA brown dog.\n\ndog: [0.1, 0.2, 0.3, 0.4]] Q[Question 4?] R[Reference 4.] "
    "A[Answer {question} 4.]",
}


@pytest.mark.parametrize(("name", "id"), PROMPTS)
def test_judge_reads_what_the_official_script_fills_in(samples, name, id):
    bench, loaded = samples[name]
    answers = answer_all(loaded, lambda question: f"Answer {{question}} {question.id}.")
    requests = bench.judge_requests(loaded, answers, "official", TEMPLATES)
    assert [request.id.partition("#")[0] for request in requests] == ids(loaded)
    assert {request.id: request.prompt for request in requests}[id] == PROMPTS[name, id]


def test_questions_are_bare(samples):
    texts = {name: [question.text for question in loaded.questions] for name, (_, loaded) in samples.items()}
    assert texts["mmhal"] == [row["question"] for row in make.mmhal_rows()]
    assert texts["llava-bench"] == texts["llava-bench-coco"] == [f"Question {number}?" for number in range(6)]
    assert texts["mm-vet"] == [f"What is x in number {n}?" for n in range(6)]
    clusters = {name: [question.cluster for question in loaded.questions] for name, (_, loaded) in samples.items()}
    assert clusters["gavie"] == ["2331", "2331", "77", "77", "2331"]
    assert clusters["llava-bench"] == ["001.jpg"] * 2 + ["002.jpg"] * 2 + ["003.jpg"] * 2


# MMHal-Bench.


@pytest.mark.parametrize("seed", range(2))
def test_means_and_rates_by_hand(samples, seed):
    scores = np.random.default_rng(seed).integers(0, 7, 96)
    values = score(samples["mmhal"], [f"Why.\nRating: {number}, so" for number in scores]).values()
    informative = np.where(scores >= 3, scores - 3, scores)
    expected = {"score": scores.mean(), "hallucination_rate": (scores < 3).mean()}
    expected |= {"informativeness": informative.mean() / 3 * 100}
    for number, kind in enumerate(TYPES):
        expected[f"{kind}/score"] = scores[number::8].mean()
        expected[f"{kind}/hallucination_rate"] = (scores[number::8] < 3).mean()
    assert list(values) == list(expected)
    assert values == pytest.approx(expected)


def test_replies_without_a_rating_are_rated_zero(samples):
    bench, loaded = samples["mmhal"]
    scored = score((bench, loaded), ["Rating:5"] * 48 + ["Rating: 6"] * 48)
    assert (headline(scored), value(scored, "hallucination_rate")) == (3.0, 0.5)
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [True] * 48 + [False] * 48
    pairs = zip(loaded.questions, scored.parsed_answers, strict=True)
    assert not any(bench.hallucinated(loaded, question, "", parsed) for question, parsed in pairs)


def test_images_may_be_named_by_id(tmp_path):
    make.write_json(tmp_path / "response_template.json", make.mmhal_rows())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{1:016x}.jpg").write_bytes(b"by id")
    (tmp_path / "2_o.jpg").write_bytes(b"by name")
    _, loaded = load("mmhal", tmp_path)
    assert [loaded.read_image(loaded.questions[n].image) for n in (1, 2)] == [b"by id", b"by name"]
    with pytest.raises(BenchmarkError, match=r"3_o\.jpg"):
        loaded.read_image(loaded.questions[3].image)


def test_rows_without_an_id_are_matched_by_image_and_question(samples, tmp_path):
    """The official lists of MMHal and GAVIE have no ids."""
    bench, loaded = samples["mmhal"]
    row = make.mmhal_rows()[3]
    assert bench.match_question(row, loaded) == "3"
    assert bench.match_question({"model_answer": "x"}, loaded) is None
    with pytest.raises(LookupError):
        bench.match_question({**row, "question": "Another?"}, loaded)
    bench, loaded = samples["gavie"]
    for place, question in enumerate(loaded.questions):
        row = {"image_id": question.image.split(".")[0], "question": question.text, "answer": "So."}
        assert bench.match_question(row, loaded) == str(place)
    rows = json.loads((make.gavie(tmp_path) / "evaluation_set.json").read_text())
    rows = [{"image_id": int(row["image_id"]), "instruction": row["question"]} for row in [*rows, rows[0]]]
    make.write_json(tmp_path / "evaluation_set.json", rows)
    _, again = load("gavie", tmp_path)
    assert len(again.questions) == 6
    for other, row in ((loaded, {"image_id": 77, "question": "Who else?"}), (again, rows[0])):  # unknown; asked twice
        with pytest.raises(LookupError):
            bench.match_question(row, other)


# MM-Vet.


@pytest.mark.parametrize("seed", range(2))
def test_means_over_all_and_by_capability(samples, seed):
    grades = np.random.default_rng(seed).integers(0, 11, 6) / 10
    values = score(samples["mm-vet"], [f"{grade:.1f}" for grade in grades]).values()
    assert next(iter(values.values())) == values["total"] == pytest.approx(100 * grades.mean())
    for name in ("rec", "ocr", "math", "know", "gen"):
        expected = 100 * grades[[name in needed for needed in CAPABILITIES]].mean()
        assert values[f"capability/{name}"] == pytest.approx(expected)
    assert values["integration/rec_ocr"] == pytest.approx(100 * grades[[1, 2]].mean())
    assert values["integration/rec_know_gen"] == pytest.approx(100 * grades[4])


def test_reply_without_a_grade_is_zero(samples):
    scored = score(samples["mm-vet"], ["half", *["0.6"] * 5])
    assert headline(scored) == pytest.approx(50)
    assert [(p.parsed, p.unparsed) for p in scored.parsed_answers] == [("?", True)] + [("0.6", False)] * 5


def test_several_runs_are_averaged(samples):
    """The total is the mean over up to five runs; a reply without a number is that of run 0."""
    bench, loaded = samples["mm-vet"]
    answers = answer_all(loaded, "So.")
    replies = {f"{id}#{run}": f"0.{run}" for id in ids(loaded) for run in range(1, 5)} | answer_all(loaded, "0.0")
    scored = check(bench, loaded, answers, replies=replies)
    assert headline(scored) == pytest.approx(20)
    assert value(scored, "std") == pytest.approx(100 * np.std([0, 0.1, 0.2, 0.3, 0.4]))
    assert [value(scored, f"run {run}/total") for run in range(5)] == pytest.approx([0, 10, 20, 30, 40])
    del replies[f"{ids(loaded)[2]}#3"]
    with pytest.raises(BenchmarkError, match=r"v1_2#3"):
        bench.score(loaded, answers, replies=replies)
    repeated = bench.with_repeats(2).judge_requests(loaded, answers, "official", TEMPLATES)
    assert [request.id for request in repeated[:3]] == ["v1_0#0", "v1_0#1", "v1_1#0"]
    with pytest.raises(ValueError, match="6"):
        MmVet(6)
    for form in (0, "0", "v1_0"):  # LLaVA's ids, and MM-Vet's
        assert bench.match_question({"question_id": form, "text": "So."}, loaded) == "v1_0"


# GAVIE.


@pytest.mark.parametrize("seed", range(2))
def test_plain_means_over_questions(samples, seed):
    pairs = np.random.default_rng(seed).integers(0, 11, (5, 2))
    scored = score(samples["gavie"], [gavie_reply(*pair) for pair in pairs])
    assert (value(scored, "relevancy"), value(scored, "accuracy")) == pytest.approx(tuple(pairs.mean(0)))
    assert [parsed.right for parsed in scored.parsed_answers] == pytest.approx(list(pairs[:, 1] / 10))


def test_missing_scores_are_left_out_of_the_means(samples):
    bench, loaded = samples["gavie"]
    replies = [gavie_reply(8, 6), gavie_reply(4, "x"), "no", gavie_reply(0, 3), gavie_reply(8, 0)]
    scored = score((bench, loaded), replies)
    assert scored.values() == pytest.approx({"accuracy": 3, "relevancy": 5, "unread": 0.4})
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [False, True, True, False, False]
    answers = dict(list(answer_all(loaded, "So.").items())[1:])
    scored = bench.score(loaded, answers, replies=answer_all(loaded, gavie_reply(5, 10)))
    assert scored.values() == pytest.approx({"accuracy": 8, "relevancy": 4, "unread": 0})


def test_regions_are_needed_only_by_the_judge(samples, tmp_path):
    assert regions([{"caption": "a man", "bbox": [5, 6, 7, 8]}], slip=False).endswith("Width:7 Height:8")
    bench, folder = samples["gavie"][0], make.gavie(tmp_path)
    (folder / "vg_annotation.json").unlink()
    loaded = bench.load(folder)
    bench.score(loaded, answer_all(loaded, "So."), replies=answer_all(loaded, gavie_reply(1, 2)))
    with pytest.raises(BenchmarkError, match=r"vg_annotation\.json"):
        bench.judge_requests(loaded, answer_all(loaded, "So."), "official", TEMPLATES)


@pytest.mark.parametrize("region", [None, {"caption": "x"}, {"bbox": [1, 2, 3, 4]}, {"caption": "x", "bbox": [1, 2]}])
def test_missing_or_invalid_region_is_an_error(tmp_path, region):
    folder = make.gavie(tmp_path)
    content = json.loads((folder / "vg_annotation.json").read_text())
    content["77"] = [region]
    make.write_json(folder / "vg_annotation.json", content if region else {"2331": content["2331"]})
    with pytest.raises(BenchmarkError, match=r"vg_annotation\.json.*77"):
        load("gavie", folder)


# LLaVA-Bench.


def relative(pairs) -> float:
    """Return the ratio of the means, rounded to three decimals, in percent."""
    ours, theirs = (round(float(np.mean([pair[side] for pair in pairs])), 3) for side in (1, 0))
    return ours / theirs * 100


@pytest.mark.parametrize("seed", range(3))
def test_ratio_of_means(samples, seed):
    sample, pairs = samples["llava-bench"], np.random.default_rng(seed).integers(1, 11, (6, 2)).tolist()
    replies = [f"{x} {y}\nSo." for x, y in pairs]
    scored, other = score(sample, replies), score(sample, replies, "lmms-eval")
    assert headline(scored) == value(scored, "all") == pytest.approx(relative(pairs))
    assert headline(other) == value(other, "gpt_eval_llava_all") == pytest.approx(relative(pairs))
    for kind, places in zip(KINDS, ([0, 1], [2, 3], [4, 5]), strict=True):
        expected = relative([pairs[place] for place in places])
        assert value(scored, f"llava_bench_{kind}") == pytest.approx(expected)
        assert value(other, f"gpt_eval_llava_{kind}") == pytest.approx(expected)


def test_failed_replies_and_missing_answers_are_averaged_in(samples):
    bench, loaded = sample = samples["llava-bench"]
    scored = score(sample, ["8 6"] * 6)  # both means are shown times ten
    assert [value(scored, name) for name in ("all", "all/reference", "all/model")] == pytest.approx([75, 80, 60])
    scored = score(sample, ["8 6"] * 4 + ["8, 6"] * 2)
    assert headline(scored) == pytest.approx(relative([(8, 6)] * 4 + [FAILED] * 2)) == pytest.approx(100 * 3.667 / 5)
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [False] * 4 + [True] * 2
    # -1 over -1 is 100, as officially: the number of failed replies must be shown beside it.
    assert headline(score(sample, ["no"] * 6)) == pytest.approx(100)
    assert math.isfinite(headline(score(sample, ["1 5", "no"] * 3)))  # the mean of the reference is 0
    answers = dict(list(answer_all(loaded, "Well.").items())[1:])
    scored = bench.score(loaded, answers, replies=answer_all(loaded, "8 6"))
    assert headline(scored) == pytest.approx(relative([(8, 6)] * 5 + [FAILED]))


def test_means_are_rounded_before_they_are_divided(tmp_path):
    rng = np.random.default_rng(0)
    pairs = next(
        pairs
        for pairs in (rng.integers(1, 11, (7, 2)) for _ in range(20000))
        if round(relative(pairs), 1) != round(pairs[:, 1].sum() / pairs[:, 0].sum() * 100, 1)
    )
    sample = load("llava-bench", make.llava_bench(tmp_path, ["conv"] * 7))
    assert round(headline(score(sample, [f"{x} {y}" for x, y in pairs])), 1) == round(relative(pairs), 1)


def test_references_are_joined_by_id_and_a_missing_one_is_named(samples, tmp_path):
    bench, loaded = samples["llava-bench"]
    path = make.llava_bench(tmp_path) / "answers_gpt4.jsonl"
    lines = path.read_text().splitlines()
    make.write_lines(path, lines[::-1])
    reference = [question.metadata["reference"] for question in bench.load(tmp_path).questions]
    assert reference == [question.metadata["reference"] for question in loaded.questions]
    for name, kept, named in (("answers_gpt4.jsonl", 5, "question 5"), ("context.jsonl", 2, r"003\.jpg")):
        path = tmp_path / name
        make.write_lines(path, sorted(path.read_text().splitlines())[:kept])
        with pytest.raises(BenchmarkError, match=named):
            bench.load(tmp_path)


def test_coco_leaves_failed_replies_out(samples):
    pairs = [(8, 6), FAILED, (8, 8), (4, 6), FAILED, (2, 2)]
    scored = score(samples["llava-bench-coco"], ["no" if pair == FAILED else f"{pair[0]} {pair[1]}" for pair in pairs])
    assert headline(scored) == pytest.approx(relative([pair for pair in pairs if pair != FAILED]))
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [pair == FAILED for pair in pairs]
    assert headline(score(samples["llava-bench-coco"], ["no"] * 6)) == 0
