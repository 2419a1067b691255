"""LoRA adapters on a model's linear layers (Hu et al., arXiv 2106.09685), initialized as in PEFT.

DoRA adapters (Liu et al., arXiv 2402.09353) are LoRA's with a magnitude for each output; they are read, merged and written,
but not trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array

from reverie_jax.models.config import DEFAULT_TARGETS
from reverie_jax.models.layers import Linear
from reverie_jax.models.quantize import QuantizedFormat
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Yield (dotted path, layer) for every linear layer of the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def adapters(model: nnx.Module) -> Iterator[tuple[str, Linear, nnx.LoRAParam[Array], nnx.LoRAParam[Array]]]:
    """Yield (dotted path, layer, A, B) for every linear layer with an adapter."""
    for path, layer in linears(model):
        if layer.lora_a is not None and layer.lora_b is not None:
            yield path, layer, layer.lora_a, layer.lora_b


def attach(
    model: VisionLanguageModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str = DEFAULT_TARGETS,
    seed: int = 0,
) -> list[str]:
    """Add float32 adapters, in place: A uniform(+-1/sqrt(in)), B zero, scale alpha / rank. The output is unchanged.

    Args:
        model: The base model.
        rank: r.
        alpha: Numerator of the scale.
        dropout: Probability that an adapter's input is dropped, in training.
        targets: Regular expression that a linear layer's whole dotted path must match.
        seed: Of A.

    Returns:
        The paths of the layers that got an adapter.

    Raises:
        ValueError: No layer matches, or one already has an adapter.
    """
    matches = [(path, layer) for path, layer in linears(model) if re.fullmatch(targets, path)]
    if not matches:
        raise ValueError(f"no linear layer matches {targets!r}")
    if adapted := [path for path, layer in matches if layer.lora_a is not None]:
        raise ValueError(f"already has an adapter: {', '.join(adapted)}")
    for path, layer in matches:
        # The key depends on the path, not on the order of the walk.
        key = jax.random.fold_in(jax.random.key(seed), int.from_bytes(path.encode()) % (2**31 - 1))
        stack = tuple(size for size in (layer.layers, layer.experts) if size is not None)
        bound = layer.inputs**-0.5
        a = jax.random.uniform(key, (*stack, layer.inputs, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, rank, layer.outputs), jnp.float32)
        set_factors(layer, a, b, scale=alpha / rank, dropout=dropout)
    return [path for path, _ in matches]


def set_factors(layer: Linear, a: ArrayLike, b: ArrayLike, *, scale: float, dropout: float) -> None:
    """Set the two factors of a layer's adapter, in place, on the layer's mesh.

    Args:
        layer: The layer.
        a: A, (in, r), stacked as the layer is.
        b: B, (r, out), likewise.
        scale: Factor of A B.
        dropout: See `attach`.
    """
    long = "lora_long" if layer.experts is None else "embed"  # experts are sharded over the tensor axis themselves
    layer.lora_a = _factor(layer, a, (long, None))
    layer.lora_b = _factor(layer, b, (None, long))
    layer.lora_scale, layer.lora_dropout = scale, dropout


def set_magnitudes(layer: Linear, magnitudes: Mapping[int, ArrayLike]) -> None:
    """Turn a layer's adapter into DoRA's, in place: the output is scaled so that columns of W + scale A B have given norms.

    Args:
        layer: The layer, whose factors are set.
        magnitudes: Norms, (out,), by the number of the matrix in its stack. Matrices that are not named are not scaled.

    Raises:
        ValueError: The layer has no adapter, or is quantized: quantizing changes the norms.
    """
    if layer.lora_a is None or layer.lora_b is None or layer.scales is not None:
        raise ValueError("DoRA needs an adapter on a matrix that is not quantized")
    kernel, a, b = (array[...] for array in (layer.kernel, layer.lora_a, layer.lora_b))
    norm = _column_norms(kernel, a, b, jnp.float32(layer.lora_scale))
    values, known = np.zeros(norm.shape, np.float32), np.zeros((*norm.shape[:-1], 1), bool)
    for number, magnitude in magnitudes.items():
        values.reshape(-1, layer.outputs)[number], known.reshape(-1)[number] = magnitude, True
    layer.lora_norm = _factor(layer, norm, layer.axes[1:])
    layer.lora_magnitude = _factor(layer, jnp.where(known, values, norm), layer.axes[1:])


def _factor(layer: Linear, value: ArrayLike, axes: tuple[str | None, ...]) -> nnx.LoRAParam[Array]:
    """Return an array of an adapter in float32 on its layer's mesh, by its logical axes but the stack's."""
    stack = tuple(axis for axis, size in (("layers", layer.layers), ("expert", layer.experts)) if size is not None)
    axes = (*stack, *axes)
    mesh = getattr(getattr(layer.kernel.get_value(), "sharding", None), "mesh", None)
    if isinstance(mesh, Mesh):
        value = jax.device_put(value, NamedSharding(mesh, partition_spec(np.shape(value), axes, mesh)))
    return nnx.LoRAParam(jnp.asarray(value, jnp.float32), axes=axes)


def assign(variable: nnx.Variable[Any], value: ArrayLike) -> None:
    """Set a variable's value, in place, in its dtype and on its devices."""
    old, new = variable.get_value(), jnp.asarray(value).astype(variable.dtype)
    # Without a mesh the array stays uncommitted, as fresh parameters are: a committed one recompiles every program.
    variable.set_value(jax.device_put(new, old.sharding) if isinstance(old.sharding, NamedSharding) else new)


def quantize(model: VisionLanguageModel, format: QuantizedFormat, targets: str = DEFAULT_TARGETS) -> None:
    """Quantize the frozen matrices of layers whose path matches `targets`, in place.

    Raises:
        ValueError: One has a DoRA adapter, whose norms are those of the matrix as it is.
    """
    for path, layer in linears(model):
        if re.fullmatch(targets, path) and layer.scales is None:
            if layer.lora_magnitude is not None:
                raise ValueError(f"{path} has a DoRA adapter: merge it before quantizing")
            layer.quantize(format)


def set_adapters_enabled(model: VisionLanguageModel, enabled: bool) -> None:
    """Enable or disable the adapters, in place. Without them the model's output is its base model's, exactly."""
    for _, layer in linears(model):
        layer.lora_enabled = enabled


def _adapted(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """Return W + scale A B of one layer in float32."""
    return kernel.astype(jnp.float32) + scale * (a @ b)


def _by_layer(function: Callable[..., Array], *arrays: Array) -> Array:
    """Apply a function of a matrix and others, layer by layer: only one layer's matrix is in float32 at a time."""
    return jax.lax.map(lambda layer: function(*layer), arrays) if arrays[0].ndim > 2 else function(*arrays)


@jax.jit
def _column_norms(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """Return the norms of the columns of W + scale A B; never 0, so that they can be divided by."""
    norms = _by_layer(lambda w, a, b: jnp.linalg.norm(_adapted(w, a, b, scale), axis=-2), kernel, a, b)
    return jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


@jax.jit
def _merge_kernel(kernel: Array, a: Array, b: Array, scale: Array, gain: Array) -> Array:
    """Return (W + scale A B) gain, cast once."""

    def merge_layer(kernel: Array, a: Array, b: Array, gain: Array) -> Array:
        return (_adapted(kernel, a, b, scale) * gain[..., None, :]).astype(kernel.dtype)

    return _by_layer(merge_layer, kernel, a, b, gain)


def merge(model: VisionLanguageModel) -> None:
    """Merge every adapter into its layer's matrix, in place: in float32, cast once.

    Raises:
        ValueError: A matrix is quantized.
    """
    for path, layer, *factors in list(adapters(model)):
        a, b = (factor[...].astype(jnp.float32) for factor in factors)
        if layer.scales is not None:
            raise ValueError(f"{path} is quantized: load the base model without quantization to merge its adapter")
        if layer.lora_magnitude is None or layer.lora_norm is None:
            gain = jnp.ones((*a.shape[:-2], layer.outputs), jnp.float32)
        else:
            gain = layer.lora_magnitude[...] / layer.lora_norm[...]
        layer.kernel.set_value(_merge_kernel(layer.kernel[...], a, b, jnp.float32(layer.lora_scale), gain))
        layer.lora_a, layer.lora_b = nnx.data(None), nnx.data(None)
        layer.lora_magnitude, layer.lora_norm = nnx.data(None), nnx.data(None)
        layer.lora_scale, layer.lora_dropout = 0.0, 0.0
