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
class SequenceShape:
    """The static sizes of a row; one compiled program a shape.

    Attributes:
        length: L, tokens.
        images: M; at most this many trees share a row, whether they show one image, several or none.
        edges: E, taught tokens.
        questions: Q, open questions (evaluation; 0 in training).
        branches: most conversations of a tree; 0 for any number. A tree with more shares them out.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    length: int
    images: int = 1
    edges: int = 0
    questions: int = 0
    branches: int = 0


class Batch(NamedTuple):
    """B rows of trees, on the host or on devices.

    Unfilled places: ends j + 1, features -1, edge weight 0, leaf question -1.
    """

    tokens: Int32[Any, "B L"]
    positions: Int32[Any, "B L"]
    ends: Int32[Any, "B L"]
    image_slots: Int32[Any, "B L"]
    pixels: UInt8[Any, "B M S S 3"]
    """Or the tower's features of the pictures, floats B M P W."""
    parent: Int32[Any, "B E"]
    """Row index of an edge's parent; with `target`, `weight` and `branch` as in `ConversationTree`."""
    target: Int32[Any, "B E"]
    weight: Float32[Any, "B E"]
    branch: Int32[Any, "B E"]
    """The conversation that an edge belongs to, counted through the row's leaves where it has some."""
    origin: Int32[Any, "B E"]
    """Which of the data's sources (`Survey.sources`) an edge came from."""
    leaves: Int32[Any, "B Q"]
    questions: Int32[Any, "B Q"]
    flat_tokens: Int32[Any, "B M"]
    """Per tree, tokens of its conversations one by one; 0 where there is no tree."""
    records: Int32[Any, "B M"]
    """Per tree, the number (from 1) of its record; 0 where there is none, or it is not known."""


Element = dict[str, np.ndarray]


def element(
    tree: ConversationTree, pixels: Any, questions: Sequence[int] = (), *, record: int = 0, origin: Any = None
) -> Element:
    """A tree and its images as the flat dictionary that Grain packs.

    Args:
        pixels: uint8 `m S S 3`, or int32 `m`, numbers from 1 by which they will be found when the rows are packed.
        questions: an id for each leaf that is to be decoded, or whose answer is one of a pair; none in other training.
        record: number (from 1) of the record.
        origin: of each edge; 0 by default.
    """
    if questions and len(questions) != len(tree.leaves):
        raise ValueError(f"{len(questions)} questions for {len(tree.leaves)} leaves")
    leaves = tree.leaves if questions else tree.leaves[:0]
    return {
        "tokens": tree.tokens,
        "positions": tree.positions,
        "ends": tree.ends,
        "image_slots": tree.image_slots,
        "pixels": pixels,
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


def row(elements: Sequence[Element], shape: SequenceShape, patches: int) -> Batch:
    """Places trees side by side: indices within a tree become indices within the row.

    Args:
        patches: feature tokens of an image.

    Raises:
        ValueError: they do not fit.
    """
    sizes = {"tokens": shape.length, "pixels": shape.images, "parent": shape.edges, "leaves": shape.questions}
    for name, room in [*sizes.items(), ("flat_tokens", shape.images)]:
        if (wanted := sum(len(one[name]) for one in elements)) > room:
            raise ValueError(f"{wanted} {name} for a row of {room}")

    def empty(name: str, kind: Any) -> np.ndarray:
        return np.zeros((sizes[name], *elements[0][name].shape[1:]), kind)

    made = Batch(
        tokens=empty("tokens", np.int32),
        positions=empty("tokens", np.int32),
        ends=np.arange(1, shape.length + 1, dtype=np.int32),
        image_slots=np.full(shape.length, -1, np.int32),
        pixels=empty("pixels", elements[0]["pixels"].dtype),
        parent=empty("parent", np.int32),
        target=empty("parent", np.int32),
        weight=empty("parent", np.float32),
        branch=empty("parent", np.int32),
        origin=empty("parent", np.int32),
        leaves=empty("leaves", np.int32),
        questions=np.full(shape.questions, -1, np.int32),
        flat_tokens=np.zeros(shape.images, np.int32),
        records=np.zeros(shape.images, np.int32),
    )
    token = image = edge = leaf = 0
    for slot, one in enumerate(elements):
        length, shown, taught, asked = (len(one[name]) for name in sizes)
        here, at = slice(token, token + length), slice(edge, edge + taught)
        made.tokens[here], made.positions[here] = one["tokens"], one["positions"]
        made.ends[here] = one["ends"] + token
        made.image_slots[here] = np.where(one["image_slots"] >= 0, one["image_slots"] + image * patches, -1)
        made.pixels[image : image + shown] = one["pixels"]
        made.parent[at] = one["parent"] + token
        made.target[at], made.weight[at], made.origin[at] = one["target"], one["weight"], one["origin"]
        made.branch[at] = one["branch"] + leaf
        made.leaves[leaf : leaf + asked] = one["leaves"] + token
        made.questions[leaf : leaf + asked] = one["questions"]
        made.flat_tokens[slot], made.records[slot] = one["flat_tokens"][0], one["records"][0]
        token, image, edge, leaf = token + length, image + shown, edge + taught, leaf + asked
    return made


def stack(rows: Sequence[Batch], wanted: int) -> Batch:
    """A batch of `wanted` rows; empty ones fill it up."""
    first = rows[0]
    blank = Batch(*(np.zeros_like(field) for field in first))
    length = len(first.tokens)
    blank = blank._replace(
        ends=np.arange(1, length + 1, dtype=np.int32),
        image_slots=np.full(length, -1, np.int32),
        questions=np.full_like(first.questions, -1),
    )
    full = [*rows, *([blank] * (wanted - len(rows)))]
    return Batch(*(np.stack(field) for field in zip(*full, strict=True)))


WINDOW = 1024
"""Trees that are packed together, where a row holds several."""
_CANDIDATES = 64
"""Trees that are tried for the rest of a row, of all sizes that are left."""


def pack(
    elements: grain.IterDataset, shape: SequenceShape, patches: int, *, window: int | None = None
) -> grain.IterDataset:
    """Rows from elements; the iterator's state can be saved.

    The trees of a window are packed by themselves, each row around the largest one left, by the sizes that fill it best.
    Grain's own packers empty all open rows when one tree fits none: with trees of a quarter of a row, 8 % stays empty.

    Args:
        window: elements that are packed together; 1024 by default, or one where a row holds one tree.
    """
    size = window or (1 if shape.images == 1 else WINDOW)
    windows = elements.batch(size, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(windows, _Window(shape, patches, size))


class _Window(grain.experimental.FlatMapTransform):
    """The rows of a window, in the order of their first trees."""

    def __init__(self, shape: SequenceShape, patches: int, size: int):
        self.shape, self.patches, self.max_fan_out = shape, patches, size

    def flat_map(self, elements: list[Element]) -> list[Batch]:
        bins = sorted(sorted(one) for one in share_out(elements, self.shape))
        return [row([elements[number] for number in one], self.shape, self.patches) for one in bins]


def share_out(elements: Sequence[Element], shape: SequenceShape) -> list[list[int]]:
    """Which elements go into a row together, by number; each goes into one.

    Raises:
        ValueError: one does not fit a row by itself.
    """
    rooms = np.asarray([shape.length, shape.images, shape.edges, shape.questions, shape.images])
    names = ("tokens", "pixels", "parent", "leaves", "flat_tokens")
    sizes = np.asarray([[len(one[name]) for name in names] for one in elements]).reshape(-1, len(names))
    if (beyond := np.argwhere(sizes > rooms)).size:
        number, which = beyond[0]
        raise ValueError(f"{sizes[number, which]} {names[which]} for a row of {rooms[which]}")
    left = sorted(range(len(elements)), key=lambda number: (-sizes[number, 0], number))
    bins = []
    while left:
        chosen, left = [left[0]], left[1:]
        room = rooms - sizes[chosen[0]]
        tried = left[:: max(1, len(left) // _CANDIDATES)]
        for place in fill([int(sizes[number, 0]) for number in tried], int(room[0]), int(room[-1])):
            if (sizes[tried[place]] <= room).all():  # tokens and trees do; pictures, edges and leaves may not
                room = room - sizes[tried[place]]
                chosen.append(tried[place])
        taken = set(chosen)
        left = [number for number in left if number not in taken]
        bins.append(chosen)
    return bins


def fill(sizes: Sequence[int], room: int, most: int) -> list[int]:
    """The places of at most `most` sizes whose sum comes nearest to `room` from below, by dynamic programming.

    Bit t of `reach[k][c]` says that c of the first k sizes can sum to t.
    """
    mask = (1 << (room + 1)) - 1
    reach = [[1] + [0] * most]
    for size in sizes:
        before = reach[-1]
        reach.append([1] + [before[c] | ((before[c - 1] << size) & mask) for c in range(1, most + 1)])
    count = max(range(most + 1), key=lambda c: reach[-1][c].bit_length())
    total = reach[-1][count].bit_length() - 1
    chosen = []
    for place in range(len(sizes) - 1, -1, -1):
        if count and not (reach[place][count] >> total) & 1:
            chosen.append(place)
            total, count = total - sizes[place], count - 1
    return chosen
