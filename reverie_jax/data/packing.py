"""Packing: conversation trees to sequences of a fixed length, and sequences to batches.

The tree words (node, leaf, edge, branch, ends, origin) are explained in `reverie_jax.data.tree`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from reverie_jax.data.sequence_shape import SequenceShape as SequenceShape
from reverie_jax.data.tree import ConversationTree
from reverie_jax.models import ModelInputs


class Batch(NamedTuple):
    """B packed sequences, on the host or on devices.

    Padding: `ends` is j + 1 at index j, `image_slots` is -1, the `weight` of an edge is 0, `questions` is -1, all else is 0.

    Attributes:
        tokens, positions, ends, image_slots: as in `ConversationTree`; indices count from the start of the sequence.
        images: images in one of three forms: preprocessed pixels (uint8 `B M S S 3`), the vision tower's features of them
            (floats `B M P W`), or, until they are loaded, their numbers (int32 `B M`, counted from 1; 0 for none).
        parent, target, weight: as in `ConversationTree`.
        branch: conversation of an edge, counted over all open questions of the sequence where it has some, else per tree.
        origin: dataset of an edge, an index into `DatasetStats.datasets`.
        leaves: index of each open question's last token, or of each answer's in preference pairs.
        questions: id of each leaf's question or answer.
        flat_tokens: per tree, the tokens of its conversations without sharing; 0 for no tree.
        records: per tree, the number of its record, counted from 1; 0 for no tree or an unknown record.
    """

    tokens: Int32[Any, "B L"]
    positions: Int32[Any, "B L"]
    ends: Int32[Any, "B L"]
    image_slots: Int32[Any, "B L"]
    images: UInt8[Any, "B M S S 3"] | Float[Any, "B M P W"] | Int32[Any, "B M"]
    parent: Int32[Any, "B E"]
    target: Int32[Any, "B E"]
    weight: Float32[Any, "B E"]
    branch: Int32[Any, "B E"]
    origin: Int32[Any, "B E"]
    leaves: Int32[Any, "B Q"]
    questions: Int32[Any, "B Q"]
    flat_tokens: Int32[Any, "B M"]
    records: Int32[Any, "B M"]

    @property
    def inputs(self) -> ModelInputs:
        """The arrays that the model takes."""
        return ModelInputs(self.tokens, self.positions, self.ends, self.image_slots, self.images)


TreeElement = dict[str, np.ndarray]
"""One tree and its images: the fields of `Batch` without padding. A flat dictionary, as Grain's datasets carry."""


def make_element(
    tree: ConversationTree, images: Any, questions: Sequence[int] = (), *, record: int = 0, origin: Any = None
) -> TreeElement:
    """Return a tree and its images as arrays to pack.

    Args:
        tree: the tree.
        images: uint8 `m S S 3`, or int32 `m`: image numbers (from 1) that `pipeline.load_images` replaces by pixels later.
        questions: an id for each leaf that is decoded or whose answer belongs to a pair; none in other training.
        record: number of the record, counted from 1.
        origin: dataset index of each edge; 0 by default.

    Raises:
        ValueError: the number of questions differs from the number of leaves.
    """
    if questions and len(questions) != len(tree.leaves):
        raise ValueError(f"{len(questions)} questions for {len(tree.leaves)} leaves")
    leaves = tree.leaves if questions else tree.leaves[:0]
    return {
        "tokens": tree.tokens,
        "positions": tree.positions,
        "ends": tree.ends,
        "image_slots": tree.image_slots,
        "images": images,
        "parent": tree.parent,
        "target": tree.target,
        "weight": tree.weight,
        "branch": tree.branch,
        "origin": np.zeros_like(tree.branch) if origin is None else np.asarray(origin, np.int32),
        "leaves": leaves,
        "questions": np.asarray(questions, np.int32),
        "flat_tokens": np.asarray([tree.flat_tokens], np.int32),
        "records": np.asarray([record], np.int32),
    }


_FIELDS = {
    "tokens": ("tokens", "positions", "ends", "image_slots"),
    "images": ("images",),
    "edges": ("parent", "target", "weight", "branch", "origin"),
    "questions": ("leaves", "questions"),
    "trees": ("flat_tokens", "records"),
}
"""The fields of `Batch` by the axis that they share."""


def element_sizes(element: TreeElement) -> list[int]:
    """Return the length of each axis: tokens, images, edges, questions, trees."""
    return [len(element[names[0]]) for names in _FIELDS.values()]


def _capacity(shape: SequenceShape) -> dict[str, int]:
    """Return the room for each axis, in the order of `_FIELDS`."""
    return dict(zip(_FIELDS, (shape.length, shape.images, shape.edges, shape.questions, shape.images), strict=True))


def _check_fit(sizes: Any, shape: SequenceShape) -> None:
    """Raise ValueError where one of the rows of sizes exceeds the capacity."""
    capacity = _capacity(shape)
    excess = np.argwhere(np.asarray(sizes) > np.asarray(list(capacity.values())))
    if len(excess):
        row, column = excess[0]
        name, room = list(capacity.items())[column]
        raise ValueError(f"{sizes[row][column]} {name} do not fit: a sequence has room for {room} {name}")


def pack_sequence(elements: Sequence[TreeElement], shape: SequenceShape, patches: int) -> Batch:
    """Return one sequence (a `Batch` without the batch axis) that holds the trees side by side.

    Indices within a tree become indices within the sequence.

    Args:
        elements: the trees, in order.
        shape: sizes of the sequence.
        patches: P, image tokens per image.

    Raises:
        ValueError: the trees do not fit.
    """
    _check_fit([np.sum([element_sizes(element) for element in elements], axis=0).tolist()], shape)

    capacity = _capacity(shape)
    axes = {name: axis for axis, names in _FIELDS.items() for name in names}
    first = {name: elements[0][name] for name in axes}
    sequence = Batch(
        **{name: np.zeros((capacity[axes[name]], *array.shape[1:]), array.dtype) for name, array in first.items()}
    )
    _pad(sequence)
    start = dict.fromkeys(_FIELDS, 0)
    for element in elements:
        shifts = dict.fromkeys(("ends", "parent", "leaves"), start["tokens"]) | {"branch": start["questions"]}
        stop = {axis: start[axis] + size for axis, size in zip(_FIELDS, element_sizes(element), strict=True)}
        for name, axis in axes.items():
            array = element[name] + shifts[name] if name in shifts else element[name]
            if name == "image_slots":
                array = np.where(array >= 0, array + start["images"] * patches, -1)
            getattr(sequence, name)[start[axis] : stop[axis]] = array
        start = stop
    return sequence


def _pad(sequence: Batch) -> None:
    """Write the padding of an empty sequence where it is not 0."""
    sequence.ends[:] = np.arange(1, len(sequence.ends) + 1, dtype=np.int32)
    sequence.image_slots[:] = -1
    sequence.questions[:] = -1


def stack(sequences: Sequence[Batch], batch_size: int) -> Batch:
    """Return a batch of the sequences, filled up to `batch_size` with empty ones."""
    blank = Batch(*(np.zeros_like(field) for field in sequences[0]))
    _pad(blank)
    padded = [*sequences, *([blank] * (batch_size - len(sequences)))]
    return Batch(*(np.stack(field) for field in zip(*padded, strict=True)))


WINDOW = 1024
"""Trees that are packed together, where a sequence holds several."""
_CANDIDATES = 64
"""Trees, of all remaining sizes, that are considered for the rest of a sequence."""


def pack(
    elements: grain.IterDataset, shape: SequenceShape, patches: int, *, window: int | None = None
) -> grain.IterDataset:
    """Return sequences packed from elements. The iterator's state can be saved.

    The trees of a window are packed independently of other windows: each sequence starts from the largest remaining tree
    and adds those whose sizes fill it best. Grain's own packers close all open sequences when one tree fits none of them;
    with trees of a quarter of a sequence, that leaves 8 % empty.

    Args:
        elements: `TreeElement`s.
        shape: sizes of a sequence.
        patches: P, image tokens per image.
        window: elements that are packed together; 1024 by default, or 1 where a sequence holds one tree.
    """
    finish = functools.partial(pack_sequence, shape=shape, patches=patches)
    return pack_windows(elements, shape, element_sizes, finish, window=window)


def pack_windows(
    elements: grain.IterDataset,
    shape: SequenceShape,
    sizes_of: Callable[[Any], Sequence[int]],
    finish: Callable[[list[Any]], Any],
    *,
    window: int | None = None,
) -> grain.IterDataset:
    """Return what `finish` makes of the elements of each sequence. They are packed as by `pack`, by their sizes alone.

    Args:
        elements: anything that has sizes.
        shape: sizes of a sequence.
        sizes_of: returns an element's sizes, see `element_sizes`.
        finish: gets the elements of a sequence, in order.
        window: as for `pack`.
    """
    size = window or (1 if shape.images == 1 else WINDOW)
    windows = elements.batch(size, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(windows, _PackWindow(shape, sizes_of, finish, size))


class _PackWindow(grain.experimental.FlatMapTransform):
    """The sequences of a window, in the order of their first trees."""

    def __init__(
        self,
        shape: SequenceShape,
        sizes_of: Callable[[Any], Sequence[int]],
        finish: Callable[[list[Any]], Any],
        size: int,
    ):
        self.shape, self.sizes_of, self.finish, self.max_fan_out = shape, sizes_of, finish, size

    def flat_map(self, elements: list[Any]) -> list[Any]:
        bins = sorted(sorted(members) for members in bin_pack([*map(self.sizes_of, elements)], self.shape))
        return [self.finish([elements[index] for index in members]) for members in bins]


def bin_pack(elements: Any, shape: SequenceShape) -> list[list[int]]:
    """Return the indices of the elements of each sequence; each element is in one.

    Args:
        elements: the sizes of each element, see `element_sizes`.
        shape: sizes of a sequence.

    Raises:
        ValueError: an element does not fit an empty sequence.
    """
    sizes = np.asarray(elements, np.int64).reshape(-1, len(_FIELDS))
    _check_fit(sizes, shape)
    capacity = np.asarray(list(_capacity(shape).values()))
    remaining = sorted(range(len(sizes)), key=lambda index: (-sizes[index, 0], index))
    bins = []
    while remaining:
        members, remaining = [remaining[0]], remaining[1:]
        room = capacity - sizes[members[0]]
        candidates = remaining[:: max(1, len(remaining) // _CANDIDATES)]
        for chosen in best_subset([int(sizes[index, 0]) for index in candidates], int(room[0]), int(room[-1])):
            index = candidates[chosen]
            if (
                sizes[index] <= room
            ).all():  # tokens and trees fit by construction; images, edges and questions may not
                room = room - sizes[index]
                members.append(index)
        packed = set(members)
        remaining = [index for index in remaining if index not in packed]
        bins.append(members)
    return bins


def best_subset(sizes: Sequence[int], room: int, most: int) -> list[int]:
    """Return the indices of at most `most` sizes whose sum is the largest that does not exceed `room`.

    Dynamic programming over subset sums as bit sets: bit t of `reach[k][c]` says that c of the first k sizes can sum to t.
    """
    mask = (1 << (room + 1)) - 1
    reach = [[1] + [0] * most]
    for size in sizes:
        before = reach[-1]
        reach.append([1] + [before[c] | ((before[c - 1] << size) & mask) for c in range(1, most + 1)])
    count = max(range(most + 1), key=lambda c: reach[-1][c].bit_length())
    total = reach[-1][count].bit_length() - 1
    chosen = []
    for index in range(len(sizes) - 1, -1, -1):
        if count and not (reach[index][count] >> total) & 1:
            chosen.append(index)
            total, count = total - sizes[index], count - 1
    return chosen
