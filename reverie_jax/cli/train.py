"""`reverie train`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from reverie_jax.cli import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Tune a model by a recipe. Run the same command again to resume."""

    recipe: Positional[str]
    """Name of a recipe (`reverie recipes` lists them) or a YAML file, as `reverie recipes NAME` prints it."""
    model: str
    """Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base."""
    data: Path
    """Records folder, written by `reverie data build`."""
    out: Path
    """Run folder: checkpoints, metrics.jsonl, tensorboard, run.json."""
    components: common.Components = ()
    """Checkpoint of a part that the model lacks: language model or CLIP tower. Repeat for each part."""
    adapter: str | None = None
    """Adapters to continue from: PEFT adapter, LLaVA LoRA folder, or run folder. New ones if omitted."""
    dtype: str = "auto"
    """Dtype of weights and computation: float32, bfloat16, or auto (bfloat16 on accelerators, float32 on CPUs). Trained
    parameters are always float32."""
    set: tuple[str, ...] = ()
    """Recipe fields to change, as `steps=200 learning_rate=1e-4 sequence.length=512`; they win over the recipe."""
    mesh: str = "data=1,fsdp=1,tensor=1"
    """Devices of each mesh axis."""
    distributed: str = ""
    """Join other processes: auto (SLURM, Open MPI, Kubernetes, TPU pod), or address:port,processes,index."""
    cache_vision: Path | None = None
    """Folder for a cache of the frozen vision tower's features; the records' images are then not decoded again."""
    profile: bool = False
    """Write a profiler trace of a few steps to the run folder."""
    tensorboard: bool = False
    """Serve TensorBoard during training (needs the tensorboard package)."""
    resume: bool = True
    """Continue from the newest checkpoint in the run folder; --no-resume refuses a folder that has one."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.data.records import RecordSource
        from reverie_jax.loading import bare, load_model, load_with_projector
        from reverie_jax.train import recipes
        from reverie_jax.train.distributed import join
        from reverie_jax.train.loop import train
        from reverie_jax.train.metrics import serve

        join(self.distributed)
        recipe = recipes.override(recipes.read_recipe(self.recipe), self.set)
        records = RecordSource(self.data)
        mesh = common.parse_mesh(self.mesh)
        where: Any = {"mesh": mesh, "dtype": common.parse_dtype(self.dtype)}
        if recipe.trainable == "projector" and self.adapter is None and bare(self.model, self.components):
            kind = recipe.projector_type
            model, processor = load_with_projector(
                self.model, components=self.components, kind=kind, seed=recipe.seed, **where
            )
        else:
            model, processor = load_model(self.model, components=self.components, adapter=self.adapter, **where)
        with serve(self.out) if self.tensorboard else contextlib.nullcontext():
            result = train(
                model,
                processor,
                records,
                recipe,
                self.out,
                mesh=mesh,
                resume=self.resume,
                profile=self.profile,
                vision_cache=self.cache_vision,
            )
        stats = result.stats
        print(
            f"{result.steps} steps in {result.seconds:.0f} s on {stats.records} images "
            f"({stats.tokens:,} tokens in trees, {stats.flat_tokens:,} without): {self.out}"
        )


def field_help() -> str:
    """Return the recipe fields with type and default, as the last part of `reverie train --help`."""
    from reverie_jax.train.recipes import describe_fields

    return f"recipe fields (in a YAML file, or --set FIELD=VALUE):\n{describe_fields()}"
