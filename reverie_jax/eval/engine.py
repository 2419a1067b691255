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

from reverie_jax.data.conversation import Conversation, Encoder, ImageRecord
from reverie_jax.data.pipeline import Picture, question_batches
from reverie_jax.data.processor import Processor
from reverie_jax.data.rows import Batch, RowShape
from reverie_jax.data.tree import grow, untaught
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.decoder import KV
from reverie_jax.models.sharding import batch_sharding, make_mesh, mesh_of, place


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


def greedy(model: VisionLanguageModel, batch: Batch, *, new_tokens: int, stops: tuple[int, ...]) -> Int[Array, "B Q T"]:
    """Greedy continuations of every leaf; the first of `stops` stands for whichever ended an answer, and fills the rest.

    The row's KV exists once. Each leaf sees its ancestors in it, and its own suffix. Decoding stops when all leaves have
    ended.
    """
    hidden, prefix = model.prefill(batch.tokens, batch.positions, batch.ends, batch.features, batch.pixels)
    at_leaf = jnp.take_along_axis(hidden, batch.leaves[:, :, None], axis=1)
    depth = jnp.take_along_axis(batch.positions, batch.leaves, axis=1)
    end = stops[0]

    def best(logits: Array) -> Array:
        token = logits.argmax(-1).astype(jnp.int32)
        return jnp.where(jnp.isin(token, jnp.asarray(stops, jnp.int32)), end, token)

    token = jnp.where(batch.questions < 0, end, best(model.decoder.logits(at_leaf)))
    layers, rows, _, heads, width = prefix.k.shape
    empty = jnp.zeros((layers, rows, batch.leaves.shape[1], new_tokens, heads, width), prefix.k.dtype)
    out = jnp.full((*token.shape, new_tokens), end, jnp.int32).at[:, :, 0].set(token)

    def more(carry: tuple[Any, ...]) -> Array:
        step, token, _, _ = carry
        return (step < new_tokens - 1) & (token != end).any()

    def extend(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, out, suffix = carry
        logits, suffix = model.extend(token, depth + 1 + step, batch.leaves, batch.ends, step, prefix, suffix)
        token = jnp.where(token == end, end, best(logits))
        return step + 1, token, out.at[:, :, step + 1].set(token), suffix

    start = (jnp.zeros((), jnp.int32), token, out, KV(empty, empty))
    return jax.lax.while_loop(more, extend, start)[2]


@functools.partial(jax.jit, static_argnames=("graph", "new_tokens", "stops"))
def _decode(graph: Any, state: Any, batch: Batch, *, new_tokens: int, stops: tuple[int, ...]) -> Array:
    # At module level: engines of models of one architecture share the compiled program.
    return greedy(nnx.merge(graph, state), batch, new_tokens=new_tokens, stops=stops)


class Engine:
    """Answers questions about pictures with one model.

    Args:
        model: with or without adapters; read, never changed.
        processor: the model's own, as `load_model` gave it.
        mesh: devices; rows are spread over them. Those that the model is on by default, or one.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        shape: EngineShape | None = None,
        *,
        mesh: Mesh | None = None,
    ):
        self.processor, self.encoder, self.shape = processor, processor.encoder, shape or EngineShape()
        self.graph, state = nnx.split(model)
        self.mesh = mesh or mesh_of(state) or make_mesh()
        self.state = place(state, self.mesh)
        if not self.encoder.stop_ids:
            raise ValueError("the tokenizer has no end-of-sequence token: answers would never stop")

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
        batches = question_batches(pictures, self.processor, row, rows=self.shape.rows)
        answers: dict[int, str] = {}
        end = self.encoder.stop_ids[0]
        # Closed by hand: a prefetching iterator left to the collector complains when the interpreter ends.
        with jax.set_mesh(self.mesh), contextlib.closing(iter(batches)) as stream:
            for batch in stream:
                ids = self._run(batch, new_tokens)
                asked = np.argwhere(batch.questions >= 0)
                for b, q in asked:
                    text = ids[b, q].tolist()
                    text = text[: text.index(end)] if end in text else text
                    answers[int(batch.questions[b, q])] = self.encoder.decode(text)
                progress(len(asked))
        return {number: answers[same[number]] for number in wanted}

    def _run(self, batch: Batch, new_tokens: int) -> np.ndarray:
        placed = jax.device_put(batch, batch_sharding(self.mesh))
        return np.asarray(_decode(self.graph, self.state, placed, new_tokens=new_tokens, stops=self.encoder.stop_ids))


def generate(
    model: VisionLanguageModel,
    processor: Processor,
    conversations: Sequence[ImageRecord],
    max_new_tokens: int = 64,
    *,
    mesh: Mesh | None = None,
) -> list[str]:
    """Greedy answers to open conversations, each picture encoded and prefilled once.

    Args:
        conversations: records; `ask` makes them.
        max_new_tokens: longest answer, in tokens.

    Returns:
        One answer a conversation, in the records' order.

    Raises:
        UserError: a conversation is not open, or does not fit the decoder's context.
        BrokenImage: a picture cannot be read.
    """
    pictures, number = [], 0
    for index, record in enumerate(conversations):
        if closed := [n for n, talk in enumerate(record.conversations) if not talk.open]:
            raise UserError(
                f"record {record.id}: conversation {closed[0]} ends with an answer; there is nothing to say"
            )
        processor.tokens(record.id, record.conversations, max_new_tokens)
        questions = [(number + n, talk) for n, talk in enumerate(record.conversations)]
        number += len(questions)
        # Two records may share a name and show different pictures.
        pictures.append(Picture(f"{record.id} ({index})", record.image, questions))
    # Long enough for any one conversation; a record's tree takes several rows where it is longer.
    shape = EngineShape(tokens=max(2048, processor.context), rows=min(8, max(1, len(pictures))))
    engine = Engine(model, processor, shape, mesh=mesh)
    answers = engine.answer(pictures, new_tokens=max_new_tokens)
    return [answers[n] for n in range(number)]
