"""Where preference tuning's reference sums come from."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.packing import Batch
from reverie_jax.data.pipeline import every_batch
from reverie_jax.data.processor import Processor
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.sharding import feed, local_rows
from reverie_jax.train.objective import answer_sums, edge_logps
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import trainable_filter

STORED = "reference.npz"
"""In a run folder: the answers' numbers and their sums under the reference."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """What a step needs for the reference's sums.

    Attributes:
        graph: the model with its adapters at rest; None for stored sums.
        held: the projector as it was, to go with it; or the answers' numbers, sorted, and their sums.
    """

    graph: nnx.GraphDef[VisionLanguageModel] | None = None
    held: Any = None


def find_reference(
    model: VisionLanguageModel,
    fresh: bool,
    params: nnx.State,
    frozen: nnx.State,
    processor: Processor,
    records: Sequence[ImageRecord],
    recipe: Recipe,
    folder: Path,
    mesh: Mesh,
) -> ReferenceModel:
    """The reference that the recipe asks for, from the model as it starts.

    Args:
        fresh: the model without its adapters is the model as it starts.
        params, frozen: its parts, placed.

    Raises:
        UserError: the adapters cannot be switched off for it.
    """
    assert recipe.preference is not None
    if recipe.preference.reference == "stored":
        graph, _, _ = nnx.split(model, trainable_filter(recipe.trainable), ...)  # type: ignore[misc]
        return stored(graph, params, frozen, processor, records, recipe, folder, mesh)
    if not fresh:
        raise UserError(
            f"recipe {recipe.name}: without fresh adapters there is none to switch off for the reference;"
            " set preference.reference=stored"
        )
    return adapters_off(model, recipe, params)


def adapters_off(model: VisionLanguageModel, recipe: Recipe, params: nnx.State) -> ReferenceModel:
    """The model without its adapters: no second copy of anything but the projector.

    Args:
        params: what is tuned, placed.
    """
    held = nnx.filter_state(params, nnx.PathContains("projector"))
    return ReferenceModel(
        without_adapters(model, recipe), jax.tree.map(jnp.copy, held)
    )  # the step donates the original


def without_adapters(model: VisionLanguageModel, recipe: Recipe) -> nnx.GraphDef[VisionLanguageModel]:
    """The model's graph with its adapters at rest."""
    lora.switch(model, on=False)
    graph, _, _ = nnx.split(model, trainable_filter(recipe.trainable), ...)  # type: ignore[misc]
    lora.switch(model, on=True)
    return graph


def stored(
    graph: nnx.GraphDef[VisionLanguageModel],
    params: nnx.State,
    frozen: nnx.State,
    processor: Processor,
    records: Sequence[ImageRecord],
    recipe: Recipe,
    folder: Path,
    mesh: Mesh,
) -> ReferenceModel:
    """The sums of every answer under the model as it starts, counted once and kept in the run folder."""
    path = folder / STORED
    if multihost_utils.broadcast_one_to_all(np.asarray(path.exists())):
        numbers, sums = _read(path)
    else:
        numbers, sums = _count(graph, params, frozen, processor, records, recipe, mesh)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{STORED}.part"
            with part.open("wb") as file:
                np.savez(file, numbers=numbers, sums=sums)
            os.replace(part, path)
    whole = NamedSharding(mesh, PartitionSpec())

    def everywhere(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    return ReferenceModel(None, (everywhere(numbers), everywhere(sums)))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first host's file, on every host."""
    try:
        found = np.load(path) if jax.process_index() == 0 else None
        length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(found["numbers"]) if found else 0)))
        numbers = found["numbers"] if found else np.zeros(length, np.int32)
        sums = found["sums"] if found else np.zeros(length, np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and it is counted again") from None
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers)), np.asarray(
        multihost_utils.broadcast_one_to_all(sums)
    )


def _count(
    graph: nnx.GraphDef[VisionLanguageModel],
    params: nnx.State,
    frozen: nnx.State,
    processor: Processor,
    records: Sequence[ImageRecord],
    recipe: Recipe,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    assert recipe.preference is not None
    everywhere = NamedSharding(mesh, PartitionSpec())

    def score(params: nnx.State, frozen: nnx.State, batch: Batch) -> Any:
        return batch.questions, answer_sums(edge_logps(nnx.merge(graph, params, frozen), batch), batch)

    jitted = jax.jit(score, out_shardings=everywhere)
    rows = recipe.batch_size // recipe.gradient_accumulation_steps
    batches = every_batch(
        records, processor, recipe.sequence, recipe.preference, rows=rows, local=local_rows(mesh, rows)
    )
    numbers, sums = [], []
    _log.info("counting the reference's sums of %d records", len(records))
    with jax.set_mesh(mesh):
        for batch in batches:
            asked, found = map(np.asarray, jitted(params, frozen, feed(batch, mesh, rows)))
            numbers.append(asked[asked >= 0])
            sums.append(found[asked >= 0])
    joined = np.concatenate(numbers)
    order = np.argsort(joined)
    return joined[order].astype(np.int32), np.concatenate(sums)[order].astype(np.float32)
