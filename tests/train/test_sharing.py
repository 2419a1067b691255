"""Packed trees have the loss of their conversations one by one: real templates, real images, the shipped model."""

from __future__ import annotations

import dataclasses
import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.packing import Batch, SequenceShape, stack
from reverie_jax.data.pipeline import TreeBuilder, image_reader, load_images, packed_sequences
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.loading import load_model
from reverie_jax.scenes import dataset
from reverie_jax.train.objective import edge_loss

BATCH_SIZE = 3


@pytest.fixture(scope="module")
def base():
    return load_model("scenes-base", dtype=jnp.float32)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[ImageRecord]:
    """Five scenes, and a conversation without an image."""
    folder = tmp_path_factory.mktemp("scenes")
    dataset.make_training_set(folder, 5, size=128, questions=2, seed=11)
    first = (Turn("user", "Are cups things?"), Turn("assistant", "Yes."))
    plain = Conversation((*first, Turn("user", "And two?"), Turn("assistant", "Yes, they are.")), ())
    return [*dataset.read_records(folder), ImageRecord("words", b"", (plain,))]


@functools.cache
def loss_sums():
    return jax.jit(lambda graph, state, batch: tuple(edge_loss(nnx.merge(graph, state), batch)), static_argnums=0)


def batches(
    records: list[ImageRecord], processor: Processor, *, sharing: bool = True, supervision: Supervision | None = None
) -> list[Batch]:
    shape = SequenceShape(length=512, images=4, edges=400)
    numbers = grain.MapDataset.range(len(records))
    builder = TreeBuilder(processor, shape, supervision or Supervision(), sharing)
    sequences = list(packed_sequences(numbers, records, builder))
    groups = [sequences[start : start + BATCH_SIZE] for start in range(0, len(sequences), BATCH_SIZE)]
    return [load_images(stack(group, BATCH_SIZE), image_reader(records), processor) for group in groups]


def loss_of(model, batches: list[Batch]) -> tuple[float, float]:
    """Return (sum of weight * nll, sum of weights) over the batches."""
    graph, state = nnx.split(model)
    sums = np.zeros(2)
    for batch in batches:
        sums += [float(value) for value in loss_sums()(graph, state, Batch(*map(jnp.asarray, batch)))]
    return float(sums[0]), float(sums[1])


@pytest.mark.parametrize(
    ("template", "supervision"),
    [
        ("llava-hf", Supervision()),
        ("vicuna_v1", Supervision(answers="as-published", rationale_weight=0.5)),
        ("llava_v0", Supervision(context="negative-first")),
    ],
    ids=["once", "as-published", "joined"],
)
def test_packed_trees_have_the_loss_of_separate_conversations(base, records, template, supervision):
    model, processor = base[0], base[1].override(template)
    trees, flat = (batches(records, processor, sharing=sharing, supervision=supervision) for sharing in (True, False))
    assert sum(int(batch.flat_tokens.sum()) for batch in trees) == sum(int(batch.flat_tokens.sum()) for batch in flat)
    assert sum(int((batch.flat_tokens > 0).sum()) for batch in trees) < sum(
        int((batch.flat_tokens > 0).sum()) for batch in flat
    )
    (total, weight), (expected, alone) = loss_of(model, trees), loss_of(model, flat)
    assert weight == pytest.approx(alone, rel=1e-6)
    assert total == pytest.approx(expected, rel=1e-5)


def test_changing_one_conversation_changes_no_other_loss(base, records):
    model, processor = base
    changed = 2
    conversations = list(records[0].conversations)
    turns = (*conversations[changed].turns[:3], Turn("assistant", "There is no such thing."))
    conversations[changed] = dataclasses.replace(conversations[changed], turns=turns)
    other = dataclasses.replace(records[0], conversations=tuple(conversations))

    def loss_by_conversation(records: list[ImageRecord]) -> dict[tuple[int, int], float]:
        """Return the loss of the edges that each (record, conversation) supervises first."""
        losses: dict[tuple[int, int], float] = {}
        for index, record in enumerate(records):
            (batch,) = batches([record], processor)
            for branch in range(len(record.conversations)):
                only = batch._replace(weight=np.where(batch.branch == branch, batch.weight, 0).astype(np.float32))
                losses[index, branch] = loss_of(model, [only])[0]
        return losses

    before, after = loss_by_conversation(records[:2]), loss_by_conversation([other, records[1]])
    assert before.keys() == after.keys()
    for key, loss in before.items():
        if key == (0, changed):
            assert abs(loss - after[key]) > 0.1
        else:
            assert after[key] == pytest.approx(loss, rel=1e-5, abs=1e-5)


def test_trees_of_a_sequence_do_not_affect_each_other(base, records):
    model, processor = base
    (both,) = batches(records[:2], processor)
    (alone,) = batches(records[1:2], processor)
    start = int(np.flatnonzero(both.positions[0][1:] == 0)[0]) + 1  # the second tree's root
    assert (both.flat_tokens > 0).sum() == 2
    is_second = both.flat_tokens[0].tolist().index(int(alone.flat_tokens[0][0])) == 1
    edges = both.parent >= start if is_second else both.parent < start
    only = both._replace(weight=np.where(edges, both.weight, 0).astype(np.float32))
    assert loss_of(model, [only])[0] == pytest.approx(loss_of(model, [alone])[0], rel=1e-5)
