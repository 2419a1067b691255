"""Scenes for the tests, and the truth about them, read from the objects by code that the package does not share."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from reverie_jax.scenes.graph import (
    CATEGORIES,
    HELD_OUT_PAIRS,
    PARTNER,
    Scene,
    SceneObject,
    World,
    is_held_out_composition,
    take_scenes,
)

SKEWED, BROKEN = World.skewed(), World.broken()
NEW_PAIRS, NEW_COMPOSITIONS = World.new_pairs(), World.new_compositions()
WORLDS = (SKEWED, BROKEN, World(partner=0.5, repeat=0.8))
TRAIN = take_scenes(SKEWED, "train", 0, 300)
TEST = take_scenes(BROKEN, "test", 0, 120)

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
THIRDS = {"on the left": (0, 1 / 3), "in the middle": (1 / 3, 2 / 3), "on the right": (2 / 3, 1)}


def make_object(category: str, color: str = "red", x: float = 0.5, y: float = 0.5, **looks: str) -> SceneObject:
    return SceneObject(category, color, looks.get("size", "small"), looks.get("texture", "plain"), x, y)


def make_scene(*objects: SceneObject, seed: int = 0) -> Scene:
    return Scene(tuple(sorted(objects)), "cream", False, seed)


def sample_scene(number: int) -> Scene:
    """Any scene of any world; called in tests, for no type check may run inside of a strategy."""
    return WORLDS[number % 3].sample(np.random.default_rng(number))


def singular(word: str) -> str:
    return word if word in CATEGORIES else word[:-1]


def all_of(scene: Scene, noun: str) -> list[SceneObject]:
    return [t for t in scene.objects if t.category == singular(noun)]


def where(a: SceneObject, b: SceneObject) -> str:
    """How `a` stands to `b`, by the axis on which they are further apart; empty if that is in doubt."""
    dx, dy = b.x - a.x, b.y - a.y
    if max(abs(dx), abs(dy)) < 0.15 or abs(abs(dx) - abs(dy)) < 0.05:
        return ""
    return max((dx, "left of"), (-dx, "right of"), (dy, "above"), (-dy, "below"))[1]


def the_only(scene: Scene, words: str) -> SceneObject | None:
    """The object that "the cup" or "the one beside the cup" means beyond doubt."""
    match = re.fullmatch(r"the (?:(?:thing|one) (.+) the )?(\w+)", words)
    assert match, words
    relation, anchors = match[1], all_of(scene, match[2])
    if len(anchors) != 1 or relation is None:
        return anchors[0] if len(anchors) == 1 else None
    sides = {t: where(t, anchors[0]) for t in scene.objects if t is not anchors[0]}
    wanted = {"left of", "right of"} if relation == "beside" else {relation}
    found = [t for t, side in sides.items() if side in wanted]
    clear = len(found) == 1 and "" not in sides.values() and len(all_of(scene, found[0].category)) == 1
    return found[0] if clear else None


def yes(true: bool) -> str:
    return "Yes" if true else "No"


def _is(scene: Scene, words: str, look: str) -> str | None:
    thing = the_only(scene, words)
    return thing and yes(look in (thing.color, thing.size, thing.texture))


def _color_of_many(scene: Scene, noun: str) -> str | None:
    return all_of(scene, noun)[0].color if len(all_of(scene, noun)) > 1 else None


def _place(scene: Scene, words: str) -> str | None:
    thing = the_only(scene, words)
    return thing and next(name for name, (low, high) in THIRDS.items() if low <= thing.x <= high)


def _stands(scene: Scene, noun: str, relation: str, other: str) -> str | None:
    a, b = the_only(scene, f"the {noun}"), the_only(scene, f"the {other}")
    side = a and b and where(a, b)
    return yes(side == relation) if side else None


def _larger(scene: Scene, noun: str, other: str) -> str | None:
    a, b = the_only(scene, f"the {noun}"), the_only(scene, f"the {other}")
    return a and b and yes((a.size, b.size) == ("large", "small"))


def _which(scene: Scene, words: str, others: str) -> str | None:
    large = [t for t in (the_only(scene, words), the_only(scene, others)) if t and t.size == "large"]
    both = the_only(scene, words) and the_only(scene, others)
    return f"the {large[0].category}" if both and len(large) == 1 else None


def _choice(scene: Scene, listed: str) -> str | None:
    options = dict(re.findall(r"([A-D])\. (\w+)", listed))
    assert list(options) == list("ABCD")
    right = [letter for letter, noun in options.items() if all_of(scene, noun)]
    return right[0] if len(right) == 1 else None


def _number(scene: Scene, how: str, number: str, noun: str) -> str:
    there, asked = len(all_of(scene, noun)), NUMBERS.index(number)
    return yes(there == asked or (how == "at least" and there > asked))


def _name(scene: Scene, relation: str, noun: str) -> str | None:
    thing = the_only(scene, f"the thing {relation} the {noun}")
    return thing and f"the {thing.category}"


_SIDE = "(left of|right of|above|below)"
_THING = r"(the (?:(?:thing|one) (?:left of|right of|above|below|beside) the )?\w+)"
ANSWERS: dict[str, Callable[..., str | None]] = {
    r"Is there an? (\w+) in the image\?": lambda scene, noun: yes(bool(all_of(scene, noun))),
    rf"Is the (\w+) {_SIDE} the (\w+)\?": _stands,
    r"Is the (\w+) larger than the (\w+)\?": _larger,
    rf"Is {_THING} (\w+)\?": _is,
    rf"What colour is {_THING}\?": lambda scene, words: getattr(the_only(scene, words), "color", None),
    r"What colour are the (\w+)\?": _color_of_many,
    r"How many (\w+) are there\?": lambda scene, noun: NUMBERS[len(all_of(scene, noun))],
    r"Are there (at least|exactly) (\w+) (\w+)\?": _number,
    r"Are there more (\w+) than (\w+)\?": lambda scene, a, b: yes(len(all_of(scene, a)) > len(all_of(scene, b))),
    rf"Where is {_THING}\?": _place,
    rf"What is {_SIDE} the (\w+)\?": _name,
    rf"Which is larger, {_THING} or {_THING}\?": _which,
    r"Which of these is in the image\? (.*)": _choice,
}
"""What questions mean: the right answer, by the question's form; None where the scene does not decide it."""


def right_answer(scene: Scene, question: str) -> str | None:
    """The right answer to any question but for a description, read from the objects."""
    asked = ((re.fullmatch(pattern, question), rule) for pattern, rule in ANSWERS.items())
    match, rule = next((match, rule) for match, rule in asked if match)
    return rule(scene, *match.groups())


def about(scene: Scene, question: str) -> set[str]:
    """The categories that a question is about: those it names, and those it means by a relation."""
    there = {t.category for t in scene.objects}
    if question == "Describe the image.":
        return there
    named = {singular(word) for word in re.findall(r"\w+", question)} & set(CATEGORIES)
    if question.startswith("Which of these"):
        return named & there
    sides = re.findall(r"(?:thing|one|What is) (left of|right of|above|below|beside) the (\w+)", question)
    meant = [the_only(scene, f"the thing {side} the {noun}") for side, noun in sides]
    return named | {t.category for t in meant if t}


def is_right(scene: Scene, question: str, answer: str) -> bool:
    """Whether an answer is right, read from the objects."""
    if match := re.fullmatch(r"Is an? (\w+) often seen with an? (\w+)\?", question):
        return answer == yes(PARTNER[match[1]] == match[2])
    if question != "Describe the image.":
        return answer == right_answer(scene, question)
    named = [singular(w) for w in re.findall(r"\w+", answer) if singular(w) in CATEGORIES]
    assert named
    return all(all_of(scene, c) for c in named)


def new_things(scene: Scene) -> tuple[set[str], set[str]]:
    """Categories of the pairs, and of the compositions, of a scene that are held out of training."""
    there = {t.category for t in scene.objects}
    pairs = {category for pair in HELD_OUT_PAIRS if pair <= there for category in pair}
    alone = [t for t in scene.objects if len(all_of(scene, t.category)) == 1]
    sides = ((a, where(a, b)) for a in alone for b in alone if a is not b)
    return pairs, {a.category for a, side in sides if side and is_held_out_composition(a.color, a.category, side)}
