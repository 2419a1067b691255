"""`reverie plan`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from reverie_jax.train.plan.plan import StepPlan

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict memory and speed of a recipe's training step on a machine, without that machine.

    For a TPU the step is compiled ahead of time by the TPU compiler (extra `tpu`); for a GPU it is estimated. Exits with 1
    if the step does not fit.
    """

    recipe: Positional[str]
    """Name of a recipe (`reverie recipes` lists them) or a YAML file, as `reverie recipes NAME` prints it."""
    topology: str
    """Machine: v5e, v5p or v6e with a shape, as v5e:2x4; a100, a100-40, h100 or h200 with a count, as h200:8."""
    mesh: str | None = None
    """Devices of each mesh axis, as data=1,fsdp=4,tensor=2; all on fsdp if omitted."""
    set: tuple[str, ...] = ()
    """Recipe fields to change, as `steps=200 learning_rate=1e-4 sequence.length=512`; they win over the recipe."""
    architecture: str | None = None
    """llava-1.0-7b, llava-1.5-7b, llava-1.5-13b or llava-phi3-mini; from the recipe's name if omitted."""
    dtype: str = "auto"
    """Dtype of weights and computation: float32, bfloat16, or auto (bfloat16 on accelerators, float32 on CPUs). Trained
    parameters are always float32."""
    fit: bool = False
    """Search batch size (in one micro-batch) and mesh for the fastest step that leaves 5 % of the memory free."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        """Run the command."""
        # The step is compiled for another machine; local devices are not used.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from rich.console import Console

        found = self.figures()
        if self.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            console = Console()
            for part in (headline(found), memory_table(found), time_table(found), *formulas(), found.note):
                if part:
                    console.print(part, highlight=False, soft_wrap=isinstance(part, str))
        if not found.fits:
            raise SystemExit(1)

    def figures(self) -> StepPlan:
        """Return the plan.

        Raises:
            UserError: the recipe, architecture, topology or mesh is invalid, or libtpu is missing.
        """
        import jax.numpy as jnp

        from reverie_jax.train import recipes
        from reverie_jax.train.plan import plan
        from reverie_jax.train.plan.search import fit
        from reverie_jax.train.plan.topology import Topology

        recipe = recipes.override(recipes.read_recipe(self.recipe), self.set)
        topology = Topology.parse(self.topology)
        model = self.architecture or plan.model_name(recipe.name)
        config = plan.architecture(model)
        dtype = jnp.dtype("bfloat16") if self.dtype == "auto" else common.parse_dtype(self.dtype)
        if self.fit:
            if self.mesh is not None:
                raise UserError("--fit chooses the mesh: leave --mesh out")
            return fit(config, recipe, topology, model=model, dtype=dtype, tried=_say)
        mesh = plan.mesh_sizes(self.mesh, topology.chips)
        return plan.make_plan(config, recipe, topology, mesh, model=model, dtype=dtype)


def _say(plan: StepPlan) -> None:
    """One line on stderr for a plan that the search looked at."""
    axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items())
    verdict = "fits" if plan.fits else "does not fit"
    print(
        f"reverie: tried rows={plan.rows} {axes}: {plan.peak_bytes_per_chip / _GIB:.2f} GiB a chip, "
        f"{1e3 * plan.roofline_seconds_per_step / plan.rows:.2f} ms a row at best; {verdict}",
        file=sys.stderr,
    )


def headline(plan: StepPlan) -> str:
    """What was planned, and how, in a line."""
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    how = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "estimated, not compiled"
    rows = f"{plan.rows} rows in {plan.accumulate} micro-batch{'es' if plan.accumulate > 1 else ''}"
    return f"{plan.recipe} ({plan.model}, {plan.dtype}) on {plan.topology}: {axes}; {rows}; {how}"


def formulas() -> tuple[str, str]:
    from reverie_jax.train.plan.costs import FLOPS_FORMULA
    from reverie_jax.train.plan.plan import ROOFLINE_FORMULA

    return f"step >= {ROOFLINE_FORMULA}", f"model FLOPs = {FLOPS_FORMULA}"


def memory_table(plan: StepPlan) -> Table:
    """Bytes on one chip by kind, against what it has."""
    from rich.table import Table

    table = Table()
    table.add_column("a chip holds")
    table.add_column("GiB", justify="right")
    table.add_column("of its memory", justify="right")
    names = {
        "base": "frozen weights",
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
    """The least time of a step, by what bounds it."""
    from rich.table import Table

    table = Table()
    table.add_column("a step at best")
    table.add_column("does", justify="right")
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
    table.add_row("roofline", f"{plan.rows} rows", f"{1e3 * plan.roofline_seconds_per_step:.1f}")
    return table
