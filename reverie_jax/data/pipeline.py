"""Grain pipelines: records to batches of rows, for training and for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import grain

from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.processor import Processor
from reverie_jax.data.rows import Element, RowShape, element, pack, stack
from reverie_jax.data.tree import ConversationTree, grow_within, untaught
from reverie_jax.errors import DataError

Teach = Literal["responses", "positive", "negative", "rationales"]


def taught(record: ImageRecord, teach: Teach) -> list[Conversation]:
    """The record's conversations as an arm of the ablation teaches them.

    `responses` keeps each conversation's first exchange, `positive` and `negative` also the rationales of their kind, and
    `rationales` everything. What then teaches nothing is left out.
    """
    if teach == "rationales":
        return list(record.conversations)
    cut = [
        talk if talk.kind == teach else dataclasses.replace(talk, turns=talk.turns[:2]) for talk in record.conversations
    ]
    return [talk for talk in cut if any(turn.weight > 0 for turn in talk.turns if turn.role == "assistant")]


def trees(record: ImageRecord, processor: Processor, shape: RowShape, teach: Teach) -> list[ConversationTree]:
    """The record's conversations as trees that each fit a row.

    Raises:
        DataError: one conversation alone is too long for a row; the record is named.
        UserError: or for the decoder.
    """
    tokens = processor.tokens(record.id, taught(record, teach))
    try:
        return [tree for _, tree in grow_within(tokens, tokens=shape.tokens, edges=shape.edges)]
    except ValueError as error:
        raise DataError(f"record {record.id}: {error}; give rows more room or shorten the conversation") from None


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a training set holds, counted before the first step.

    Attributes:
        trees: rows' worth of trees; more than records where one record needs several.
        tokens: row tokens of all trees, images included.
        flat_tokens: the same conversations one by one.
        edges: taught tokens.
        longest: tokens of the largest tree.
    """

    records: int
    trees: int
    tokens: int
    flat_tokens: int
    edges: int
    longest: int


def survey(source: Sequence[ImageRecord], processor: Processor, shape: RowShape, teach: Teach) -> Survey:
    """Tokenises everything once: what does not fit is known before training, not at step 40,000."""
    found = [tree for index in range(len(source)) for tree in trees(source[index], processor, shape, teach)]
    if not any(len(tree.source) for tree in found):
        raise DataError("the data teaches nothing: no conversation has a taught answer")
    return Survey(
        records=len(source),
        trees=len(found),
        tokens=sum(map(len, found)),
        flat_tokens=sum(tree.flat_tokens for tree in found),
        edges=sum(len(tree.source) for tree in found),
        longest=max(map(len, found)),
    )


class _Elements(grain.experimental.FlatMapTransform):
    """A record's trees, each with its picture."""

    def __init__(self, processor: Processor, shape: RowShape, teach: Teach):
        self.processor, self.shape, self.teach = processor, shape, teach
        self.max_fan_out = 1_000

    def flat_map(self, record: ImageRecord) -> list[Element]:
        pixels = self.processor.pixels(record.image, record.id)
        return [element(tree, pixels) for tree in trees(record, self.processor, self.shape, self.teach)]


def training_batches(
    source: Sequence[ImageRecord],
    processor: Processor,
    shape: RowShape,
    *,
    rows: int,
    teach: Teach,
    seed: int,
) -> grain.IterDataset:
    """Endless batches in an order that the seed fixes; the iterator's state is a position, not a count of batches.

    Args:
        rows: rows in a batch, over all hosts' devices.
    """
    data = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    elements = grain.experimental.FlatMapIterDataset(
        data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)),
        _Elements(processor, shape, teach),
    )
    batches = pack(elements, shape, processor.encoder.patches, bins=1 if shape.images == 1 else 8).batch(rows)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


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
        elements = []
        for start in range(0, len(picture.questions), self.shape.leaves):
            numbers, talks = zip(*picture.questions[start : start + self.shape.leaves], strict=True)
            tokens = [untaught(talk) for talk in self.processor.tokens(picture.name, talks)]
            try:
                for members, tree in grow_within(tokens, tokens=self.shape.tokens, edges=0):
                    elements.append(element(tree, pixels, [numbers[member] for member in members]))
            except ValueError as error:
                raise DataError(f"{picture.name}: {error}") from None
        return elements


def question_batches(
    pictures: Sequence[Picture], processor: Processor, shape: RowShape, *, rows: int
) -> grain.IterDataset:
    """Every question once, in batches of the same shape; empty rows fill the last one."""
    data = grain.MapDataset.source(pictures).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=32))
    elements = grain.experimental.FlatMapIterDataset(data, _Questions(processor, shape))
    packed = pack(elements, shape, processor.encoder.patches)
    batches = packed.batch(rows, batch_fn=lambda part: stack(part, rows))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
