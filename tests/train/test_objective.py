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

from reverie_jax.data.packing import Batch, SequenceShape, element, pack, stack
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.models import lora
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.step import lora_and_projector, loss_and_grads
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
    return nnx.split(model, lora_and_projector, ...)


@functools.cache
def jitted():
    graph, params, frozen = split_model()
    return jax.jit(lambda batch: loss_and_grads(graph, params, frozen, batch, None))


@functools.cache
def jitted_sum():
    """Sum of a row's weighted losses and its gradients: what adds up over conversations."""
    graph, params, frozen = split_model()

    def total(params, batch):
        return edge_loss(nnx.merge(graph, params, frozen), batch).total

    return jax.jit(lambda batch: jax.value_and_grad(total)(params, batch))


def random_talk(rng, openings, images):
    """A conversation of one to three exchanges; openings and words come from few, so that much is shared."""
    ids, weights, features = [1], [0.0], [-1]

    def say(new, weight=0.0, feature=None):
        ids.extend(new)
        weights.extend([weight] * len(new))
        features.extend([-1] * len(new) if feature is None else feature)

    for image in range(images):
        say([3] * PATCHES, feature=list(range(image * PATCHES, (image + 1) * PATCHES)))
    say(openings[int(rng.integers(len(openings)))])
    for _ in range(int(rng.integers(1, 4))):
        say(rng.integers(10, 13, int(rng.integers(1, 4))).tolist())
        say(rng.integers(20, 22, int(rng.integers(1, 4))).tolist(), weight=float(rng.choice([0.0, 0.5, 1.0, 2.0])))
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(features, np.int32))


def rows_of(elements, shape):
    return list(pack(grain.MapDataset.source(elements).to_iter_dataset(), shape, PATCHES))


def batch_of(rows, wanted=None):
    return Batch(*map(jnp.asarray, stack(rows, wanted or len(rows))))


@st.composite
def forests(draw):
    """Seeds and sizes: (images of each tree, conversations of each tree)."""
    trees = draw(st.integers(1, 4))
    return draw(st.integers(0, 2**31)), [(draw(st.integers(1, 2)), draw(st.integers(1, 5))) for _ in range(trees)]


@hypothesis.given(forests())
@hypothesis.settings(max_examples=25)
def test_packed_trees_equal_conversations_one_by_one(case):
    seed, sizes = case
    rng = np.random.default_rng(seed)
    elements, flat = [], []
    for images, talks in sizes:
        openings = [rng.integers(5, 8, int(rng.integers(1, 5))).tolist() for _ in range(int(rng.integers(1, 3)))]
        conversations = [random_talk(rng, openings, images) for _ in range(talks)]
        pixels = rng.integers(0, 255, (images, 24, 24, 3), dtype=np.uint8)
        elements.append(element(build_tree(conversations), pixels))
        flat += [element(build_tree([talk]), pixels) for talk in conversations]
    rows = rows_of(elements, SHAPE)
    loss, grads = jitted()(batch_of(rows, 4))
    total, weight, sums = 0.0, 0.0, None
    for alone in flat:
        row = batch_of(rows_of([alone], FLAT))
        value, gradient = jitted_sum()(row)
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
    talks = [random_talk(rng, [[5, 6]], 1) for _ in range(4)]
    pixels = rng.integers(0, 255, (1, 24, 24, 3), dtype=np.uint8)
    return batch_of(rows_of([element(build_tree(talks), pixels)], SHAPE))


@pytest.mark.parametrize("chunk", [1, 7, 32, 96, 500])
def test_chunking_changes_nothing(chunk):
    graph, params, frozen = split_model()
    batch = example_batch()
    model = nnx.merge(graph, params, frozen)
    whole, part = (edge_loss(model, batch, chunk=size) for size in (96, chunk))
    assert float(part.total) == pytest.approx(float(whole.total), rel=1e-6)
    assert float(part.weight) == float(whole.weight)


def test_loss_is_the_weighted_cross_entropy_written_out():
    graph, params, frozen = split_model()
    model, batch = nnx.merge(graph, params, frozen), example_batch()
    hidden = model.hidden(batch.tokens, batch.positions, batch.ends, batch.image_slots, batch.pixels)
    logits = np.asarray(model.decoder.logits(hidden), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = -sum(
        w * logp[s, t]
        for s, t, w in zip(*(np.asarray(x)[0] for x in (batch.parent, batch.target, batch.weight)), strict=True)
    )
    assert float(edge_loss(model, batch).total) == pytest.approx(by_hand, rel=1e-5)


def test_empty_rows_add_nothing():
    batch = example_batch()
    loss, grads = jitted()(batch)
    filled = batch_of([Batch(*(np.asarray(x)[0] for x in batch))], 3)
    again, more = jitted()(filled)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(more), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_batch_that_teaches_nothing_has_loss_zero():
    batch = example_batch()
    loss, grads = jitted()(batch._replace(weight=jnp.zeros_like(batch.weight)))
    assert float(loss) == 0.0
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(grads))


def test_frozen_parts_get_no_gradient():
    _, params, _ = split_model()
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert all(path.startswith("projector.") or path.endswith(("lora_a", "lora_b")) for path in paths)
    assert len(paths) == 4 + 2 * 7
