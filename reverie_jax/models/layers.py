"""The layers that tower, projector and decoder are built from.

A layer may be stacked: with `layers=N` every parameter has a leading axis of N, and `scan_layers` runs the stack as one
compiled body. Each parameter has logical axes (`axes`), from which `models.sharding` derives its sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from reverie_jax.models.config import Activation, Norm
from reverie_jax.models.config import Remat as Remat
from reverie_jax.models.quantize import QuantizedFormat, pack, unpack

Axes = tuple[str | None, ...]

_LAYER_INPUT = "layer_input"


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: Axes,
    *,
    layers: int | None = None,
    experts: int | None = None,
    scale: float = 0.0,
    mean: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> nnx.Param[Array]:
    """Return a parameter drawn from normal(mean, scale), stacked `layers` times `experts`, with its logical axes."""
    if experts is not None:
        shape, axes = (experts, *shape), ("expert", *axes)
    if layers is not None:
        shape, axes = (layers, *shape), ("layers", *axes)
    value = jnp.full(shape, mean, dtype)
    if scale:
        value = value + (scale * jax.random.normal(rngs.params(), shape)).astype(dtype)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """y = x W + b, W of shape (in, out), optionally with a LoRA adapter (see `models.lora`).

    With `experts=E` the layer is E matrices: it takes [E, T, in] and returns [E, T, out]; [1, T, in] gives all the same x.
    W may be quantized: then `kernel` holds codes, and `scales` their factors (see `models.quantize`). A DoRA adapter also
    has, by output, the norm of W + scale A B and the magnitude that this norm is brought to.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        layers: int | None = None,
        experts: int | None = None,
        bias: bool = False,
        dtype: DTypeLike = jnp.float32,
    ):
        self.inputs, self.outputs, self.axes, self.layers, self.experts = inputs, outputs, axes, layers, experts
        stack: Any = {"layers": layers, "experts": experts, "dtype": dtype}
        self.kernel = parameter(rngs, (inputs, outputs), axes, scale=inputs**-0.5, **stack)
        self.scales: nnx.Param[Array] | None = nnx.data(None)
        self.bias = parameter(rngs, (outputs,), axes[1:], **stack) if bias else nnx.data(None)
        self.lora_a: nnx.LoRAParam[Array] | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam[Array] | None = nnx.data(None)
        self.lora_magnitude: nnx.LoRAParam[Array] | None = nnx.data(None)
        self.lora_norm: nnx.LoRAParam[Array] | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0
        self.lora_enabled = True

    def weight(self, dtype: DTypeLike) -> Float[Array, "... inputs outputs"]:
        """Return W in `dtype`, dequantized where it is quantized."""
        if self.scales is None:
            return self.kernel[...].astype(dtype)
        return unpack(self.kernel[...], self.scales[...], dtype)

    def quantize(self, format: QuantizedFormat) -> None:
        """Quantize W, in place; it must be frozen afterwards."""
        codes, scales = jax.jit(pack, static_argnums=1)(self.kernel[...], format)
        axes = self.kernel.axes
        self.kernel = nnx.Param(codes, axes=axes)
        self.scales = nnx.Param(scales, axes=(*axes[:-2], None, axes[-1]))

    def __call__(self, x: Float[Array, "... inputs"], key: PRNGKeyArray | None = None) -> Float[Array, "... outputs"]:
        """Apply the layer in x's dtype.

        Args:
            x: Input.
            key: Randomness of LoRA dropout; None disables dropout.
        """
        y = x @ self.weight(x.dtype)
        if self.lora_a is not None and self.lora_b is not None and self.lora_enabled:
            low = x
            if key is not None and self.lora_dropout:
                keep = jax.random.bernoulli(key, 1 - self.lora_dropout, x.shape)
                low = jnp.where(keep, x / (1 - self.lora_dropout), jnp.zeros_like(x))
            low = _times_wide(low @ self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype))
            y = y + jnp.asarray(self.lora_scale, x.dtype) * low
            if self.lora_magnitude is not None and self.lora_norm is not None:
                # In float32: the factor is close to 1, where half precision is coarse.
                gain = self.lora_magnitude[...] / self.lora_norm[...]
                y = (y.astype(jnp.float32) * self._by_row(gain, y.ndim)).astype(x.dtype)
        if self.bias is not None:
            y = y + self._by_row(self.bias[...].astype(x.dtype), y.ndim)
        return y

    def _by_row(self, vectors: Array, ndim: int) -> Array:
        """Return vectors, [out] or of experts [E, out], with axes for the rows of an output of `ndim` axes."""
        return vectors.reshape(*vectors.shape[:-1], *(1,) * (ndim - vectors.ndim), self.outputs)


@jax.custom_vjp
def _times_wide(low: Float[Array, "... rank"], factor: Float[Array, "... rank outputs"]) -> Float[Array, "... outputs"]:
    """Return low @ factor, whose gradient for `factor` transposes the narrow operand; by JAX's rule it is the wide one."""
    return low @ factor


def _times_wide_forward(low: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
    return low @ factor, (low, factor)


def _times_wide_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    low, factor = saved
    low_grad = grad @ factor.swapaxes(-1, -2)
    if factor.ndim > 2:  # of experts
        return low_grad, jnp.einsum("etr,eto->ero", low, grad)
    rows = tuple(range(grad.ndim - 1))
    return low_grad, jnp.tensordot(low, grad, axes=(rows, rows))


_times_wide.defvjp(_times_wide_forward, _times_wide_backward)


class LayerNorm(nnx.Module):
    """Layer normalization with scale and bias, computed in float32."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None):
        self.eps = eps
        self.scale = parameter(rngs, (width,), (None,), layers=layers, mean=1.0)
        self.bias = parameter(rngs, (width,), (None,), layers=layers)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Normalize the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        rank1 = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (p[...].astype(jnp.float32).reshape(rank1) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization, computed in float32 (`LlamaRMSNorm`)."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None):
        self.eps = eps
        self.scale = parameter(rngs, (width,), (None,), layers=layers, mean=1.0)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Normalize the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype)


def make_norm(kind: Norm, width: int, eps: float, *, rngs: nnx.Rngs, layers: int | None = None) -> LayerNorm | RMSNorm:
    """Return a normalization of the kind that a decoder's configuration names."""
    return (LayerNorm if kind == "layernorm" else RMSNorm)(width, eps, rngs=rngs, layers=layers)


def activate(name: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply the activation called `name`; `gelu` is exact (by the error function), `gelu_tanh` its approximation."""
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        case "relu":
            return jax.nn.relu(x)
    raise ValueError(f"unknown activation {name!r}")


def scan_layers(
    stack: nnx.Module,
    body: Callable[..., tuple[Any, Any]],
    carry: Any,
    *per_layer: Any,
    layers: range | None = None,
    remat: Remat = "full",
) -> tuple[Any, Any]:
    """Run `body(layer, carry, *per_layer) -> (carry, output)` over a stacked module as one scan.

    Args:
        stack: A module whose parameters all have a leading layer axis.
        body: Computes one layer.
        carry: The first layer's input.
        *per_layer: Pytrees with a leading layer axis, of which each layer gets its part.
        layers: Run only these; all by default.
        remat: Which of a layer's activations the backward pass recomputes: all ("full"; "offload" keeps the layers' inputs
            in host memory), all but products with weights ("dots"), or none.
    """
    graph, state = nnx.split(stack)
    inputs: Any = state
    if layers is not None:
        inputs = jnp.arange(layers.start, layers.stop)  # a slice of the stack would be a copy of the weights

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer, *rest = inputs
        if layers is not None:
            layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), state)
        return body(nnx.merge(graph, layer), carry, *rest)

    return jax.lax.scan(recomputed(step, remat), carry, (inputs, *per_layer))


def recomputed(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Return a function whose backward pass recomputes what `remat` says (see `scan_layers`)."""
    match remat:
        case "none":
            return step
        case "full":
            return jax.checkpoint(step)
        case "dots":
            return jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

    def named(x: Any, *inputs: Any) -> Any:
        return step(checkpoint_name(x, _LAYER_INPUT), *inputs)

    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(named, policy=policy)
