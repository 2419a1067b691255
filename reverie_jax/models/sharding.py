"""Where arrays live: one table from logical axes to mesh axes, and pure functions of abstract arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
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
    # Both LoRA factors lie along their long side over every axis that shards parameters, whatever the base does:
    # an inherited layout would replicate one factor of each pair together with its optimizer state.
    "lora_long": ("fsdp", "tensor"),
    "batch": ("data", "fsdp"),
}

_log = logging.getLogger(__name__)
_warned: set[tuple[Any, ...]] = set()


def mesh_axes(text: str) -> dict[str, int]:
    """Devices by axis from "data=2,fsdp=2,tensor=1"; axes that are left out are left out.

    Raises:
        ValueError: it is written otherwise.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in MESH_AXES or not value.isdecimal() or int(value) < 1 or name in sizes:
            raise ValueError("write it as data=1,fsdp=1,tensor=1")
        sizes[name] = int(value)
    return sizes


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first data * fsdp * tensor devices.

    Raises:
        ValueError: there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = data * fsdp * tensor
    if wanted > len(devices):
        raise ValueError(f"a mesh of {data} x {fsdp} x {tensor} needs {wanted} devices; {len(devices)} are here")
    grid = np.asarray(devices[:wanted]).reshape(data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mesh | AbstractMesh,
    rules: Mapping[str, MeshAxes] = RULES,
) -> PartitionSpec:
    """The layout of one array.

    A dimension that its mesh axes do not divide is replicated, with one warning.

    Raises:
        ValueError: an axis has no rule, two dimensions claim one mesh axis, or shape and axes differ in rank.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and logical axes {tuple(axes)} differ in rank")
    spec: list[MeshAxes] = []
    used: set[str] = set()
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"no sharding rule for logical axis {axis!r}; known: {', '.join(rules)}")
        target = rules[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else tuple(target or ())
        if used & set(names):
            raise ValueError(f"logical axes {tuple(axes)} put two dimensions on mesh axis {sorted(used & set(names))}")
        used |= set(names)
        parts = math.prod(mesh.shape[name] for name in names)
        if parts > 1 and size % parts:
            if (size, names) not in _warned:
                _warned.add((size, names))
                _log.warning("a dimension of %d (%s) is not divisible by %d: replicated", size, axis, parts)
            target = None
        spec.append(target)
    return PartitionSpec(*spec)


def shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedSharding for each parameter of an `nnx.State`, from the logical axes that it carries.

    Optimizer states too: moments carry the axes of their parameters, and what carries none (counts) is replicated.
    """

    def of(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(variable.shape, variable.axes, mesh)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def place(state: Any, mesh: Mesh) -> Any:
    """The parameters, moved to where the rules put them."""
    return jax.device_put(state, shardings(state, mesh))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def local_rows(mesh: Mesh, rows: int) -> slice:
    """Which of a batch's rows this process feeds.

    Raises:
        ValueError: the rows cannot be shared out evenly over the mesh, or this process's are not side by side.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ValueError(f"{rows} rows a batch over data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}")
    found = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    places = sorted({index[0].indices(rows)[:2] for index in found if index is not None})
    first, past = places[0][0], places[-1][1]
    if past - first != sum(end - start for start, end in places):
        raise ValueError("the rows of this process's devices are not side by side: order the mesh's devices by process")
    return slice(first, past)


def feed(batch: Any, mesh: Mesh, rows: int) -> Any:
    """A batch's own rows (`own_rows`) as global arrays of `rows` rows."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), batch)


def mesh_of(state: Any) -> Mesh | None:
    """The mesh that a state's parameters lie on, if it is one of ours."""
    leaves = jax.tree.leaves(state)
    mesh = getattr(getattr(leaves[0], "sharding", None), "mesh", None) if leaves else None
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == MESH_AXES else None


def constrain_rows(x: Array) -> Array:
    """Keeps an activation's rows spread over the mesh in use (`jax.set_mesh`); without one, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(MESH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES["batch"], *([None] * (x.ndim - 1))))
