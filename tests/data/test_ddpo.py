"""RLHF-V's token weights on the cases of its code, and pairs that belong together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.preferences import corrected, pairs, token_weights
from reverie_jax.data.tokenization import Tokens
from reverie_jax.errors import DataError


def marked(rejected: list[int], chosen: list[int]) -> tuple[list[int], list[int]]:
    one, other = corrected(rejected, chosen)
    return np.flatnonzero(one).tolist(), np.flatnonzero(other).tolist()


def test_one_token_replaced_is_one_on_each_side():
    assert marked([*range(10)], [*range(5), 77, *range(6, 10)]) == ([5], [5])


def test_corrections_two_tokens_apart_are_one_span():
    changed = [*range(4), 70, 5, 6, 71, *range(8, 12)]
    assert marked([*range(12)], changed) == ([4, 5, 6, 7], [4, 5, 6, 7])


def test_corrections_three_tokens_apart_are_two():
    changed = [*range(4), 70, 5, 6, 7, 71, *range(9, 13)]
    assert marked([*range(13)], changed) == ([4, 8], [4, 8])


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_only_inserted_or_deleted_does_not_count(turned):
    short, long = [*range(10)], [*range(5), 70, 71, *range(5, 10)]
    assert marked(*((long, short) if turned else (short, long))) == ([], [])


def test_frequent_tokens_begin_no_match_in_long_sequences():
    """difflib's autojunk: the unchanged tail of frequent ids behind a correction counts as corrected."""
    head, tail = list(range(1000, 1100)), [1, 2, 3, 4, 5] * 33
    one, other = marked([*head, 7, *tail], [*head, 8, *tail])
    assert one == other == list(range(100, 266))
    short = marked([*head[:20], 7, *tail[:30]], [*head[:20], 8, *tail[:30]])
    assert short == ([20], [20])


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_nothing_is_corrected_between_equals_and_only_replacements_count(one, other):
    assert marked(one, one) == ([], []) or 0 < len(one) < 3  # too short for a match that counts
    left, right = corrected(one, other)
    assert left.any() == right.any()


def tokens(ids: list[int], taught: int, pictures: list[int]) -> Tokens:
    """Ids with the last `taught` of weight 1; `pictures` are places that hold three patches each."""
    out, features, weights = [], [], []
    for place, id in enumerate(ids):
        count = 3 if place in pictures else 1
        out += [id] * count
        features += [*range(3)] if count == 3 else [-1]
        weights += [1.0 if place >= len(ids) - taught else 0.0] * count
    return Tokens(np.asarray(out, np.int32), np.asarray(weights, np.float32), np.asarray(features, np.int32))


def test_weights_lie_on_corrected_taught_tokens_alone():
    rejected, chosen = (
        tokens([1, 9, 5, *said], 8, [1]) for said in ([*range(20, 28)], [20, 21, 22, 70, *range(24, 28)])
    )
    left, right = token_weights(rejected, chosen, 5.0)
    assert left.weights.tolist() == right.weights.tolist() == [0] * 5 + [1, 1, 1, 5, 1, 1, 1, 1]
    assert rejected.weights.max() == 1  # what was given stays as it was
    same, _ = token_weights(rejected, chosen, 1.0)
    assert np.array_equal(same.weights, rejected.weights)


def test_a_correction_in_the_prompt_has_no_weight():
    one, other = tokens([1, 2, 3, 4, 5, 6], 3, []), tokens([1, 2, 9, 4, 5, 6], 3, [])
    left, right = token_weights(one, other, 5.0)
    assert left.weights.tolist() == right.weights.tolist() == [0, 0, 0, 1, 1, 1]


def side(kind: str, pair: str, answer: str) -> Conversation:
    return Conversation((Turn("user", "What?"), Turn("assistant", answer)), (), kind=kind, pair=pair)


def test_sides_find_each_other():
    talks = [side("chosen", "1", "a"), side("chosen", "2", "b"), side("rejected", "2", "c"), side("rejected", "1", "d")]
    talks.insert(1, Conversation((Turn("user", "What?"), Turn("assistant", "x")), ()))
    assert [(one.turns[1].text, other.turns[1].text) for one, other in pairs("r", talks)] == [("a", "d"), ("b", "c")]


@pytest.mark.parametrize(
    ("talks", "why"),
    [
        ([side("chosen", "1", "a")], "one side only"),
        ([side("rejected", "1", "a")], "one side only"),
        ([side("chosen", "1", "a"), side("chosen", "1", "b"), side("rejected", "1", "c")], "two chosen"),
    ],
)
def test_lonely_and_doubled_sides_are_named(talks, why):
    with pytest.raises(DataError, match=f"record r: the pair '1' has {why}"):
        pairs("r", talks)
