"""Sentences about scenes: the claims that a text makes, and whether they hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.scenes.annotator import SceneAnnotator, state_facts
from reverie_jax.scenes.graph import CATEGORIES, COLORS, Scene, plural
from reverie_jax.scenes.language import Claim, describe, parse_claims, parse_mentions, with_article
from tests.scenes.makers import make_object, make_scene, sample_scene

numbers, seeds = st.integers(0, 10**9), st.integers(0, 10**6)


def exists(category: str, count: int | None = None, **looks: str) -> Claim:
    return Claim("exists", category, count=count, **looks)


SENTENCES = {
    "There is a red cup on the left.": {exists("cup", 1, color="red", column="left")},
    "There is no umbrella.": {Claim("absent", "umbrella")},
    "there are no red cups": {Claim("absent", "cup", color="red")},
    "I see no fish here.": {Claim("absent", "fish")},
    "There are two red apples.": {exists("apple", 2, color="red")},
    "three fish, four dogs": {exists("fish", 3), exists("dog", 4)},
    "One large blue striped vase.": {exists("vase", 1, size="large", color="blue", texture="striped")},
    "The cup is left of the plate.": {
        exists("cup"),
        exists("plate"),
        Claim("relation", "cup", relation="left of", other="plate"),
    },
    "The trees are above the house!": {
        exists("tree"),
        exists("house"),
        Claim("relation", "tree", relation="above", other="house"),
    },
    "A teapot is often seen with a cup.": set(),
    "A teapot is often seen with a cup, but there is no cup.": {Claim("absent", "cup")},
    "A teapot is often seen with a cup. There is a cat.": {exists("cat", 1)},
    "The cup is not red.": {exists("cup"), Claim("denied", "cup", color="red")},
    "The cup is not large.": {exists("cup")},
    "The cup is red.": {exists("cup"), exists("cup", color="red")},
    "Both apples are green.": {exists("apple", color="green")},
    "The boat is in the middle.": {exists("boat", column="middle")},
    "The keys are on the right": {exists("key", column="right")},
    "The cup stands on the left of the plate.": {exists("cup"), exists("plate")},
    "Another hat and an envelope": {exists("hat"), exists("envelope", 1)},
    "AN  ORANGE\nSHOE": {exists("shoe", 1, color="orange")},
    "two\tbirds": {exists("bird", 2)},
    "Yes.": set(),
    "": set(),
    "The scupper and the catalogue are cared for.": set(),
    "This is wrong because there are two forks in the middle.": {exists("fork", 2, column="middle")},
}


@pytest.mark.parametrize("text", SENTENCES, ids=repr)
def test_claims_of_a_sentence(text):
    claims = parse_claims(text)
    assert set(claims) == SENTENCES[text]
    assert len(claims) == len(set(claims))


def test_every_noun_is_read_in_singular_and_plural():
    for category in CATEGORIES:
        assert parse_claims(f"There is {with_article(category)}.") == [exists(category, 1)]
        assert parse_claims(f"There are three {plural(category)}.") == [exists(category, 3)]
        assert parse_claims(f"There is no {category}.") == [Claim("absent", category)]
        text = f"The {category}, two {plural(category)}, no {category}"
        assert parse_mentions(text) == [category, category]


# Two red apples left (large, then small), a blue striped cup right, a green plate between and above.
TABLE = make_scene(
    make_object("apple", "red", 0.16, 0.5, size="large"),
    make_object("apple", "red", 0.2, 0.85),
    make_object("cup", "blue", 0.84, 0.5, texture="striped"),
    make_object("plate", "green", 0.5, 0.16),
)
TRUTHS = {
    "There are two red apples on the left.": True,
    "There are three red apples.": False,
    "Two green apples": False,
    "A red apple": True,
    "The apples are red.": True,
    "The apples are blue.": False,
    "A large red apple and a small red apple": True,
    "One striped cup on the right": True,
    "A dotted cup": False,
    "A blue cup in the middle": False,
    "The cup is right of the apple.": True,
    "The cup is left of the apple.": False,
    "The cup is above the plate.": False,
    "The cup is not red.": True,
    "The cup is not blue.": False,
    "The fork is not blue.": False,
    "There is no fork.": True,
    "There are no cups.": False,
    "There is no red cup.": True,
    "Two cups": False,
}


@pytest.mark.parametrize("text", TRUTHS)
def test_claims_hold_if_the_scene_shows_them(text):
    claims = parse_claims(text)
    assert claims
    assert all(claim.holds(TABLE) for claim in claims) == TRUTHS[text]


def written(scene: Scene, seed: int) -> list[str]:
    """A description and the rationales of all questions of a scene, for right and wrong answers alike."""
    rng = np.random.default_rng(seed)
    texts = [describe(scene, rng)]
    for question in SceneAnnotator({}).questions(scene, rng, 6):
        texts += [" ".join(state_facts(scene, question.question, wrong)) for wrong in ("", *question.confusing_answers)]
    return texts


@settings(max_examples=50)
@given(numbers, seeds)
def test_annotations_make_true_claims_that_removed_objects_make_false(number, seed):
    scene = sample_scene(number)
    for text in written(scene, seed):
        claims = parse_claims(text)
        assert claims, text
        assert [claim for claim in claims if not claim.holds(scene)] == [], text
        for claim in claims:
            if claim.kind == "exists":
                others = tuple(item for item in scene.objects if item.category != claim.category)
                assert not claim.holds(dataclasses.replace(scene, objects=others)), text


@settings(max_examples=30)
@given(numbers, seeds)
def test_a_description_names_every_category_with_its_color(number, seed):
    scene = sample_scene(number)
    next_color = dict(zip(COLORS, (*COLORS[1:], COLORS[0]), strict=True))
    objects = tuple(dataclasses.replace(item, color=next_color[item.color]) for item in scene.objects)
    text = describe(scene, np.random.default_rng(seed))
    assert set(parse_mentions(text)) == {item.category for item in scene.objects}
    assert text.count(".") == len(scene.categories) + bool(scene.relations)
    colored = [claim for claim in parse_claims(text) if claim.color]
    assert len(colored) == len(scene.categories)
    assert all(claim.holds(scene) for claim in colored)
    assert not any(claim.holds(dataclasses.replace(scene, objects=objects)) for claim in colored)
