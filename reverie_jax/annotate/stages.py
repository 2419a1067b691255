"""The stages in order, for one picture: questions, rationales, judge, conversations."""

from __future__ import annotations

from reverie_jax.annotate import parsing
from reverie_jax.data.reflection import Reflection
from reverie_jax.hosted.interface import AnnotationError, Annotator, Request, RequestImage


def annotate(picture: RequestImage, annotator: Annotator, count: int) -> tuple[list[Reflection], list[str]]:
    """Asks everything about one picture.

    Returns:
        The reflections, and the reasons of what was dropped: replies that could not be used, and rationales that the
        judge found to contradict each other.
    """

    def ask(stage: str, **fields: str) -> str:
        return annotator.reply(Request(stage, picture, fields)).strip()  # type: ignore[arg-type]

    try:
        asked = parsing.questions(ask("questions", count=str(count), confusing="1"), confusing=99)
    except AnnotationError as error:
        return [], [f"{picture.key}: questions: {' '.join(str(error).split())}"]
    kept, dropped = [], []
    for question in asked:
        about = {"question": question.question, "answer": question.correct_answer}
        where = f"{picture.key}: {question.question!r}"
        try:
            positive = ask("positive", **about)
        except AnnotationError as error:
            dropped.append(f"{where}: {error}")
            continue
        negatives = []
        for wrong in question.confusing_answers:
            try:
                negative = ask("negative", question=question.question, answer=wrong)
                said = ask("judge", **about, positive=positive, wrong=wrong, negative=negative)
                verdict = parsing.verdict(said)
            except AnnotationError as error:  # what was had for this question stays
                dropped.append(f"{where}, {wrong!r}: {error}")
                continue
            if verdict == "no":
                negatives.append((wrong, negative))
            else:
                dropped.append(f"{where}, {wrong!r}: the judge said {said!r}")
        kept.append(Reflection(question, positive, tuple(negatives)))
    return kept, dropped
