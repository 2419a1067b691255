"""What makes features of an image: a ViT as CLIP's, SigLIP's, EVA-CLIP's or BEiT-3's, and a resampler, if there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from reverie_jax.models.attention import attend
from reverie_jax.models.config import FeatureSelect, VisionConfig
from reverie_jax.models.layers import LayerNorm, Linear, Remat, activate, parameter, scan_layers
from reverie_jax.models.resampler import Resampler
from reverie_jax.models.sharding import constrain_rows


def normalize(pixels: UInt8[Array, "... 3"], config: VisionConfig, dtype: DTypeLike) -> Float[Array, "... 3"]:
    """Return pixels (0 to 255) normalized by the tower's mean and standard deviation."""
    mean, std = (np.asarray(v, np.float64).reshape((1,) * (pixels.ndim - 1) + (3,)) for v in (config.mean, config.std))
    # (pixel / 255 - mean) / std as one multiplication and one addition
    scale, shift = (jnp.asarray(v, jnp.float32) for v in (1 / (255 * std), -mean / std))
    return (pixels.astype(jnp.float32) * scale + shift).astype(dtype)


class Multiway(nnx.Module):
    """Two layers of one kind: `query` computes the last `queries` tokens, `image` those before them (BEiT-3)."""

    def __init__(self, make: Callable[[], Any], queries: int):
        self.image, self.query, self.queries = make(), make(), queries

    def __call__(self, x: Float[Array, "B L W"]) -> Float[Array, "B L outputs"]:
        """Apply each layer to its tokens."""
        return jnp.concatenate([self.image(x[:, : -self.queries]), self.query(x[:, -self.queries :])], axis=1)


def _by_token(config: VisionConfig, kind: type[nnx.Module], *args: Any, **options: Any) -> Any:
    """Return a layer, or where there are queries a pair of it."""
    if not config.queries:
        return kind(*args, **options)
    return Multiway(lambda: kind(*args, **options), config.queries)


class VisionLayer(nnx.Module):
    """A stack of pre-norm encoder layers (`CLIPEncoderLayer`).

    BEiT-3's also normalize what the attention and the MLP's activation return (`attention_norm`, `mlp_norm`).
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, layers: int, dtype: DTypeLike):
        self.config, width = config, config.hidden
        stack: Any = {"rngs": rngs, "layers": layers}

        def linear(inputs: int, outputs: int, axes: tuple[str, str], bias: bool = True) -> Any:
            return _by_token(config, Linear, inputs, outputs, axes, **stack, bias=bias, dtype=dtype)

        def norm(width: int) -> Any:
            return _by_token(config, LayerNorm, width, config.norm_eps, **stack)

        self.norm1, self.norm2 = norm(width), norm(width)
        self.query_bias = self.value_bias = nnx.data(None)
        if config.qkv == "separate":
            self.query, self.key, self.value = (linear(width, width, ("embed", "heads")) for _ in range(3))
        else:
            self.qkv = linear(width, 3 * width, ("embed", "heads"), config.key_bias)
            if not config.key_bias:
                self.query_bias, self.value_bias = (
                    parameter(rngs, (width,), ("heads",), layers=layers, dtype=dtype) for _ in range(2)
                )
        self.out = linear(width, width, ("heads", "embed"))
        self.up = linear(width, config.mlp, ("embed", "mlp"))
        self.down = linear(config.mlp, width, ("mlp", "embed"))
        self.attention_norm = norm(width) if config.queries else nnx.data(None)
        self.mlp_norm = norm(config.mlp) if config.queries else nnx.data(None)

    def _attention_inputs(self, x: Float[Array, "B L W"]) -> list[Float[Array, "B L H d"]]:
        """Return queries, keys and values of normalized `x`."""
        config, shape = self.config, (*x.shape[:2], self.config.heads, -1)
        if config.qkv == "separate":
            return [part(x).reshape(shape) for part in (self.query, self.key, self.value)]
        qkv = self.qkv(x)
        if config.qkv == "interleaved":
            return [part[..., 0, :] for part in jnp.split(qkv.reshape(*shape[:3], 3, -1), 3, axis=3)]
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.query_bias is not None and self.value_bias is not None:
            q, v = (
                part + bias[...].astype(x.dtype)[None, None]
                for part, bias in ((q, self.query_bias), (v, self.value_bias))
            )
        return [part.reshape(shape) for part in (q, k, v)]

    def __call__(self, x: Float[Array, "B L W"]) -> Float[Array, "B L W"]:
        """Apply one layer."""
        q, k, v = self._attention_inputs(self.norm1(x))
        attended = attend(q, k, v, None).reshape(x.shape)
        x = x + self.out(attended if self.attention_norm is None else self.attention_norm(attended))
        inner = activate(self.config.activation, self.up(self.norm2(x)))
        return x + self.down(inner if self.mlp_norm is None else self.mlp_norm(inner))


class VisionTower(nnx.Module):
    """A vision transformer and a resampler, if any. What is above the feature layers exists for export and never runs."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        patch, width = 3 * config.patch_size**2, config.hidden

        def table(rows: int) -> nnx.Param[Array]:
            return parameter(rngs, (rows, width), (None, "embed"), scale=0.02, dtype=dtype)

        self.patch = Linear(patch, width, (None, "embed"), rngs=rngs, bias=config.patch_bias, dtype=dtype)
        self.cls = nnx.data(None)
        if config.class_token:
            self.cls = parameter(rngs, (width,), (None,), scale=width**-0.5, dtype=dtype)
        self.position = table(config.position_offset + config.tokens)
        self.queries = table(config.queries) if config.queries else nnx.data(None)
        self.query_position = table(config.query_positions) if config.queries else nnx.data(None)
        self.pre_norm = LayerNorm(width, config.norm_eps, rngs=rngs) if config.pre_norm else nnx.data(None)
        self.layers = VisionLayer(config, rngs=rngs, layers=config.layers, dtype=dtype)
        eps = config.norm_eps if config.output_norm_eps is None else config.output_norm_eps
        self.post_norm = _by_token(config, LayerNorm, width, eps, rngs=rngs)
        self.resampler = nnx.data(None)
        if config.resampler is not None:
            self.resampler = Resampler(config.resampler, width, rngs=rngs, dtype=dtype)

    def _embed(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B L W"]:
        """Return the tokens of images: the class token, patches and queries, as far as there are any."""
        config, batch = self.config, pixels.shape[0]
        grid, side, first = config.image_size // config.patch_size, config.patch_size, config.position_offset
        pixels = pixels[:, : grid * side, : grid * side]
        patches = pixels.reshape(batch, grid, side, grid, side, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(patches.reshape(batch, grid * grid, -1))
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, config.hidden))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.position[...][first:].astype(x.dtype)[None]
        if self.queries is None or self.query_position is None:
            return x
        queries = (self.queries[...] + self.query_position[...][first : first + config.queries]).astype(x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(queries[None], (batch, *queries.shape))], axis=1)

    def __call__(
        self,
        pixels: Float[Array, "B S S 3"],
        depths: Sequence[int],
        *,
        select: FeatureSelect = "patch",
        remat: Remat = "none",
    ) -> Float[Array, "B T features"]:
        """Return the features of images: hidden states of the tokens, side by side, or what the resampler makes of them.

        Args:
            pixels: Normalized images, channels last.
            depths: Number of encoder layers before each of the hidden states (`VLMConfig.feature_depths`).
            select: See `VLMConfig.feature_select`.
            remat: See `layers.scan_layers`.
        """
        # Constrained inside the loop too: positions and kernels are sharded along the width over fsdp. Without this the
        # activations would follow them: every chip would run all images and sum partial products in every layer.
        x = self._embed(pixels)
        x = constrain_rows(x if self.pre_norm is None else self.pre_norm(x))
        states, done = {}, 0
        for depth in sorted(set(depths)):
            x, _ = scan_layers(self.layers, _encode, x, layers=range(done, depth), remat=remat)
            states[depth], done = x, depth
        x = states[depths[0]] if len(depths) == 1 else jnp.concatenate([states[depth] for depth in depths], axis=-1)
        if self.config.output_norm:
            x = self.post_norm(x)
        if self.config.queries:
            return x[:, -self.config.queries :]
        x = x[:, 1:] if select == "patch" else x
        return x if self.resampler is None else self.resampler(x, remat=remat)


def _encode(layer: VisionLayer, x: Float[Array, "B T W"]) -> tuple[Float[Array, "B T W"], None]:
    return constrain_rows(layer(x)), None
