"""Checkpoints of a run: the only file that uses Orbax."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from reverie_jax.errors import UserError
from reverie_jax.files import write_json
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.models.checkpoints.checksums import Checksums
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import TrainState, make_trainable, trainable_filter

IDENTITY = "run.json"

_log = logging.getLogger(__name__)


VALIDATION = "validation_loss"
"""Name of the metric by which the best checkpoint is chosen (lowest)."""


class ResumeError(UserError):
    """A run folder that cannot be resumed."""


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


class RunCheckpoints:
    """Checkpoints of one run: trained parameters, optimizer, step and data position; never the frozen weights.

    `run.json` in the folder identifies the run: only the same recipe on the same base model can continue it.

    Args:
        folder: run folder; created if missing.
        base: checksums of the base model's parts.

    Raises:
        ResumeError: the folder holds a run with another recipe or base model.
    """

    def __init__(self, folder: Path, recipe: Recipe, base: Checksums):
        folder.mkdir(parents=True, exist_ok=True)
        # The projector is trained: a run has its own.
        frozen = {part: checksum for part, checksum in base.items() if part != "projector"}
        self.identity = {"base": frozen, "recipe": json.loads(recipe.to_json())}
        if (folder / IDENTITY).exists():
            existing = read_identity(folder)
            for key, name in (("base", "base model"), ("recipe", "recipe")):
                if existing[key] != self.identity[key]:
                    raise ResumeError(
                        f"{folder}: holds a run with another {name}; use a new folder, or the original arguments"
                    )
        elif jax.process_index() == 0:
            write_json(folder / IDENTITY, self.identity)
        self._folder = (folder / "checkpoints").resolve()
        policies = ocp.training.preservation_policies
        policy = policies.LatestN(recipe.keep_checkpoints)
        if recipe.holdout:
            best = policies.BestN(get_metric_fn=lambda metrics: metrics[VALIDATION], reverse=True, n=1)
            policy = policies.AnyPreservationPolicy([policy, best])
        self._checkpointer = ocp.training.Checkpointer(
            os.fspath(self._folder), preservation_policy=policy, cleanup_tmp_directories=True
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
                custom_metadata={**self.identity, "data": data},
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
        for part in self._folder.glob("*.orbax-checkpoint-tmp"):
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


def read_identity(folder: Path) -> dict[str, Any]:
    """Read a run folder's `run.json`.

    Returns:
        {"base": checksums of the base model's parts, "recipe": fields of the recipe}.

    Raises:
        ResumeError: the file is missing or invalid.
    """
    path = folder / IDENTITY
    try:
        content = json.loads(path.read_text("utf-8"))
        # Fields that the file lacks get their defaults.
        recipe = json.loads(Recipe.from_json(json.dumps(content["recipe"])).to_json())
        return {"base": {str(part): str(checksum) for part, checksum in content["base"].items()}, "recipe": recipe}
    except OSError as error:
        raise ResumeError(f"{path}: cannot be read ({error.strerror}); `reverie train` writes it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResumeError(f"{path}: does not identify a run ({error!r})") from None


def load_run(model: VisionLanguageModel, folder: Path) -> Recipe:
    """Load a run's trained parameters into its base model, in place: the best on held-out records, or the newest.

    Parameters of the base model keep their dtypes.

    Returns:
        The run's recipe.

    Raises:
        ResumeError: the folder holds no checkpoint, or the run has another base model.
    """
    recipe = Recipe.from_json(json.dumps(read_identity(folder)["recipe"]))
    checkpoints = RunCheckpoints(folder, recipe, base_checksums(model))
    if checkpoints.latest is None:
        raise ResumeError(f"{folder}: has no complete checkpoint")
    dtypes = {path: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    make_trainable(model, recipe)
    params = checkpoints.restore_params(nnx.state(model, trainable_filter(recipe.trainable)))
    nnx.update(model, nnx.map_state(lambda path, x: x.replace(x.get_value().astype(dtypes.get(path, x.dtype))), params))
    checkpoints.close()
    return recipe
