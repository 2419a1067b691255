"""Conversations whose KV is kept between two questions, so that of the next one only what is new is prefilled."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import shared_length
from reverie_jax.eval import decode
from reverie_jax.models.decoder import LayersKV

PIECE = 128
"""Tokens that are prefilled at once behind a conversation: attention has this many rows of scores."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A prompt and its answer, with their KV on the devices.

    Attributes:
        digest: Of the image, see `scheduler.Request`.
        prompt: Tokens of the prompt.
        answer: Tokens of the answer whose KV there is: all but its last one.
        prefix: KV of the prompt.
        suffix: KV of the answer.
    """

    digest: str
    prompt: Tokens
    answer: Int[np.ndarray, "a"]
    prefix: LayersKV
    suffix: LayersKV

    def pieces(self, digest: str, tokens: Tokens, limit: int) -> list[tuple[int, int]]:
        """Return where the pieces begin that are still to be prefilled of another prompt, and how long they are.

        Few sizes make few programs. A piece that does not fit at the end begins earlier, with tokens that are here.

        Args:
            digest: Of the prompt's image.
            tokens: The prompt.
            limit: Maximum length of a sequence.

        Returns:
            (first token, size) of each; the last one may be longer than the prompt. None of them if nothing is here that
            the prompt begins with, its image included.
        """
        if digest != self.digest:
            return []
        ids = np.concatenate([self.prompt.ids, self.answer])
        slots = np.pad(self.prompt.image_slots, (0, len(self.answer)), constant_values=-1)
        shared = shared_length((ids, slots), (tokens.ids, tokens.image_slots))
        # The scores behind the last token are needed in any case.
        starts = [*range(min(shared, len(tokens) - 1), len(tokens), PIECE)]
        size = decode.room(len(tokens) - starts[-1])
        starts[-1] = min(starts[-1], limit - size)
        if starts[0] < 1 or (tokens.image_slots[starts[0] :] >= 0).any():
            return []
        return [*((start, PIECE) for start in starts[:-1]), (starts[-1], size)]
