"""The strict streaming reader: every tensor used or ignored by a named rule, every parameter filled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import orbax
from reverie_jax.models.checkpoints.adapters import attach_lora
from reverie_jax.models.checkpoints.names import Entry, entries, to_ours, to_theirs
from reverie_jax.models.checkpoints.parts import Assembly, assemble, recognise, rows, stored_dtype
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel


def abstract_model(config: VLMConfig, dtype: DTypeLike) -> VisionLanguageModel:
    """The model's shapes, without memory."""
    return nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype))


def read_config(path: str | Path, *, components: Sequence[str | Path] = ()) -> VLMConfig:
    """The architecture of a checkpoint; only headers and configuration are read. See `read_model`."""
    main = recognise(path)
    if main.kind == "orbax":
        return orbax.read_config(main.place, main.raw)
    assembly = assemble(path, components)
    return dataclasses.replace(assembly.config, text=dataclasses.replace(assembly.config.text, vocab=rows(assembly)))


def read_model(
    path: str | Path,
    *,
    components: str | Path | Sequence[str | Path] = (),
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> VisionLanguageModel:
    """A model from files, tensor by tensor: each goes to its place on its devices and is forgotten on the host.

    Args:
        path: llava-hf, original LLaVA, LLaVA-pp, LoRA or Orbax folder, projector file, or one of several parts.
        components: the parts that `path` lacks: plain language model, CLIP.
        dtype: of the base's matrices; norms stay float32. As stored by default.
        mesh: where parameters go, by `models.sharding`; one device by default.

    Raises:
        CheckpointError: anything is missing, left over, misshapen or unreadable.
    """
    components = [components] if isinstance(components, str | Path) else list(components)
    main = recognise(path)
    if main.kind == "orbax":
        if components:
            raise CheckpointError(f"{main.place}: is a complete checkpoint; it takes no components ({components[0]})")
        return orbax.read_model(main.place, main.raw, dtype=dtype, mesh=mesh)
    assembly = assemble(path, components)
    config = dataclasses.replace(assembly.config, text=dataclasses.replace(assembly.config.text, vocab=rows(assembly)))
    _check_names(assembly, config)
    model = abstract_model(config, stored_dtype(assembly) if dtype is None else dtype)
    _check_shapes(assembly, config, model)
    model = _fill(assembly, config, model, mesh)
    if main.kind == "llava-lora":
        attach_lora(model, main, components)
    return model


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_names(assembly: Assembly, config: VLMConfig) -> None:
    wanted = {name for entry in entries(config) for name in entry.names}
    if missing := sorted(wanted - assembly.tensors.keys()):
        raise CheckpointError(f"{assembly.place}: {len(missing)} tensor(s) are missing: {_listed(missing)}")
    if extra := sorted(assembly.tensors[name][1] for name in assembly.tensors.keys() - wanted):
        raise CheckpointError(f"{assembly.place}: {len(extra)} tensor(s) have no place in the model: {_listed(extra)}")


def parameters(model: VisionLanguageModel) -> dict[str, nnx.Variable[Any]]:
    """Every parameter by its dotted path; adapters too."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _check_shapes(assembly: Assembly, config: VLMConfig, model: VisionLanguageModel) -> None:
    """All shapes are known to be right before the first tensor is read."""
    ours = parameters(model)
    for entry in entries(config):
        shape = ours[entry.path].shape[0 if entry.layers is None else 1 :]
        wanted = to_theirs(entry.turn, np.broadcast_to(np.False_, shape), config.vision.patch_size).shape
        for name in entry.names:
            tensors, stored = assembly.tensors[name]
            found = tensors.stored[stored]
            if found.shape != wanted or found.dtype is None:
                kind = "no floating-point numbers" if found.dtype is None else found.dtype
                raise CheckpointError(
                    f"{found.file}: tensor {stored} is {kind} {found.shape}; the configuration says float {wanted}"
                    f" ({entry.path})"
                )


def _homes(variable: nnx.Variable[Any], entry: Entry, mesh: Mesh | None) -> tuple[Any, Any]:
    """Where a parameter lives, and where a tensor of the file lands so that turning it moves little."""
    if mesh is None:
        return None, None
    spec = partition_spec(variable.shape, variable.axes, mesh)
    one = tuple(spec)[0 if entry.layers is None else 1 :]
    landing = {"same": one, "linear": one[::-1], "conv": ()}[entry.turn]
    return NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec(*landing))


def _at(x: Array, home: NamedSharding | None) -> Array:
    return x if home is None else jax.lax.with_sharding_constraint(x, home)


# Jitted here and not where they are used, so that parameters of one shape share one program.
@functools.partial(jax.jit, static_argnames=("shape", "dtype", "home"))
def _empty(*, shape: tuple[int, ...], dtype: Any, home: Any) -> Array:
    return _at(jnp.zeros(shape, dtype), home)


@functools.partial(jax.jit, static_argnames=("turn", "home"), donate_argnums=0)
def _put(stack: Array, tensor: Array, layer: Array, *, turn: str, home: Any) -> Array:
    """One layer into its stack, in place."""
    new = to_ours(turn, tensor).astype(stack.dtype)
    return _at(jax.lax.dynamic_update_index_in_dim(stack, new, layer, 0), home)


@functools.partial(jax.jit, static_argnames=("turn", "dtype", "home"))
def _turned(tensor: Array, *, turn: str, dtype: Any, home: Any) -> Array:
    return _at(to_ours(turn, tensor).astype(dtype), home)


def _fill(assembly: Assembly, config: VLMConfig, model: VisionLanguageModel, mesh: Mesh | None) -> VisionLanguageModel:
    ours = parameters(model)
    place: dict[str, tuple[Entry, int]] = {
        name: (entry, layer) for entry in entries(config) for layer, name in enumerate(entry.names)
    }
    values: dict[str, Array] = {}

    def use(canonical_name: str, array: np.ndarray) -> None:
        entry, layer = place[canonical_name]
        variable = ours[entry.path]
        home, landing = _homes(variable, entry, mesh)
        tensor = jax.device_put(array if array.dtype.itemsize < 8 else array.astype(np.float32), landing)
        if entry.layers is None:
            value = _turned(tensor, turn=entry.turn, dtype=variable.dtype, home=home)
        else:
            if entry.path not in values:
                values[entry.path] = _empty(shape=tuple(variable.shape), dtype=variable.dtype, home=home)
            value = _put(values[entry.path], tensor, jnp.int32(layer), turn=entry.turn, home=home)
        if home is not None:
            value = jax.device_put(value, home)  # the same layout by the name that the rules give it
        values[entry.path] = value.block_until_ready()  # else the host runs ahead and holds many tensors at once

    sources: dict[int, tuple[Any, dict[str, str]]] = {}
    for known, (tensors, stored) in assembly.tensors.items():
        sources.setdefault(id(tensors), (tensors, {}))[1][stored] = known
    for tensors, names in sources.values():
        tensors.read_all(lambda stored, array, names=names: use(names[stored], array), set(names))
    graph, state = nnx.split(model)
    flat = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
