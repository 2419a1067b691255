"""Training state on disk: every use of Orbax is in this file."""

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
from reverie_jax.models.checkpoints.identity import Checksums
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import TrainState, adapt, trainable_filter

IDENTITY = "run.json"

_log = logging.getLogger(__name__)


VALIDATION = "validation_loss"
"""The metric that the best checkpoint is the lowest of."""


class ResumeError(UserError):
    """A run folder that cannot be continued; the message says why."""


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries with string keys: what Orbax stores without knowing NNX.

    Parameters are an item of their own, so that they can be read without the optimizer.
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
    """Checkpoints of one run: adapters, projector, optimizer, step and the data's position; never the base.

    `run.json` in the folder says what run it is: a folder goes on under the same recipe and on the same base only.

    Args:
        folder: the run's; made if absent.
        base: identity of the frozen weights.

    Raises:
        ResumeError: the folder holds a run with another recipe, or on another base.
    """

    def __init__(self, folder: Path, recipe: Recipe, base: Checksums):
        folder.mkdir(parents=True, exist_ok=True)
        # The projector is trained with the adapters: a run brings its own.
        frozen = {part: sum for part, sum in base.items() if part != "projector"}
        self.base_checksums = {"base": frozen, "recipe": json.loads(recipe.to_json())}
        if (folder / IDENTITY).exists():
            found = read_identity(folder)
            for what, wanted in self.base_checksums.items():
                if found[what] != wanted:
                    raise ResumeError(
                        f"{folder}: holds a run with another {what}; use a new folder, or the original arguments"
                    )
        elif jax.process_index() == 0:
            write_json(folder / IDENTITY, self.base_checksums)
        self._folder = (folder / "checkpoints").resolve()
        keep = ocp.training.preservation_policies
        policy = keep.LatestN(recipe.keep_checkpoints)
        if recipe.holdout:
            best = keep.BestN(get_metric_fn=lambda metrics: metrics[VALIDATION], reverse=True, n=1)
            policy = keep.AnyPreservationPolicy([policy, best])
        self._saver = ocp.training.Checkpointer(
            os.fspath(self._folder), preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._under_way: tuple[int, Any] | None = None
        self._whole = True  # whether the last save came to a checkpoint

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return None if self._saver.latest is None else self._saver.latest.step

    def save(self, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts a save; the arrays are copied before this returns, the files are written behind training.

        A save that fails (a full disk) is reported and leaves nothing; training may go on, and save again later.

        Args:
            data: the batches' position, the same on every host.
            metrics: `VALIDATION`, where records are held out.
        """
        self.settle()
        step, self._whole = int(state.step), True
        try:
            response = self._saver.save_checkpointables_async(
                step,
                _plain(state),
                force=True,
                metrics=metrics,
                custom_metadata={**self.base_checksums, "data": data},
            )
            self._under_way = None if response is None else (step, response)
        except Exception as error:  # Orbax and tensorstore raise what they like: OSError, ValueError, XlaRuntimeError
            self._failed(step, error)

    def settle(self) -> bool:
        """Waits for the save under way; whether the last one came to a whole checkpoint."""
        if self._under_way is not None:
            (step, response), self._under_way = self._under_way, None
            try:
                response.result()
            except Exception as error:
                self._failed(step, error)
        return self._whole

    def _failed(self, step: int, error: Exception) -> None:
        self._whole = False
        _log.error("the checkpoint of step %d was not written: %s", step, " ".join(str(error).split())[:500])
        for part in self._folder.glob(f"{step}.*"):  # what Orbax calls a checkpoint that is not whole
            shutil.rmtree(part, ignore_errors=True)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, laid out as `state` is, and where the batches stood."""
        assert self.latest is not None
        loaded = self._saver.load_checkpointables(self.latest, _abstract(_plain(state)))
        found = self._saver.checkpointables_metadata(self.latest).custom_metadata
        return _restore(state, loaded), found["data"]

    @property
    def best(self) -> int | None:
        """The step with the lowest loss on what was held out; the newest where nothing was."""
        scored = [
            (point.metrics[VALIDATION], point.step)
            for point in self._saver.checkpoints
            if point.metrics and VALIDATION in point.metrics
        ]
        return min(scored)[1] if scored else self.latest

    def restore_params(self, params: nnx.State) -> nnx.State:
        """The best checkpoint's trainable parameters alone, laid out as `params` are."""
        assert self.best is not None
        target = {"params": _abstract(nnx.to_pure_dict(params))}
        nnx.replace_by_pure_dict(params, self._saver.load_checkpointables(self.best, target)["params"])
        return params

    def close(self) -> None:
        """Waits for saves under way."""
        self.settle()
        self._saver.close()


def read_identity(folder: Path) -> dict[str, Any]:
    """A run folder's recipe and base identity.

    Raises:
        ResumeError: it is no run folder, or its `run.json` is broken.
    """
    path = folder / IDENTITY
    try:
        found = json.loads(path.read_text("utf-8"))
        # Fields that came later have the value that does what was done without them.
        recipe = json.loads(Recipe.from_json(json.dumps(found["recipe"])).to_json())
        return {"base": {str(part): str(sum) for part, sum in found["base"].items()}, "recipe": recipe}
    except OSError as error:
        raise ResumeError(f"{path}: cannot be read ({error.strerror}); `reverie train` writes it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResumeError(f"{path}: does not say what run this is ({error!r})") from None


def load_run(model: VisionLanguageModel, folder: Path) -> Recipe:
    """Puts a run's adapters and projector into the base that it was tuned on, in place: the newest, or the best on records
    that were held out. What was tuned of the base itself gets the base's types again.

    Returns:
        The run's recipe.

    Raises:
        ResumeError: the folder holds no run, or one that was tuned on another base.
    """
    recipe = Recipe.from_json(json.dumps(read_identity(folder)["recipe"]))
    checkpoints = RunCheckpoints(folder, recipe, base_checksums(model))
    if checkpoints.latest is None:
        raise ResumeError(f"{folder}: no whole checkpoint here")
    kinds = {path: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    adapt(model, recipe)
    params = checkpoints.restore_params(nnx.state(model, trainable_filter(recipe.trainable)))
    nnx.update(model, nnx.map_state(lambda path, x: x.replace(x.get_value().astype(kinds.get(path, x.dtype))), params))
    checkpoints.close()
    return recipe
