"""Scores that depend on the tokens so far: transformers' repetition penalty, and its ban of repeated n-grams."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reverie_jax.data.packing import Batch

NO_TOKEN = -1


def prompt_tokens(batch: Batch, counted: bool = True) -> Int[Array, "B Q L"]:
    """Return the tokens of each leaf's prompt, its ancestors in the tree, right-aligned behind `NO_TOKEN`.

    Args:
        batch: Packed sequences.
        counted: If False, the prompts are empty.
    """
    if not counted:
        return jnp.zeros((*batch.leaves.shape, 0), jnp.int32)
    rows, length = batch.tokens.shape
    leaf = batch.leaves[:, :, None]
    index = jnp.arange(length, dtype=jnp.int32)[None, None]
    ancestor = (index <= leaf) & (leaf < batch.ends[:, None])
    below = jnp.take_along_axis(batch.positions, batch.leaves, axis=1)[:, :, None] - batch.positions[:, None]
    # Tokens of other branches are out of bounds, and dropped.
    place = jnp.where(ancestor, length - 1 - below, length)
    row, question = jnp.arange(rows)[:, None, None], jnp.arange(leaf.shape[1])[None, :, None]
    prompts = jnp.full(place.shape, NO_TOKEN, jnp.int32)
    return prompts.at[row, question, place].set(batch.tokens[:, None], mode="drop")


def penalize(
    scores: Float[Array, "*lead V"],
    prompts: Int[Array, "*lead L"],
    answers: Int[Array, "*lead T"],
    step: Any,
    repetition_penalty: float,
    no_repeat_ngram: int,
) -> Float[Array, "*lead V"]:
    """Return scores as transformers' RepetitionPenaltyLogitsProcessor and NoRepeatNGramLogitsProcessor change them.

    Args:
        scores: Of the next token; logits, or log-probabilities in beam search.
        prompts: Earlier tokens that count, right-aligned behind `NO_TOKEN`; L may be 0.
        answers: Tokens of the answers.
        step: Number of tokens that the answers have; what is behind them is ignored.
        repetition_penalty: Positive scores of earlier tokens are divided by it, negative ones multiplied; 1 changes nothing.
        no_repeat_ngram: Size of the n-grams that occur once at most; 0 for any number.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, answers.shape, answers.ndim - 1)
    known = jnp.where(index < step, answers, NO_TOKEN)
    # In front of it all, as many places as an n-gram may reach back: its match behind the first token is unique.
    reach = max(0, no_repeat_ngram - 1)
    history = jnp.concatenate([jnp.full((*known.shape[:-1], reach), NO_TOKEN, jnp.int32), prompts, known], axis=-1)
    if repetition_penalty != 1:
        punished = jnp.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
        scores = jnp.where(_occurs(history, scores.shape[-1]), punished, scores)
    if no_repeat_ngram:
        windows, last = history.shape[-1] - reach, prompts.shape[-1] + step
        again = jnp.ones((*known.shape[:-1], windows), bool)
        for n in range(reach):
            again &= history[..., n : n + windows] == jnp.take(history, last + n, axis=-1)[..., None]
        banned = _occurs(jnp.where(again, history[..., reach:], NO_TOKEN), scores.shape[-1])
        scores = jnp.where(banned, -jnp.inf, scores)
    return scores


def _occurs(ids: Int[Array, "*lead N"], vocabulary: int) -> Bool[Array, "*lead V"]:
    """Return which tokens occur; ids outside the vocabulary, as placeholders of images may be, are ignored."""
    inside = jnp.where(ids < 0, vocabulary, ids)  # a negative index would count from the end

    def one(ids: Int[Array, "N"]) -> Bool[Array, "V"]:
        return jnp.zeros(vocabulary, bool).at[ids].set(True, mode="drop")

    return jnp.vectorize(one, signature="(n)->(v)")(inside)
