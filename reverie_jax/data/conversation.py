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
    """One message of a conversation.

    Attributes:
        role: who says it.
        text: what is said; each `<image>` in a user's text shows one image.
        weight: loss weight of the tokens of an assistant's text; 0 excludes them from the loss.
        prefix: what an assistant's message begins with, before `text`: the answer so far. It is never supervised. Without
            `text`, it is for the model to go on from.
        ended: whether an assistant's message ends with `text`. If not, as behind a sentence of a description, its end is
            not supervised.
    """

    role: Role
    text: str
    weight: float = 1.0
    prefix: str = ""
    ended: bool = True

    @property
    def message(self) -> str:
        """All that is said."""
        return self.prefix + self.text

    @property
    def is_begun(self) -> bool:
        """Whether it is the beginning of a message, for the model to go on from."""
        return bool(self.prefix and not self.text)

    @property
    def is_taught(self) -> bool:
        """Whether it is an answer that has a weight."""
        return self.role == "assistant" and self.weight > 0 and not self.is_begun

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object of the fields, without those of begun or unended messages where they are not used."""
        optional = {"prefix": "", "ended": True}
        return {key: value for key, value in dataclasses.asdict(self).items() if optional.get(key) != value}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Alternating turns about a record's images, the user's first.

    It is open, a question without its answer, if the last turn is the user's or only begins an answer.

    Attributes:
        turns: the messages.
        images: the n-th `<image>` marker shows the record's image `images[n]`.
        dataset: name of the dataset that it comes from.
        kind: `positive` if it explains why its answer is right, `negative` if it explains why another is wrong,
            `chosen` or `rejected` for the sides of a preference pair, else empty.
        pair: id that the two sides of a preference pair have in common.

    Raises:
        ValueError: turns do not alternate, an answer has an image marker, the markers do not match `images`, a question
            has a prefix, or a message before the last one is only begun or not ended.
    """

    turns: tuple[Turn, ...]
    images: tuple[int, ...] = (0,)
    dataset: str = ""
    kind: Kind = ""
    pair: str = ""

    def __post_init__(self) -> None:
        for index, turn in enumerate(self.turns):
            if turn.role != ("user", "assistant")[index % 2]:
                raise ValueError(f"turn {index} is the {turn.role}'s; turns must alternate, the user's first")
            if turn.role == "assistant" and IMAGE in turn.message:
                raise ValueError(f"turn {index}: {IMAGE} in an answer; only user turns may show images")
            if turn.role == "user" and (turn.prefix or not turn.ended):
                raise ValueError(
                    f"turn {index}: is the user's; only the assistant's turns may have a prefix or ended=False"
                )
            if index < len(self.turns) - 1 and (turn.is_begun or not turn.ended):
                raise ValueError(f"turn {index}: only the last message may be begun or not ended; give its whole text")
        markers = sum(turn.text.count(IMAGE) for turn in self.turns)
        if markers != len(self.images):
            raise ValueError(f"{markers} {IMAGE} markers for {len(self.images)} images")

    @property
    def is_open(self) -> bool:
        """Whether the conversation ends with a question to be answered, or with the beginning of its answer."""
        return len(self.turns) % 2 == 1 or (bool(self.turns) and self.turns[-1].is_begun)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, the inverse of `from_json`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"turns": [turn.to_json() for turn in self.turns]}
        return {key: value for key, value in fields.items() if value or key != "pair"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Conversation:
        """Return the conversation of a JSON object."""
        turns = tuple(Turn(**turn) for turn in value["turns"])
        return cls(turns, tuple(value["images"]), value["dataset"], value.get("kind", ""), value.get("pair", ""))


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image with all conversations about it: the unit of storage and of shuffling.

    Attributes:
        id: name of the record, given in errors.
        image: the encoded file (PNG, JPEG, …); empty for text-only conversations.
        conversations: the conversations about the image.
    """

    id: str
    image: bytes
    conversations: tuple[Conversation, ...]

    def conversations_json(self) -> str:
        """Return the conversations as JSON text."""
        return json.dumps([conversation.to_json() for conversation in self.conversations], separators=(",", ":"))

    @classmethod
    def from_parts(cls, id: str, image: bytes, conversations_json: str) -> ImageRecord:
        """Return the record of an image and its conversations as JSON text."""
        return cls(id, image, tuple(Conversation.from_json(value) for value in json.loads(conversations_json)))
