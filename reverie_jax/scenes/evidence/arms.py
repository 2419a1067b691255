"""The arms: what each one is tuned on, by which recipe, and the settings that are searched on validation scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Kind, Turn
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.sequence_shape import SequenceShape
from reverie_jax.data.supervision import Supervision
from reverie_jax.scenes.corpus import make_conversation
from reverie_jax.scenes.corrections import correct
from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.instructions import make_instructions
from reverie_jax.scenes.questions import DESCRIBE
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.recipes import RECIPES

Question = Literal["REVERIE", "LRV", "RLHF-V"]
PLAIN_SHARE = 1 / 3
"""Pictures with plain conversations, for each picture with an arm's own."""
INSTRUCTIONS = 6
"""LRV's instructions about a picture, positive and negative ones together: their number is the same for all ratios."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Training pictures of one seed, with all that arms are tuned on.

    Attributes:
        records: of each picture, with its reflective conversations.
        plain: records of other pictures, with plain conversations, which all arms but those of pairs are tuned on too.
        scenes: what each picture shows.
        descriptions: the base model's own, of each picture.
        siblings: the base model's next sentences, of each picture: (text so far, true sentence, false sentence).
        seed: of the pictures.
    """

    records: Sequence[ImageRecord]
    plain: Sequence[ImageRecord]
    scenes: Sequence[Scene]
    descriptions: Sequence[str]
    siblings: Sequence[Sequence[tuple[str, str, str]]]
    seed: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of tuning.

    Attributes:
        name: of the arm.
        question: which method's claim it is part of.
        recipe: with which the arm is tuned; learning rate and steps are searched.
        conversations: returns the conversations about picture n that the arm is tuned on; none leaves the picture out.
        rates: learning rates that are searched.
    """

    name: str
    question: Question
    recipe: Recipe
    conversations: Callable[[Pictures, int], Sequence[Conversation]]
    rates: tuple[float, ...]

    def records(self, pictures: Pictures, count: int) -> list[ImageRecord]:
        """Return the first `count` pictures with what the arm is tuned on, and its share of plain ones.

        Pictures without a conversation of this arm are left out.
        """
        found = []
        for number in range(count):
            if conversations := self.conversations(pictures, number):
                found.append(dataclasses.replace(pictures.records[number], conversations=tuple(conversations)))
        return found if self.recipe.preference else found + list(pictures.plain[: round(PLAIN_SHARE * count)])


def _reflective(pictures: Pictures, number: int) -> Sequence[Conversation]:
    return pictures.records[number].conversations


def _instructions(negatives: int) -> Callable[[Pictures, int], Sequence[Conversation]]:
    def make(pictures: Pictures, number: int) -> Sequence[Conversation]:
        rng = np.random.default_rng([pictures.seed, number, 17])
        made = make_instructions(pictures.scenes[number], rng, INSTRUCTIONS, negatives)
        return [make_conversation(question, answer, "lrv") for question, answer in made]

    return make


def _pair(chosen: Turn, rejected: Turn, name: str) -> list[Conversation]:
    opening = Turn("user", f"{IMAGE}\n{DESCRIBE}")
    sides: tuple[tuple[Kind, Turn], ...] = (("chosen", chosen), ("rejected", rejected))
    return [Conversation((opening, turn), dataset="pairs", kind=kind, pair=name) for kind, turn in sides]


def _corrected(pictures: Pictures, number: int) -> Sequence[Conversation]:
    own = pictures.descriptions[number]
    right = correct(pictures.scenes[number], own)
    if not right or right == own:
        return []
    return _pair(Turn("assistant", right), Turn("assistant", own), "0")


def _siblings(pictures: Pictures, number: int) -> Sequence[Conversation]:
    return [
        conversation
        for index, (context, true, false) in enumerate(pictures.siblings[number])
        for conversation in _pair(
            Turn("assistant", true, prefix=context, ended=False),
            Turn("assistant", false, prefix=context, ended=False),
            str(index),
        )
    ]


_BASE = RECIPES["scenes-rationales"]
_SFT_RATES = (3e-4, 1e-3, 3e-3)
_PAIR_RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def _reverie(name: str, **supervision: Any) -> Arm:
    recipe = RECIPES["scenes-responses"] if supervision["kinds"] == "responses" else _BASE
    recipe = dataclasses.replace(recipe, name=name, supervision=Supervision(**supervision))
    return Arm(name, "REVERIE", recipe, _reflective, _SFT_RATES)


def _lrv(name: str, negatives: int) -> Arm:
    recipe = dataclasses.replace(_BASE, name=name, sequence=SequenceShape(length=160, images=1, edges=80))
    return Arm(name, "LRV", recipe, _instructions(negatives), _SFT_RATES)


def _preference(name: str, make: Callable[[Pictures, int], Sequence[Conversation]], config: DPOConfig) -> Arm:
    shape = SequenceShape(length=192, images=1, edges=192, questions=8)
    recipe = dataclasses.replace(_BASE, name=name, sequence=shape, preference=config)
    return Arm(name, "RLHF-V", recipe, make, _PAIR_RATES)


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        _reverie("answers", kinds="responses"),
        _reverie("answers+positive", kinds="positive"),
        _reverie("answers+negative", kinds="negative"),
        _reverie("reflective", kinds="rationales"),
        _reverie("reflective-joined", kinds="rationales", context="positive-first"),
        _reverie("reflective-weighted", kinds="rationales", answer_weight=8.0),
        _lrv("lrv-0", 0),
        _lrv("lrv-0.5", 2),
        _lrv("lrv-1", 3),
        _lrv("lrv-2", 4),
        _preference("dpo", _corrected, DPOConfig()),
        _preference("ddpo-1", _corrected, DPOConfig(beta=0.5, gamma=1.0, average=True)),
        _preference("ddpo-1.1", _corrected, DPOConfig(gamma=1.1)),
        _preference("ddpo-5", _corrected, DPOConfig(beta=0.5, gamma=5.0, average=True)),
        _preference("sentences", _siblings, DPOConfig()),
    )
}
"""All arms, by name.

`lrv-R` has R negative instructions for each positive one. `dpo`, `ddpo-1.1` (RLHF-V's released script), `ddpo-1` and
`ddpo-5` (its paper, which divides by the sum of the weights) weigh corrected tokens 1, 1.1, 1 and 5 times. `sentences`
prefers true next sentences of the model's own descriptions to false ones.
"""
