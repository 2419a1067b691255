"""The grammar of questions, and the questions of the benchmark, against what their words mean (`makers.right_answer`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.scenes import benchmark
from reverie_jax.scenes.graph import CATEGORIES, COLORS, Scene, take_scenes
from reverie_jax.scenes.language import parse_claims
from reverie_jax.scenes.questions import FORMS, SKILLS, Query, Thing
from tests.scenes.makers import (
    BROKEN,
    NEW_COMPOSITIONS,
    NEW_PAIRS,
    NUMBERS,
    about,
    make_scene,
    new_things,
    right_answer,
    sample_scene,
)

numbers, seeds = st.integers(0, 10**9), st.integers(0, 10**6)
SIDES = ("left of", "right of", "above", "below")


def make_query(scene: Scene, rng: np.random.Generator, form: str) -> Query:
    """A question of a form whose fields are drawn, so that the scene may not decide it."""

    def pick(*options):
        return options[rng.integers(len(options))]

    def category():
        return pick(*(scene.categories if rng.random() < 0.9 else CATEGORIES))

    def thing():
        return Thing(category(), pick("", *SIDES, "beside"))

    options = zip("ABCD", rng.permutation(CATEGORIES), strict=False)
    make = {
        "thing": thing,
        "second": thing,
        "look": lambda: pick(*COLORS, "small", "large", "plain", "striped", "dotted"),
        "number": lambda: pick(*NUMBERS[2:]),
        "relation": lambda: pick(*SIDES),
        "options": lambda: " ".join(f"{letter}. {noun}" for letter, noun in options),
    }
    fields = re.findall(r"\{(\w+)\}", FORMS[form].pattern.replace("{article}", "{noun}"))
    return Query.make(form, **{field: make.get(field, category)() for field in fields})


@given(numbers, seeds)
def test_a_question_means_what_its_words_say(number, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    for form in FORMS:
        query = make_query(scene, rng, form)
        assert Query.parse(query.text) == query
        assert query.subjects(scene) == about(scene, query.text), query
        if form != "description":
            assert query.answer(scene) == right_answer(scene, query.text), query


def test_questions_of_every_form_are_decided_or_not():
    rng = np.random.default_rng(0)
    for form in FORMS:
        asked = [make_query(scene, rng, form).answer(scene) for scene in map(sample_scene, range(600))]
        always = form in ("existence", "count", "at least", "exactly", "more", "description")
        assert {answer is not None for answer in asked} == ({True} if always else {True, False}), form


@pytest.mark.parametrize(
    "text", ["", "Is there a cup?", "Is the thing beside the cup in the image?", "Describe the image"]
)
def test_other_questions_are_of_no_form(text):
    assert Query.parse(text) is None


def changed(scene: Scene) -> Iterator[Scene]:
    """Scenes with one thing less, or another one, or one that looks or lies otherwise."""
    for n, item in enumerate(scene.objects):
        rest = (*scene.objects[:n], *scene.objects[n + 1 :])
        other, *more = rest
        absent = next(c for c in CATEGORIES if c not in scene.categories)
        yield make_scene(*rest)
        for looks in (
            {"category": absent},
            {"size": {"small": "large", "large": "small"}[item.size]},
            {"texture": "dotted"},
        ):
            yield make_scene(*rest, dataclasses.replace(item, **looks))
        color = COLORS[(COLORS.index(item.color) + 1) % len(COLORS)]
        same = [dataclasses.replace(t, color=color) for t in scene.objects if t.category == item.category]
        yield make_scene(*same, *(t for t in scene.objects if t.category != item.category))
        swapped = dataclasses.replace(item, x=other.x, y=other.y), dataclasses.replace(other, x=item.x, y=item.y)
        yield make_scene(*swapped, *more)


@given(numbers, seeds)
def test_facts_are_true_speak_of_the_subjects_and_decide_the_question(number, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    for form in FORMS:
        query = make_query(scene, rng, form)
        facts, answer = query.facts(scene), query.answer(scene)
        claims = parse_claims(" ".join(facts))
        assert [claim for claim in claims if not claim.holds(scene)] == [], query
        if answer is None:
            continue
        assert about(scene, query.text) <= {name for claim in claims for name in (claim.category, claim.other)}, query
        for other in changed(scene):
            # In no scene with the same facts is the answer another one.
            assert query.answer(other) in (None, answer) or query.facts(other) != facts, (query, other)


@pytest.mark.parametrize("world", [BROKEN, NEW_PAIRS, NEW_COMPOSITIONS])
def test_the_benchmark_asks_in_pairs_and_about_what_is_held_out(world):
    pairs = dict.fromkeys(SKILLS[1:], 0)
    for scene in take_scenes(world, "test", 5, 40):
        held_out = set.union(*new_things(scene)) or {t.category for t in scene.objects}
        asked, why = benchmark.skill_questions(scene), benchmark.rationale_questions(scene)
        for skill, question in (*asked, *((Query.parse(q.question).skill, q) for q in why)):
            assert Query.parse(question.question).skill == skill
            assert question.correct_answer == right_answer(scene, question.question) not in question.confusing_answers
            assert about(scene, question.question) & held_out, question
        for skill in pairs:
            answers = sorted(q.correct_answer for s, q in asked if s == skill and q.type == "yes/no")
            assert answers in ([], ["No", "Yes"])
            assert sum(s == skill for s, _ in asked) <= 3
            pairs[skill] += bool(answers)
        assert len({q.question for _, q in asked}) == len(asked)
        # Little can be asked about one held-out thing.
        assert 1 <= len({Query.parse(q.question).skill for q in why}) == len(why) <= benchmark.RATIONALES
    # What is new in a composition appears once, so it is never counted.
    assert all(number >= 10 for skill, number in pairs.items() if (world, skill) != (NEW_COMPOSITIONS, "count")), pairs
