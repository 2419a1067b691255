"""Grain pipelines: records to batches of packed sequences, for training and for evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np

from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.feature_cache import FeatureCache
from reverie_jax.data.images import decode, random_resized_crop
from reverie_jax.data.packing import (
    WINDOW,
    Batch,
    SequenceShape,
    TreeElement,
    element_sizes,
    make_element,
    pack,
    pack_sequence,
    pack_windows,
    stack,
)
from reverie_jax.data.preferences import DPOConfig, build_pair_trees, find_pairs
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import is_untaught
from reverie_jax.data.tree import ConversationTree, build_trees, unsupervised
from reverie_jax.data.tree_sizes import PlannedSequences, TreeSizes
from reverie_jax.errors import DataError, UserError

PAIR_STRIDE = 1 << 10
"""The id of a pair's answer is record * PAIR_STRIDE + 2 * pair, plus 1 for the rejected one. Records count from 1."""


class RecordTree(NamedTuple):
    """One tree of a record.

    Attributes:
        tree: the tree.
        conversations: the conversations of the tree's branches.
        answers: of preference pairs, each branch's 2 * pair (+ 1 if rejected) within the record; else empty.
        untaught: number of the conversations that the tokenization does not supervise at all.
    """

    tree: ConversationTree
    conversations: Sequence[Conversation]
    answers: Sequence[int] = ()
    untaught: int = 0


@dataclasses.dataclass(frozen=True)
class TreeBuilder:
    """Builds a record's trees: what is supervised, tokenized and small enough for a sequence.

    Attributes:
        processor: tokenizes the conversations.
        shape: sizes of a sequence; no tree exceeds them.
        supervision: what is supervised, or the pairs of DPO.
        prefix_sharing: build as few trees as fit; otherwise each conversation is a tree of its own, as in other trainers.
        datasets: dataset names (`DatasetStats.datasets`); an edge's `origin` is an index into them, 0 for other names.
    """

    processor: Processor
    shape: SequenceShape
    supervision: Supervision | DPOConfig
    prefix_sharing: bool = True
    datasets: tuple[str, ...] = ()

    def build(self, record: ImageRecord) -> list[RecordTree]:
        """Return the record's trees.

        Raises:
            DataError: a single conversation (or pair) does not fit a sequence; the record is named.
            UserError: a conversation is longer than the model's context.
        """
        try:
            if isinstance(self.supervision, DPOConfig):
                return self._build_pairs(record, self.supervision)
            conversations = self.supervision(record.conversations)
            tokens = self.processor.tokenize(record.id, conversations)
            branches = (self.shape.branches or None) if self.prefix_sharing else 1
            trees = build_trees(tokens, tokens=self.shape.length, edges=self.shape.edges, branches=branches)
            untaught = list(map(is_untaught, conversations, tokens))
            return [
                RecordTree(
                    tree, [conversations[one] for one in members], untaught=sum(untaught[one] for one in members)
                )
                for members, tree in trees
            ]
        except UserError:
            raise  # it names the record already
        except ValueError as error:
            raise DataError(
                f"record {record.id}: {error}; raise sequence.length or sequence.edges, or shorten the text; `reverie data"
                " check` with --model and --recipe finds all such rows"
            ) from None

    def _build_pairs(self, record: ImageRecord, config: DPOConfig) -> list[RecordTree]:
        pairs = find_pairs(record.id, record.conversations)
        if 2 * len(pairs) > PAIR_STRIDE:
            raise DataError(
                f"record {record.id}: {len(pairs)} pairs about one image; at most {PAIR_STRIDE // 2} are supported"
            )
        tokens = self.processor.tokenize(record.id, [side for pair in pairs for side in pair])
        sides = list(zip(tokens[::2], tokens[1::2], strict=True))
        shape = self.shape
        trees = []
        for members, tree in build_pair_trees(
            sides, config, tokens=shape.length, edges=shape.edges, leaves=shape.questions
        ):
            answers = [2 * member + side for member in members for side in (0, 1)]
            untaught = sum(is_untaught(pairs[answer // 2][answer % 2], tokens[answer]) for answer in answers)
            trees.append(RecordTree(tree, [pairs[answer // 2][answer % 2] for answer in answers], answers, untaught))
        return trees

    def elements(self, record: ImageRecord, number: int) -> list[TreeElement]:
        """Return the record's trees as elements to pack. Images stay numbers, and are decoded after packing.

        Args:
            record: the record.
            number: its number, counted from 1.
        """
        return [self.element(built, record, number) for built in self.build(record)]

    def element(self, built: RecordTree, record: ImageRecord, number: int) -> TreeElement:
        """Return one of the record's trees as an element to pack."""
        images = np.full(1 if record.image else 0, number, np.int32)
        answers = [number * PAIR_STRIDE + answer for answer in built.answers]
        origins = np.asarray([self._origin(one.dataset) for one in built.conversations], np.int32)
        return make_element(built.tree, images, answers, record=number, origin=origins[built.tree.branch])

    def _origin(self, dataset: str) -> int:
        return self.datasets.index(dataset) if dataset in self.datasets else 0


class _Flatten(grain.experimental.FlatMapTransform):
    max_fan_out = 1_000

    def flat_map(self, elements: list[Any]) -> list[Any]:
        return elements


ReadImage = Callable[[int], tuple[str, bytes]]
"""Returns the name and the encoded file of an image by its number, counted from 1."""


def image_reader(records: Sequence[ImageRecord]) -> ReadImage:
    """Return a reader of the records' images; numbers go on in further epochs (`packed_sequences`)."""

    def read(number: int) -> tuple[str, bytes]:
        record = records[(number - 1) % len(records)]
        return record.id, record.image

    return read


Preprocess = Callable[[bytes, str, int], np.ndarray]
"""Returns an encoded image as uint8 `S S 3`; given its name and number too."""


def _augmentation(
    records: int, processor: Processor, seed: int, crop_scale: float | None, flip: bool
) -> Preprocess | None:
    """Return the preprocessing of `training_batches` with random crops or flips; None without either."""

    def augment(encoded: bytes, name: str, number: int) -> np.ndarray:
        # Of the seed, the epoch and the record alone: resumed runs and other hosts draw the same.
        rng = np.random.default_rng((seed, *divmod(number - 1, records)))
        if crop_scale is None:
            pixels = processor.preprocess(encoded, name)[0]
        else:
            pixels = random_resized_crop(decode(encoded, name), processor.image_size, crop_scale, rng)
        return pixels[:, ::-1] if flip and rng.random() < 0.5 else pixels

    return augment if flip or crop_scale is not None else None


def load_images(
    batch: Batch,
    read: ReadImage,
    processor: Processor,
    pool: Executor | None = None,
    features: FeatureCache | None = None,
    preprocess: Preprocess | None = None,
) -> Batch:
    """Return the batch with its image numbers replaced by pixels, or by cached features of the vision tower.

    Args:
        batch: a batch whose `images` are numbers (int32 `B M`).
        read: reads an encoded image.
        processor: decodes it.
        pool: decodes images in parallel; Pillow releases the interpreter lock.
        features: the vision tower's features of the records' images; nothing is decoded then.
        preprocess: preprocesses them instead of `processor`.

    Raises:
        BrokenImage: an image cannot be decoded; its name is given.
    """

    def load(number: int) -> np.ndarray:
        if features is not None:
            return features[(number - 1) % len(features)]
        name, encoded = read(number)
        return processor.preprocess(encoded, name)[0] if preprocess is None else preprocess(encoded, name, number)

    side = processor.image_size
    shape, dtype = ((side, side, 3), np.dtype(np.uint8)) if features is None else (features.shape, features.dtype)
    images = np.zeros((*batch.images.shape, *shape), dtype)
    numbers = np.unique(batch.images[batch.images > 0]).tolist()
    loaded = pool.map(load, numbers) if pool else map(load, numbers)
    for number, image in zip(numbers, loaded, strict=True):
        images[batch.images == number] = image
    return batch._replace(images=images)


def packed_sequences(
    indices: grain.MapDataset, records: Sequence[ImageRecord], builder: TreeBuilder
) -> grain.IterDataset:
    """Return packed sequences of the records at these indices; images stay numbers (see `load_images`).

    Numbers of images go on in further epochs, where an image may be cropped in another way.
    """

    def elements(position: int, index: int) -> list[TreeElement]:
        before = np.int32(position // len(records) * len(records))
        found = builder.elements(records[index], index + 1)
        return [{**element, "images": element["images"] + before} for element in found]

    pack_one = functools.partial(pack_sequence, shape=builder.shape, patches=builder.processor.encoder.patches)
    return _pack_trees(indices.map_with_index(elements), len(records), builder.shape, element_sizes, pack_one)


def _pack_trees(
    trees: grain.MapDataset,
    records: int,
    shape: SequenceShape,
    sizes_of: Callable[[Any], Sequence[int]],
    finish: Callable[[list[Any]], Any],
) -> grain.IterDataset:
    """Return `pack_windows` of lists of trees.

    Trees that are built and those that are planned pass the same stages: the iterator's state is the same too.
    """
    read = trees.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32))
    # A large window over few records would hold many epochs of them.
    window = 1 if shape.images == 1 else min(WINDOW, max(32, 2 * records))
    flat = grain.experimental.FlatMapIterDataset(read, _Flatten())
    return pack_windows(flat, shape, sizes_of, finish, window=window)


def _checked_elements(
    records: Sequence[ImageRecord], builder: TreeBuilder, sizes: TreeSizes
) -> Callable[[int], list[TreeElement]]:
    """Return a function that returns a record's elements by its index, and checks their sizes."""

    def elements(index: int) -> list[TreeElement]:
        found = builder.elements(record := records[index], index + 1)
        sizes.check(index, record, [*map(element_sizes, found)])
        return found

    return elements


def training_batches(
    records: Sequence[ImageRecord],
    builder: TreeBuilder,
    *,
    batch_size: int,
    seed: int,
    local: slice | None = None,
    features: FeatureCache | None = None,
    threads: int | None = None,
    crop_scale: float | None = None,
    flip: bool = False,
    sizes: TreeSizes | None = None,
) -> grain.IterDataset:
    """Return endless batches in an order that depends on the seed alone. The iterator's state is a position, not a count.

    Every host packs all trees, but decodes only the images of its own sequences. The order therefore depends neither on the
    number of hosts nor on threads. With `sizes`, a host packs by these, and reads and tokenizes only the records that it
    shows; the batches are the same.

    Args:
        records: the records, by index.
        builder: builds their trees.
        batch_size: sequences in a batch, over all hosts.
        seed: of the shuffle.
        local: part of each batch that this host receives; all by default.
        features: cached features of the records' images, which are then not decoded.
        threads: threads that decode images; one per core by default.
        crop_scale: show a random part of each image, see `images.random_resized_crop`, another in each epoch. All
            conversations of a record see the same one, and so do both sides of a preference pair. RandAugment is not
            implemented.
        flip: mirror each image with probability 1/2.
        sizes: of all trees of the records.

    Raises:
        UserError: cached features would have to be cropped or flipped.
    """
    start, stop, _ = (local or slice(None)).indices(batch_size)
    indices = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    build: Callable[[Any], list[Batch]] = list
    if sizes is None:
        sequences = packed_sequences(indices, records, builder)
    else:
        plans = indices.map_with_index(sizes.plan)
        sequences = _pack_trees(plans, len(records), builder.shape, lambda tree: tree.sizes, list)
        elements = _checked_elements(records, builder, sizes)
        build = PlannedSequences(elements, builder.shape, builder.processor.encoder.patches, pool)
    batches = sequences.batch(batch_size, batch_fn=lambda group: stack(build(group[start:stop]), stop - start))
    read, processor = image_reader(records), builder.processor
    preprocess = _augmentation(len(records), processor, seed, crop_scale, flip)
    if preprocess and features is not None:
        raise UserError(
            "--cache-vision: features of whole images cannot be cropped or flipped; leave it out, or set"
            " crop_scale=none flip=false"
        )
    loaded = batches.map(lambda batch: load_images(batch, read, processor, pool, features, preprocess))
    return grain.experimental.ThreadPrefetchIterDataset(loaded, prefetch_buffer_size=2)


def _local_batch(sequences: Sequence[Batch], batch_size: int, local: slice | None) -> Batch:
    """Return this host's part of a batch, filled up with empty sequences."""
    return Batch(*(field[local or slice(None)] for field in stack(sequences, batch_size)))


def ordered_batches(
    records: Sequence[ImageRecord], builder: TreeBuilder, *, batch_size: int, local: slice | None = None
) -> Iterator[Batch]:
    """Yield batches of every record once, in order; empty sequences fill the last batch.

    Args:
        records: the records, by index.
        builder: builds their trees.
        batch_size: sequences in a batch, over all hosts.
        local: part of each batch that this host receives; all by default.
    """
    sequences = packed_sequences(grain.MapDataset.range(len(records)), records, builder)
    with contextlib.closing(iter(sequences)) as running:
        while group := list(itertools.islice(running, batch_size)):
            yield load_images(_local_batch(group, batch_size, local), image_reader(records), builder.processor)


@dataclasses.dataclass(frozen=True)
class ImageQuestions:
    """One image and the open questions about it.

    Attributes:
        name: name of the image, for errors.
        encoded: the encoded file, or a function that reads it when it is needed; empty for questions without an image.
        questions: (id, conversation) pairs; an answer is returned under the id of its question.
    """

    name: str
    encoded: bytes | Callable[[], bytes]
    questions: Sequence[tuple[int, Conversation]]

    def read(self) -> bytes:
        """Return the encoded image."""
        return self.encoded if isinstance(self.encoded, bytes) else self.encoded()


class _QuestionTrees(grain.experimental.FlatMapTransform):
    """The questions about an image as one tree, or as few as fit. Images stay numbers."""

    max_fan_out = 1_000

    def __init__(self, images: Sequence[ImageQuestions], processor: Processor, shape: SequenceShape):
        self.images, self.processor, self.shape = images, processor, shape

    def flat_map(self, index: int) -> list[TreeElement]:
        image = self.images[index]
        numbers = np.full(1 if image.encoded else 0, index + 1, np.int32)
        ids, conversations = zip(*image.questions, strict=True)
        tokens = [unsupervised(question) for question in self.processor.tokenize(image.name, conversations)]
        try:
            trees = build_trees(tokens, tokens=self.shape.length, edges=0, branches=self.shape.questions)
        except ValueError as error:
            raise DataError(f"{image.name}: {error}") from None
        return [make_element(tree, numbers, [ids[member] for member in members]) for members, tree in trees]


def question_batches(
    images: Sequence[ImageQuestions],
    processor: Processor,
    shape: SequenceShape,
    *,
    batch_size: int,
    local: slice | None = None,
    pool: Executor | None = None,
) -> grain.IterDataset:
    """Return batches of every question once, all of the same shape; empty sequences fill the last one.

    Args:
        images: images with questions.
        processor: tokenizes the questions and decodes the images.
        shape: sizes of a sequence.
        batch_size: sequences in a batch, over all hosts.
        local: part of each batch that this host receives; only its images are read. All by default.
        pool: decodes images in parallel.
    """
    indices = grain.MapDataset.range(len(images)).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=32)
    )
    elements = grain.experimental.FlatMapIterDataset(indices, _QuestionTrees(images, processor, shape))
    sequences = pack(elements, shape, processor.encoder.patches)
    batches = sequences.batch(batch_size, batch_fn=lambda group: _local_batch(group, batch_size, local))

    def read(number: int) -> tuple[str, bytes]:
        image = images[number - 1]
        return image.name, image.read()

    loaded = batches.map(lambda batch: load_images(batch, read, processor, pool))
    return grain.experimental.ThreadPrefetchIterDataset(loaded, prefetch_buffer_size=2)
