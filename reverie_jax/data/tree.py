"""Conversation trees: an image's conversations as one trie, laid out as a row.

Tokens that share their whole past are one node, computed once. In a causal model a token's activation depends on its
ancestors only, so this is exact: the loss and its gradients equal those of the conversations run apart.

The layout is depth-first. For the token at row index j, `positions[j]` is its depth (its RoPE position in the flat
conversation), and `ends[j]` is one past the last index of its subtree: query i sees key j iff j <= i < ends[j].
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
    image_slots: Int32[np.ndarray, "L"]
    parent: Int32[np.ndarray, "E"]
    target: Int32[np.ndarray, "E"]
    weight: Float32[np.ndarray, "E"]
    branch: Int32[np.ndarray, "E"]
    leaves: Int32[np.ndarray, "C"]
    flat_tokens: int
    """Tokens of the conversations one by one: what a tree-less trainer would compute."""

    def __len__(self) -> int:
        return len(self.tokens)


def unsupervised(conversation: Tokens) -> Tokens:
    """The same tokens, none of them taught: a question that waits for its answer."""
    return dataclasses.replace(conversation, weights=np.zeros_like(conversation.weights))


class _Run:
    """Tokens that follow one another without a branch, and what comes after them.

    Attributes:
        ids, features: as in `Tokens`.
        weights: float64, summed over the conversations that came this way.
        first: the first conversation that teaches a token; -1 where none does.
    """

    __slots__ = ("children", "first", "ids", "image_slots", "weights")

    def __init__(self, ids: Any, image_slots: Any, weights: Any, first: Any) -> None:
        self.ids, self.image_slots, self.weights, self.first = ids, image_slots, weights, first
        self.children: dict[tuple[int, int], _Run] = {}

    def key(self) -> tuple[int, int]:
        return int(self.ids[0]), int(self.image_slots[0])

    def cut(self, length: int) -> _Run:
        """Gives the first `length` tokens to a new run that this one now follows. Whoever ends here still does."""
        above = _Run(self.ids[:length], self.image_slots[:length], self.weights[:length], self.first[:length])
        self.ids, self.image_slots = self.ids[length:], self.image_slots[length:]
        self.weights, self.first = self.weights[length:], self.first[length:]
        above.children[self.key()] = self
        return above


class Trie:
    """Grows a trie one conversation at a time, a run of tokens at a step; `tree()` lays it out."""

    def __init__(self) -> None:
        self._root = _Run(*(np.zeros(0, kind) for kind in (np.int32, np.int32, np.float64, np.int32)))
        self._last: list[_Run] = []
        self._flat = self._size = self._edges = 0

    def __len__(self) -> int:
        """Nodes, one a row token."""
        return self._size

    @property
    def edges(self) -> int:
        return self._edges

    @property
    def branches(self) -> int:
        """Conversations."""
        return len(self._last)

    def _walk(self, conversation: Tokens) -> Iterator[tuple[_Run, int, int]]:
        """(run, where the conversation meets it, how many tokens they share), from the root down."""
        run, place = self._root, 0
        while place < len(conversation):
            child = run.children.get((int(conversation.ids[place]), int(conversation.image_slots[place])))
            if child is None:
                return
            most = min(len(child.ids), len(conversation) - place)
            differs = (child.ids[:most] != conversation.ids[place : place + most]) | (
                child.image_slots[:most] != conversation.image_slots[place : place + most]
            )
            shared = int(differs.argmax()) if differs.any() else most
            yield child, place, shared
            if shared < len(child.ids):
                return
            run, place = child, place + shared

    def cost(self, conversation: Tokens) -> tuple[int, int]:
        """How many nodes and edges the conversation would add."""
        supervised = conversation.weights > 0
        tokens, edges = len(conversation), int(supervised.sum())
        for run, place, shared in self._walk(conversation):
            tokens -= shared
            edges -= int((supervised[place : place + shared] & (run.weights[:shared] > 0)).sum())
        return tokens, edges

    def add(self, conversation: Tokens) -> None:
        """Adds one conversation.

        Raises:
            ValueError: it is empty, or its first token is taught (nothing comes before it to predict it from).
        """
        if not len(conversation):
            raise ValueError("a conversation without tokens")
        if conversation.weights[0] > 0:
            raise ValueError("the first token of a conversation cannot be taught: nothing comes before it")
        branch, parent, done = len(self._last), self._root, 0
        for run, place, shared in list(self._walk(conversation)):
            if shared < len(run.ids):
                run = parent.children[run.key()] = run.cut(shared)
            weights = conversation.weights[place : place + shared].astype(np.float64)
            newly = (weights > 0) & (run.weights == 0)
            self._edges += int(np.count_nonzero(newly))
            run.first = np.where(newly, branch, run.first)
            run.weights = run.weights + weights
            parent, done = run, place + shared
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
        """The trie in depth-first order, children in the order in which they came."""
        runs: list[_Run] = []
        start: dict[int, int] = {}  # by identity: where a run begins
        above: list[int] = []  # row index of the token before a run; -1 for none
        depth: list[int] = []
        ends: list[int] = []
        size = 0
        # A run is met twice: to be laid out, and when all below it has been.
        stack: list[tuple[_Run | int, int, int]] = [(run, -1, 0) for run in reversed(self._root.children.values())]
        while stack:
            run, before, deep = stack.pop()
            if isinstance(run, int):
                ends[run] = size
                continue
            start[id(run)] = size
            size += len(run.ids)
            stack.append((len(runs), 0, 0))
            stack += [(child, size - 1, deep + len(run.ids)) for child in reversed(run.children.values())]
            runs.append(run)
            above.append(before)
            depth.append(deep)
            ends.append(0)
        lengths = np.asarray([len(run.ids) for run in runs], np.int32)
        starts = np.cumsum(lengths) - lengths
        index = np.arange(size, dtype=np.int32)
        parents = index - 1
        parents[starts] = above

        def joined(parts: list[Any], kind: Any) -> Any:
            return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)

        tokens = joined([run.ids for run in runs], np.int32)
        weight = joined([run.weights for run in runs], np.float64)
        supervised = weight > 0
        return ConversationTree(
            tokens=tokens,
            positions=index - np.repeat(starts - np.asarray(depth, np.int32), lengths).astype(np.int32),
            ends=np.repeat(np.asarray(ends, np.int32), lengths),
            image_slots=joined([run.image_slots for run in runs], np.int32),
            parent=parents[supervised],
            target=tokens[supervised],
            weight=weight[supervised].astype(np.float32),
            branch=joined([run.first for run in runs], np.int32)[supervised],
            leaves=np.asarray([start[id(run)] + len(run.ids) - 1 for run in self._last], np.int32),
            flat_tokens=self._flat,
        )


def build_tree(conversations: Iterable[Tokens]) -> ConversationTree:
    """One tree of all the conversations."""
    trie = Trie()
    for conversation in conversations:
        trie.add(conversation)
    return trie.tree()


def build_trees(
    conversations: Sequence[Tokens], *, tokens: int, edges: int, branches: int | None = None
) -> list[tuple[list[int], ConversationTree]]:
    """As few trees as it takes for each to fit a row: a tree too large shares out its branches.

    Conversations that share more than the prompt stay together where they can: each goes, in order, where it adds the
    fewest tokens.

    Args:
        tokens, edges: room of a row.
        branches: most conversations of a tree; any number by default.

    Returns:
        The indices of each tree's conversations, in order, and the tree.

    Raises:
        ValueError: a single conversation does not fit; its index and length are named.
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
                    f"conversation {index} has {more} tokens and teaches {supervised}; "
                    f"a row holds {tokens} tokens and {edges} taught ones"
                )
            best = more, [], trie
            open_tries.append(best[1:])
        best[2].add(conversation)
        best[1].append(index)
    return [(members, trie.tree()) for members, trie in open_tries]
