"""Jitted batch inference over trees: a picture's prefix is prefilled once, and every question decodes from that one copy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from reverie_jax.data.conversation import Conversation, Encoder
from reverie_jax.data.pipeline import Picture, question_batches
from reverie_jax.data.rows import Batch, RowShape
from reverie_jax.data.tree import grow, untaught
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.decoder import KV
from reverie_jax.models.sharding import batch_sharding, make_mesh, place


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """Limits of inference; the sizes in use fit the questions, in steps that keep compiled programs few.

    Attributes:
        tokens: longest row; a picture's questions that do not fit one row take several.
        leaves: most questions that decode together from one row.
        rows: rows in a batch.
    """

    tokens: int = 1024
    leaves: int = 32
    rows: int = 16


def fit(pictures: Sequence[Picture], encoder: Encoder, limit: EngineShape) -> RowShape:
    """The smallest row that holds each picture's questions together, up to the limits."""
    leaves = min(limit.leaves, max(len(picture.questions) for picture in pictures))
    longest = 0
    for picture in pictures:
        for start in range(0, len(picture.questions), leaves):
            talks = [encoder(talk) for _, talk in picture.questions[start : start + leaves]]
            longest = max(longest, len(grow(map(untaught, talks))))
    return RowShape(tokens=min(limit.tokens, -(-longest // 64) * 64), images=1, leaves=leaves)


def greedy(model: VisionLanguageModel, batch: Batch, *, new_tokens: int, end: int) -> Int[Array, "B Q T"]:
    """Greedy continuations of every leaf; `end` fills what follows the end of an answer.

    The row's KV exists once. Each leaf sees its ancestors in it, and its own suffix. Decoding stops when all leaves have
    ended.
    """
    hidden, prefix = model.prefill(batch.tokens, batch.positions, batch.ends, batch.features, batch.pixels)
    at_leaf = jnp.take_along_axis(hidden, batch.leaves[:, :, None], axis=1)
    depth = jnp.take_along_axis(batch.positions, batch.leaves, axis=1)
    token = model.decoder.logits(at_leaf).argmax(-1).astype(jnp.int32)
    token = jnp.where(batch.questions < 0, end, token)
    layers, rows, _, heads, width = prefix.k.shape
    empty = jnp.zeros((layers, rows, batch.leaves.shape[1], new_tokens, heads, width), prefix.k.dtype)
    out = jnp.full((*token.shape, new_tokens), end, jnp.int32).at[:, :, 0].set(token)

    def more(carry: tuple[Any, ...]) -> Array:
        step, token, _, _ = carry
        return (step < new_tokens - 1) & (token != end).any()

    def extend(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, out, suffix = carry
        logits, suffix = model.extend(token, depth + 1 + step, batch.leaves, batch.ends, step, prefix, suffix)
        token = jnp.where(token == end, end, logits.argmax(-1).astype(jnp.int32))
        return step + 1, token, out.at[:, :, step + 1].set(token), suffix

    start = (jnp.zeros((), jnp.int32), token, out, KV(empty, empty))
    return jax.lax.while_loop(more, extend, start)[2]


@functools.partial(jax.jit, static_argnames=("graph", "new_tokens", "end"))
def _decode(graph: Any, state: Any, batch: Batch, *, new_tokens: int, end: int) -> Array:
    # At module level: engines of models of one architecture share the compiled program.
    return greedy(nnx.merge(graph, state), batch, new_tokens=new_tokens, end=end)


class Engine:
    """Answers questions about pictures with one model.

    Args:
        model: with or without adapters; read, never changed.
        encoder: the model's tokenizer and template.
        mesh: devices; rows are spread over them.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        encoder: Encoder,
        shape: EngineShape | None = None,
        *,
        mesh: Mesh | None = None,
    ):
        self.encoder, self.shape, self.mesh = encoder, shape or EngineShape(), mesh or make_mesh()
        self.image_size = model.config.vision.image_size
        self.graph, state = nnx.split(model)
        self.state = place(state, self.mesh)
        end = encoder.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no end-of-sequence token: answers would never stop")
        self.end = end

    def answer(
        self,
        pictures: Sequence[Picture],
        *,
        new_tokens: int,
        progress: Callable[[int], None] = lambda answered: None,
    ) -> dict[int, str]:
        """Each question's answer, by the question's number.

        Args:
            new_tokens: longest answer, in tokens.
            progress: called with the number of answers that a batch brought.

        Raises:
            ValueError: two questions carry one number.
            DataError: a question is too long for a row.
            BrokenImage: a picture cannot be read.
        """
        wanted = [number for picture in pictures for number, _ in picture.questions]
        if len(set(wanted)) != len(wanted):
            raise ValueError("two questions carry the same number; answers could not be told apart")
        # The same question twice (POPE's splits share their positives) is decoded once.
        first: dict[tuple[str, Conversation], int] = {}
        same = {
            number: first.setdefault((picture.name, talk), number)
            for picture in pictures
            for number, talk in picture.questions
        }
        pictures = [
            dataclasses.replace(picture, questions=[(n, talk) for n, talk in picture.questions if same[n] == n])
            for picture in pictures
        ]
        if not wanted:
            return {}
        row = fit([picture for picture in pictures if picture.questions], self.encoder, self.shape)
        batches = question_batches(pictures, self.encoder, row, rows=self.shape.rows, image_size=self.image_size)
        answers: dict[int, str] = {}
        # Closed by hand: a prefetching iterator left to the collector complains when the interpreter ends.
        with jax.set_mesh(self.mesh), contextlib.closing(iter(batches)) as stream:
            for batch in stream:
                ids = self._run(batch, new_tokens)
                asked = np.argwhere(batch.questions >= 0)
                for b, q in asked:
                    text = ids[b, q].tolist()
                    text = text[: text.index(self.end)] if self.end in text else text
                    answers[int(batch.questions[b, q])] = self.encoder.decode(text)
                progress(len(asked))
        return {number: answers[same[number]] for number in wanted}

    def _run(self, batch: Batch, new_tokens: int) -> np.ndarray:
        placed = jax.device_put(batch, batch_sharding(self.mesh))
        return np.asarray(_decode(self.graph, self.state, placed, new_tokens=new_tokens, end=self.end))
