"""Scenes as training records and as the plain talk that the shipped base was pretrained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.images import encode_png
from reverie_jax.data.scenes import annotator as ask
from reverie_jax.data.scenes.draw import render
from reverie_jax.data.scenes.graph import CATEGORIES, Scene

PLAIN_ASKERS = (ask.ask_present, ask.ask_colour, ask.ask_count, ask.ask_place, ask.ask_relation, ask.ask_choice)


def talk(question: str, answer: str, source: str) -> Conversation:
    """One question about the picture and its answer."""
    return Conversation((Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer)), source=source)


def plain_talks(scene: Scene, rng: np.random.Generator, questions: int) -> list[Conversation]:
    """A description and plain answers, no rationale, as captions and VQA teach a base.

    Absent things are drawn from all categories alike: nearly every question about a partner of what is there has the
    answer yes, so the base learns to expect it.
    """
    talks = [talk(ask.DESCRIBE, ask.describe(scene, rng), "plain/caption")]
    absent = [c for c in CATEGORIES if c not in scene.categories]
    for _ in range(questions):
        if rng.random() < 0.3:
            talks.append(talk(ask.existence(absent[rng.integers(len(absent))]), "No", "plain/absent"))
            continue
        question = PLAIN_ASKERS[rng.choice(len(PLAIN_ASKERS), p=(0.4, 0.15, 0.1, 0.15, 0.1, 0.1))](scene, rng)
        if question is not None:
            talks.append(talk(question.question, question.correct_answer, "plain/answer"))
    return talks


def picture(scene: Scene, size: int) -> bytes:
    """The scene's picture as a PNG file."""
    return encode_png(render(scene, size))


def record(id: str, scene: Scene, size: int, talks: list[Conversation]) -> ImageRecord:
    return ImageRecord(id, picture(scene, size), tuple(talks))


def texts(scenes: list[Scene], seed: int) -> Iterator[str]:
    """Everything that is said of some scenes, for training a tokenizer."""
    annotator = ask.SceneAnnotator({}, seed)
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, index])
        for question in annotator.questions(scene, rng, 12):
            yield f"USER: {IMAGE}\n{question.question} ASSISTANT: {question.correct_answer}"
            for answer in (question.correct_answer, *question.confusing_answers):
                yield f" Explain why this answer is wrong: {answer} Explain why."
                why = ask.explain(scene, question.question, answer, rng)
                yield f" {why} This is wrong because {ask._lower(why)}"
