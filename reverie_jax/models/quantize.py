"""Frozen matrices in 8 or 4 bits (QLoRA, Dettmers et al., arXiv 2305.14314), dequantized one layer at a time.

`int8`: codes from -127 to 127, one scale for each output column. `nf4`: two 4-bit codes in a byte, the quantiles of a normal
distribution times the largest magnitude of each 64 inputs of a column (scales take 0.5 bit per parameter, in float32).
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

QuantizedFormat = Literal["int8", "nf4"]

BLOCK = 64
"""Number of inputs that share a scale in `nf4`."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of the paper's data type."""


def pack(
    kernel: Float[Array, "... I O"], format: QuantizedFormat
) -> tuple[Num[Array, "... P O"], Float[Array, "... S O"]]:
    """Return codes and scales: int8 `I` and 1, or nf4 `I / 2` (uint8) and `I / 64` along the inputs.

    Raises:
        ValueError: The number of inputs is odd, for nf4.
    """
    values = kernel.astype(jnp.float32)
    if format == "int8":
        scale = jnp.maximum(jnp.abs(values).max(-2, keepdims=True) / 127, 1e-12)
        return jnp.round(values / scale).astype(jnp.int8), scale
    inputs = kernel.shape[-2]
    if inputs % 2:
        raise ValueError(f"nf4 needs an even number of inputs, not {inputs}")
    block = math.gcd(inputs, BLOCK)
    blocks = values.reshape(*values.shape[:-2], inputs // block, block, values.shape[-1])
    scale = jnp.maximum(jnp.abs(blocks).max(-2, keepdims=True), 1e-12)
    table = jnp.asarray(_NF4, jnp.float32)
    codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, blocks / scale).astype(jnp.uint8).reshape(kernel.shape)
    pairs = codes.reshape(*codes.shape[:-2], inputs // 2, 2, codes.shape[-1])
    return pairs[..., 0, :] | (pairs[..., 1, :] << 4), scale[..., 0, :]


def unpack(codes: Num[Array, "... P O"], scale: Float[Array, "... S O"], dtype: DTypeLike) -> Float[Array, "... I O"]:
    """Return the matrix of codes and scales: the inverse of `pack`, up to rounding."""
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    pairs = jnp.stack([codes & 0xF, codes >> 4], axis=-2)
    inputs, blocks = 2 * codes.shape[-2], scale.shape[-2]
    values = jnp.take(jnp.asarray(_NF4, jnp.float32), pairs.astype(jnp.int32), axis=0)
    values = values.reshape(*codes.shape[:-2], blocks, inputs // blocks, codes.shape[-1]) * scale[..., :, None, :]
    return values.reshape(*codes.shape[:-2], inputs, codes.shape[-1]).astype(dtype)
