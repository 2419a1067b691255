"""GAVIE: scores under two headings, plain means, and the official prompt with its width for height."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reverie_jax.eval.benchmarks.gavie import regions, scores
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import IMAGE, gavie, write_json
from tests.eval.benchmarks.samples import answer_all, check, load, value


def reply(relevancy, accuracy, answer: int = 1) -> str:
    """Fill the official skeleton."""
    return (
        f"Relevancy:\nscore of the answer{answer}: {relevancy}\nreason: it does what is asked, 3 times.\n\n"
        f"Accuracy:\nscore of the answer{answer}: {accuracy}\nreason: 2 of 4 things are right."
    )


# Reply, relevancy and accuracy; None: that heading has no score.
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
    reply(8, 6) + "\n" + reply(8, 5): (8, None),
}


@pytest.mark.parametrize("text", REPLIES, ids=lambda text: repr(text)[:60])
def test_reply_is_parsed(text):
    parsed = scores(text)
    assert (parsed.get("relevancy"), parsed.get("accuracy")) == REPLIES[text]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("gavie", gavie(tmp_path_factory.mktemp("gavie")))


def score(sample, replies):
    bench, loaded = sample
    return check(bench, loaded, answer_all(loaded, "So."), replies=answer_all(loaded, replies))


@pytest.mark.parametrize("seed", range(2))
def test_plain_means_over_questions(sample, seed):
    pairs = np.random.default_rng(seed).integers(0, 11, (5, 2))
    scored = score(sample, [reply(*pair) for pair in pairs])
    assert (value(scored, "relevancy"), value(scored, "accuracy")) == pytest.approx(tuple(pairs.mean(0)))
    assert [parsed.right for parsed in scored.parsed_answers] == pytest.approx(list(pairs[:, 1] / 10))


def test_missing_scores_are_left_out_of_the_means(sample):
    scored = score(sample, [reply(8, 6), reply(4, "x"), "no", reply(0, 3), reply(8, 0)])
    assert scored.values() == pytest.approx({"accuracy": 3, "relevancy": 5, "unread": 0.4})
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [False, True, True, False, False]
    bench, loaded = sample
    answers = dict(list(answer_all(loaded, "So.").items())[1:])
    scored = bench.score(loaded, answers, replies=answer_all(loaded, reply(5, 10)))
    assert scored.values() == pytest.approx({"accuracy": 8, "relevancy": 4, "unread": 0})


def test_judge_reads_regions_with_the_width_as_height(sample):
    """The official script writes bbox[2] twice; its published numbers depend on that."""
    bench, loaded = sample
    answers = answer_all(loaded, ["So {regions}.", *["So."] * 4])
    template = "R[{regions}] Q[{question}] A[{answer}]"
    requests = bench.judge_requests(loaded, answers, "official", {"gavie": template})
    text = "a red kite X:11 Y:12 Width:13 Height:13\nthe sky X:0 Y:0 Width:400 Height:400"
    assert requests[0].prompt == f"R[{text}] Q[What is at [11, 12]?] A[So {{regions}}.]"
    assert requests[2].prompt == "R[a man X:5 Y:6 Width:7 Height:7] Q[Who is it?] A[So.]"
    assert regions([{"caption": "a man", "bbox": [5, 6, 7, 8]}], slip=False).endswith("Width:7 Height:8")
    clusters = [question.cluster for question in loaded.questions]
    assert clusters == ["2331", "2331", "77", "77", "2331"]
    assert loaded.read_image(loaded.questions[2].image) == IMAGE


def test_regions_are_needed_only_by_the_judge(sample, tmp_path):
    folder = gavie(tmp_path)
    (folder / "vg_annotation.json").unlink()
    bench, loaded = sample[0], sample[0].load(folder)
    bench.score(loaded, answer_all(loaded, "So."), replies=answer_all(loaded, reply(1, 2)))
    with pytest.raises(BenchmarkError, match=r"vg_annotation\.json"):
        bench.judge_requests(loaded, answer_all(loaded, "So."), "official", {"gavie": "{regions}"})


@pytest.mark.parametrize("region", [None, {"caption": "x"}, {"bbox": [1, 2, 3, 4]}, {"caption": "x", "bbox": [1, 2]}])
def test_missing_or_invalid_region_is_an_error(tmp_path, region):
    folder = gavie(tmp_path)
    content = json.loads((folder / "vg_annotation.json").read_text())
    content["77"] = [region]
    write_json(folder / "vg_annotation.json", content if region else {"2331": content["2331"]})
    with pytest.raises(BenchmarkError, match=r"vg_annotation\.json.*77"):
        load("gavie", folder)


def test_rows_are_matched_by_image_and_question(sample, tmp_path):
    """The official list has no ids."""
    bench, loaded = sample
    for place, question in enumerate(loaded.questions):
        row = {"image_id": question.image.split(".")[0], "question": question.text, "answer": "So."}
        assert bench.match_question(row, loaded) == str(place)
    with pytest.raises(LookupError):
        bench.match_question({"image_id": 77, "question": "Who else?"}, loaded)
    rows = json.loads((gavie(tmp_path) / "evaluation_set.json").read_text())
    rows = [{"image_id": int(row["image_id"]), "instruction": row["question"]} for row in [*rows, rows[0]]]
    write_json(tmp_path / "evaluation_set.json", rows)
    _, loaded = load("gavie", tmp_path)
    assert len(loaded.questions) == 6
    with pytest.raises(LookupError):  # the same question twice
        bench.match_question(rows[0], loaded)
