"""Preference pairs: which conversations belong together, and RLHF-V's weights on what was corrected (arXiv 2312.00849)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from reverie_jax.data.conversation import Conversation
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import ConversationTree, Trie, unsupervised
from reverie_jax.errors import DataError

SHORTEST = 3
"""Tokens in common that count as unchanged; fewer between two corrections belong to them."""


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation over pairs of answers (Rafailov et al., arXiv 2305.18290), dense where `gamma` > 1
    (RLHF-V).

    Loss of a pair: weight * -log sigmoid(beta * (margin - the reference's margin)) - sft * s(chosen), where margin is
    s(chosen) - s(rejected), and s the weighted sum of an answer's log-probabilities.

    Attributes:
        beta: how firmly the reference holds.
        gamma: weight of corrected tokens.
        average: s is divided by the sum of its weights.
        weight, sft: of the two terms.
        reference: where the reference's sums come from. `adapters-off`: the same weights without adapters, in the same
            step, so fresh adapters only. `stored`: counted once before the first step, with the model as it starts.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    beta: float = 0.1
    gamma: float = 1.0
    average: bool = False
    weight: float = 1.0
    sft: float = 0.0
    reference: Literal["adapters-off", "stored"] = "adapters-off"


def pairs(name: str, conversations: Sequence[Conversation]) -> list[tuple[Conversation, Conversation]]:
    """(chosen, rejected) of one record, in the order of the chosen ones.

    Args:
        name: the record's, for errors.

    Raises:
        DataError: a side lacks its other, or stands there twice.
    """
    sides: dict[str, dict[str, Conversation]] = {"chosen": {}, "rejected": {}}
    for talk in conversations:
        if talk.kind in sides:
            if talk.pair in sides[talk.kind]:
                raise DataError(f"record {name}: the pair {talk.pair!r} has two {talk.kind} answers")
            sides[talk.kind][talk.pair] = talk
    chosen, rejected = sides["chosen"], sides["rejected"]
    if lonely := sorted(chosen.keys() ^ rejected.keys()):
        raise DataError(f"record {name}: the pair {lonely[0]!r} has one side only")
    return [(talk, rejected[pair]) for pair, talk in chosen.items()]


def corrected(rejected: Sequence[int], chosen: Sequence[int]) -> tuple[Bool[np.ndarray, "r"], Bool[np.ndarray, "c"]]:
    """Where two sequences replace each other's tokens, as RLHF-V's `diff_lib` finds it.

    Python's `difflib` with its defaults (autojunk included: in sequences of 200 or more, frequent tokens begin no match),
    matches of three tokens or more; what is only inserted or only deleted does not count.
    """
    marks = np.zeros(len(rejected), bool), np.zeros(len(chosen), bool)
    blocks = difflib.SequenceMatcher(None, rejected, chosen).get_matching_blocks()
    before = (0, 0)
    for block in blocks:
        if block.size < SHORTEST and block is not blocks[-1]:
            continue
        gaps = slice(before[0], block.a), slice(before[1], block.b)
        if all(gap.start < gap.stop for gap in gaps):
            for mark, gap in zip(marks, gaps, strict=True):
                mark[gap] = True
        before = block.a + block.size, block.b + block.size
    return marks


def token_weights(rejected: Tokens, chosen: Tokens, gamma: float) -> tuple[Tokens, Tokens]:
    """DDPO's weights: `gamma` times on corrected tokens of both sides; (rejected, chosen).

    Compared are the whole sequences but the first token, prompt included, a picture as one token (as LLaVA's placeholder,
    before its features take its place).
    """
    sides, places = (rejected, chosen), []
    for side in sides:
        later_patch = np.zeros(len(side), bool)
        later_patch[1:] = (side.image_slots[1:] >= 0) & (side.image_slots[1:] == side.image_slots[:-1] + 1)
        later_patch[0] = True  # nothing predicts the first token
        places.append(np.flatnonzero(~later_patch))
    marks = corrected(*(side.ids[place].tolist() for side, place in zip(sides, places, strict=True)))
    made = []
    for side, place, mark in zip(sides, places, marks, strict=True):
        weights = side.weights.copy()
        weights[place[mark]] *= gamma
        made.append(dataclasses.replace(side, weights=weights))
    return made[0], made[1]


def shared(one: Tokens, other: Tokens) -> int:
    """Tokens that two conversations begin with in common."""
    most = min(len(one), len(other))
    differs = (one.ids[:most] != other.ids[:most]) | (one.image_slots[:most] != other.image_slots[:most])
    return int(differs.argmax()) if differs.any() else most


def build_pair_trees(
    sides: Sequence[tuple[Tokens, Tokens]], preference: DPOConfig, *, tokens: int, edges: int, leaves: int
) -> list[tuple[list[int], ConversationTree]]:
    """Pairs (chosen, rejected) about one picture as few trees; a pair's two branches stay together.

    Each branch has its own edges, what it shares with others included: `branch` 2n is the chosen answer of a tree's n-th
    pair and 2n + 1 the rejected one, and their edges weigh what `token_weights` says (over its sum, where averaged).

    Args:
        tokens, edges, leaves: room of a row; a pair takes two leaves.

    Returns:
        The indices of each tree's pairs, in order, and the tree.

    Raises:
        ValueError: a single pair does not fit; its index is named.
    """
    open_tries: list[tuple[list[int], Trie, list[Tokens]]] = []
    for index, (chosen, rejected) in enumerate(sides):
        rejected, chosen = token_weights(rejected, chosen, preference.gamma)
        taught = int((chosen.weights > 0).sum() + (rejected.weights > 0).sum())
        alone = len(rejected) - shared(chosen, rejected)
        best: tuple[int, tuple[list[int], Trie, list[Tokens]]] | None = None
        for one in open_tries:
            used = sum(int((side.weights > 0).sum()) for side in one[2])
            # The rejected answer leaves the tree where the chosen one does, or where an older branch does.
            more = one[1].cost(chosen)[0] + min(alone, one[1].cost(rejected)[0])
            fits = len(one[1]) + more <= tokens and used + taught <= edges and len(one[2]) + 2 <= leaves
            if fits and (best is None or more < best[0]):
                best = more, one
        if best is None:
            if len(chosen) + alone > tokens or taught > edges or leaves < 2:
                raise ValueError(
                    f"pair {index} has {len(chosen) + alone} tokens and teaches {taught}; "
                    f"a row holds {tokens} tokens, {edges} taught ones and {leaves} answers"
                )
            best = 0, ([], Trie(), [])
            open_tries.append(best[1])
        members, trie, branches = best[1]
        members.append(index)
        for side in (chosen, rejected):
            trie.add(unsupervised(side))
            branches.append(side)
    return [(members, _branched(trie.tree(), branches, preference)) for members, trie, branches in open_tries]


def _branched(tree: ConversationTree, branches: Sequence[Tokens], preference: DPOConfig) -> ConversationTree:
    """The tree with the edges of each branch by itself."""
    index = np.arange(len(tree))
    parts = []
    for number, (side, leaf) in enumerate(zip(branches, tree.leaves, strict=True)):
        path = np.flatnonzero((index <= leaf) & (tree.ends > leaf))
        taught = np.flatnonzero(side.weights > 0)
        weight = side.weights[taught].astype(np.float64)
        if preference.average:
            weight = weight / max(weight.sum(), 1e-6)
        parts.append((path[taught - 1], side.ids[taught], weight, np.full(len(taught), number)))
    parent, target, weight, branch = (np.concatenate(part) for part in zip(*parts, strict=True))
    return dataclasses.replace(
        tree,
        parent=parent.astype(np.int32),
        target=target.astype(np.int32),
        weight=weight.astype(np.float32),
        branch=branch.astype(np.int32),
    )
