"""Grain pipelines: records to batches of rows, for training and for evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import grain
import numpy as np
from jaxtyping import Int32

from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.feature_cache import FeatureCache
from reverie_jax.data.packing import WINDOW, Batch, Element, SequenceShape, element, pack, share_out, stack
from reverie_jax.data.preferences import DPOConfig, build_pair_trees, pairs
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tree import ConversationTree, build_trees, unsupervised
from reverie_jax.errors import DataError


def trees(
    record: ImageRecord,
    processor: Processor,
    shape: SequenceShape,
    supervision: Supervision,
    *,
    prefix_sharing: bool = True,
) -> list[ConversationTree]:
    """The record's conversations as trees that each fit a row.

    Args:
        sharing: as few trees as it takes; without, each conversation is a tree of its own, as other trainers compute.

    Raises:
        DataError: one conversation alone is too long for a row; the record is named.
        UserError: or for the decoder.
    """
    return [
        tree for _, tree in _supervised(record, processor, shape, supervision(record.conversations), prefix_sharing)
    ]


def _supervised(
    record: ImageRecord, processor: Processor, shape: SequenceShape, talks: Sequence[Conversation], prefix_sharing: bool
) -> list[tuple[list[int], ConversationTree]]:
    """`grow_within`, for a record."""
    tokens = processor.tokens(record.id, talks)
    branches = (shape.branches or None) if prefix_sharing else 1
    try:
        return build_trees(tokens, tokens=shape.length, edges=shape.edges, branches=branches)
    except ValueError as error:
        raise DataError(f"record {record.id}: {error}; give rows more room or shorten the conversation") from None


PAIRS = 1 << 10
"""An answer of a pair has the number record * PAIRS + 2 * pair, and 1 more where it is the rejected one."""


def _paired(
    record: ImageRecord, processor: Processor, shape: SequenceShape, preference: DPOConfig
) -> list[tuple[list[int], ConversationTree, list[Conversation]]]:
    """A record's pairs: (numbers within the record, tree, conversations) of each tree's branches."""
    sides = pairs(record.id, record.conversations)
    if 2 * len(sides) > PAIRS:
        raise DataError(f"record {record.id}: {len(sides)} pairs about one picture; {PAIRS // 2} is the most")
    found = processor.tokens(record.id, [talk for pair in sides for talk in pair])
    couples = list(zip(found[::2], found[1::2], strict=True))
    try:
        grown = build_pair_trees(couples, preference, tokens=shape.length, edges=shape.edges, leaves=shape.questions)
    except ValueError as error:
        raise DataError(f"record {record.id}: {error}; give rows more room or shorten the answers") from None
    made = []
    for members, tree in grown:
        numbers = [2 * member + side for member in members for side in (0, 1)]
        made.append((numbers, tree, [sides[number // 2][number % 2] for number in numbers]))
    return made


@dataclasses.dataclass(frozen=True)
class DatasetStats:
    """What a training set holds, counted before the first step.

    Attributes:
        trees: rows' worth of trees; more than records where one record needs several.
        tokens: row tokens of all trees, images included.
        flat_tokens: the same conversations one by one.
        edges: taught tokens.
        longest: tokens of the largest tree.
        rows: that a pass fills, give or take what the order changes.
        sources: names of where the conversations came from; an edge's `origin` is an index into them.
    """

    records: int
    trees: int
    tokens: int
    flat_tokens: int
    edges: int
    longest: int
    rows: int
    datasets: tuple[str, ...]


def dataset_stats(
    records: Sequence[ImageRecord],
    processor: Processor,
    shape: SequenceShape,
    supervision: Supervision | DPOConfig,
    *,
    prefix_sharing: bool = True,
) -> DatasetStats:
    """Tokenises everything once: what does not fit is known before training, not at step 40,000."""
    count = tokens = flat = edges = longest = rows = 0
    datasets: dict[str, int] = {}
    made, window = _Numbered(records, processor, shape, supervision, prefix_sharing, datasets, counting=True), []
    for index in range(len(records)):
        window += made(index)
        if len(window) >= WINDOW or index + 1 == len(records):
            lengths = [len(one["tokens"]) for one in window]
            count, tokens, longest = count + len(window), tokens + sum(lengths), max([longest, *lengths])
            flat += sum(int(one["flat_tokens"][0]) for one in window)
            edges += sum(len(one["source"]) for one in window)
            rows += len(share_out(window, shape))
            window = []
    if not edges:
        missing = "pair of answers" if isinstance(supervision, DPOConfig) else "conversation with a taught answer"
        raise DataError(f"the data teaches nothing: no {missing}")
    return DatasetStats(len(records), count, tokens, flat, edges, longest, rows, tuple(datasets))


class _Numbered:
    """A record's number to its trees' elements, pictures by number (from 1): they are decoded after packing.

    Args:
        sources: names of sources and their numbers; one that is not there counts as the first.
        counting: adds those that are not there.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        processor: Processor,
        shape: SequenceShape,
        supervision: Supervision | DPOConfig,
        prefix_sharing: bool,
        datasets: dict[str, int],
        *,
        counting: bool = False,
    ):
        self.records, self.processor, self.shape = records, processor, shape
        self.supervision, self.prefix_sharing, self.datasets, self.counting = (
            supervision,
            prefix_sharing,
            datasets,
            counting,
        )

    def __call__(self, number: int) -> list[Element]:
        record = self.records[number]
        pictures = np.full(1 if record.image else 0, number + 1, np.int32)
        if isinstance(self.supervision, DPOConfig):
            return [
                element(
                    tree,
                    pictures,
                    [(number + 1) * PAIRS + branch for branch in branches],
                    record=number + 1,
                    origin=self._origins(talks)[tree.branch],
                )
                for branches, tree, talks in _paired(record, self.processor, self.shape, self.supervision)
            ]
        talks = self.supervision(record.conversations)
        return [
            element(
                tree,
                pictures,
                record=number + 1,
                origin=self._origins([talks[member] for member in members])[tree.branch],
            )
            for members, tree in _supervised(record, self.processor, self.shape, talks, self.prefix_sharing)
        ]

    def _origins(self, talks: Sequence[Conversation]) -> Int32[np.ndarray, "C"]:
        if self.counting:
            for talk in talks:
                self.datasets.setdefault(talk.dataset, len(self.datasets))
        return np.asarray([self.datasets.get(talk.dataset, 0) for talk in talks], np.int32)


class _Flat(grain.experimental.FlatMapTransform):
    max_fan_out = 1_000

    def flat_map(self, elements: list[Element]) -> list[Element]:
        return elements


Encoded = Callable[[int], tuple[str, bytes]]
"""A picture's name and file by its number from 1."""


def show(
    batch: Batch,
    encoded: Encoded,
    processor: Processor,
    pool: Executor | None = None,
    features: FeatureCache | None = None,
) -> Batch:
    """The batch with pixels where numbers (from 1) stand for pictures, or with the tower's features of them.

    Args:
        pool: decodes side by side; Pillow works outside Python's lock.
    """

    def pixels_of(number: int) -> np.ndarray:
        if features is not None:
            return features[number - 1]
        name, file = encoded(number)
        return processor.pixels(file, name)[0]

    side = processor.image_size
    shape, dtype = ((side, side, 3), np.dtype(np.uint8)) if features is None else (features.shape, features.dtype)
    pixels = np.zeros((*batch.pixels.shape, *shape), dtype)
    numbers = np.unique(batch.pixels[batch.pixels > 0]).tolist()
    decoded = pool.map(pixels_of, numbers) if pool else map(pixels_of, numbers)
    for number, picture in zip(numbers, decoded, strict=True):
        pixels[batch.pixels == number] = picture
    return batch._replace(pixels=pixels)


def of_records(records: Sequence[ImageRecord]) -> Encoded:
    """Records' pictures by number."""

    def encoded(number: int) -> tuple[str, bytes]:
        record = records[number - 1]
        return record.id, record.image

    return encoded


def packed_sequences(
    numbers: grain.MapDataset,
    records: Sequence[ImageRecord],
    processor: Processor,
    shape: SequenceShape,
    supervision: Supervision | DPOConfig,
    *,
    prefix_sharing: bool = True,
    datasets: Sequence[str] = (),
) -> grain.IterDataset:
    """Rows of the records of these numbers, with numbers (from 1) where pictures' pixels will be."""
    origins = {name: number for number, name in enumerate(datasets)}
    made = numbers.map(_Numbered(records, processor, shape, supervision, prefix_sharing, origins))
    read = made.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32))
    elements = grain.experimental.FlatMapIterDataset(read, _Flat())
    # Few records need no large window, which would hold many passes over them.
    window = 1 if shape.images == 1 else min(WINDOW, max(32, 2 * len(records)))
    return pack(elements, shape, processor.encoder.patches, window=window)


def training_batches(
    records: Sequence[ImageRecord],
    processor: Processor,
    shape: SequenceShape,
    *,
    rows: int,
    supervision: Supervision | DPOConfig,
    seed: int,
    prefix_sharing: bool = True,
    datasets: Sequence[str] = (),
    local: slice | None = None,
    features: FeatureCache | None = None,
    threads: int | None = None,
) -> grain.IterDataset:
    """Endless batches in an order that the seed alone fixes; the iterator's state is a position, not a count of batches.

    Every host packs all trees, which is cheap, and decodes the pictures of its own rows, which is not. So the order
    depends on neither hosts nor threads.

    Args:
        rows: rows in a batch, over all hosts' devices.
        sharing: see `trees`.
        sources: names, in the order that `origin` counts them (`Survey.sources`).
        own: the part of each batch's rows that this host gets; all by default.
        features: of the pictures, which are then not decoded.
        threads: that decode pictures; one a core by default.
    """
    first, past, _ = (local or slice(None)).indices(rows)
    numbers = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()
    packed = packed_sequences(
        numbers, records, processor, shape, supervision, prefix_sharing=prefix_sharing, datasets=datasets
    )
    batches = packed.batch(rows, batch_fn=lambda part: stack(part[first:past], past - first))
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    shown = batches.map(lambda batch: show(batch, of_records(records), processor, pool, features))
    return grain.experimental.ThreadPrefetchIterDataset(shown, prefetch_buffer_size=2)


def every_batch(
    records: Sequence[ImageRecord],
    processor: Processor,
    shape: SequenceShape,
    supervision: Supervision | DPOConfig,
    *,
    rows: int,
    local: slice | None = None,
    prefix_sharing: bool = True,
    datasets: Sequence[str] = (),
) -> Iterator[Batch]:
    """Every record once, in order; empty rows fill the last batch. Arguments as for `training_batches`."""
    first, past, _ = (local or slice(None)).indices(rows)
    numbers = grain.MapDataset.range(len(records))
    packed = packed_sequences(
        numbers, records, processor, shape, supervision, prefix_sharing=prefix_sharing, datasets=datasets
    )

    def whole(part: Sequence[Batch]) -> Batch:
        full = stack(part, rows)
        return show(Batch(*(field[first:past] for field in full)), of_records(records), processor)

    with contextlib.closing(iter(packed)) as made:
        while part := list(itertools.islice(made, rows)):
            yield whole(part)


@dataclasses.dataclass(frozen=True)
class ImageQuestions:
    """One picture and the open questions about it, each with the number that its answer will carry.

    Attributes:
        encoded: the file's bytes, or what reads them when they are needed; empty for questions about nothing shown.
    """

    name: str
    encoded: bytes | Callable[[], bytes]
    questions: Sequence[tuple[int, Conversation]]

    def read(self) -> bytes:
        return self.encoded if isinstance(self.encoded, bytes) else self.encoded()


class _Questions(grain.experimental.FlatMapTransform):
    """A picture's questions as one tree, or as few as fit; the number of the picture (from 1) where its pixels will be."""

    def __init__(self, pictures: Sequence[ImageQuestions], processor: Processor, shape: SequenceShape):
        self.pictures, self.processor, self.shape = pictures, processor, shape
        self.max_fan_out = 1_000

    def flat_map(self, number: int) -> list[Element]:
        picture = self.pictures[number]
        shown = np.full(1 if picture.encoded else 0, number + 1, np.int32)
        numbers, talks = zip(*picture.questions, strict=True)
        tokens = [unsupervised(talk) for talk in self.processor.tokens(picture.name, talks)]
        try:
            grown = build_trees(tokens, tokens=self.shape.length, edges=0, branches=self.shape.questions)
        except ValueError as error:
            raise DataError(f"{picture.name}: {error}") from None
        return [element(tree, shown, [numbers[member] for member in members]) for members, tree in grown]


def question_batches(
    pictures: Sequence[ImageQuestions],
    processor: Processor,
    shape: SequenceShape,
    *,
    rows: int,
    local: slice | None = None,
    pool: Executor | None = None,
) -> grain.IterDataset:
    """Every question once, in batches of the same shape; empty rows fill the last one.

    Args:
        own: the part of each batch's rows that this host gets, whose pictures alone it reads; all by default.
        pool: decodes pictures side by side.
    """
    first, past, _ = (local or slice(None)).indices(rows)
    numbers = grain.MapDataset.range(len(pictures)).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=32)
    )
    elements = grain.experimental.FlatMapIterDataset(numbers, _Questions(pictures, processor, shape))
    packed = pack(elements, shape, processor.encoder.patches)
    batches = packed.batch(rows, batch_fn=lambda part: Batch(*(field[first:past] for field in stack(part, rows))))

    def encoded(number: int) -> tuple[str, bytes]:
        return pictures[number - 1].name, pictures[number - 1].read()

    shown = batches.map(lambda batch: show(batch, encoded, processor, pool))
    return grain.experimental.ThreadPrefetchIterDataset(shown, prefetch_buffer_size=2)
