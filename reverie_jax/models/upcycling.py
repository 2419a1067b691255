"""Turn a dense model into one with experts that computes the same (sparse upcycling; stage 3 of MoE-LLaVA)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from reverie_jax.models import lora
from reverie_jax.models.config import ExpertLayers, ExpertsConfig, Routing
from reverie_jax.models.decoder import Decoder
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel


def layers_of(chosen: ExpertLayers, layers: int) -> tuple[int, ...]:
    """Return the layers that get experts: every second one from the first (`sparse`), a half, or all of them."""
    half = layers // 2
    ranges = {
        "sparse": range(0, layers, 2),
        "first_half": range(half),
        "second_half": range(half, layers),
        "all": range(layers),
    }
    return tuple(ranges[chosen])


def upcycle(
    model: VisionLanguageModel, chosen: ExpertLayers, count: int, *, routing: Routing | None = None, seed: int = 0
) -> None:
    """Replace the MLP of some layers by experts, in place: each a copy of it. Without drops the output is unchanged.

    Routers are drawn from uniform(+-1/sqrt(hidden)), as torch initializes linear layers.

    Args:
        model: A dense model without adapters.
        chosen: Which layers; see `layers_of`.
        count: Experts in each of them.
        routing: For the model's configuration.
        seed: Of the routers.

    Raises:
        ValueError: The model has experts, adapters or quantized matrices.
    """
    text, old = model.config.text, model.decoder
    if text.experts is not None:
        raise ValueError("the model has experts already")
    if any(layer.lora_a is not None or layer.scales is not None for _, layer in lora.linears(model)):
        raise ValueError(
            "the model has adapters or quantized matrices: merge the adapters first, and quantize afterwards"
        )
    assert old.layers is not None
    experts = ExpertsConfig(layers_of(chosen, text.layers), count, routing or Routing())
    text = dataclasses.replace(text, experts=experts)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(text, rngs=nnx.Rngs(0), dtype=model.compute_dtype)))
    values = dict(nnx.to_flat_state(nnx.state(old)))
    indices = {"layers": text.dense_layers, "expert_layers": text.expert_layers}

    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        source = values.get(("layers", *path[1:]) if path[0] in indices else path)
        value: Array
        if source is None:  # the router
            bound = text.hidden**-0.5
            value = jax.random.uniform(jax.random.key(seed), variable.shape, variable.dtype, -bound, bound)
            return _placed(variable, value, None)
        value = source.get_value()
        if path[0] in indices:
            value = value[jnp.asarray(indices[path[0]])]
            if len(variable.shape) > value.ndim:
                value = jnp.broadcast_to(value[:, None], variable.shape)
        return _placed(variable, value, source.get_value())

    model.decoder = nnx.merge(graph, nnx.from_flat_state([(p, fill(p, leaf)) for p, leaf in nnx.to_flat_state(state)]))
    model.config = dataclasses.replace(model.config, text=text)


def _placed(variable: Any, value: Array, source: Array | None) -> Any:
    """Return a variable with a value that is sharded by the rules if its source was."""
    sharding = getattr(source, "sharding", None)
    if isinstance(sharding, NamedSharding) and not isinstance(value, jax.core.Tracer):
        mesh = sharding.mesh
        value = jax.device_put(value, NamedSharding(mesh, partition_spec(value.shape, variable.axes, mesh)))
    return variable.replace(value)
