"""GQA: exact match of the answer in lower case without its last full stop; binary, open, consistency as published."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import check, dump, everyone, headline, ids, lines, opened, picture, said


def question(
    image: str, text: str, answer: str, kind: str = "query", meaning: str = "attr", entailed: tuple[str, ...] = ()
) -> dict:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "table (1)"}],
        "entailed": list(entailed),
        "equivalent": [],
        "question": text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "color", "local": "04-table_color"},
        "answer": answer,
        "semanticStr": "select: table (1)",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "colorAttr", "semantic": meaning, "structural": kind},
        "fullAnswer": f"It is {answer}.",
    }


QUESTIONS = {
    "201307251": question("n161313", "Is it overcast?", "no", "verify", "global"),
    "201640614": question("n235859", "Who is wearing the dress?", "woman", "query", "rel"),
    "202225914": question("n517361", "What color is the table?", "dark brown", "query", "attr"),
    "02930152": question("n161313", "What is the weather like?", "cloudy", "query", "global"),
    "201225259": question("n235859", "Is the dress red or blue?", "red", "choose", "attr"),
}


@pytest.fixture
def data(tmp_path):
    dump(tmp_path / "testdev_balanced_questions.json", QUESTIONS)
    for number, row in enumerate(QUESTIONS.values()):
        picture(tmp_path / "images" / f"{row['imageId']}.jpg", number)
    return tmp_path


def test_ids_stay_text_with_their_leading_zero(data):
    _, loaded = opened("gqa", data)
    assert ids(loaded) == list(QUESTIONS)


def test_prompt_is_llavas_to_the_character(data):
    _, loaded = opened("gqa", data)
    assert [q.text for q in loaded.questions][:2] == [
        "Is it overcast?\nAnswer the question using a single word or phrase.",
        "Who is wearing the dress?\nAnswer the question using a single word or phrase.",
    ]


def test_questions_of_a_picture_are_one_cluster(data):
    _, loaded = opened("gqa", data)
    first, second, third, fourth, fifth = (q.cluster for q in loaded.questions)
    assert first == fourth
    assert second == fifth
    assert len({first, second, third}) == 3


def test_pictures_are_found(data):
    _, loaded = opened("gqa", data)
    assert loaded.read_image(loaded.questions[0].image)[:2] == b"\xff\xd8"


def test_file_itself_may_be_given(data):
    _, loaded = opened("gqa", data / "testdev_balanced_questions.json")
    assert len(loaded.questions) == 5


def test_missing_and_broken_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match="testdev_balanced") as error:
        opened("gqa", tmp_path)
    assert "\n" not in str(error.value)
    dump(tmp_path / "testdev_balanced_questions.json", {"1": {**QUESTIONS["201307251"], "answer": None}, "2": {}})
    with pytest.raises(BenchmarkError, match="testdev_balanced") as error:
        opened("gqa", tmp_path)
    assert "\n" not in str(error.value)


# (answer, truth) that are right, and that are wrong. LLaVA's converter: full stops at the end go, then lower case.
RIGHT = [
    ("no", "no"),
    ("No", "no"),
    ("NO.", "no"),
    ("No...", "no"),
    ("Dark brown", "dark brown"),
    ("Dark Brown.", "dark brown"),
]
WRONG = [
    ("No, it is not", "no"),
    ("no!", "no"),
    (" no", "no"),
    ("no .", "no"),
    ("no. ", "no"),
    (".no", "no"),
    ("'no'", "no"),
    ("**no**", "no"),
    ("(no)", "no"),
    ("", "no"),
    ("not", "no"),
    ("no\n", "no"),
    ("The table is dark brown", "dark brown"),
    ("brown", "dark brown"),
    ("dark  brown", "dark brown"),
    ("dark-brown", "dark brown"),
    ("a dark brown", "dark brown"),
    ("nein", "no"),
    ("\u4e0d", "no"),
]


@pytest.mark.parametrize(
    ("answer", "truth", "right"), [(*p, 1.0) for p in RIGHT] + [(*p, 0.0) for p in WRONG], ids=repr
)
def test_answer_must_be_the_truth_itself(tmp_path, answer, truth, right):
    dump(tmp_path / "testdev_balanced_questions.json", {"1": question("n1", "What?", truth)})
    bench, loaded = opened("gqa", tmp_path)
    scored = bench.score(loaded, {"1": answer})
    assert scored.parsed_answers[0].right == right
    assert headline(scored) == 100 * right


def test_metrics_by_hand(data):
    bench, loaded = opened("gqa", data)
    answers = {
        "201307251": "No.",
        "201640614": "man",
        "202225914": "Dark brown",
        "02930152": "Cloudy",
        "201225259": "blue",
    }
    scored = check(bench, loaded, answers)
    values = scored.values()
    assert next(iter(values)) == "accuracy"
    assert headline(scored) == pytest.approx(60)
    assert values["binary"] == pytest.approx(50)  # everything that is no "query"
    assert values["open"] == pytest.approx(200 / 3)


KINDS = ["query", "verify", "choose", "logical", "compare", "query", "verify", "query"]
MEANINGS = ["attr", "rel", "obj", "cat", "global", "attr", "attr", "rel"]
TRUTHS = ["red", "yes", "blue", "no", "yes", "blue", "no", "red"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    rows = enumerate(zip(KINDS, MEANINGS, TRUTHS, strict=True))
    made = {str(n): question(f"n{n % 3}", f"What {n}?", truth, kind, meaning) for n, (kind, meaning, truth) in rows}
    dump(folder / "testdev_balanced_questions.json", made)
    return opened("gqa", folder)


@given(st.lists(st.sampled_from(["yes", "No.", "RED", "blue"]), min_size=8, max_size=8))
def test_shares_of_types_are_those_of_the_published_script(many, texts):
    bench, loaded = many
    scored = check(bench, loaded, {str(n): text for n, text in enumerate(texts)})
    right = [text.rstrip(".").lower() == truth for text, truth in zip(texts, TRUTHS, strict=True)]
    values = scored.values()

    def percent(flags: list[bool]) -> float:
        return 100 * sum(flags) / len(flags)

    assert values["accuracy"] == pytest.approx(percent(right))
    assert values["open"] == pytest.approx(percent([r for r, k in zip(right, KINDS, strict=True) if k == "query"]))
    assert values["binary"] == pytest.approx(percent([r for r, k in zip(right, KINDS, strict=True) if k != "query"]))
    for name in set(KINDS) | set(MEANINGS):
        mine = [r for r, k, m in zip(right, KINDS, MEANINGS, strict=True) if name in (k, m)]
        found = [value for key, value in values.items() if key.split("/")[0] == name]
        assert found in ([], [pytest.approx(percent(mine))])


def test_nothing_right_and_nothing_open_is_zero(tmp_path):
    dump(tmp_path / "testdev_balanced_questions.json", {"1": question("n1", "Is it?", "yes", "verify")})
    bench, loaded = opened("gqa", tmp_path)
    values = check(bench, loaded, {"1": "no"}).values()
    assert values["accuracy"] == values["binary"] == values["open"] == 0


def test_missing_answer_is_wrong(data):
    bench, loaded = opened("gqa", data)
    right = everyone(loaded, lambda q: QUESTIONS[str(q.id)]["answer"])
    assert headline(bench.score(loaded, right)) == 100
    right.pop("02930152")
    assert headline(check(bench, loaded, right)) == pytest.approx(80)


def test_answers_are_joined_by_id_in_any_order(data, tmp_path):
    bench, loaded = opened("gqa", data)
    rows = [said(q.id, q.text, f"{n}") for n, q in enumerate(loaded.questions)]
    wanted = {str(q.id): f"{n}" for n, q in enumerate(loaded.questions)}
    assert answer_files.read_answers(lines(tmp_path / "a.jsonl", rows[::-1]), bench, loaded) == wanted


def test_official_answer_file_is_read_back(data, tmp_path):
    """The upload is [{questionId, prediction}]: lower case, no full stop behind."""
    bench, loaded = opened("gqa", data)
    answers = everyone(loaded, lambda q: f"{QUESTIONS[str(q.id)]['answer'].title()}.")
    (path,) = bench.export(loaded, answers, tmp_path / "out")
    rows = json.loads(path.read_text("utf-8"))
    assert [set(row) for row in rows] == [{"questionId", "prediction"}] * 5
    assert {row["questionId"]: row["prediction"] for row in rows} == {id: q["answer"] for id, q in QUESTIONS.items()}
    again = answer_files.read_answers(path, bench, loaded)
    assert headline(bench.score(loaded, again)) == headline(bench.score(loaded, answers)) == 100


def test_cap_is_llavas():
    from reverie_jax.eval.benchmarks import benchmark

    assert benchmark("gqa").max_new_tokens == 128
