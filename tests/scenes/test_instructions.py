"""LRV's instructions, and corrections of descriptions: what they say is true of the scene."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.scenes.corrections import correct, is_true, split_sentences
from reverie_jax.scenes.graph import CATEGORIES, PARTNER, Scene
from reverie_jax.scenes.instructions import NEGATIVES, make_instructions, negative_instruction, positive_instruction
from reverie_jax.scenes.language import describe, parse_claims
from tests.scenes.makers import all_of, is_right, make_object, make_scene, sample_scene, singular

numbers, seeds = st.integers(0, 10**9), st.integers(0, 10**6)


def kind_of(scene: Scene, question: str, answer: str) -> str:
    """Which of LRV's kinds an instruction is, if its answer is true; it fails otherwise."""
    named = [singular(word) for word in re.findall(r"\w+", question) if singular(word) in CATEGORIES]
    if "often seen" in question:
        assert answer.endswith(f"often seen with a{'n' * (PARTNER[named[0]][0] in 'aeiou')} {PARTNER[named[0]]}.")
    assert all(claim.holds(scene) for claim in parse_claims(answer)), (question, answer)
    absent = [noun for noun in named if not all_of(scene, noun)]
    if answer.startswith(("Yes, ", "No, ")):
        assert is_right(scene, question, answer.split(",")[0]), (question, answer)
    elif absent:
        assert answer == f"There is no {absent[0]}."
    else:
        assert is_right(scene, question, re.split("[ .]", answer)[-2]), (question, answer)
    if not answer.startswith(("No, ", "There is no ")):
        return "positive"
    return "knowledge" if "often" in question else "nonexistent" if absent else "existent"


@given(numbers, seeds)
def test_instructions_are_true_of_their_kind_and_as_many_as_asked(number, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    single = any(count == 1 for count in scene.counts.values())
    assert kind_of(scene, *positive_instruction(scene, rng)) == "positive"
    for kind in NEGATIVES:
        made = negative_instruction(scene, rng, kind)
        assert (made is not None) == (kind != "existent" or single)
        assert made is None or kind_of(scene, *made) == kind
    for negatives in (0, 2, 3, 4):
        made = make_instructions(scene, rng, 6, negatives)
        assert len({question for question, _ in made}) == len(made) == 6
        kinds = [kind for kind in (kind_of(scene, *one) for one in made) if kind != "positive"]
        assert len(kinds) == negatives
        assert len(set(kinds)) == min(3, negatives) or not single


# Two red apples on the left, a blue cup on the right, a green plate between and above them.
TABLE = make_scene(
    make_object("apple", "red", 0.16, 0.5, size="large"),
    make_object("apple", "red", 0.2, 0.85),
    make_object("cup", "blue", 0.84, 0.5),
    make_object("plate", "green", 0.5, 0.3),
)
CORRECTIONS = {
    "There are two red apples on the left. There is a blue cup.": None,
    "There are three green apples.": "There are two red apples on the left.",
    "There is a red cup. A quiet scene. There is a green plate": (
        "There is a blue cup on the right. A quiet scene. There is a green plate"
    ),
    "There is a fork. There is a cup.": "There are two red apples on the left. There is a cup.",
    "A fork. A key. A cup. An apple. A plate.": "A cup. An apple. A plate.",
    "The cup is left of the plate.": "The cup is right of the plate.",
    "There is no cup.": "There is a blue cup on the right.",
    "There is a red cup. There is a cup in the middle.": "There is a blue cup on the right.",
    "There is a red cup. There is a blue cup on the right.": "There is a blue cup on the right.",
    "": None,
}


@pytest.mark.parametrize("text", CORRECTIONS, ids=repr)
def test_a_correction_by_hand(text):
    assert correct(TABLE, text) == (text if CORRECTIONS[text] is None else CORRECTIONS[text])


@given(numbers, numbers, seeds)
def test_corrections_are_true_and_keep_what_was_true(number, other, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    written = split_sentences(f"{describe(scene, rng)} {describe(sample_scene(other), rng)} Nothing else matters.")
    text = " ".join(written[n] for n in rng.permutation(len(written))[: int(rng.integers(1, 8))])
    right = correct(scene, text)
    assert all(claim.holds(scene) for claim in parse_claims(right)), (text, right)
    kept = [sentence for sentence in split_sentences(text) if is_true(scene, sentence) is not False]
    rest = iter(split_sentences(right))
    assert all(sentence in rest for sentence in kept), (text, right)  # in their order
    assert correct(scene, right) == right
    there = {t.category for t in scene.objects}

    def covered(text: str) -> set[str]:
        return {singular(word.lower()) for word in re.findall(r"\w+", text)} & there

    # A relation that cannot be corrected is left out, with what only it named.
    named = " ".join(sentence for sentence in split_sentences(text) if not sentence.startswith("The "))
    assert covered(named) <= covered(right), (text, right)
