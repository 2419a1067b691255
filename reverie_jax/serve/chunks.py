"""Decoding a few tokens at a time: between two chunks answers are delivered, and other batches have their turn.

What a request asks for (temperature, length, seed) is data, so that one compiled program serves all requests.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt

from reverie_jax.data.packing import Batch
from reverie_jax.eval import decode
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.decoder import LayersKV

CHUNK = 8
"""Tokens that are decoded before the host sees them; the first token of an answer is a chunk of its own."""
TOP = 20
"""Alternatives of which the log-probability is returned: as many as OpenAI's API allows."""


class Controls(NamedTuple):
    """How each leaf is decoded.

    Attributes:
        temperature: 0 decodes greedily.
        top_p: Nucleus threshold of sampling.
        seed: Of sampling; beside it, the leaf's number in `Batch.questions` decides what is drawn.
        longest: Maximum number of tokens.
        scored: Whether any leaf wants log-probabilities.
    """

    temperature: Float[Any, "B Q"]
    top_p: Float[Any, "B Q"]
    seed: UInt[Any, "B Q"]
    longest: Int[Any, "B Q"]
    scored: Bool[Any, ""]


class Prefilled(NamedTuple):
    """What all tokens of a batch's answers attend to; it does not change. See `decode.DecodeState`."""

    prefix: LayersKV
    leaves: Int[Any, "B Q"]
    depth: Int[Any, "B Q"]
    ends: Int[Any, "B L"]
    questions: Int[Any, "B Q"]


class Chosen(NamedTuple):
    """Tokens, and log-probabilities where they are wanted (else 0): of the scores before temperature and nucleus."""

    token: Int[Any, "B Q *C"]
    logprob: Float[Any, "B Q *C"]
    top: Int[Any, "B Q *C N"]
    top_logprobs: Float[Any, "B Q *C N"]


@functools.partial(jax.jit, static_argnames=("graph", "stops", "room"))
def start(
    graph: Any, state: Any, batch: Batch, controls: Controls, *, stops: tuple[int, ...], room: int
) -> tuple[Chosen, Prefilled, LayersKV]:
    """Prefill a batch and choose the first token of each answer.

    Args:
        graph: The model, from `nnx.split`.
        state: Its parameters.
        batch: Packed sequences.
        controls: How to decode.
        stops: Tokens that end an answer; the first of them stands for whichever did.
        room: Tokens of an answer that there is room for.

    Returns:
        The first tokens, what `advance` needs, and the KV of the answers' tokens, none so far.
    """
    scores, found = decode.prefill(nnx.merge(graph, state), batch, room)
    chosen = _choose(scores, batch.questions, jnp.int32(0), controls, batch.questions < 0, stops)
    return chosen, Prefilled(found.prefix, found.leaves, found.depth, found.ends, batch.questions), found.suffix


@functools.partial(jax.jit, static_argnames=("length",))
def join(prefix: LayersKV, suffix: LayersKV, at: Int[Any, ""], *, length: int) -> LayersKV:
    """Return the KV of a prompt with one answer behind it, as that of one sequence.

    Args:
        prefix: KV of the prompt.
        suffix: KV of the answer's tokens.
        at: Number of the prompt's tokens.
        length: Of the result's sequence, at least the prefix's; what of the answer is behind it is left out.
    """

    def join_layers(prefix: Array, suffix: Array) -> Array:
        room = [(0, 0)] * prefix.ndim
        room[-3] = 0, length - prefix.shape[-3]
        own = at + jnp.arange(suffix.shape[-3], dtype=jnp.int32)
        return jnp.pad(prefix, room).at[..., own, :, :].set(suffix[..., 0, :, :, :], mode="drop")

    joined: LayersKV = jax.tree.map(join_layers, prefix, suffix)
    return joined


@functools.partial(jax.jit, static_argnames=("graph", "stops", "room"), donate_argnames=("kept",))
def resume(
    graph: Any,
    state: Any,
    kept: LayersKV,
    tokens: Int[Any, "1 N"],
    begin: Int[Any, ""],
    end: Int[Any, ""],
    questions: Int[Any, "1 1"],
    controls: Controls,
    *,
    stops: tuple[int, ...],
    room: int,
) -> tuple[Chosen, Prefilled, LayersKV]:
    """Prefill further tokens of a conversation, and choose the answer's first token if they are its last ones.

    Args:
        graph: The model, from `nnx.split`.
        state: Its parameters.
        kept: KV of the tokens before, from `join` or `Prefilled.prefix`, with room for `begin` + N; it is overwritten.
        tokens: The tokens, and what fills the shape.
        begin: Number of tokens before.
        end: Number of tokens of the whole conversation.
        questions: The answer's number, as in `Batch`.
        controls: How to decode.
        stops: As for `start`.
        room: As for `start`.

    Returns:
        As `start`.
    """
    model: VisionLanguageModel = nnx.merge(graph, state)
    hidden, prefix = model.append(tokens, begin, kept)
    scores = model.decoder.logits(jax.lax.dynamic_slice_in_dim(hidden, end - 1 - begin, 1, axis=1))
    chosen = _choose(scores, questions, jnp.int32(0), controls, questions < 0, stops)
    depth, length = jnp.full((1, 1), end, jnp.int32), jax.tree.leaves(prefix)[0].shape[-3]
    # One branch: each token sees all before it, and nothing sees what fills the sequence behind the last one.
    ends = jnp.full((1, length), length, jnp.int32)
    return chosen, Prefilled(prefix, depth - 1, depth, ends, questions), decode.empty_suffix(prefix, 1, room)


@functools.partial(jax.jit, static_argnames=("graph", "stops"), donate_argnames=("suffix",))
def advance(
    graph: Any,
    state: Any,
    prefilled: Prefilled,
    suffix: LayersKV,
    controls: Controls,
    token: Int[Array, "B Q"],
    ended: Bool[Array, "B Q"],
    done: Int[Array, ""],
    *,
    stops: tuple[int, ...],
) -> tuple[Chosen, LayersKV, Int[Array, ""]]:
    """Decode up to `CHUNK` further tokens of each answer.

    Args:
        graph: The model, from `nnx.split`.
        state: Its parameters.
        prefilled: From `start`.
        suffix: KV of the answers' tokens, all but the last; it is overwritten.
        controls: How to decode.
        token: The last tokens.
        ended: Answers that have ended.
        done: Number of tokens that the answers have.
        stops: As for `start`.

    Returns:
        The tokens (`B Q CHUNK`), the longer KV, and how many tokens there are: fewer where all answers ended.
    """
    model: VisionLanguageModel = nnx.merge(graph, state)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        count, _, ended, *_ = carry
        return (count < CHUNK) & ~ended.all()

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, token, ended, suffix, out = carry
        at = done + count - 1
        scores, suffix = model.extend(
            *(token, prefilled.depth + at, prefilled.leaves, prefilled.ends, at, prefilled.prefix, suffix)
        )
        chosen = _choose(scores, prefilled.questions, at + 1, controls, ended, stops)
        out = jax.tree.map(lambda whole, one: whole.at[:, :, count].set(one), out, chosen)
        ended = ended | (chosen.token == stops[0]) | (at + 2 >= controls.longest)
        return count + 1, chosen.token, ended, suffix, out

    wide = min(TOP, model.config.text.vocab)
    shape = (*token.shape, CHUNK)
    blank = Chosen(
        jnp.full(shape, stops[0], jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, wide), jnp.int32),
        jnp.zeros((*shape, wide), jnp.float32),
    )
    count, _, _, suffix, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), token, ended, suffix, blank))
    return out, suffix, count


def _choose(
    scores: Float[Array, "B Q V"],
    questions: Int[Array, "B Q"],
    step: Int[Array, ""],
    controls: Controls,
    ended: Bool[Array, "B Q"],
    stops: tuple[int, ...],
) -> Chosen:
    """Choose token number `step` of each answer; of those that have ended it is the token that ends them."""
    greedy = scores.argmax(-1).astype(jnp.int32)
    sampled = controls.temperature > 0

    def sample() -> Int[Array, "B Q"]:
        warm = scores / jnp.where(sampled, controls.temperature, jnp.float32(1))[..., None]
        top_p = controls.top_p[..., None]
        warm = jnp.where(top_p < 1, decode.nucleus(warm, top_p), warm)
        keys = jax.vmap(jax.vmap(jax.random.key))(controls.seed)
        return jnp.where(sampled, decode.draw(warm, questions, step, keys), greedy)

    # Sorting a vocabulary takes longer than a small model's step.
    token = jax.lax.cond(sampled.any(), sample, lambda: greedy)
    wide = min(TOP, scores.shape[-1])

    def score() -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(scores, axis=-1)
        best, top = jax.lax.top_k(logprobs, wide)
        return jnp.take_along_axis(logprobs, token[..., None], axis=-1)[..., 0], top.astype(jnp.int32), best

    def skip() -> tuple[Array, Array, Array]:
        none = jnp.zeros((*token.shape, wide), jnp.float32)
        return none[..., 0], none.astype(jnp.int32), none

    logprob, top, best = jax.lax.cond(controls.scored, score, skip)
    end = ended | jnp.isin(token, jnp.asarray(stops, jnp.int32))
    return Chosen(jnp.where(end, stops[0], token), logprob, top, best)
