"""Sharding rules: one table from logical axes to mesh axes, and pure functions of abstract arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # As rows of a matrix are: the devices of a tensor group have the same tokens, and each its own experts.
    "expert": "tensor",
    # Both LoRA factors are sharded along their long side over every axis that shards parameters: with the base
    # matrix's sharding, one factor of each pair and its optimizer state would be replicated.
    "lora_long": ("fsdp", "tensor"),
    "batch": ("data", "fsdp"),
}

_log = logging.getLogger(__name__)
_warned: set[tuple[Any, ...]] = set()


def parse_mesh_axes(text: str) -> dict[str, int]:
    """Return the number of devices by mesh axis from text like "data=2,fsdp=2,tensor=1"; any axis may be omitted.

    Raises:
        ValueError: The text is not of this form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in MESH_AXES or not value.isdecimal() or int(value) < 1 or name in sizes:
            raise ValueError("not of the form data=1,fsdp=1,tensor=1")
        sizes[name] = int(value)
    return sizes


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a (data, fsdp, tensor) mesh over the first data * fsdp * tensor devices.

    Raises:
        ValueError: There are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    count = data * fsdp * tensor
    if count > len(devices):
        raise ValueError(f"a mesh of {data} x {fsdp} x {tensor} needs {count} devices; {len(devices)} are available")
    grid = np.asarray(devices[:count]).reshape(data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return the partition of one array by its logical axes.

    A dimension whose size its mesh axes do not divide is replicated, with one warning.

    Raises:
        ValueError: An axis has no rule, two dimensions use one mesh axis, or shape and axes differ in rank.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and logical axes {tuple(axes)} differ in rank")
    spec: list[MeshAxes] = []
    used: set[str] = set()
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; choose from {', '.join(RULES)}")
        target = RULES[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else tuple(target or ())
        if used & set(names):
            raise ValueError(f"logical axes {tuple(axes)} put two dimensions on mesh axis {sorted(used & set(names))}")
        used |= set(names)
        shards = math.prod(mesh.shape[name] for name in names)
        if shards > 1 and size % shards:
            if (size, names) not in _warned:
                _warned.add((size, names))
                _log.warning("a dimension of %d (%s) is not divisible by %d: replicated", size, axis, shards)
            target = None
        spec.append(target)
    return PartitionSpec(*spec)


def shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return a NamedSharding for each parameter of an `nnx.State`, from its logical axes.

    Optimizer states too: moments have the axes of their parameters, and leaves without axes (counts) are replicated.
    """

    def sharding(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(variable.shape, variable.axes, mesh)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def shard_state(state: Any, mesh: Mesh) -> Any:
    """Return a state whose arrays are sharded by the rules."""
    return jax.device_put(state, shardings(state, mesh))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def local_rows(mesh: Mesh, rows: int) -> slice:
    """Return which rows of a batch of `rows` sequences this process feeds.

    Raises:
        ValueError: The mesh does not divide the rows evenly, or this process's rows are not contiguous.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ValueError(
            f"a batch of {rows} sequences is not divisible by data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}"
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    ranges = sorted({index[0].indices(rows)[:2] for index in indices if index is not None})
    start, stop = ranges[0][0], ranges[-1][1]
    if stop - start != sum(end - begin for begin, end in ranges):
        raise ValueError("this process's rows of a batch are not contiguous: order the mesh's devices by process")
    return slice(start, stop)


def global_batch(batch: Any, mesh: Mesh, rows: int) -> Any:
    """Return global arrays of `rows` rows, of which each process passes its own (`local_rows`)."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), batch)


def mesh_of(state: Any) -> Mesh | None:
    """Return the (data, fsdp, tensor) mesh of a state's parameters, or None."""
    leaves = jax.tree.leaves(state)
    mesh = getattr(getattr(leaves[0], "sharding", None), "mesh", None) if leaves else None
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == MESH_AXES else None


def constrain_rows(x: Array) -> Array:
    """Shard an activation's first axis over the mesh in use (`jax.set_mesh`); return it unchanged without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(MESH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES["batch"], *([None] * (x.ndim - 1))))
