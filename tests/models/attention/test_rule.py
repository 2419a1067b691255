"""The attention rule compared with plain softmax over ancestors, and rotary positions with transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from reverie_jax.models.attention import attend, attend_leaves, leaf_visible, rope, rope_frequencies, visible
from reverie_jax.models.attention.rule import tree_starts

LENGTH = 12


@st.composite
def forests(draw, length=LENGTH):
    """Parents (-1 for a root, None for padding) of trees laid out depth-first: a parent is on the last path."""
    real = draw(st.integers(0, length))
    parents, path = [], []
    for node in range(real):
        kept = draw(st.integers(0, len(path)))  # how much of the last node's path this node shares; 0 opens a new tree
        path = path[:kept]
        parents.append(path[-1] if path else -1)
        path.append(node)
    return parents + [None] * (length - real)


def ancestors(parents):
    """[i, j]: j is i or above it, by walking up."""
    seen = np.zeros((len(parents), len(parents)), bool)
    for node in range(len(parents)):
        up = node
        while up is not None and up != -1:
            seen[node, up] = True
            up = parents[up]
        seen[node, node] = True
    return seen


def ends_of(parents):
    """One past each node's last descendant; padding sees itself alone."""
    return (1 + np.array([np.flatnonzero(column).max() for column in ancestors(parents).T])).astype(np.int32)


def softmax_attention(q, k, v, seen):
    """Plain float64: one head at a time, softmax over the keys that are seen, the others left out of the sum."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys, head = np.flatnonzero(seen[b, i]), h * k.shape[2] // q.shape[2]
        scores = k[b, keys, head] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v[b, keys, head] / weights.sum()
    return out


def draw_qkv(heads, kv_heads, length=LENGTH, width=5, rows=2, seed=0, scale=2.0):
    random = np.random.default_rng(seed)
    shapes = ((rows, length, heads, width), (rows, length, kv_heads, width), (rows, length, kv_heads, width))
    return [jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for shape in shapes]


TWO_TREES = ends_of([-1, 0, 1, 1, 3, 0, 5, -1, 7, 8, 7, None])
FORK = ends_of([-1, 0, 1, 2, 2, 4, 1, 6, 0, 8, 8, 10])


@given(forests(), forests())
def test_rule_is_the_ancestor_matrix(first, second):
    ends = jnp.asarray(np.stack([ends_of(first), ends_of(second)]))
    np.testing.assert_array_equal(visible(ends), np.stack([ancestors(first), ancestors(second)]))


@given(forests(), st.lists(st.integers(0, LENGTH - 1), min_size=4, max_size=4))
def test_leaves_see_their_ancestors(parents, leaves):
    seen = leaf_visible(jnp.asarray([leaves], jnp.int32), jnp.asarray(ends_of(parents))[None])
    np.testing.assert_array_equal(seen[0], ancestors(parents)[leaves])


@given(forests())
def test_the_start_of_a_tree_is_its_root(parents):
    seen = ancestors(parents)
    np.testing.assert_array_equal(tree_starts(jnp.asarray(ends_of(parents))[None])[0], seen.argmax(axis=1))


@pytest.mark.parametrize(("heads", "kv_heads", "scale"), [(4, 4, 2.0), (6, 2, 2.0), (3, 1, 2.0), (4, 2, 50.0)])
def test_attend_is_softmax_over_ancestors(heads, kv_heads, scale):
    q, k, v = draw_qkv(heads, kv_heads, scale=scale)
    ends = jnp.asarray(np.stack([TWO_TREES, FORK]))
    tolerance = {"rtol": 0, "atol": 1e-5} if scale == 2 else {"rtol": 1e-5, "atol": 1e-2}  # scores are in the thousands
    for rule, seen in ((ends, np.asarray(visible(ends))), (None, np.ones((2, LENGTH, LENGTH), bool))):
        np.testing.assert_allclose(attend(q, k, v, rule), softmax_attention(q, k, v, seen), **tolerance)


def test_unseen_keys_weigh_nothing():
    q, k, v = draw_qkv(4, 2)
    ends = jnp.asarray(np.stack([TWO_TREES, FORK]))
    for query in (0, 4, 7, LENGTH - 1):
        unseen = ~visible(ends)[:, query, :, None, None]
        other = attend(q, jnp.where(unseen, jnp.float32(9), k), jnp.where(unseen, jnp.float32(1e30), v), ends)
        np.testing.assert_array_equal(other[:, query], attend(q, k, v, ends)[:, query])


def test_bfloat16_keeps_softmax_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in draw_qkv(6, 2))
    ends = jnp.asarray(np.stack([TWO_TREES, FORK]))
    out = attend(q, k, v, ends)
    expected = softmax_attention(*(x.astype(jnp.float32) for x in (q, k, v)), np.asarray(visible(ends)))
    assert out.dtype == jnp.bfloat16
    # Rounding the weights, and then the sum, to bfloat16 (2**-9) of values up to 8 costs no more.
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=2 * 8 * 2**-9)


@pytest.mark.parametrize(("heads", "kv_heads", "step"), [(4, 4, 0), (6, 2, 2)])
def test_leaf_attention_is_attend_with_its_suffix_appended(heads, kv_heads, step):
    ends, leaves, size = np.stack([TWO_TREES, FORK]), np.array([[2, 4, 9], [3, 8, 11]], np.int32), 4
    q, k, v = draw_qkv(heads, kv_heads, seed=1)
    leaf_q = draw_qkv(heads, kv_heads, length=3, seed=2)[0]
    grown = [x.reshape(2, 3, size, kv_heads, 5) for x in draw_qkv(heads, kv_heads, length=3 * size, seed=3)[1:]]
    # Entries of the suffix after `step` are not read.
    grown = [x.at[:, :, step + 1 :].set(77.0) for x in grown]
    seen = leaf_visible(jnp.asarray(leaves), jnp.asarray(ends))
    out = attend_leaves(leaf_q, (k, v), seen, (grown[0], grown[1]), jnp.int32(step))

    extra = step + 1
    blank = jnp.zeros((2, extra, heads, 5), jnp.float32)
    for leaf in range(leaves.shape[1]):
        long_k, long_v = (
            jnp.concatenate([row, x[:, leaf, :extra]], axis=1) for row, x in zip((k, v), grown, strict=True)
        )
        long_q = jnp.concatenate([q, blank], axis=1).at[:, -1].set(leaf_q[:, leaf])
        # The suffix is below the leaf: the subtrees of the leaf's ancestors end after it.
        above, end = np.asarray(seen)[:, leaf], LENGTH + extra
        long_ends = np.concatenate([np.where(above, end, ends), np.full((2, extra), end)], axis=1).astype(np.int32)
        whole = attend(long_q, long_k, long_v, jnp.asarray(long_ends))
        np.testing.assert_allclose(out[:, leaf], whole[:, -1], rtol=0, atol=1e-5)


def rotated_by_transformers(x, positions, theta):
    width, heads = x.shape[-1], x.shape[2]
    rotary = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(hidden_size=width * heads, num_attention_heads=heads, head_dim=width, rope_parameters=rotary)
    torch_x = torch.tensor(x).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(torch_x, torch.tensor(positions, dtype=torch.long))
    return apply_rotary_pos_emb(torch_x, torch_x, cos, sin)[0].transpose(1, 2).numpy()


def rotated_exactly(x, positions, theta):
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, :, None, None] * theta ** (-np.arange(half) / half))
    both = (x[..., :half].astype(np.float64) + 1j * x[..., half:].astype(np.float64)) * turn
    return np.concatenate([both.real, both.imag], axis=-1)


@pytest.mark.parametrize(("theta", "width"), [(500.0, 10), (10000.0, 64), (1e6, 64)])
def test_rope_is_llamas(theta, width):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 20, 3, width)).astype(np.float32)
    positions = random.integers(0, 512, (2, 20)).astype(np.int32)
    out = rope(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(x.shape[-1], theta))
    np.testing.assert_allclose(out, rotated_by_transformers(x, positions, theta), rtol=0, atol=1e-4)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rope_is_as_exact_as_llamas_at_far_positions(theta):
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 20, 3, 128)).astype(np.float32)
    positions = random.integers(3500, 4096, (1, 20)).astype(np.int32)
    exact = rotated_exactly(x, positions, theta)
    error = np.abs(
        np.asarray(rope(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(x.shape[-1], theta))) - exact
    ).max()
    assert error <= 2 * np.abs(rotated_by_transformers(x, positions, theta) - exact).max()


def test_rope_keeps_dtype_and_position_zero():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 2, 8)), jnp.bfloat16)
    out = rope(x, jnp.zeros((1, 4), jnp.int32), rope_frequencies(8, 10000.0))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(x, np.float32))
