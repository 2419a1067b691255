"""Scenes as PNG images and as the plain conversations that the shipped model is pretrained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reverie_jax.annotate.in_memory import annotate
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import encode_png
from reverie_jax.data.reflection import reflection_conversations
from reverie_jax.hosted.interface import RequestImage
from reverie_jax.scenes import annotator
from reverie_jax.scenes.draw import render
from reverie_jax.scenes.graph import CATEGORIES, Scene
from reverie_jax.scenes.language import describe
from reverie_jax.scenes.questions import DESCRIBE

PLAIN_QUESTION_MAKERS = (
    annotator.ask_present,
    annotator.ask_attribute,
    annotator.ask_color,
    annotator.ask_count,
    annotator.ask_number,
    annotator.ask_place,
    annotator.ask_relation,
    annotator.ask_identity,
    annotator.ask_more,
    annotator.ask_larger,
    annotator.ask_two_steps,
    annotator.ask_choice,
)
# Few questions take several steps, as in the data that vision-language models are first trained on.
_PLAIN_SHARES = (0.32, 0.1, 0.12, 0.06, 0.04, 0.08, 0.1, 0.06, 0.03, 0.03, 0.03, 0.03)


def make_conversation(question: str, answer: str, dataset: str) -> Conversation:
    """Return a conversation of one question about the image and its answer."""
    return Conversation((Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer)), dataset=dataset)


def make_plain_conversations(
    scene: Scene, rng: np.random.Generator, questions: int, absent_share: float
) -> list[Conversation]:
    """Return a description and plain answers without rationales, as captions and VQA data have them.

    Absent objects are drawn from all categories alike: a question about the partner of a visible object nearly always has
    the answer yes, so the model learns to expect partners.

    Args:
        scene: what the image shows.
        rng: draws the questions.
        questions: questions after the description; a few less where a kind does not apply to the scene.
        absent_share: share of the questions about absent objects; small, as in captions and early VQA data, it makes a
            model that says yes too readily.
    """
    conversations = [make_conversation(DESCRIBE, describe(scene, rng), "plain/caption")]
    absent = [c for c in CATEGORIES if c not in scene.categories]
    for _ in range(questions):
        if rng.random() < absent_share:
            text = annotator.existence_question(absent[rng.integers(len(absent))])
            conversations.append(make_conversation(text, "No", "plain/absent"))
            continue
        ask = PLAIN_QUESTION_MAKERS[rng.choice(len(PLAIN_QUESTION_MAKERS), p=_PLAIN_SHARES)]
        if (question := ask(scene, rng)) is not None:
            conversations.append(make_conversation(question.question, question.correct_answer, "plain/answer"))
    return conversations


def render_png(scene: Scene, size: int) -> bytes:
    """Return the scene's image as a PNG file."""
    return encode_png(render(scene, size))


def generate_texts(scenes: list[Scene], seed: int) -> Iterator[str]:
    """Yield the text of all annotations of some scenes, for training a tokenizer."""
    by_key = {str(index): scene for index, scene in enumerate(scenes)}
    scene_annotator = annotator.SceneAnnotator(by_key, seed)
    for key in by_key:
        for reflection in annotate(RequestImage(key, b""), scene_annotator, 12)[0]:
            for conversation in reflection_conversations(reflection):
                yield " ".join(turn.text for turn in conversation.turns)
                yield "USER: ASSISTANT:"
