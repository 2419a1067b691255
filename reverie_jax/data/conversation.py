"""Conversations, chat templates, and the tokens they become.

Each segment of a template (the human part, an answer, an end token) is tokenised once and its span recorded; nothing is
tokenised twice to find a boundary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32

IMAGE = "<image>"
Role = Literal["user", "assistant"]


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
    """

    turns: tuple[Turn, ...]
    images: tuple[int, ...] = (0,)
    source: str = ""

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
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Conversation:
        return cls(tuple(Turn(**turn) for turn in row["turns"]), tuple(row["images"]), row["source"])


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


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns become text: `{user}{text}{assistant}`, then the answer and the end token, again and again.

    Attributes:
        system: text before the first turn.
        user: what introduces a user's turn.
        assistant: what follows it; the generation prompt ends here.
        answer_prefix: what stands between `assistant` and the answer.
    """

    name: str
    system: str
    user: str
    assistant: str
    answer_prefix: str = " "


TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template("llava-hf", "", "USER: ", " ASSISTANT:"),
        Template(
            "vicuna_v1",
            # The sentence that LLaVA-1.5's weights were trained behind: part of the format, like a magic number.
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
            "USER: ",
            " ASSISTANT:",
        ),
        Template("plain", "", "", "", ""),
    )
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A conversation as numbers, position by position.

    Attributes:
        ids: token ids; the placeholder's where an image feature goes.
        weights: loss weight of predicting this token (0: context).
        features: which image feature goes here, image * P + patch; -1 for text.
    """

    ids: Int32[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n"]
    features: Int32[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Conversations to tokens, for one checkpoint: its tokenizer, template and image shape.

    Args:
        tokenizer: transformers' fast tokenizers fit; asked for are `bos_token_id`, `eos_token_id`,
            `encode(text, add_special_tokens=False)` and `decode(ids, skip_special_tokens=True)`.
        patches: feature tokens of one image.
        image_token_id: the placeholder's id.
    """

    def __init__(self, tokenizer: Any, template: str, patches: int, image_token_id: int):
        if template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
        self.tokenizer, self.template = tokenizer, TEMPLATES[template]
        self.patches, self.image_token_id = patches, image_token_id
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Ids of one segment, without special tokens."""
        if text not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        return self._cache[text]

    def __call__(self, conversation: Conversation) -> Tokens:
        ids: list[int] = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        weights, features = [0.0] * len(ids), [-1] * len(ids)

        def add(new: list[int], weight: float = 0.0) -> None:
            ids.extend(new)
            weights.extend([weight] * len(new))
            features.extend([-1] * len(new))

        images = iter(conversation.images)
        template, end = self.template, self.tokenizer.eos_token_id
        add(self.text(template.system))
        for turn in conversation.turns:
            if turn.role == "assistant":
                answer = self.text(template.answer_prefix + turn.text)
                add([*answer, *([] if end is None else [end])], turn.weight)
                continue
            for index, part in enumerate((template.user + turn.text + template.assistant).split(IMAGE)):
                if index:
                    image = next(images)
                    ids.extend([self.image_token_id] * self.patches)
                    weights.extend([0.0] * self.patches)
                    features.extend(range(image * self.patches, (image + 1) * self.patches))
                add(self.text(part))
        return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(features, np.int32))

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text, special tokens left out, stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
