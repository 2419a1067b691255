"""`reverie plan`."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Annotated

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from reverie_jax.train.plan.plan import StepPlan

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict memory and speed of a recipe's training step on a machine, without that machine.

    The step is compiled ahead of time by the TPU compiler (extra `tpu`) or the GPU compiler (extra `cuda12` or `cuda13`;
    without it GPUs are estimated). Exits with 1 if the step does not fit.
    """

    recipe: common.Recipe
    topology: Annotated[str, common.option("CHIPS")]
    """Machine: v5e, v5p or v6e with a shape, as v5e:2x4; or a GPU with a count, as h200:8: a100-40, a100, h100, h200, b200,
    l4, l40s, rtx4090, rtx5090."""
    mesh: Annotated[str | None, common.option("AXES")] = None
    """Devices of each mesh axis; all on fsdp if omitted."""
    set: common.RecipeFields = ()
    architecture: Annotated[str | None, common.option("NAME")] = None
    """Architecture, as llava-1.5-13b or muffin-13b (an unknown name lists all); from the recipe's name if omitted."""
    dtype: common.Dtype = "auto"
    fit: Annotated[bool, common.FLAG] = False
    """Search batch size (in one micro-batch) and mesh for the fastest step that leaves 5 % of the memory free."""
    json: common.Json = False

    def run(self) -> None:
        """Run the command."""
        # The step is compiled for another machine; local devices are not used.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from rich.console import Console

        plan = self.figures()
        if self.json:
            print(json.dumps(dataclasses.asdict(plan)))
        else:
            console = Console()
            with console.capture() as shown:  # printed below: rich would end with a code of its own on a closed pipe
                for part in (headline(plan), memory_table(plan), time_table(plan), *formulas(), plan.note):
                    if part:
                        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
            print(shown.get(), end="")
        if not plan.fits:
            raise SystemExit(1)

    def figures(self) -> StepPlan:
        """Return the plan.

        Raises:
            UserError: the recipe, architecture, topology or mesh is invalid, or libtpu is missing.
        """
        import jax.numpy as jnp

        from reverie_jax.train import recipes
        from reverie_jax.train.plan import plan
        from reverie_jax.train.plan.search import search_plan
        from reverie_jax.train.plan.topology import Topology

        recipe = recipes.override(recipes.read_recipe(self.recipe), common.joined(self.set))
        topology = Topology.parse(self.topology)
        name = self.architecture or plan.architecture_of(recipe.name)
        config = plan.find_architecture(name)
        dtype = jnp.dtype("bfloat16") if self.dtype == "auto" else common.parse_dtype(self.dtype)
        if self.fit:
            if self.mesh is not None:
                raise UserError("--fit chooses the mesh: leave --mesh out")
            return search_plan(config, recipe, topology, architecture=name, dtype=dtype, on_plan=_note)
        mesh = plan.mesh_sizes(self.mesh, topology.chips)
        return plan.make_plan(config, recipe, topology, mesh, architecture=name, dtype=dtype)


def _note(plan: StepPlan) -> None:
    """Print a line on stderr for a plan that the search examined."""
    axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items())
    verdict = "fits" if plan.fits else "does not fit"
    seconds = plan.roofline_seconds_per_step / plan.batch_size
    memory = f"{plan.peak_bytes_per_chip / _GIB:.2f} GiB per chip, at least {1e3 * seconds:.2f} ms per sequence"
    common.note([f"tried batch_size={plan.batch_size} {axes}: {memory}; {verdict}"])


def headline(plan: StepPlan) -> str:
    """Return what was planned, and how, in a line."""
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    how = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "estimated, not compiled"
    parts = plan.gradient_accumulation_steps
    batch = f"batch size {plan.batch_size} in {parts} micro-batch{'es' if parts > 1 else ''}"
    if plan.largest_batch_size is not None:
        batch += f" (the largest in one that fits: {plan.largest_batch_size})"
    return f"{plan.recipe} ({plan.architecture}, {plan.dtype}) on {plan.topology}: {axes}; {batch}; {how}"


def formulas() -> tuple[str, str]:
    """Return the formulas behind the figures, a line each."""
    from reverie_jax.train.plan.costs import FLOPS_FORMULA
    from reverie_jax.train.plan.plan import ROOFLINE_FORMULA

    return f"step >= {ROOFLINE_FORMULA}", f"model FLOPs = {FLOPS_FORMULA}"


def memory_table(plan: StepPlan) -> Table:
    """Return the bytes on one chip by kind, beside its memory, as a table for a terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("on a chip")
    table.add_column("GiB", justify="right")
    table.add_column("of its memory", justify="right")
    names = {
        "frozen": "frozen weights",
        "trainable": "trained weights",
        "optimizer": "optimizer state",
        "batch": "batch",
        "activations": "activations, gradients, temporaries",
    }
    for kind, size in plan.bytes.items():
        table.add_row(names[kind], f"{size / _GIB:.3f}", f"{size / plan.hbm_bytes_per_chip:.1%}")
    table.add_section()
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    share = f"{plan.peak_bytes_per_chip / plan.hbm_bytes_per_chip:.1%}"
    table.add_row("peak", f"{plan.peak_bytes_per_chip / _GIB:.3f}", share)
    table.add_row("memory", f"{plan.hbm_bytes_per_chip / _GIB:.3f}", verdict)
    return table


def time_table(plan: StepPlan) -> Table:
    """Return the lower bounds of a step's time as a table for a terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("a step, lower bound")
    table.add_column("work", justify="right")
    table.add_column("ms", justify="right")
    links = f"{plan.collective_bytes_per_step / 1e9:.2f} GB into a chip"
    work = {
        "compute": f"{plan.flops_per_step / 1e12:.1f} TFLOP",
        "memory": f"{plan.memory_traffic_per_step / 1e9:.2f} GB on a chip",
        "links": links,
    }
    for bound, seconds in plan.roofline.items():
        table.add_row(bound, work[bound], f"{1e3 * seconds:.1f}")
    table.add_section()
    table.add_row("roofline", f"{plan.batch_size} sequences", f"{1e3 * plan.roofline_seconds_per_step:.1f}")
    return table
