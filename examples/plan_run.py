"""Plan a run: memory and speed of a training step on machines that are not here.

TPUs are compiled for with the extra `tpu`; here every machine is estimated, which takes seconds.
"""

from __future__ import annotations

import dataclasses

import reverie_jax
from reverie_jax.train.plan.plan import find_architecture, make_plan, mesh_sizes
from reverie_jax.train.plan.topology import Topology

GIB = 2**30


def main() -> None:
    """Print a table of machines and batch sizes for the 7B LoRA recipe."""
    name = "reverie-1.5-7b-lora"
    recipe = reverie_jax.find_recipe(name)
    config = find_architecture("llava-1.5-7b")
    print(f"{'machine':10} {'sequences':>9} {'GiB a chip':>11} {'ms a step, at best':>19}")
    for machine in ("h100:8", "a100:8", "v5e:2x4"):
        topology = Topology.parse(machine)
        for batch_size in (8, 16):
            plan = make_plan(
                config,
                dataclasses.replace(recipe, batch_size=batch_size),
                topology,
                mesh_sizes(None, topology.chips),
                architecture="llava-1.5-7b",
                compiled=False,
            )
            fits = "" if plan.fits else "  does not fit"
            memory, time = plan.peak_bytes_per_chip / GIB, 1e3 * plan.roofline_seconds_per_step
            print(f"{machine:10} {batch_size:9} {memory:11.2f} {time:19.1f}{fits}")


if __name__ == "__main__":
    main()
