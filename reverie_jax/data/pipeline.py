"""Grain pipelines: records to batches of rows, for training and for evaluation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import grain
import numpy as np
from jaxtyping import UInt8

from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.processor import Processor
from reverie_jax.data.rows import WINDOW, Batch, Element, RowShape, element, pack, share_out, stack
from reverie_jax.data.teaching import Teaching
from reverie_jax.data.tree import ConversationTree, grow_within, untaught
from reverie_jax.errors import DataError


def trees(
    record: ImageRecord, processor: Processor, shape: RowShape, teaching: Teaching, *, sharing: bool = True
) -> list[ConversationTree]:
    """The record's conversations as trees that each fit a row.

    Args:
        sharing: as few trees as it takes; without, each conversation is a tree of its own, as other trainers compute.

    Raises:
        DataError: one conversation alone is too long for a row; the record is named.
        UserError: or for the decoder.
    """
    tokens = processor.tokens(record.id, teaching(record.conversations))
    branches = (shape.branches or None) if sharing else 1
    try:
        grown = grow_within(tokens, tokens=shape.tokens, edges=shape.edges, branches=branches)
    except ValueError as error:
        raise DataError(f"record {record.id}: {error}; give rows more room or shorten the conversation") from None
    return [tree for _, tree in grown]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a training set holds, counted before the first step.

    Attributes:
        trees: rows' worth of trees; more than records where one record needs several.
        tokens: row tokens of all trees, images included.
        flat_tokens: the same conversations one by one.
        edges: taught tokens.
        longest: tokens of the largest tree.
        rows: that a pass fills, give or take what the order changes.
    """

    records: int
    trees: int
    tokens: int
    flat_tokens: int
    edges: int
    longest: int
    rows: int


def survey(
    source: Sequence[ImageRecord], processor: Processor, shape: RowShape, teaching: Teaching, *, sharing: bool = True
) -> Survey:
    """Tokenises everything once: what does not fit is known before training, not at step 40,000."""
    count = tokens = flat = edges = longest = rows = 0
    made, window = _Numbered(source, processor, shape, teaching, sharing), []
    for index in range(len(source)):
        window += made(index)
        if len(window) >= WINDOW or index + 1 == len(source):
            lengths = [len(one["tokens"]) for one in window]
            count, tokens, longest = count + len(window), tokens + sum(lengths), max([longest, *lengths])
            flat += sum(int(one["flat_tokens"][0]) for one in window)
            edges += sum(len(one["source"]) for one in window)
            rows += len(share_out(window, shape))
            window = []
    if not edges:
        raise DataError("the data teaches nothing: no conversation has a taught answer")
    return Survey(len(source), count, tokens, flat, edges, longest, rows)


class _Numbered:
    """A record's number to its trees' elements, pictures by number (from 1): they are decoded after packing."""

    def __init__(
        self, source: Sequence[ImageRecord], processor: Processor, shape: RowShape, teaching: Teaching, sharing: bool
    ):
        self.source, self.processor, self.shape = source, processor, shape
        self.teaching, self.sharing = teaching, sharing

    def __call__(self, number: int) -> list[Element]:
        record = self.source[number]
        pictures = np.full(1 if record.image else 0, number + 1, np.int32)
        grown = trees(record, self.processor, self.shape, self.teaching, sharing=self.sharing)
        return [element(tree, pictures) for tree in grown]


class _Flat(grain.experimental.FlatMapTransform):
    max_fan_out = 1_000

    def flat_map(self, elements: list[Element]) -> list[Element]:
        return elements


def show(batch: Batch, source: Sequence[ImageRecord], processor: Processor, pool: Executor | None = None) -> Batch:
    """The batch with pixels where numbers (from 1) stand for pictures.

    Args:
        pool: decodes side by side; Pillow works outside Python's lock.
    """

    def pixels_of(number: int) -> UInt8[np.ndarray, "S S 3"]:
        record = source[number - 1]
        return processor.pixels(record.image, record.id)[0]

    side = processor.image_size
    pixels = np.zeros((*batch.pixels.shape, side, side, 3), np.uint8)
    numbers = np.unique(batch.pixels[batch.pixels > 0]).tolist()
    decoded = pool.map(pixels_of, numbers) if pool else map(pixels_of, numbers)
    for number, picture in zip(numbers, decoded, strict=True):
        pixels[batch.pixels == number] = picture
    return batch._replace(pixels=pixels)


def packed_rows(
    numbers: grain.MapDataset,
    source: Sequence[ImageRecord],
    processor: Processor,
    shape: RowShape,
    teaching: Teaching,
    *,
    sharing: bool = True,
) -> grain.IterDataset:
    """Rows of the records of these numbers, with numbers (from 1) where pictures' pixels will be."""
    made = numbers.map(_Numbered(source, processor, shape, teaching, sharing))
    read = made.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32))
    elements = grain.experimental.FlatMapIterDataset(read, _Flat())
    # Few records need no large window, which would hold many passes over them.
    window = 1 if shape.images == 1 else min(WINDOW, max(32, 2 * len(source)))
    return pack(elements, shape, processor.encoder.patches, window=window)


def training_batches(
    source: Sequence[ImageRecord],
    processor: Processor,
    shape: RowShape,
    *,
    rows: int,
    teaching: Teaching,
    seed: int,
    sharing: bool = True,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
) -> grain.IterDataset:
    """Endless batches in an order that the seed alone fixes; the iterator's state is a position, not a count of batches.

    Every host packs all trees, which is cheap, and decodes the pictures of its own rows, which is not. So the order
    depends on neither hosts nor threads.

    Args:
        rows: rows in a batch, over all hosts' devices.
        sharing: see `trees`.
        shard: (this host, hosts): the part of each batch's rows that this host gets, contiguous.
        threads: that decode pictures; one a core by default.

    Raises:
        ValueError: the rows cannot be shared out evenly.
    """
    host, hosts = shard
    if rows % hosts:
        raise ValueError(f"{rows} rows a batch for {hosts} hosts")
    own = slice(host * rows // hosts, (host + 1) * rows // hosts)
    numbers = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    packed = packed_rows(numbers, source, processor, shape, teaching, sharing=sharing)
    batches = packed.batch(rows, batch_fn=lambda part: stack(part[own], rows // hosts))
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    shown = batches.map(lambda batch: show(batch, source, processor, pool))
    return grain.experimental.ThreadPrefetchIterDataset(shown, prefetch_buffer_size=2)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture and the open questions about it, each with the number that its answer will carry."""

    name: str
    encoded: bytes
    questions: Sequence[tuple[int, Conversation]]


class _Questions(grain.experimental.FlatMapTransform):
    """A picture's questions as one tree, or as few as fit."""

    def __init__(self, processor: Processor, shape: RowShape):
        self.processor, self.shape = processor, shape
        self.max_fan_out = 1_000

    def flat_map(self, picture: Picture) -> list[Element]:
        pixels = self.processor.pixels(picture.encoded, picture.name)
        numbers, talks = zip(*picture.questions, strict=True)
        tokens = [untaught(talk) for talk in self.processor.tokens(picture.name, talks)]
        try:
            grown = grow_within(tokens, tokens=self.shape.tokens, edges=0, branches=self.shape.leaves)
        except ValueError as error:
            raise DataError(f"{picture.name}: {error}") from None
        return [element(tree, pixels, [numbers[member] for member in members]) for members, tree in grown]


def question_batches(
    pictures: Sequence[Picture], processor: Processor, shape: RowShape, *, rows: int
) -> grain.IterDataset:
    """Every question once, in batches of the same shape; empty rows fill the last one."""
    data = grain.MapDataset.source(pictures).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=32))
    elements = grain.experimental.FlatMapIterDataset(data, _Questions(processor, shape))
    packed = pack(elements, shape, processor.encoder.patches)
    batches = packed.batch(rows, batch_fn=lambda part: stack(part, rows))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
