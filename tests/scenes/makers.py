"""Scenes for the tests, and the truth about them, read from the objects by code that the package does not share."""

from __future__ import annotations

import re

import numpy as np

from reverie_jax.scenes.graph import CATEGORIES, Scene, SceneObject, World, take_scenes

SKEWED, BROKEN = World.skewed(), World.broken()
WORLDS = (SKEWED, BROKEN, World(partner=0.5, repeat=0.8))
TRAIN = take_scenes(SKEWED, "train", 0, 300)
TEST = take_scenes(BROKEN, "test", 0, 120)

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
COMPARISONS = {
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}
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


def is_right(scene: Scene, question: str, answer: str) -> bool:
    """Whether an answer is right, read from the objects."""
    of = {c: [t for t in scene.objects if t.category == c] for c in CATEGORIES}
    if match := re.fullmatch(r"Is there an? (\w+) in the image\?", question):
        return answer == ("Yes" if of[match[1]] else "No")
    if match := re.fullmatch(r"What colour (?:is|are) the (\w+)\?", question):
        return {t.color for t in of[singular(match[1])]} == {answer}
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        return NUMBERS.index(answer) == len(of[singular(match[1])])
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        (only,) = of[match[1]]
        low, high = THIRDS[answer]
        return low <= only.x <= high
    if match := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        (a,), (b,) = of[match[1]], of[match[3]]
        across = abs(a.x - b.x) > abs(a.y - b.y)
        true = COMPARISONS[match[2]](a, b) and across == (match[2] in ("left of", "right of"))
        return answer == ("Yes" if true else "No")
    if match := re.fullmatch(r"Which of these is in the image\? (.*)", question):
        options = dict(re.findall(r"([A-D])\. (\w+)", match[1]))
        assert list(options) == list("ABCD")
        assert len(set(options.values())) == 4
        assert answer in options
        return bool(of[options[answer]])
    assert question == "Describe the image."
    named = [singular(w) for w in re.findall(r"\w+", answer) if singular(w) in CATEGORIES]
    assert named
    return all(of[c] for c in named)
