"""Benchmarks whose score is a share of right answers: GQA, ScienceQA, SEED-Bench and TextVQA."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.benchmarks.textvqa import TextVqa, question_in, soft_accuracy
from reverie_jax.eval.benchmarks.vqa_normalization import normalize
from reverie_jax.eval.score import score
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.makers import (
    LETTER,
    SEED_TYPES,
    SHORT,
    answer_row,
    problem,
    seed_question,
    shade,
    textvqa_row,
)
from tests.eval.benchmarks.samples import answer_all, check, headline, ids, load, value

# Structural and semantic type, and the answer, of GQA's questions.
GQA = [
    *(("query", "attr", "red"), ("verify", "rel", "yes"), ("choose", "obj", "dark brown"), ("logical", "cat", "no")),
    *(("compare", "global", "yes"), ("query", "attr", "blue"), ("verify", "attr", "no"), ("query", "rel", "red")),
]
PROBLEMS = {
    "11": problem("Which is iron?", ["wood", "iron", "glass"], 1, hint="Look at the ring."),
    "4": problem("What is the capital?", ["Rome", "Paris"], 0, image=None, subject="social science", grade="grade8"),
    "25": problem("Which letter?", ["one", "two", "three", "four", "five"], 4, subject="language science"),
    "9": problem("Which word?", ["cat", "dog"], 1, hint="Read the text.", image=None),
}
MORE = {"77": problem("Trained on?", ["x", "y"], 0, image=None, split="train")}
SEED = [
    seed_question("101669", 1, "A", text="Where is it?"),
    seed_question("101670", 9, "C", text="How many are there?"),
    seed_question("5", 9, "D", text="What does it say?", data="101669_img"),
    seed_question("v1738", 10, "B", text="What is done?"),
    seed_question("v99", 12, "A", text="What comes next?"),
]
TEXTVQA = [
    textvqa_row(
        34602, "003a", "what is the brand of this camera?", ["dakota"] * 8 + ["nous les gosses", "clos culombu"]
    ),
    textvqa_row(34603, "0054", "what does the small white text spell?", ["copenhagen"] * 10),
    textvqa_row(34604, "0054", "What color is the sign?", ["blue"] * 3 + ["red"] * 7),
    textvqa_row(34605, "0054", "What color is the sign?", ["red"] * 10),
]
TOKENS = {"003a": "DAKOTA, DIGITAL, Single-Use", "0054": "COPENHAGEN, drupalcon"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Each benchmark with its questions, by name."""
    root = tmp_path_factory.mktemp("shares")
    gqa = {
        f"0{n}": make.gqa_question(f"n{n % 3}", f"What {n}?", truth, *kinds) for n, (*kinds, truth) in enumerate(GQA)
    }
    gqa["99"] = make.gqa_question("n9", "What?", "no") | {"isBalanced": False}
    splits = {"train": ["77"], "test": list(PROBLEMS), "minitest": ["4"]}
    return {
        "gqa": load("gqa", make.gqa(root / "gqa", gqa)),
        "scienceqa": load("scienceqa", make.scienceqa(root / "scienceqa", PROBLEMS | MORE, **splits)),
        "seed": load("seed", make.seed(root / "seed", SEED)),
        "textvqa": load("textvqa", make.textvqa(root / "textvqa", TEXTVQA, TOKENS)),
    }


TEXTS = {
    "gqa": [f"What {n}?\n{SHORT}" for n in range(8)],
    "scienceqa": [
        f"Context: Look at the ring.\nWhich is iron?\nA. wood\nB. iron\nC. glass\n{LETTER}",
        f"What is the capital?\nA. Rome\nB. Paris\n{LETTER}",
        f"Which letter?\nA. one\nB. two\nC. three\nD. four\nE. five\n{LETTER}",
        f"Context: Read the text.\nWhich word?\nA. cat\nB. dog\n{LETTER}",
    ],
    "seed": [f"{row['question']}\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}" for row in SEED],
    "textvqa": [f"{row['question']}\nReference OCR token: {TOKENS[row['image_id']]}\n{SHORT}" for row in TEXTVQA],
}
IDS = {
    "gqa": [f"0{n}" for n in range(8)],
    "scienceqa": ["11", "4", "25", "9"],
    "seed": ["101669", "101670", "5", "v1738", "v99"],
    "textvqa": ["34602", "34603", "34604", "34605"],
}
CLUSTERS = {
    "gqa": [f"n{n % 3}" for n in range(8)],
    "scienceqa": IDS["scienceqa"],
    "seed": ["image/101669_img", "image/101670_img", "image/101669_img", "video/v1738.webm", "video/v99.webm"],
    "textvqa": ["003a", "0054", "0054", "0054"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_questions_are_those_of_llava(samples, name):
    _, loaded = samples[name]
    assert [question.text for question in loaded.questions] == TEXTS[name]
    assert ids(loaded) == IDS[name]
    assert [question.cluster for question in loaded.questions] == CLUSTERS[name]


def where(*kept: bool) -> list[int]:
    return [place for place, keep in enumerate(kept) if keep]


SHARES = {
    "gqa": (
        [truth for *_, truth in GQA],
        {"accuracy": range(8), "binary": where(*(row[0] != "query" for row in GQA)), "open": [0, 5, 7]}
        | {f"structural/{kind}/accuracy": where(*(row[0] == kind for row in GQA)) for kind, *_ in GQA}
        | {f"semantic/{kind}/accuracy": where(*(row[1] == kind for row in GQA)) for _, kind, _ in GQA},
    ),
    "scienceqa": (
        ["B", "A", "E", "B"],
        {"img_accuracy": [0, 2], "accuracy": range(4), "natural/accuracy": [0, 3], "social/accuracy": [1]}
        | {"language/accuracy": [2], "has_text/accuracy": [0, 3], "has_image/accuracy": [0, 2]}
        | {"no_context/accuracy": [1], "grade_1_6/accuracy": [0, 2, 3], "grade_7_12/accuracy": [1]},
    ),
    # Micro averages: not the means of types.
    "seed": (
        [row["answer"] for row in SEED],
        {"accuracy": range(5), "image/accuracy": range(3), "video/accuracy": [3, 4]}
        | {
            f"{name}/accuracy": places
            for name, kind in SEED_TYPES.items()
            if (places := where(*(row["question_type_id"] == kind for row in SEED)))
        },
    ),
}
"""Right answers, and the places of the questions that each metric is over; the first is the headline."""


@pytest.mark.parametrize("name", SHARES)
@given(data=st.data())
def test_metrics_are_shares_of_right_answers(samples, name, data):
    (bench, loaded), (truths, places) = samples[name], SHARES[name]
    right = data.draw(st.lists(st.booleans(), min_size=len(truths), max_size=len(truths)))
    answers = answer_all(loaded, [truth if good else "?" for truth, good in zip(truths, right, strict=True)])
    values = bench.score(loaded, answers).values()
    assert next(iter(values)) == next(iter(places))
    assert values == pytest.approx({m: 100 * sum(right[n] for n in over) / len(over) for m, over in places.items()})


def test_gqa_asks_only_balanced_questions(samples):
    assert samples["gqa"][1].protocol["not balanced, left out"] == 1


# ScienceQA.


def test_images_are_found_with_and_without_the_folder_of_the_split(samples, tmp_path):
    data = make.scienceqa(tmp_path, PROBLEMS)
    (data / "images" / "test").rename(data / "moved")
    (data / "images").rmdir()
    (data / "moved").rename(data / "images")
    for loaded in (samples["scienceqa"][1], load("scienceqa", data)[1]):
        assert [q.image and shade(loaded.read_image(q.image)) for q in loaded.questions] == [11, None, 25, None]


@pytest.mark.parametrize("test", [["4", "6"], ["4", "4"], []], ids=["unknown id", "duplicate id", "empty"])
def test_invalid_split_is_named(tmp_path, test):
    make.scienceqa(tmp_path, PROBLEMS)
    make.write_json(tmp_path / "pid_splits.json", {"test": test})
    with pytest.raises(BenchmarkError, match=r"pid_splits\.json"):
        load("scienceqa", tmp_path)


def test_letter_beyond_the_choices_is_wrong(samples):
    bench, loaded = samples["scienceqa"]
    for answer in ("C", "E", "D. two", "The answer is D.", "The answer is Z."):
        scored = bench.score(loaded, answer_all(loaded, SHARES["scienceqa"][0]) | {"4": answer})
        assert [parsed.right for parsed in scored.parsed_answers] == [1, 0, 1, 1]


def test_missing_answer_is_wrong_in_all_and_not_counted_with_images(samples):
    """LLaVA's script logs the prompt of a missing answer as "Unknown", which shows no image."""
    bench, loaded = samples["scienceqa"]
    answers = answer_all(loaded, SHARES["scienceqa"][0]) | {"25": "A"}
    for missing, with_images, accuracy in ((None, 50, 75), ("25", 100, 75), ("9", 100, 50)):
        answers.pop(missing, None)
        scored = check(bench, loaded, answers)
        assert (headline(scored), value(scored, "accuracy")) == (with_images, accuracy)


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        ("scienceqa", {"11": "It is iron.", "4": "B", "25": "(E)", "9": "A"}, 100),
        ("scienceqa", {"11": "It is glass.", "4": "B", "25": "(E)", "9": "A"}, 50),
        ("seed", {"101669": "(A)", "101670": "It is three.", "5": "B", "v1738": "A", "v99": "A"}, 200 / 3),
    ],
)
def test_vlmevalkit_infers_as_for_mmbench_over_questions_with_an_image(samples, name, answers, expected):
    assert headline(check(*samples[name], answers, "vlmevalkit")) == pytest.approx(expected)


def test_result_is_in_the_layout_of_llavas_script(samples, tmp_path):
    bench, loaded = samples["scienceqa"]
    answers = answer_all(loaded, SHARES["scienceqa"][0]) | {"11": "C. glass", "9": "dog"}
    (path,) = bench.export(loaded, answers, tmp_path)
    summary = {"correct": 2, "count": 4, "acc": 50, "results": {"11": 2, "4": 0, "25": 4, "9": -1}}
    assert json.loads(path.read_text("utf-8")) == {**summary, "outputs": answers}


# SEED-Bench.


def test_images_and_middle_frames_are_found_where_llava_has_them(samples):
    _, loaded = samples["seed"]
    shades = [shade(loaded.read_image(q.image)) for q in loaded.questions]
    # The first and third share their image, written twice; videos are frames named by type and question.
    assert all(abs(one - other) < 9 for one, other in zip(shades, [2, 1, 2, 3, 4], strict=True))
    assert loaded.read_image(loaded.questions[3].image)[:4] == b"\x89PNG"


def test_clips_without_frames_count_only_where_they_are_answered(tmp_path):
    """Most later work reports images alone; but LLaVA's own answer files are about clips too."""
    data = make.seed(tmp_path, SEED)
    (data / "SEED-Bench-video-image" / "10_v1738.png").unlink()
    bench, loaded = load("seed", data)
    assert loaded.unavailable == {"v1738"}
    assert [str(question.id) for question in loaded.available] == ["101669", "101670", "5", "v99"]
    assert loaded.protocol["clips without a frame"] == 1
    rows = [{"question_id": row["question_id"], "text": row["answer"]} for row in SEED]
    for part in (rows, rows[:3] + rows[4:]):
        result = score(bench, loaded, make.write_lines(tmp_path / "a.jsonl", part))
        assert (result.items, result.metrics["accuracy"]) == (len(part), 100.0)
    _, images = load("seed", make.seed(tmp_path / "images", SEED[:3]))
    assert set(check(bench, images, answer_all(images, "B")).values().values()) == {0.0}


# TextVQA.


def test_tokens_may_come_from_rosetta_or_be_missing(tmp_path):
    data = make.textvqa(tmp_path, TEXTVQA, TOKENS)
    (data / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert load("textvqa", data)[1].questions[1].text == f"What does the small white text spell?\n{SHORT}"
    rows = [{"image_id": "003a", "ocr_tokens": ["DAKOTA", "x"]}]
    make.write_json(data / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": rows})
    loaded = load("textvqa", data)[1]
    assert loaded.questions[0].text.splitlines()[1] == "Reference OCR token: DAKOTA, x"
    assert loaded.protocol["ocr tokens"] == "Rosetta v0.2"
    make.write_json(data / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{**rows[0], "ocr_tokens": [3]}]})
    with pytest.raises(BenchmarkError, match="Rosetta"):
        load("textvqa", data)


def test_rows_of_llava_are_matched_by_image_and_prompt(samples, tmp_path):
    """LLaVA's id is that of the image; two questions in the same words are taken in turn."""
    bench, loaded = samples["textvqa"]
    rows = [answer_row(q.cluster, q.text, f"answer {q.id}") for q in loaded.questions]

    def read(rows):
        return answer_files.read_answers(make.write_lines(tmp_path / "a.jsonl", rows), bench, loaded)

    expected = {id: f"answer {id}" for id in ids(loaded)}
    assert read(rows) == read([rows[1], rows[2], rows[0], rows[3]]) == expected
    assert read([{**row, "prompt": row["prompt"].replace("token: ", "token: x, ")} for row in rows]) == expected
    other = answer_row("0054", f"who is it?\nReference OCR token: a\n{SHORT}", "x")
    ours = [{"question_id": id, "text": "a"} for id in (34602, 34603, 34604, 34604)]
    for wrong in ([*rows, rows[3]], rows[:3], [*rows[:3], other], ours):
        with pytest.raises(BenchmarkError, match=r"a\.jsonl"):
            read(wrong)


LAYOUTS = [
    "OCR tokens: a, b. Question: What Is it? Short answer:",
    "<image>\nWhat is it?\nReference OCR token: a\nSo.",
    "Reference OCR token: a\nWhat is it?\nSo.",
    "What is it?\nSo.",
]


def test_question_is_found_in_every_layout_of_llava():
    assert {question_in(prompt) for prompt in LAYOUTS} == {"what is it?"}
    for prompt in ("What is it?", "OCR tokens: a", "What\nis\nit?"):
        with pytest.raises(ValueError, match=prompt[:3]):
            question_in(prompt)


def scored_answer(answer: str, people: list[str]):
    metadata = {"answers": tuple(map(normalize, people)), "question": "what?"}
    return check(TextVqa(), BenchmarkData([Question(1, None, "what?", "a", metadata)], lambda name: b""), {"1": answer})


@pytest.mark.parametrize("agreed", range(11))
def test_score_is_the_mean_over_people_left_out(agreed):
    """Of those left, three must agree. For 0 to 4 people: 0, .3, .6, .9, 1."""
    people = ["stop"] * agreed + [f"other {n}" for n in range(10 - agreed)]
    left_out = [min(1, sum(word == "stop" for word in people[:n] + people[n + 1 :]) / 3) for n in range(10)]
    assert sum(left_out) / 10 == pytest.approx((0, 0.3, 0.6, 0.9, 1)[min(agreed, 4)])
    scored = scored_answer("Stop.", people)
    assert scored.parsed_answers[0].right == soft_accuracy("stop", people) == pytest.approx(sum(left_out) / 10)
    assert headline(scored) == pytest.approx(10 * sum(left_out))


def test_people_agree_after_normalization_and_the_headline_is_the_mean(samples):
    assert scored_answer("stop!", ["Stop", "stop.", "the stop", "STOP", *"abcdef"]).parsed_answers[0].right == 1.0
    bench, loaded = samples["textvqa"]
    scored = check(bench, loaded, answer_all(loaded, ["Dakota", "Stockholm", "blue", "red"]))
    assert [parsed.right for parsed in scored.parsed_answers] == pytest.approx([1, 0, 0.9, 1])
    assert headline(scored) == pytest.approx(290 / 4)
