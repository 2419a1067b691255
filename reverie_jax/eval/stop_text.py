"""Find the text that ends an answer, as "###", where it is not one token: several sequences of tokens decode to it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int8

from reverie_jax.data.tokenization import Encoder, end_token


def stop_table(encoder: Encoder, vocabulary: int) -> Int8[np.ndarray, "S V"] | None:
    """Return an automaton that finds the text that ends answers, however it is tokenized; None if tokens end them.

    An answer starts in state 0; behind a token its state is `table[state, token]`. State s is the number of the text's
    characters that the answer ends with; the last state, where the answer holds the whole text, is never left.

    Args:
        encoder: Its tokenizer and template.
        vocabulary: V, the number of tokens that the model scores.
    """
    tokenizer, end = encoder.tokenizer, encoder.template.end or ""
    text = end.strip()
    if not text or end_token(tokenizer, end):
        return None

    def decode(*ids: int) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    # Behind another token, a token keeps the space that it begins with.
    spelled = tokenizer(text, return_offsets_mapping=True)["input_ids"]
    before = next(token for token in reversed(spelled) if decode(token))
    skipped = len(decode(before))
    table = np.zeros((len(text) + 1, vocabulary), np.int8)
    table[-1] = len(text)
    for token in range(vocabulary):
        piece = decode(before, token)[skipped:]
        if not piece or not set(text).isdisjoint(piece):
            table[:-1, token] = [_advance(text, state, piece) for state in range(len(text))]
    return table


def _advance(text: str, state: int, piece: str) -> int:
    """Return the state behind a piece of an answer."""
    for character in piece:
        if state == len(text):
            break
        seen = text[:state] + character
        state = next(size for size in range(len(seen), -1, -1) if seen.endswith(text[:size]))
    return state
