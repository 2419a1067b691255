"""The conversation tree against a brute force that knows nothing of tries: sets and sums over prefixes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import ConversationTree, Trie, build_tree, build_trees, unsupervised

WEIGHTS = (0.0, 0.0, 0.5, 1.0, 3.0)  # exact in float32, so sums are too
Place = tuple[int, int]


def tokens_of(places: list[Place], weights: list[float]) -> Tokens:
    ids, features = zip(*places, strict=True) if places else ((), ())
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(features, np.int32))


def plain(ids: list[int], taught: int = 0) -> Tokens:
    """Text tokens, the last `taught` of them with weight 1."""
    return tokens_of([(i, -1) for i in ids], [0.0] * (len(ids) - taught) + [1.0] * taught)


@st.composite
def many(draw: st.DrawFn, most: int = 7) -> list[Tokens]:
    """Conversations of a few shared segments, so that prefixes are shared at all depths and some repeat altogether."""
    place = st.tuples(st.integers(1, 3), st.sampled_from((-1, -1, -1, 0, 1, 5)))
    segments = draw(st.lists(st.lists(place, min_size=1, max_size=4), min_size=1, max_size=4))
    plans = st.lists(st.integers(0, len(segments) - 1), min_size=1, max_size=4)
    found = []
    for plan in draw(st.lists(plans, min_size=1, max_size=most)):
        places = [p for number in plan for p in segments[number]]
        size = len(places) - 1
        weights = draw(st.lists(st.sampled_from(WEIGHTS), min_size=size, max_size=size))
        found.append(tokens_of(places, [0.0, *weights]))
    return found


def places(talk: Tokens) -> list[Place]:
    return list(zip(talk.ids.tolist(), talk.image_slots.tolist(), strict=True))


def sees(tree: ConversationTree) -> np.ndarray:
    """The rule, as the design states it: query i sees key j iff j <= i < ends[j]."""
    i, j = np.arange(len(tree))[:, None], np.arange(len(tree))[None, :]
    return (j <= i) & (i < tree.ends[None, :])


def path(tree: ConversationTree, index: int) -> list[int]:
    """Row indices of a token's ancestors and its own, from the root down."""
    return [j for j in range(index + 1) if index < tree.ends[j]]


def names(tree: ConversationTree, index: int) -> tuple[Place, ...]:
    return tuple((int(tree.tokens[j]), int(tree.image_slots[j])) for j in path(tree, index))


def prefixes(talks: list[Tokens]) -> set[tuple[Place, ...]]:
    return {tuple(places(talk)[: n + 1]) for talk in talks for n in range(len(talk))}


@given(many())
def test_walking_up_from_a_leaf_gives_its_conversation_back(talks):
    tree = build_tree(talks)
    assert len(tree.leaves) == len(talks)
    for talk, leaf in zip(talks, tree.leaves.tolist(), strict=True):
        assert list(names(tree, leaf)) == places(talk)
        assert tree.positions[path(tree, leaf)].tolist() == list(range(len(talk)))


@given(many())
def test_rule_is_the_ancestor_matrix(talks):
    tree = build_tree(talks)
    # Parents by depth alone: in depth-first order, a token's parent is the last one before it that is one higher up.
    ancestors = np.zeros((len(tree), len(tree)), bool)
    last: dict[int, int] = {}
    for i, depth in enumerate(tree.positions.tolist()):
        last[depth] = i
        if depth:
            ancestors[i] = ancestors[last[depth - 1]]
        ancestors[i, i] = True
    assert np.array_equal(sees(tree), ancestors)


@given(many())
def test_nodes_are_the_distinct_prefixes(talks):
    tree = build_tree(talks)
    found = [names(tree, index) for index in range(len(tree))]
    assert len(set(found)) == len(found)  # so no two siblings are alike either
    assert set(found) == prefixes(talks)
    assert tree.flat_tokens == sum(map(len, talks))


@given(many())
def test_siblings_differ_in_token_or_feature(talks):
    tree, children = build_tree(talks), defaultdict(list)
    for index in range(len(tree)):
        children[tuple(path(tree, index)[:-1])].append((int(tree.tokens[index]), int(tree.image_slots[index])))
    assert all(len(set(group)) == len(group) for group in children.values())
    assert sum(map(len, children.values())) == len(tree)


@given(many())
def test_edges_carry_the_sum_of_the_conversations_weights(talks):
    tree = build_tree(talks)
    wanted: dict[tuple[Place, ...], float] = defaultdict(float)
    first: dict[tuple[Place, ...], int] = {}
    for number, talk in enumerate(talks):
        for n, weight in enumerate(talk.weights.tolist()):
            if weight > 0:
                key = tuple(places(talk)[: n + 1])
                wanted[key] += weight
                first.setdefault(key, number)
    edges = zip(tree.parent.tolist(), tree.target.tolist(), tree.weight.tolist(), tree.branch.tolist(), strict=True)
    found = [(names(tree, source), target, weight, branch) for source, target, weight, branch in edges]
    brute = [(key[:-1], key[-1][0], weight, first[key]) for key, weight in wanted.items()]
    assert sorted(found) == sorted(brute)


@given(many())
def test_children_and_leaves_keep_the_order_of_arrival(talks):
    tree = build_tree(talks)
    # The prefixes, each once, in the order of first appearance; depth-first order keeps it among siblings.
    arrived = list(dict.fromkeys(tuple(places(talk)[: n + 1]) for talk in talks for n in range(len(talk))))
    rank = {key: number for number, key in enumerate(arrived)}
    groups = defaultdict(list)
    for index in range(len(tree)):
        key = names(tree, index)
        groups[key[:-1]].append(rank[key])
    assert all(a < b for group in groups.values() for a, b in pairwise(group))


@given(many())
def test_repeated_conversations_add_weight_and_no_node(talks):
    once, twice = build_tree(talks), build_tree([*talks, *talks])
    for field in ("tokens", "positions", "ends", "image_slots", "parent", "target", "branch"):
        assert np.array_equal(getattr(once, field), getattr(twice, field)), field
    assert np.array_equal(2 * once.weight, twice.weight)
    assert np.array_equal(np.tile(once.leaves, 2), twice.leaves)


@given(many())
def test_untaught_conversations_have_no_edges(talks):
    tree = build_tree([unsupervised(talk) for talk in talks])
    assert len(tree.parent) == len(tree.target) == len(tree.weight) == len(tree.branch) == 0
    assert np.array_equal(tree.tokens, build_tree(talks).tokens)


@given(many())
def test_cost_is_what_adding_does(talks):
    trie = Trie()
    for talk in talks:
        nodes, edges = trie.cost(talk)
        before = len(trie), trie.edges
        trie.add(talk)
        assert len(trie) - before[0] == nodes
        assert trie.edges - before[1] == edges


@given(many(), st.integers(1, 30), st.integers(0, 12))
@example([plain([1, 2, 3], 2), plain([1, 2, 3], 2)], 3, 2)
def test_grow_within_fits_and_covers_all(talks, limit, edges):
    alone = [(len(talk), int((talk.weights > 0).sum())) for talk in talks]
    if any(length > limit or taught > edges for length, taught in alone):
        bad = next(n for n, (length, taught) in enumerate(alone) if length > limit or taught > edges)
        with pytest.raises(ValueError, match=rf"conversation {bad} has {alone[bad][0]} tokens"):
            build_trees(talks, tokens=limit, edges=edges)
        return
    parts = build_trees(talks, tokens=limit, edges=edges)
    assert sorted(index for members, _ in parts for index in members) == list(range(len(talks)))
    for number, (members, tree) in enumerate(parts):
        assert members == sorted(members)
        assert len(tree) <= limit
        assert len(tree.parent) <= edges
        assert np.array_equal(tree.tokens, build_tree([talks[index] for index in members]).tokens)
        # A tree is opened only for a conversation that fitted in none of those before it.
        for earlier, _ in parts[:number]:
            both = build_tree([talks[index] for index in earlier if index < members[0]] + [talks[members[0]]])
            assert len(both) > limit or len(both.parent) > edges


@given(many(), st.integers(1, 3))
def test_branches_of_a_tree_are_bounded(talks, most):
    parts = build_trees(talks, tokens=100, edges=100, branches=most)
    assert all(len(members) <= most for members, _ in parts)
    assert len(parts) == -(-len(talks) // most)


def test_branches_go_where_they_add_least():
    one, other = [1] * 6, [2] * 6
    talks = [plain([*one, 3], 1), plain([*other, 3], 1), plain([*one, 4], 1), plain([*other, 4], 1)]
    assert [members for members, _ in build_trees(talks, tokens=8, edges=9)] == [[0, 2], [1, 3]]


def test_nothing_grows_from_nothing():
    assert build_trees([], tokens=5, edges=5) == []
    tree = build_tree([])
    assert len(tree) == 0
    assert len(tree.leaves) == 0


def test_empty_conversation_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        build_tree([plain([1]), plain([])])


def test_teaching_the_first_token_is_refused():
    with pytest.raises(ValueError, match="first token"):
        build_tree([plain([1, 2], 2)])


def test_images_part_where_their_features_do():
    one = tokens_of([(9, 0), (9, 1), (5, -1)], [0, 0, 1.0])
    two = tokens_of([(9, 2), (9, 3), (5, -1)], [0, 0, 1.0])
    tree = build_tree([one, two])
    assert tree.tokens.tolist() == [9, 9, 5, 9, 9, 5]
    assert tree.ends.tolist() == [3, 3, 3, 6, 6, 6]
    assert tree.parent.tolist() == [1, 4]


def test_a_small_tree_by_hand():
    tree = build_tree([plain([1, 2, 3, 4], 1), plain([1, 2, 5], 1), plain([1, 2], 1), plain([1, 2, 5, 6], 2)])
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert tree.positions.tolist() == [0, 1, 2, 3, 2, 3]
    assert tree.ends.tolist() == [6, 6, 4, 4, 6, 6]
    assert tree.leaves.tolist() == [3, 4, 1, 5]
    assert (tree.parent.tolist(), tree.target.tolist()) == ([0, 2, 1, 4], [2, 4, 5, 6])
    assert (tree.weight.tolist(), tree.branch.tolist()) == ([1, 1, 2, 1], [2, 0, 1, 3])
    assert tree.flat_tokens == 13
