"""RLHF-V's token weights on the cases of its code, pairs that belong together, and trees of pairs by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.preferences import DPOConfig, build_pair_trees, find_corrections, find_pairs, token_weights
from reverie_jax.data.tokenization import Tokens
from reverie_jax.errors import DataError


def corrections(rejected: list[int], chosen: list[int]) -> tuple[list[int], list[int]]:
    one, other = find_corrections(rejected, chosen)
    return np.flatnonzero(one).tolist(), np.flatnonzero(other).tolist()


HEAD, TAIL = list(range(1000, 1100)), [1, 2, 3, 4, 5] * 33
INSERTED = [*range(5), 70, 71, *range(5, 10)]
CASES = {
    "one token": ([*range(10)], [*range(5), 77, *range(6, 10)], [5]),
    "two tokens apart are one span": ([*range(12)], [*range(4), 70, 5, 6, 71, *range(8, 12)], [4, 5, 6, 7]),
    "three tokens apart are two": ([*range(13)], [*range(4), 70, 5, 6, 7, 71, *range(9, 13)], [4, 8]),
    "inserted": ([*range(10)], INSERTED, []),
    "deleted": (INSERTED, [*range(10)], []),
    # difflib's autojunk: the unchanged tail of frequent ids after a correction counts as corrected.
    "frequent tokens, long": ([*HEAD, 7, *TAIL], [*HEAD, 8, *TAIL], list(range(100, 266))),
    "frequent tokens, short": ([*HEAD[:20], 7, *TAIL[:30]], [*HEAD[:20], 8, *TAIL[:30]], [20]),
}


@pytest.mark.parametrize(("rejected", "chosen", "expected"), CASES.values(), ids=CASES)
def test_corrections_are_those_of_rlhf_v(rejected, chosen, expected):
    assert corrections(rejected, chosen) == (expected, expected)


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_only_replacements_count(one, other):
    assert corrections(one, one) == ([], []) or 0 < len(one) < 3  # too short for a match that counts
    left, right = find_corrections(one, other)
    assert left.any() == right.any()


def tokens(ids: list[int], supervised: int, images: list[int]) -> Tokens:
    """Ids with the last `supervised` of weight 1; `images` are positions that hold three patches each."""
    out, slots, weights = [], [], []
    for index, id in enumerate(ids):
        count = 3 if index in images else 1
        out += [id] * count
        slots += [*range(3)] if count == 3 else [-1]
        weights += [1.0 if index >= len(ids) - supervised else 0.0] * count
    return Tokens(np.asarray(out, np.int32), np.asarray(weights, np.float32), np.asarray(slots, np.int32))


def test_gamma_weighs_corrected_supervised_tokens_alone():
    answers = [*range(20, 28)], [20, 21, 22, 70, *range(24, 28)]
    rejected, chosen = (tokens([1, 9, 5, *answer], 8, [1]) for answer in answers)
    left, right = token_weights(rejected, chosen, 5.0)
    assert left.weights.tolist() == right.weights.tolist() == [0] * 5 + [1, 1, 1, 5, 1, 1, 1, 1]
    assert rejected.weights.max() == 1  # the input is unchanged
    same, _ = token_weights(rejected, chosen, 1.0)
    assert np.array_equal(same.weights, rejected.weights)
    left, right = token_weights(tokens([1, 2, 3, 4, 5, 6], 3, []), tokens([1, 2, 9, 4, 5, 6], 3, []), 5.0)
    assert left.weights.tolist() == right.weights.tolist() == [0, 0, 0, 1, 1, 1]


def side(kind: str, pair: str, answer: str, **fields: Any) -> Conversation:
    return Conversation((Turn("user", "What?"), Turn("assistant", answer, **fields)), (), kind=kind, pair=pair)


def test_pairs_come_in_the_order_of_the_chosen_sides():
    sides = [side("chosen", "1", "a"), side("", "", "x"), side("chosen", "2", "b")]
    sides += [side("rejected", "2", "c"), side("rejected", "1", "d")]
    texts = [(one.turns[1].text, other.turns[1].text) for one, other in find_pairs("r", sides)]
    assert texts == [("a", "d"), ("b", "c")]
    again = [side("chosen", "1", "a"), side("chosen", "1", "a"), side("rejected", "1", "d"), side("rejected", "1", "d")]
    assert find_pairs("r", again) == [(again[0], again[2])] * 2  # a row twice in the data counts twice


@pytest.mark.parametrize(
    ("sides", "why"),
    [
        ([side("chosen", "1", "a")], "1 chosen and 0 rejected"),
        ([side("rejected", "1", "a")], "0 chosen and 1 rejected"),
        ([side("chosen", "1", "a"), side("chosen", "1", "b"), side("rejected", "1", "c")], "2 chosen and 1 rejected"),
        ([side("chosen", "1", "", prefix="a"), side("rejected", "1", "c")], "a chosen side without"),
    ],
)
def test_missing_and_duplicate_sides_are_named(sides, why):
    with pytest.raises(DataError, match=f"record r: pair '1' has {why}"):
        find_pairs("r", sides)


@st.composite
def answer_pairs(draw: st.DrawFn) -> list[tuple[Tokens, Tokens]]:
    """Pairs of answers to one of two questions about one image."""
    answers, pairs = st.lists(st.integers(10, 12), min_size=1, max_size=4), []
    for _ in range(draw(st.integers(1, 4))):
        question, (one, other) = draw(st.sampled_from([[5], [5, 6]])), draw(st.tuples(answers, answers))
        pairs.append(tuple(tokens([1, 9, *question, *answer], len(answer), [1]) for answer in (one, other)))
    return pairs


@given(answer_pairs(), st.sampled_from([DPOConfig(), DPOConfig(gamma=5.0, average=True)]), st.integers(14, 30))
def test_trees_hold_both_branches_of_each_pair_with_their_own_edges(pairs, config, room):
    sizes = {"tokens": room, "edges": room, "leaves": 6}
    trees = build_pair_trees(pairs, config, **sizes)
    assert sorted(member for members, _ in trees for member in members) == list(range(len(pairs)))
    for members, tree in trees:
        assert (len(tree) <= room, len(tree.parent) <= room, len(tree.leaves)) == (True, True, 2 * len(members))
        for number, member in enumerate(members):
            rejected, chosen = token_weights(pairs[member][1], pairs[member][0], config.gamma)
            for branch, one in ((2 * number, chosen), (2 * number + 1, rejected)):
                path = [j for j in range(tree.leaves[branch] + 1) if tree.leaves[branch] < tree.ends[j]]
                assert tree.tokens[path].tolist() == one.ids.tolist()
                supervised, edges = np.flatnonzero(one.weights), tree.branch == branch
                assert tree.parent[edges].tolist() == [path[index - 1] for index in supervised]
                assert tree.target[edges].tolist() == one.ids[supervised].tolist()
                expected = one.weights[supervised] / (one.weights.sum() if config.average else 1)
                np.testing.assert_allclose(tree.weight[edges], expected, rtol=1e-6)


def test_pairs_join_the_tree_to_which_they_add_least():
    questions = [[5] * 6, [6] * 6]
    pairs = [
        (tokens([1, *question, answer], 1, []), tokens([1, *question, 30], 1, []))
        for answer in (20, 21)
        for question in questions
    ]
    trees = build_pair_trees(pairs, DPOConfig(), tokens=11, edges=9, leaves=9)
    assert [members for members, _ in trees] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("room", [(7, 9, 2), (8, 3, 2), (8, 9, 1)], ids=["tokens", "edges", "leaves"])
def test_a_pair_that_does_not_fit_is_named(room):
    pair = tokens([1, 2, 3, 4, 5], 2, []), tokens([1, 2, 3, 6, 7, 8], 3, [])
    assert len(build_pair_trees([pair], DPOConfig(), tokens=8, edges=5, leaves=2)) == 1
    with pytest.raises(ValueError, match="pair 0"):
        build_pair_trees([pair], DPOConfig(), tokens=room[0], edges=room[1], leaves=room[2])
