"""What an annotator is asked and what it must reply: the one interface for hosted models and for the embedded world.

An annotator turns a `Request` into raw text. Replies of the stage `questions` are JSON of `QuestionSet`; rationales are
plain text; the judge replies with a text that starts with yes (they contradict each other: drop) or no (keep).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import pydantic

Stage = Literal["questions", "positive", "negative", "judge"]
QuestionType = Literal["yes/no", "choice", "short", "open"]


class AnnotatedQuestion(pydantic.BaseModel):
    """A question about an image, its right answer, and answers that would confuse."""

    model_config = pydantic.ConfigDict(extra="forbid")

    question: str = pydantic.Field(min_length=1)
    type: QuestionType
    correct_answer: str = pydantic.Field(min_length=1)
    confusing_answers: list[str]


class QuestionSet(pydantic.BaseModel):
    """Reply of the stage `questions`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    questions: list[AnnotatedQuestion]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as an annotator gets it: `key` identifies its content, `encoded` is the file's bytes (PNG, JPEG, …)."""

    key: str
    encoded: bytes


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        fields: what the stage needs. `questions`: {"count"}; `positive`: {"question", "answer"};
            `negative`: {"question", "answer"} with a confusing answer;
            `judge`: {"question", "answer", "positive", "wrong", "negative"}.
    """

    stage: Stage
    picture: Picture
    fields: Mapping[str, str]


@runtime_checkable
class Annotator(Protocol):
    """Anything that can reply to requests."""

    name: str

    def reply(self, request: Request) -> str:
        """Raw reply; raises `AnnotationError` where none can be had."""
        ...


class AnnotationError(Exception):
    """A request that got no usable reply; the message says why."""
