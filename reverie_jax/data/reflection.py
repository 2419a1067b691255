"""Reflective examples: a question, its answers, why each is right or wrong, and the conversations that teach it."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import pydantic

from reverie_jax.data.conversation import IMAGE, Conversation, Kind, Turn

WHY = "Explain why."


WHY_WRONG = "Explain why this answer is wrong: {answer}"


QuestionType = Literal["yes/no", "choice", "short", "open"]


class AnnotatedQuestion(pydantic.BaseModel):
    """A question about an image, its right answer, and answers that would confuse."""

    model_config = pydantic.ConfigDict(extra="forbid")

    question: str = pydantic.Field(min_length=1)
    type: QuestionType
    correct_answer: str = pydantic.Field(min_length=1)
    confusing_answers: list[str]


@dataclasses.dataclass(frozen=True)
class Reflection:
    """A question with its rationales: one positive, and one negative for each confusing answer."""

    question: AnnotatedQuestion
    positive: str
    negatives: tuple[tuple[str, str], ...]
    """(confusing answer, why it is wrong)."""


def conversations(reflection: Reflection) -> list[Conversation]:
    """The talks that one reflection teaches: REVERIE's separate four-turn conversations, one a rationale.

    The right answer opens each of them, also where a wrong answer is explained.
    """
    question, answer = reflection.question.question, reflection.question.correct_answer
    prompts: list[tuple[Kind, str, str]] = [("positive", WHY, reflection.positive)]
    prompts += [("negative", WHY_WRONG.format(answer=wrong), why) for wrong, why in reflection.negatives]
    opening = (Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer))
    return [
        Conversation((*opening, Turn("user", prompt), Turn("assistant", why)), dataset="reflective", kind=kind)
        for kind, prompt, why in prompts
    ]


def kind_of(question: str, answer: str) -> QuestionType:
    """The type of a question that says none."""
    if re.fullmatch(r"(yes|no)\W*", answer.strip(), re.IGNORECASE):
        return "yes/no"
    if re.search(r"(^|\s)\(?A[.):]\s.*\sB[.):]?\s", question.replace("(B)", "B.").replace("(A)", "A."), re.DOTALL):
        return "choice"
    return "short" if len(answer.split()) <= 5 else "open"
