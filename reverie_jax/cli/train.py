"""`reverie train`."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import OmitArgPrefixes

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from reverie_jax.data.conversation import ImageRecord
    from reverie_jax.evaluators import BenchmarkEvaluator
    from reverie_jax.train.evaluator import Evaluator
    from reverie_jax.train.trackers import Tracking

HUB = "hub"
"""Folder of a run with what `--push-to-hub` uploads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitoring:
    """What is logged of a run beside its metrics; the result is the same without it."""

    tracker: Annotated[common.Several[str], common.option("NAMES ...")] = ()
    """Trackers, separated by commas or spaces: wandb, mlflow, trackio. Addresses and keys are in their own variables."""
    project: Annotated[str, common.option("NAME")] = "reverie-jax"
    """Project of W&B and trackio, experiment of MLflow."""
    run_name: Annotated[str, common.option("NAME")] = ""
    """Name of the tracked run; that of the output folder if omitted."""
    sample_every: Annotated[int | None, common.N] = None
    """Log pictures with questions and the model's answers every so many steps; never if omitted."""
    sample_count: Annotated[int, common.N] = 4
    """Number of questions to log: of held-out records if there are any, or else of those that are trained on."""
    eval: Annotated[common.Several[str], common.option("NAMES ...")] = ()
    """Benchmarks to evaluate the model on during training, separated by commas or spaces."""
    eval_data: Annotated[Path | None, common.FOLDER] = None
    """Folder of their official files, as `reverie eval --data`."""
    eval_images: Annotated[Path | None, common.FOLDER] = None
    """Folder of their images; the one in the data if omitted."""
    eval_every: Annotated[int, common.N] = 200
    """Steps between evaluations; a checkpoint is saved with each, and the best one is kept."""
    eval_limit: Annotated[int | None, common.N] = None
    """Questions of each benchmark at most: all about some images; all of them if omitted."""
    eval_metric: Annotated[str, common.option("METRIC")] = ""
    """Metric that chooses the best checkpoint, as pope/adversarial/f1; the first benchmark's headline if omitted."""

    def check(self) -> Tracking | None:
        """Check the options without importing JAX; return where the run is tracked.

        Raises:
            UserError: an option is invalid, or a tracker is not installed.
        """
        from reverie_jax.train.trackers import Tracking

        counts = {"sample_every": self.sample_every, "sample_count": self.sample_count}
        common.check_at_least(1, **counts, eval_every=self.eval_every, eval_limit=self.eval_limit)
        if self.eval:
            common.require(self.eval_data, "--eval-data", "name the folder of the files of --eval")
        trackers = tuple(name for text in common.joined(self.tracker) for name in text.split(",") if name)
        return Tracking(trackers, self.project, self.run_name) if trackers else None

    def benchmarks(self) -> BenchmarkEvaluator | None:
        """Load the benchmarks.

        Raises:
            UserError: a benchmark is unknown, cannot be read, or cannot be scored here.
        """
        if not self.eval:
            return None
        from reverie_jax.cli.evaluate import output_folders
        from reverie_jax.eval.benchmarks import inputs
        from reverie_jax.evaluators import BenchmarkEvaluator, subset

        folder = common.require(self.eval_data, "--eval-data", "missing")
        found = [item for item, _ in output_folders(",".join(common.joined(self.eval)), Path())]
        loaded = [(item, inputs.with_images(inputs.load(item, folder), self.eval_images)) for item in found]
        parts = [(item, subset(data, self.eval_limit)) for item, data in loaded]
        return BenchmarkEvaluator(parts, self.eval_every, self.eval_metric)

    def evaluators(self, records: Sequence[ImageRecord], holdout: int) -> list[Evaluator]:
        """Return what looks at the model during training."""
        found: list[Evaluator | None] = [self.benchmarks()]
        if self.sample_every is not None:
            from reverie_jax.evaluators import SampleEvaluator
            from reverie_jax.train.validation import hold_out

            training, held_out = hold_out(records, holdout)
            found.append(SampleEvaluator(held_out or training, self.sample_every, self.sample_count))
        return [one for one in found if one is not None]


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
    monitoring: OmitArgPrefixes[Monitoring] = dataclasses.field(default_factory=Monitoring)

    def run(self) -> None:
        """Run the command."""
        self._check()
        tracking = self.monitoring.check()
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
        evaluators = self.monitoring.evaluators(records, recipe.holdout)
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
                evaluators=evaluators,
                tracking=tracking,
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
