"""Rotary positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from reverie_jax.models.config import RopeScaling


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, "half"]:
    """Return the angle per position of each rotated pair, in float32 (`ROPE_INIT_FUNCTIONS` in transformers).

    Args:
        width: Of the rotated part of a head.
        theta: Base of the powers.
        scaling: How they are scaled, if at all.
    """
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    low = frequency / scaling.factor
    if scaling.kind == "linear":
        return low
    turns = scaling.original_positions * frequency / (2 * math.pi)
    share = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1 - share) * low + share * frequency


def rope(
    x: Float[Array, "B L H d"], positions: Int[Array, "B L"], frequencies: Float[Array, "half"]
) -> Float[Array, "B L H d"]:
    """Apply rotary positions in the rotate-half layout, angles in float32 (RoFormer; `LlamaRotaryEmbedding`).

    The first 2 * half components of a head are rotated; the others pass.
    """
    width = 2 * frequencies.shape[0]
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)
