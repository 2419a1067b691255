"""The training ids and labels of original LLaVA, quirks included (haotian-liu/LLaVA at HEAD; LLaVA-pp for Phi-3).

The original tokenizes the text before and after an image separately. It finds the supervised tokens by tokenizing prefixes
of the sample again and counting; where the counts do not add up, it masks the whole sample. Checkpoints were tuned on
exactly these labels, so they are reproduced exactly. `Encoder` with `tokenization="hf"` finds them by character offsets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from reverie_jax.data.templates import IMAGE, Template

IMAGE_TOKEN_INDEX = -200
"""The original's placeholder id of an image."""

MODEL_MAX_LENGTH = 2048
"""`model_max_length` of the published recipes: the token counts of longer samples are not checked."""

Exchanges = Sequence[tuple[str, str]]
"""(question, answer) pairs."""
Sample = tuple[list[int], list[int]]
"""Token ids, and for each the index of the exchange whose answer it is part of, or -1 where it is not supervised."""


def move_image_first(text: str) -> str:
    """Return the text with one image marker at its start in place of all others, or unchanged without a marker."""
    if IMAGE not in text:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


class LlavaTokenizer:
    """Emulates the slow Llama tokenizer of transformers 4.37 (4.41 for Phi-3) with the current fast one.

    Args:
        tokenizer: transformers' `LlamaTokenizer` (`data.tokenization`); `legacy` decides how text after an end token splits.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.legacy = bool(getattr(tokenizer, "legacy", False))
        model = tokenizer.backend_tokenizer.model
        # Samples repeat the system message, and the prefixes of a sample repeat its text.
        self._pieces = functools.lru_cache(8192)(lambda piece: tuple(token.id for token in model.tokenize(piece)))
        self._added = {token.content: (id, token.rstrip) for id, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._added_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._space = tokenizer.convert_tokens_to_ids("▁")
        self._bos = tokenizer.bos_token_id
        self._named_ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of text without images, beginning with BOS.

        The text is split at added tokens. In legacy mode each part is prefixed with a space; otherwise only the whole text
        is, and the prefix is removed before BOS, EOS and UNK but remains as a token before other added tokens.
        """
        if text and not self.legacy:
            text = "▁" + text.replace("▁", " ")
        ids: list[int] = []
        strips = False  # whether the added token before a part removes the white space after it
        for piece in self._added_pattern.split(text):
            if piece in self._added:
                id, strips = self._added[piece]
                ids.append(id)
            elif piece := piece.lstrip() if strips else piece:
                spaced = ("▁" if self.legacy else "") + piece.replace(" ", "▁")
                ids += self._pieces(spaced)
        if not self.legacy and len(ids) > 1 and ids[0] == self._space and ids[1] in self._named_ids:
            del ids[0]
        return [self._bos, *ids]

    def __call__(self, text: str, has_image: bool) -> list[int]:
        """Return ids with `IMAGE_TOKEN_INDEX` for each image marker; without images a marker is ordinary text."""
        if not has_image:
            return self.encode_text(text)
        first, *others = text.split(IMAGE)
        ids = self.encode_text(first)
        for other in others:
            ids += [IMAGE_TOKEN_INDEX, *self.encode_text(other)[1:]]
        return ids


def tokenize_sample(tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges, has_image: bool) -> Sample:
    """Return a training sample.

    Args:
        tokenizer: the tokenizer.
        template: its style selects the original's masking rule.
        exchanges: the conversation.
        has_image: whether the sample shows an image.
    """
    match template.style:
        case "plain":
            return _plain(tokenizer, exchanges)
        case "single":
            return _single(tokenizer, template, exchanges, has_image)
        case "phi3":
            return _phi3(tokenizer, template, exchanges, has_image)
    return _two(tokenizer, template, exchanges, has_image)


def _plain(tokenizer: LlavaTokenizer, exchanges: Exchanges) -> Sample:
    """Return a projector pretraining sample: the image and its caption, without the question."""
    ids = tokenizer(IMAGE + exchanges[0][1] + "\n", True)
    masked = len(tokenizer(IMAGE, True))
    return ids, [-1] * masked + [0] * (len(ids) - masked)


def _mask_if_miscounted(ids: list[int], supervised: list[int], counted: int) -> Sample:
    """Return the sample, masked if its rounds miss tokens; the original does not count ids of 0 (padding, <unk>)."""
    if counted < MODEL_MAX_LENGTH and counted != len(ids) - ids.count(0):
        return ids, [-1] * len(ids)
    return ids, supervised


def _two(tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges, has_image: bool) -> Sample:
    """Return a sample of the original's separator style TWO."""
    end, separator = tokenizer.tokenizer.eos_token, f"{template.assistant} "
    user, assistant, text = template.user.rstrip(), separator.strip(), template.system
    for question, answer in exchanges:  # a role with an empty text has no separator after it
        text += f"{user} {question} " if question else user
        text += f"{assistant} {answer}{end}" if answer else assistant
    ids = tokenizer(text, has_image)
    supervised = [-1] * len(ids)
    at = 1
    for number, part in enumerate(text.split(end)):
        pieces = part.split(separator)
        if not part or len(pieces) != 2:
            break
        less = int(number > 0 and not tokenizer.legacy)
        length = len(tokenizer(part, has_image)) - less
        skipped = len(tokenizer(pieces[0] + separator, has_image)) - 2 - less
        _mark_supervised(supervised, at + skipped, at + length, number, exchanges)
        at += length
    return _mask_if_miscounted(ids, supervised, at)


def _phi3(tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges, has_image: bool) -> Sample:
    """Return a sample of LLaVA-pp's separator style for Phi-3."""
    end, user, assistant = "<|end|>", "\n<|user|>\n", "\n<|assistant|>\n"
    text = template.sentence + end
    for question, answer in exchanges:
        text += (f"{user}{question}{end}" if question else user) + (
            f"{assistant}{answer}{end}" if answer else assistant
        )
    ids = tokenizer(text, has_image)
    supervised = [-1] * len(ids)
    pieces = text.split(end)
    rounds = [end.join(pieces[:3]), *(end.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2))]
    at = 0
    for number, part in enumerate(rounds):
        halves = part.split(end + assistant)
        if not part or len(halves) != 2:
            break
        more = 1 if number == 0 else -2 + int(tokenizer.legacy)
        length = len(tokenizer(part, has_image)) + more
        skipped = len(tokenizer(halves[0] + end + assistant, has_image)) - 1 + more
        _mark_supervised(supervised, at + skipped, at + length, number, exchanges)
        at += length
    return _mask_if_miscounted(ids, supervised, at)


def _single(tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges, has_image: bool) -> Sample:
    """Return a sample of the original's separator style SINGLE.

    Each sentence is counted with a BOS that it does not have in the sample, so the mask drifts. The counts are not checked.
    """
    header = f"{template.sentence}\n\n"
    sentences = [
        f"### {role}: {text}\n" for pair in exchanges for role, text in zip(("Human", "Assistant"), pair, strict=True)
    ]
    ids = tokenizer(header + "".join(sentences) + "### ", has_image)
    supervised = [(len(exchanges) - 1) if exchanges else -1] * len(ids)

    def count(text: str) -> int:
        """Return the length; without images the original does not count padding, which has the id of <unk>."""
        ids = tokenizer(text, has_image)
        return len(ids) if has_image else len(ids) - ids.count(0)

    at = count(header)
    supervised[:at] = [-1] * min(at, len(ids))
    for number, sentence in enumerate(sentences):
        length = count(sentence)
        sentence_span = slice(min(at, len(ids)), min(at + length, len(ids)))
        supervised[sentence_span] = [number // 2] * (sentence_span.stop - sentence_span.start)
        if number % 2 == 0:
            masked = slice(min(at + 2, len(ids)), sentence_span.stop)
            supervised[masked] = [-1] * max(0, masked.stop - masked.start)
        at += length
    return ids, supervised


def _mark_supervised(supervised: list[int], start: int, stop: int, number: int, exchanges: Exchanges) -> None:
    start, stop = max(0, start), min(len(supervised), stop)
    supervised[start:stop] = [min(number, len(exchanges) - 1)] * max(0, stop - start)
