"""The training ids and labels of original LLaVA, quirks included (haotian-liu/LLaVA at HEAD; LLaVA-pp; MoE-LLaVA).

The original tokenizes the text before and after an image separately. It finds the supervised tokens by tokenizing prefixes
of the sample again and counting; where the counts do not add up, it masks the whole sample. Checkpoints were tuned on
exactly these labels, so they are reproduced exactly. `Encoder` with `tokenization="hf"` finds them by character offsets.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from reverie_jax.data.templates import IMAGE, Template

IMAGE_TOKEN_INDEX = -200
"""The original's placeholder id of an image."""

Exchanges = Sequence[tuple[str, str]]
"""(question, answer) pairs."""
Sample = tuple[list[int], list[int]]
"""Token ids, and for each the index of the exchange whose answer it is part of, or -1 where it is not supervised."""


class Span(NamedTuple):
    """An answer within a text, by characters.

    Attributes:
        start, stop: the message, with what ends it as far as it can be supervised.
        weight: loss weight of its supervised tokens.
        first, last: where supervised text begins, behind the message's prefix, and stops.
    """

    start: int
    stop: int
    weight: float
    first: int
    last: int


class Counts(NamedTuple):
    """What original LLaVA and its relatives add to the counted tokens of a round, and subtract, by style of template.

    Attributes:
        start: first token of the first round.
        end: added to a round, for the end token that it is counted without.
        tag: subtracted from what precedes an answer.
        later: subtracted from both in later rounds, for what the tokenizer puts before a text.
        later_legacy: the same for a tokenizer in legacy mode.
        byte_level: kind of tokenizer that the numbers are for.
        length: `model_max_length` of the published recipes: the counts of longer samples are not checked.
    """

    start: int
    end: int
    tag: int
    later: int
    later_legacy: int
    byte_level: bool = False
    length: int = 2048


COUNTS = {
    "two": Counts(1, 0, 2, 1, 0),
    "llama_2": Counts(1, 0, 2, 0, 0),
    "phi3": Counts(0, 1, 0, 3, 2),
    "llama3": Counts(0, 1, 0, 1, 1, byte_level=True, length=4096),
    "moe": Counts(0, 1, 1, 0, 0, byte_level=True),
}


def move_image_first(text: str) -> str:
    """Return the text with one image marker at its start in place of all others, or unchanged without a marker."""
    if IMAGE not in text:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


class LlavaTokenizer:
    """Tokenizes the pieces around images each by itself.

    A byte-level tokenizer (Llama-3, Qwen, StableLM, Phi-2) is called as it is. The slow Llama tokenizer of transformers 4.37
    (4.41 for Phi-3) is emulated with the current fast one.

    Args:
        tokenizer: a fast tokenizer of transformers.
        legacy: how a sentencepiece tokenizer splits text after an end token; None for its own `legacy`.
        spaceless: special tokens around which a sentencepiece tokenizer drops white space.

    Attributes:
        padding: id that the original does not count; it pads with <unk>, or with a token that no text has.
    """

    def __init__(self, tokenizer: Any, legacy: bool | None = None, spaceless: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.byte_level = "▁" not in tokenizer.get_vocab()
        self._bos = tokenizer.bos_token_id
        if self.byte_level:
            pad = tokenizer.pad_token_id
            self.padding = None if pad == tokenizer.eos_token_id else pad
            return
        self.padding = 0
        self.legacy = bool(getattr(tokenizer, "legacy", False)) if legacy is None else legacy
        self._spaceless = re.compile(rf"\s*({'|'.join(map(re.escape, spaceless))})\s*") if spaceless else None
        model = tokenizer.backend_tokenizer.model
        # Samples repeat the system message, and the prefixes of a sample repeat its text.
        self._pieces = functools.lru_cache(8192)(lambda piece: tuple(token.id for token in model.tokenize(piece)))
        self._added = {token.content: (id, token.rstrip) for id, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._added_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._space = tokenizer.convert_tokens_to_ids("▁")
        self._named_ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}

    def counts(self, template: Template) -> bool:
        """Return whether the original's labels by counting are known for a template and this kind of tokenizer."""
        known = COUNTS.get(template.style)
        return (
            known.byte_level == self.byte_level
            if known
            else template.style == "plain" or (template.style == "single" and not self.byte_level)
        )

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of text without images, beginning with BOS if the tokenizer adds it.

        For sentencepiece, the text is split at added tokens. In legacy mode each part is prefixed with a space; otherwise
        only the whole text is, and the prefix is removed before BOS, EOS and UNK but remains as a token before other added
        tokens.
        """
        if self.byte_level:
            return list(self.tokenizer(text)["input_ids"])
        if self._spaceless:
            text = self._spaceless.sub(r"\1", text)
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
        first, *others = map(self.encode_text, text.split(IMAGE))
        begins = int(first[:1] == [self._bos])  # as in the original, which drops as much of each other piece
        return first + [id for other in others for id in (IMAGE_TOKEN_INDEX, *other[begins:])]

    def shared(self, ids: Sequence[int], beginning: str, has_image: bool) -> tuple[int, int]:
        """Return how many of a text's tokens lie within a beginning of it, and how many begin there."""
        part = self(beginning, has_image)
        within = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, part, strict=False)))
        # From here on, the beginning alone has other tokens than as part of the text.
        names, rest = self.tokenizer.convert_ids_to_tokens, "".join(self.tokenizer.convert_ids_to_tokens(part[within:]))
        while rest and within < len(ids) and rest.startswith(name := names(ids[within])):
            within, rest = within + 1, rest.removeprefix(name)
        return within, within + bool(rest)


def tokenize_sample(
    tokenizer: LlavaTokenizer,
    template: Template,
    exchanges: Exchanges,
    has_image: bool,
    *,
    prefixes: Sequence[str] = (),
    ended: bool = True,
) -> Sample:
    """Return a training sample.

    Args:
        tokenizer: the tokenizer.
        template: its style selects the original's masking rule.
        exchanges: the conversation.
        has_image: whether the sample shows an image.
        prefixes: of each answer, what is not supervised; the original has none.
        ended: whether the last answer's end is supervised, as the original's is.
    """
    text, after = _sample_text(tokenizer, template, exchanges)
    ids, supervised = _supervise(tokenizer, template, exchanges, text, has_image)
    for number, prefix in enumerate(prefixes):
        if prefix:
            begun, _ = _sample_text(tokenizer, template, [*exchanges[:number], (exchanges[number][0], prefix)])
            begun = begun.removesuffix(after)
            start, _ = tokenizer.shared(ids, begun.removesuffix(prefix), has_image)
            stop, _ = tokenizer.shared(ids, begun, has_image)
            supervised[start:stop] = [-1] * (stop - start)
    if not ended:
        _, stop = tokenizer.shared(ids, text.removesuffix(after), has_image)
        supervised[stop:] = [-1] * (len(ids) - stop)
    return ids, supervised


def _sample_text(tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges) -> tuple[str, str]:
    """Return a sample's text, and what follows the last answer. A role with an empty text has no separator behind it."""
    end = template.end or ""
    match template.style:
        case "plain":
            return f"{IMAGE}{exchanges[0][1]}\n", "\n"
        case "single":
            sentences = _sentences(exchanges)
            return f"{template.sentence}\n\n{''.join(sentences)}### ", "\n### "
        case "phi3" | "llama3":
            text, user, assistant = template.sentence + end, template.user, template.assistant.removeprefix(end)
            for question, answer in exchanges:
                text += f"{user}{question}{end}" if question else user
                text += f"{assistant}{answer}{end}" if answer else assistant
        case "llama_2":
            text = ""
            for question, answer in exchanges:
                text += f"{template.user}{question}{template.assistant}" if question else ""
                text += f" {answer}{end}" if answer else ""
        case _:
            end, text = tokenizer.tokenizer.eos_token, template.system
            user, assistant = template.user.rstrip(), template.assistant.strip()
            for question, answer in exchanges:
                text += f"{user} {question} " if question else user
                text += f"{assistant} {answer}{end}" if answer else assistant
    return text, end


def _sentences(exchanges: Exchanges) -> list[str]:
    return [
        f"### {role}: {text}\n" for pair in exchanges for role, text in zip(("Human", "Assistant"), pair, strict=True)
    ]


def _supervise(
    tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges, text: str, has_image: bool
) -> Sample:
    """Return the text's tokens, labeled as the original does."""
    end = template.end or ""
    match template.style:
        case "plain":
            return _plain(tokenizer, text)
        case "single":
            return _single(tokenizer, template, exchanges, text, has_image)
        case "phi3" | "llama3":
            separator, pieces = template.assistant, text.split(end)
            rounds = [end.join(pieces[:3]), *(end.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2))]
        case "llama_2":
            separator, rounds = f"{template.assistant.lstrip()} ", text.split(end.strip())
        case _:
            separator, rounds = f"{template.assistant} ", text.split(tokenizer.tokenizer.eos_token)
    return _rounds(tokenizer, text, rounds, separator, COUNTS[template.style], exchanges, has_image)


def tokenize_spans(
    tokenizer: LlavaTokenizer, text: str, spans: Sequence[Span], has_image: bool
) -> tuple[list[int], list[float]]:
    """Return a text's ids, and their weights by spans of characters.

    A token that begins before a span belongs to the prompt, as in `Encoder` with `tokenization="hf"`; one that begins in a
    message's prefix and ends behind it is supervised.
    """
    ids = tokenizer(text, has_image)
    weights = [0.0] * len(ids)
    for span in spans:
        if span.weight:
            first, last = (tokenizer.shared(ids, text[:cut], has_image)[1] for cut in (span.start, span.last))
            if span.first > span.start:
                first = max(first, tokenizer.shared(ids, text[: span.first], has_image)[0])
            weights[first:last] = [span.weight] * (last - first)
    return ids, weights


def _plain(tokenizer: LlavaTokenizer, text: str) -> Sample:
    """Return a projector pretraining sample: the image and its caption, without the question."""
    ids = tokenizer(text, True)
    masked = len(tokenizer(IMAGE, True))
    return ids, [-1] * masked + [0] * (len(ids) - masked)


def _rounds(
    tokenizer: LlavaTokenizer,
    text: str,
    rounds: Sequence[str],
    separator: str,
    counts: Counts,
    exchanges: Exchanges,
    has_image: bool,
) -> Sample:
    """Return a sample whose rounds are counted one by one, up to the first that has not exactly one separator.

    It is masked if the counts do not add up.
    """
    ids = tokenizer(text, has_image)
    supervised, at = [-1] * len(ids), counts.start
    for number, part in enumerate(rounds):
        halves = part.split(separator)
        if not part or len(halves) != 2:
            break
        later = counts.later_legacy if getattr(tokenizer, "legacy", False) else counts.later
        less = later if number else 0
        length = len(tokenizer(part, has_image)) + counts.end - less
        skipped = len(tokenizer(halves[0] + separator, has_image)) - counts.tag - less
        _mark_supervised(supervised, at + skipped, at + length, number, exchanges)
        at += length
    padding = 0 if tokenizer.padding is None else ids.count(tokenizer.padding)
    if at < counts.length and at != len(ids) - padding:
        return ids, [-1] * len(ids)
    return ids, supervised


def _single(tokenizer: LlavaTokenizer, template: Template, exchanges: Exchanges, text: str, has_image: bool) -> Sample:
    """Return a sample of the original's separator style SINGLE.

    Each sentence is counted with a BOS that it does not have in the sample, so the mask drifts. The counts are not checked.
    """
    ids = tokenizer(text, has_image)
    supervised = [(len(exchanges) - 1) if exchanges else -1] * len(ids)

    def count(text: str) -> int:
        """Return the length. Without images LLaVA's code does not count padding, which has the id of <unk>."""
        ids = tokenizer(text, has_image)
        return len(ids) if has_image or template.image else len(ids) - ids.count(0)

    at = count(f"{template.sentence}\n\n")
    supervised[:at] = [-1] * min(at, len(ids))
    for number, sentence in enumerate(_sentences(exchanges)):
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
