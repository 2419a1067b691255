"""`reverie train`."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

HUB = "hub"
"""Folder of a run with what `--push-to-hub` uploads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Tune a model by a recipe. Run the same command again to resume.

    Trained parameters are float32, whatever --dtype is. The fields of a recipe are listed below the options.
    """

    recipe: common.Recipe
    model: common.Model
    data: Annotated[Path, common.FOLDER]
    """Records folder, written by `reverie data build`."""
    out: Annotated[Path, common.FOLDER]
    """Output folder: checkpoints, metrics.jsonl, tensorboard, run.json."""
    components: common.Components = ()
    adapter: common.Adapter = None
    dtype: common.Dtype = "auto"
    set: common.RecipeFields = ()
    mesh: common.MeshSpec = common.ONE_DEVICE
    distributed: common.Distributed = ""
    cache_vision: Annotated[Path | None, common.FOLDER] = None
    """Folder for a cache of the frozen vision tower's features; the records' images are then not decoded again."""
    profile: Annotated[bool, common.FLAG] = False
    """Write a profiler trace of a few steps to the run folder."""
    tensorboard: Annotated[bool, common.FLAG] = False
    """Serve TensorBoard during training (needs the tensorboard package)."""
    resume: Annotated[bool, common.FLAG] = True
    """Start anew: refuse an output folder that has checkpoints instead of continuing from the newest one."""
    push_to_hub: common.PushToHub = None
    public: common.Public = False

    def run(self) -> None:
        """Run the command."""
        self._check()
        from reverie_jax.train import recipes

        recipe = recipes.override(recipes.read_recipe(self.recipe), common.joined(self.set))
        if self.push_to_hub is not None:
            if self.distributed:
                raise UserError(
                    "--push-to-hub: is for one process; afterwards, `reverie convert --adapter RUN --to auto` has it too"
                )
            from reverie_jax.hub.repository import check_access

            check_access(self.push_to_hub, "model", public=self.public)
        # From here on JAX is imported, which takes seconds.
        from reverie_jax.data.records import RecordSource
        from reverie_jax.loading import lacks_projector, load_model, load_with_projector
        from reverie_jax.train.checkpoint import find_progress
        from reverie_jax.train.distributed import join
        from reverie_jax.train.loop import finetune
        from reverie_jax.train.metrics import serve

        join(self.distributed)
        records = RecordSource(self.data)
        mesh = common.parse_mesh(self.mesh)
        placement: Any = {"template": recipe.template, "mesh": mesh, "dtype": common.parse_dtype(self.dtype)}
        progress = find_progress(self.out, recipe, records, resume=self.resume)
        if progress is not None and progress.is_complete:
            print(f"already complete, {progress.steps} of {progress.steps} steps: {self.out}")
            self._push(mesh)
            return
        if recipe.trainable == "projector" and self.adapter is None and lacks_projector(self.model, self.components):
            new: Any = {"kind": recipe.projector_type, "seed": recipe.seed}
            model, processor = load_with_projector(self.model, components=self.components, **new, **placement)
        else:
            model, processor = load_model(self.model, components=self.components, adapter=self.adapter, **placement)
        with serve(self.out) if self.tensorboard else contextlib.nullcontext():
            result = finetune(
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
            f"({stats.tokens:,} tokens in trees, {stats.flat_tokens:,} without prefix sharing): {self.out}"
        )
        del model  # its memory is for what is loaded next
        self._push(mesh)

    def _push(self, mesh: Mesh) -> None:
        """Write the run in the form that others read, beside its checkpoints, and upload it, if that is asked for."""
        if self.push_to_hub is None:
            return
        from reverie_jax.convert import convert
        from reverie_jax.hub.datasets import read_sources
        from reverie_jax.hub.publish import publish_model

        folder = self.out / HUB
        if not folder.exists():
            convert(self.model, folder, to="auto", components=self.components, adapter=self.out, mesh=mesh)
        datasets = read_sources(self.data).get("datasets")
        print(publish_model(folder, self.push_to_hub, {"datasets": datasets} if datasets else {}))

    def _check(self) -> None:
        """Check what needs no import of JAX: those take seconds.

        Raises:
            UserError: an option is invalid, or a file is missing.
        """
        if self.recipe.endswith((".yaml", ".yml")) and not Path(self.recipe).is_file():
            raise UserError(f"{self.recipe}: no such file; `reverie recipes NAME > my.yaml` writes a recipe")
        if not self.data.is_dir():
            raise UserError(f"{self.data}: no such folder; `reverie data build` writes records")
        common.check_choice(("auto", *common.DTYPES), dtype=self.dtype)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file; --out takes a folder")


def field_help() -> str:
    """Return the recipe fields with default and type, as the last part of `reverie train --help`."""
    from reverie_jax.train.recipe import Recipe

    lines = [f"  {name:32} {default:13} {kind}" for name, default, kind in _fields(Recipe)]
    return "\n".join(["recipe fields (in a YAML file, or --set FIELD=VALUE), with default and type:", *lines])


def _fields(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (name, default, type) of a dataclass's fields; those of a nested one are `outer.inner`."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = next((part for part in _union(hints[field.name]) if dataclasses.is_dataclass(part)), None)
        if isinstance(inner, type):
            yield from _fields(inner, f"{prefix}{field.name}.")
        else:
            default = "required" if field.default is dataclasses.MISSING else str(field.default)
            default = default.lower() if field.default in (None, True, False) else default  # as YAML and --set write it
            yield f"{prefix}{field.name}", default, " | ".join(map(_type_name, _union(hints[field.name])))


def _union(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, types.UnionType) or get_origin(kind) is Union else (kind,)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    return "none" if kind is type(None) else kind.__name__
