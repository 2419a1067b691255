"""Conversation trees: an image's conversations as one trie, laid out as a row.

Tokens that share their whole past are one node, computed once. In a causal model a token's activation depends on its
ancestors only, so this is exact: the loss and its gradients equal those of the conversations run apart.

The layout is depth-first. For the token at row index j, `positions[j]` is its depth (its RoPE position in the flat
conversation), and `ends[j]` is one past the last index of its subtree: query i sees key j iff j <= i < ends[j].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from reverie_jax.data.conversation import Tokens


@dataclasses.dataclass(frozen=True)
class ConversationTree:
    """A trie of conversations, depth-first, with the edges that are taught.

    Attributes:
        tokens, positions, ends: see the module's text.
        features: which image feature goes here, image * P + patch; -1 for text.
        source: row index of an edge's parent token; the prediction is made there.
        target: token id that the edge predicts.
        weight: loss weight, summed over the conversations that share the edge.
        branch: the first conversation that teaches the edge.
        leaves: row index of each conversation's last token, in the order that the conversations came.
    """

    tokens: Int32[np.ndarray, "L"]
    positions: Int32[np.ndarray, "L"]
    ends: Int32[np.ndarray, "L"]
    features: Int32[np.ndarray, "L"]
    source: Int32[np.ndarray, "E"]
    target: Int32[np.ndarray, "E"]
    weight: Float32[np.ndarray, "E"]
    branch: Int32[np.ndarray, "E"]
    leaves: Int32[np.ndarray, "C"]
    flat_tokens: int
    """Tokens of the conversations one by one: what a tree-less trainer would compute."""

    def __len__(self) -> int:
        return len(self.tokens)


def untaught(conversation: Tokens) -> Tokens:
    """The same tokens, none of them taught: a question that waits for its answer."""
    return dataclasses.replace(conversation, weights=np.zeros_like(conversation.weights))


class Trie:
    """Grows a trie one conversation at a time; `tree()` lays it out."""

    def __init__(self) -> None:
        self._children: list[dict[tuple[int, int], int]] = [{}]  # node 0 stands before every first token
        self._token: list[tuple[int, int]] = [(-1, -1)]
        self._parent: list[int] = [-1]
        self._taught: dict[int, tuple[float, int]] = {}
        self._last: list[int] = []
        self._flat = 0

    def __len__(self) -> int:
        """Nodes, one a row token."""
        return len(self._token) - 1

    @property
    def edges(self) -> int:
        return len(self._taught)

    def cost(self, conversation: Tokens) -> tuple[int, int]:
        """How many nodes and, at most, edges the conversation would add."""
        node, shared = 0, 0
        for key in zip(conversation.ids.tolist(), conversation.features.tolist(), strict=True):
            child = self._children[node].get(key)
            if child is None:
                break
            node, shared = child, shared + 1
        return len(conversation) - shared, int((conversation.weights > 0).sum())

    def add(self, conversation: Tokens) -> None:
        """Adds one conversation.

        Raises:
            ValueError: it is empty, or its first token is taught (nothing comes before it to predict it from).
        """
        if not len(conversation):
            raise ValueError("a conversation without tokens")
        if conversation.weights[0] > 0:
            raise ValueError("the first token of a conversation cannot be taught: nothing comes before it")
        node, branch = 0, len(self._last)
        self._flat += len(conversation)
        for token, feature, weight in zip(
            conversation.ids.tolist(), conversation.features.tolist(), conversation.weights.tolist(), strict=True
        ):
            children = self._children[node]
            child = children.get((token, feature))
            if child is None:
                child = len(self._token)
                children[token, feature] = child
                self._children.append({})
                self._token.append((token, feature))
                self._parent.append(node)
            if weight > 0:
                before, first = self._taught.get(child, (0.0, branch))
                self._taught[child] = (before + weight, first)
            node = child
        self._last.append(node)

    def tree(self) -> ConversationTree:
        """The trie in depth-first order, children in the order in which they came."""
        count = len(self)
        index = np.zeros(count + 1, np.int32)
        order: list[int] = []
        stack = [iter(self._children[0].values())]
        ends, positions = np.zeros(count, np.int32), np.zeros(count, np.int32)
        open_nodes: list[int] = []
        while stack:
            node = next(stack[-1], None)
            if node is None:
                stack.pop()
                if open_nodes:
                    ends[open_nodes.pop()] = len(order)
                continue
            index[node] = len(order)
            positions[len(order)] = len(open_nodes)
            open_nodes.append(len(order))
            order.append(node)
            stack.append(iter(self._children[node].values()))
        token = np.asarray([self._token[node] for node in order], np.int32).reshape(-1, 2)
        taught = sorted(self._taught, key=lambda node: index[node])
        return ConversationTree(
            tokens=token[:, 0].copy(),
            positions=positions,
            ends=ends,
            features=token[:, 1].copy(),
            source=index[[self._parent[node] for node in taught]].astype(np.int32),
            target=np.asarray([self._token[node][0] for node in taught], np.int32),
            weight=np.asarray([self._taught[node][0] for node in taught], np.float32),
            branch=np.asarray([self._taught[node][1] for node in taught], np.int32),
            leaves=index[self._last].astype(np.int32),
            flat_tokens=self._flat,
        )


def grow(conversations: Iterable[Tokens]) -> ConversationTree:
    """One tree of all the conversations."""
    trie = Trie()
    for conversation in conversations:
        trie.add(conversation)
    return trie.tree()


def grow_within(
    conversations: Sequence[Tokens], *, tokens: int, edges: int
) -> Iterator[tuple[list[int], ConversationTree]]:
    """Trees that each fit a row, conversations kept in order.

    Yields:
        The indices of a tree's conversations, and the tree.

    Raises:
        ValueError: a single conversation does not fit; its index and length are named.
    """
    trie = Trie()
    members: list[int] = []
    for index, conversation in enumerate(conversations):
        more_tokens, more_edges = trie.cost(conversation)
        if members and (len(trie) + more_tokens > tokens or trie.edges + more_edges > edges):
            yield members, trie.tree()
            trie, members = Trie(), []
            more_tokens, more_edges = trie.cost(conversation)
        if more_tokens > tokens or more_edges > edges:
            raise ValueError(
                f"conversation {index} has {more_tokens} tokens and teaches {more_edges}; "
                f"a row holds {tokens} tokens and {edges} taught ones"
            )
        trie.add(conversation)
        members.append(index)
    if members:
        yield members, trie.tree()
