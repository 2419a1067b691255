"""Reference model of DPO: the same weights without adapters, or log-probabilities stored before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int32

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.packing import Batch
from reverie_jax.data.pipeline import TreeBuilder, ordered_batches
from reverie_jax.errors import UserError
from reverie_jax.files import atomic_path
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.sharding import global_batch, local_rows
from reverie_jax.train.objective import answer_logps, edge_logps
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.step import trainable_filter

STORED = "reference.npz"
"""File in a run folder: numbers of all answers and their log-probabilities under the reference."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """What a step needs to compute the reference's log-probabilities.

    Attributes:
        graph: the model with its adapters disabled; None for stored log-probabilities.
        inputs: with `graph`, the initial projector; else (int32 [N] answer numbers, ascending, float32 [N] logps).
    """

    graph: nnx.GraphDef[VisionLanguageModel] | None = None
    inputs: Any = None


@dataclasses.dataclass(frozen=True)
class ReferenceSpec:
    """The start of a run, which its reference is made from.

    Attributes:
        params: trainable parameters, on the mesh.
        frozen: frozen weights, on the mesh.
        fresh_adapters: the model without adapters is the model at the start.
        folder: run folder, for stored log-probabilities.
        identity: of the run (`run_identity`); stored log-probabilities belong to it alone.
    """

    model: VisionLanguageModel
    params: nnx.State[Any, Any]
    frozen: nnx.State[Any, Any]
    fresh_adapters: bool
    records: Sequence[ImageRecord]
    builder: TreeBuilder
    recipe: Recipe
    folder: Path
    mesh: Mesh
    identity: dict[str, Any]

    def make(self) -> ReferenceModel:
        """Return the reference that the recipe asks for; an empty one without preference tuning.

        Raises:
            UserError: the adapters are not fresh, so disabling them does not give the model at the start.
        """
        if self.recipe.preference is None:
            return ReferenceModel()
        if self.recipe.preference.reference == "stored":
            return self._stored()
        if not self.fresh_adapters:
            raise UserError(
                f"recipe {self.recipe.name}: preference.reference=adapters-off needs fresh adapters;"
                " set preference.reference=stored"
            )
        return adapters_off(self.model, self.recipe, self.params)

    def _stored(self) -> ReferenceModel:
        """Read the log-probabilities from the run folder, or compute and write them."""
        path = self.folder / STORED
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        found = _read(path, key) if jax.process_index() == 0 else None
        if multihost_utils.broadcast_one_to_all(np.asarray(found is not None)):
            numbers, logps = _from_process_0(found)
        else:
            numbers, logps = self._compute()
            if jax.process_index() == 0:
                with atomic_path(path) as part, part.open("wb") as file:
                    np.savez(file, numbers=numbers, logps=logps, key=np.asarray(key))
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def to_devices(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, replicated, lambda index: x[index])

        return ReferenceModel(None, (to_devices(numbers), to_devices(logps)))

    def _compute(self) -> tuple[Int32[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
        """Return the numbers of all answers, ascending, and their log-probabilities."""
        recipe, size = self.recipe, self.recipe.micro_batch_size
        graph, _, _ = nnx.split(self.model, trainable_filter(recipe), ...)  # type: ignore[misc]

        def score(
            params: nnx.State[Any, Any], frozen: nnx.State[Any, Any], batch: Batch
        ) -> tuple[Int[Array, "B Q"], Float[Array, "B Q"]]:
            return batch.questions, answer_logps(edge_logps(nnx.merge(graph, params, frozen), batch), batch)

        jitted = jax.jit(score, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        batches = ordered_batches(self.records, self.builder, batch_size=size, local=local_rows(self.mesh, size))
        all_numbers, all_logps = [], []
        _log.info("computing the reference log-probabilities of %d records", len(self.records))
        with jax.set_mesh(self.mesh):
            for batch in batches:
                numbers, logps = map(np.asarray, jitted(self.params, self.frozen, global_batch(batch, self.mesh, size)))
                all_numbers.append(numbers[numbers >= 0])
                all_logps.append(logps[numbers >= 0])
        joined = np.concatenate(all_numbers)
        order = np.argsort(joined)
        return joined[order].astype(np.int32), np.concatenate(all_logps)[order].astype(np.float32)


def adapters_off(model: VisionLanguageModel, recipe: Recipe, params: nnx.State[Any, Any]) -> ReferenceModel:
    """Return the model without its adapters as a reference; of `params` only the projector's are copied."""
    projector = nnx.filter_state(params, nnx.PathContains("projector"))
    # The step donates the original.
    return ReferenceModel(without_adapters(model, recipe), jax.tree.map(jnp.copy, projector))


def without_adapters(model: VisionLanguageModel, recipe: Recipe) -> nnx.GraphDef[VisionLanguageModel]:
    """Return the model's graph with its adapters disabled."""
    lora.set_adapters_enabled(model, False)
    graph, _, _ = nnx.split(model, trainable_filter(recipe), ...)  # type: ignore[misc]
    lora.set_adapters_enabled(model, True)
    return graph


def _read(path: Path, key: str) -> tuple[Int32[np.ndarray, "N"], Float32[np.ndarray, "N"]] | None:
    """Return the numbers and log-probabilities in a file; None if there is none, or that of another run."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return (file["numbers"], file["logps"]) if str(file["key"]) == key else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to compute it again") from None


def _from_process_0(
    found: tuple[Int32[np.ndarray, "N"], Float32[np.ndarray, "N"]] | None,
) -> tuple[Int32[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Return what process 0 has read, on every process."""
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(found[0]) if found else 0)))
    numbers, logps = found or (np.zeros(length, np.int32), np.zeros(length, np.float32))
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers)), np.asarray(
        multihost_utils.broadcast_one_to_all(logps)
    )
