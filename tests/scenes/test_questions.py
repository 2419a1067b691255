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
from reverie_jax.scenes.graph import CATEGORIES, COLORS, Scene, World, take_scenes
from reverie_jax.scenes.language import parse_claims
from reverie_jax.scenes.questions import FORMS, LOOKS, SKILLS, Query, Thing
from tests.scenes.makers import NUMBERS, about, make_scene, new_things, right_answer, sample_scene

SIDES = ("left of", "right of", "above", "below")


def make_query(scene: Scene, rng: np.random.Generator, form: str) -> Query:
    """A question of a form whose fields are drawn, so that the scene may not decide it."""

    def pick(*options):
        return options[rng.integers(len(options))]

    def category():
        return pick(*(scene.categories if rng.random() < 0.9 else CATEGORIES))

    make = {
        **dict.fromkeys(("thing", "second"), lambda: Thing(category(), pick("", *SIDES, "beside"))),
        "look": lambda: pick(*LOOKS),
        "number": lambda: pick(*NUMBERS[2:]),
        "relation": lambda: pick(*SIDES),
        "options": lambda: " ".join(map("{}. {}".format, "ABCD", rng.permutation(CATEGORIES))),
    }
    fields = re.findall(r"\{(\w+)\}", FORMS[form].pattern.replace("{article}", "{noun}"))
    return Query.make(form, **{field: make.get(field, category)() for field in fields})


@pytest.mark.parametrize("form", FORMS)
def test_a_question_means_what_its_words_say(form):
    rng, decided = np.random.default_rng(0), set()
    for scene in map(sample_scene, range(400)):
        query = make_query(scene, rng, form)
        assert Query.parse(query.text) == query
        assert query.subjects(scene) == about(scene, query.text), query
        assert form == "description" or query.answer(scene) == right_answer(scene, query.text), query
        decided.add(query.answer(scene) is not None)
    always = form in ("existence", "count", "at least", "exactly", "more", "description")
    assert decided == ({True} if always else {True, False})


def changed(scene: Scene) -> Iterator[Scene]:
    """Scenes with one thing less, or another one, or one that looks or lies otherwise."""
    absent = next(c for c in CATEGORIES if c not in scene.categories)
    for item in scene.objects:
        other, *more = rest = [t for t in scene.objects if t is not item]
        yield make_scene(*rest)
        size = "small" if item.size == "large" else "large"
        for looks in ({"category": absent}, {"size": size}, {"texture": "dotted"}):
            yield make_scene(*rest, dataclasses.replace(item, **looks))
        same, color = scene.find(item.category), COLORS[COLORS.index(item.color) - 1]
        yield make_scene(*set(scene.objects) - set(same), *(dataclasses.replace(t, color=color) for t in same))
        swapped = dataclasses.replace(item, x=other.x, y=other.y), dataclasses.replace(other, x=item.x, y=item.y)
        yield make_scene(*swapped, *more)


@given(st.integers(0, 10**9), st.integers(0, 10**6))
def test_facts_are_true_speak_of_the_subjects_and_decide_the_question(number, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    for form in FORMS:
        query = make_query(scene, rng, form)
        facts, answer = query.facts(scene), query.answer(scene)
        claims = parse_claims(" ".join(facts))
        assert [claim for claim in claims if not claim.holds(scene)] == [], query
        if answer is not None:
            assert about(scene, query.text) <= {name for claim in claims for name in (claim.category, claim.other)}
            # In no scene with the same facts is the answer another one.
            others = [other for other in changed(scene) if query.answer(other) not in (None, answer)]
            assert facts not in [query.facts(other) for other in others], query


@pytest.mark.parametrize("world", [World.broken(), World.new_pairs(), World.new_compositions()])
def test_the_benchmark_asks_in_pairs_and_about_what_is_held_out(world):
    pairs = dict.fromkeys(SKILLS[1:], 0)
    for scene in take_scenes(world, "test", 5, 40):
        held_out = set.union(*new_things(scene)) or set(scene.categories)
        asked, why = benchmark.skill_questions(scene), benchmark.rationale_questions(scene)
        skills = [Query.parse(question.question).skill for question in why]
        for skill, question in (*asked, *zip(skills, why, strict=True)):
            assert Query.parse(question.question).skill == skill
            assert question.correct_answer == right_answer(scene, question.question) not in question.confusing_answers
            assert about(scene, question.question) & held_out, question
        for skill in pairs:
            answers = [question.correct_answer for s, question in asked if s == skill and question.type == "yes/no"]
            assert sorted(answers) in ([], ["No", "Yes"])
            pairs[skill] += bool(answers)
        assert 1 <= len(set(skills)) == len(skills) <= benchmark.RATIONALES  # little is asked about one new thing
    # What is new in a composition appears once, so it is never counted.
    assert all(number >= 10 or (world.compositions, skill) == ("present", "count") for skill, number in pairs.items())
