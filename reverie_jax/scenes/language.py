"""What can be said of a scene: noun phrases, descriptions, and the claims that a text makes.

Speaking and checking are two directions of one small grammar. `claims` reads any text, a model's too: what it does not
understand it leaves alone, and each claim that it finds is true or false of a scene, exactly.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from reverie_jax.scenes.graph import CATEGORIES, COLOURS, SIZES, TEXTURES, Scene, Thing, plural, relation

NUMBERS: tuple[str, ...] = ("none", "one", "two", "three", "four", "five", "six")
WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
RELATIONS = ("left of", "right of", "above", "below")


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def enumeration(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def phrase(scene: Scene, category: str, *, detail: bool = False, where: bool = True) -> str:
    """A category of the scene as a noun phrase: "a red cup on the left", "two blue apples".

    Args:
        detail: name size and texture too, where the category appears once.
        where: name the column, where all things of the category share one.
    """
    things = scene.of(category)
    first = things[0]
    looks = [first.colour]
    if detail and len(things) == 1:
        looks = [first.size, first.colour] + ([first.texture] if first.texture != "plain" else [])
    noun = category if len(things) == 1 else plural(category)
    words = " ".join([*looks, noun])
    words = article(words) if len(things) == 1 else f"{NUMBERS[len(things)]} {words}"
    columns = {thing.column for thing in things}
    return f"{words} {WHERE[columns.pop()]}" if where and len(columns) == 1 else words


def relations(scene: Scene) -> list[tuple[str, str, str]]:
    """(a, relation, b) for pairs of categories that each appear once and stand clearly."""
    single = [c for c in scene.categories if len(scene.of(c)) == 1]
    found = []
    for a in single:
        for b in single:
            if a != b and (how := relation(scene.of(a)[0], scene.of(b)[0])):
                found.append((a, how, b))
    return found


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A description in one or two sentences: everything that is there, from left to right, and one relation."""
    text = f"The image shows {enumeration([phrase(scene, c) for c in scene.categories])}."
    if pairs := relations(scene):
        a, how, b = pairs[rng.integers(len(pairs))]
        text += f" The {a} is {how} the {b}."
    return text


@dataclasses.dataclass(frozen=True)
class Claim:
    """One checkable statement.

    Attributes:
        kind: "exists" (some things with these looks, `count` of them where it is known), "absent", "relation" or "denied"
            (a colour that the category does not have).
        category: what it is about.
        count: exact number claimed; None for "the ...", which claims at least one.
    """

    kind: Literal["exists", "absent", "relation", "denied"]
    category: str
    count: int | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    column: str | None = None
    how: str | None = None
    other: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true of the scene."""
        things = scene.of(self.category)
        if self.kind == "absent":
            return not any(self._fits(t) for t in things)
        if self.kind == "denied":
            return bool(things) and all(t.colour != self.colour for t in things)
        if self.kind == "relation":
            others = scene.of(self.other or "")
            return any(relation(a, b) == self.how for a in things for b in others)
        fitting = sum(self._fits(t) for t in things)
        # "a red cup on the left" leaves room for more of them; "two red cups" does not.
        return fitting >= 1 if self.count in (None, 1) else fitting == self.count

    def _fits(self, thing: Thing) -> bool:
        return all(
            wanted is None or wanted == found
            for wanted, found in (
                (self.colour, thing.colour),
                (self.size, thing.size),
                (self.texture, thing.texture),
                (self.column, thing.column),
            )
        )


_NOUN = {**{c: c for c in CATEGORIES}, **{plural(c): c for c in CATEGORIES}}
_NOUNS = "|".join(sorted(_NOUN, key=len, reverse=True))
_LOOKS = "|".join((*SIZES, *COLOURS, *TEXTURES))
_COUNT = "|".join(("there is no", "there are no", "an", "a", "the", "another", "no", *NUMBERS[1:]))
_MENTION = re.compile(
    rf"\b(?P<count>{_COUNT}) (?P<looks>(?:(?:{_LOOKS}) )*)(?P<noun>{_NOUNS})\b"
    rf"(?: (?:is |are |stands |stand )?(?:on the|in the) (?P<column>left|middle|right)\b(?! of))?"
)
_RELATION = re.compile(rf"\bthe (?P<a>{_NOUNS}) (?:is|are) (?P<how>{'|'.join(RELATIONS)}) the (?P<b>{_NOUNS})\b")
_LOOK = re.compile(rf"\b(?:the|both|all|all the) (?P<noun>{_NOUNS}) (?:is|are) (?P<no>not )?(?P<look>{_LOOKS})\b")
_HABIT = re.compile(r"[^.;]*\boften\b[^.;,]*")


def claims(text: str) -> list[Claim]:
    """The checkable statements of a text, in no particular order, without repetition.

    General knowledge ("... often ...") is no claim about the picture and is passed over. "the cup" alone claims that there
    is a cup; in a statement of relation or looks that claim is made too.
    """
    text = _HABIT.sub(" ", " ".join(text.lower().split()))
    found: dict[Claim, None] = {}
    for match in _RELATION.finditer(text):
        found[Claim("relation", _NOUN[match["a"]], how=match["how"], other=_NOUN[match["b"]])] = None
    for match in _LOOK.finditer(text):
        category, look = _NOUN[match["noun"]], match["look"]
        if match["no"]:
            if look in COLOURS:
                found[Claim("denied", category, colour=look)] = None
        else:
            found[Claim("exists", category, **_looks([look]))] = None
    for match in _MENTION.finditer(text):
        looks = _looks(match["looks"].split())
        category, count = _NOUN[match["noun"]], match["count"]
        if count.endswith("no"):
            found[Claim("absent", category, **looks)] = None
            continue
        number = {"a": 1, "an": 1, "the": None, "another": None}.get(count, -1)
        if number == -1:
            number = NUMBERS.index(count)
        found[Claim("exists", category, count=number, column=match["column"], **looks)] = None
    return list(found)


def _looks(words: list[str]) -> dict[str, Any]:
    """Words for looks as fields of a claim."""
    kinds = (("colour", COLOURS), ("size", SIZES), ("texture", TEXTURES))
    return {kind: word for word in words for kind, known in kinds if word in known}


def mentioned(text: str) -> list[str]:
    """Categories that a text says are there, in order and as often as it says so (the mentions that CHAIR counts)."""
    plain = _HABIT.sub(" ", " ".join(text.lower().split()))
    return [_NOUN[match["noun"]] for match in _MENTION.finditer(plain) if not match["count"].endswith("no")]
