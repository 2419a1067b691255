"""Checkpoints of a run: the only file that uses Orbax."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.files import write_json
from reverie_jax.models import VisionLanguageModel
from reverie_jax.train.identity import (
    IDENTITY,
    ResumeError,
    already_there,
    check_identity,
    frozen_checksums,
    read_identity,
    recipe_fields,
    records_digest,
)
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.step import TrainState, make_trainable, trainable_filter

_log = logging.getLogger(__name__)

LOCK = "run.lock"
"""File of a run folder that the training process holds locked."""
VALIDATION = "validation_loss"
"""Name of the metric by which the best checkpoint is chosen (lowest)."""


def _plain(state: TrainState) -> dict[str, Any]:
    """Return the state as nested dictionaries with string keys, which Orbax stores without knowing NNX.

    Parameters are a separate item, so that they can be read without the optimizer.
    """
    moments = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    return {"params": nnx.to_pure_dict(state.params), "optimizer": {"leaves": moments, "step": state.step}}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _restore(state: TrainState, plain: dict[str, Any]) -> TrainState:
    nnx.replace_by_pure_dict(state.params, plain["params"])
    leaves = plain["optimizer"]["leaves"]
    ordered = [leaves[str(i)] for i in range(len(leaves))]
    optimizer = jax.tree.unflatten(jax.tree.structure(state.optimizer), ordered)
    return TrainState(state.params, optimizer, plain["optimizer"]["step"])


def _checkpoints_of(folder: Path) -> Path:
    return (folder / "checkpoints").resolve()


def newest_step(folder: Path) -> int | None:
    """Return the step of a run folder's newest complete checkpoint; None if there is none."""
    path = _checkpoints_of(folder)
    if not path.is_dir():
        return None
    with contextlib.closing(ocp.training.Checkpointer(os.fspath(path))) as checkpointer:
        return None if checkpointer.latest is None else checkpointer.latest.step


def _lock(folder: Path) -> TextIOWrapper | None:
    """Lock a run folder until the file is closed; None where the file system has no locks.

    Raises:
        ResumeError: another run trains in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise ResumeError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ResumeError(f"{folder}: another run is training in it; wait for it, or choose another folder") from None
    except OSError:
        file.close()
        return None
    return file


def _claim(folder: Path, identity: dict[str, Any]) -> TextIOWrapper | None:
    """Make a folder a run's own, and return its lock; nothing else in it is touched.

    Raises:
        ResumeError: it holds a checkpoint of another run, or one is training in it.
    """
    locked = _lock(folder) if jax.process_index() == 0 else None
    try:
        if newest_step(folder) is not None:
            check_identity(folder, read_identity(folder), identity)
        elif jax.process_index() == 0:
            write_json(folder / IDENTITY, identity)
    except BaseException:
        if locked is not None:
            locked.close()
        raise
    return locked


class RunCheckpoints:
    """Checkpoints of one run: trained parameters, optimizer, step and data position; never the frozen weights.

    `run.json` in the folder identifies the run (see `run_identity`): nothing else may continue it. A folder without a
    checkpoint belongs to nobody: what an ended run left there is replaced.

    Args:
        folder: run folder; created if missing.
        recipe: of the run.
        identity: of the run that is to train; None only reads the checkpoints, whoever writes them at the same time.

    Raises:
        ResumeError: the folder holds a checkpoint of another run, or one is training in it.
    """

    def __init__(self, folder: Path, recipe: Recipe, identity: dict[str, Any] | None = None):
        # Before the checkpoints are opened to write, which removes saves in progress.
        self._locked = None if identity is None else _claim(folder, identity)
        self.folder, self.identity = folder, identity
        self._checkpoints = _checkpoints_of(folder)
        policies = ocp.training.preservation_policies
        policy = policies.LatestN(recipe.keep_checkpoints)
        if recipe.holdout:
            best = policies.BestN(get_metric_fn=lambda metrics: metrics[VALIDATION], reverse=True, n=1)
            policy = policies.AnyPreservationPolicy([policy, best])
        self._checkpointer = ocp.training.Checkpointer(
            os.fspath(self._checkpoints), preservation_policy=policy, cleanup_tmp_directories=identity is not None
        )
        self._pending: int | None = None
        self._last_save_succeeded = True

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return None if self._checkpointer.latest is None else self._checkpointer.latest.step

    def save(self, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Start a save: copy the arrays now, write the files in the background.

        A save that fails (for example on a full disk) is logged and its files are removed; training may continue.

        Args:
            state: to save.
            data: position of the batches, the same on every host.
            metrics: `VALIDATION` if records are held out.
        """
        self.wait()
        self._remove_incomplete()
        step, self._last_save_succeeded = int(state.step), True
        try:
            response = self._checkpointer.save_checkpointables_async(
                step,
                _plain(state),
                force=True,
                metrics=metrics,
                custom_metadata={**(self.identity or {}), "data": data},
            )
            self._pending = None if response is None else step
        except Exception as error:  # Orbax and tensorstore raise OSError, ValueError, XlaRuntimeError and others
            self._failed(step, error)

    def wait(self) -> bool:
        """Wait for the save in progress; return whether the last save succeeded."""
        if self._pending is not None:
            step, self._pending = self._pending, None
            try:
                # Not by the save's response: Orbax raises an error once in each thread, and there it has its own. The next
                # save would raise it again, and be lost too.
                self._checkpointer.wait()
            except Exception as error:
                self._failed(step, error)
        return self._last_save_succeeded

    def _failed(self, step: int, error: Exception) -> None:
        self._last_save_succeeded = False
        _log.error("the checkpoint of step %d was not written: %s", step, " ".join(str(error).split())[:500])
        self._remove_incomplete()

    def _remove_incomplete(self) -> None:
        """Remove the files of failed saves. Orbax's threads may write more of them after the error: done again later."""
        if self.identity is not None:
            for part in self._checkpoints.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(part, ignore_errors=True)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest checkpoint, sharded as `state` is, and the position of the batches."""
        assert self.latest is not None
        loaded = self._checkpointer.load_checkpointables(self.latest, _abstract(_plain(state)))
        metadata = self._checkpointer.checkpointables_metadata(self.latest).custom_metadata
        return _restore(state, loaded), metadata["data"]

    @property
    def best(self) -> int | None:
        """Step with the lowest validation loss; the newest without held-out records."""
        scored = [
            (checkpoint.metrics[VALIDATION], checkpoint.step)
            for checkpoint in self._checkpointer.checkpoints
            if checkpoint.metrics and VALIDATION in checkpoint.metrics
        ]
        return min(scored)[1] if scored else self.latest

    def restore_params(self, params: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
        """Return only the trained parameters of the best checkpoint, sharded as `params` are."""
        assert self.best is not None
        target = {"params": _abstract(nnx.to_pure_dict(params))}
        nnx.replace_by_pure_dict(params, self._checkpointer.load_checkpointables(self.best, target)["params"])
        return params

    def close(self) -> None:
        """Wait for the save in progress and close the checkpointer."""
        self.wait()
        self._remove_incomplete()
        self._checkpointer.close()
        if self._locked is not None:
            self._locked.close()


class Progress(NamedTuple):
    """How far a run is: the step of its newest checkpoint, and its number of steps."""

    step: int
    steps: int

    @property
    def is_complete(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.steps


def find_progress(
    folder: Path, recipe: Recipe, records: Sequence[ImageRecord], *, resume: bool = True
) -> Progress | None:
    """Return the progress of a run that is to be continued, None if the folder has no checkpoint; no model is needed.

    Args:
        folder: run folder.
        recipe: of the run.
        records: all records, held-out ones included.
        resume: see `finetune`.

    Raises:
        ResumeError: the run has another recipe or other records (the fields that differ are named), or `resume` is False.
    """
    latest = newest_step(folder)
    if latest is None:
        return None
    if not resume:
        raise already_there(folder)
    stored, wanted = read_identity(folder), recipe_fields(recipe)
    if not recipe.steps:  # the data determine them
        wanted["steps"] = stored["recipe"]["steps"]
    check_identity(folder, stored, {"recipe": wanted})
    check_identity(folder, stored, {"records": records_digest(records)})
    return Progress(latest, stored["recipe"]["steps"])


def load_run(model: VisionLanguageModel, folder: Path) -> Recipe:
    """Load a run's trained parameters into its base model, in place: the best on held-out records, or the newest.

    Parameters of the base model keep their dtypes.

    Returns:
        The run's recipe.

    Raises:
        ResumeError: the folder holds no checkpoint, or the run has another base model.
    """
    stored = read_identity(folder)
    recipe = Recipe.from_json(json.dumps(stored["recipe"]))
    check_identity(folder, stored, {"base": frozen_checksums(model)})
    checkpoints = RunCheckpoints(folder, recipe)
    if checkpoints.latest is None:
        raise ResumeError(f"{folder}: has no complete checkpoint")
    dtypes = {path: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    make_trainable(model, recipe)
    params = checkpoints.restore_params(nnx.state(model, trainable_filter(recipe)))

    def dtype_of(path: tuple[Any, ...], leaf: Any) -> Any:
        made = "expert_layers" in path and "router" not in path and not isinstance(leaf, nnx.LoRAParam)
        return dtypes.get(path, model.compute_dtype if made else leaf.dtype)

    nnx.update(model, nnx.map_state(lambda path, x: x.replace(x.get_value().astype(dtype_of(path, x))), params))
    checkpoints.close()
    return recipe
