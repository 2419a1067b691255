"""Text that is shown bit by bit is the text of the whole answer, wherever it is cut; a stop text ends it exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.templates import Template
from reverie_jax.data.tokenization import Encoder
from reverie_jax.serve.answers import AnswerText
from reverie_jax.serve.chunks import Chosen
from tests.data.fakes import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.eos_token_id
TEXTS = [
    "Yes.",
    " Yes, a red cup ",
    "né à Paris…",
    "one\ntwo\n\nthree",
    "#",
    "a ## b\n### c",
    "",
    "日本 🙂🙂 語",
    "said: it",
]


def encoder(end=None, opening=" "):
    return Encoder(TOKENIZER, Template("t", "two", "", "U: ", " A:", answer_prefix=opening, end=end), 4, 3)


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def chosen(ids):
    """Scores of a token depend on it alone."""
    ids = np.asarray(ids, np.int32)
    top = np.stack([ids, ids[::-1]], axis=1) if len(ids) else np.zeros((0, 2), np.int32)
    return Chosen(ids, -ids.astype(np.float32), top, -top.astype(np.float32))


def run(ids, sizes, stops=(), longest=1000, top=None, **template):
    """Return the deltas of an answer that comes in parts."""
    made = encoder(**template)
    answer, deltas, start = AnswerText(made, 5, longest, stops, top), [], 0
    for size in [*sizes, len(ids)]:
        if start < len(ids) and answer.finish is None:
            deltas.append(answer.add(0, chosen(ids[start : start + size])))
        start += size
    return deltas


def expected(ids, stops, longest, made):
    """Return text, finish and number of tokens, from the text behind each number of tokens."""
    for count in range(1, len(ids) + 1):
        if ids[count - 1] == END:
            return made.decode(ids[: count - 1]), "stop", count
        text = TOKENIZER.decode(ids[:count], skip_special_tokens=True).lstrip()
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)].rstrip(), "stop", count
        if count == longest:
            return made.decode(ids[:count]), "length", count
    raise AssertionError


@given(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4).map("".join),
    st.lists(st.sampled_from(["\n", "###", "##", ".", "cup", " red c", "🙂", "\n\nth"]), max_size=3),
    st.lists(st.integers(1, 5), max_size=12),
    st.integers(1, 60),
)
def test_parts_are_the_whole(text, stops, sizes, longest):
    ids = [*ids_of(text), END]
    deltas = run(ids, sizes, stops, longest)
    found = "".join(one.text for one in deltas), deltas[-1].finish, deltas[-1].count
    assert found == expected(ids, stops, longest, encoder())
    assert [one.finish for one in deltas[:-1]] == [None] * (len(deltas) - 1)


@pytest.mark.parametrize("end", ["###", "\n###"])
@pytest.mark.parametrize("text", ["a cup### and more", "a cup\n### Human: no", "###", "a # b ## c\n###"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_template_may_end_with_a_text(text, end, size):
    ids = [*ids_of(text), END]
    deltas = run(ids, [size] * len(ids), end=end)
    assert "".join(one.text for one in deltas) == encoder(end=end).decode(ids[:-1]) == text.split("###")[0].strip()
    assert deltas[-1].finish == "stop"


def test_the_models_own_role_is_left_out():
    ids = [*ids_of(" Assistant: a cup"), END]
    for size in (1, 2, 50):
        deltas = run(ids, [size] * len(ids), opening="Assistant:")
        assert "".join(one.text for one in deltas) == "a cup" == encoder(opening="Assistant:").decode(ids[:-1])


def test_nothing_is_shown_that_may_change():
    deltas = run(ids_of("a \n#b"), [1] * 9, ["\n##"], longest=5)
    assert ["".join(one.text for one in deltas[:count]) for count in range(1, 6)] == ["a"] * 4 + ["a \n#b"]
    smile = [*ids_of("🙂"), END]
    assert [one.text for one in run(smile, [1] * len(smile))][-2:] in (["🙂", ""], ["", "🙂"])
    assert all("\ufffd" not in one.text for one in run(smile, [1] * len(smile)))


def test_tokens_are_listed_with_their_scores():
    """All but the one that ends the answer; texts in a row are the answer; the same in parts and at once."""
    ids = [*ids_of(" a red cup. No"), END]
    for stops, count in (((), len(ids) - 1), ((" No",), len(ids) - 2)):
        at_once = run(ids, [100], stops, top=1)[0].tokens
        one_by_one = [token for part in run(ids, [1] * len(ids), stops, top=1) for token in part.tokens]
        assert [(one.text, one.logprob) for one in at_once] == [(one.text, one.logprob) for one in one_by_one]
        assert "".join(one.text for one in at_once) == TOKENIZER.decode(ids[:count])
        assert [one.logprob for one in at_once] == [-float(id) for id in ids[:count]]
        assert all(len(one.top) == 1 for one in at_once)
    assert run(ids, [100])[0].tokens == ()
