"""Attention under a mesh: each device computes its own sequences and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

from reverie_jax.models.sharding import MESH_AXES, RULES


def shard_over_mesh(
    run: Callable[..., Any], operands: tuple[Array, ...], ends: Array | None, ranks: tuple[int, ...] | int
) -> Any:
    """Run `run(*operands, ends)` on every device's shards: XLA cannot partition a kernel by itself.

    An operand is known by its rank: heads [B, L, heads, d], statistics [B, H, P] or ends [B, L]; `ranks` are the results',
    one number for a result that is one array.
    """
    operands = operands if ends is None else (*operands, ends)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(MESH_AXES) or AxisType.Manual in mesh.axis_types:
        return run(*operands)
    q, k = operands[:2]
    batch = _axes_that_divide(mesh, "batch", q.shape[0])
    heads = _axes_that_divide(mesh, "heads", q.shape[2], k.shape[2])
    specs = {4: PartitionSpec(batch, None, heads), 3: PartitionSpec(batch, heads), 2: PartitionSpec(batch)}
    return jax.shard_map(
        run,
        in_specs=tuple(specs[x.ndim] for x in operands),
        out_specs=specs[ranks] if isinstance(ranks, int) else tuple(specs[rank] for rank in ranks),
        check_vma=False,  # replicated values are equal on all devices; nothing is differentiated through this
    )(*operands)


def _axes_that_divide(mesh: AbstractMesh, logical: str, *sizes: int) -> tuple[str, ...]:
    """Return the mesh axes of a logical axis without those that do not divide one of the sizes."""
    rule, shards, axes = RULES[logical], 1, []
    for name in (rule,) if isinstance(rule, str) else rule or ():
        if all(size % (shards * mesh.shape[name]) == 0 for size in sizes):
            shards *= mesh.shape[name]
            axes.append(name)
    return tuple(axes)
