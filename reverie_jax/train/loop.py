"""Training loop: prepare data and model, resume, then step, log, validate and save."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import TreeBuilder, training_batches
from reverie_jax.data.processor import Processor
from reverie_jax.data.survey import find_sizes
from reverie_jax.data.tree_sizes import DatasetStats
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.sharding import global_batch, local_rows, make_mesh, shard_state, shardings
from reverie_jax.train.checkpoint import SCORE, RunCheckpoints
from reverie_jax.train.evaluator import Evaluator, Evaluators
from reverie_jax.train.identity import already_there, run_identity
from reverie_jax.train.metrics import MetricsLog
from reverie_jax.train.monitor import StepMonitor, TrainingFailed
from reverie_jax.train.preemption import Preempted, Preemption
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.reference_model import ReferenceSpec
from reverie_jax.train.step import StepMetrics, TrainState, make_optimizer, make_step, make_trainable, trainable_filter
from reverie_jax.train.trackers import Trackers, Tracking
from reverie_jax.train.validation import Validation, hold_out
from reverie_jax.train.vision_cache import frozen_features

_log = logging.getLogger(__name__)

_PROFILED = range(3, 6)
"""Steps of a run that `profile` traces: the first ones compile."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run reports; everything else is in its folder.

    Attributes:
        steps: taken by this call; fewer than the recipe's after a resume.
    """

    stats: DatasetStats
    seconds: float
    steps: int


def finetune(
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
    evaluators: Sequence[Evaluator] = (),
    tracking: Tracking | None = None,
) -> TrainResult:
    """Train `model` in place by a recipe; write checkpoints and metrics to `folder`.

    In a multi-process run (`jax.distributed`) every process calls it with the same arguments, feeds its own devices, and
    process 0 writes the metrics. SIGTERM and Ctrl-C stop it after the current step with a checkpoint; call it again to
    continue.

    Args:
        model: base model, with or without adapters; float32 or bfloat16.
        processor: tokenizes conversations and preprocesses images.
        records: images with their conversations, by index.
        recipe: hyperparameters.
        folder: run folder; created if missing.
        mesh: devices; the first one if omitted.
        resume: continue from the newest checkpoint in `folder`; if False, a folder with a checkpoint is an error.
        profile: write a profiler trace of a few steps to `folder`/profile.
        vision_cache: folder for the frozen tower's features of the images; the tower then runs once per image.
        console: of the progress bar; stderr by default.
        evaluators: look at the model every so many steps. They change no update, and are no part of the run's identity.
        tracking: trackers beside metrics.jsonl and TensorBoard.

    Raises:
        DataError: a record does not fit the recipe's sequence.
        ResumeError: the folder holds another run; what differs is named.
        TrainingFailed: the loss is NaN, infinite or jumped, or the last checkpoint was not written.
        Preempted: SIGTERM or Ctrl-C stopped the run.
        UserError: the model has other adapters than the recipe, or the mesh does not suit it.
    """
    started = time.perf_counter()
    mesh = mesh or make_mesh()
    processor = processor.override(recipe.template, image_aspect_ratio=recipe.image_aspect_ratio)
    everything, (records, held_out) = records, hold_out(records, recipe.holdout)
    builder = TreeBuilder(processor, recipe.sequence, recipe.preference or recipe.supervision, recipe.prefix_sharing)
    stats = (sizes := find_sizes(everything, records, builder)).stats
    builder = dataclasses.replace(builder, datasets=stats.datasets)
    recipe = dataclasses.replace(recipe, steps=recipe.steps_for(stats.sequences))
    options: Any = {"batch_size": recipe.batch_size, "seed": recipe.seed, "local": _local_sequences(recipe, mesh)}
    options |= {"sizes": sizes, "features": frozen_features(model, processor, records, vision_cache, recipe)}
    identity = run_identity(model, recipe, everything, builder)
    fresh_adapters = make_trainable(model, recipe)
    if recipe.quantization is not None:
        lora.quantize(model, recipe.quantization)
    optimizer = make_optimizer(recipe)
    graph, state, frozen = _place(model, optimizer, recipe, mesh)
    batches = iter(training_batches(records, builder, **options, crop_scale=recipe.crop_scale, flip=recipe.flip))
    # If a step raises or is interrupted, closing still waits for the save in progress.
    with contextlib.closing(batches), contextlib.closing(RunCheckpoints(folder, recipe, identity)) as checkpoints:
        reference = ReferenceSpec(
            model, state.params, frozen, fresh_adapters, records, builder, recipe, folder, mesh, identity
        ).make()
        if checkpoints.latest is not None:
            state = _resume(checkpoints, state, batches, folder, resume)
        step = make_step(
            *(graph, optimizer, recipe),
            datasets=len(stats.datasets),
            reference=reference.graph,
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )
        log = _open_log(folder, recipe, state, console, tracking, identity)
        monitor = StepMonitor(model, records, stats.datasets, recipe, mesh, log)
        validate = Validation(graph, held_out, builder, recipe, mesh)
        evaluate = Evaluators(evaluators, graph, processor, mesh, folder, recipe.steps)
        run = _Run(recipe, state, frozen, reference.inputs, step, batches, checkpoints, validate, evaluate, monitor)
        steps = run.execute(folder / "profile" if profile else None)
    nnx.update(model, run.state.params)
    return TrainResult(stats, time.perf_counter() - started, steps)


def _local_sequences(recipe: Recipe, mesh: Mesh) -> slice:
    """Return which sequences of each batch this process feeds.

    Raises:
        UserError: a micro-batch cannot be spread evenly over the mesh.
    """
    try:
        local_rows(mesh, recipe.micro_batch_size)
        return local_rows(mesh, recipe.batch_size)
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}, micro-batches of {recipe.micro_batch_size}: {error}") from None


def _place(
    model: VisionLanguageModel, optimizer: optax.GradientTransformation, recipe: Recipe, mesh: Mesh
) -> tuple[nnx.GraphDef[VisionLanguageModel], TrainState, nnx.State[Any, Any]]:
    """Return the model's graph, the initial state and the frozen weights, both on the mesh."""
    graph, params, frozen = nnx.split(model, trainable_filter(recipe), ...)  # type: ignore[misc]
    params, frozen = shard_state(params, mesh), shard_state(frozen, mesh)
    # Moments are sharded as their parameters. Without out_shardings, jit replicates zeros: they depend on no input.
    moment_shardings = shardings(jax.eval_shape(optimizer.init, params), mesh)
    with jax.set_mesh(mesh):
        moments = jax.jit(optimizer.init, out_shardings=moment_shardings)(params)
        if recipe.offload:
            moments = jax.device_put(moments, jax.memory.Space.Host)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return graph, TrainState(params, moments, step), frozen


def _open_log(
    folder: Path,
    recipe: Recipe,
    state: TrainState,
    console: Console | None,
    tracking: Tracking | None,
    identity: dict[str, Any],
) -> MetricsLog:
    """Return the log of a run, from the step of its state on."""
    resumed = int(state.step)
    trackers = None if tracking is None else Trackers(tracking, folder, identity, resumed)
    return MetricsLog(folder, recipe.steps, resumed=resumed, label=recipe.name, console=console, trackers=trackers)


def _resume(checkpoints: RunCheckpoints, state: TrainState, batches: Any, folder: Path, allowed: bool) -> TrainState:
    """Return the newest checkpoint's state, with `batches` moved to its position.

    Raises:
        ResumeError: resuming is not allowed.
    """
    if not allowed:
        raise already_there(folder)
    state, position = checkpoints.restore(state)
    batches.set_state(position)
    _log.info("resumed from step %d", int(state.step))
    return state


@dataclasses.dataclass
class _Run:
    """A prepared run: everything its steps need, on the devices."""

    recipe: Recipe
    state: TrainState
    frozen: nnx.State[Any, Any]
    reference_inputs: Any
    step: Callable[..., tuple[TrainState, StepMetrics]]
    batches: Any
    checkpoints: RunCheckpoints
    validate: Validation
    evaluate: Evaluators
    monitor: StepMonitor

    @property
    def log(self) -> MetricsLog:
        """Where everything is logged."""
        return self.monitor.log

    def execute(self, trace: Path | None) -> int:
        """Take the remaining steps and return their number.

        Args:
            trace: folder for a profiler trace of a few steps.
        """
        first, last = int(self.state.step), self.recipe.steps
        with jax.set_mesh(self.evaluate.mesh), self.log, Preemption(self.recipe.save_minutes) as preemption:
            self._evaluate_at_start(first)
            self.log.start(first)
            for number in range(first + 1, last + 1):
                if trace and number == first + _PROFILED.start:
                    jax.profiler.start_trace(str(trace))
                self._take_step(number)
                if trace and number == min(first + _PROFILED.stop, last):
                    jax.block_until_ready(self.state)
                    jax.profiler.stop_trace()
                stop, due = preemption.requested(number), preemption.save_due(number)
                # A run that is to stop has no time to evaluate: the one that resumes it will.
                left = stop and number < last and bool(self.evaluate.due(number))
                metrics = {} if left else self._evaluate(number)
                if number % self.recipe.save_steps == 0 or number == last or stop or due or metrics:
                    self._save(number, metrics, evaluated=not left)
                if stop and number < last:
                    outcome = "is saved" if self.checkpoints.wait() else "could not be saved"
                    where = f"step {number} of {last} {outcome} in {self.checkpoints.folder}"
                    text = f"{where}; a run with the same arguments continues from there"
                    raise Preempted(text, preemption.signal_number)
        if not self.checkpoints.wait():
            raise TrainingFailed(
                f"step {last}: the last checkpoint could not be written; free disk space and run again"
            )
        return last - first

    def _take_step(self, number: int) -> None:
        requested = time.perf_counter()
        sequences = next(self.batches)
        batch = global_batch(sequences, self.evaluate.mesh, self.recipe.batch_size)
        waited = time.perf_counter() - requested
        with jax.transfer_guard("disallow"):  # a step must not copy between host and device
            self.state, metrics = self.step(self.state, self.frozen, batch, self.reference_inputs)
        self.monitor.after(number, metrics, sequences.records, waited)

    def _evaluate_at_start(self, first: int) -> None:
        """Evaluate the untrained model, or the checkpoint of a run that had to stop."""
        if first == 0:
            self._evaluate(first)
        elif not self.checkpoints.is_evaluated and self.evaluate.due(first):
            self._save(first, self._evaluate(first))

    def _evaluate(self, number: int) -> dict[str, float]:
        """Evaluate the model if that is due; return the checkpoint's metrics."""
        if not self.evaluate.due(number):
            return {}
        self.monitor.flush()
        self.log.note(number, "evaluating")
        found = self.evaluate(number, self.state.params, self.frozen)
        self.log.write_evaluation(number, found)
        self.monitor.restart_clock()
        return {} if found.score is None or not math.isfinite(found.score) else {SCORE: found.score}

    def _save(self, number: int, metrics: Mapping[str, float], *, evaluated: bool = True) -> None:
        self.monitor.flush()  # a state whose loss is not finite is never saved
        validation = self.validate(self.state.params, self.frozen) or {}
        self.log.write_validation(number, validation)
        self.checkpoints.save(self.state, self.batches.get_state(), {**validation, **metrics}, evaluated=evaluated)
