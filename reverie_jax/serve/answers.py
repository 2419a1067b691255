"""An answer's text as its tokens come: where it ends, and how much of it can be shown already."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from reverie_jax.data.tokenization import Encoder, end_token

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token of an answer with its log-probability, and the likeliest tokens in its place with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of an answer.

    Attributes:
        index: Number of the answer within its request.
        text: Further text.
        tokens: Further tokens with log-probabilities; empty if none are wanted.
        count: Tokens decoded so far, the one that ended the answer included.
        finish: Why the answer ended; None while it goes on.
    """

    index: int
    text: str
    tokens: tuple[ScoredToken, ...]
    count: int
    finish: Finish | None


class AnswerText:
    """Collects an answer's tokens.

    Text is held back while it may still change: white space at the end, the beginning of a text that ends the answer,
    bytes that are no whole character.

    Args:
        encoder: Of the model.
        before: The prompt's last token.
        longest: Maximum number of tokens.
        stops: Texts that end the answer, beside the template's own; it ends before them.
        top: Number of alternatives to each token; None for no log-probabilities at all.
    """

    def __init__(self, encoder: Encoder, before: int, longest: int, stops: Sequence[str] = (), top: int | None = None):
        self._tokenizer, self._end = encoder.tokenizer, encoder.stop_ids[0]
        self._opening, end = encoder.template.answer_prefix.strip(), encoder.template.end or ""
        own = "" if end_token(encoder.tokenizer, end) else end.strip()
        self._stops = [text for text in (own, *stops) if text]
        self._before, self._longest, self._top = before, longest, top
        self._tokens: list[int] = []
        self._shown, self.count = "", 0
        self.finish: Finish | None = None

    def add(self, index: int, chosen: Any) -> Delta:
        """Add tokens; return what is new.

        Args:
            index: For the result.
            chosen: A `chunks.Chosen` of this answer alone, as NumPy arrays (`C`, `C N`).
        """
        first = len(self._tokens)
        for token in chosen.token.tolist():
            self.count += 1
            if token == self._end:
                self.finish = "stop"
                break
            self._tokens.append(token)
            if self.count == self._longest:
                self.finish = "length"
                break
        text, cut = self._text(len(self._tokens)), False
        if any(stop in text for stop in self._stops):
            # The first token with which the answer holds such a text; those behind it are not the answer's.
            while any(stop in self._text(len(self._tokens) - 1) for stop in self._stops):
                self._tokens.pop()
            self.finish, self.count, cut = "stop", len(self._tokens), True
            text = self._text(self.count)
            text = text[: min(text.find(stop) for stop in self._stops if stop in text)]
        shown = text.rstrip() if self.finish else self._settled(text)
        new, self._shown = shown[len(self._shown) :], shown
        scored = () if self._top is None else self._scored(first, len(self._tokens) - cut, chosen)
        return Delta(index, new, scored, self.count, self.finish)

    def _text(self, count: int) -> str:
        """Return the text of the first tokens without the white space and the role that it may begin with."""
        text: str = self._tokenizer.decode(self._tokens[:count], skip_special_tokens=True)
        return text.lstrip().removeprefix(self._opening).lstrip() if self._opening else text.lstrip()

    def _settled(self, text: str) -> str:
        """Return the part of a text that further tokens cannot change."""
        if self._opening.startswith(text):
            return self._shown
        begun = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        text = text[: len(text) - begun].rstrip().rstrip("\ufffd").rstrip()
        return text if text.startswith(self._shown) else self._shown

    def _scored(self, first: int, last: int, chosen: Any) -> tuple[ScoredToken, ...]:
        found = []
        for at in range(first, last):
            before = self._tokens[at - 1] if at else self._before
            ids, logprobs = (x[at - first, : self._top].tolist() for x in (chosen.top, chosen.top_logprobs))
            top = tuple((self._piece(before, token), value) for token, value in zip(ids, logprobs, strict=True))
            found.append(ScoredToken(self._piece(before, self._tokens[at]), float(chosen.logprob[at - first]), top))
        return tuple(found)

    def _piece(self, before: int, token: int) -> str:
        """Return a token's text behind another one: alone it would lose the space that it begins with."""
        texts = [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in ([before], [before, token])]
        return str(texts[1])[len(texts[0]) :]
