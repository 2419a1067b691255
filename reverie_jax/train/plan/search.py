"""Search for the fastest batch size and mesh that fit: candidates are ordered by formula, the best ones compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from reverie_jax.errors import UserError
from reverie_jax.models import VLMConfig
from reverie_jax.train.plan.plan import StepPlan, make_plan
from reverie_jax.train.plan.topology import Topology, can_compile, compile_devices
from reverie_jax.train.recipe import Recipe

MEMORY_SHARE = 0.95
"""Share of a chip's memory that a plan may use: the runtime reserves some, and memory fragments."""
TENSOR_SIZES = (1, 2, 4, 8)
MAX_BATCH_SIZE = 512
MAX_COMPILED = 4
HIDDEN_SHARE = 0.5
"""Memory and links count as hidden behind compute if they take at most this share of its time, a margin for the formula."""
_MAX_ESTIMATE = 1.5
"""Candidates whose estimate exceeds the usable memory by this factor are not compiled: the formula is more accurate."""


def candidates(
    recipe: Recipe, chips: int, max_batch_size: int = MAX_BATCH_SIZE
) -> Iterator[tuple[Recipe, dict[str, int]]]:
    """Yield batch sizes in powers of two, in one micro-batch, on all meshes of fsdp x tensor."""
    for tensor in TENSOR_SIZES:
        if chips % tensor:
            continue
        fsdp, size = chips // tensor, 1
        while size <= max(max_batch_size, fsdp):
            if size % fsdp == 0:
                yield (
                    dataclasses.replace(recipe, batch_size=size, gradient_accumulation_steps=1),
                    {"data": 1, "fsdp": fsdp, "tensor": tensor},
                )
            size *= 2


def seconds_per_sequence(plan: StepPlan) -> float:
    """Return a plan's roofline seconds per sequence."""
    return plan.roofline_seconds_per_step / plan.batch_size


def _order(plan: StepPlan) -> tuple[float, bool, int]:
    """Return the sort key: seconds per sequence to three digits, then whether compute dominates, then peak memory."""
    terms = plan.roofline
    hidden = terms["memory"] + terms["links"] <= HIDDEN_SHARE * terms["compute"]
    return float(f"{seconds_per_sequence(plan):.2e}"), not hidden, plan.peak_bytes_per_chip


def search_plan(
    config: VLMConfig,
    recipe: Recipe,
    topology: Topology,
    *,
    architecture: str,
    dtype: DTypeLike = jnp.bfloat16,
    devices: list[Any] | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    on_plan: Callable[[StepPlan], None] = lambda plan: None,
) -> StepPlan:
    """Return the plan with the fewest roofline seconds per sequence among those within `MEMORY_SHARE` of the memory.

    A larger batch on its mesh is as fast by the roofline and often faster in fact: the plan names the largest that fits.

    Args:
        config: architecture.
        recipe: of the run; its batch size and micro-batches are replaced.
        topology: chips.
        architecture: name of `config`, for the report.
        dtype: of frozen weights and computation.
        devices: to compile for; those of the topology if omitted. Without a compiler for it, plans are estimated.
        max_batch_size: largest batch size of the search.
        on_plan: called with every plan that is compiled, or estimated where none can be.

    Raises:
        UserError: no candidate fits.
    """
    if devices is None and can_compile(topology):
        devices = compile_devices(topology)
    estimates = [
        (
            make_plan(config, candidate, topology, mesh, architecture=architecture, dtype=dtype, compiled=False),
            candidate,
        )
        for candidate, mesh in candidates(recipe, topology.chips, max_batch_size)
    ]
    if not estimates:
        raise UserError(f"--fit: no batch size of a power of two can be spread over {topology.chips} chips")
    estimates.sort(key=lambda estimate: _order(estimate[0]))
    usable = MEMORY_SHARE * topology.chip.hbm
    if devices is None:
        for plan, _ in estimates:
            on_plan(plan)
        fitting = [plan for plan, _ in estimates if plan.peak_bytes_per_chip <= usable]
    else:
        fitting, compiled = [], 0
        for estimate, candidate in estimates:
            if estimate.peak_bytes_per_chip > _MAX_ESTIMATE * usable or compiled == MAX_COMPILED:
                continue
            # A compiled plan may be slower than its estimate: stop only if no other estimate is faster than the best.
            if fitting and min(map(seconds_per_sequence, fitting)) <= seconds_per_sequence(estimate):
                break
            compiled += 1
            plan = make_plan(
                config, candidate, topology, estimate.mesh, architecture=architecture, dtype=dtype, devices=devices
            )
            on_plan(plan)
            if plan.fits and plan.peak_bytes_per_chip <= usable:
                fitting.append(plan)
    if not fitting:
        smallest = min(plan.peak_bytes_per_chip for plan, _ in estimates)
        raise UserError(
            f"--fit: no candidate fits in {MEMORY_SHARE:.0%} of {topology.chip.hbm / 2**30:.1f} GiB; the smallest is "
            f"estimated at {smallest / 2**30:.1f} GiB per chip: use more chips, a shorter sequence, or a lower rank"
        )
    best = min(fitting, key=_order)

    def compile_it(estimate: StepPlan, candidate: Recipe) -> StepPlan:
        options: Any = {"architecture": architecture, "dtype": dtype, "devices": devices}
        return estimate if devices is None else make_plan(config, candidate, topology, estimate.mesh, **options)

    return dataclasses.replace(best, largest_batch_size=_largest_batch_size(best, estimates, usable, compile_it))


def _largest_batch_size(
    best: StepPlan,
    estimates: Sequence[tuple[StepPlan, Recipe]],
    usable: float,
    compile_it: Callable[[StepPlan, Recipe], StepPlan],
) -> int:
    """Return the largest batch size of the estimates that fits on the best plan's mesh."""
    larger = [one for one in estimates if one[0].mesh == best.mesh and one[0].batch_size > best.batch_size]
    for estimate, candidate in sorted(larger, key=lambda one: -one[0].batch_size):
        if estimate.peak_bytes_per_chip <= _MAX_ESTIMATE * usable:
            plan = compile_it(estimate, candidate)
            if plan.fits and plan.peak_bytes_per_chip <= usable:
                return plan.batch_size
    return best.batch_size
