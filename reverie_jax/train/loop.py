"""The training loop, top to bottom: adapt, resume, step, log, save."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import DatasetStats, dataset_stats, training_batches
from reverie_jax.data.processor import Processor
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.models.sharding import feed, local_rows, make_mesh, place, shardings
from reverie_jax.train.checkpoint import ResumeError, RunCheckpoints
from reverie_jax.train.metrics import MetricsLog
from reverie_jax.train.monitor import StepMonitor, TrainingFailed
from reverie_jax.train.preemption import Interruption
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.reference_model import ReferenceModel, find_reference
from reverie_jax.train.step import TrainState, adapt, make_optimizer, make_step, trainable_filter
from reverie_jax.train.validation import Validation, hold_out
from reverie_jax.train.vision_cache import cached

_log = logging.getLogger(__name__)

_PROFILED = range(3, 6)
"""Steps of a run that `profile` traces: the first ones compile."""


class Interrupted(UserError):
    """The run was asked to end (SIGTERM), and is saved."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves in memory; the rest is in its folder."""

    stats: DatasetStats
    seconds: float
    steps: int


def train(
    model: VisionLanguageModel,
    processor: Processor,
    records: Sequence[ImageRecord],
    recipe: Recipe,
    folder: Path,
    *,
    mesh: Mesh | None = None,
    resume: bool = True,
    profile: bool = False,
    vision_cache: Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Tunes `model` in place with fresh adapters, and leaves checkpoints and metrics in `folder`.

    Several processes (`jax.distributed`) call it alike; each feeds its own devices' rows, and the first one writes the
    metrics. SIGTERM ends it at the next step with a checkpoint, from which it goes on when it is called again.

    Args:
        source: records, by index.
        mesh: devices; one by default.
        resume: go on from the newest checkpoint in `folder`, if there is one; otherwise there must be none.
        vision_cache: folder for the frozen tower's features of the pictures, counted once; none by default.
        profile: leave a trace of a few steps in `folder`/profile.

    Raises:
        DataError: a record does not fit the recipe's rows.
        ResumeError: the folder holds a run that is not this one.
        TrainingFailed: the loss became NaN or infinite, or jumped; the step and its records are named.
    """
    started = time.perf_counter()
    mesh = mesh or make_mesh()
    processor = processor.using(recipe.template, image_aspect_ratio=recipe.image_aspect_ratio)
    try:
        records, held_out = hold_out(records, recipe.holdout)
    except ValueError as error:
        raise UserError(str(error)) from None
    supervision = recipe.preference or recipe.supervision
    found = dataset_stats(records, processor, recipe.sequence, supervision, prefix_sharing=recipe.prefix_sharing)
    recipe = dataclasses.replace(recipe, steps=recipe.steps_for(found.rows))
    try:
        local_rows(
            mesh, recipe.batch_size // recipe.gradient_accumulation_steps
        )  # each micro-batch is spread over the devices
        local = local_rows(mesh, recipe.batch_size)
    except ValueError as error:
        raise UserError(
            f"recipe {recipe.name}, micro-batches of {recipe.batch_size // recipe.gradient_accumulation_steps}: {error}"
        ) from None
    features = None if vision_cache is None else cached(model, processor, records, vision_cache)
    base = base_checksums(model)
    fresh = adapt(model, recipe)
    if recipe.quantization is not None:
        lora.quantize(model, recipe.quantization)
    graph, params, frozen = nnx.split(model, trainable_filter(recipe.trainable), ...)  # type: ignore[misc]
    params, frozen = place(params, mesh), place(frozen, mesh)
    optimizer = make_optimizer(recipe)
    # Moments lie as the parameters that they belong to. It must be said: zeros depend on none, and jit would replicate them.
    layout = shardings(jax.eval_shape(optimizer.init, params), mesh)
    with jax.set_mesh(mesh):
        moments = jax.jit(optimizer.init, out_shardings=layout)(params)
        if recipe.offload:
            moments = jax.device_put(moments, jax.memory.Space.Host)
    state = TrainState(params, moments, jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec())))
    batches = iter(
        training_batches(
            records,
            processor,
            recipe.sequence,
            rows=recipe.batch_size,
            supervision=supervision,
            prefix_sharing=recipe.prefix_sharing,
            datasets=found.datasets,
            seed=recipe.seed,
            local=local,
            features=features,
        )
    )
    # Left by an error or Ctrl-C, the block still waits for saves under way.
    with contextlib.closing(batches), contextlib.closing(RunCheckpoints(folder, recipe, base)) as checkpoints:
        reference = ReferenceModel()
        if recipe.preference is not None:
            reference = find_reference(model, fresh, params, frozen, processor, records, recipe, folder, mesh)
        if checkpoints.latest is not None:
            if not resume:
                raise ResumeError(f"{folder}: holds a run already; resume it, or choose another folder")
            state, position = checkpoints.restore(state)
            batches.set_state(position)
            _log.info("resumed from step %d", int(state.step))
        first = int(state.step)
        step = make_step(
            *(graph, optimizer, recipe),
            datasets=len(found.datasets),
            reference=reference.graph,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )
        validate = Validation(graph, held_out, processor, recipe, mesh)
        log = MetricsLog(folder, recipe.steps, resumed=first, label=recipe.name, console=console)
        monitor = StepMonitor(model, records, found.datasets, recipe, mesh, log)
        with jax.set_mesh(mesh), log, Interruption(recipe.save_minutes) as interruption:
            for number in range(first + 1, recipe.steps + 1):
                if profile and number == first + _PROFILED.start:
                    jax.profiler.start_trace(str(folder / "profile"))
                asked = time.perf_counter()
                rows = next(batches)
                batch = feed(rows, mesh, recipe.batch_size)
                waited = time.perf_counter() - asked
                with jax.transfer_guard("disallow"):  # nothing passes between host and device inside a step
                    state, metrics = step(state, frozen, batch, reference.held)
                monitor.after(number, metrics, rows.records, waited)
                if profile and number == min(first + _PROFILED.stop, recipe.steps):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                ends = interruption.asked(number)
                due = interruption.due(number)
                if number % recipe.save_steps == 0 or number == recipe.steps or ends or due:
                    monitor.settle()  # a state whose loss is no number is never saved
                    measured = validate(state.params, frozen)
                    log.validated(number, measured)
                    checkpoints.save(state, batches.get_state(), measured)
                if ends and number < recipe.steps:
                    said = "is saved" if checkpoints.settle() else "could not be saved"
                    raise Interrupted(f"asked to end: step {number} of {recipe.steps} {said}; run again to go on")
        if not checkpoints.settle():
            raise TrainingFailed(f"{folder}: the last checkpoint could not be written; free some space and run again")
    nnx.update(model, state.params)
    return TrainResult(found, time.perf_counter() - started, recipe.steps - first)
