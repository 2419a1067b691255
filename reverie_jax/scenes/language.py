"""Sentences about scenes: noun phrases, descriptions, and the claims that a text makes.

Writing and checking are two directions of one small grammar. `parse_claims` reads any text, a model's too: what it does not
understand it ignores, and each claim that it returns is exactly true or false of a scene.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from reverie_jax.scenes.graph import CATEGORIES, COLORS, SIZES, TEXTURES, Scene, SceneObject, plural, relation_between

NUMBERS: tuple[str, ...] = ("none", "one", "two", "three", "four", "five", "six")
COLUMN_PHRASES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
RELATIONS = ("left of", "right of", "above", "below")


def with_article(word: str) -> str:
    """Return "a cup", "an apple"."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def join_words(parts: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun_phrase(scene: Scene, category: str, *, detail: bool = False, where: bool = True) -> str:
    """Return a category of the scene as a noun phrase: "a red cup on the left", "two blue apples".

    Args:
        scene: that shows the category.
        category: to name.
        detail: name size and texture too, if the category appears once.
        where: name the column, if all objects of the category share one.
    """
    objects = scene.find(category)
    first = objects[0]
    looks = [first.color]
    if detail and len(objects) == 1:
        looks = [first.size, first.color] + ([first.texture] if first.texture != "plain" else [])
    noun = category if len(objects) == 1 else plural(category)
    words = " ".join([*looks, noun])
    words = with_article(words) if len(objects) == 1 else f"{NUMBERS[len(objects)]} {words}"
    columns = {obj.column for obj in objects}
    return f"{words} {COLUMN_PHRASES[columns.pop()]}" if where and len(columns) == 1 else words


def amount(scene: Scene, category: str) -> str:
    """Return how many objects of a category there are, and their looks: "there are two red cups", "there is no fork"."""
    count = scene.counts[category]
    return f"there {'are' if count > 1 else 'is'} {noun_phrase(scene, category) if count else f'no {category}'}"


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Return a description: a sentence for each category from left to right, and with `rng` one relation."""
    sentences = [amount(scene, category) for category in scene.categories]
    if rng is not None and scene.relations:
        a, relation, b = scene.relations[rng.integers(len(scene.relations))]
        sentences.append(f"the {a} is {relation} the {b}")
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One checkable statement.

    Attributes:
        kind: "exists" (objects with these looks, `count` of them if given), "absent", "relation" or "denied" (a color that
            the category does not have).
        category: of the objects.
        count: exact number claimed; None for "the ...", which claims at least one.
        color, size, texture, column: claimed looks and position; None if not stated.
        relation: to `other`, one of `RELATIONS`.
        other: category that the relation is to.
    """

    kind: Literal["exists", "absent", "relation", "denied"]
    category: str
    count: int | None = None
    color: str | None = None
    size: str | None = None
    texture: str | None = None
    column: str | None = None
    relation: str | None = None
    other: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Return whether the claim is true of the scene."""
        objects = scene.find(self.category)
        if self.kind == "absent":
            return not any(self._fits(t) for t in objects)
        if self.kind == "denied":
            return bool(objects) and all(t.color != self.color for t in objects)
        if self.kind == "relation":
            others = scene.find(self.other or "")
            return any(relation_between(a, b) == self.relation for a in objects for b in others)
        fitting = sum(self._fits(t) for t in objects)
        # "a red cup on the left" allows for more of them; "two red cups" does not.
        return fitting >= 1 if self.count in (None, 1) else fitting == self.count

    def _fits(self, obj: SceneObject) -> bool:
        return all(
            claimed is None or claimed == actual
            for claimed, actual in (
                (self.color, obj.color),
                (self.size, obj.size),
                (self.texture, obj.texture),
                (self.column, obj.column),
            )
        )


NOUNS: dict[str, str] = {**{c: c for c in CATEGORIES}, **{plural(c): c for c in CATEGORIES}}
"""Categories by noun, singular and plural."""
_NOUNS = "|".join(sorted(NOUNS, key=len, reverse=True))
_LOOKS = "|".join((*SIZES, *COLORS, *TEXTURES))
_COUNT = "|".join(("there is no", "there are no", "an", "a", "the", "another", "no", *NUMBERS[1:]))
_MENTION = re.compile(
    rf"\b(?P<count>{_COUNT}) (?P<looks>(?:(?:{_LOOKS}) )*)(?P<noun>{_NOUNS})\b"
    rf"(?: (?:is |are |stands |stand )?(?:on the|in the) (?P<column>left|middle|right)\b(?! of))?"
)
_RELATION = re.compile(rf"\bthe (?P<a>{_NOUNS}) (?:is|are) (?P<how>{'|'.join(RELATIONS)}) the (?P<b>{_NOUNS})\b")
_LOOK = re.compile(rf"\b(?:the|both|all|all the) (?P<noun>{_NOUNS}) (?:is|are) (?P<no>not )?(?P<look>{_LOOKS})\b")
_HABIT = re.compile(r"[^.;]*\boften\b[^.;,]*")


def parse_claims(text: str) -> list[Claim]:
    """Return the checkable statements of a text, in no particular order, without duplicates.

    General knowledge ("... often ...") is not a claim about the image and is skipped. "the cup" alone claims that there is a
    cup; a statement of its relation or looks makes that claim too.
    """
    text = _HABIT.sub(" ", " ".join(text.lower().split()))
    claims: dict[Claim, None] = {}
    for match in _RELATION.finditer(text):
        claims[Claim("relation", NOUNS[match["a"]], relation=match["how"], other=NOUNS[match["b"]])] = None
    for match in _LOOK.finditer(text):
        category, look = NOUNS[match["noun"]], match["look"]
        if match["no"]:
            if look in COLORS:
                claims[Claim("denied", category, color=look)] = None
        else:
            claims[Claim("exists", category, **_looks([look]))] = None
    for match in _MENTION.finditer(text):
        looks = _looks(match["looks"].split())
        category, count = NOUNS[match["noun"]], match["count"]
        if count.endswith("no"):
            claims[Claim("absent", category, **looks)] = None
            continue
        number = {"a": 1, "an": 1, "the": None, "another": None}.get(count, -1)
        if number == -1:
            number = NUMBERS.index(count)
        claims[Claim("exists", category, count=number, column=match["column"], **looks)] = None
    return list(claims)


def _looks(words: list[str]) -> dict[str, Any]:
    """Return words for looks as fields of a claim."""
    kinds = (("color", COLORS), ("size", SIZES), ("texture", TEXTURES))
    return {kind: word for word in words for kind, known in kinds if word in known}


def parse_mentions(text: str) -> list[str]:
    """Return the categories that a text says are there, in order and with repetitions: the mentions that CHAIR counts."""
    plain = _HABIT.sub(" ", " ".join(text.lower().split()))
    return [NOUNS[match["noun"]] for match in _MENTION.finditer(plain) if not match["count"].endswith("no")]
