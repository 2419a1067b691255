"""Tokens as original LLaVA makes them for training, quirks included (haotian-liu/LLaVA at HEAD; LLaVA-pp for Phi-3).

The original tokenises a sample as a whole, text on each side of a picture apart, and finds what to teach by lengths: it
tokenises prefixes again and counts. Where the count does not come out, the whole sample is taught nothing. Weights were
tuned on exactly that, so it is kept exactly; `Encoder` with `tokens="hf"` does the same job by spans.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from reverie_jax.data.templates import IMAGE, Template

PICTURE = -200
"""Stands for a picture in the original's ids."""

LONGEST = 2048
"""`model_max_length` of the published recipes: longer samples are not checked for a wrong count."""


def show_first(text: str) -> str:
    """A turn with its picture in front, however many markers stood where."""
    if IMAGE not in text:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


class LlavaTokenizer:
    """The slow LLaMA tokenizer of the original stack (transformers 4.37; 4.41 for Phi-3), played by today's.

    Args:
        tokenizer: transformers' `LlamaTokenizer` (`data.tokenization`); its `legacy` decides what follows an end token.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.legacy = bool(getattr(tokenizer, "legacy", False))
        model = tokenizer.backend_tokenizer.model
        # The system's words, and what a sample's prefixes repeat, come again and again.
        self._pieces = functools.lru_cache(8192)(lambda piece: tuple(token.id for token in model.tokenize(piece)))
        self._added = {token.content: (id, token.rstrip) for id, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._space = tokenizer.convert_tokens_to_ids("▁")
        self._bos = tokenizer.bos_token_id
        self._named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}

    def one(self, text: str) -> list[int]:
        """Ids of one call of the original tokenizer, BOS first.

        Added tokens are cut out first. In legacy mode each piece of text gets a space of its own in front; otherwise the
        whole text gets one, which is taken back before a named special token, and stays as a lone token before others.
        """
        if text and not self.legacy:
            text = "▁" + text.replace("▁", " ")
        ids: list[int] = []
        swallows = False
        for piece in self._cut.split(text):
            if piece in self._added:
                id, swallows = self._added[piece]
                ids.append(id)
            elif piece := piece.lstrip() if swallows else piece:
                spaced = ("▁" if self.legacy else "") + piece.replace(" ", "▁")
                ids += self._pieces(spaced)
        if not self.legacy and len(ids) > 1 and ids[0] == self._space and ids[1] in self._named:
            del ids[0]
        return [self._bos, *ids]

    def __call__(self, text: str, pictures: bool) -> list[int]:
        """Ids with `PICTURE` where the markers stood; without pictures a marker is ordinary text."""
        if not pictures:
            return self.one(text)
        first, *others = text.split(IMAGE)
        ids = self.one(first)
        for other in others:
            ids += [PICTURE, *self.one(other)[1:]]
        return ids


def training_ids(
    tokens: LlavaTokenizer, template: Template, turns: Sequence[tuple[str, str]], pictures: bool
) -> tuple[list[int], list[int]]:
    """A training sample.

    Args:
        turns: (user's words, answer) of each exchange.
        pictures: the sample shows one.

    Returns:
        Ids, and for each the number of the exchange whose answer it teaches, or -1.
    """
    match template.style:
        case "plain":
            return _plain(tokens, turns)
        case "single":
            return _single(tokens, template, turns, pictures)
        case "phi3":
            return _phi3(tokens, template, turns, pictures)
    return _two(tokens, template, turns, pictures)


def _plain(tokens: LlavaTokenizer, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Pretraining: the picture and its caption; what the user says is dropped."""
    ids = tokens(IMAGE + turns[0][1] + "\n", True)
    masked = len(tokens(IMAGE, True))
    return ids, [-1] * masked + [0] * (len(ids) - masked)


def _checked(
    tokens: LlavaTokenizer, ids: list[int], supervised: list[int], counted: int
) -> tuple[list[int], list[int]]:
    """The original counts what is no padding, and padding is id 0, which <unk> has too."""
    if counted < LONGEST and counted != len(ids) - ids.count(0):
        return ids, [-1] * len(ids)
    return ids, supervised


def _two(
    tokens: LlavaTokenizer, template: Template, turns: Sequence[tuple[str, str]], pictures: bool
) -> tuple[list[int], list[int]]:
    end, sign = tokens.tokenizer.eos_token, f"{template.assistant} "
    user, assistant, text = template.user.rstrip(), sign.strip(), template.system
    for asked, said in turns:  # a role that says nothing stands bare, without what closes its words
        text += f"{user} {asked} " if asked else user
        text += f"{assistant} {said}{end}" if said else assistant
    ids = tokens(text, pictures)
    supervised = [-1] * len(ids)
    at = 1
    for number, part in enumerate(text.split(end)):
        pieces = part.split(sign)
        if not part or len(pieces) != 2:
            break
        less = int(number > 0 and not tokens.legacy)
        length = len(tokens(part, pictures)) - less
        skipped = len(tokens(pieces[0] + sign, pictures)) - 2 - less
        _mark_supervised(supervised, at + skipped, at + length, number, turns)
        at += length
    return _checked(tokens, ids, supervised, at)


def _phi3(
    tokens: LlavaTokenizer, template: Template, turns: Sequence[tuple[str, str]], pictures: bool
) -> tuple[list[int], list[int]]:
    end, user, assistant = "<|end|>", "\n<|user|>\n", "\n<|assistant|>\n"
    text = template.sentence + end
    for asked, said in turns:
        text += (f"{user}{asked}{end}" if asked else user) + (f"{assistant}{said}{end}" if said else assistant)
    ids = tokens(text, pictures)
    supervised = [-1] * len(ids)
    pieces = text.split(end)
    rounds = [end.join(pieces[:3]), *(end.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2))]
    at = 0
    for number, part in enumerate(rounds):
        halves = part.split(end + assistant)
        if not part or len(halves) != 2:
            break
        more = 1 if number == 0 else -2 + int(tokens.legacy)
        length = len(tokens(part, pictures)) + more
        skipped = len(tokens(halves[0] + end + assistant, pictures)) - 1 + more
        _mark_supervised(supervised, at + skipped, at + length, number, turns)
        at += length
    return _checked(tokens, ids, supervised, at)


def _single(
    tokens: LlavaTokenizer, template: Template, turns: Sequence[tuple[str, str]], pictures: bool
) -> tuple[list[int], list[int]]:
    """Each sentence is counted with a BOS that the whole does not have, so what is masked drifts. Nothing is checked."""
    header = f"{template.sentence}\n\n"
    sentences = [
        f"### {who}: {words}\n" for turn in turns for who, words in zip(("Human", "Assistant"), turn, strict=True)
    ]
    ids = tokens(header + "".join(sentences) + "### ", pictures)
    supervised = [(len(turns) - 1) if turns else -1] * len(ids)

    def count(text: str) -> int:
        """Without pictures the original counts what is no padding, which <unk> looks like."""
        found = tokens(text, pictures)
        return len(found) if pictures else len(found) - found.count(0)

    at = count(header)
    supervised[:at] = [-1] * min(at, len(ids))
    for number, sentence in enumerate(sentences):
        length = count(sentence)
        here = slice(min(at, len(ids)), min(at + length, len(ids)))
        supervised[here] = [number // 2] * (here.stop - here.start)
        if number % 2 == 0:
            masked = slice(min(at + 2, len(ids)), here.stop)
            supervised[masked] = [-1] * max(0, masked.stop - masked.start)
        at += length
    return ids, supervised


def _mark_supervised(
    supervised: list[int], start: int, stop: int, number: int, turns: Sequence[tuple[str, str]]
) -> None:
    start, stop = max(0, start), min(len(supervised), stop)
    supervised[start:stop] = [min(number, len(turns) - 1)] * max(0, stop - start)
