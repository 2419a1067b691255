"""Scenes for the tests, and the truth about them, read from the objects by code that the package does not share."""

from __future__ import annotations

import re

import numpy as np

from reverie_jax.scenes import graph
from reverie_jax.scenes.graph import CATEGORIES, PARTNER, Scene, SceneObject, World, take_scenes

SKEWED, BROKEN = World.skewed(), World.broken()
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


def nouns(text: str) -> list[str]:
    return [singular(word) for word in re.findall(r"[a-z]+", text.lower()) if singular(word) in CATEGORIES]


def all_of(scene: Scene, noun: str) -> list[SceneObject]:
    return [t for t in scene.objects if t.category == singular(noun)]


def where(a: SceneObject, b: SceneObject) -> str:
    """How `a` stands to `b`, by the axis on which they are further apart; empty if that is in doubt."""
    dx, dy = b.x - a.x, b.y - a.y
    if max(abs(dx), abs(dy)) < 0.15 or abs(abs(dx) - abs(dy)) < 0.05:
        return ""
    return max((dx, "left of"), (-dx, "right of"), (dy, "above"), (-dy, "below"))[1]


def things(scene: Scene, *names: str) -> list[SceneObject]:
    """The objects that are meant by "the cup" or "the one beside the cup"; none if one of them is in doubt."""
    found = []
    for name in names:
        *_, side, noun = re.fullmatch(r"the (?:(thing|one) (.+) the )?(\w+)", name).groups()
        sides = {t: where(t, anchor) for anchor in all_of(scene, noun) for t in scene.objects if t is not anchor}
        fits = [t for t, s in sides.items() if s == side or (side == "beside" and s in ("left of", "right of"))]
        meant = fits if side else all_of(scene, noun)
        if len(all_of(scene, noun)) != 1 or (side and "" in sides.values()) or len(meant) != 1:
            return []
        found += meant if len(all_of(scene, meant[0].category)) == 1 else []
    return found if len(found) == len(names) else []


def yes(true: object) -> str:
    return "Yes" if true else "No"


def _choice(scene: Scene, listed: str) -> str:
    right = [letter for letter, noun in re.findall(r"([A-D])\. (\w+)", listed) if all_of(scene, noun)]
    return right[0] if len(right) == 1 else ""


_SIDE = "(left of|right of|above|below)"
_THING = r"(the (?:(?:thing|one) (?:left of|right of|above|below|beside) the )?\w+)"
ANSWERS = {
    r"Is there an? (\w+) in the image\?": lambda s, noun: yes(all_of(s, noun)),
    rf"Is (the \w+) {_SIDE} (the \w+)\?": lambda s, a, side, b: (
        (t := things(s, a, b)) and where(*t) and yes(where(*t) == side)
    ),
    r"Is (the \w+) larger than (the \w+)\?": lambda s, a, b: (
        (t := things(s, a, b)) and yes([x.size for x in t] == ["large", "small"])
    ),
    rf"Is {_THING} (\w+)\?": lambda s, a, look: (
        (t := things(s, a)) and yes(look in (t[0].color, t[0].size, t[0].texture))
    ),
    rf"What colour is {_THING}\?": lambda s, a: (t := things(s, a)) and t[0].color,
    r"What colour are the (\w+)\?": lambda s, noun: len(all_of(s, noun)) > 1 and all_of(s, noun)[0].color,
    r"How many (\w+) are there\?": lambda s, noun: NUMBERS[len(all_of(s, noun))],
    r"Are there at least (\w+) (\w+)\?": lambda s, n, noun: yes(len(all_of(s, noun)) >= NUMBERS.index(n)),
    r"Are there exactly (\w+) (\w+)\?": lambda s, n, noun: yes(len(all_of(s, noun)) == NUMBERS.index(n)),
    r"Are there more (\w+) than (\w+)\?": lambda s, a, b: yes(len(all_of(s, a)) > len(all_of(s, b))),
    rf"Where is {_THING}\?": lambda s, a: (
        (t := things(s, a)) and next(name for name, (low, high) in THIRDS.items() if low <= t[0].x <= high)
    ),
    rf"What is {_SIDE} the (\w+)\?": lambda s, side, noun: (
        (t := things(s, f"the thing {side} the {noun}")) and f"the {t[0].category}"
    ),
    rf"Which is larger, {_THING} or {_THING}\?": lambda s, *names: (
        len({x.size for x in things(s, *names)}) == 2
        and "the " + next(x.category for x in things(s, *names) if x.size == "large")
    ),
    r"Which of these is in the image\? (.*)": _choice,
    r"Is an? (\w+) often seen with an? (\w+)\?": lambda s, a, b: yes(PARTNER[a] == b),
}
"""What questions mean: the right answer, by the question's form; nothing where the scene does not decide it."""


def right_answer(scene: Scene, question: str) -> str | None:
    """The right answer to any question but for a description, read from the objects; None if they do not decide it."""
    asked = ((re.fullmatch(pattern, question), rule) for pattern, rule in ANSWERS.items())
    return next(rule(scene, *match.groups()) for match, rule in asked if match) or None


def is_right(scene: Scene, question: str, answer: str) -> bool:
    """Whether an answer is right, read from the objects."""
    if question != "Describe the image.":
        return answer == right_answer(scene, question)
    return bool(nouns(answer)) and all(all_of(scene, noun) for noun in nouns(answer))


def about(scene: Scene, question: str) -> set[str]:
    """The categories that a question is about: those it names, and those it means by a relation."""
    if question == "Describe the image.":
        return {t.category for t in scene.objects}
    if question.startswith("Which of these"):
        return {noun for noun in nouns(question) if all_of(scene, noun)}
    sides = re.findall(r"(?:thing|one|What is) (left of|right of|above|below|beside) the (\w+)", question)
    return set(nouns(question)) | {
        t.category for side, noun in sides for t in things(scene, f"the thing {side} the {noun}")
    }


def new_things(scene: Scene) -> tuple[set[str], set[str]]:
    """Categories of the pairs, and of the compositions, of a scene that are held out of training."""
    pairs = {c for pair in graph.HELD_OUT_PAIRS if all(all_of(scene, one) for one in pair) for c in pair}
    alone = [t for t in scene.objects if len(all_of(scene, t.category)) == 1]
    sides = [(a, where(a, b)) for a in alone for b in alone if a is not b]
    new = {a.category for a, side in sides if side and graph.is_held_out_composition(a.color, a.category, side)}
    return pairs, new
