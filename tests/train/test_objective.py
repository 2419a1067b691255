"""Tree == flat: a packed batch of trees has the loss and the LoRA gradients of its conversations run one by one."""

import functools

import grain
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack, stack
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.models import lora
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.step import is_lora_or_projector
from tests.train import tiny

PATCHES = tiny.CONFIG.vision.patches
SHAPE = SequenceShape(length=160, images=3, edges=96)
FLAT = SequenceShape(length=64, images=2, edges=40)


@functools.cache
def split_model():
    model = tiny.model()
    lora.attach(model, rank=4, alpha=8.0)
    # B is zero at the start, which hides A's gradient.
    for _, layer in lora.linears(model):
        if layer.lora_b is not None:
            noise = jax.random.normal(jax.random.key(layer.inputs), layer.lora_b.shape)
            layer.lora_b.set_value(0.1 * noise)
    return nnx.split(model, is_lora_or_projector, ...)


@functools.cache
def mean_loss_and_grads():
    graph, params, frozen = split_model()
    return jax.jit(lambda batch: tiny.loss_and_grads(graph, params, frozen, batch))


@functools.cache
def sum_of_losses_and_grads():
    """Sums over a batch add up over conversations."""
    graph, params, frozen = split_model()

    def total(params, batch):
        return edge_loss(nnx.merge(graph, params, frozen), batch).total

    return jax.jit(lambda batch: jax.value_and_grad(total)(params, batch))


def random_conversation(rng, openings, images):
    """A conversation of one to three exchanges; openings and words come from few, so that much is shared."""
    ids, weights, image_slots = [1], [0.0], [-1]

    def add(new, weight=0.0, slots=None):
        ids.extend(new)
        weights.extend([weight] * len(new))
        image_slots.extend([-1] * len(new) if slots is None else slots)

    for image in range(images):
        add([3] * PATCHES, slots=list(range(image * PATCHES, (image + 1) * PATCHES)))
    add(openings[int(rng.integers(len(openings)))])
    for _ in range(int(rng.integers(1, 4))):
        add(rng.integers(10, 13, int(rng.integers(1, 4))).tolist())
        add(rng.integers(20, 22, int(rng.integers(1, 4))).tolist(), weight=float(rng.choice([0.0, 0.5, 1.0, 2.0])))
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(image_slots, np.int32))


def pack_all(elements, shape):
    return list(pack(grain.MapDataset.source(elements).to_iter_dataset(), shape, PATCHES))


def batch_of(sequences, size=None):
    return Batch(*map(jnp.asarray, stack(sequences, size or len(sequences))))


@st.composite
def forests(draw):
    """Seeds and sizes: (images of each tree, conversations of each tree)."""
    trees = draw(st.integers(1, 4))
    return draw(st.integers(0, 2**31)), [(draw(st.integers(1, 2)), draw(st.integers(1, 5))) for _ in range(trees)]


@hypothesis.given(forests())
@hypothesis.settings(max_examples=12)
def test_packed_trees_equal_conversations_one_by_one(case):
    seed, sizes = case
    rng = np.random.default_rng(seed)
    elements, flat = [], []
    for images, conversations in sizes:
        openings = [rng.integers(5, 8, int(rng.integers(1, 5))).tolist() for _ in range(int(rng.integers(1, 3)))]
        conversations = [random_conversation(rng, openings, images) for _ in range(conversations)]
        pixels = rng.integers(0, 255, (images, 24, 24, 3), dtype=np.uint8)
        elements.append(make_element(build_tree(conversations), pixels))
        flat += [make_element(build_tree([one]), pixels) for one in conversations]
    rows = pack_all(elements, SHAPE)
    loss, grads = mean_loss_and_grads()(batch_of(rows, 4))
    total, weight, sums = 0.0, 0.0, None
    for alone in flat:
        row = batch_of(pack_all([alone], FLAT))
        value, gradient = sum_of_losses_and_grads()(row)
        total, weight = total + float(value), weight + float(row.weight.sum())
        sums = gradient if sums is None else optax.tree.add(sums, gradient)
    hypothesis.assume(weight > 0)
    assert abs(float(loss) - total / weight) <= 1e-5 * abs(total / weight)
    expected = optax.tree.scale(1 / weight, sums)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.linalg.norm(theirs.ravel()))
        assert float(jnp.linalg.norm((ours - theirs).ravel())) <= 1e-5 * max(scale, 1e-3)


def example_batch():
    rng = np.random.default_rng(0)
    conversations = [random_conversation(rng, [[5, 6]], 1) for _ in range(4)]
    pixels = rng.integers(0, 255, (1, 24, 24, 3), dtype=np.uint8)
    return batch_of(pack_all([make_element(build_tree(conversations), pixels)], SHAPE))


@functools.cache
def example_loss(chunk):
    graph, params, frozen = split_model()
    jitted = jax.jit(lambda batch: edge_loss(nnx.merge(graph, params, frozen), batch, chunk=chunk))
    return jitted(example_batch())


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_loss_does_not_depend_on_the_chunk_size(chunk):
    assert float(example_loss(chunk).total) == pytest.approx(float(example_loss(96).total), rel=1e-6)
    assert float(example_loss(chunk).weight) == float(example_loss(96).weight)


def test_loss_is_the_weighted_cross_entropy_of_all_logits():
    graph, params, frozen = split_model()
    model, batch = nnx.merge(graph, params, frozen), example_batch()
    logits = jax.jit(lambda batch: model.decoder.logits(model.hidden(batch.inputs)))(batch)
    logits = np.asarray(logits, np.float64)[0]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -sum(
        w * logps[s, t]
        for s, t, w in zip(*(np.asarray(x)[0] for x in (batch.parent, batch.target, batch.weight)), strict=True)
    )
    assert float(example_loss(96).total) == pytest.approx(expected, rel=1e-5)


def test_empty_sequences_change_nothing_and_no_supervision_gives_zero():
    batch = example_batch()
    alone, padded = (mean_loss_and_grads()(batch_of([Batch(*(np.asarray(x)[0] for x in batch))], n)) for n in (1, 4))
    assert float(padded[0]) == pytest.approx(float(alone[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(padded[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    loss, grads = mean_loss_and_grads()(batch._replace(weight=jnp.zeros_like(batch.weight)))
    assert float(loss) == 0.0
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(grads))


def test_only_adapters_and_projector_are_trained():
    _, params, _ = split_model()
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert all(path.startswith("projector.") or path.endswith(("lora_a", "lora_b")) for path in paths)
    assert len(paths) == 4 + 2 * 7
