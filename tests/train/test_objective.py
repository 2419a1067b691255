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

from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack, pack_sequence, stack
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.models import lora
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.step import is_lora_or_projector, make_trainable
from tests.train import tiny

PATCHES = tiny.CONFIG.image_tokens
SHAPE = SequenceShape(length=160, images=3, edges=96)
FLAT = SequenceShape(length=64, images=2, edges=40)
ROWS = 6


@functools.cache
def split_model(system="llava"):
    model = tiny.model(tiny.SYSTEMS[system])
    make_trainable(model, tiny.recipe(dropout=0.0))
    for _, layer, _, b in lora.adapters(model):  # B starts at zero, and A's gradient with it
        b.set_value(0.1 * jax.random.normal(jax.random.key(layer.inputs), b.shape))
    return nnx.split(model, is_lora_or_projector, ...)


jitted = jax.jit(tiny.loss_and_grads, static_argnums=0, static_argnames=("steps", "loss_reduction"))


def mean_loss_and_grads(batch, steps=1, loss_reduction="tokens", system="llava"):
    return jitted(*split_model(system), batch, steps=steps, loss_reduction=loss_reduction)


@functools.cache
def sum_of_losses_and_grads(system):
    """Sums over a batch add up over conversations."""
    graph, params, frozen = split_model(system)

    def total(params, batch):
        return edge_loss(nnx.merge(graph, params, frozen), batch).total

    return jax.jit(lambda batch: jax.value_and_grad(total)(params, batch))


def assert_close(grads, expected):
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.linalg.norm(theirs.ravel()))
        assert float(jnp.linalg.norm((ours - theirs).ravel())) <= 1e-5 * max(scale, 1e-3)


def random_conversation(rng, openings, images, patches=PATCHES):
    """A conversation of one to three exchanges; openings and words come from few, so that much is shared."""
    ids, weights, image_slots = [1], [0.0], [-1]

    def add(new, weight=0.0, slots=None):
        ids.extend(new)
        weights.extend([weight] * len(new))
        image_slots.extend([-1] * len(new) if slots is None else slots)

    for image in range(images):
        add([3] * patches, slots=list(range(image * patches, (image + 1) * patches)))
    add(openings[int(rng.integers(len(openings)))])
    for _ in range(int(rng.integers(1, 4))):
        add(rng.integers(10, 13, int(rng.integers(1, 4))).tolist())
        add(rng.integers(20, 22, int(rng.integers(1, 4))).tolist(), weight=float(rng.choice([0.0, 0.5, 1.0, 2.0])))
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(image_slots, np.int32))


def pack_all(elements, shape, patches=PATCHES):
    return list(pack(grain.MapDataset.source(elements).to_iter_dataset(), shape, patches))


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
    check_packed_trees("llava", case)


@pytest.mark.parametrize("system", [system for system in tiny.SYSTEMS if system != "llava"])
@hypothesis.given(forests())
@hypothesis.settings(max_examples=4)
def test_packed_trees_of_the_sister_systems(system, case):
    check_packed_trees(system, case)


def check_packed_trees(system, case):
    (seed, sizes), patches = case, tiny.SYSTEMS[system].image_tokens
    rng = np.random.default_rng(seed)
    elements, flat = [], []
    for images, conversations in sizes:
        openings = [rng.integers(5, 8, int(rng.integers(1, 5))).tolist() for _ in range(int(rng.integers(1, 3)))]
        conversations = [random_conversation(rng, openings, images, patches) for _ in range(conversations)]
        pixels = rng.integers(0, 255, (images, 24, 24, 3), dtype=np.uint8)
        elements.append(make_element(build_tree(conversations), pixels))
        flat += [make_element(build_tree([one]), pixels) for one in conversations]
    rows = pack_all(elements, SHAPE, patches)
    loss, grads = mean_loss_and_grads(batch_of(rows, ROWS), system=system)
    total, weight, sums = 0.0, 0.0, None
    for alone in flat:
        row = batch_of(pack_all([alone], FLAT, patches))
        value, gradient = sum_of_losses_and_grads(system)(row)
        total, weight = total + float(value), weight + float(row.weight.sum())
        sums = gradient if sums is None else optax.tree.add(sums, gradient)
    hypothesis.assume(weight > 0)
    assert abs(float(loss) - total / weight) <= 1e-5 * abs(total / weight)
    expected = optax.tree.scale(1 / weight, sums)
    assert_close(grads, expected)


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


@pytest.mark.parametrize("chunk", [7, 500])
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


def test_no_supervision_gives_zero():
    batch = six_sequences()
    loss, grads = mean_loss_and_grads(batch._replace(weight=jnp.zeros_like(batch.weight)))
    assert float(loss) == 0.0
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(grads))


def six_sequences():
    """A tree of two to seven conversations in each of six sequences."""
    rng = np.random.default_rng(4)
    trees = [build_tree([random_conversation(rng, [[5, 6]], 1) for _ in range(n + 2)]) for n in range(ROWS)]
    pixels = rng.integers(0, 255, (ROWS, 1, 24, 24, 3), dtype=np.uint8)
    return batch_of([pack_sequence([make_element(*one)], SHAPE, PATCHES) for one in zip(trees, pixels, strict=True)])


@pytest.mark.parametrize("steps", [3, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (2, 6))])
def test_mean_over_tokens_does_not_depend_on_micro_batches(steps):
    whole, parts = mean_loss_and_grads(six_sequences()), mean_loss_and_grads(six_sequences(), steps)
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-5)
    assert_close(parts[1], whole[1])


def test_mean_of_means_is_that_of_the_micro_batches_alone():
    batch = six_sequences()
    loss, grads = mean_loss_and_grads(batch, 3, "micro-batches")
    # The other sequences have no weight, so that one program does.
    part = [batch._replace(weight=batch.weight * (np.arange(6)[:, None] % 3 == n).astype(np.float32)) for n in range(3)]
    alone = [mean_loss_and_grads(one) for one in part]
    assert float(loss) == pytest.approx(np.mean([float(one) for one, _ in alone]), rel=1e-5)
    assert_close(grads, jax.tree.map(lambda *grads: sum(grads) / 3, *(grads for _, grads in alone)))
    assert abs(float(loss) - float(mean_loss_and_grads(batch)[0])) > 1e-6
