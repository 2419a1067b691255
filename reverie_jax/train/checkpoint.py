"""Training state on disk: every use of Orbax is in this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import TrainState


class ResumeError(ValueError):
    """A run folder that cannot be continued; the message says why."""


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries with string keys: what Orbax stores without knowing NNX."""
    return {
        "params": nnx.to_pure_dict(state.params),
        "optimizer": {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.optimizer))},
        "step": state.step,
    }


def _restore(state: TrainState, plain: dict[str, Any]) -> TrainState:
    nnx.replace_by_pure_dict(state.params, plain["params"])
    leaves = [plain["optimizer"][str(i)] for i in range(len(plain["optimizer"]))]
    optimizer = jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves)
    return TrainState(state.params, optimizer, plain["step"])


class RunCheckpoints:
    """Checkpoints of one run: adapters, projector, optimizer, step and the data's position; never the base.

    Args:
        folder: where they go; made if absent.
        recipe: saved beside them; a run resumes under the same recipe only.
        base: fingerprint of the frozen weights; a run resumes on the same base only.
    """

    def __init__(self, folder: Path, recipe: Recipe, base: str):
        self.folder, self.identity = folder, {"recipe": recipe.to_json(), "base": base}
        self._saver = ocp.training.Checkpointer(
            os.fspath(folder.resolve()),
            preservation_policy=ocp.training.preservation_policies.LatestN(recipe.keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return None if self._saver.latest is None else self._saver.latest.step

    def save(self, state: TrainState, data: Iterator[Any]) -> None:
        """Starts a save; the arrays are copied before this returns, the files are written behind training."""
        self._saver.save_checkpointables_async(
            int(state.step), {"state": _plain(state), "data": data}, force=True, custom_metadata=self.identity
        )

    def restore(self, state: TrainState, data: Iterator[Any]) -> TrainState:
        """The newest checkpoint, laid out as `state` is; `data` moves to where it stood.

        Raises:
            ResumeError: it was written under another recipe or on another base.
        """
        step = self.latest
        assert step is not None
        found = self._saver.checkpointables_metadata(step).custom_metadata or {}
        for what, wanted in self.identity.items():
            if found.get(what) != wanted:
                raise ResumeError(
                    f"{self.folder}: the checkpoint of step {step} was written under another {what}; "
                    "use a new folder, or the original arguments"
                )
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state))
        loaded = self._saver.load_checkpointables(step, {"state": target, "data": data})
        return _restore(state, loaded["state"])

    def close(self) -> None:
        """Waits for saves under way."""
        self._saver.close()


def load_trained(model: Any, folder: Path) -> None:
    """Puts a finished run's adapters and projector into a model that carries adapters of the same shape, in place."""
    saver = ocp.training.Checkpointer(os.fspath(folder.resolve()))
    if saver.latest is None:
        raise ResumeError(f"{folder}: no checkpoint here")
    loaded = saver.load_checkpointables(saver.latest.step, {"state": None})
    nnx.update(model, loaded["state"]["params"])
    saver.close()
