"""Attention by the `ends` rule on NVIDIA GPUs, by cuDNN's fused kernels."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from reverie_jax.models.attention.mesh import shard_over_mesh
from reverie_jax.models.attention.rule import pad_ends, visible

WIDEST = 128
"""Width of a head that cuDNN takes on every GPU."""


@functools.cache
def is_installed() -> bool:
    """Return whether JAX for NVIDIA GPUs (extra `cuda12` or `cuda13`) is installed, with its compiler; it needs no GPU."""
    return any(importlib.util.find_spec(f"jax_{cuda}_plugin") for cuda in ("cuda12", "cuda13"))


def is_supported(dtype: DTypeLike, width: int) -> bool:
    """Return whether cuDNN is installed and computes heads of this dtype and width."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= WIDEST and is_installed()


def attend_cudnn(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
) -> Float[Array, "B L H d"]:
    """Compute `attention.attend` on a GPU: scores never exist, the mask is one bias for all heads of a sequence.

    Keys after the query are skipped, other trees' are masked. Under a (data, fsdp, tensor) mesh (`jax.set_mesh`) each
    device computes its own sequences and heads.
    """
    return shard_over_mesh(_attend, (q, k, v), ends, 4)


def _attend(q: Array, k: Array, v: Array, ends: Array | None = None) -> Array:
    batch, length = q.shape[:2]
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if length % 2:  # cuDNN's backward pass takes even lengths only
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        ends = None if ends is None else pad_ends(ends, length + 1)
    if ends is not None:
        out = attend(q, k, v, mask=visible(ends)[:, None], is_causal=True)
    elif length % 2:
        out = attend(q, k, v, key_value_seq_lengths=jnp.full(batch, length, jnp.int32))
    else:
        out = attend(q, k, v)
    return out[:, :length]
