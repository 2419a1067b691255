"""Scenes as pictures and as the plain talk that the shipped base was pretrained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reverie_jax.annotate.stages import annotate
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import encode_png
from reverie_jax.data.reflection import reflection_conversations
from reverie_jax.hosted.interface import RequestImage
from reverie_jax.scenes import annotator as ask
from reverie_jax.scenes.draw import render
from reverie_jax.scenes.graph import CATEGORIES, Scene

PLAIN_ASKERS = (ask.ask_present, ask.ask_colour, ask.ask_count, ask.ask_place, ask.ask_relation, ask.ask_choice)


def talk(question: str, answer: str, dataset: str) -> Conversation:
    """One question about the picture and its answer."""
    return Conversation((Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer)), dataset=dataset)


def plain_talks(scene: Scene, rng: np.random.Generator, questions: int, absent_share: float) -> list[Conversation]:
    """A description and plain answers, no rationale, as captions and VQA teach a base.

    What is not there is drawn from all categories alike: a question about the partner of something visible nearly always
    has the answer yes, so the base learns to expect partners.

    Args:
        absent_share: share of the questions that ask for something absent; small, as in captions and early VQA, it makes
            a base that says yes too readily.
    """
    talks = [talk(ask.DESCRIBE, ask.describe(scene, rng), "plain/caption")]
    absent = [c for c in CATEGORIES if c not in scene.categories]
    for _ in range(questions):
        if rng.random() < absent_share:
            talks.append(talk(ask.existence(absent[rng.integers(len(absent))]), "No", "plain/absent"))
            continue
        question = PLAIN_ASKERS[rng.choice(len(PLAIN_ASKERS), p=(0.4, 0.15, 0.1, 0.15, 0.1, 0.1))](scene, rng)
        if question is not None:
            talks.append(talk(question.question, question.correct_answer, "plain/answer"))
    return talks


def picture(scene: Scene, size: int) -> bytes:
    """The scene's picture as a PNG file."""
    return encode_png(render(scene, size))


def texts(scenes: list[Scene], seed: int) -> Iterator[str]:
    """Everything that is said of some scenes, for training a tokenizer."""
    pictures = {str(index): scene for index, scene in enumerate(scenes)}
    annotator = ask.SceneAnnotator(pictures, seed)
    for key in pictures:
        for reflection in annotate(RequestImage(key, b""), annotator, 12)[0]:
            for talk in reflection_conversations(reflection):
                yield " ".join(turn.text for turn in talk.turns)
                yield "USER: ASSISTANT:"
