import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model

from reverie_jax.models.checkpoints import base_checksums, read_model
from reverie_jax.models.lora import attach, linears, merge
from tests.models.oracle import GROUPED, flat, llava, llava_logits, logits, picture_rows, random_model, saved

NAMES = ("query", "key", "value", "out", "gate", "up", "down")
PEFT_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model=None, scale=0.0, **options):
    """A model with adapters; B random of standard deviation `scale`."""
    model = random_model() if model is None else model
    attach(model, **({"rank": 3, "alpha": 5.0} | options))
    random = np.random.default_rng(0)
    for _, layer in linears(model):
        if layer.lora_b is not None and scale:
            b = scale * random.standard_normal(layer.lora_b.shape)
            layer.lora_b.set_value(jnp.asarray(b, jnp.float32))
    return model


def carriers(model):
    return {path: layer for path, layer in linears(model) if layer.lora_a is not None}


def test_attach_leaves_the_output_unchanged():
    batch = picture_rows()
    np.testing.assert_array_equal(logits(adapted(), batch), logits(random_model(), batch))


def test_attach_leaves_the_base_unchanged():
    before, after = flat(random_model()), flat(adapted())
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert {path.split(".")[-1] for path in after.keys() - before.keys()} == {"lora_a", "lora_b"}


def test_default_targets_are_the_decoder_layers():
    model = random_model()
    paths = attach(model, rank=2, alpha=2.0)
    assert sorted(paths) == sorted(f"decoder.layers.{name}" for name in NAMES)
    assert sorted(carriers(model)) == sorted(paths)


def test_targets_match_the_whole_path():
    model = random_model()
    assert attach(model, rank=2, alpha=2.0, targets=r"projector\.linear1") == ["projector.linear1"]
    with pytest.raises(ValueError, match="no linear"):
        attach(model, rank=2, alpha=2.0, targets="query")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors(dtype, tmp_path):
    model = adapted(read_model(saved(llava(), tmp_path), dtype=dtype), rank=3)
    for path, layer in carriers(model).items():
        a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
        assert isinstance(layer.lora_a, nnx.LoRAParam)
        assert a.dtype == b.dtype == np.float32
        assert a.shape == (2, layer.inputs, 3), path
        assert b.shape == (2, 3, layer.outputs), path
        bound = layer.inputs**-0.5
        assert np.abs(a).max() <= bound
        # Uniform over +-bound: a sample this large comes near both ends, and spreads by bound / sqrt(3).
        assert a.max() > 0.9 * bound
        assert a.min() < -0.9 * bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.15)
        assert not b.any()


def test_each_layer_and_each_seed_draws_its_own():
    model, other = adapted(seed=1), adapted(seed=2)
    factors = {path: np.asarray(layer.lora_a[...]) for path, layer in carriers(model).items()}
    for path, a in factors.items():
        assert not np.array_equal(a[0], a[1]), path
        assert not np.array_equal(a, np.asarray(carriers(other)[path].lora_a[...])), path
    assert not np.array_equal(factors["decoder.layers.query"], factors["decoder.layers.key"])
    again = carriers(adapted(seed=1))
    assert all(np.array_equal(a, np.asarray(again[path].lora_a[...])) for path, a in factors.items())


def test_scale_is_alpha_over_rank():
    model = adapted(targets=r"projector\.linear1", rank=4, alpha=6.0, scale=0.3)
    layer = model.projector.linear1
    x = np.random.default_rng(1).standard_normal((5, layer.inputs)).astype(np.float32)
    kernel, bias, a, b = (np.float64(part[...]) for part in (layer.kernel, layer.bias, layer.lora_a, layer.lora_b))
    np.testing.assert_allclose(layer(jnp.asarray(x)), x @ kernel + bias + 6.0 / 4.0 * (x @ a @ b), rtol=0, atol=1e-5)


def test_merged_equals_adapted():
    model, batch = adapted(scale=0.1), picture_rows()
    expected = logits(model, batch)
    assert np.abs(expected - logits(random_model(), batch)).max() > 0.1
    merge(model)
    assert not carriers(model)
    assert flat(model).keys() == flat(random_model()).keys()
    np.testing.assert_allclose(logits(model, batch), expected, rtol=0, atol=1e-5)


def test_merging_without_adapters_changes_nothing():
    model = random_model()
    merge(model)
    before, after = flat(random_model()), flat(model)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_merged_bfloat16_is_rounded_once(tmp_path):
    model = adapted(read_model(saved(llava(), tmp_path), dtype=jnp.bfloat16), scale=0.1)
    layer = model.decoder.layers.query
    delta = layer.lora_scale * (layer.lora_a[...] @ layer.lora_b[...])
    expected = (layer.kernel[...].astype(jnp.float32) + delta).astype(jnp.bfloat16)
    merge(model)
    np.testing.assert_array_equal(np.asarray(layer.kernel[...], np.float32), np.asarray(expected, np.float32))


def test_logits_are_pefts(tmp_path):
    theirs, batch = llava(GROUPED, seed=3), picture_rows(seed=3)
    model = adapted(read_model(saved(theirs, tmp_path)), scale=0.1)
    base = llava_logits(theirs, batch)
    # The tower has linears of the same names: the expression keeps to the language model.
    targets = r".*language_model.*\.(" + "|".join(PEFT_NAMES) + ")"
    wrapped = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=5, target_modules=targets)).eval()
    factors = {path.split(".")[-1]: layer for path, layer in carriers(model).items()}
    filled = 0
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if found := re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.default\.weight", name):
                layer, part, side = found.groups()
                ours = factors[NAMES[PEFT_NAMES.index(part)]]
                factor = ours.lora_a if side == "A" else ours.lora_b
                tensor.copy_(torch.tensor(np.asarray(factor[...][int(layer)]).T.copy()))
                filled += 1
            assert ("lora_" in name) == bool(found)
    assert filled == 2 * len(NAMES) * GROUPED.text.layers
    expected = llava_logits(wrapped, batch)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(logits(model, batch), expected, rtol=0, atol=1e-4)


def test_dropout_needs_a_key():
    batch, key = picture_rows(), jax.random.key(0)
    model, plain = adapted(scale=0.1, dropout=0.5), adapted(scale=0.1)
    np.testing.assert_array_equal(logits(model, batch), logits(plain, batch))
    dropped = logits(model, batch, key)
    assert np.abs(dropped - logits(plain, batch)).max() > 1e-2
    np.testing.assert_array_equal(dropped, logits(model, batch, key))
    assert np.abs(dropped - logits(model, batch, jax.random.key(1))).max() > 1e-2


def test_a_key_without_dropout_does_nothing():
    layer = adapted(targets=r"projector\.linear1", scale=0.3).projector.linear1
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, layer.inputs)), jnp.float32)
    np.testing.assert_array_equal(layer(x, jax.random.key(0)), layer(x))


def test_dropout_has_the_right_mean():
    model = adapted(targets=r"projector\.linear1", scale=0.3, dropout=0.3)
    layer, draws = model.projector.linear1, 4000
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, layer.inputs)), jnp.float32)
    outputs = np.asarray(jax.jit(jax.vmap(lambda key: layer(x, key)))(jax.random.split(jax.random.key(0), draws)))
    error = np.abs(outputs.mean(0) - np.asarray(layer(x)))
    assert (error < 5 * outputs.std(0) / draws**0.5 + 1e-6).all()
    # Inputs are dropped, not outputs: variance p / (1 - p) * sum over inputs of (x_i * delta_i)^2.
    delta = np.float64(layer.lora_scale) * np.float64(layer.lora_a[...]) @ np.float64(layer.lora_b[...])
    variance = 0.3 / 0.7 * np.float64(x) ** 2 @ delta**2
    np.testing.assert_allclose(outputs.var(0), variance, rtol=0.2)


def test_dropout_leaves_the_base_path_alone():
    model = adapted(dropout=0.5)  # B is zero: whatever is dropped adds nothing
    batch = picture_rows()
    np.testing.assert_array_equal(logits(model, batch, jax.random.key(0)), logits(random_model(), batch))


@pytest.mark.parametrize("targets", ["nothing", r"decoder\.layers\.(q_proj|v_proj)", ""])
def test_unknown_target(targets):
    with pytest.raises(ValueError, match="no linear") as caught:
        attach(random_model(), rank=2, alpha=2.0, targets=targets)
    assert "\n" not in str(caught.value)


def test_attaching_twice():
    model = adapted()
    with pytest.raises(ValueError, match="already"):
        attach(model, rank=2, alpha=2.0)


def test_attaching_in_parts():
    model = adapted(targets=r"decoder\.layers\.query")
    attach(model, rank=2, alpha=2.0, targets=r"decoder\.layers\.value")
    assert sorted(carriers(model)) == ["decoder.layers.query", "decoder.layers.value"]


def test_refused_attach_changes_nothing():
    model = adapted(targets=r"decoder\.layers\.query")
    with pytest.raises(ValueError, match="already"):
        attach(model, rank=2, alpha=2.0)
    assert list(carriers(model)) == ["decoder.layers.query"]


def test_attaching_again_after_a_merge():
    model = adapted(scale=0.1)
    merge(model)
    before = logits(model, picture_rows())
    adapted(model)
    np.testing.assert_array_equal(logits(model, picture_rows()), before)


def test_identity_is_the_bases():
    assert base_checksums(adapted(scale=0.1)) == base_checksums(random_model())


def test_identity_tells_a_merged_model_from_its_base():
    model = adapted(scale=0.1)
    merge(model)
    assert base_checksums(model) != base_checksums(random_model())
