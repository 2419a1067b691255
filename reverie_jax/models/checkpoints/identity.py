"""Which weights these are: checksums that an adapter keeps of the base that it was made on."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from reverie_jax.models.vlm import VisionLanguageModel

Checksums = dict[str, str]

# A few tensors of every layer. Neither embedding nor head: the same weights come with 32,000 rows and with 32,064.
_LOOKED_AT = {
    "decoder": ("layers.norm1.scale", "layers.out.kernel", "layers.down.kernel", "norm.scale"),
    "vision": ("cls", "position", "layers.out.kernel", "layers.norm2.scale"),
    "projector": ("linear1.kernel", "linear1.bias", "linear2.kernel", "linear2.bias"),
}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A sum of the bits of x, rounded to bfloat16, that knows their places.

    Rounded, because float32, float16 and bfloat16 copies of one checkpoint are one base. Whole numbers that wrap, so the
    same on every device layout.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    for _ in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
        bits = ((2 * place + 1) * (bits ^ (bits >> 15))).sum(0, dtype=jnp.uint32)
    return bits


def weights_checksum(model: VisionLanguageModel) -> str:
    """Content of every parameter, adapters too, as a short hex string."""
    digest = hashlib.sha256()
    for path, leaf in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param)), key=lambda pair: pair[0]):
        digest.update(f"{'.'.join(map(str, path))}:{tuple(leaf.shape)}".encode())
        digest.update(np.uint32(_checksum(leaf.get_value())).tobytes())
    return digest.hexdigest()[:16]


def base_checksums(model: VisionLanguageModel) -> Checksums:
    """Shapes and content of decoder, tower and projector, each as a short hex string; adapters do not count."""
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found = {}
    for part, names in _LOOKED_AT.items():
        digest = hashlib.sha256()
        for name in names:
            if (leaf := flat.get(f"{part}.{name}")) is not None:
                digest.update(f"{name}:{tuple(leaf.shape)}".encode())
                digest.update(np.uint32(_checksum(leaf.get_value())).tobytes())
        found[part] = digest.hexdigest()[:16]
    return found
