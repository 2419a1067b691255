"""Find a text that ends an answer, as "###" or ".", where it is not one token: several sequences of tokens decode to it."""

from __future__ import annotations

import re
from collections.abc import Container

import numpy as np
from jaxtyping import Int16

from reverie_jax.data.tokenization import Encoder, end_token
from reverie_jax.errors import UserError


def stop_table(encoder: Encoder, vocabulary: int, stop: str = "") -> Int16[np.ndarray, "S V"] | None:
    """Return an automaton that finds texts that end answers, however they are tokenized; None if only tokens end them.

    An answer starts in state 0; behind a token its state is `table[state, token]`. A state is the longest beginning of
    one of the texts that the answer ends with; the last state, where the answer holds a whole one, is never left. A
    character that several tokens of bytes write is not found.

    Args:
        encoder: Its tokenizer and template, whose end is one of the texts if it is no token.
        vocabulary: V, the number of tokens that the model scores.
        stop: A further text.

    Raises:
        UserError: `stop` contains a special token, which answers are decoded without.
    """
    tokenizer, end = encoder.tokenizer, encoder.template.end or ""
    if special := [token for token in getattr(tokenizer, "all_special_tokens", ()) if token in stop]:
        raise UserError(
            f"stop {stop!r}: {special[0]} is a special token, and answers are decoded without these; choose a text"
        )
    texts = [text for text in ("" if end_token(tokenizer, end) else end.strip(), stop) if text]
    if not texts:
        return None

    def decode(*ids: int) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    # Behind another token, a token keeps the space that it begins with.
    spelled = tokenizer("".join(texts) + "a", return_offsets_mapping=True)["input_ids"]
    before = next(token for token in reversed(spelled) if decode(token))
    skipped = len(decode(before))
    states = sorted({text[:size] for text in texts for size in range(len(text))}, key=len)
    numbers = {state: number for number, state in enumerate(states)}
    table = np.zeros((len(states) + 1, vocabulary), np.int16)
    table[-1] = len(states)
    whole = re.compile("|".join(map(re.escape, texts)))
    for token in range(vocabulary):
        piece = decode(before, token)[skipped:]
        if not piece or not set("".join(texts)).isdisjoint(piece):
            table[:-1, token] = [
                len(states) if whole.search(state + piece) else numbers[_longest(state + piece, numbers)]
                for state in states
            ]
    return table


def _longest(text: str, states: Container[str]) -> str:
    """Return the longest end of a text that is a state."""
    return next(text[start:] for start in range(len(text) + 1) if text[start:] in states)
