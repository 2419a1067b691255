"""Attention by the `ends` rule on CPUs, block by block: what no query of a block sees is not computed, forward and backward.

For each block of queries the blocks of keys that it sees are listed first: those before it whose subtrees reach it. In
sequences of several trees, each with branches, they are a few of all. Scores exist for one pair of blocks at a time
(online softmax, arXiv 2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from reverie_jax.models.attention.mesh import shard_over_mesh
from reverie_jax.models.attention.rule import SKIPPED, block_kinds, pad_ends

BLOCK = 128
"""Tokens of a block, at most: on CPUs larger blocks skip less, smaller ones spend their time between operations."""

Heads = Float[Array, "B K G P d"]
Keys = Float[Array, "B K P d"]


def attend_blocks(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
    *,
    block: int = BLOCK,
) -> Float[Array, "B L H d"]:
    """Compute `attention.attend` block by block; differentiable once, in q, k and v.

    Under a (data, fsdp, tensor) mesh (`jax.set_mesh`) each device computes its own sequences and heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        ends: The rule; None lets every query see every key.
        block: Tokens of a block at most; blocks are as equal as they can be.
    """
    return _attend(q, k, v, ends, -(-q.shape[1] // -(-q.shape[1] // block)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Any, k: Any, v: Any, ends: Any, block: int) -> Any:
    return _attend_forward(q, k, v, ends, block)[0]


def _attend_forward(q: Any, k: Any, v: Any, ends: Any, block: int) -> Any:
    out, lse = shard_over_mesh(functools.partial(_forward, block=block), (q, k, v), ends, (4, 3))
    return out, (q, k, v, ends, out, lse)


def _attend_backward(block: int, residuals: Any, dout: Any) -> Any:
    q, k, v, ends, out, lse = residuals
    run = functools.partial(_backward, block=block)
    return *shard_over_mesh(run, (q, k, v, out, lse, dout), ends, (4, 4, 4)), None


_attend.defvjp(_attend_forward, _attend_backward)


class _Blocks:
    """One pass over the pairs of blocks: slices, and what each block of queries sees.

    Attributes:
        size: tokens of a block.
        count: blocks of a sequence.
        length: tokens of a sequence, without those that fill its last block.
    """

    def __init__(self, length: int, size: int, batch: int, ends: Int[Array, "B L"] | None) -> None:
        self.size, self.length, self.batch = size, length, batch
        self.count = -(-length // size)
        self.padded = self.count * size
        self.ends = None if ends is None else pad_ends(ends, self.padded)
        kinds = block_kinds(ends, length, size)
        seen = jnp.broadcast_to(kinds != SKIPPED, (batch, self.count, self.count))
        # Seen blocks first, in order: a query's own block is the last of them, so each query sees a key (itself).
        self.order = jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32)
        self.seen = seen.sum(axis=-1, dtype=jnp.int32)

    def heads(self, x: Float[Array, "B L H d"], kv_heads: int) -> Heads:
        """Move the heads before the tokens and fill the last block."""
        x = jnp.pad(x, ((0, 0), (0, self.padded - self.length), (0, 0), (0, 0)))
        return x.reshape(self.batch, self.padded, kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)

    def tokens(self, x: Float[Array, "N K M d"]) -> Float[Array, "B L H d"]:
        """Put together what the blocks of queries, of all sequences, have computed."""
        kv_heads, width = x.shape[1], x.shape[3]
        x = x.reshape(self.batch, self.count, kv_heads, -1, self.size, width).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(self.batch, self.padded, -1, width)[:, : self.length]

    def take(self, x: Array, sequence: Array, number: Array) -> Array:
        """Return block `number` of a sequence, [K, G * size, ...] of [B, K, G, P, ...]."""
        start: tuple[Any, ...] = (sequence, 0, 0, number * self.size, *(0,) * (x.ndim - 4))
        part = lax.dynamic_slice(x, start, (1, *x.shape[1:3], self.size, *x.shape[4:]))
        return part.reshape(x.shape[1], -1, *x.shape[4:])

    def mask(self, sequence: Array, query: Array, key: Array, group: int) -> Bool[Array, "1 M size"] | None:
        """Return the rule between two blocks, for the `group` query heads of a key head; None if all is seen."""
        keys = (key * self.size + jnp.arange(self.size, dtype=jnp.int32))[None, :]
        if self.ends is None:
            return None if self.padded == self.length else (keys < self.length)[None]
        queries = (query * self.size + jnp.arange(self.size, dtype=jnp.int32))[:, None]
        ends = lax.dynamic_slice(self.ends, (sequence, key * self.size), (1, self.size))
        return jnp.tile((keys <= queries) & (queries < ends), (group, 1))[None]


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _forward(
    q: Float[Array, "B L H d"], k: Float[Array, "B L K d"], v: Float[Array, "B L K d"], ends: Any = None, *, block: int
) -> tuple[Float[Array, "B L H d"], Float[Array, "B H L"]]:
    """Return the outputs and the logarithms of the softmax's sums."""
    blocks = _Blocks(q.shape[1], block, q.shape[0], ends)
    kv_heads, group, scale = k.shape[2], q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    queries, keys, values = (blocks.heads(x, kv_heads) for x in (q, k, v))
    low = jnp.finfo(jnp.float32).min
    rows = (kv_heads, group * block)

    def attend_block(number: Array) -> tuple[Array, Array]:
        sequence, query = number // blocks.count, number % blocks.count
        part = blocks.take(queries, sequence, query)

        def add(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak, total, out = carry
            key = blocks.order[sequence, query, step]
            scores = _dot("kid,kjd->kij", part, blocks.take(keys, sequence, key)) * scale
            mask = blocks.mask(sequence, query, key, group)
            if mask is not None:
                # A query that sees nothing in this block gives it a weight that fades away when it sees itself.
                scores = jnp.where(mask, scores, low)
            higher = jnp.maximum(peak, scores.max(axis=-1))
            weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(peak - higher)
            new = _dot("kij,kjd->kid", weights.astype(v.dtype), blocks.take(values, sequence, key))
            return higher, total * fade + weights.sum(axis=-1), out * fade[..., None] + new

        start = (jnp.full(rows, low), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, v.shape[-1]), jnp.float32))
        peak, total, out = lax.fori_loop(0, blocks.seen[sequence, query], add, start)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, lse = lax.map(attend_block, jnp.arange(blocks.batch * blocks.count, dtype=jnp.int32))
    return blocks.tokens(out), blocks.tokens(lse[..., None])[..., 0].swapaxes(1, 2)


def _backward(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    out: Float[Array, "B L H d"],
    lse: Float[Array, "B H L"],
    dout: Float[Array, "B L H d"],
    ends: Any = None,
    *,
    block: int,
) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"], Float[Array, "B L K d"]]:
    """Return the gradients of q, k and v; the weights are computed again from `lse`."""
    blocks = _Blocks(q.shape[1], block, q.shape[0], ends)
    kv_heads, group, scale = k.shape[2], q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    queries, keys, values, douts = (blocks.heads(x, kv_heads) for x in (q, k, v, dout))
    # The share of the softmax's own derivative, one number a query.
    shares = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
    sums, shares = (blocks.heads(x[..., None], kv_heads) for x in (lse.swapaxes(1, 2), shares))

    def add_block(grads: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        sequence, query = number // blocks.count, number % blocks.count
        part, dpart, lsum, share = (blocks.take(x, sequence, query) for x in (queries, douts, sums, shares))

        def add(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            key = blocks.order[sequence, query, step]
            near, value = blocks.take(keys, sequence, key), blocks.take(values, sequence, key)
            weights = jnp.exp(_dot("kid,kjd->kij", part, near) * scale - lsum)
            mask = blocks.mask(sequence, query, key, group)
            if mask is not None:
                weights = jnp.where(mask, weights, 0.0)
            dscores = (weights * (_dot("kid,kjd->kij", dpart, value) - share) * scale).astype(q.dtype)
            at = (sequence, 0, 0, key * block, 0)

            def accumulate(total: Array, new: Array) -> Array:
                new = new[None, :, None]
                return lax.dynamic_update_slice(total, lax.dynamic_slice(total, at, new.shape) + new, at)

            dk = accumulate(dk, _dot("kij,kid->kjd", dscores, part))
            dv = accumulate(dv, _dot("kij,kid->kjd", weights.astype(q.dtype), dpart))
            return dq + _dot("kij,kjd->kid", dscores, near), dk, dv

        dq = jnp.zeros(part.shape, jnp.float32)
        dq, dk, dv = lax.fori_loop(0, blocks.seen[sequence, query], add, (dq, *grads))
        return (dk, dv), dq

    zeros = jnp.zeros(keys.shape, jnp.float32)
    numbers = jnp.arange(blocks.batch * blocks.count, dtype=jnp.int32)
    (dk, dv), dq = lax.scan(add_block, (zeros, zeros), numbers)

    def tokens(x: Array) -> Array:
        return x[:, :, 0].swapaxes(1, 2)[:, : blocks.length]

    return blocks.tokens(dq).astype(q.dtype), tokens(dk).astype(k.dtype), tokens(dv).astype(v.dtype)
