"""LoRA as surgery on a model's linear layers (Hu et al., arXiv 2106.09685; initialised as PEFT does)."""

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

from reverie_jax.models.layers import Linear
from reverie_jax.models.quantize import Bits
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel

DEFAULT_TARGETS = r"decoder\.layers\.(query|key|value|qkv|out|gate|up|gate_up|down)"
"""Every linear of the decoder's layers: LLaVA's choice (neither tower, projector nor LM head)."""


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(dotted path, layer) for every linear of the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def adapters(model: nnx.Module) -> Iterator[tuple[str, Linear, nnx.LoRAParam[Array], nnx.LoRAParam[Array]]]:
    """(dotted path, layer, A, B) for every linear that carries an adapter."""
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
    """Adds float32 adapters, in place: A uniform(+-1/sqrt(in)), B zero, scale alpha / rank. The model's output is unchanged.

    Args:
        targets: regular expression that a linear's whole dotted path must match.

    Returns:
        The paths that now carry an adapter.

    Raises:
        ValueError: nothing matches, or a target carries an adapter already.
    """
    chosen = [(path, layer) for path, layer in linears(model) if re.fullmatch(targets, path)]
    if not chosen:
        raise ValueError(f"no linear layer matches {targets!r}")
    if carriers := [path for path, layer in chosen if layer.lora_a is not None]:
        raise ValueError(f"{', '.join(carriers)} carries an adapter already")
    for path, layer in chosen:
        # The key depends on the path, not on the order of the walk.
        key = jax.random.fold_in(jax.random.key(seed), int.from_bytes(path.encode()) % (2**31 - 1))
        stack = () if layer.layers is None else (layer.layers,)
        bound = layer.inputs**-0.5
        a = jax.random.uniform(key, (*stack, layer.inputs, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, rank, layer.outputs), jnp.float32)
        install(layer, a, b, scale=alpha / rank, dropout=dropout)
    return [path for path, _ in chosen]


def install(layer: Linear, a: ArrayLike, b: ArrayLike, *, scale: float, dropout: float) -> None:
    """Puts the two factors of an adapter on a layer, in place, on the mesh that the layer is on.

    Args:
        a: (in, r), stacked as the layer is.
        b: (r, out), likewise.
    """
    names: tuple[str, ...] = () if layer.layers is None else ("layers",)
    mesh = getattr(getattr(layer.kernel.get_value(), "sharding", None), "mesh", None)

    def factor(value: ArrayLike, axes: tuple[str | None, ...]) -> nnx.LoRAParam[Array]:
        if isinstance(mesh, Mesh):
            value = jax.device_put(value, NamedSharding(mesh, partition_spec(np.shape(value), axes, mesh)))
        return nnx.LoRAParam(jnp.asarray(value, jnp.float32), axes=axes)

    layer.lora_a = factor(a, (*names, "lora_long", None))
    layer.lora_b = factor(b, (*names, None, "lora_long"))
    layer.lora_scale, layer.lora_dropout = scale, dropout


def set_like(variable: nnx.Variable[Any], value: ArrayLike) -> None:
    """A new value in the variable's type and on its devices, in place."""
    old, new = variable.get_value(), jnp.asarray(value).astype(variable.dtype)
    # Off a mesh an array is left to the default device, as fresh parameters are: a committed one compiles all anew.
    variable.set_value(jax.device_put(new, old.sharding) if isinstance(old.sharding, NamedSharding) else new)


def quantize(model: VisionLanguageModel, bits: Bits, targets: str = DEFAULT_TARGETS) -> None:
    """Keeps the decoder's matrices in few bits, in place: what carries adapters is frozen, and need not be exact."""
    for path, layer in linears(model):
        if re.fullmatch(targets, path) and layer.scales is None:
            layer.quantize(bits)


def switch(model: VisionLanguageModel, *, on: bool) -> None:
    """Lets the adapters work or rest, in place. At rest the model is its base, exactly."""
    for _, layer in linears(model):
        layer.lora_on = on


@jax.jit
def _merged(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    """Layer by layer, so that only one layer's matrix is ever held in float32."""

    def one(parts: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = parts
        return (kernel.astype(jnp.float32) + scale * (a @ b)).astype(kernel.dtype)

    return jax.lax.map(one, (kernel, a, b)) if kernel.ndim == 3 else one((kernel, a, b))


def merge(model: VisionLanguageModel) -> None:
    """Folds every adapter into its layer, in place: in float32, cast once."""
    for path, layer, *factors in list(adapters(model)):
        a, b = (factor[...].astype(jnp.float32) for factor in factors)
        if layer.scales is not None:
            raise ValueError(f"{path} is kept in few bits: merge the adapter into the whole base")
        layer.kernel.set_value(_merged(layer.kernel[...], a, b, jnp.float32(layer.lora_scale)))
        layer.lora_a, layer.lora_b = nnx.data(None), nnx.data(None)
        layer.lora_scale, layer.lora_dropout = 0.0, 0.0
