"""Replies of hosted models, as pydantic models and as JSON schemas."""

from __future__ import annotations

from typing import Any

import pydantic

from reverie_jax.data.reflection import AnnotatedQuestion


class QuestionSet(pydantic.BaseModel):
    """Reply of the stage `questions`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    questions: list[AnnotatedQuestion]


class Instruction(pydantic.BaseModel):
    """An instruction of LRV; `task` is empty if it is a misleading one."""

    model_config = pydantic.ConfigDict(extra="forbid")

    instruction: str = pydantic.Field(min_length=1)
    answer: str = pydantic.Field(min_length=1)
    task: str


class InstructionSet(pydantic.BaseModel):
    """Reply of the stages `lrv_...`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    instructions: list[Instruction]


def _without_bounds(schema: Any) -> Any:
    """Return a schema without length bounds, which APIs with structured output reject."""
    if isinstance(schema, dict):
        return {key: _without_bounds(value) for key, value in schema.items() if key != "minLength"}
    return [_without_bounds(value) for value in schema] if isinstance(schema, list) else schema


QUESTIONS_SCHEMA: dict[str, Any] = _without_bounds(QuestionSet.model_json_schema())
INSTRUCTIONS_SCHEMA: dict[str, Any] = _without_bounds(InstructionSet.model_json_schema())
"""JSON schemas for structured output."""
