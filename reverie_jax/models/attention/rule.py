"""The rule of attention: query i sees key j iff j <= i < ends[j].

`ends[j]` is one past the last index of j's subtree in the sequence. Causal attention is `ends = L`; packed trees, padding
(`ends[j] = j + 1`), shared prefixes, preference pairs and batched questions are all this rule.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SKIPPED, MASKED, WHOLE = 0, 1, 2


def visible(ends: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Return the rule as a matrix: [b, i, j] says whether query i of sequence b sees key j."""
    index = jnp.arange(ends.shape[-1], dtype=ends.dtype)
    return leaf_visible(jnp.broadcast_to(index[None, :], ends.shape), ends)


def leaf_visible(leaves: Int[Array, "B Q"], ends: Int[Array, "B L"]) -> Bool[Array, "B Q L"]:
    """Return the rule for chosen queries: [b, q, j] says whether the token at leaves[b, q] sees key j."""
    key = jnp.arange(ends.shape[-1], dtype=ends.dtype)[None, None, :]
    query = leaves[:, :, None]
    return (key <= query) & (query < ends[:, None, :])


def block_kinds(ends: Int[Array, "B L"] | None, length: int, block: int) -> Int[Array, "R N N"]:
    """Return SKIPPED, MASKED or WHOLE for each pair of blocks, [sequence, query block, key block].

    Args:
        ends: The rule; None lets every query see every key, and R is 1 (otherwise R = B).
        length: L, which is needed without ends.
        block: Tokens of a block.
    """
    count = -(-length // block)
    first = jnp.arange(count, dtype=jnp.int32) * block
    last = first + (block - 1)
    if ends is None:
        whole = jnp.broadcast_to((last < length)[None, None, :], (1, count, count))
        return jnp.where(whole, WHOLE, MASKED).astype(jnp.int32)
    cut = pad_ends(ends, count * block).reshape(ends.shape[0], 1, count, block)
    query_first, query_last = first[None, :, None], last[None, :, None]
    key_first, key_last = first[None, None, :], last[None, None, :]
    seen = (key_first <= query_last) & (cut.max(-1) > query_first)
    whole = (key_last <= query_first) & (cut.min(-1) > query_last)
    return jnp.where(whole, WHOLE, jnp.where(seen, MASKED, SKIPPED)).astype(jnp.int32)


def tree_starts(ends: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Return the first token of each token's tree; no key before it is seen. Padding is its own tree."""
    index = jnp.broadcast_to(jnp.arange(ends.shape[-1], dtype=ends.dtype), ends.shape)
    furthest = jax.lax.cummax(ends, axis=ends.ndim - 1)
    before = jnp.concatenate([jnp.zeros_like(ends[..., :1]), furthest[..., :-1]], axis=-1)
    return jax.lax.cummax(jnp.where(index >= before, index, 0), axis=ends.ndim - 1)


def is_padding(ends: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Return which tokens are padding: trees of one token."""
    index = jnp.arange(ends.shape[-1], dtype=ends.dtype)[None]
    return (ends == index + 1) & (tree_starts(ends) == index)


def pad_ends(ends: Int[Array, "B L"], padded: int) -> Int[Array, "B P"]:
    """Return `ends` extended by padding tokens, which see only themselves."""
    alone = jnp.arange(1, padded + 1, dtype=ends.dtype)
    alone = jnp.broadcast_to(alone[None, :], (ends.shape[0], padded))
    return alone.at[:, : ends.shape[1]].set(ends)
