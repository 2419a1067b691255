"""Parameters with names: the few layers that the tower, the projector and the decoder are built from.

A layer may be stacked: with `layers=N` every parameter carries a leading axis of N, and `scan_layers` runs the stack as one
compiled body. Each parameter knows its logical axes (`axes`), from which `models.sharding` derives where it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from reverie_jax.models.quantize import Bits, pack, unpack

Axes = tuple[str | None, ...]
Remat = Literal["full", "dots", "none"]


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: Axes,
    *,
    layers: int | None = None,
    scale: float = 0.0,
    mean: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> nnx.Param[Array]:
    """A parameter drawn from normal(mean, scale), stacked `layers` times, that carries its logical axes."""
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    value = jnp.full(shape, mean, dtype)
    if scale:
        value = value + (scale * jax.random.normal(rngs.params(), shape)).astype(dtype)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """y = x W + b, W of shape (in, out). May carry a LoRA adapter (see `models.lora`), and W may be kept in 8 or 4 bits:
    then `kernel` holds codes and `scales` what they are multiplied by (see `models.quantize`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        layers: int | None = None,
        bias: bool = False,
        dtype: DTypeLike = jnp.float32,
    ):
        self.inputs, self.outputs, self.axes, self.layers = inputs, outputs, axes, layers
        self.kernel = parameter(rngs, (inputs, outputs), axes, layers=layers, scale=inputs**-0.5, dtype=dtype)
        self.scales: nnx.Param[Array] | None = nnx.data(None)
        self.bias = parameter(rngs, (outputs,), axes[1:], layers=layers, dtype=dtype) if bias else nnx.data(None)
        self.lora_a: nnx.LoRAParam[Array] | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam[Array] | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0
        self.lora_on = True

    def weight(self, dtype: DTypeLike) -> Float[Array, "... inputs outputs"]:
        """W."""
        if self.scales is None:
            return self.kernel[...].astype(dtype)
        return unpack(self.kernel[...], self.scales[...], dtype)

    def quantize(self, bits: Bits) -> None:
        """Keeps W in so many bits from now on, in place. It must be frozen then."""
        codes, scales = jax.jit(pack, static_argnums=1)(self.kernel[...], bits)
        axes = self.kernel.axes
        self.kernel = nnx.Param(codes, axes=axes)
        self.scales = nnx.Param(scales, axes=(*axes[:-2], None, axes[-1]))

    def __call__(self, x: Float[Array, "... inputs"], key: PRNGKeyArray | None = None) -> Float[Array, "... outputs"]:
        """Applies the layer in x's dtype.

        Args:
            x: input.
            key: randomness of LoRA dropout; None switches dropout off.
        """
        y = x @ self.weight(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        if self.lora_a is not None and self.lora_b is not None and self.lora_on:
            low = x
            if key is not None and self.lora_dropout:
                keep = jax.random.bernoulli(key, 1 - self.lora_dropout, x.shape)
                low = jnp.where(keep, x / (1 - self.lora_dropout), jnp.zeros_like(x))
            low = (low @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
            y = y + jnp.asarray(self.lora_scale, x.dtype) * low
        return y


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias, computed in float32."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None):
        self.eps = eps
        self.scale = parameter(rngs, (width,), (None,), layers=layers, mean=1.0)
        self.bias = parameter(rngs, (width,), (None,), layers=layers)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        rank1 = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (p[...].astype(jnp.float32).reshape(rank1) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, computed in float32 (`LlamaRMSNorm`)."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None):
        self.eps = eps
        self.scale = parameter(rngs, (width,), (None,), layers=layers, mean=1.0)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype)


def activate(name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The activation called `name`, exact (GELU by the error function)."""
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
    raise ValueError(f"unknown activation {name!r}")


def scan_layers(
    stack: nnx.Module,
    body: Callable[..., tuple[Any, Any]],
    carry: Any,
    *per_layer: Any,
    depth: int | None = None,
    remat: Remat = "full",
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, *per_layer) -> (carry, output)` over a stacked module as one scan.

    Args:
        stack: a module whose every parameter has a leading layer axis.
        depth: run only the first `depth` layers.
        remat: what of a layer's inside the backward pass computes again instead of finding it kept: all of it, all but the
            products with weights (`dots`), or nothing.
    """
    graph, state = nnx.split(stack)
    if depth is not None:
        state = jax.tree.map(lambda leaf: leaf[:depth], state)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_state, *rest = inputs
        return body(nnx.merge(graph, layer_state), carry, *rest)

    if remat != "none":
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        step = jax.checkpoint(step, policy=kept)
    return jax.lax.scan(step, carry, (state, *per_layer))
