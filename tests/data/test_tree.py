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
from tests.data.fakes import Node, text_tokens, token_lists


def nodes_of(conversation: Tokens) -> list[Node]:
    return list(zip(conversation.ids.tolist(), conversation.image_slots.tolist(), strict=True))


def prefixes(conversation: Tokens) -> list[tuple[Node, ...]]:
    return [tuple(nodes_of(conversation)[: n + 1]) for n in range(len(conversation))]


def path(tree: ConversationTree, index: int) -> list[int]:
    """Indices of a node's ancestors and its own, from the root down: what it may see."""
    return [j for j in range(index + 1) if index < tree.ends[j]]


def names(tree: ConversationTree, index: int) -> tuple[Node, ...]:
    """A node by the tokens from the root to it."""
    return tuple((int(tree.tokens[j]), int(tree.image_slots[j])) for j in path(tree, index))


@given(token_lists(1))
def test_nodes_and_leaves_are_the_conversations_prefixes(drawn):
    tree = build_tree(drawn)
    nodes = [names(tree, index) for index in range(len(tree))]
    # The prefixes, each once, in the order of first appearance; depth-first order keeps it among siblings.
    arrival = list(dict.fromkeys(prefix for conversation in drawn for prefix in prefixes(conversation)))
    assert sorted(nodes) == sorted(arrival)
    assert tree.positions.tolist() == [len(node) - 1 for node in nodes]
    assert tree.flat_tokens == sum(map(len, drawn))
    siblings = defaultdict(list)
    for node in nodes:
        siblings[node[:-1]].append(arrival.index(node))
    assert all(a < b for group in siblings.values() for a, b in pairwise(group))
    assert [list(nodes[leaf]) for leaf in tree.leaves] == [nodes_of(conversation) for conversation in drawn]


@given(token_lists(1))
def test_mask_is_the_ancestor_matrix(drawn):
    tree = build_tree(drawn)
    # Parents by depth alone: in depth-first order, a node's parent is the last one before it that is one higher up.
    ancestors = np.zeros((len(tree), len(tree)), bool)
    last: dict[int, int] = {}
    for i, depth in enumerate(tree.positions.tolist()):
        last[depth] = i
        if depth:
            ancestors[i] = ancestors[last[depth - 1]]
        ancestors[i, i] = True
    i, j = np.arange(len(tree))[:, None], np.arange(len(tree))[None, :]
    assert np.array_equal((j <= i) & (i < tree.ends[None, :]), ancestors)


@given(token_lists(1))
def test_edges_have_the_sum_of_the_conversations_weights(drawn):
    tree = build_tree(drawn)
    total: dict[tuple[Node, ...], float] = defaultdict(float)
    first: dict[tuple[Node, ...], int] = {}
    for number, conversation in enumerate(drawn):
        for prefix, weight in zip(prefixes(conversation), conversation.weights.tolist(), strict=True):
            if weight > 0:
                total[prefix] += weight
                first.setdefault(prefix, number)
    edges = zip(tree.parent.tolist(), tree.target.tolist(), tree.weight.tolist(), tree.branch.tolist(), strict=True)
    result = [(names(tree, parent), target, weight, branch) for parent, target, weight, branch in edges]
    brute = [(prefix[:-1], prefix[-1][0], weight, first[prefix]) for prefix, weight in total.items()]
    assert sorted(result) == sorted(brute)


@given(token_lists(1))
def test_repeated_conversations_add_weight_but_no_node(drawn):
    once, twice = build_tree(drawn), build_tree([*drawn, *drawn])
    for field in ("tokens", "positions", "ends", "image_slots", "parent", "target", "branch"):
        assert np.array_equal(getattr(once, field), getattr(twice, field)), field
    assert np.array_equal(2 * once.weight, twice.weight)
    assert np.array_equal(np.tile(once.leaves, 2), twice.leaves)
    bare = build_tree([unsupervised(conversation) for conversation in drawn])
    assert len(bare.parent) == len(bare.target) == len(bare.weight) == len(bare.branch) == 0
    assert np.array_equal(bare.tokens, once.tokens)


@given(token_lists(1))
def test_cost_is_what_adding_takes(drawn):
    trie = Trie()
    for conversation in drawn:
        nodes, edges = trie.cost(conversation)
        before = len(trie), trie.edges
        trie.add(conversation)
        assert (len(trie) - before[0], trie.edges - before[1]) == (nodes, edges)
    assert trie.branches == len(drawn)


@given(token_lists(1), st.integers(1, 30), st.integers(0, 12), st.sampled_from([None, 1, 2, 3]))
@example([text_tokens([1, 2, 3], [1, 1]), text_tokens([1, 2, 3], [1, 1])], 3, 2, None)
def test_trees_fit_and_hold_every_conversation(drawn, limit, edges, branches):
    sizes = [(len(conversation), int((conversation.weights > 0).sum())) for conversation in drawn]
    too_large = [n for n, (length, supervised) in enumerate(sizes) if length > limit or supervised > edges]
    if too_large:
        with pytest.raises(ValueError, match=rf"conversation {too_large[0]} has {sizes[too_large[0]][0]} tokens"):
            build_trees(drawn, tokens=limit, edges=edges, branches=branches)
        return
    parts = build_trees(drawn, tokens=limit, edges=edges, branches=branches)
    assert sorted(index for members, _ in parts for index in members) == list(range(len(drawn)))
    for number, (members, tree) in enumerate(parts):
        assert members == sorted(members)
        assert len(tree) <= limit
        assert len(tree.parent) <= edges
        assert branches is None or len(members) <= branches
        assert np.array_equal(tree.tokens, build_tree([drawn[index] for index in members]).tokens)
        # A tree is opened only for a conversation that fits none of those before it.
        for earlier, _ in parts[:number]:
            rivals = [index for index in earlier if index < members[0]]
            both = build_tree([drawn[index] for index in [*rivals, members[0]]])
            assert len(both) > limit or len(both.parent) > edges or len(rivals) == branches


def test_a_conversation_joins_the_tree_to_which_it_adds_least():
    one, other = [1] * 6, [2] * 6
    drawn = [text_tokens([*path, leaf], [1]) for leaf in (3, 4) for path in (one, other)]
    assert [members for members, _ in build_trees(drawn, tokens=8, edges=9)] == [[0, 2], [1, 3]]


def test_no_conversations_give_no_tree():
    assert build_trees([], tokens=5, edges=5) == []
    tree = build_tree([])
    assert (len(tree), len(tree.leaves)) == (0, 0)


@pytest.mark.parametrize(("bad", "why"), [(text_tokens([]), "no tokens"), (text_tokens([1, 2], [1, 1]), "first token")])
def test_a_conversation_without_anything_before_an_answer_is_an_error(bad, why):
    with pytest.raises(ValueError, match=why):
        build_tree([text_tokens([1]), bad])


def test_the_example_of_the_module_docstring():
    i, q, a, w, e, v, f, p, b = range(10, 19)
    drawn = [
        text_tokens([i, q, a, w, e], [1, 0, 1]),
        text_tokens([i, q, a, v, f], [1, 0, 1]),
        text_tokens([i, p, b], [1]),
    ]
    tree = build_tree(drawn)
    assert tree.tokens.tolist() == [i, q, a, w, e, v, f, p, b]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 1, 2]
    assert tree.ends.tolist() == [9, 7, 7, 5, 5, 7, 7, 9, 9]
    assert tree.leaves.tolist() == [4, 6, 8]
    assert (tree.parent.tolist(), tree.target.tolist()) == ([1, 3, 5, 7], [a, e, f, b])
    assert (tree.weight.tolist(), tree.branch.tolist()) == ([2, 1, 1, 1], [0, 0, 1, 2])
    assert tree.flat_tokens == 13
