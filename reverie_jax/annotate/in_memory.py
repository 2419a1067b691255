"""Annotate one image with an annotator in memory: questions, rationales, verdicts."""

from __future__ import annotations

from reverie_jax.annotate import parsing
from reverie_jax.data.reflection import Reflection
from reverie_jax.hosted.interface import AnnotationError, Annotator, Request, RequestImage, Stage
from reverie_jax.hosted.thoughts import split_thoughts


def annotate(image: RequestImage, annotator: Annotator, count: int) -> tuple[list[Reflection], list[str]]:
    """Request `count` questions about an image, their rationales and verdicts.

    Returns:
        The reflections, and the reasons of what was dropped: unusable replies, and rationales that the judge found to
        contradict each other.
    """

    def ask(stage: Stage, **fields: str) -> str:
        return split_thoughts(annotator.reply(Request(stage, image, fields)))[1].strip()

    try:
        questions = parsing.parse_questions(ask("questions", count=str(count), confusing="1"))
    except AnnotationError as error:
        return [], [f"{image.key}: questions: {' '.join(str(error).split())}"]
    kept, dropped = [], []
    for question in questions:
        fields = {"question": question.question, "answer": question.correct_answer}
        where = f"{image.key}: {question.question!r}"
        try:
            positive = ask("positive", **fields)
        except AnnotationError as error:
            dropped.append(f"{where}: {error}")
            continue
        negatives = []
        for wrong in question.confusing_answers:
            try:
                negative = ask("negative", question=question.question, answer=wrong)
                reply = ask("judge", **fields, positive=positive, wrong=wrong, negative=negative)
                verdict = parsing.parse_verdict(reply)
            except AnnotationError as error:  # the question's other replies stay
                dropped.append(f"{where}, {wrong!r}: {error}")
                continue
            if verdict == "no":
                negatives.append((wrong, negative))
            else:
                dropped.append(f"{where}, {wrong!r}: the judge said {reply!r}")
        kept.append(Reflection(question, positive, tuple(negatives)))
    return kept, dropped
