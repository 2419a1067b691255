"""Conversations about images: turns, conversations, and records of one image."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from reverie_jax.data.templates import IMAGE

__all__ = ["IMAGE", "Conversation", "ImageRecord", "Role", "Turn"]

Role = Literal["user", "assistant"]
Kind = Literal["", "positive", "negative", "chosen", "rejected"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One side's words. `weight` scales the loss on an assistant's tokens (0: not taught); `<image>` marks a picture."""

    role: Role
    text: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, user first. The n-th `<image>` marker shows the record's image `images[n]`.

    The last turn may be the user's: it is then open, a question that waits for an answer.

    Attributes:
        source: the annotations that it comes from.
        kind: what it teaches beside its answer: why a right answer is right, why a wrong one is wrong, or neither; or the
            side of a pair of answers that it is.
        pair: what the two sides of a pair have in common.
    """

    turns: tuple[Turn, ...]
    images: tuple[int, ...] = (0,)
    dataset: str = ""
    kind: Kind = ""
    pair: str = ""

    def __post_init__(self) -> None:
        for index, turn in enumerate(self.turns):
            if turn.role != ("user", "assistant")[index % 2]:
                raise ValueError(f"turn {index} is the {turn.role}'s; turns alternate, user first")
            if turn.role == "assistant" and IMAGE in turn.text:
                raise ValueError(f"turn {index}: {IMAGE} in an answer; only a user shows pictures")
        markers = sum(turn.text.count(IMAGE) for turn in self.turns)
        if markers != len(self.images):
            raise ValueError(f"{markers} {IMAGE} markers for {len(self.images)} images")

    @property
    def open(self) -> bool:
        return len(self.turns) % 2 == 1

    def to_json(self) -> dict[str, Any]:
        """A plain object; `from_json` turns it back."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value or key != "pair"}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Conversation:
        turns = tuple(Turn(**turn) for turn in row["turns"])
        return cls(turns, tuple(row["images"]), row["dataset"], row.get("kind", ""), row.get("pair", ""))


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image with all that is said about it: the unit of storage and of shuffling.

    Attributes:
        image: the encoded file (PNG, JPEG, …); empty for text-only talk.
    """

    id: str
    image: bytes
    conversations: tuple[Conversation, ...]

    def talks_json(self) -> str:
        return json.dumps([talk.to_json() for talk in self.conversations], separators=(",", ":"))

    @classmethod
    def from_parts(cls, id: str, image: bytes, talks: str) -> ImageRecord:
        return cls(id, image, tuple(Conversation.from_json(row) for row in json.loads(talks)))
