"""SEED-Bench: the letter itself, shares over all questions, of images and of videos, of each type."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.score import score
from tests.eval.benchmarks.makers import (
    SEED_TYPES,
    check,
    dump,
    everyone,
    headline,
    ids,
    lines,
    opened,
    said,
    seed,
    seed_question,
    shade,
)

QUESTIONS = [
    seed_question("101669", 1, "A", text="Where is it?"),
    seed_question("101670", 5, "C", text="How many are there?"),
    seed_question("5", 9, "D", text="What does it say?", data="101669_img"),
    seed_question("v1738", 10, "B", text="What is done?"),
    seed_question("v99", 12, "A", text="What comes next?"),
]


@pytest.fixture
def data(tmp_path):
    return seed(tmp_path, QUESTIONS)


def right(question) -> str:
    return next(row["answer"] for row in QUESTIONS if row["question_id"] == str(question.id))


def test_ids_are_those_of_the_file(data):
    _, loaded = opened("seed", data)
    assert ids(loaded) == ["101669", "101670", "5", "v1738", "v99"]


def test_prompt_is_llavas_to_the_character(data):
    _, loaded = opened("seed", data)
    assert loaded.questions[0].text == (
        "Where is it?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_questions_of_a_picture_are_one_cluster(data):
    _, loaded = opened("seed", data)
    assert loaded.questions[0].cluster == loaded.questions[2].cluster
    assert len({q.cluster for q in loaded.questions}) == 4


def test_pictures_and_middle_frames_are_found_where_llava_has_them(data):
    _, loaded = opened("seed", data)
    found = [shade(loaded.read_image(q.image)) for q in loaded.questions]
    # The first and third share their picture, written twice; videos are frames named by type and question.
    assert all(abs(one - other) < 9 for one, other in zip(found, [2, 1, 2, 3, 4], strict=True))
    assert loaded.read_image(loaded.questions[3].image)[:4] == b"\x89PNG"


def test_clips_without_frames_are_not_asked_and_count_where_they_are_answered(data, tmp_path):
    """Pictures alone are what most later work reports; but LLaVA's own answer files are about clips too."""
    (data / "SEED-Bench-video-image" / "10_v1738.png").rename(data / "SEED-Bench-video-image" / "11_v1738.png")
    bench, loaded = opened("seed", data)
    assert [str(question.id) for question in loaded.available] == ["101669", "101670", "5", "v99"]
    assert loaded.unavailable == {"v1738"}
    assert loaded.protocol["clips without a frame"] == 1
    rows = [{"question_id": row["question_id"], "text": row["answer"]} for row in QUESTIONS]
    every = score(bench, loaded, lines(tmp_path / "a.jsonl", rows))
    assert (every.items, every.metrics["accuracy"]) == (5, 100.0)
    rows = [row for row in rows if row["question_id"] != "v1738"]
    few = score(bench, loaded, lines(tmp_path / "b.jsonl", rows))
    assert (few.items, few.metrics["accuracy"]) == (4, 100.0)


def test_missing_and_broken_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match=r"SEED-Bench") as error:
        opened("seed", tmp_path)
    assert "\n" not in str(error.value)
    for rows in (
        [QUESTIONS[0], {**QUESTIONS[1], "answer": "E"}],
        [QUESTIONS[0], {**QUESTIONS[1], "data_type": "sound"}],
        [QUESTIONS[0], {"question_id": "7"}],
        [QUESTIONS[0], QUESTIONS[0]],
        [],
    ):
        dump(tmp_path / "SEED-Bench.json", {"questions": rows, "question_type": SEED_TYPES})
        with pytest.raises(BenchmarkError, match=r"SEED-Bench") as error:
            opened("seed", tmp_path)
        assert "\n" not in str(error.value)
    dump(tmp_path / "SEED-Bench.json", QUESTIONS)
    with pytest.raises(BenchmarkError, match=r"SEED-Bench") as error:
        opened("seed", tmp_path)
    assert "\n" not in str(error.value)


# Whether LLaVA's script, and lmms-eval, take the answer for the letter A.
SAYS_A = {
    "A": (True, True),
    "a": (False, True),
    "A.": (False, True),
    "A. One": (False, True),
    "AB": (False, True),
    "An owl": (False, True),
    "apple": (False, True),
    " A": (False, True),
    "(A)": (False, False),
    "**A**": (False, False),
    "The answer is A": (False, False),
    "One": (False, False),
    "B": (False, False),
    "": (False, False),
    "\u7b54 A": (False, False),
}


@pytest.mark.parametrize("answer", SAYS_A, ids=repr)
def test_answer_must_be_the_letter_itself(data, answer):
    bench, loaded = opened("seed", data)
    assert bench.rules[0] == "official"
    for number, rule in enumerate(("official", "lmms-eval")):
        scored = bench.score(loaded, everyone(loaded, answer), rule)
        wanted = [row["answer"] == "A" and SAYS_A[answer][number] for row in QUESTIONS]
        if answer == "B":
            wanted = [row["answer"] == "B" for row in QUESTIONS]
        if answer == "The answer is A" and number:
            wanted = [False] * 5  # its first letter is T
        assert [bool(reading.right) for reading in scored.parsed_answers] == wanted


@pytest.mark.parametrize(("answer", "unparsed"), [("A", False), ("D", False), ("", True), ("E", True), ("a cup", True)])
def test_answers_that_are_no_letter_are_counted_apart(data, answer, unparsed):
    bench, loaded = opened("seed", data)
    assert [r.unparsed for r in bench.score(loaded, everyone(loaded, answer)).parsed_answers] == [unparsed] * 5


KINDS, TRUTHS = [1, 1, 2, 9, 9, 10, 11, 11], "ABCDABCA"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rows = enumerate(zip(KINDS, TRUTHS, strict=True))
    made = [seed_question(f"{'v' if kind > 9 else ''}{n}", kind, letter) for n, (kind, letter) in rows]
    return opened("seed", seed(tmp_path_factory.mktemp("many"), made))


@given(st.lists(st.sampled_from(["A", "B", "C", "D", "A."]), min_size=8, max_size=8))
def test_shares_are_those_of_llavas_script(many, texts):
    bench, loaded = many
    scored = check(bench, loaded, dict(zip(ids(loaded), texts, strict=True)))
    good = [text == letter for text, letter in zip(texts, TRUTHS, strict=True)]
    values = scored.values()

    def share(keep) -> float:
        kept = [flag for flag, kind in zip(good, KINDS, strict=True) if keep(kind)]
        return 100 * sum(kept) / len(kept)

    assert headline(scored) == pytest.approx(share(lambda kind: True))  # micro: not the mean of types
    assert values["image/accuracy"] == pytest.approx(share(lambda kind: kind < 10))
    assert values["video/accuracy"] == pytest.approx(share(lambda kind: kind > 9))
    for name, number in SEED_TYPES.items():
        if number in KINDS:
            (found,) = {round(value, 9) for key, value in values.items() if key.split("/")[0] == name}
            assert found == pytest.approx(share(lambda kind, number=number: kind == number))


def test_type_with_nothing_right_and_images_alone_are_no_error(tmp_path):
    """LLaVA's script ends in KeyError and in ZeroDivisionError there."""
    bench, loaded = opened("seed", seed(tmp_path, QUESTIONS[:3]))
    values = check(bench, loaded, everyone(loaded, "B")).values()
    assert set(values.values()) == {0.0}


def test_missing_answer_is_wrong(data):
    bench, loaded = opened("seed", data)
    answers = everyone(loaded, right)
    assert headline(bench.score(loaded, answers)) == 100
    answers.pop("v99")
    assert headline(check(bench, loaded, answers)) == pytest.approx(80)


def test_vlmevalkit_has_images_alone_and_infers_as_for_mmbench(data):
    bench, loaded = opened("seed", data)
    assert "vlmevalkit" in bench.rules
    answers = {"101669": "(A)", "101670": "It is three.", "5": "B", "v1738": "A", "v99": "A"}
    assert headline(check(bench, loaded, answers, "vlmevalkit")) == pytest.approx(200 / 3)


def test_answers_by_llava_have_numbers_for_images(data, tmp_path):
    bench, loaded = opened("seed", data)
    rows = [said(int(q.id) if str(q.id).isdigit() else q.id, q.text, right(q), category="x") for q in loaded.questions]
    found = answer_files.read_answers(lines(tmp_path / "a.jsonl", rows[::-1]), bench, loaded)
    assert found == everyone(loaded, right)
    with pytest.raises(BenchmarkError, match="twice"):  # as in LLaVA's own file of 13B
        answer_files.read_answers(lines(tmp_path / "a.jsonl", [*rows, rows[0]]), bench, loaded)


def test_upload_is_the_leaderboards(data, tmp_path):
    bench, loaded = opened("seed", data)
    (path,) = bench.export(loaded, everyone(loaded, right), tmp_path / "out")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == [{"question_id": row["question_id"], "prediction": row["answer"]} for row in QUESTIONS]
    assert answer_files.read_answers(path, bench, loaded) == everyone(loaded, right)


def test_cap_is_llavas():
    from reverie_jax.eval.benchmarks import benchmark

    assert benchmark("seed").max_new_tokens == 128
