"""Preference pairs: pairs of conversations, and RLHF-V's weights on corrected tokens (arXiv 2312.00849)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from reverie_jax.data.conversation import Conversation
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import ConversationTree, Trie, shared_length, unsupervised
from reverie_jax.errors import DataError

MIN_MATCH = 3
"""The fewest common tokens that count as unchanged; fewer between two corrections are part of them."""


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290); with `gamma` > 1, RLHF-V's dense DPO.

    The loss of a pair is weight * -log sigmoid(beta * (margin - reference margin)) - sft * s(chosen), where the margin is
    s(chosen) - s(rejected), and s is the weighted sum of an answer's token log-probabilities.

    Attributes:
        beta: strength of the KL penalty towards the reference model.
        gamma: weight of corrected tokens; others weigh 1.
        average: divide s by the sum of its weights.
        weight: weight of the preference term.
        sft: weight of the supervised term.
        reference: how the reference model's sums are computed. `adapters-off`: in each step, with the adapters disabled
            (fresh adapters only). `stored`: once before the first step, with the initial model.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    beta: float = 0.1
    gamma: float = 1.0
    average: bool = False
    weight: float = 1.0
    sft: float = 0.0
    reference: Literal["adapters-off", "stored"] = "adapters-off"


def find_pairs(name: str, conversations: Sequence[Conversation]) -> list[tuple[Conversation, Conversation]]:
    """Return the (chosen, rejected) pairs of one record, in the order of the chosen ones; a repeated pair counts again.

    Args:
        name: name of the record, for errors.
        conversations: its conversations; those that belong to no pair are left out.

    Raises:
        DataError: a pair has not as many chosen answers as rejected ones, or a side has no answer.
    """
    sides: dict[str, dict[str, list[Conversation]]] = {"chosen": {}, "rejected": {}}
    for conversation in conversations:
        if conversation.kind in sides:
            if conversation.is_open:
                raise DataError(
                    f"record {name}: pair {conversation.pair!r} has a {conversation.kind} side without an answer; add it or"
                    " remove the pair"
                )
            sides[conversation.kind].setdefault(conversation.pair, []).append(conversation)
    chosen, rejected = sides["chosen"], sides["rejected"]
    for pair in sorted(chosen.keys() | rejected.keys()):
        counts = len(chosen.get(pair, ())), len(rejected.get(pair, ()))
        if counts[0] != counts[1]:
            raise DataError(
                f"record {name}: pair {pair!r} has {counts[0]} chosen and {counts[1]} rejected answers; add the missing"
                " one or remove the pair"
            )
    partners = {pair: iter(answers) for pair, answers in rejected.items()}
    return [(one, next(partners[one.pair])) for one in conversations if one.kind == "chosen"]


def find_corrections(
    rejected: Sequence[int], chosen: Sequence[int]
) -> tuple[Bool[np.ndarray, "r"], Bool[np.ndarray, "c"]]:
    """Return masks of the tokens that replace each other, as RLHF-V's `diff_lib` computes them.

    Python's `difflib` with its defaults (autojunk included: in sequences of 200 or more, frequent tokens begin no match),
    with matches of at least `MIN_MATCH` tokens. Tokens that are only inserted or only deleted do not count.
    """
    masks = np.zeros(len(rejected), bool), np.zeros(len(chosen), bool)
    blocks = difflib.SequenceMatcher(None, rejected, chosen).get_matching_blocks()
    before = (0, 0)
    for block in blocks:
        if block.size < MIN_MATCH and block is not blocks[-1]:
            continue
        gaps = slice(before[0], block.a), slice(before[1], block.b)
        if all(gap.start < gap.stop for gap in gaps):
            for mask, gap in zip(masks, gaps, strict=True):
                mask[gap] = True
        before = block.a + block.size, block.b + block.size
    return masks


def token_weights(rejected: Tokens, chosen: Tokens, gamma: float) -> tuple[Tokens, Tokens]:
    """Return (rejected, chosen) with the weights of corrected tokens multiplied by `gamma`, as in RLHF-V.

    The sequences are compared as a whole, prompt included, without the first token, and with an image as one token (LLaVA's
    placeholder, before the image features replace it).
    """
    sides, indices = (rejected, chosen), []
    for side in sides:
        later_patch = np.zeros(len(side), bool)
        later_patch[1:] = (side.image_slots[1:] >= 0) & (side.image_slots[1:] == side.image_slots[:-1] + 1)
        later_patch[0] = True  # nothing predicts the first token
        indices.append(np.flatnonzero(~later_patch))
    masks = find_corrections(*(side.ids[index].tolist() for side, index in zip(sides, indices, strict=True)))
    weighted = []
    for side, index, mask in zip(sides, indices, masks, strict=True):
        weights = side.weights.copy()
        weights[index[mask]] *= gamma
        weighted.append(dataclasses.replace(side, weights=weights))
    return weighted[0], weighted[1]


def _supervised(tokens: Tokens) -> int:
    return int((tokens.weights > 0).sum())


def build_pair_trees(
    sides: Sequence[tuple[Tokens, Tokens]], config: DPOConfig, *, tokens: int, edges: int, leaves: int
) -> list[tuple[list[int], ConversationTree]]:
    """Return few trees of the (chosen, rejected) pairs about one image; both branches of a pair are in the same tree.

    Each branch has its own edges, even for tokens that it shares with others: branch 2n is the chosen answer of a tree's
    n-th pair, branch 2n + 1 the rejected one. Edges have the weights of `token_weights`, divided by their sum for
    `config.average`.

    Args:
        sides: the pairs.
        config: how tokens are weighted.
        tokens: most nodes in a tree.
        edges: most edges in a tree.
        leaves: most leaves in a tree; a pair has two.

    Returns:
        For each tree, the indices of its pairs in order, and the tree.

    Raises:
        ValueError: a single pair does not fit; its index is given.
    """
    open_tries: list[tuple[list[int], Trie, list[Tokens]]] = []
    for index, (chosen, rejected) in enumerate(sides):
        rejected, chosen = token_weights(rejected, chosen, config.gamma)
        supervised = _supervised(chosen) + _supervised(rejected)
        shared = shared_length((chosen.ids, chosen.image_slots), (rejected.ids, rejected.image_slots))
        unshared = len(rejected) - shared
        best: tuple[int, tuple[list[int], Trie, list[Tokens]]] | None = None
        for candidate in open_tries:
            _, trie, branches = candidate
            used = sum(map(_supervised, branches))
            # The rejected answer leaves the tree where the chosen one does, or where an older branch does.
            more = trie.cost(chosen)[0] + min(unshared, trie.cost(rejected)[0])
            fits = len(trie) + more <= tokens and used + supervised <= edges and len(branches) + 2 <= leaves
            if fits and (best is None or more < best[0]):
                best = more, candidate
        if best is None:
            if len(chosen) + unshared > tokens or supervised > edges or leaves < 2:
                raise ValueError(
                    f"pair {index} has {len(chosen) + unshared} tokens, {supervised} supervised ones and 2 answers; "
                    f"a sequence has room for {tokens} tokens, {edges} supervised ones and {leaves} answers"
                )
            best = 0, ([], Trie(), [])
            open_tries.append(best[1])
        members, trie, branches = best[1]
        members.append(index)
        for side in (chosen, rejected):
            trie.add(unsupervised(side))
            branches.append(side)
    return [(members, _with_branch_edges(trie.tree(), branches, config)) for members, trie, branches in open_tries]


def _with_branch_edges(tree: ConversationTree, branches: Sequence[Tokens], config: DPOConfig) -> ConversationTree:
    """Return the tree with separate edges for each branch."""
    index = np.arange(len(tree))
    parts = []
    for number, (side, leaf) in enumerate(zip(branches, tree.leaves, strict=True)):
        path = np.flatnonzero((index <= leaf) & (tree.ends > leaf))
        supervised = np.flatnonzero(side.weights > 0)
        weight = side.weights[supervised].astype(np.float64)
        if config.average:
            weight = weight / max(weight.sum(), 1e-6)
        parts.append((path[supervised - 1], side.ids[supervised], weight, np.full(len(supervised), number)))
    parent, target, weight, branch = (np.concatenate(part) for part in zip(*parts, strict=True))
    return dataclasses.replace(
        tree,
        parent=parent.astype(np.int32),
        target=target.astype(np.int32),
        weight=weight.astype(np.float32),
        branch=branch.astype(np.int32),
    )
