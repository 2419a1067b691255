"""The fastest batch and mesh that fit: candidates by formula, the best of them compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from reverie_jax.errors import UserError
from reverie_jax.models import VLMConfig
from reverie_jax.train.plan.plan import StepPlan, make_plan
from reverie_jax.train.plan.topology import Topology, tpu_devices
from reverie_jax.train.recipes import Recipe

ROOM = 0.95
"""Share of a chip's memory that a found plan may take: the runtime keeps some, and memory fragments."""
TENSORS = (1, 2, 4, 8)
MOST_ROWS = 512
MOST_COMPILED = 4
HIDDEN = 0.5
"""Memory and links that take together at most this share of what compute takes are hidden behind it, errors of the formula
included.
"""
_HOPELESS = 1.5
"""Estimates above this share of the memory are not compiled: the formula does not err that far."""


def candidates(recipe: Recipe, chips: int, most_rows: int = MOST_ROWS) -> Iterator[tuple[Recipe, dict[str, int]]]:
    """Rows in powers of two, in one micro-batch, and meshes of fsdp x tensor."""
    for tensor in TENSORS:
        if chips % tensor:
            continue
        fsdp, rows = chips // tensor, 1
        while rows <= max(most_rows, fsdp):
            if rows % fsdp == 0:
                yield (
                    dataclasses.replace(recipe, batch_size=rows, gradient_accumulation_steps=1),
                    {"data": 1, "fsdp": fsdp, "tensor": tensor},
                )
            rows *= 2


def seconds_per_row(plan: StepPlan) -> float:
    return plan.roofline_seconds_per_step / plan.rows


def _order(plan: StepPlan) -> tuple[float, bool, int]:
    """Fastest first, to three digits; of equally fast ones those whose bound is compute by far; of them the smallest, which
    leaves most of the memory.
    """
    parts = plan.roofline
    hidden = parts["memory"] + parts["links"] <= HIDDEN * parts["compute"]
    return float(f"{seconds_per_row(plan):.2e}"), not hidden, plan.peak_bytes_per_chip


def fit(
    config: VLMConfig,
    recipe: Recipe,
    topology: Topology,
    *,
    model: str,
    dtype: DTypeLike = jnp.bfloat16,
    devices: list[Any] | None = None,
    most_rows: int = MOST_ROWS,
    tried: Callable[[StepPlan], None] = lambda plan: None,
) -> StepPlan:
    """The plan with the fewest roofline seconds a row among those within `ROOM` of the memory.

    Args:
        devices: to compile for; those of the TPU topology by default. A GPU topology is estimated.
        most_rows: largest batch that is looked at.
        tried: is told every plan that was compiled, or for a GPU estimated.

    Raises:
        UserError: none fits.
    """
    if devices is None and topology.is_tpu:
        devices = tpu_devices(topology)
    estimates = [
        (make_plan(config, one, topology, mesh, model=model, dtype=dtype, compiled=False), one, mesh)
        for one, mesh in candidates(recipe, topology.chips, most_rows)
    ]
    if not estimates:
        raise UserError(
            f"--fit: {topology.chips} chips share out over no batch of a power of two up to {most_rows} rows"
        )
    estimates.sort(key=lambda found: _order(found[0]))
    room = ROOM * topology.chip.hbm
    if devices is None:
        for plan, _, _ in estimates:
            tried(plan)
        fitting = [plan for plan, _, _ in estimates if plan.peak_bytes_per_chip <= room]
    else:
        fitting, compiled = [], 0
        for plan, one, mesh in estimates:
            if plan.peak_bytes_per_chip > _HOPELESS * room or compiled == MOST_COMPILED:
                continue
            # The formula may have promised more than the compiler keeps: only what nothing else can beat is the fastest.
            if fitting and min(map(seconds_per_row, fitting)) <= seconds_per_row(plan):
                break
            compiled += 1
            plan = make_plan(config, one, topology, mesh, model=model, dtype=dtype, devices=devices)
            tried(plan)
            if plan.fits and plan.peak_bytes_per_chip <= room:
                fitting.append(plan)
    if not fitting:
        smallest = min(plan.peak_bytes_per_chip for plan, _, _ in estimates)
        raise UserError(
            f"--fit: nothing that was tried fits {ROOM:.0%} of {topology.chip.hbm / 2**30:.1f} GiB; the smallest is "
            f"estimated at {smallest / 2**30:.1f} GiB a chip: take more chips, shorter rows, or a lower rank"
        )
    return min(fitting, key=_order)
