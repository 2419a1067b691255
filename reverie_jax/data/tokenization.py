"""Tokenization: tokenizers from checkpoint folders, and the encoder that applies a chat template to conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from reverie_jax.data.conversation import IMAGE, Conversation
from reverie_jax.data.llava_tokenization import (
    IMAGE_TOKEN_INDEX,
    LlavaTokenizer,
    Span,
    move_image_first,
    tokenize_sample,
    tokenize_spans,
)
from reverie_jax.data.sister_tokenization import tokenize_minigpt4, tokenize_mplug_owl
from reverie_jax.data.templates import Template, find_template, place_images
from reverie_jax.data.tiktoken_files import find_tiktoken, read_tiktoken
from reverie_jax.errors import UserError
from reverie_jax.files import read_json
from reverie_jax.models.config import Tokenization


def load_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer as transformers loads it, with the merges of a sentencepiece model in the right order.

    Raises:
        OSError, ValueError, …: what transformers raises for a broken folder.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if (path := find_tiktoken(folder)) is not None:
        tokenizer = read_tiktoken(path)
        tokenizer.name_or_path = str(folder)  # where exports copy its files from
        return tokenizer
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns about every config.json that is not its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except AttributeError:  # of a config.json whose dtype torch does not have, as "auto": it says nothing of tokens
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, config=_bare_config(folder))
    finally:
        logging.set_verbosity(level)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        _order_merges(tokenizer, folder / "tokenizer.model")
    return tokenizer


def _bare_config(folder: Path) -> Any:
    """Return of a folder's config.json only what decides the tokenizer's class: the model's type."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    kind = read_json(folder / "config.json").get("model_type")
    return AutoConfig.for_model(kind) if kind in CONFIG_MAPPING else PreTrainedConfig()


def _order_merges(tokenizer: Any, path: Path) -> None:
    """Order the merges by sentencepiece's scores, in place.

    transformers 5.23 orders them by id, and therefore merges a run of spaces before it merges a space with its word.
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
    """A tokenized conversation of n tokens.

    Attributes:
        ids: token ids; the placeholder's id where the model inserts an image feature.
        weights: loss weight of predicting each token; 0 excludes it from the loss.
        image_slots: image feature that the model inserts, image * P + patch; -1 for text.
    """

    ids: Int32[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n"]
    image_slots: Int32[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.ids)


UNTAUGHT = (
    "nothing is supervised: as in original LLaVA, a text that holds words of the template (</s>, ASSISTANT:) masks its whole"
    " conversation"
)


def is_untaught(conversation: Conversation, tokens: Tokens) -> bool:
    """Return whether nothing of a conversation is supervised, although one of its answers has a weight."""
    return not tokens.weights.any() and any(turn.is_taught for turn in conversation.turns)


class Encoder:
    """Tokenizes conversations for one checkpoint: with its tokenizer, chat template and number of image patches.

    Args:
        tokenizer: a fast tokenizer of transformers, or anything with `eos_token`, `eos_token_id`,
            `tokenizer(text, return_offsets_mapping=True)` and `decode(ids, skip_special_tokens=True)`; for "llava" one of
            transformers (`data.llava_tokenization`).
        template: a name in `TEMPLATES`, or a template.
        patches: P, tokens per image.
        image_token_id: id of the image placeholder.
        tokenization: "hf" tokenizes the whole text at once, as transformers does, and finds supervised spans by offsets;
            "llava" gives exactly the ids and labels of the original code, LLaVA's (`data.llava_tokenization`) or by the
            template that of a sister system (`data.sister_tokenization`).
        stop_ids: further ids that end an answer.

    Attributes:
        stop_ids: ids that end an answer.

    Raises:
        UserError: the template is unknown, or needs an example dialogue.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | Template,
        patches: int,
        image_token_id: int,
        tokenization: Tokenization = "hf",
        stop_ids: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.template = find_template(template) if isinstance(template, str) else template
        self.patches, self.image_token_id, self.tokenization = patches, image_token_id, tokenization
        # The sister systems' tokenizers are those of transformers 4.28 to 4.33, which split text as legacy ones do.
        legacy = True if self.template.image else None
        self._llava = LlavaTokenizer(tokenizer, legacy, self.template.tokens) if tokenization == "llava" else None
        # MoE-LLaVA's code leaves the image where it is; the sister systems' templates say where it is.
        self._keeps_images = bool(self.template.image) or self.template.style == "moe"
        stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._end = (tokenizer.eos_token or "") if self.template.end is None else self.template.end
        if self._llava and self.template.style == "mplug_owl":
            self._end = ""  # `tokenize_mplug_owl` appends the end of sequence to each answer
        self._taught = len(self._end)
        if token := end_token(tokenizer, self._end):
            stops.append(tokenizer.get_added_vocab()[token])
            self._taught = self._end.index(token) + len(token)
        # As transformers' processor: a text that begins with BOS gets no other.
        bos: Any = getattr(tokenizer, "bos_token", None)
        begins = bool(bos) and f"{self.template.system}{self.template.user}".startswith(bos)
        self._options = {"add_special_tokens": False} if begins else {}
        self.further_stop_ids = tuple(stop_ids)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*stops, *stop_ids]))

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the conversation's text, and its answers.

        An answer is supervised with the token that ends it, but not with what the template writes after that; one that is
        only begun has neither an end nor supervision.
        """
        template, text, spans = self.template, self.template.system, list[Span]()
        for number, turn in enumerate(conversation.turns):
            said = _strip(turn.message, template) if turn.role in template.stripped else turn.message
            if turn.role == "user":
                said = IMAGE * said.count(IMAGE) if template.style == "plain" else place_images(template, said)
                if template.style == "minigpt4":
                    said = f"{said}###".split("###")[0]  # as its trainer does, which cuts behind the end too
                text += template.user + ("" if IMAGE in said else template.text_only) + said
                is_last = number == len(conversation.turns) - 1
                text += template.assistant if template.answered is None or is_last else template.answered
            else:
                start = len(text)
                text += ("" if template.answered is not None else template.answer_prefix) + said
                last = len(text)
                # White space that is stripped before a message is not part of its prefix.
                prefix = turn.prefix.lstrip() if turn.role in template.stripped else turn.prefix
                first = last - len(said) + min(len(prefix), len(said)) if prefix else start
                text += "" if turn.is_begun else self._end
                stop = last if turn.is_begun else last + self._taught
                weight = turn.weight if turn.is_taught else 0.0
                spans.append(Span(start, stop, weight, first, stop if turn.ended else last))
        return text, spans

    def __call__(self, conversation: Conversation) -> Tokens:
        """Return the conversation's tokens; an open one ends where its answer would begin.

        Raises:
            UserError: the tokenizer does not know the image placeholder.
        """
        images = list(conversation.images)
        if self._llava:
            placeholder, (ids, weights) = IMAGE_TOKEN_INDEX, self._encode_llava(conversation)
            images = images if self._keeps_images else _first_images(conversation)
        else:
            placeholder, (ids, weights) = self.image_token_id, self._encode_hf(conversation)
        if (count := ids.count(placeholder)) != len(images):
            raise UserError(
                f"{count} image tokens for {len(images)} images: the tokenizer does not map {IMAGE} to the model's token"
                f" {self.image_token_id}, or the template drops the image; for a tokenizer of original LLaVA use"
                " tokenization='llava'"
            )
        numbers = np.asarray(ids, np.int32)
        is_image = numbers == placeholder
        # Each placeholder is repeated once per patch.
        counts = np.where(is_image, self.patches, 1)
        is_patch = np.repeat(is_image, counts)
        image_slots = np.full(len(is_patch), -1, np.int32)
        firsts = np.asarray(images, np.int32)[:, None] * self.patches
        image_slots[is_patch] = (firsts + np.arange(self.patches, dtype=np.int32)).ravel()
        weight = np.where(is_image, 0.0, np.asarray(weights, np.float32)).astype(np.float32)
        return Tokens(
            np.repeat(np.where(is_image, self.image_token_id, numbers), counts).astype(np.int32),
            np.repeat(weight, counts),
            image_slots,
        )

    def _encode_hf(self, conversation: Conversation) -> tuple[list[int], list[float]]:
        text, spans = self.render(conversation)
        encoding = self.tokenizer(text, return_offsets_mapping=True, **self._options)
        weights = [0.0] * len(encoding["input_ids"])
        remaining = iter([*spans, Span(*(len(text) + 1,) * 2, 0.0, *(len(text) + 1,) * 2)])
        span = next(remaining)
        for index, (start, stop) in enumerate(encoding["offset_mapping"]):
            while start >= span.stop:
                span = next(remaining)
            # A token that begins before the span belongs to the prompt: Phi-3's role tokens include white space after them.
            # One that begins in a message's prefix and ends behind it is supervised.
            if span.start <= start < min(stop, span.last) and span.first < stop:
                weights[index] = span.weight
        return list(encoding["input_ids"]), weights

    def _encode_llava(self, conversation: Conversation) -> tuple[list[int], list[float]]:
        assert self._llava is not None
        moved = set() if self._keeps_images else {"user"}
        texts = [move_image_first(turn.text) if turn.role in moved else turn.message for turn in conversation.turns]
        if conversation.is_open or not self._llava.counts(self.template):
            turns = [
                dataclasses.replace(turn, text=text) if turn.role == "user" else turn
                for turn, text in zip(conversation.turns, texts, strict=True)
            ]
            text, spans = self.render(dataclasses.replace(conversation, turns=tuple(turns)))
            spans = [span._replace(weight=0.0) for span in spans] if conversation.is_open else spans
            if self.template.style == "minigpt4":
                return tokenize_minigpt4(self._llava, text, spans)
            if self.template.style == "mplug_owl" and not conversation.is_open:
                ids, weights = tokenize_mplug_owl(self._llava, text, spans)
                return ids, weights if turns[-1].ended else [*weights[:-1], 0.0]
            return tokenize_spans(self._llava, text, spans, bool(conversation.images))
        exchanges = [(place_images(self.template, q), a) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        answers = conversation.turns[1::2]
        ids, supervised = tokenize_sample(
            *(self._llava, self.template, exchanges, bool(conversation.images)),
            prefixes=[turn.prefix for turn in answers],
            ended=conversation.turns[-1].ended,
        )
        return ids, [0.0 if number < 0 else answers[number].weight for number in supervised]

    def decode(self, ids: Sequence[int], *, stop: str = "", before: int | None = None) -> str:
        """Return an answer's text: without special tokens, cut where the template ends an answer, and stripped.

        Where the model writes its own role before the answer (`muffin_eval`), that is left out.

        Args:
            ids: the answer's tokens.
            stop: a text that the answer ends with, if it holds it.
            before: the last token of the message that the answer goes on from. White space behind it is kept.
        """
        behind = [] if before is None else [before]
        known: str = self.tokenizer.decode(behind, skip_special_tokens=True) if behind else ""
        text: str = self.tokenizer.decode([*behind, *ids], skip_special_tokens=True)[len(known) :]
        if end := (self.template.end or "").strip():  # without a special token for it, the end is part of the text
            text = text.split(end)[0]
        if stop:
            text = "".join(text.partition(stop)[:2])
        return text.rstrip() if behind else text.strip().removeprefix(self.template.answer_prefix.strip()).strip()


def end_token(tokenizer: Any, end: str) -> str | None:
    """Return the special token that the text after an answer begins with, if it does."""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    return max((token for token in added if end.lstrip().startswith(token)), key=len, default=None)


def _strip(text: str, template: Template) -> str:
    image = f"{IMAGE}\n" if "image" in template.stripped and text.startswith(f"{IMAGE}\n") else ""
    return image + text.removeprefix(image).strip()


def _first_images(conversation: Conversation) -> list[int]:
    """Return the images that original LLaVA shows: the first of each turn."""
    images, first = iter(conversation.images), []
    for turn in conversation.turns:
        first += [next(images) for _ in range(turn.text.count(IMAGE))][:1]
    return first


def untaught_turns(conversation: Conversation, encoder: Encoder) -> list[int]:
    """Return the answers of a conversation of which no token is supervised although they have a weight, by turn."""
    answers = [index for index, turn in enumerate(conversation.turns) if turn.is_taught]
    if len(answers) < 2:
        return answers if answers and not encoder(conversation).weights.any() else []
    turns = [dataclasses.replace(turn, weight=float(index)) for index, turn in enumerate(conversation.turns)]
    found = set(encoder(dataclasses.replace(conversation, turns=tuple(turns))).weights.tolist())
    return [index for index in answers if index not in found]
