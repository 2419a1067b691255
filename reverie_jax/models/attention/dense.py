"""Attention whose scores exist at once, or for one chunk of queries: the reference, and attention of decoded tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reverie_jax.models.attention.rule import leaf_visible, visible

QUERY_CHUNK = 256


def _heads_first(x: Float[Array, "B L H d"], kv_heads: int) -> Float[Array, "B K GL d"]:
    """Move the heads before the tokens, with the G = H / K query heads of a key head in one matrix, for matmuls."""
    batch, length, heads, width = x.shape
    group = heads // kv_heads
    x = x.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(batch, kv_heads, group * length, width)


def _heads_last(x: Float[Array, "B K GL d"], length: int) -> Float[Array, "B L H d"]:
    batch, kv_heads, rows, width = x.shape
    x = x.reshape(batch, kv_heads, rows // length, length, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, -1, width)


def _scores(q: Float[Array, "B K I d"], k: Float[Array, "B K J d"]) -> Float[Array, "B K I J"]:
    return jnp.einsum("bkid,bkjd->bkij", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _softmax_attention(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B K L d"],
    v: Float[Array, "B K L d"],
    seen: Bool[Array, "B Q L"] | None,
) -> Float[Array, "B Q H d"]:
    """Return values weighted by the softmax (in float32) over the keys that are seen; `seen=None` is all."""
    length, kv_heads = q.shape[1], k.shape[1]
    scores = _scores(_heads_first(q, kv_heads), k)
    if seen is not None:
        mask = jnp.tile(seen, (1, q.shape[2] // kv_heads, 1))
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _heads_last(jnp.einsum("bkij,bkjd->bkid", weights, v), length)


def attend_dense(
    q: Float[Array, "B Q H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
) -> Float[Array, "B Q H d"]:
    """Compute `attend` with all Q x L scores at once: the reference, and the fastest for short sequences.

    Without `ends` the queries may be of other tokens than the keys.
    """
    seen = None if ends is None else visible(ends)
    return _softmax_attention(q, _heads_first(k, k.shape[2]), _heads_first(v, v.shape[2]), seen)


def attend_chunked(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
    chunk: int = QUERY_CHUNK,
) -> Float[Array, "B L H d"]:
    """Compute `attend` for `chunk` queries at a time: only chunk x L scores exist; the backward pass recomputes them."""
    batch, length = q.shape[:2]
    count = -(-length // chunk)
    # Queries that fill the last chunk see nothing, weight all keys equally and are dropped.
    queries = jnp.pad(q, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    queries = queries.reshape(batch, count, chunk, *q.shape[2:]).swapaxes(0, 1)
    index = jnp.arange(count * chunk, dtype=jnp.int32).reshape(count, chunk)
    keys, values = _heads_first(k, k.shape[2]), _heads_first(v, v.shape[2])

    def attend_chunk(inputs: tuple[Array, Array]) -> Array:
        leaves = jnp.broadcast_to(inputs[1][None], (batch, chunk))
        return _softmax_attention(inputs[0], keys, values, None if ends is None else leaf_visible(leaves, ends))

    out = jax.lax.map(jax.checkpoint(attend_chunk, prevent_cse=False), (queries, index))
    return out.swapaxes(0, 1).reshape(batch, count * chunk, *q.shape[2:])[:, :length]


def attend_leaves(
    q: Float[Array, "B Q H d"],
    prefix: tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]],
    seen: Bool[Array, "B Q L"],
    suffix: tuple[Float[Array, "B Q T K d"], Float[Array, "B Q T K d"]],
    step: Int[Array, ""],
) -> Float[Array, "B Q H d"]:
    """Compute attention of one decoded token per leaf, over its ancestors in the prefix and its own suffix up to `step`.

    Args:
        q: Queries, one per leaf.
        prefix: Keys and values of the sequence, one copy for all leaves.
        seen: Tokens of the sequence that each leaf sees (`leaf_visible`).
        suffix: Keys and values decoded so far, for each leaf; entry `step` is the query's own.
        step: Index of the query within the suffix.
    """
    leaves, kv_heads = q.shape[1], prefix[0].shape[2]
    group = q.shape[2] // kv_heads
    low = jnp.finfo(jnp.float32).min
    over_prefix = _scores(_heads_first(q, kv_heads), _heads_first(prefix[0], kv_heads))
    over_prefix = jnp.where(jnp.tile(seen, (1, group, 1))[:, None], over_prefix, low)
    grouped = q.reshape(*q.shape[:2], kv_heads, group, -1)
    over_suffix = jnp.einsum("bqkgd,bqtkd->bkgqt", grouped, suffix[0], preferred_element_type=jnp.float32)
    over_suffix = over_suffix * q.shape[-1] ** -0.5
    decoded = jnp.arange(suffix[0].shape[2]) <= step
    over_suffix = jnp.where(decoded[None, None, None, None, :], over_suffix, low).reshape(*over_prefix.shape[:3], -1)
    weights = jax.nn.softmax(jnp.concatenate([over_prefix, over_suffix], axis=-1), axis=-1).astype(q.dtype)
    over_prefix, over_suffix = jnp.split(weights, [prefix[0].shape[1]], axis=-1)
    out = _heads_last(jnp.einsum("bkij,bkjd->bkid", over_prefix, _heads_first(prefix[1], kv_heads)), leaves)
    over_suffix = over_suffix.reshape(over_suffix.shape[0], kv_heads, group, leaves, -1)
    return out + jnp.einsum("bkgqt,bqtkd->bqkgd", over_suffix, suffix[1]).reshape(q.shape)
