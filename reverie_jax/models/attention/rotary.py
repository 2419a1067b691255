"""Rotary positions."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(x: Float[Array, "B L H d"], positions: Int[Array, "B L"], theta: float) -> Float[Array, "B L H d"]:
    """Apply rotary positions in the rotate-half layout, angles in float32 (RoFormer; `LlamaRotaryEmbedding`)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
