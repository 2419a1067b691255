"""Resamplers: learned queries that read a tower's tokens, BLIP-2's Q-Former and mPLUG-Owl's visual abstractor."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from reverie_jax.models.attention import attend_dense
from reverie_jax.models.config import ResamplerConfig
from reverie_jax.models.layers import LayerNorm, Linear, Remat, activate, parameter, scan_layers
from reverie_jax.models.sharding import constrain_rows


class Attention(nnx.Module):
    """Attention of some tokens to others, of width `inputs`; its four matrices have biases."""

    def __init__(self, config: ResamplerConfig, inputs: int, *, dtype: DTypeLike, **stack: Any):
        width, self.heads = config.hidden, config.heads
        options: Any = {**stack, "bias": True, "dtype": dtype}
        self.query = Linear(width, width, ("embed", "heads"), **options)
        self.key = Linear(inputs, width, ("embed", "heads"), **options)
        self.value = Linear(inputs, width, ("embed", "heads"), **options)
        self.out = Linear(width, width, ("heads", "embed"), **options)

    def __call__(self, x: Float[Array, "B Q W"], y: Float[Array, "B T inputs"]) -> Float[Array, "B Q W"]:
        """Return what `x` reads of `y`."""
        q, k, v = (
            part(z).reshape(*z.shape[:2], self.heads, -1)
            for part, z in ((self.query, x), (self.key, y), (self.value, y))
        )
        return self.out(attend_dense(q, k, v, None).reshape(x.shape))


class QFormerLayer(nnx.Module):
    """A stack of post-norm layers (`Blip2QFormerLayer`): self-attention, cross-attention in some stacks, MLP."""

    def __init__(self, config: ResamplerConfig, inputs: int | None, *, dtype: DTypeLike, **stack: Any):
        width = config.hidden
        self.attention = Attention(config, width, dtype=dtype, **stack)
        self.attention_norm = LayerNorm(width, config.norm_eps, **stack)
        self.cross = self.cross_norm = nnx.data(None)
        if inputs is not None:
            self.cross = Attention(config, inputs, dtype=dtype, **stack)
            self.cross_norm = LayerNorm(width, config.norm_eps, **stack)
        self.up = Linear(width, config.mlp, ("embed", "mlp"), **stack, bias=True, dtype=dtype)
        self.down = Linear(config.mlp, width, ("mlp", "embed"), **stack, bias=True, dtype=dtype)
        self.mlp_norm = LayerNorm(width, config.norm_eps, **stack)

    def __call__(self, x: Float[Array, "B Q W"], tokens: Float[Array, "B T inputs"]) -> Float[Array, "B Q W"]:
        """Apply one layer to the queries' states."""
        x = self.attention_norm(x + self.attention(x, x))
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.cross(x, tokens))
        return self.mlp_norm(x + self.down(activate("gelu", self.up(x))))


class QFormerPair(nnx.Module):
    """A stack of pairs of layers, the first with cross-attention."""

    def __init__(self, config: ResamplerConfig, inputs: int, *, dtype: DTypeLike, **stack: Any):
        self.first = QFormerLayer(config, inputs, dtype=dtype, **stack)
        self.second = QFormerLayer(config, None, dtype=dtype, **stack)

    def __call__(self, x: Float[Array, "B Q W"], tokens: Float[Array, "B T inputs"]) -> Float[Array, "B Q W"]:
        """Apply one pair."""
        return self.second(self.first(x, tokens), tokens)


class AbstractorLayer(nnx.Module):
    """A stack of the abstractor's layers; the residual of the attention is the normalized query."""

    def __init__(self, config: ResamplerConfig, inputs: int, *, dtype: DTypeLike, **stack: Any):
        width, mlp = config.hidden, config.mlp
        self.query_norm, self.norm2 = (LayerNorm(width, config.norm_eps, **stack) for _ in range(2))
        self.token_norm = LayerNorm(inputs, config.norm_eps, **stack)
        self.attention = Attention(config, inputs, dtype=dtype, **stack)
        options: Any = {**stack, "bias": True, "dtype": dtype}
        self.gate, self.up = (Linear(width, mlp, ("embed", "mlp"), **options) for _ in range(2))
        self.mlp_norm = LayerNorm(mlp, config.mlp_norm_eps, **stack)
        self.down = Linear(mlp, width, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "B Q W"], tokens: Float[Array, "B T W"]) -> Float[Array, "B Q W"]:
        """Apply one layer to the queries' states."""
        x = self.query_norm(x)
        x = x + self.attention(x, jnp.concatenate([x, self.token_norm(tokens)], axis=1))
        normed = self.norm2(x)
        return x + self.down(self.mlp_norm(activate("silu", self.gate(normed)) * self.up(normed)))


class Resampler(nnx.Module):
    """Learned queries and stacked layers.

    Raises:
        ValueError: The layers do not go with the kind or the tower.
    """

    def __init__(self, config: ResamplerConfig, inputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.queries = parameter(rngs, (config.queries, config.hidden), (None, "embed"), scale=0.02, dtype=dtype)
        self.norm = nnx.data(None)
        if config.kind == "qformer":
            if config.layers % 2:
                raise ValueError(f"a Q-Former has an even number of layers, not {config.layers}")
            self.norm = LayerNorm(config.hidden, config.norm_eps, rngs=rngs)
            self.layers: nnx.Module = QFormerPair(config, inputs, rngs=rngs, layers=config.layers // 2, dtype=dtype)
        else:
            if inputs != config.hidden:
                raise ValueError(
                    f"the abstractor's width is {config.hidden} and the tower's {inputs}; they must be equal"
                )
            self.layers = AbstractorLayer(config, inputs, rngs=rngs, layers=config.layers, dtype=dtype)

    def __call__(self, tokens: Float[Array, "B T inputs"], *, remat: Remat = "none") -> Float[Array, "B Q W"]:
        """Return the last states of the queries.

        Args:
            tokens: Of the tower.
            remat: See `layers.scan_layers`.
        """
        queries = self.queries[...].astype(tokens.dtype)
        queries = queries if self.norm is None else self.norm(queries)
        x = constrain_rows(jnp.broadcast_to(queries[None], (tokens.shape[0], *queries.shape)))

        def body(layer: Any, x: Array) -> tuple[Array, None]:
            return constrain_rows(layer(x, tokens)), None

        return scan_layers(self.layers, body, x, remat=remat)[0]
