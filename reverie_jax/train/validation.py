"""Held-out records and the loss on them, computed at each save."""

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
from reverie_jax.data.pipeline import TreeBuilder, ordered_batches
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import global_batch, local_rows
from reverie_jax.train.checkpoint import VALIDATION
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.recipe import Recipe


class RecordSlice(Sequence[ImageRecord]):
    """View of the records with indices in [start, stop)."""

    def __init__(self, records: Sequence[ImageRecord], start: int, stop: int):
        self.records, self.start, self.stop = records, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.records[self.start + index % len(self)]

    def __repr__(self) -> str:
        return f"RecordSlice({self.records!r}, {self.start}, {self.stop})"


def hold_out(records: Sequence[ImageRecord], count: int) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """Split off the last `count` records for validation.

    Returns:
        (training records, validation records).

    Raises:
        UserError: no training record is left.
    """
    if not count:
        return records, ()
    first = len(records) - count
    if first < 1:
        raise UserError(f"holdout={count} of {len(records)} records leaves none to train on")
    return RecordSlice(records, 0, first), RecordSlice(records, first, len(records))


class Validation:
    """Cross-entropy of the supervised tokens of held-out records (of both answers for preference pairs)."""

    def __init__(
        self,
        graph: nnx.GraphDef[VisionLanguageModel],
        records: Sequence[ImageRecord],
        builder: TreeBuilder,
        recipe: Recipe,
        mesh: Mesh,
    ):
        self.records, self.builder, self.batch_size, self.mesh = records, builder, recipe.micro_batch_size, mesh

        def sums(params: nnx.State[Any, Any], frozen: nnx.State[Any, Any], batch: Batch) -> tuple[Array, Array]:
            loss = edge_loss(nnx.merge(graph, params, frozen), batch)
            return loss.total, loss.weight

        self._sums = jax.jit(sums)

    def __call__(self, params: nnx.State[Any, Any], frozen: nnx.State[Any, Any]) -> dict[str, float] | None:
        """Return {`VALIDATION`: mean loss per supervised token}, or None without held-out records."""
        if not self.records:
            return None
        local = local_rows(self.mesh, self.batch_size)
        batches = ordered_batches(self.records, self.builder, batch_size=self.batch_size, local=local)
        sums = [
            np.asarray(self._sums(params, frozen, global_batch(batch, self.mesh, self.batch_size))) for batch in batches
        ]
        total, weight = np.sum(sums, axis=0)
        return {VALIDATION: float(total / max(weight, 1e-6))}
