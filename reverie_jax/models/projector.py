"""LLaVA's projector, from the vision tower's width to the decoder's."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from reverie_jax.models.config import VLMConfig
from reverie_jax.models.layers import LayerNorm, Linear, activate, parameter


class Projector(nnx.Module):
    """One linear layer (LLaVA-1.0), or two with an activation between (LLaVA-1.5); VIP-LLaVA normalizes before them.

    mPLUG-Owl appends a learned token to the features of an image.
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        inputs, outputs, bias = config.feature_width, config.text.hidden, config.projector_bias
        self.activation = config.projector_activation
        self.norm = nnx.data(None)
        if config.projector_norm_eps is not None:
            self.norm = LayerNorm(inputs, config.projector_norm_eps, rngs=rngs)
        self.linear1 = Linear(inputs, outputs, (None, "embed"), rngs=rngs, bias=bias, dtype=dtype)
        self.linear2 = nnx.data(None)
        if config.projector == "mlp2x_gelu":
            self.linear2 = Linear(outputs, outputs, ("embed", None), rngs=rngs, bias=bias, dtype=dtype)
        self.token = nnx.data(None)
        if config.projector_token:
            self.token = parameter(rngs, (outputs,), ("embed",), scale=0.02, dtype=dtype)

    def __call__(self, x: Float[Array, "N P W"]) -> Float[Array, "N T D"]:
        """Project the features of N images."""
        x = self.linear1(x if self.norm is None else self.norm(x))
        x = x if self.linear2 is None else self.linear2(activate(self.activation, x))
        if self.token is None:
            return x
        token = jnp.broadcast_to(self.token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        return jnp.concatenate([x, token], axis=1)
