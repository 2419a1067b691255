"""The loss on records that are held out, at each save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.packing import Batch
from reverie_jax.data.pipeline import every_batch
from reverie_jax.data.processor import Processor
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import feed, local_rows
from reverie_jax.train.checkpoint import VALIDATION
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.recipes import Recipe


class RecordSlice(Sequence[ImageRecord]):
    """Records from one number up to another."""

    def __init__(self, records: Sequence[ImageRecord], first: int, past: int):
        self.records, self.first, self.past = records, first, past

    def __len__(self) -> int:
        return self.past - self.first

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.records[self.first + index % len(self)]

    def __repr__(self) -> str:
        return f"RecordSlice({self.records!r}, {self.first}, {self.past})"


def hold_out(records: Sequence[ImageRecord], count: int) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """The records that are trained on, and the last `count`, which are not.

    Raises:
        ValueError: that leaves none.
    """
    if not count:
        return records, ()
    first = len(records) - count
    if first < 1:
        raise ValueError(f"holdout={count} of {len(records)} records leaves none to train on")
    return RecordSlice(records, 0, first), RecordSlice(records, first, len(records))


class Validation:
    """Cross-entropy of what the held-out records teach (of pairs: of both answers)."""

    def __init__(
        self,
        graph: nnx.GraphDef[VisionLanguageModel],
        records: Sequence[ImageRecord],
        processor: Processor,
        recipe: Recipe,
        mesh: Mesh,
    ):
        self.records, self.processor, self.recipe, self.mesh = records, processor, recipe, mesh

        def sums(params: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Array, Array]:
            loss = edge_loss(nnx.merge(graph, params, frozen), batch)
            return loss.total, loss.weight

        self._sums = jax.jit(sums)

    def __call__(self, params: nnx.State, frozen: nnx.State) -> dict[str, float] | None:
        """The mean over all taught tokens, under the name that checkpoints are ranked by; None without such records."""
        if not self.records:
            return None
        recipe = self.recipe
        rows = recipe.batch_size // recipe.gradient_accumulation_steps
        batches = every_batch(
            self.records,
            self.processor,
            recipe.sequence,
            recipe.preference or recipe.supervision,
            rows=rows,
            local=local_rows(self.mesh, rows),
            prefix_sharing=recipe.prefix_sharing,
        )
        found = [np.asarray(self._sums(params, frozen, feed(batch, self.mesh, rows))) for batch in batches]
        total, weight = np.sum(found, axis=0)
        return {VALIDATION: float(total / max(weight, 1e-6))}
