"""Options of a recipe that must not change the result (remat, offload, cached features), or change it within a bound."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import DataError
from reverie_jax.models import lora
from reverie_jax.models.quantize import BLOCK, pack, unpack
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.vision_cache import cached_features
from tests.train import tiny


@pytest.mark.parametrize(
    "changes",
    [{"remat": "dots"}, {"remat": "none"}, {"offload": True}],
    ids=["remat dots", "remat none", "offload"],
)
def test_losses_do_not_depend_on_memory_options(finished, tmp_path, changes):
    assert tiny.run(tmp_path, **changes).losses == pytest.approx(finished.losses, rel=1e-5)


@pytest.mark.slow
def test_offload_on_a_mesh_does_not_change_losses(finished, tmp_path):
    run = tiny.run(tmp_path, offload=True, mesh=make_mesh(2, 2, 1))
    assert run.losses == pytest.approx(finished.losses, rel=1e-5)


def test_cached_features_do_not_change_losses(finished, tmp_path):
    cache = tmp_path / "features"
    first = tiny.run(tmp_path / "writes", vision_cache=cache).losses
    assert first == pytest.approx(finished.losses, rel=1e-5)
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert tiny.run(tmp_path / "reads", vision_cache=cache).losses == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    other = tiny.model()
    other.vision.cls.set_value(other.vision.cls[...] + 1)
    with pytest.raises(DataError, match=str(cache)):
        cached_features(other, tiny.processor(), tiny.records(), cache)


# Few sizes, since each is compiled: less than a block, not a multiple of one, several.
@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.parametrize("inputs", [2, 14, 192])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5)
def test_quantization_error_is_bounded(inputs, bits, seed):
    outputs = 5
    kernel = np.random.default_rng(seed).normal(size=(2, inputs, outputs)).astype(np.float32)
    codes, scale = pack(jnp.asarray(kernel), bits)
    back = np.asarray(unpack(codes, scale, jnp.float32))
    assert back.shape == kernel.shape
    if bits == "int8":  # half a step of each column's scale
        assert (np.abs(back - kernel) <= np.asarray(scale) / 2 * 1.001).all()
        assert codes.nbytes == kernel.size
    else:  # half the widest gap between two of the sixteen values, times each block's largest
        block = math.gcd(inputs, BLOCK)
        largest = np.abs(kernel.reshape(2, inputs // block, block, outputs)).max(2).repeat(block, axis=1)
        assert (np.abs(back - kernel) <= 0.1520 * largest.reshape(kernel.shape)).all()
        assert codes.nbytes == kernel.size // 2
    again = unpack(*pack(jnp.asarray(back), bits), jnp.float32)  # representable values stay
    np.testing.assert_allclose(np.asarray(again), back, atol=1e-6)


def test_nf4_rounds_to_the_nearest_value():
    from reverie_jax.models.quantize import _NF4

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 5)).astype(np.float32)
    largest = np.abs(kernel).max(0)
    table = np.asarray(_NF4, np.float32)
    nearest = table[np.abs(kernel[:, :, None] / largest[None, :, None] - table).argmin(-1)] * largest
    back = unpack(*pack(jnp.asarray(kernel), "nf4"), jnp.float32)
    np.testing.assert_allclose(np.asarray(back), nearest, atol=1e-6)


@pytest.mark.parametrize("bits", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_adapters_of_a_quantized_run_load_into_the_unquantized_model(bits, finished, tmp_path):
    assert tiny.run(tmp_path, quantization=bits).losses == pytest.approx(finished.losses, rel=0.05)
    model = tiny.model()
    assert load_run(model, tmp_path).quantization == bits
    assert all(layer.scales is None for _, layer in lora.linears(model))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_quantized_weights_on_a_mesh_do_not_change_losses(bits, tmp_path):
    single = tiny.run(tmp_path / "one", quantization=bits)
    mesh = tiny.run(tmp_path / "mesh", quantization=bits, mesh=make_mesh(1, 2, 2))
    assert mesh.losses == pytest.approx(single.losses, rel=1e-5)


def test_nf4_weights_take_half_a_byte_and_cannot_be_merged():
    model = tiny.model()

    def kernels():
        return [layer.kernel for path, layer in lora.linears(model) if path.startswith("decoder.layers")]

    size = sum(kernel[...].size for kernel in kernels())
    lora.quantize(model, "nf4")
    assert sum(kernel[...].nbytes for kernel in kernels()) == size / 2
    lora.attach(model, rank=2, alpha=2.0)
    with pytest.raises(ValueError, match=r"quantize|bits"):
        lora.merge(model)


def test_losses_are_reported_by_dataset(tmp_path):
    mixed = tiny.Records(
        dataclasses.replace(
            record,
            conversations=tuple(
                dataclasses.replace(conversation, dataset="ab"[index % 2])
                for index, conversation in enumerate(record.conversations)
            ),
        )
        for record in tiny.records()
    )
    supervision = Supervision(answers="as-published")
    tiny.run(tmp_path, data=mixed, gradient_accumulation_steps=2, supervision=supervision)
    for row in read_metrics(tmp_path):
        parts = [row["loss/a"], row["loss/b"]]
        assert min(parts) <= row["loss"] + 1e-6 <= max(parts) + 2e-6
