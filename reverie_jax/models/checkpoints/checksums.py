"""Checksums of weights: an adapter records those of its base model."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from reverie_jax.models.vlm import VisionLanguageModel

Checksums = dict[str, str]

# A few tensors of every layer. Neither embedding nor head: the same weights come with 32,000 rows and with 32,064.
_SAMPLED = {
    "decoder": (
        *("layers.norm1.scale", "layers.out.kernel", "layers.down.kernel", "norm.scale"),
        *(f"expert_layers.{name}" for name in ("norm1.scale", "out.kernel", "down.kernel", "router.kernel")),
    ),
    "vision": (
        *("cls", "position", "layers.out.kernel", "layers.norm2.scale"),
        *("queries", "layers.out.image.kernel", "layers.out.query.kernel", "layers.norm2.query.scale"),
        *("resampler.queries", "resampler.layers.attention.out.kernel", "resampler.layers.down.kernel"),
        *("resampler.layers.first.cross.out.kernel", "resampler.layers.second.down.kernel"),
    ),
    "projector": ("linear1.kernel", "linear1.bias", "linear2.kernel", "linear2.bias", "token"),
}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Return a position-dependent sum of the bits of x, rounded to bfloat16.

    Rounded, so that float32, float16 and bfloat16 copies of one checkpoint agree. In integers that wrap, so that every
    device layout gives the same sum.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    for _ in range(x.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
        bits = ((2 * index + 1) * (bits ^ (bits >> 15))).sum(0, dtype=jnp.uint32)
    return bits


def weights_checksum(model: nnx.Module) -> str:
    """Return a checksum of every parameter, adapters included, as 16 hex digits."""
    digest = hashlib.sha256()
    for path, leaf in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param)), key=lambda pair: pair[0]):
        digest.update(f"{'.'.join(map(str, path))}:{tuple(leaf.shape)}".encode())
        digest.update(np.uint32(_checksum(leaf.get_value())).tobytes())
    return digest.hexdigest()[:16]


def base_checksums(model: VisionLanguageModel) -> Checksums:
    """Return checksums of decoder, vision tower and projector (shapes and content), 16 hex digits each; without adapters."""
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    checksums = {}
    for part, names in _SAMPLED.items():
        digest = hashlib.sha256()
        for name in names:
            if (leaf := flat.get(f"{part}.{name}")) is not None:
                digest.update(f"{name}:{tuple(leaf.shape)}".encode())
                digest.update(np.uint32(_checksum(leaf.get_value())).tobytes())
        checksums[part] = digest.hexdigest()[:16]
    return checksums
