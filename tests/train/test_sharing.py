"""Trees in packed rows teach what the conversations teach one by one: real templates, real pictures, the shipped base."""

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
from reverie_jax.data.pipeline import of_records, packed_sequences, show
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.loading import load_model
from reverie_jax.scenes import dataset
from reverie_jax.train.objective import edge_loss

ROWS = 3


@pytest.fixture(scope="module")
def base():
    return load_model("scenes-base", dtype=jnp.float32)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[ImageRecord]:
    """Five scenes, and talk about no picture."""
    folder = tmp_path_factory.mktemp("scenes")
    dataset.make_training_set(folder, 5, size=128, questions=2, seed=11)
    found = list(dataset.records(folder))
    said = (Turn("user", "Are cups things?"), Turn("assistant", "Yes."))
    plain = Conversation((*said, Turn("user", "And two?"), Turn("assistant", "Yes, they are.")), ())
    return [*found, ImageRecord("words", b"", (plain,))]


@functools.cache
def summed():
    return jax.jit(lambda graph, state, batch: tuple(edge_loss(nnx.merge(graph, state), batch)), static_argnums=0)


def batches(
    records: list[ImageRecord], processor: Processor, *, sharing: bool, supervision: Supervision
) -> list[Batch]:
    shape = SequenceShape(length=512, images=4, edges=400)
    numbers = grain.MapDataset.range(len(records))
    rows = list(packed_sequences(numbers, records, processor, shape, supervision, prefix_sharing=sharing))
    groups = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    return [show(stack(group, ROWS), of_records(records), processor) for group in groups]


def loss_of(model, found: list[Batch]) -> tuple[float, float]:
    """(sum of weight * nll, sum of weights) over the batches."""
    graph, state = nnx.split(model)
    sums = np.zeros(2)
    for batch in found:
        sums += [float(value) for value in summed()(graph, state, Batch(*map(jnp.asarray, batch)))]
    return float(sums[0]), float(sums[1])


@pytest.mark.parametrize("template", ["llava-hf", "vicuna_v1", "llava_v0"])
@pytest.mark.parametrize(
    "teaching",
    [Supervision(), Supervision(answers="as-published", rationale_weight=0.5), Supervision(context="negative-first")],
    ids=["once", "as-published", "joined"],
)
def test_packed_trees_lose_what_conversations_lose_alone(base, records, template, supervision):
    model, processor = base[0], base[1].using(template)
    trees, flat = (
        batches(records, processor, prefix_sharing=sharing, supervision=supervision) for sharing in (True, False)
    )
    assert sum(int(batch.flat_tokens.sum()) for batch in trees) == sum(int(batch.flat_tokens.sum()) for batch in flat)
    assert sum(int((batch.flat_tokens > 0).sum()) for batch in trees) < sum(
        int((batch.flat_tokens > 0).sum()) for batch in flat
    )
    (total, weight), (wanted, alone) = loss_of(model, trees), loss_of(model, flat)
    assert weight == pytest.approx(alone, rel=1e-6)
    assert total == pytest.approx(wanted, rel=1e-5)


def test_changing_one_conversation_changes_no_others_loss(base, records):
    model, processor = base
    changed = 2
    talks = list(records[0].conversations)
    turns = talks[changed].turns
    talks[changed] = dataclasses.replace(
        talks[changed], turns=(*turns[:3], Turn("assistant", "There is no such thing."))
    )
    other = [dataclasses.replace(records[0], conversations=tuple(talks)), *records[1:]]

    def by_branch(given: list[ImageRecord]) -> dict[tuple[int, int], float]:
        """Loss by (record, conversation): each taught edge counted for the conversation that brought it."""
        found: dict[tuple[int, int], float] = {}
        for number, record in enumerate(given):
            (batch,) = batches([record], processor, prefix_sharing=True, supervision=Supervision())
            for branch in range(len(record.conversations)):
                only = batch._replace(weight=np.where(batch.branch == branch, batch.weight, 0).astype(np.float32))
                found[number, branch] = loss_of(model, [only])[0]
        return found

    before, after = by_branch(records[:2]), by_branch(other[:2])
    assert before.keys() == after.keys()
    for key, loss in before.items():
        if key == (0, changed):
            assert abs(loss - after[key]) > 0.1
        else:
            assert after[key] == pytest.approx(loss, rel=1e-5, abs=1e-5)


def test_changing_one_record_changes_no_other_in_its_row(base, records):
    """The same, across the trees of a row: the sums of the others do not move."""
    model, processor = base
    (one,) = batches(records[:2], processor, prefix_sharing=True, supervision=Supervision())
    (alone,) = batches(records[1:2], processor, prefix_sharing=True, supervision=Supervision())
    start = int(np.flatnonzero(one.positions[0][1:] == 0)[0]) + 1  # the second tree's root
    assert (one.flat_tokens > 0).sum() == 2
    second = one.flat_tokens[0].tolist().index(int(alone.flat_tokens[0][0]))
    mine = one.parent >= start if second == 1 else one.parent < start
    only = one._replace(weight=np.where(mine, one.weight, 0).astype(np.float32))
    assert loss_of(model, [only])[0] == pytest.approx(loss_of(model, [alone])[0], rel=1e-5)
