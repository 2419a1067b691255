"""The strict streaming reader: every tensor is used or ignored by a named rule, every parameter is filled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.models.checkpoints import orbax
from reverie_jax.models.checkpoints.adapters import attach_adapter
from reverie_jax.models.checkpoints.components import ComponentLike, as_list, detect_component
from reverie_jax.models.checkpoints.resolve import ResolvedCheckpoint, resolve_checkpoint, stored_dtype, vocab_size
from reverie_jax.models.checkpoints.specs import (
    AnyArray,
    Layout,
    ParameterSpec,
    parameter_specs,
    to_file_layout,
    to_model_layout,
)
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel

DTYPES = ("float32", "bfloat16", "float16")
"""Of matrices and computation."""


def abstract_model(config: VLMConfig, dtype: DTypeLike) -> VisionLanguageModel:
    """Return a model of shapes, without memory for its parameters."""
    return nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype))


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return a dtype that a model can have.

    Raises:
        UserError: It is another one; a model cannot compute in integers or float8.
    """
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in DTYPES:
        name = dtype if known is None else known.name
        raise UserError(
            f"dtype {name}: must be {', '.join(DTYPES)}; a recipe's `quantization` keeps frozen matrices in int8 or nf4"
        )
    return known


def read_config(path: ComponentLike, *, components: Sequence[ComponentLike] = ()) -> VLMConfig:
    """Return the architecture of a checkpoint (see `read_model`); only headers and configuration are read."""
    main = detect_component(path)
    if main.format == "orbax":
        return orbax.read_config(main.path, main.config)
    return _with_vocab_size(resolve_checkpoint(main, components))


def read_model(
    path: ComponentLike,
    *,
    components: ComponentLike | Sequence[ComponentLike] = (),
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> VisionLanguageModel:
    """Read a model tensor by tensor: each goes to its devices and is freed on the host.

    Args:
        path: A llava-hf, original LLaVA, LLaVA-pp, LoRA or Orbax folder, a projector file, or one of several components.
        components: What `path` lacks: plain language model, vision tower.
        dtype: Of the base model's matrices; norms stay float32. As stored by default.
        mesh: Where the parameters are placed, by `models.sharding`; one device by default.

    Raises:
        CheckpointError: Anything is missing, unused, of a wrong shape or unreadable.
    """
    dtype = None if dtype is None else check_dtype(dtype)
    main = detect_component(path)
    others = [detect_component(other) for other in as_list(components)]
    if main.format == "orbax":
        if others:
            raise CheckpointError(f"{main.path}: is a complete checkpoint; it takes no components ({others[0].path})")
        return orbax.read_model(main.path, main.config, dtype=dtype, mesh=mesh)
    checkpoint = resolve_checkpoint(main, others)
    config = _with_vocab_size(checkpoint)
    _check_names(checkpoint, config)
    model = abstract_model(config, stored_dtype(checkpoint) if dtype is None else dtype)
    _check_shapes(checkpoint, config, model)
    model = _load_parameters(checkpoint, config, model, mesh)
    if main.format == "llava-lora":
        attach_adapter(model, main, base=others)
    return model


def _with_vocab_size(checkpoint: ResolvedCheckpoint) -> VLMConfig:
    text = dataclasses.replace(checkpoint.config.text, vocab=vocab_size(checkpoint))
    return dataclasses.replace(checkpoint.config, text=text)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_names(checkpoint: ResolvedCheckpoint, config: VLMConfig) -> None:
    wanted = {name for spec in parameter_specs(config) for name in spec.names}
    if missing := sorted(wanted - checkpoint.tensors.keys()):
        raise CheckpointError(f"{checkpoint.path}: {len(missing)} tensor(s) are missing: {_first_names(missing)}")
    if unknown := sorted(checkpoint.tensors[name][1] for name in checkpoint.tensors.keys() - wanted):
        raise CheckpointError(
            f"{checkpoint.path}: {len(unknown)} tensor(s) are not part of the model: {_first_names(unknown)}"
        )


def parameters(model: VisionLanguageModel) -> dict[str, nnx.Variable[Any]]:
    """Return every parameter by its dotted path, adapters included."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _check_shapes(checkpoint: ResolvedCheckpoint, config: VLMConfig, model: VisionLanguageModel) -> None:
    """Check all shapes before the first tensor is read."""
    variables = parameters(model)
    for spec in parameter_specs(config):
        shape = variables[spec.path].shape[len(spec.stack) :]
        wanted = to_file_layout(spec.layout, np.broadcast_to(np.False_, shape), config.vision.patch_size).shape
        for name in spec.names:
            tensors, stored_name = checkpoint.tensors[name]
            stored = tensors.stored[stored_name]
            if stored.shape != wanted or stored.dtype is None:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored_name} is {stored.dtype_name} {stored.shape}; by the configuration it"
                    f" must be floating-point {wanted} ({spec.path})"
                )


def _shardings(variable: nnx.Variable[Any], spec: ParameterSpec, mesh: Mesh | None) -> tuple[Any, Any]:
    """Return a parameter's sharding, and that of the file's tensor from which converting its layout moves least data."""
    if mesh is None:
        return None, None
    partition = partition_spec(variable.shape, variable.axes, mesh)
    layer = tuple(partition)[len(spec.stack) :]
    leading = (None,) * {"batched": 1, "token": 2}.get(spec.layout, 0)
    stored = {"linear": layer[::-1], "conv": ()}.get(spec.layout, (*leading, *layer))
    return NamedSharding(mesh, partition), NamedSharding(mesh, PartitionSpec(*stored))


def _constrain(x: Array, sharding: NamedSharding | None) -> Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


# Jitted at module level, so that parameters of one shape share one program.
@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(*, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    return _constrain(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnames=("layout", "sharding"), donate_argnums=0)
def _set_layer(stack: Array, tensor: Array, place: tuple[Array, ...], *, layout: Layout, sharding: Any) -> Array:
    """Write one layer, or one expert of a layer, into its stack, in place."""
    value = to_model_layout(layout, tensor).astype(stack.dtype)
    start = (*place, *(jnp.zeros((), jnp.int32),) * value.ndim)
    value = value.reshape(*(1,) * len(place), *value.shape)
    return _constrain(jax.lax.dynamic_update_slice(stack, value, start), sharding)


@functools.partial(jax.jit, static_argnames=("layout", "dtype", "sharding"))
def _convert(tensor: Array, *, layout: Layout, dtype: Any, sharding: Any) -> Array:
    return _constrain(to_model_layout(layout, tensor).astype(dtype), sharding)


def _check_range(checkpoint: ResolvedCheckpoint, name: str, array: AnyArray, dtype: Any) -> None:
    """Refuse values that float16 would make infinite."""
    if dtype == jnp.float16 and array.dtype != np.float16:
        largest = float(np.abs(array.astype(np.float32)).max(initial=0))
        if largest >= 65_520:  # rounds to infinity
            tensors, stored_name = checkpoint.tensors[name]
            raise CheckpointError(
                f"{tensors.stored[stored_name].file}: tensor {stored_name} has values up to {largest:.3g}, beyond float16's"
                " 65,504; choose bfloat16 or float32"
            )


def _load_parameters(
    checkpoint: ResolvedCheckpoint, config: VLMConfig, model: VisionLanguageModel, mesh: Mesh | None
) -> VisionLanguageModel:
    variables = parameters(model)
    targets: dict[str, tuple[ParameterSpec, tuple[int, ...]]] = {
        name: (spec, place) for spec in parameter_specs(config) for name, place in spec.places
    }
    values: dict[str, Array] = {}

    def load(name: str, array: AnyArray) -> None:
        spec, place = targets[name]
        variable = variables[spec.path]
        _check_range(checkpoint, name, array, variable.dtype)
        sharding, stored = _shardings(variable, spec, mesh)
        tensor = jax.device_put(array if array.dtype.itemsize < 8 else array.astype(np.float32), stored)
        if not spec.stack:
            value = _convert(tensor, layout=spec.layout, dtype=variable.dtype, sharding=sharding)
        else:
            if spec.path not in values:
                values[spec.path] = _zeros(shape=tuple(variable.shape), dtype=variable.dtype, sharding=sharding)
            index = tuple(map(jnp.int32, place))
            value = _set_layer(values[spec.path], tensor, index, layout=spec.layout, sharding=sharding)
        if sharding is not None:
            value = jax.device_put(value, sharding)  # equivalent; this gives it the name by which others compare it
        values[spec.path] = value.block_until_ready()  # otherwise the host runs ahead and holds many tensors at once

    stored_names: dict[int, tuple[Any, dict[str, str]]] = {}
    for name, (tensors, stored_name) in checkpoint.tensors.items():
        stored_names.setdefault(id(tensors), (tensors, {}))[1][stored_name] = name
    for tensors, names in stored_names.values():
        tensors.read_all(lambda stored_name, array, names=names: load(names[stored_name], array), set(names))
    graph, state = nnx.split(model)
    flat = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
