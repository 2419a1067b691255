"""Corrections of descriptions, sentence by sentence, as RLHF-V's annotators made them (arXiv 2312.00849)."""

from __future__ import annotations

import re

from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.language import amount, parse_claims, parse_mentions


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with its full stop; a last one without a full stop counts too."""
    return [sentence.strip() for sentence in re.findall(r"[^.]+\.?", text) if sentence.strip()]


def is_true(scene: Scene, sentence: str) -> bool | None:
    """Return whether all claims of a sentence hold; None if it makes none."""
    claims = parse_claims(sentence)
    return all(claim.holds(scene) for claim in claims) if claims else None


def correct(scene: Scene, text: str) -> str:
    """Return a description in which false sentences are corrected, and all else is as it was.

    A sentence on an object that is there gets the right looks, number and place, a relation the right one; an object that is
    not there is replaced by one that the description lacks, or its sentence is left out if none is missing. A correction that
    another sentence says already is left out, and so is a relation of what is not there or stands in none.
    """
    sentences = split_sentences(text)
    named = {category for sentence in sentences for category in parse_mentions(sentence)}
    missing = [category for category in scene.categories if category not in named]
    kept: list[str] = []
    for sentence in sentences:
        if is_true(scene, sentence) is not False:
            kept.append(sentence)
            continue
        right = _right(scene, sentence, missing)
        if right and right not in kept and right not in sentences:
            kept.append(right)
    return " ".join(kept)


def _right(scene: Scene, sentence: str, missing: list[str]) -> str:
    """Return a true sentence in the place of a false one, or nothing; it takes an object that is named from `missing`."""
    claims = parse_claims(sentence)
    relation = next((claim for claim in claims if claim.kind == "relation"), None)
    if relation is not None:
        true = [
            f"The {a} is {how} the {b}."
            for a, how, b in scene.relations
            if {a, b} == {relation.category, relation.other} or a == relation.category
        ]
        exact = [text for text in true if text.endswith(f"the {relation.other}.")]
        return next(iter([*exact, *true]), "")
    category = claims[0].category
    if not scene.counts[category]:
        if not missing:
            return ""
        category = missing.pop(0)
    words = amount(scene, category)
    return f"{words[0].upper()}{words[1:]}."
