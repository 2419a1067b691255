"""The vision tower: a ViT as CLIP's or SigLIP's, up to the hidden states that are the projector's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from reverie_jax.models.attention import attend
from reverie_jax.models.config import FeatureSelect, VisionConfig
from reverie_jax.models.layers import LayerNorm, Linear, Remat, activate, parameter, scan_layers
from reverie_jax.models.sharding import constrain_rows


def normalize(pixels: UInt8[Array, "... 3"], config: VisionConfig, dtype: DTypeLike) -> Float[Array, "... 3"]:
    """Return pixels (0 to 255) normalized by the tower's mean and standard deviation."""
    mean, std = (np.asarray(v, np.float64).reshape((1,) * (pixels.ndim - 1) + (3,)) for v in (config.mean, config.std))
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
    """A vision transformer. `post_norm` and the layers above the feature layers exist for export and never run."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        patch, width = 3 * config.patch_size**2, config.hidden
        self.patch = Linear(patch, width, (None, "embed"), rngs=rngs, bias=config.patch_bias, dtype=dtype)
        self.cls = nnx.data(None)
        if config.class_token:
            self.cls = parameter(rngs, (width,), (None,), scale=width**-0.5, dtype=dtype)
        self.position = parameter(rngs, (config.tokens, width), (None, "embed"), scale=0.02, dtype=dtype)
        self.pre_norm = LayerNorm(width, config.norm_eps, rngs=rngs) if config.pre_norm else nnx.data(None)
        self.layers = VisionLayer(config, rngs=rngs, layers=config.layers, dtype=dtype)
        self.post_norm = LayerNorm(width, config.norm_eps, rngs=rngs)

    def __call__(
        self,
        pixels: Float[Array, "B S S 3"],
        depths: Sequence[int],
        *,
        select: FeatureSelect = "patch",
        remat: Remat = "none",
    ) -> Float[Array, "B T W"]:
        """Return hidden states of the tokens, side by side, without `post_norm`.

        Args:
            pixels: Normalized images, channels last.
            depths: Number of encoder layers before each of the hidden states (`VLMConfig.feature_depths`).
            select: See `VLMConfig.feature_select`.
            remat: See `layers.scan_layers`.
        """
        config = self.config
        batch, grid, side = pixels.shape[0], config.image_size // config.patch_size, config.patch_size
        pixels = pixels[:, : grid * side, : grid * side]
        patches = pixels.reshape(batch, grid, side, grid, side, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(patches.reshape(batch, grid * grid, -1))
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, config.hidden))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.position[...].astype(x.dtype)[None]
        # Constrained inside the loop too: positions and kernels are sharded along the width over fsdp. Without this the
        # activations would follow them: every chip would run all images and sum partial products in every layer.
        x = constrain_rows(x if self.pre_norm is None else self.pre_norm(x))
        states, done = {}, 0
        for depth in sorted(set(depths)):
            x, _ = scan_layers(self.layers, _encode, x, layers=range(done, depth), remat=remat)
            states[depth], done = x, depth
        x = states[depths[0]] if len(depths) == 1 else jnp.concatenate([states[depth] for depth in depths], axis=-1)
        return x[:, 1:] if select == "patch" else x


def _encode(layer: VisionLayer, x: Float[Array, "B T W"]) -> tuple[Float[Array, "B T W"], None]:
    return constrain_rows(layer(x)), None
