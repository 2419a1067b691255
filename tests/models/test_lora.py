import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.models import lora
from reverie_jax.models.checkpoints import base_checksums, read_model
from reverie_jax.models.lora import adapters, attach, merge
from tests.models.oracle import flat, image_inputs, llava, logits, random_model, saved

NAMES = ("query", "key", "value", "out", "gate", "up", "down")
INPUTS = image_inputs()
ONE = r"projector\.linear1"


def adapted(model=None, scale=0.0, **options):
    """Return a model with adapters; B is random with standard deviation `scale`."""
    model = random_model() if model is None else model
    attach(model, **({"rank": 3, "alpha": 5.0} | options))
    random = np.random.default_rng(0)
    for _, _, _, b in adapters(model):
        if scale:
            b.set_value(jnp.asarray(scale * random.standard_normal(b.shape), jnp.float32))
    return model


def one_layer(**options):
    """Return a single adapted layer and inputs for it."""
    layer = adapted(targets=ONE, scale=0.3, **options).projector.linear1
    return layer, jnp.asarray(np.random.default_rng(1).standard_normal((4, layer.inputs)), jnp.float32)


def paths(model):
    return [path for path, *_ in adapters(model)]


@pytest.fixture(scope="module")
def base_logits():
    return logits(random_model(), INPUTS)


def test_attach_changes_neither_the_output_nor_the_base(base_logits):
    model = adapted(dropout=0.5)
    np.testing.assert_array_equal(logits(model, INPUTS), base_logits)
    np.testing.assert_array_equal(logits(model, INPUTS, jax.random.key(0)), base_logits)  # B is zero
    before, after = flat(random_model()), flat(model)
    assert {path.split(".")[-1] for path in after.keys() - before.keys()} == {"lora_a", "lora_b"}
    assert base_checksums(model) == base_checksums(random_model())


def test_default_targets_are_the_decoder_layers():
    model = random_model()
    merge(model)  # nothing to merge
    wanted = sorted(f"decoder.layers.{name}" for name in NAMES)
    assert sorted(attach(model, rank=2, alpha=2.0)) == sorted(paths(model)) == wanted
    before, after = flat(random_model()), flat(model)
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize("targets", ["query", r"decoder\.layers\.(q_proj|v_proj)", ""])
def test_unknown_target(targets):
    with pytest.raises(ValueError, match="no linear") as caught:
        attach(random_model(), rank=2, alpha=2.0, targets=targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors(dtype, tmp_path):
    model = adapted(read_model(saved(llava(), tmp_path), dtype=dtype), rank=3)
    for path, layer, *factors in adapters(model):
        a, b = (np.asarray(factor[...]) for factor in factors)
        assert isinstance(layer.lora_a, nnx.LoRAParam)
        assert a.dtype == b.dtype == np.float32
        assert (a.shape, b.shape) == ((2, layer.inputs, 3), (2, 3, layer.outputs)), path
        bound = layer.inputs**-0.5
        # Uniform over +-bound: a sample this large comes near both ends, and spreads by bound / sqrt(3).
        assert 0.9 * bound < a.max() <= bound
        assert -0.9 * bound > a.min() >= -bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.15)
        assert not b.any()


def test_each_layer_and_each_seed_has_its_own_random_factors():
    first, other, again = (
        {path: np.asarray(a[...]) for path, _, a, _ in adapters(adapted(seed=seed))} for seed in (1, 2, 1)
    )
    for path, a in first.items():
        assert not np.array_equal(a[0], a[1]), path
        assert not np.array_equal(a, other[path]), path
        assert np.array_equal(a, again[path]), path
    assert not np.array_equal(first["decoder.layers.query"], first["decoder.layers.key"])


def test_scale_is_alpha_over_rank():
    layer, x = one_layer(rank=4, alpha=6.0)
    kernel, bias, a, b = (np.float64(part[...]) for part in (layer.kernel, layer.bias, layer.lora_a, layer.lora_b))
    expected = np.float64(x) @ (kernel + 6.0 / 4.0 * a @ b) + bias
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)])
def test_dora_scales_columns_to_their_magnitudes(dtype, error):
    layer, x = one_layer(rank=4, alpha=6.0)
    layer.kernel.set_value(layer.kernel[...].astype(dtype))
    magnitudes, x = np.random.default_rng(2).uniform(0.5, 2, layer.outputs), x.astype(dtype)
    lora.set_magnitudes(layer, {0: magnitudes})
    kernel, bias, a, b = (np.float64(part[...]) for part in (layer.kernel, layer.bias, layer.lora_a, layer.lora_b))
    columns = kernel + 6.0 / 4.0 * a @ b
    columns *= magnitudes / np.linalg.norm(columns, axis=0)
    expected = np.float64(x) @ columns + bias
    assert layer(x).dtype == dtype
    np.testing.assert_allclose(np.float64(layer(x)), expected, rtol=0, atol=error * np.abs(expected).max())


def test_merge(base_logits):
    model = adapted(scale=0.1)
    expected = logits(model, INPUTS)
    assert np.abs(expected - base_logits).max() > 0.1
    merge(model)
    assert not paths(model)
    assert flat(model).keys() == flat(random_model()).keys()
    assert base_checksums(model) != base_checksums(random_model())
    merged = logits(model, INPUTS)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)
    adapted(model)  # new adapters on the merged model
    np.testing.assert_array_equal(logits(model, INPUTS), merged)


def test_merged_bfloat16_is_rounded_once(tmp_path):
    model = adapted(read_model(saved(llava(), tmp_path), dtype=jnp.bfloat16), scale=0.1)
    layer = model.decoder.layers.query
    delta = layer.lora_scale * (layer.lora_a[...] @ layer.lora_b[...])
    expected = (layer.kernel[...].astype(jnp.float32) + delta).astype(jnp.bfloat16)
    merge(model)
    np.testing.assert_array_equal(np.asarray(layer.kernel[...], np.float32), np.asarray(expected, np.float32))


def test_merge_of_a_quantized_layer_is_refused():
    model = adapted(targets=ONE)
    model.projector.linear1.quantize("int8")
    with pytest.raises(ValueError, match=ONE):
        merge(model)


def test_dora_and_quantization_exclude_each_other():
    layer = adapted(targets=ONE).projector.linear1
    layer.quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        lora.set_magnitudes(layer, {})
    model = adapted(targets=ONE)
    lora.set_magnitudes(model.projector.linear1, {})
    with pytest.raises(ValueError, match=ONE):
        lora.quantize(model, "int8", ONE)


def test_dropout_needs_a_key():
    model, plain, key = adapted(scale=0.1, dropout=0.5), logits(adapted(scale=0.1), INPUTS), jax.random.key(0)
    np.testing.assert_array_equal(logits(model, INPUTS), plain)
    dropped = logits(model, INPUTS, key)
    assert np.abs(dropped - plain).max() > 1e-2
    np.testing.assert_array_equal(dropped, logits(model, INPUTS, key))
    assert np.abs(dropped - logits(model, INPUTS, jax.random.key(1))).max() > 1e-2
    layer, x = one_layer()
    np.testing.assert_array_equal(layer(x, jax.random.key(0)), layer(x))  # a key without dropout


def test_dropout_has_the_right_mean_and_variance():
    layer, x = one_layer(dropout=0.3)
    draws = 2000
    outputs = np.asarray(jax.jit(jax.vmap(lambda key: layer(x, key)))(jax.random.split(jax.random.key(0), draws)))
    error = np.abs(outputs.mean(0) - np.asarray(layer(x)))
    assert (error < 5 * outputs.std(0) / draws**0.5 + 1e-6).all()
    # Inputs are dropped, not outputs: variance p / (1 - p) * sum over inputs of (x_i * delta_i)^2.
    delta = np.float64(layer.lora_scale) * np.float64(layer.lora_a[...]) @ np.float64(layer.lora_b[...])
    np.testing.assert_allclose(outputs.var(0), 0.3 / 0.7 * np.float64(x) ** 2 @ delta**2, rtol=0.2)


def test_attach_in_parts_and_twice():
    model = adapted(targets=r"decoder\.layers\.query")
    attach(model, rank=2, alpha=2.0, targets=r"decoder\.layers\.value")
    with pytest.raises(ValueError, match=r"decoder\.layers\.query"):
        attach(model, rank=2, alpha=2.0)
    assert sorted(paths(model)) == ["decoder.layers.query", "decoder.layers.value"]  # unchanged
