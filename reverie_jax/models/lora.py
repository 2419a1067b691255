"""LoRA as surgery on a model's linear layers (Hu et al., arXiv 2106.09685; initialised as PEFT does)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from reverie_jax.models.layers import Linear
from reverie_jax.models.vlm import VisionLanguageModel

DEFAULT_TARGETS = r"decoder\.layers\.(query|key|value|out|gate|up|down)"
"""Every linear of the decoder's layers: LLaVA's choice (neither tower, projector nor LM head)."""


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(dotted path, layer) for every linear of the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


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
        names: tuple[str, ...] = () if layer.layers is None else ("layers",)
        bound = layer.inputs**-0.5
        a = jax.random.uniform(key, (*stack, layer.inputs, rank), jnp.float32, -bound, bound)
        layer.lora_a = nnx.LoRAParam(a, axes=(*names, "lora_long", None))
        layer.lora_b = nnx.LoRAParam(
            jnp.zeros((*stack, rank, layer.outputs), jnp.float32), axes=(*names, None, "lora_long")
        )
        layer.lora_scale, layer.lora_dropout = alpha / rank, dropout
    return [path for path, _ in chosen]


def merge(model: VisionLanguageModel) -> None:
    """Folds every adapter into its layer, in place: in float32, cast once."""
    for _, layer in linears(model):
        if layer.lora_a is None or layer.lora_b is None:
            continue
        kernel = layer.kernel[...]
        delta = layer.lora_scale * (layer.lora_a[...] @ layer.lora_b[...])
        layer.kernel.set_value((kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
        layer.lora_a, layer.lora_b = nnx.data(None), nnx.data(None)
        layer.lora_scale, layer.lora_dropout = 0.0, 0.0
