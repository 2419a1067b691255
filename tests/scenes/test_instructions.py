"""LRV's instructions, and corrections of descriptions: what they say is true of the scene."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.scenes.corrections import correct, is_true, split_sentences
from reverie_jax.scenes.graph import PARTNER, Scene
from reverie_jax.scenes.instructions import NEGATIVES, make_instructions, negative_instruction, positive_instruction
from reverie_jax.scenes.language import describe, parse_claims
from tests.scenes.makers import all_of, is_right, make_object, make_scene, nouns, sample_scene

numbers, seeds = st.integers(0, 10**9), st.integers(0, 10**6)


def kind_of(scene: Scene, question: str, answer: str) -> str:
    """Which of LRV's kinds an instruction is; it fails if the answer is not true."""
    assert all(claim.holds(scene) for claim in parse_claims(answer)), (question, answer)
    absent = [noun for noun in nouns(question) if not all_of(scene, noun)]
    first = re.match(r"(Yes|No), |There is no ", answer)
    if first is None or first[1]:
        assert is_right(scene, question, first[1] if first else re.split("[ .]", answer)[-2]), (question, answer)
    if "often" in question:
        assert nouns(answer) == [nouns(question)[0], PARTNER[nouns(question)[0]]]
    if first is None or first[1] == "Yes":
        return "positive"
    assert not absent or "often" in question or nouns(answer) == absent
    return "knowledge" if "often" in question else "nonexistent" if absent else "existent"


@given(numbers, seeds)
def test_instructions_are_true_of_their_kind_and_as_many_as_asked(number, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    single = 1 in scene.counts.values()
    assert kind_of(scene, *positive_instruction(scene, rng)) == "positive"
    for kind in NEGATIVES:
        made = negative_instruction(scene, rng, kind)
        assert kind_of(scene, *made) == kind if made else (kind, single) == ("existent", False)
    for negatives in (0, 2, 3, 4):
        made = make_instructions(scene, rng, 6, negatives)
        assert len({question for question, _ in made}) == len(made) == 6
        kinds = [kind for kind in (kind_of(scene, *one) for one in made) if kind != "positive"]
        assert len(kinds) == negatives
        assert len(set(kinds)) == min(3, negatives) or not single


# Two red apples on the left, a blue cup on the right of a green plate.
TABLE = make_scene(
    make_object("apple", "red", 0.16, 0.5, size="large"),
    make_object("apple", "red", 0.2, 0.85),
    make_object("cup", "blue", 0.84, 0.5),
    make_object("plate", "green", 0.5, 0.3),
)
APPLES, CUP = "There are two red apples on the left.", "There is a blue cup on the right."
CORRECTIONS = {
    f"{APPLES} There is a blue cup.": f"{APPLES} There is a blue cup.",
    "There are three green apples.": APPLES,
    "There is a red cup. A quiet scene. There is a plate": f"{CUP} A quiet scene. There is a plate",
    "There is a fork. There is a cup.": f"{APPLES} There is a cup.",
    "A fork. A key. A cup. An apple. A plate.": "A cup. An apple. A plate.",
    "A fork. A key. A dog. A cup.": f"{APPLES} There is a green plate in the middle. A cup.",
    "The cup is left of the plate.": "The cup is right of the plate.",
    "There is no cup.": CUP,
    "There is a red cup. There is a cup in the middle.": CUP,
    f"There is a red cup. {CUP}": CUP,
    "": "",
}


@pytest.mark.parametrize("text", CORRECTIONS, ids=repr)
def test_a_correction_by_hand(text):
    assert correct(TABLE, text) == CORRECTIONS[text]


@given(numbers, numbers, seeds)
def test_corrections_are_true_and_keep_what_was_true(number, other, seed):
    scene, rng = sample_scene(number), np.random.default_rng(seed)
    written = split_sentences(f"{describe(scene, rng)} {describe(sample_scene(other), rng)} Nothing else matters.")
    written = [written[n] for n in rng.permutation(len(written))[: int(rng.integers(1, 8))]]
    right = correct(scene, " ".join(written))
    assert all(claim.holds(scene) for claim in parse_claims(right)), (written, right)
    rest = iter(split_sentences(right))
    assert all(sentence in rest for sentence in written if is_true(scene, sentence) is not False)  # in their order
    assert correct(scene, right) == right
    # A relation that cannot be corrected is left out, with what only it named.
    named = {noun for sentence in written if not sentence.startswith("The ") for noun in nouns(sentence)}
    assert named & set(scene.categories) <= set(nouns(right)), (written, right)
