"""GQA: exact match of the answer in lower case without its last full stops; shares by type as published."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.benchmarks.makers import SHORT, gqa, gqa_question
from tests.eval.benchmarks.samples import answer_all, headline, load

KINDS = ["query", "verify", "choose", "logical", "compare", "query", "verify", "query"]
MEANINGS = ["attr", "rel", "obj", "cat", "global", "attr", "attr", "rel"]
TRUTHS = ["red", "yes", "dark brown", "no", "yes", "blue", "no", "red"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rows = enumerate(zip(KINDS, MEANINGS, TRUTHS, strict=True))
    questions = {f"0{n}": gqa_question(f"n{n % 3}", f"What {n}?", truth, *kinds) for n, (*kinds, truth) in rows}
    unbalanced = {"99": gqa_question("n9", "What?", "no") | {"isBalanced": False}}
    return load("gqa", gqa(tmp_path_factory.mktemp("gqa"), questions | unbalanced))


def test_questions_are_balanced_ones_with_the_prompt_of_llava(many):
    _, loaded = many
    assert [question.id for question in loaded.questions] == [f"0{n}" for n in range(8)]
    assert loaded.questions[0].text == f"What 0?\n{SHORT}"
    assert loaded.protocol["not balanced, left out"] == 1
    assert [question.cluster for question in loaded.questions[:4]] == ["n0", "n1", "n2", "n0"]


# LLaVA's converter: full stops at the end go, then lower case.
ANSWERS = {
    "no": ["no", "No", "NO.", "No..."],
    "dark brown": ["Dark brown", "Dark Brown."],
    "": [
        *("No, it is not", "no!", " no", "no .", "no. ", ".no", "'no'", "**no**", "(no)", "", "not", "no\n", "brown"),
        *("The table is dark brown", "dark  brown", "dark-brown", "a dark brown", "nein", "\u4e0d"),
    ],
}


@pytest.mark.parametrize(("truth", "answer"), [(truth, answer) for truth, all in ANSWERS.items() for answer in all])
def test_answer_must_be_exactly_the_truth(many, truth, answer):
    bench, loaded = many
    scored = bench.score(loaded, answer_all(loaded, answer))
    assert [parsed.right for parsed in scored.parsed_answers] == [float(label == truth) for label in TRUTHS]


@given(st.lists(st.sampled_from(["yes", "No.", "RED", "blue"]), min_size=8, max_size=8))
def test_shares_are_those_of_the_published_script(many, texts):
    bench, loaded = many
    scored = bench.score(loaded, answer_all(loaded, texts))
    right = [text.rstrip(".").lower() == truth for text, truth in zip(texts, TRUTHS, strict=True)]
    values = scored.values()

    def percent(*flags: bool) -> float:
        kept = [good for good, flag in zip(right, flags, strict=True) if flag]
        return pytest.approx(100 * sum(kept) / len(kept))

    assert headline(scored) == values["accuracy"] == percent(*[True] * 8)
    assert values["open"] == percent(*(kind == "query" for kind in KINDS))
    assert values["binary"] == percent(*(kind != "query" for kind in KINDS))
    for kind in set(KINDS):
        assert values[f"structural/{kind}/accuracy"] == percent(*(kind == other for other in KINDS))
    for meaning in set(MEANINGS):
        assert values[f"semantic/{meaning}/accuracy"] == percent(*(meaning == other for other in MEANINGS))


def test_upload_is_in_the_official_form(many, tmp_path):
    bench, loaded = many
    answers = answer_all(loaded, [f"{truth.title()}." for truth in TRUTHS])
    (path,) = bench.export(loaded, answers, tmp_path)
    rows = json.loads(path.read_text("utf-8"))
    assert rows == [{"questionId": f"0{n}", "prediction": truth} for n, truth in enumerate(TRUTHS)]
    assert {bench.match_question(row, loaded): bench.answer_text(row) for row in rows} == answer_all(loaded, TRUTHS)
