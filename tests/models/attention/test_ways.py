"""All ways of attention compared with `attend_dense`; the TPU's kernels in interpret mode, block by block."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from reverie_jax.models import attention
from reverie_jax.models.attention import (
    attend,
    attend_blocks,
    attend_chunked,
    attend_dense,
    cudnn,
    flash,
    tokamax,
    visible,
)
from reverie_jax.models.attention.flash_kernels import block_size, resident_blocks
from reverie_jax.models.attention.rule import MASKED, SKIPPED, WHOLE, block_kinds
from reverie_jax.models.sharding import make_mesh
from tests.models.attention.test_rule import ends_of, forests

LENGTH, BLOCK = 44, 16
SHAPE = (2, LENGTH, 4, 2, 12)


def packed(*sizes, length):
    """Causal trees of these sizes side by side; what is left is padding."""
    ends = np.arange(1, length + 1, dtype=np.int32)
    start = 0
    for size in sizes:
        ends[start : start + size] = start + size
        start += size
    return ends


def fork(prefix, *branches):
    """A shared prefix, and branches of these sizes that see it and themselves."""
    length = prefix + sum(branches)
    ends = packed(prefix, *branches, length=length)
    ends[:prefix] = length
    return ends


NAMED = {
    "causal": np.full(LENGTH, LENGTH, np.int32),
    "packed": packed(3, 20, 1, 14, length=LENGTH),
    "padding": packed(length=LENGTH),
    "fork": fork(18, 9, 16, 1),
    "no padding in the last block": packed(32, 12, length=LENGTH),
}


def draw(shape, dtype=jnp.float32, seed=0):
    batch, length, heads, kv_heads, width = shape
    random = np.random.default_rng(seed)
    sizes = [(batch, length, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(random.standard_normal(size), dtype) for size in sizes]


@functools.cache
def both_ways(function, **options):
    """Jitted (q, k, v, dout, ends) -> (out, dq, dk, dv); one compilation serves all `ends` of a shape."""

    def run(q, k, v, dout, ends):
        out, back = jax.vjp(lambda q, k, v: function(q, k, v, ends, **options), q, k, v)
        return out, *back(dout)

    return jax.jit(run)


def tokamax_on_cpu(q, k, v, ends):
    """tokamax's attention by XLA, with the mask that its GPU kernels get."""
    api = pytest.importorskip("tokamax._src.ops.attention.api", reason="needs tokamax (extra cuda13)")
    return tokamax.attend_tokamax(q, k, v, ends, kernel=api.IMPLEMENTATIONS["xla"])


WAYS = {
    "tokamax": tokamax_on_cpu,
    "TPU": functools.partial(flash, interpret=True),
    "CPU": attend_blocks,
    "other": attend_chunked,
}


def computed(way, *args, block=BLOCK):
    """Return what a way computes in blocks of this size; None is its own."""
    with promotion_of(way):
        return both_ways(WAYS[way], **options_of(way, block))(*args)


@contextlib.contextmanager
def promotion_of(way):
    """tokamax promotes shapes and dtypes; the rest of the suite is strict."""
    with contextlib.ExitStack() as stack:
        if way == "tokamax":
            stack.enter_context(jax.numpy_rank_promotion("allow"))
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
        yield


def options_of(way, block=BLOCK):
    return {} if block is None or way == "tokamax" else {"chunk" if way == "other" else "block": block}


def assert_same(got, want, atol=2e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


CASES = {name: (SHAPE, np.stack([ends, NAMED["causal"]]), BLOCK) for name, ends in NAMED.items()} | {
    "one key head, wide": ((1, 37, 3, 1, 96), packed(5, 19, length=37)[None], BLOCK),
    "no ends": ((2, 37, 2, 2, 128), None, BLOCK),
    "their own block": ((1, 140, 2, 1, 12), packed(20, 100, length=140)[None], None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_rule_is_followed(name, way):
    shape, ends, block = CASES[name]
    ends = None if ends is None else jnp.asarray(ends)
    assert_same(computed(way, *draw(shape), ends, block=block), both_ways(attend_dense)(*draw(shape), ends))


@pytest.mark.parametrize("way", ["TPU", "CPU", "tokamax"])
@given(forests(LENGTH), forests(LENGTH))
@settings(max_examples=15)
def test_the_rule_is_followed_on_trees(way, first, second):
    ends = jnp.asarray(np.stack([ends_of(first), ends_of(second)]))
    assert_same(computed(way, *draw(SHAPE), ends), both_ways(attend_dense)(*draw(SHAPE), ends))


@pytest.mark.parametrize("way", ["TPU", "CPU", "tokamax"])
def test_bfloat16(way):
    ends = jnp.asarray(np.stack([NAMED["fork"], NAMED["packed"]]))
    exact = both_ways(attend_dense)(*(x.astype(jnp.float32) for x in draw(SHAPE, jnp.bfloat16)), ends)
    out = computed(way, *draw(SHAPE, jnp.bfloat16), ends)
    for mine, true in zip(out, map(np.asarray, exact), strict=True):
        assert mine.dtype == jnp.bfloat16
        # Weights, results, and the output that the backward pass starts from are rounded to 2**-9 of the largest.
        assert np.abs(np.asarray(mine, np.float32) - true).max() <= 4 * 2**-9 * np.abs(true).max()


@pytest.mark.parametrize("way", ["TPU", "CPU", "tokamax"])
def test_scores_in_the_thousands_and_unseen_values_beyond_reason(way):
    q, k, v, dout = draw(SHAPE)
    ends = jnp.asarray(np.stack([NAMED["packed"], NAMED["fork"]]))
    args = (60 * q, 60 * k, v.at[:, 5].set(1e30), dout, ends)
    assert float(jnp.abs(jnp.einsum("blhd,bmhd->bhlm", args[0][:, :, :2], args[1])).max()) > 5e3
    got, want = computed(way, *args)[0], both_ways(attend_dense)(*args)[0]
    blind = ~np.asarray(visible(ends))[:, :, 5]
    assert blind[0].sum() > 20
    np.testing.assert_allclose(np.asarray(got)[blind], np.asarray(want)[blind], rtol=0, atol=1e-3)


@given(forests(LENGTH).map(ends_of) | st.sampled_from(list(NAMED.values())))
def test_block_kinds_are_exact(ends):
    ends, block = jnp.asarray(ends)[None], 8
    kinds = np.asarray(block_kinds(ends, LENGTH, block))[0]
    count = -(-LENGTH // block)
    seen = np.eye(count * block, dtype=bool)  # padding sees itself
    seen[:LENGTH, :LENGTH] = np.asarray(visible(ends))[0]
    pairs = seen.reshape(count, block, count, block).swapaxes(1, 2)
    assert not pairs[kinds == SKIPPED].any()
    # Whether a block is whole is told from its largest and smallest end, and that is exact.
    np.testing.assert_array_equal(kinds == WHOLE, pairs.all((2, 3)))
    assert (np.diagonal(kinds) != SKIPPED).all()
    # Skipping looks at the largest end alone: exact too, since the key with that end is seen by the block's first query
    # or, on the diagonal, by itself.
    np.testing.assert_array_equal(kinds == SKIPPED, ~pairs.any((2, 3)))


def test_packed_rows_skip_most_pairs():
    def counts(ends):
        kinds = block_kinds(jnp.asarray(ends)[None], 2048, 128)
        return int((kinds != SKIPPED).sum()), int((kinds == WHOLE).sum())

    assert counts(np.full(2048, 2048, np.int32)) == (16 * 17 // 2, 16 * 15 // 2)
    assert counts(packed(*[256] * 8, length=2048))[0] == 8 * 3
    assert counts(packed(300, 500, 200, 400, 350, length=2048))[0] <= 0.45 * 16 * 17 // 2


def test_kinds_without_ends():
    kinds = np.asarray(block_kinds(None, 577, 128))
    assert kinds.shape == (1, 5, 5)
    assert (kinds[..., :4] == WHOLE).all()
    assert (kinds[..., 4] == MASKED).all()
    assert (np.asarray(block_kinds(None, 640, 128)) == WHOLE).all()


def test_skipped_pairs_move_no_block():
    random = np.random.default_rng(0)
    kinds = random.choice([SKIPPED, MASKED, WHOLE], p=[0.6, 0.2, 0.2], size=(3, 20, 9)).astype(np.int32)
    kinds[..., 4] = MASKED  # every block is needed once, as on the diagonal
    held = np.asarray(resident_blocks(jnp.asarray(kinds)))
    steps = np.broadcast_to(np.arange(9), kinds.shape)
    np.testing.assert_array_equal(held[kinds != SKIPPED], steps[kinds != SKIPPED])
    loads = 1 + (np.diff(held, axis=-1) != 0).sum(-1)
    np.testing.assert_array_equal(loads, (kinds != SKIPPED).sum(-1))


@pytest.mark.parametrize(("length", "block"), [(1, 128), (577, 640), (640, 640), (1024, 512), (2048, 512), (2049, 384)])
def test_block_pads_little(length, block):
    assert block_size(length) == block


@pytest.mark.parametrize("way", ["TPU", "CPU", "tokamax"])
@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}])
def test_ways_over_a_mesh(axes, way):
    mesh = make_mesh(**axes)
    ends = jnp.asarray(np.stack([NAMED["fork"], NAMED["packed"]]))
    args = (*draw(SHAPE), ends)  # 2 rows split over two devices, not over four
    want = both_ways(attend_dense)(*args)
    with jax.set_mesh(mesh), promotion_of(way):
        args = jax.device_put(args, NamedSharding(mesh, PartitionSpec("fsdp")))
        assert_same(both_ways.__wrapped__(WAYS[way], **options_of(way))(*args), want)


def shapes_in(jaxpr):
    """Shapes of everything that a program computes, on every platform."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {getattr(out.aval, "shape", ()) for out in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


def square(shapes, length):
    return [shape for shape in shapes if sum(size >= length for size in shape) > 1]


def layers(q, k, v, ends, attention=attend):
    """Attention as the models use it: a scan over recomputed layers."""

    def layer(x, scale):
        return x + attention(x * scale, k, v, ends), None

    return jax.lax.scan(jax.checkpoint(layer), q, jnp.ones((3, 1, 1, 1, 1), q.dtype))[0].astype(jnp.float32).sum()


def abstract(length, causal=True):
    x = jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16)
    return x, x, x, jax.ShapeDtypeStruct((2, length), jnp.int32) if causal else None


@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_never_have_all_scores(causal):
    def shapes(attention):
        run = jax.value_and_grad(functools.partial(layers, attention=attention), (0, 1, 2))
        return shapes_in(jax.make_jaxpr(run)(*abstract(1100, causal)).jaxpr)

    assert square(shapes(attend_dense), 1100)
    assert not square(shapes(attend), 1100)


def test_sequences_of_middle_length_save_no_scores():
    _, back = jax.eval_shape(lambda *args: jax.vjp(attend, *args[:3], None), *abstract(300))
    kept = {leaf.shape for leaf in jax.tree.leaves(back)}
    assert (2, 300, 2, 64) in kept
    assert not square(kept, 300)


@pytest.mark.parametrize("causal", [True, False])
def test_kernels_are_chosen_when_lowering_for_a_tpu(causal):
    traced = jax.jit(jax.value_and_grad(layers, (0, 1, 2))).trace(*abstract(1100, causal))
    # forward, forward again in the recomputed layer, and the two of the backward pass
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.custom_call @tpu_custom_call") == 4
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_attend_in_scanned_layers_equals_dense():
    q, k, v, _ = draw((1, 300, 2, 1, 12))
    ends = jnp.asarray(packed(120, 100, length=300)[None])
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(layers, attention=f), (0, 1, 2)))(q, k, v, ends)
        for f in (attend, attend_dense)
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5)  # gradients are as large as 60


def test_the_way_on_an_accelerator_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(attention, "_logged", set())
    caplog.set_level("INFO", logger=attention.__name__)
    gpu = {"cuda": cudnn.attend_cudnn, "cpu": attend_blocks}
    for backend, ways in [("gpu", gpu), ("gpu", gpu), ("cpu", gpu), ("gpu", {"cpu": attend_blocks})]:
        attention._log_once(backend, ways)
    first, second = caplog.messages
    assert "cuDNN" in first
    assert "without a kernel" in second
