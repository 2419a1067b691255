"""LLaVA's projector, from the vision tower's width to the decoder's."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from reverie_jax.models.config import ProjectorKind
from reverie_jax.models.layers import Linear, activate


class Projector(nnx.Module):
    """`linear` (LLaVA-1.0) or `mlp2x_gelu` (LLaVA-1.5: two layers, exact GELU between)."""

    def __init__(self, kind: ProjectorKind, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.linear1 = Linear(inputs, outputs, (None, "embed"), rngs=rngs, bias=True, dtype=dtype)
        self.linear2 = nnx.data(None)
        if kind == "mlp2x_gelu":
            self.linear2 = Linear(outputs, outputs, ("embed", None), rngs=rngs, bias=True, dtype=dtype)

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... D"]:
        """Project vision features."""
        x = self.linear1(x)
        return x if self.linear2 is None else self.linear2(activate("gelu", x))
