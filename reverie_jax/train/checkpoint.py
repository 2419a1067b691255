"""Training state on disk: every use of Orbax is in this file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import identity
from reverie_jax.models.checkpoints.identity import Identity
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import TrainState, adapt, tuned

IDENTITY = "run.json"


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

    def __init__(self, folder: Path, recipe: Recipe, base: Identity):
        folder.mkdir(parents=True, exist_ok=True)
        # The projector is trained with the adapters: a run brings its own.
        frozen = {part: sum for part, sum in base.items() if part != "projector"}
        self.identity = {"base": frozen, "recipe": json.loads(recipe.to_json())}
        if (folder / IDENTITY).exists():
            found = read_identity(folder)
            for what, wanted in self.identity.items():
                if found[what] != wanted:
                    raise ResumeError(
                        f"{folder}: holds a run with another {what}; use a new folder, or the original arguments"
                    )
        else:
            part = folder / f"{IDENTITY}.part"
            part.write_text(json.dumps(self.identity, indent=2) + "\n", "utf-8")
            part.replace(folder / IDENTITY)
        self._saver = ocp.training.Checkpointer(
            os.fspath((folder / "checkpoints").resolve()),
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
            int(state.step), {**_plain(state), "data": data}, force=True, custom_metadata=self.identity
        )

    def restore(self, state: TrainState, data: Iterator[Any]) -> TrainState:
        """The newest checkpoint, laid out as `state` is; `data` moves to where it stood."""
        assert self.latest is not None
        target = {**_abstract(_plain(state)), "data": data}
        return _restore(state, self._saver.load_checkpointables(self.latest, target))

    def restore_params(self, params: nnx.State) -> nnx.State:
        """The newest checkpoint's trainable parameters alone, laid out as `params` are."""
        assert self.latest is not None
        target = {"params": _abstract(nnx.to_pure_dict(params))}
        nnx.replace_by_pure_dict(params, self._saver.load_checkpointables(self.latest, target)["params"])
        return params

    def close(self) -> None:
        """Waits for saves under way."""
        self._saver.close()


def read_identity(folder: Path) -> dict[str, Any]:
    """A run folder's recipe and base identity.

    Raises:
        ResumeError: it is no run folder, or its `run.json` is broken.
    """
    path = folder / IDENTITY
    try:
        found = json.loads(path.read_text("utf-8"))
        Recipe.from_json(json.dumps(found["recipe"]))
        return {"base": {str(part): str(sum) for part, sum in found["base"].items()}, "recipe": found["recipe"]}
    except OSError as error:
        raise ResumeError(f"{path}: cannot be read ({error.strerror}); `reverie train` writes it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResumeError(f"{path}: does not say what run this is ({error!r})") from None


def load_run(model: VisionLanguageModel, folder: Path) -> Recipe:
    """Puts a run's newest adapters and projector into the base that it was tuned on, in place.

    Returns:
        The run's recipe.

    Raises:
        ResumeError: the folder holds no run, or one that was tuned on another base.
    """
    recipe = Recipe.from_json(json.dumps(read_identity(folder)["recipe"]))
    checkpoints = RunCheckpoints(folder, recipe, identity(model))
    if checkpoints.latest is None:
        raise ResumeError(f"{folder}: no whole checkpoint here")
    adapt(model, recipe)
    params = nnx.state(model, tuned(recipe.tune))
    nnx.update(model, checkpoints.restore_params(params))
    checkpoints.close()
    return recipe
