"""Checkpoints of a run: the only file that uses Orbax."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
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
SCORE, VALIDATION = "score", "validation_loss"
"""Names of the metrics by which the best checkpoint is chosen: the highest score, or the lowest loss if none has a score."""
LATEST, BEST = "latest", "best"
"""Names of checkpoints, as in `runs/mine@best`; a step is the third."""


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


def find_run(run: str | Path) -> tuple[Path, str]:
    """Return the folder of a run, and which of its checkpoints is meant.

    Args:
        run: the folder; or FOLDER@best, FOLDER@latest or FOLDER@STEP.

    Returns:
        The folder, and `BEST`, `LATEST` or a step; empty for the best if any is scored, or else the newest.
    """
    named = re.fullmatch(rf"(.+)@({BEST}|{LATEST}|\d+)", str(run))
    if named is None or Path(run).exists() or not (Path(named[1]) / IDENTITY).exists():
        return Path(run), ""
    return Path(named[1]), named[2]


def _best(checkpoints: Sequence[Any]) -> int | None:
    """Return the step of the checkpoint with the best metrics; None if none has any."""

    def steps(metric: str, sign: int) -> list[tuple[float, int]]:
        return [(sign * one.metrics[metric], one.step) for one in checkpoints if one.metrics and metric in one.metrics]

    ranked = steps(SCORE, -1) or steps(VALIDATION, 1)
    return min(ranked)[1] if ranked else None


class _KeepBest(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the best checkpoint."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = _best(checkpoints)
        return [checkpoint.step == best for checkpoint in checkpoints]


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
        policy = policies.AnyPreservationPolicy([policies.LatestN(recipe.keep_checkpoints), _KeepBest()])
        self._checkpointer = ocp.training.Checkpointer(
            os.fspath(self._checkpoints), preservation_policy=policy, cleanup_tmp_directories=identity is not None
        )
        self._pending: int | None = None
        self._last_save_succeeded = True

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return None if self._checkpointer.latest is None else self._checkpointer.latest.step

    def save(
        self,
        state: TrainState,
        data: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        evaluated: bool = True,
    ) -> None:
        """Start a save: copy the arrays now, write the files in the background.

        A save that fails (for example on a full disk) is logged and its files are removed; training may continue.

        Args:
            state: to save.
            data: position of the batches, the same on every host.
            metrics: `VALIDATION` if records are held out, `SCORE` if the model was evaluated.
            evaluated: False for a state whose evaluation is due and left to the run that resumes. It saves the state again.
        """
        self.wait()
        self._remove_incomplete()
        step, self._last_save_succeeded = int(state.step), True
        try:
            response = self._checkpointer.save_checkpointables_async(
                step,
                _plain(state),
                force=True,
                overwrite=step == self.latest,
                metrics=dict(metrics) if metrics else None,
                custom_metadata={**(self.identity or {}), "data": data, "evaluated": evaluated},
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
        return _restore(state, loaded), self._metadata["data"]

    @property
    def is_evaluated(self) -> bool:
        """Whether no evaluation of the newest checkpoint is left to do (see `save`)."""
        return self.latest is None or self._metadata.get("evaluated", True)

    @property
    def _metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = self._checkpointer.checkpointables_metadata(self.latest).custom_metadata
        return metadata

    @property
    def best(self) -> int | None:
        """Step with the best score, or else with the lowest validation loss; the newest without either."""
        found = _best(self._checkpointer.checkpoints)
        return self.latest if found is None else found

    def find(self, which: str) -> int:
        """Return the step of a checkpoint by its name (see `find_run`).

        Raises:
            ResumeError: there is no such checkpoint.
        """
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        if not steps:
            raise ResumeError(f"{self.folder}: has no complete checkpoint")
        named = {"": self.best, LATEST: self.latest, BEST: _best(self._checkpointer.checkpoints)}
        step = named[which] if which in named else int(which)
        if step is None or step not in steps:
            missing = "no scored checkpoint (train with --eval or holdout)" if which == BEST else "no such checkpoint"
            raise ResumeError(f"{self.folder}@{which}: {missing}; there are {', '.join(map(str, sorted(steps)))}")
        return step

    def restore_params(self, params: nnx.State[Any, Any], step: int) -> nnx.State[Any, Any]:
        """Return only the trained parameters of a step's checkpoint, sharded as `params` are."""
        target = {"params": _abstract(nnx.to_pure_dict(params))}
        nnx.replace_by_pure_dict(params, self._checkpointer.load_checkpointables(step, target)["params"])
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


def load_run(model: VisionLanguageModel, run: str | Path) -> Recipe:
    """Load a run's trained parameters into its base model, in place. Parameters of the base model keep their dtypes.

    Args:
        model: the base model.
        run: as for `find_run`.

    Returns:
        The run's recipe.

    Raises:
        ResumeError: the folder holds no such checkpoint, or the run has another base model.
    """
    folder, which = find_run(run)
    stored = read_identity(folder)
    recipe = Recipe.from_json(json.dumps(stored["recipe"]))
    check_identity(folder, stored, {"base": frozen_checksums(model)})
    checkpoints = RunCheckpoints(folder, recipe)
    step = checkpoints.find(which)
    dtypes = {path: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    make_trainable(model, recipe)
    params = checkpoints.restore_params(nnx.state(model, trainable_filter(recipe)), step)

    def dtype_of(path: tuple[Any, ...], leaf: Any) -> Any:
        made = "expert_layers" in path and "router" not in path and not isinstance(leaf, nnx.LoRAParam)
        return dtypes.get(path, model.compute_dtype if made else leaf.dtype)

    nnx.update(model, nnx.map_state(lambda path, x: x.replace(x.get_value().astype(dtype_of(path, x))), params))
    checkpoints.close()
    return recipe
