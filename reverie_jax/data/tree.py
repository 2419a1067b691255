"""Conversation trees: the conversations about one image as one trie, laid out as a sequence for the model.

Conversations that begin with the same tokens share these tokens, which are computed once. In a causal model an activation
depends only on the tokens before it, so this is exact: loss and gradients equal those of the separate conversations.

For example, three conversations about an image, each letter a token, supervised tokens in capitals:

    i q A w E       a question, its answer, "why?", an explanation
    i q A v F       the same answer with another explanation
    i p B           another question

    i -+- q --- A -+- w --- E       index       0  1  2  3  4  5  6  7  8
       |           +- v --- F       tokens      i  q  A  w  E  v  F  p  B
       +- p --- B                   positions   0  1  2  3  4  3  4  1  2
                                    ends        9  7  7  5  5  7  7  9  9

- A *node* is a token of the tree. Nodes are laid out depth-first; `positions` is a node's depth, its RoPE position in the
  conversation.
- `ends` is one past the last index of a node's subtree. It is the attention mask: query i sees key j iff j <= i < ends[j].
  Ordinary causal attention is the case in which all ends are the length.
- A *branch* is one of the conversations, by number. Its *leaf* is its last token: `leaves` is [4, 6, 8].
- An *edge* is a supervised prediction: the model predicts the token `target` at the index `parent`. Its `weight` is summed
  over the conversations that share it, and its `branch` is the first of them. Here `parent` is [1, 3, 5, 7], `target`
  [A, E, F, B], `weight` [2, 1, 1, 1] and `branch` [0, 0, 1, 2].
- An edge's *origin* is the dataset that its branch comes from (`packing.Batch.origin`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from reverie_jax.data.tokenization import Tokens


@dataclasses.dataclass(frozen=True)
class ConversationTree:
    """A tree of L nodes, E edges and C conversations. The module's docstring defines the terms.

    Attributes:
        tokens: token id of each node.
        positions: depth of each node.
        ends: one past the last index of each node's subtree.
        image_slots: image feature that a node takes, image * P + patch; -1 for text.
        parent: index of the node that predicts.
        target: token id that it should predict.
        weight: loss weight, summed over the conversations that share the edge.
        branch: the first conversation in which the edge is supervised.
        leaves: index of each conversation's last token.
        flat_tokens: tokens of the conversations without sharing: what other trainers compute.
    """

    tokens: Int32[np.ndarray, "L"]
    positions: Int32[np.ndarray, "L"]
    ends: Int32[np.ndarray, "L"]
    image_slots: Int32[np.ndarray, "L"]
    parent: Int32[np.ndarray, "E"]
    target: Int32[np.ndarray, "E"]
    weight: Float32[np.ndarray, "E"]
    branch: Int32[np.ndarray, "E"]
    leaves: Int32[np.ndarray, "C"]
    flat_tokens: int

    def __len__(self) -> int:
        return len(self.tokens)


def shared_length(one: tuple[Any, Any], other: tuple[Any, Any]) -> int:
    """Return the number of tokens that two (ids, image slots) have in common at their beginning."""
    length = min(len(one[0]), len(other[0]))
    differs = (one[0][:length] != other[0][:length]) | (one[1][:length] != other[1][:length])
    return int(differs.argmax()) if differs.any() else length


def unsupervised(conversation: Tokens) -> Tokens:
    """Return the conversation with all loss weights 0, as for a question to be answered."""
    return dataclasses.replace(conversation, weights=np.zeros_like(conversation.weights))


class _Run:
    """Nodes in a row without a fork between them, and the runs that follow (a radix tree).

    Attributes:
        ids, image_slots: as in `Tokens`.
        weights: float64, summed over the conversations that share the run.
        first: the first conversation in which each token is supervised; -1 for none.
        children: runs that follow, by the first token and image slot of each.
    """

    __slots__ = ("children", "first", "ids", "image_slots", "weights")

    def __init__(self, ids: Any, image_slots: Any, weights: Any, first: Any) -> None:
        self.ids, self.image_slots, self.weights, self.first = ids, image_slots, weights, first
        self.children: dict[tuple[int, int], _Run] = {}

    def key(self) -> tuple[int, int]:
        return int(self.ids[0]), int(self.image_slots[0])

    def cut(self, length: int) -> _Run:
        """Move the first `length` tokens to a new run that this one follows; conversations that end here still do."""
        above = _Run(self.ids[:length], self.image_slots[:length], self.weights[:length], self.first[:length])
        self.ids, self.image_slots = self.ids[length:], self.image_slots[length:]
        self.weights, self.first = self.weights[length:], self.first[length:]
        above.children[self.key()] = self
        return above


class Trie:
    """A trie of conversations, built one conversation at a time; `tree` lays it out."""

    def __init__(self) -> None:
        self._root = _Run(*(np.zeros(0, kind) for kind in (np.int32, np.int32, np.float64, np.int32)))
        self._last: list[_Run] = []
        self._flat = self._size = self._edges = 0

    def __len__(self) -> int:
        """Return the number of nodes."""
        return self._size

    @property
    def edges(self) -> int:
        """Number of supervised tokens."""
        return self._edges

    @property
    def branches(self) -> int:
        """Number of conversations."""
        return len(self._last)

    def _walk(self, conversation: Tokens) -> Iterator[tuple[_Run, int, int]]:
        """Yield (run, index in the conversation where the run begins, number of shared tokens) from the root down."""
        run, start = self._root, 0
        while start < len(conversation):
            child = run.children.get((int(conversation.ids[start]), int(conversation.image_slots[start])))
            if child is None:
                return
            shared = shared_length(
                (child.ids, child.image_slots), (conversation.ids[start:], conversation.image_slots[start:])
            )
            yield child, start, shared
            if shared < len(child.ids):
                return
            run, start = child, start + shared

    def cost(self, conversation: Tokens) -> tuple[int, int]:
        """Return the number of nodes and of edges that the conversation would add."""
        supervised = conversation.weights > 0
        tokens, edges = len(conversation), int(supervised.sum())
        for run, start, shared in self._walk(conversation):
            tokens -= shared
            edges -= int((supervised[start : start + shared] & (run.weights[:shared] > 0)).sum())
        return tokens, edges

    def add(self, conversation: Tokens) -> None:
        """Add a conversation.

        Raises:
            ValueError: the conversation is empty, or its first token, which nothing predicts, is supervised.
        """
        if not len(conversation):
            raise ValueError("the conversation has no tokens")
        if conversation.weights[0] > 0:
            raise ValueError("the first token of a conversation cannot be supervised: no token predicts it")
        branch, parent, done = len(self._last), self._root, 0
        for run, start, shared in list(self._walk(conversation)):
            if shared < len(run.ids):
                run = parent.children[run.key()] = run.cut(shared)
            weights = conversation.weights[start : start + shared].astype(np.float64)
            newly = (weights > 0) & (run.weights == 0)
            self._edges += int(np.count_nonzero(newly))
            run.first = np.where(newly, branch, run.first)
            run.weights = run.weights + weights
            parent, done = run, start + shared
        if done < len(conversation):
            weights = conversation.weights[done:].astype(np.float64)
            first = np.where(weights > 0, branch, -1).astype(np.int32)
            rest = _Run(conversation.ids[done:], conversation.image_slots[done:], weights, first)
            parent.children[rest.key()] = rest
            parent = rest
            self._size += len(rest.ids)
            self._edges += int(np.count_nonzero(weights))
        self._last.append(parent)
        self._flat += len(conversation)

    def tree(self) -> ConversationTree:
        """Return the tree in depth-first order, children in the order in which they were added."""
        runs: list[_Run] = []
        start: dict[int, int] = {}  # index of a run's first node, by the run's identity
        above: list[int] = []  # index of the node before a run; -1 for none
        depth: list[int] = []
        ends: list[int] = []
        size = 0
        # A run is visited twice: to be laid out, and (as its number) when all runs below it are.
        stack: list[tuple[_Run | int, int, int]] = [(run, -1, 0) for run in reversed(self._root.children.values())]
        while stack:
            run, before, run_depth = stack.pop()
            if isinstance(run, int):
                ends[run] = size
                continue
            start[id(run)] = size
            size += len(run.ids)
            stack.append((len(runs), 0, 0))
            stack += [(child, size - 1, run_depth + len(run.ids)) for child in reversed(run.children.values())]
            runs.append(run)
            above.append(before)
            depth.append(run_depth)
            ends.append(0)
        lengths = np.asarray([len(run.ids) for run in runs], np.int32)
        starts = np.cumsum(lengths) - lengths
        index = np.arange(size, dtype=np.int32)
        parents = index - 1
        parents[starts] = above

        def concatenate(parts: list[Any], dtype: Any) -> Any:
            return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

        tokens = concatenate([run.ids for run in runs], np.int32)
        weight = concatenate([run.weights for run in runs], np.float64)
        supervised = weight > 0
        return ConversationTree(
            tokens=tokens,
            positions=index - np.repeat(starts - np.asarray(depth, np.int32), lengths).astype(np.int32),
            ends=np.repeat(np.asarray(ends, np.int32), lengths),
            image_slots=concatenate([run.image_slots for run in runs], np.int32),
            parent=parents[supervised],
            target=tokens[supervised],
            weight=weight[supervised].astype(np.float32),
            branch=concatenate([run.first for run in runs], np.int32)[supervised],
            leaves=np.asarray([start[id(run)] + len(run.ids) - 1 for run in self._last], np.int32),
            flat_tokens=self._flat,
        )


def build_tree(conversations: Iterable[Tokens]) -> ConversationTree:
    """Return one tree of all conversations."""
    trie = Trie()
    for conversation in conversations:
        trie.add(conversation)
    return trie.tree()


def build_trees(
    conversations: Sequence[Tokens], *, tokens: int, edges: int, branches: int | None = None
) -> list[tuple[list[int], ConversationTree]]:
    """Return few trees of the conversations, each within the given sizes.

    Each conversation, in order, joins the tree to which it adds the fewest tokens, so that conversations which share more
    than the prompt stay together.

    Args:
        conversations: the conversations about one image.
        tokens: most nodes in a tree.
        edges: most supervised tokens in a tree.
        branches: most conversations in a tree; unlimited by default.

    Returns:
        For each tree, the indices of its conversations in order, and the tree.

    Raises:
        ValueError: a single conversation does not fit; its index and length are given.
    """
    open_tries: list[tuple[list[int], Trie]] = []
    for index, conversation in enumerate(conversations):
        best: tuple[int, list[int], Trie] | None = None
        for members, trie in open_tries:
            more, supervised = trie.cost(conversation)
            fits = len(trie) + more <= tokens and trie.edges + supervised <= edges
            fits = fits and (branches is None or trie.branches < branches)
            if fits and (best is None or more < best[0]):
                best = more, members, trie
        if best is None:
            trie = Trie()
            more, supervised = trie.cost(conversation)
            if more > tokens or supervised > edges:
                raise ValueError(
                    f"conversation {index} has {more} tokens, {supervised} of them supervised; "
                    f"a sequence has room for {tokens} tokens and {edges} supervised ones"
                )
            best = more, [], trie
            open_tries.append(best[1:])
        best[2].add(conversation)
        best[1].append(index)
    return [(members, trie.tree()) for members, trie in open_tries]
