"""Trees to rows to batches: packing, and the arrays that the model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from reverie_jax.data.tree import ConversationTree


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of a row; one compiled program a shape.

    Attributes:
        tokens: L.
        images: M; at most this many trees share a row, whether they show one image, several or none.
        edges: E, taught tokens.
        leaves: Q, open questions (evaluation; 0 in training).
        branches: most conversations of a tree; 0 for any number. A tree with more shares them out.
    """

    tokens: int
    images: int = 1
    edges: int = 0
    leaves: int = 0
    branches: int = 0


class Batch(NamedTuple):
    """B rows of trees, on the host or on devices.

    Unfilled places: ends j + 1, features -1, edge weight 0, leaf question -1.
    """

    tokens: Int32[Any, "B L"]
    positions: Int32[Any, "B L"]
    ends: Int32[Any, "B L"]
    features: Int32[Any, "B L"]
    pixels: UInt8[Any, "B M S S 3"]
    source: Int32[Any, "B E"]
    target: Int32[Any, "B E"]
    weight: Float32[Any, "B E"]
    branch: Int32[Any, "B E"]
    leaves: Int32[Any, "B Q"]
    questions: Int32[Any, "B Q"]
    flat_tokens: Int32[Any, "B M"]
    """Per tree, tokens of its conversations one by one; 0 where there is no tree."""


Element = dict[str, np.ndarray]


def element(tree: ConversationTree, pixels: Any, questions: Sequence[int] = ()) -> Element:
    """A tree and its images as the flat dictionary that Grain packs.

    Args:
        pixels: uint8 `m S S 3`, or int32 `m`, numbers from 1 by which they will be found when the rows are packed.
        questions: an id for each leaf that is to be decoded; none in training.
    """
    if questions and len(questions) != len(tree.leaves):
        raise ValueError(f"{len(questions)} questions for {len(tree.leaves)} leaves")
    leaves = tree.leaves if questions else tree.leaves[:0]
    return {
        "tokens": tree.tokens,
        "positions": tree.positions,
        "ends": tree.ends,
        "features": tree.features,
        "pixels": pixels,
        "source": tree.source,
        "target": tree.target,
        "weight": tree.weight,
        "branch": tree.branch,
        "leaves": leaves,
        "questions": np.asarray(questions, np.int32),
        "flat_tokens": np.asarray([tree.flat_tokens], np.int32),
    }


def row(packed: Element, patches: int) -> Batch:
    """Places packed trees: indices within a tree become indices within the row.

    Args:
        packed: a row of `grain`'s packer: each array with its `*_segment_ids` (0: unfilled, else 1, 2, …).
        patches: feature tokens of an image.
    """
    segment = packed["tokens_segment_ids"]
    length = len(segment)
    start = np.zeros(segment.max(initial=0) + 1, np.int32)
    for number in range(1, len(start)):
        start[number] = np.argmax(segment == number)
    filled = segment > 0
    first_image = np.zeros(len(start), np.int32)
    for slot, number in reversed(list(enumerate(packed["pixels_segment_ids"]))):
        first_image[number] = slot
    features = packed["features"]
    index = np.arange(length, dtype=np.int32)
    has_edge, has_leaf = packed["source_segment_ids"] > 0, packed["leaves_segment_ids"] > 0
    return Batch(
        tokens=packed["tokens"],
        positions=packed["positions"],
        ends=np.where(filled, packed["ends"] + start[segment], index + 1).astype(np.int32),
        features=np.where(filled & (features >= 0), features + first_image[segment] * patches, -1).astype(np.int32),
        pixels=packed["pixels"],
        source=np.where(has_edge, packed["source"] + start[packed["source_segment_ids"]], 0).astype(np.int32),
        target=packed["target"],
        weight=packed["weight"],
        branch=packed["branch"],
        leaves=np.where(has_leaf, packed["leaves"] + start[packed["leaves_segment_ids"]], 0).astype(np.int32),
        questions=np.where(has_leaf, packed["questions"], -1).astype(np.int32),
        flat_tokens=packed["flat_tokens"],
    )


def stack(rows: Sequence[Batch], wanted: int) -> Batch:
    """A batch of `wanted` rows; empty ones fill it up."""
    first = rows[0]
    blank = Batch(*(np.zeros_like(field) for field in first))
    length = len(first.tokens)
    blank = blank._replace(
        ends=np.arange(1, length + 1, dtype=np.int32),
        features=np.full(length, -1, np.int32),
        questions=np.full_like(first.questions, -1),
    )
    full = [*rows, *([blank] * (wanted - len(rows)))]
    return Batch(*(np.stack(field) for field in zip(*full, strict=True)))


def pack(elements: grain.IterDataset, shape: RowShape, patches: int, *, bins: int = 1) -> grain.IterDataset:
    """Rows from elements, first fit over `bins` open rows; the iterator's state can be saved."""
    lengths = {
        **dict.fromkeys(("tokens", "positions", "ends", "features"), shape.tokens),
        **dict.fromkeys(("pixels", "flat_tokens"), shape.images),
        **dict.fromkeys(("source", "target", "weight", "branch"), shape.edges),
        **dict.fromkeys(("leaves", "questions"), shape.leaves),
    }
    packer = grain.experimental.FirstFitPackIterDataset(
        elements, length_struct=lengths, num_packing_bins=bins, max_sequences_per_bin=shape.images
    )
    return packer.map(lambda packed: row(packed, patches))
