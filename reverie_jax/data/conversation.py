"""Conversations and the tokens they become."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32

from reverie_jax.data.llava_tokenization import PICTURE, ReferenceTokenizer, show_first, training_ids
from reverie_jax.data.templates import IMAGE, TEMPLATES, Template, v0
from reverie_jax.data.templates import template as find_template
from reverie_jax.errors import UserError
from reverie_jax.models.config import TokenMode

__all__ = ["IMAGE", "TEMPLATES", "Conversation", "Encoder", "ImageRecord", "Role", "Template", "Tokens", "Turn", "v0"]

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
    source: str = ""
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
        return cls(turns, tuple(row["images"]), row["source"], row.get("kind", ""), row.get("pair", ""))


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
        tokenizer: transformers' fast tokenizers fit; asked for are `eos_token`, `eos_token_id`,
            `tokenizer(text, return_offsets_mapping=True)` and `decode(ids, skip_special_tokens=True)`; in the
            reference's manner also what `data.llava_tokenization` asks for.
        template: a name in `TEMPLATES`, or a template.
        patches: feature tokens of one image.
        image_token_id: the placeholder's id.
        tokens: "hf": the whole text in one pass, as transformers does, taught spans found by offsets.
            "reference": exactly as original LLaVA does (`data.llava_tokenization`).

    Raises:
        UserError: an unknown template, or one that needs more than its name.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | Template,
        patches: int,
        image_token_id: int,
        tokens: TokenMode = "hf",
    ):
        self.tokenizer = tokenizer
        self.template = find_template(template) if isinstance(template, str) else template
        self.patches, self.image_token_id, self.tokens = patches, image_token_id, tokens
        self._reference = ReferenceTokenizer(tokenizer) if tokens == "reference" else None
        stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if (end := self.template.end or "").startswith("<|"):
            stops.append(tokenizer.convert_tokens_to_ids(end))
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        """Ids that end an answer."""

    def text(self, conversation: Conversation) -> tuple[str, list[tuple[int, int, float]]]:
        """The conversation as the template writes it, and the taught spans: (first character, one past the last, weight)."""
        template, text, spans = self.template, self.template.system, []
        end = (self.tokenizer.eos_token or "") if template.end is None else template.end
        for turn in conversation.turns:
            if turn.role == "user":
                said = IMAGE * turn.text.count(IMAGE) if template.style == "plain" else turn.text
                text += template.user + said + template.assistant
            else:
                start = len(text)
                text += template.answer_prefix + turn.text + end
                spans.append((start, len(text), turn.weight))
        return text, spans

    def __call__(self, conversation: Conversation) -> Tokens:
        """The conversation's tokens; an open one ends where its answer would begin.

        Raises:
            UserError: the tokenizer does not know the placeholder.
        """
        shown = list(conversation.images)
        if self._reference:
            placeholder, (ids, weights) = PICTURE, self._by_reference(conversation)
            shown = _first_shown(conversation)
        else:
            placeholder, (ids, weights) = self.image_token_id, self._in_one_pass(conversation)
        if (found := ids.count(placeholder)) != len(shown):
            raise UserError(
                f"{found} tokens for {len(shown)} pictures: the tokenizer does not make"
                f" {IMAGE} the token {self.image_token_id} that the model expects, or the template shows no picture here;"
                " with a tokenizer of original LLaVA use tokens='reference'"
            )
        numbers = np.asarray(ids, np.int32)
        here = numbers == placeholder
        # Each placeholder becomes as many as a picture has features.
        counts = np.where(here, self.patches, 1)
        spread = np.repeat(here, counts)
        features = np.full(len(spread), -1, np.int32)
        firsts = np.asarray(shown, np.int32)[:, None] * self.patches
        features[spread] = (firsts + np.arange(self.patches, dtype=np.int32)).ravel()
        weight = np.where(here, 0.0, np.asarray(weights, np.float32)).astype(np.float32)
        return Tokens(
            np.repeat(np.where(here, self.image_token_id, numbers), counts).astype(np.int32),
            np.repeat(weight, counts),
            features,
        )

    def _in_one_pass(self, conversation: Conversation) -> tuple[list[int], list[float]]:
        text, spans = self.text(conversation)
        found = self.tokenizer(text, return_offsets_mapping=True)
        weights = [0.0] * len(found["input_ids"])
        remaining = iter([*spans, (len(text) + 1, len(text) + 1, 0.0)])
        span = next(remaining)
        for place, (first, past) in enumerate(found["offset_mapping"]):
            while first >= span[1]:
                span = next(remaining)
            # A token that begins before the span belongs to the prompt: Phi-3's role tokens swallow white space behind them.
            if span[0] <= first < past:
                weights[place] = span[2]
        return list(found["input_ids"]), weights

    def _by_reference(self, conversation: Conversation) -> tuple[list[int], list[float]]:
        assert self._reference is not None
        said = [show_first(turn.text) if turn.role == "user" else turn.text for turn in conversation.turns]
        if conversation.open:
            turns = tuple(dataclasses.replace(t, text=w) for t, w in zip(conversation.turns, said, strict=True))
            text, _ = self.text(dataclasses.replace(conversation, turns=turns))
            ids = self._reference(text, bool(conversation.images))
            return ids, [0.0] * len(ids)
        pairs = list(zip(said[::2], said[1::2], strict=True))
        ids, taught = training_ids(self._reference, self.template, pairs, bool(conversation.images))
        weight = [turn.weight for turn in conversation.turns[1::2]]
        return ids, [0.0 if number < 0 else weight[number] for number in taught]

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text, special tokens left out, cut where the template ends an answer, stripped."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if self.template.style == "single":
            text = text.split("###")[0]
        return text.strip()


def _first_shown(conversation: Conversation) -> list[int]:
    """The pictures that original LLaVA shows: one a turn, the first."""
    images, found = iter(conversation.images), []
    for turn in conversation.turns:
        shown = [next(images) for _ in range(turn.text.count(IMAGE))]
        found += shown[:1]
    return found
