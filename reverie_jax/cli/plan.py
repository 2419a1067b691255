"""The `reverie plan` command. Everything heavy is imported when it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from tyro.conf import Positional

from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from reverie_jax.train.plan.plan import StepPlan

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a recipe's step for chips that are not here: what it takes of their memory, and how fast it can be at best.

    Needs no accelerator. For a TPU the step is compiled by its own compiler (extra `tpu`); for a GPU it is estimated. Ends
    with exit code 1 if the step does not fit.
    """

    recipe: Positional[str]
    """Name of a recipe; `reverie recipes` lists them."""
    topology: str
    """Chips: v5e, v5p, v6e with their shape, as v5e:2x4; a100, a100-40, h100, h200 with their number, as h200:8."""
    mesh: str | None = None
    """Devices by axis, as data=1,fsdp=4,tensor=2; all of them on fsdp by default."""
    set: tuple[str, ...] = ()
    """Recipe fields to change: `--set rows=16 accumulate=1 row.tokens=2048`."""
    model: str | None = None
    """Architecture: llava-1.0-7b, llava-1.5-7b, llava-1.5-13b or llava-phi3-mini; by default what the recipe's name says."""
    dtype: str = "bfloat16"
    """Of the base's matrices and of the computation: float32 or bfloat16. Adapters are float32 always."""
    fit: bool = False
    """Search rows (in one micro-batch) and mesh for the fastest step that leaves 5 % of the memory free."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        # The step is compiled for elsewhere: a device that is here is not touched.
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
        """The plan of what was asked for.

        Raises:
            UserError: the recipe, model, topology or mesh is none, or libtpu is missing.
        """
        import jax.numpy as jnp

        from reverie_jax.train import recipes
        from reverie_jax.train.plan import plan
        from reverie_jax.train.plan.search import fit
        from reverie_jax.train.plan.topology import Topology

        recipe = recipes.override(recipes.recipe(self.recipe), self.set)
        topology = Topology.parse(self.topology)
        model = self.model or plan.model_name(self.recipe)
        config = plan.architecture(model)
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: must be float32 or bfloat16")
        dtype = jnp.dtype(self.dtype)
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
