"""Conversations to tokens: tokenizers from checkpoint folders, and the encoder that applies a chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from reverie_jax.data.conversation import IMAGE, Conversation
from reverie_jax.data.llava_tokenization import PICTURE, LlavaTokenizer, show_first, training_ids
from reverie_jax.data.templates import Template
from reverie_jax.data.templates import template as find_template
from reverie_jax.errors import UserError
from reverie_jax.models.config import Tokenization


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer by transformers, with a sentencepiece model's merges put in their right order.

    Raises:
        OSError, ValueError, …: whatever transformers raises of a broken folder.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every config.json that is not one of its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        logging.set_verbosity(level)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        _order_merges(tokenizer, folder / "tokenizer.model")
    return tokenizer


def _order_merges(tokenizer: Any, path: Path) -> None:
    """Merges by sentencepiece's scores, in place.

    transformers 5.23 puts them in the order of ids, and so joins a run of spaces before it joins a space to its word.
    """
    import sentencepiece
    from tokenizers import models

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(id): id for id in range(pieces.get_piece_size())}
    merges = []
    for piece, id in vocab.items():
        if not (pieces.is_control(id) or pieces.is_unknown(id) or pieces.is_byte(id)):
            cuts = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
            merges += [(pieces.get_score(id), cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer.backend_tokenizer.model = models.BPE(
        vocab=vocab, merges=[cut for _, cut in merges], fuse_unk=True, byte_fallback=True, unk_token="<unk>"
    )


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
    image_slots: Int32[np.ndarray, "n"]

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
        tokenization: "hf": the whole text in one pass, as transformers does, taught spans found by offsets.
            "llava": exactly as original LLaVA does (`data.llava_tokenization`).

    Raises:
        UserError: an unknown template, or one that needs more than its name.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | Template,
        patches: int,
        image_token_id: int,
        tokenization: Tokenization = "hf",
    ):
        self.tokenizer = tokenizer
        self.template = find_template(template) if isinstance(template, str) else template
        self.patches, self.image_token_id, self.tokenization = patches, image_token_id, tokenization
        self._reference = LlavaTokenizer(tokenizer) if tokenization == "llava" else None
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
                " with a tokenizer of original LLaVA use tokenization='llava'"
            )
        numbers = np.asarray(ids, np.int32)
        here = numbers == placeholder
        # Each placeholder becomes as many as a picture has features.
        counts = np.where(here, self.patches, 1)
        spread = np.repeat(here, counts)
        image_slots = np.full(len(spread), -1, np.int32)
        firsts = np.asarray(shown, np.int32)[:, None] * self.patches
        image_slots[spread] = (firsts + np.arange(self.patches, dtype=np.int32)).ravel()
        weight = np.where(here, 0.0, np.asarray(weights, np.float32)).astype(np.float32)
        return Tokens(
            np.repeat(np.where(here, self.image_token_id, numbers), counts).astype(np.int32),
            np.repeat(weight, counts),
            image_slots,
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
