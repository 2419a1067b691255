"""LoRA adapters on a model's linear layers (Hu et al., arXiv 2106.09685), initialized as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    stack = tuple(axis for axis, size in (("layers", layer.layers), ("expert", layer.experts)) if size is not None)
    long = "lora_long" if layer.experts is None else "embed"  # experts are sharded over the tensor axis themselves
    mesh = getattr(getattr(layer.kernel.get_value(), "sharding", None), "mesh", None)

    def factor(value: ArrayLike, axes: tuple[str | None, ...]) -> nnx.LoRAParam[Array]:
        if isinstance(mesh, Mesh):
            value = jax.device_put(value, NamedSharding(mesh, partition_spec(np.shape(value), axes, mesh)))
        return nnx.LoRAParam(jnp.asarray(value, jnp.float32), axes=axes)

    layer.lora_a = factor(a, (*stack, long, None))
    layer.lora_b = factor(b, (*stack, None, long))
    layer.lora_scale, layer.lora_dropout = scale, dropout


def assign(variable: nnx.Variable[Any], value: ArrayLike) -> None:
    """Set a variable's value, in place, in its dtype and on its devices."""
    old, new = variable.get_value(), jnp.asarray(value).astype(variable.dtype)
    # Without a mesh the array stays uncommitted, as fresh parameters are: a committed one recompiles every program.
    variable.set_value(jax.device_put(new, old.sharding) if isinstance(old.sharding, NamedSharding) else new)


def quantize(model: VisionLanguageModel, format: QuantizedFormat, targets: str = DEFAULT_TARGETS) -> None:
    """Quantize the frozen matrices of layers whose path matches `targets`, in place."""
    for path, layer in linears(model):
        if re.fullmatch(targets, path) and layer.scales is None:
            layer.quantize(format)


def set_adapters_enabled(model: VisionLanguageModel, enabled: bool) -> None:
    """Enable or disable the adapters, in place. Without them the model's output is its base model's, exactly."""
    for _, layer in linears(model):
        layer.lora_enabled = enabled


@jax.jit
def _merge_kernel(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """Return W + scale A B; layer by layer, so that only one layer's matrix is in float32 at a time."""

    def merge_layer(layer: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = layer
        return (kernel.astype(jnp.float32) + scale * (a @ b)).astype(kernel.dtype)

    return jax.lax.map(merge_layer, (kernel, a, b)) if kernel.ndim > 2 else merge_layer((kernel, a, b))


def merge(model: VisionLanguageModel) -> None:
    """Merge every adapter into its layer's matrix, in place: in float32, cast once.

    Raises:
        ValueError: A matrix is quantized.
    """
    for path, layer, *factors in list(adapters(model)):
        a, b = (factor[...].astype(jnp.float32) for factor in factors)
        if layer.scales is not None:
            raise ValueError(f"{path} is quantized: load the base model without quantization to merge its adapter")
        layer.kernel.set_value(_merge_kernel(layer.kernel[...], a, b, jnp.float32(layer.lora_scale)))
        layer.lora_a, layer.lora_b = nnx.data(None), nnx.data(None)
        layer.lora_scale, layer.lora_dropout = 0.0, 0.0
