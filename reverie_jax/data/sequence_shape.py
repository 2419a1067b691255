"""The static sizes of a packed sequence; without JAX and Grain, so that recipes can be read without them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SequenceShape:
    """Static sizes of a packed sequence. Each shape is compiled once.

    Attributes:
        length: L, tokens.
        images: M, the most trees in a sequence; each has at most one image, so also the most images.
        edges: E, supervised tokens.
        questions: Q, open questions (evaluation) or answers of preference pairs; 0 in other training.
        branches: the most conversations in a tree; 0 for no limit. A tree with more is split.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    length: int
    images: int = 1
    edges: int = 0
    questions: int = 0
    branches: int = 0
