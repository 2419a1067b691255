"""Options of a recipe that must not change the result (remat, offload, cached features), or change it within a bound."""

import dataclasses
import math
import shutil
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from reverie_jax.errors import DataError, UserError
from reverie_jax.loading import load_model
from reverie_jax.models import lora
from reverie_jax.models.checkpoints import read_model
from reverie_jax.models.quantize import BLOCK, pack, unpack
from reverie_jax.models.sharding import make_mesh
from reverie_jax.scenes import dataset
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.loop import finetune
from reverie_jax.train.step import make_optimizer, schedule, trainable_filter
from reverie_jax.train.vision_cache import cache_key, cached_features
from tests.models import makers
from tests.train import tiny


@pytest.mark.parametrize("remat", ["offload", "dots"])
def test_losses_do_not_depend_on_remat_and_offload(finished, tmp_path, remat):
    assert tiny.run(tmp_path, remat=remat, offload=remat == "dots").losses == pytest.approx(finished.losses, rel=1e-5)


@pytest.mark.slow
def test_offload_on_a_mesh_does_not_change_losses(finished, tmp_path):
    run = tiny.run(tmp_path, offload=True, mesh=make_mesh(2, 2, 1))
    assert run.losses == pytest.approx(finished.losses, rel=1e-5)


def test_cached_features_and_no_remat_do_not_change_losses(finished, tmp_path):
    cache = tmp_path / "features"
    first = tiny.run(tmp_path / "writes", vision_cache=cache, remat="none").losses
    assert first == pytest.approx(finished.losses, rel=1e-5)
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert tiny.run(tmp_path / "reads", vision_cache=cache, remat="none").losses == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    other = tiny.model()
    other.vision.cls.set_value(other.vision.cls[...] + 1)
    with pytest.raises(DataError, match=str(cache)):
        cached_features(other, tiny.processor(), tiny.records(), cache)


def adapted(targets, **changes):
    model = tiny.model()
    lora.attach(model, rank=4, alpha=8.0, targets=targets)
    for _, layer, _, b in lora.adapters(model):
        if "b" in changes:
            b.set_value(b[...] + changes["b"])
        layer.lora_scale = changes.get("scale", layer.lora_scale)
    return model


def test_the_key_of_cached_features_is_all_that_they_depend_on():
    def digest(model=None, processor=None, data=None):
        return cache_key(model or tiny.model(), processor or tiny.processor(), data or tiny.records())

    tower = r"vision\.layers\.(query|value)"
    other = [
        digest(adapted(tower)),
        digest(adapted(tower, b=0.1)),
        digest(adapted(tower, b=0.1, scale=3.0)),
        digest(processor=tiny.processor().override(image_aspect_ratio="square")),
        digest(data=tiny.Records(tiny.records()[:-1])),
        digest(data=tiny.Records(reversed(tiny.records()))),
    ]
    assert len({digest(), *other}) == 7
    # Neither the decoder's adapters nor the texts change an image's features.
    renamed = tiny.Records(
        dataclasses.replace(record, id=f"{record.id}x", conversations=()) for record in tiny.records()
    )
    assert digest() == digest(adapted(r"decoder\.layers\.query", b=0.1)) == digest(data=renamed)


def test_images_are_cropped_in_training_and_whole_in_validation(tmp_path):
    """Nothing is learned, so that losses differ by the images alone; a resumed run sees what an uninterrupted one sees."""
    options = {"learning_rate": 0.0, "projector_learning_rate": 0.0, "holdout": 2}
    whole = tiny.run(tmp_path / "whole", **options)
    options |= {"crop_scale": 0.4, "flip": True}
    cropped = tiny.run(tmp_path / "cropped", **options)
    assert all(a != b for a, b in zip(cropped.losses, whole.losses, strict=True))
    validations = [(run.folder / "validation.jsonl").read_text() for run in (whole, cropped)]
    assert validations[0] == validations[1] != ""
    shutil.rmtree(cropped.folder / "checkpoints" / "8")
    assert tiny.run(cropped.folder, **options).losses == cropped.losses


TOWER = r"vision\.layers\.query"


@pytest.mark.parametrize(
    ("on", "changes"),
    [
        ("", {"target_modules": rf"{TOWER}|decoder\.layers\.query"}),
        (TOWER, {"target_modules": TOWER, "trainable": "adapters"}),
        ("", {"trainable": "all"}),
        ("", {"crop_scale": 0.5, "flip": True}),
    ],
)
def test_features_of_a_tower_that_is_trained_are_not_cached(tmp_path, on, changes):
    model = adapted(on) if on else tiny.model()
    with pytest.raises(UserError, match=r"--cache-vision.*(vision\.layers\.query|trainable=all|crop_scale and flip)"):
        tiny.run(tmp_path / "run", on=model, vision_cache=tmp_path / "cache", **changes)
    assert not (tmp_path / "cache").exists()


def test_adapters_on_the_tower_learn(tmp_path):
    net = tiny.model()
    net.config = dataclasses.replace(net.config, vision_tower="some/tower")
    tiny.run(tmp_path, on=net, steps=2, trainable="adapters", target_modules=rf"{TOWER}|decoder\.layers\.query")
    assert {path for path, _, _, b in lora.adapters(net) if np.abs(b[...]).max() > 0} == {
        "vision.layers.query",
        "decoder.layers.query",
    }
    assert net.config.vision_tower == ""


def torch_rates(make, peak, *args, **options):
    """Return the learning rates of a run by a schedule of transformers."""
    optimizer, rates = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak), []
    schedule = make(optimizer, *args, **options)
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def lavis_rates(peak, warmup, *, start, low):
    """Return the learning rates of LAVIS' linear_warmup_cosine_lr: the cosine is over all steps, the warm-up's too."""
    rise = [min(peak, start + (peak - start) * step / max(warmup, 1)) for step in range(warmup)]
    return rise + [low + (peak - low) / 2 * (1 + math.cos(math.pi * step / STEPS)) for step in range(warmup, STEPS)]


STEPS, PEAK = 40, 3e-5
SCHEDULES = {
    "cosine": ({}, lambda warmup: torch_rates(transformers.get_cosine_schedule_with_warmup, PEAK, warmup, STEPS)),
    "cosine to a minimum": (
        {"min_learning_rate": 1e-5},
        lambda warmup: torch_rates(
            transformers.get_cosine_with_min_lr_schedule_with_warmup, PEAK, warmup, STEPS, min_lr=1e-5
        ),
    ),
    "linear": (
        {"schedule": "linear"},
        lambda warmup: torch_rates(transformers.get_linear_schedule_with_warmup, PEAK, warmup, STEPS),
    ),
    "constant": (
        {"schedule": "constant"},
        lambda warmup: torch_rates(transformers.get_constant_schedule_with_warmup, PEAK, warmup),
    ),
    "lavis": (
        {"schedule": "cosine-lavis", "warmup_learning_rate": 1e-6, "min_learning_rate": 1e-5},
        lambda warmup: lavis_rates(PEAK, warmup, start=1e-6, low=1e-5),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 7}, {"warmup_ratio": 0.11}, {}], ids=str)
def test_learning_rates_are_those_of_others(name, warmup):
    fields, others = SCHEDULES[name]
    recipe = tiny.recipe(steps=STEPS, learning_rate=PEAK, **{"warmup_ratio": 0.0, **warmup, **fields})
    ours = [float(schedule(PEAK, recipe)(step)) for step in range(STEPS)]
    expected = others(warmup.get("warmup_steps") or math.ceil(warmup.get("warmup_ratio", 0) * STEPS))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-12)


def test_a_line_ends_at_the_least_rate():
    recipe = tiny.recipe(steps=STEPS, schedule="linear", warmup_ratio=0.0, min_learning_rate=1e-5)
    ends = [float(schedule(PEAK, recipe)(step)) for step in (0, STEPS // 2, STEPS, STEPS + 9)]
    np.testing.assert_allclose(ends, [PEAK, 2e-5, 1e-5, 1e-5], rtol=1e-6)


def test_weight_decay_is_on_what_transformers_decays(tmp_path):
    theirs = makers.hf(makers.parts())
    names = set(transformers.Trainer.get_decay_parameter_names(None, theirs))
    recipe = tiny.recipe(trainable="all", weight_decay=0.5, warmup_ratio=0.0)
    params = nnx.state(read_model(makers.hf_folder(tmp_path / "hf", theirs)), trainable_filter(recipe))
    ones, optimizer = jax.tree.map(jnp.ones_like, params), make_optimizer(recipe)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), ones)
    decayed = sum(np.count_nonzero(x) for x in jax.tree.leaves(updates))
    assert decayed == sum(p.numel() for name, p in theirs.named_parameters() if name in names)
    assert 0 < decayed < sum(x.size for x in jax.tree.leaves(params))


def nf4_values():
    """The paper's data type: quantiles of a normal distribution, 8 above zero and 7 below, the largest being 1."""
    inverse = np.vectorize(statistics.NormalDist().inv_cdf)
    above, below = (inverse(np.linspace(0.9677083, 0.5, count)[:-1]) for count in (9, 8))
    return (np.sort([*above, 0, *-below]) / above[0]).astype(np.float32)


# Less than a block, not a multiple of one, several.
@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.parametrize("inputs", [2, 14, 192])
def test_quantization_rounds_to_the_nearest_value(inputs, bits):
    kernel = np.random.default_rng(inputs).normal(size=(2, inputs, 5)).astype(np.float32)
    table = np.arange(-127, 128, dtype=np.float32) / 127 if bits == "int8" else nf4_values()
    blocks = kernel.reshape(2, -1, inputs if bits == "int8" else math.gcd(inputs, BLOCK), 5)
    largest = np.abs(blocks).max(2, keepdims=True)
    nearest = table[np.abs((blocks / largest)[..., None] - table).argmin(-1)] * largest
    codes, scale = pack(jnp.asarray(kernel), bits)
    back = unpack(codes, scale, jnp.float32)
    np.testing.assert_allclose(np.asarray(back), nearest.reshape(kernel.shape), atol=1e-6)
    assert codes.nbytes == kernel.size / (1 if bits == "int8" else 2)
    again = unpack(*pack(back, bits), jnp.float32)  # representable values stay
    np.testing.assert_allclose(np.asarray(again), np.asarray(back), atol=1e-6)


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


@pytest.mark.slow
def test_quantized_runs_on_scenes_end_within_two_percent_of_bfloat16(tmp_path):
    """At a third of the recipe's learning rates: there, two bfloat16 runs that differ by rounding end 2.2 % apart."""
    dataset.make_training_set(tmp_path / "scenes", 160, size=128, questions=4, seed=5)
    records, losses = list(dataset.read_records(tmp_path / "scenes")), {}
    settings = ["steps=80", "batch_size=8", "save_steps=1000", "learning_rate=1e-3", "projector_learning_rate=1e-4"]
    for bits in ("none", "int8", "nf4"):
        recipe = recipes.override(recipes.find_recipe("scenes-rationales"), [f"quantization={bits}", *settings])
        model, processor = load_model("scenes-base", dtype=jnp.bfloat16)
        finetune(model, processor, records, recipe, tmp_path / bits)
        losses[bits] = tiny.read_losses(tmp_path / bits)
        assert any(layer.scales is not None for _, layer in lora.linears(model)) == (bits != "none")
    ends = {bits: float(np.mean(values[-20:])) for bits, values in losses.items()}
    assert ends["none"] < losses["none"][0] - 0.1
    assert [ends["int8"], ends["nf4"]] == pytest.approx([ends["none"]] * 2, rel=0.02)
