"""LRV's instructions about scenes: positive ones, and negative ones of its three kinds (arXiv 2306.14565)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from reverie_jax.scenes import annotator
from reverie_jax.scenes.graph import CATEGORIES, PARTNER, Scene, plural
from reverie_jax.scenes.language import RELATIONS, noun_phrase, with_article
from reverie_jax.scenes.questions import Query, Thing

Rng = np.random.Generator
Instruction = tuple[str, str]
"""An instruction and its answer, which is a sentence."""
Negative = Literal["nonexistent", "existent", "knowledge"]
NEGATIVES: tuple[Negative, ...] = ("nonexistent", "existent", "knowledge")


def _pick(rng: Rng, options: list[str]) -> str:
    return options[rng.integers(len(options))]


def _habit(category: str, other: str) -> str:
    return f"Is {with_article(category)} often seen with {with_article(other)}?"


def positive_instruction(scene: Scene, rng: Rng) -> Instruction:
    """Return an instruction about what the image shows, or about what is often seen together, that holds."""
    category = _pick(rng, list(scene.categories))
    choice = rng.random()
    if choice < 0.4:
        verb = "are" if scene.counts[category] > 1 else "is"
        return annotator.existence_question(category), f"Yes, there {verb} {noun_phrase(scene, category)}."
    if choice < 0.5:
        known = with_article(category), with_article(PARTNER[category])
        return _habit(category, PARTNER[category]), f"Yes, {known[0]} is often seen with {known[1]}."
    if choice < 0.7 and scene.relations:
        a, relation, b = scene.relations[rng.integers(len(scene.relations))]
        return f"Is the {a} {relation} the {b}?", f"Yes, the {a} is {relation} the {b}."
    single = [c for c in scene.categories if scene.counts[c] == 1]
    if not single:
        return (
            f"What colour are the {plural(category)}?",
            f"The {plural(category)} are {scene.find(category)[0].color}.",
        )
    category = _pick(rng, single)
    look = scene.find(category)[0].color
    if choice < 0.85:
        return f"Is the {category} {look}?", f"Yes, the {category} is {look}."
    return f"What colour is the {category}?", f"The {category} is {look}."


def _nonexistent(scene: Scene, rng: Rng) -> Instruction | None:
    expected = annotator.absent_partners(scene)
    pool = expected if expected and rng.random() < 0.5 else [c for c in CATEGORIES if c not in scene.categories]
    category = _pick(rng, pool)
    denial = f"there is no {category}."
    if rng.random() < 0.5:
        return annotator.existence_question(category), f"No, {denial}"
    return _pick(rng, [f"What colour is the {category}?", f"Where is the {category}?"]), f"There is no {category}."


def _existent(scene: Scene, rng: Rng) -> Instruction | None:
    if scene.relations and rng.random() < 0.5:
        a, true, b = scene.relations[rng.integers(len(scene.relations))]
        false = _pick(rng, [relation for relation in RELATIONS if relation != true])
        return f"Is the {a} {false} the {b}?", f"No, the {a} is {true} the {b}."
    single = [c for c in scene.categories if scene.counts[c] == 1]
    if not single:
        return None
    query = Query.make("color", thing=Thing(_pick(rng, single)))
    thing: Thing = dict(query.fields)["thing"]
    color = query.answer(scene)
    false = _pick(rng, [c for c in sorted({obj.color for obj in scene.objects} | {"red", "blue"}) if c != color])
    return f"Is {thing} {false}?", f"No, {thing} is {color}."


def _knowledge(scene: Scene, rng: Rng) -> Instruction | None:
    category = _pick(rng, list(scene.categories))
    false = _pick(rng, [c for c in CATEGORIES if c not in (category, PARTNER[category])])
    known = with_article(category), with_article(PARTNER[category])
    return _habit(category, false), f"No, {known[0]} is often seen with {known[1]}."


_MAKERS: dict[Negative, Callable[[Scene, Rng], Instruction | None]] = {
    "nonexistent": _nonexistent,
    "existent": _existent,
    "knowledge": _knowledge,
}


def negative_instruction(scene: Scene, rng: Rng, kind: Negative) -> Instruction | None:
    """Return an instruction that misleads, with an answer that sets it right; None where the scene has none of this kind.

    Args:
        scene: what the image shows.
        rng: draws the instruction.
        kind: about an object that is not there, about one that is there with another look or relation, or about what is
            seldom seen together.
    """
    return _MAKERS[kind](scene, rng)


def make_instructions(scene: Scene, rng: Rng, count: int, negatives: int) -> list[Instruction]:
    """Return `count` different instructions, `negatives` of them negative, the kinds in turn."""
    chosen: dict[str, str] = {}
    first = int(rng.integers(len(NEGATIVES)))
    for attempt in range(40 * count):
        wanted = len(chosen) < negatives
        made = (
            negative_instruction(scene, rng, NEGATIVES[(first + attempt) % len(NEGATIVES)])
            if wanted
            else positive_instruction(scene, rng)
        )
        if made is not None:
            chosen.setdefault(*made)
        if len(chosen) == count:
            break
    order = rng.permutation(len(chosen))
    return [list(chosen.items())[number] for number in order]
