"""What a hosted model must reply, as pydantic models and as JSON schemas."""

from __future__ import annotations

from typing import Any

import pydantic

from reverie_jax.data.reflection import AnnotatedQuestion


class QuestionSet(pydantic.BaseModel):
    """Reply of the stage `questions`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    questions: list[AnnotatedQuestion]


class Instruction(pydantic.BaseModel):
    """An instruction of LRV's kind; `task` is empty where it is a misleading one."""

    model_config = pydantic.ConfigDict(extra="forbid")

    instruction: str = pydantic.Field(min_length=1)
    answer: str = pydantic.Field(min_length=1)
    task: str


class InstructionSet(pydantic.BaseModel):
    """Reply of the stages `lrv_…`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    instructions: list[Instruction]


def _plain(schema: Any) -> Any:
    """A schema without bounds: services that hold replies to it know only the shape."""
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key != "minLength"}
    return [_plain(value) for value in schema] if isinstance(schema, list) else schema


QUESTIONS_SCHEMA: dict[str, Any] = _plain(QuestionSet.model_json_schema())


INSTRUCTIONS_SCHEMA: dict[str, Any] = _plain(InstructionSet.model_json_schema())
"""Replies as JSON schemas, for providers that write to one."""
