"""SEED-Bench: the letter itself, shares over all questions, of images and of videos, of each type."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.score import score
from tests.eval.benchmarks.makers import LETTER, SEED_TYPES, seed, seed_question, shade, write_lines
from tests.eval.benchmarks.samples import answer_all, by_answer, check, headline, ids, load

QUESTIONS = [
    seed_question("101669", 1, "A", text="Where is it?"),
    seed_question("101670", 5, "C", text="How many are there?"),
    seed_question("5", 9, "D", text="What does it say?", data="101669_img"),
    seed_question("v1738", 10, "B", text="What is done?"),
    seed_question("v99", 12, "A", text="What comes next?"),
]
TRUTHS = [row["answer"] for row in QUESTIONS]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("seed", seed(tmp_path_factory.mktemp("seed"), QUESTIONS))


def test_questions_are_those_of_llava(sample):
    _, loaded = sample
    assert ids(loaded) == ["101669", "101670", "5", "v1738", "v99"]
    assert loaded.questions[0].text == f"Where is it?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}"
    assert loaded.questions[0].cluster == loaded.questions[2].cluster
    assert len(loaded.clusters) == 4


def test_images_and_middle_frames_are_found_where_llava_has_them(sample):
    _, loaded = sample
    shades = [shade(loaded.read_image(q.image)) for q in loaded.questions]
    # The first and third share their image, written twice; videos are frames named by type and question.
    assert all(abs(one - other) < 9 for one, other in zip(shades, [2, 1, 2, 3, 4], strict=True))
    assert loaded.read_image(loaded.questions[3].image)[:4] == b"\x89PNG"


def test_clips_without_frames_count_only_where_they_are_answered(tmp_path):
    """Most later work reports images alone; but LLaVA's own answer files are about clips too."""
    data = seed(tmp_path, QUESTIONS)
    (data / "SEED-Bench-video-image" / "10_v1738.png").unlink()
    bench, loaded = load("seed", data)
    assert loaded.unavailable == {"v1738"}
    assert [str(question.id) for question in loaded.available] == ["101669", "101670", "5", "v99"]
    assert loaded.protocol["clips without a frame"] == 1
    rows = [{"question_id": row["question_id"], "text": row["answer"]} for row in QUESTIONS]
    every = score(bench, loaded, write_lines(tmp_path / "a.jsonl", rows))
    assert (every.items, every.metrics["accuracy"]) == (5, 100.0)
    del rows[3]
    fewer = score(bench, loaded, write_lines(tmp_path / "b.jsonl", rows))
    assert (fewer.items, fewer.metrics["accuracy"]) == (4, 100.0)


# What LLaVA's script, and lmms-eval, parse.
PARSED = by_answer(
    {
        ("A", "A"): ["A"],
        ("", "A"): ["a", "A.", "A. One", "AB", "An owl", "apple", " A"],
        ("", ""): ["(A)", "**A**", "The answer is A", "One", "E", "", "\u7b54 A"],
        ("B", "B"): ["B"],
    }
)


@pytest.mark.parametrize("answer", PARSED, ids=repr)
def test_answers_are_parsed_by_each_rule(sample, answer):
    bench, loaded = sample
    for rule, letter in zip(("official", "lmms-eval"), PARSED[answer], strict=True):
        scored = bench.score(loaded, answer_all(loaded, answer), rule)
        assert [parsed.right for parsed in scored.parsed_answers] == [float(letter == truth) for truth in TRUTHS]
        assert [parsed.unparsed for parsed in scored.parsed_answers] == [not letter] * 5


KINDS, LETTERS = [1, 1, 2, 9, 9, 10, 11, 11], "ABCDABCA"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rows = enumerate(zip(KINDS, LETTERS, strict=True))
    questions = [seed_question(f"{'v' if kind > 9 else ''}{n}", kind, letter) for n, (kind, letter) in rows]
    return load("seed", seed(tmp_path_factory.mktemp("many"), questions))


@given(st.lists(st.sampled_from(["A", "B", "C", "D", "A."]), min_size=8, max_size=8))
def test_shares_are_those_of_llavas_script(many, texts):
    bench, loaded = many
    scored = bench.score(loaded, answer_all(loaded, texts))
    right = [text == letter for text, letter in zip(texts, LETTERS, strict=True)]
    values = scored.values()

    def share(keep) -> float:
        kept = [flag for flag, kind in zip(right, KINDS, strict=True) if keep(kind)]
        return pytest.approx(100 * sum(kept) / len(kept))

    assert headline(scored) == share(lambda kind: True)  # micro: not the mean of types
    assert values["image/accuracy"] == share(lambda kind: kind < 10)
    assert values["video/accuracy"] == share(lambda kind: kind > 9)
    for name, number in SEED_TYPES.items():
        if number in KINDS:
            assert values[f"{name}/accuracy"] == share(lambda kind, number=number: kind == number)


def test_vlmevalkit_scores_images_alone_and_infers_as_for_mmbench(sample):
    bench, loaded = sample
    answers = {"101669": "(A)", "101670": "It is three.", "5": "B", "v1738": "A", "v99": "A"}
    assert headline(check(bench, loaded, answers, "vlmevalkit")) == pytest.approx(200 / 3)


def test_images_without_videos_are_scored(tmp_path):
    bench, loaded = load("seed", seed(tmp_path, QUESTIONS[:3]))
    assert set(check(bench, loaded, answer_all(loaded, "B")).values().values()) == {0.0}


def test_upload_is_the_leaderboards(sample, tmp_path):
    bench, loaded = sample
    (path,) = bench.export(loaded, answer_all(loaded, TRUTHS), tmp_path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == [{"question_id": row["question_id"], "prediction": row["answer"]} for row in QUESTIONS]
