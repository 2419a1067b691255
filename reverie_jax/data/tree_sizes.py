"""Sizes of a training set's trees: by them sequences are planned, and only the trees of those that are shown are built."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.packing import WINDOW, Batch, SequenceShape, TreeElement, pack_sequence
from reverie_jax.errors import DataError

FIELDS = ("record", "check", "tokens", "images", "edges", "answers", "trees")
"""Rows of `TreeSizes.trees`; from `tokens` on they are those of `packing.element_sizes`."""


@dataclasses.dataclass(frozen=True)
class DatasetStats:
    """Sizes of a training set, known before the first step.

    Attributes:
        records: number of records.
        trees: number of trees; larger than `records` where a record needs several.
        tokens: tokens of all trees, image tokens included.
        flat_tokens: tokens of the same conversations without sharing.
        edges: supervised tokens.
        longest: tokens of the largest tree.
        sequences: packed sequences per epoch; approximate, since packing depends on the order.
        datasets: names of the datasets that the conversations come from.
    """

    records: int
    trees: int
    tokens: int
    flat_tokens: int
    edges: int
    longest: int
    sequences: int
    datasets: tuple[str, ...]


class PlannedTree(NamedTuple):
    """A tree that is built when it is shown.

    Attributes:
        record: index of its record.
        tree: its number in the record.
        before: images of earlier epochs, added to its image numbers.
        sizes: its `packing.element_sizes`.
    """

    record: int
    tree: int
    before: int
    sizes: list[int]


@dataclasses.dataclass(frozen=True)
class TreeSizes:
    """Sizes of all trees of a training set, by record.

    Attributes:
        stats: of the whole set.
        trees: a column for each tree, in the order of the records; `FIELDS` names the rows. On disk where it was read.
        warning: what is to be said of the records before training; empty for nothing.
        index: the file that they were read from; None for those that were surveyed now.
    """

    stats: DatasetStats
    trees: Int32[np.ndarray, "7 T"]
    warning: str = ""
    index: Path | None = None

    def of(self, record: int) -> list[list[int]]:
        """Return the sizes of a record's trees (`packing.element_sizes`), by the record's index."""
        sizes: list[list[int]] = self._columns(record)[2:].T.tolist()
        return sizes

    def plan(self, position: int, record: int) -> list[PlannedTree]:
        """Return a record's trees.

        Args:
            position: in the order of all epochs.
            record: index of the record.
        """
        before = position // self.stats.records * self.stats.records
        return [PlannedTree(record, number, before, sizes) for number, sizes in enumerate(self.of(record))]

    def _columns(self, record: int) -> Int32[np.ndarray, "7 n"]:
        first, last = np.searchsorted(self.trees[0], np.asarray([record, record + 1], np.int32))
        return self.trees[:, first:last]

    def check(self, number: int, record: ImageRecord, sizes: Sequence[Sequence[int]]) -> None:
        """Check that a record is the one that was surveyed, and has its trees.

        Args:
            number: index of the record.
            record: the record.
            sizes: of its trees, now.

        Raises:
            DataError: it is not, or has others.
        """
        columns = self._columns(number)
        same = columns[2:].T.tolist() == [list(one) for one in sizes]
        if same and (columns[1] == record_check(record)).all():
            return
        what = f"its trees have {_tokens(sizes)} tokens" if not same else "its image or its texts have changed"
        known = "what was found before the first step" if self.index is None else f"the index {self.index}"
        remedy = "start again" if self.index is None else "delete that file and run `reverie data index` again"
        raise DataError(
            f"record {record.id}: {what}, which differs from {known} ({_tokens(self.of(number))} tokens); {remedy}"
        )


def _tokens(sizes: Sequence[Sequence[int]]) -> str:
    return " + ".join(str(one[0]) for one in sizes) or "no"


def record_check(record: ImageRecord) -> int:
    """Return a checksum of a record's id, image and conversations, in 31 bits."""
    text = f"{record.id}\n{record.conversations_json()}".encode("utf-8", "surrogatepass")
    return zlib.crc32(record.image, zlib.crc32(text)) & 0x7FFF_FFFF


class PlannedSequences:
    """Builds planned sequences.

    Args:
        elements: returns the elements of a record's trees, by its index.
        shape: sizes of a sequence.
        patches: P, image tokens per image.
        pool: reads and tokenizes records in parallel.
    """

    def __init__(
        self, elements: Callable[[int], list[TreeElement]], shape: SequenceShape, patches: int, pool: Executor | None
    ):
        self._shape, self._patches, self._pool = shape, patches, pool
        # The trees of a record may be in several sequences of a window.
        self._elements = functools.lru_cache(WINDOW)(elements)

    def __call__(self, plans: Sequence[Sequence[PlannedTree]]) -> list[Batch]:
        """Return the sequences of these trees; only their records are read."""
        indices = list(dict.fromkeys(tree.record for plan in plans for tree in plan))
        built = dict(zip(indices, (self._pool.map if self._pool else map)(self._elements, indices), strict=True))

        def element(tree: PlannedTree) -> TreeElement:
            found = built[tree.record][tree.tree]
            return {**found, "images": found["images"] + np.int32(tree.before)}

        return [pack_sequence([*map(element, plan)], self._shape, self._patches) for plan in plans]
