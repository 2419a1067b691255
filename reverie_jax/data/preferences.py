"""Preference pairs: which conversations belong together, and RLHF-V's weights on what was corrected (arXiv 2312.00849)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from reverie_jax.data.conversation import Conversation, Tokens
from reverie_jax.errors import DataError

SHORTEST = 3
"""Tokens in common that count as unchanged; fewer between two corrections belong to them."""


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
        later_patch[1:] = (side.features[1:] >= 0) & (side.features[1:] == side.features[:-1] + 1)
        later_patch[0] = True  # nothing predicts the first token
        places.append(np.flatnonzero(~later_patch))
    marks = corrected(*(side.ids[place].tolist() for side, place in zip(sides, places, strict=True)))
    made = []
    for side, place, mark in zip(sides, places, marks, strict=True):
        weights = side.weights.copy()
        weights[place[mark]] *= gamma
        made.append(dataclasses.replace(side, weights=weights))
    return made[0], made[1]
