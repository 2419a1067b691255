"""The training loop, top to bottom: adapt, resume, step, log, save."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import Survey, survey, training_batches
from reverie_jax.data.processor import Processor
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import identity
from reverie_jax.models.sharding import batch_sharding, make_mesh, place, shardings
from reverie_jax.train.checkpoint import ResumeError, RunCheckpoints
from reverie_jax.train.metrics import MetricsLog
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import TrainState, adapt, make_optimizer, make_step, schedule, tuned

_log = logging.getLogger(__name__)


class TrainingFailed(UserError):
    """Training that must not go on: the loss is no number any more."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves in memory; the rest is in its folder."""

    survey: Survey
    seconds: float
    steps: int


def train(
    model: VisionLanguageModel,
    processor: Processor,
    source: Sequence[ImageRecord],
    recipe: Recipe,
    folder: Path,
    *,
    mesh: Mesh | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> TrainResult:
    """Tunes `model` in place with fresh adapters, and leaves checkpoints and metrics in `folder`.

    Args:
        source: records, by index.
        mesh: devices; one by default.
        resume: go on from the newest checkpoint in `folder`, if there is one; otherwise there must be none.

    Raises:
        DataError: a record does not fit the recipe's rows.
        ResumeError: the folder holds a run that is not this one.
        TrainingFailed: the loss became NaN or infinite; the step is named.
    """
    started = time.perf_counter()
    mesh = mesh or make_mesh()
    if recipe.template is not None:
        processor = processor.using(recipe.template)
    if recipe.aspect is not None:
        processor = dataclasses.replace(processor, aspect=recipe.aspect)
    found = survey(source, processor, recipe.row, recipe.teach, sharing=recipe.sharing)
    recipe = dataclasses.replace(recipe, steps=recipe.steps_for(found.rows))
    base = identity(model)
    adapt(model, recipe)
    graph, params, frozen = nnx.split(model, tuned(recipe.tune), ...)  # type: ignore[misc]
    params, frozen = place(params, mesh), place(frozen, mesh)
    optimizer = make_optimizer(recipe)
    # Moments lie as the parameters that they belong to. It must be said: zeros depend on none, and jit would replicate them.
    homes = shardings(jax.eval_shape(optimizer.init, params), mesh)
    with jax.set_mesh(mesh):
        moments = jax.jit(optimizer.init, out_shardings=homes)(params)
        state = TrainState(params, moments, jax.jit(lambda: jnp.zeros((), jnp.int32))())
    batches = iter(
        training_batches(
            source,
            processor,
            recipe.row,
            rows=recipe.rows,
            teaching=recipe.teach,
            sharing=recipe.sharing,
            seed=recipe.seed,
        )
    )
    # Left by an error or Ctrl-C, the block still waits for saves under way.
    with contextlib.closing(batches), contextlib.closing(RunCheckpoints(folder, recipe, base)) as checkpoints:
        if checkpoints.latest is not None:
            if not resume:
                raise ResumeError(f"{folder}: holds a run already; resume it, or choose another folder")
            state = checkpoints.restore(state, batches)
            _log.info("resumed from step %d", int(state.step))
        first, rows = int(state.step), batch_sharding(mesh)
        step = make_step(graph, optimizer, recipe)
        log = MetricsLog(folder, recipe.steps, resumed=first, label=recipe.name, console=console)
        with jax.set_mesh(mesh), log:
            for number in range(first + 1, recipe.steps + 1):
                asked = time.perf_counter()
                batch = jax.device_put(next(batches), rows)
                fed = time.perf_counter()
                state, metrics = step(state, frozen, batch)
                # Reading the numbers waits for the step; the next batch is being made meanwhile.
                values = {name: float(value) for name, value in metrics._asdict().items()}
                seconds = time.perf_counter() - asked
                if not math.isfinite(values["loss"]):
                    raise TrainingFailed(
                        f"step {number}: the loss is {values['loss']}; lower the rate or clip gradients"
                    )
                log.write(number, _speeds(values, seconds, fed - asked, recipe) | _rates(number, recipe))
                if number % recipe.save_every == 0 or number == recipe.steps:
                    checkpoints.save(state, batches)
    nnx.update(model, state.params)
    return TrainResult(found, time.perf_counter() - started, recipe.steps - first)


def _rates(step: int, recipe: Recipe) -> dict[str, float]:
    """Learning rates of the step that was just taken (schedules count from zero)."""
    return {
        "rate": float(schedule(recipe.rate, recipe)(step - 1)),
        "projector_rate": float(schedule(recipe.projector_rate, recipe)(step - 1)),
    }


def _speeds(values: dict[str, float], seconds: float, waited: float, recipe: Recipe) -> dict[str, float]:
    """A step's metrics, with how fast and how full it was."""
    return {
        **values,
        "tokens_per_second": values["tokens"] / seconds,
        "supervised_per_second": values["supervised"] / seconds,
        "packing": values["tokens"] / (recipe.rows * recipe.row.tokens),
        "input_wait": waited / seconds,
    }
