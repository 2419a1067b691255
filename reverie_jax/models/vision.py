"""The vision tower: CLIP's ViT, up to the hidden state that is the projector's input."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from reverie_jax.models.attention import attend
from reverie_jax.models.config import VisionConfig
from reverie_jax.models.layers import LayerNorm, Linear, Remat, activate, parameter, scan_layers
from reverie_jax.models.sharding import constrain_rows

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(pixels: UInt8[Array, "... 3"], dtype: DTypeLike) -> Float[Array, "... 3"]:
    """Return pixels (0 to 255) normalized by CLIP's mean and standard deviation."""
    mean, std = (np.asarray(v, np.float64).reshape((1,) * (pixels.ndim - 1) + (3,)) for v in (CLIP_MEAN, CLIP_STD))
    # (pixel / 255 - mean) / std as one multiplication and one addition
    scale, shift = (jnp.asarray(v, jnp.float32) for v in (1 / (255 * std), -mean / std))
    return (pixels.astype(jnp.float32) * scale + shift).astype(dtype)


class VisionLayer(nnx.Module):
    """A stack of pre-norm encoder layers (`CLIPEncoderLayer`)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, layers: int, dtype: DTypeLike):
        width = config.hidden
        self.heads, self.activation = config.heads, config.activation
        self.norm1 = LayerNorm(width, config.norm_eps, rngs=rngs, layers=layers)
        self.norm2 = LayerNorm(width, config.norm_eps, rngs=rngs, layers=layers)
        options: Any = {"rngs": rngs, "layers": layers, "bias": True, "dtype": dtype}
        self.query = Linear(width, width, ("embed", "heads"), **options)
        self.key = Linear(width, width, ("embed", "heads"), **options)
        self.value = Linear(width, width, ("embed", "heads"), **options)
        self.out = Linear(width, width, ("heads", "embed"), **options)
        self.up = Linear(width, config.mlp, ("embed", "mlp"), **options)
        self.down = Linear(config.mlp, width, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "B L W"]) -> Float[Array, "B L W"]:
        """Apply one layer."""
        normed = self.norm1(x)
        q, k, v = (part(normed).reshape(*x.shape[:2], self.heads, -1) for part in (self.query, self.key, self.value))
        x = x + self.out(attend(q, k, v, None).reshape(x.shape))
        return x + self.down(activate(self.activation, self.up(self.norm2(x))))


class VisionTower(nnx.Module):
    """CLIP's vision transformer. `post_norm` and the layers above the feature layer exist for export and never run."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        patch = 3 * config.patch_size**2
        self.patch = Linear(patch, config.hidden, (None, "embed"), rngs=rngs, dtype=dtype)
        self.cls = parameter(rngs, (config.hidden,), (None,), scale=config.hidden**-0.5, dtype=dtype)
        self.position = parameter(rngs, (config.patches + 1, config.hidden), (None, "embed"), scale=0.02, dtype=dtype)
        self.pre_norm = LayerNorm(config.hidden, config.norm_eps, rngs=rngs)
        self.layers = VisionLayer(config, rngs=rngs, layers=config.layers, dtype=dtype)
        self.post_norm = LayerNorm(config.hidden, config.norm_eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B S S 3"], depth: int, *, remat: Remat = "none") -> Float[Array, "B P W"]:
        """Return hidden state `depth` of the patches, without the class token and without `post_norm`.

        Args:
            pixels: Normalized images, channels last.
            depth: Number of encoder layers to run.
            remat: See `layers.scan_layers`.
        """
        config = self.config
        batch, grid, side = pixels.shape[0], config.image_size // config.patch_size, config.patch_size
        patches = pixels.reshape(batch, grid, side, grid, side, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(patches.reshape(batch, grid * grid, -1))
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, config.hidden))
        x = jnp.concatenate([cls, x], axis=1) + self.position[...].astype(x.dtype)[None]
        # Constrained inside the loop too: positions and kernels are sharded along the width over fsdp. Without this the
        # activations would follow them: every chip would run all images and sum partial products in every layer.
        x = constrain_rows(self.pre_norm(x))
        x, _ = scan_layers(self.layers, lambda layer, x: (constrain_rows(layer(x)), None), x, depth=depth, remat=remat)
        return x[:, 1:]
