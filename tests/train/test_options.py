"""What a recipe may choose without changing the outcome (remat, offload, cached features), and with a bound (few bits)."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import DataError, UserError
from reverie_jax.models import lora
from reverie_jax.models.quantize import BLOCK, pack, unpack
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import VALIDATION, RunCheckpoints, load_run, read_identity
from reverie_jax.train.loop import train
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.monitor import TrainingFailed
from tests.train import tiny


def losses(folder, **changes):
    options = {key: changes.pop(key) for key in ("mesh", "vision_cache", "profile") if key in changes}
    recipe = tiny.recipe(**{"steps": 4, "dropout": 0.0, **changes})
    train(tiny.model(), tiny.processor(), tiny.records(), recipe, folder, **options)
    return [row["loss"] for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_what_is_computed_again_changes_nothing(plain, remat, tmp_path):
    assert losses(tmp_path, remat=remat) == pytest.approx(plain, rel=1e-5)


def test_an_optimizer_that_waits_on_the_host_changes_nothing(plain, tmp_path):
    assert losses(tmp_path, offload=True) == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_an_optimizer_that_waits_on_the_host_of_a_mesh_changes_nothing(tmp_path):
    mesh = losses(tmp_path / "mesh", offload=True, rows=4, mesh=make_mesh(2, 2, 1), save_every=2)
    assert mesh == pytest.approx(losses(tmp_path / "whole", rows=4), rel=1e-5)


def test_features_from_the_cache_are_the_towers(plain, tmp_path):
    cache = tmp_path / "features"
    assert losses(tmp_path / "writes", vision_cache=cache) == pytest.approx(plain, rel=1e-5)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert losses(tmp_path / "reads", vision_cache=cache) == losses(tmp_path / "again", vision_cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_features_of_another_tower_are_refused(tmp_path):
    losses(tmp_path / "run", vision_cache=tmp_path / "features")
    other = tiny.model()
    other.vision.cls.set_value(other.vision.cls[...] + 1)
    with pytest.raises(DataError, match="another tower"):
        train(
            *(other, tiny.processor(), tiny.records(), tiny.recipe(), tmp_path / "other"),
            vision_cache=tmp_path / "features",
        )


# Few sizes, for each is compiled: less than a block, no multiple of one, one, several.
@given(
    st.sampled_from([1, 7, 32, 96]), st.sampled_from([1, 5]), st.integers(0, 2**31), st.sampled_from(["int8", "nf4"])
)
def test_few_bits_are_near(inputs, outputs, seed, bits):
    inputs *= 2
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
    again = unpack(*pack(jnp.asarray(back), bits), jnp.float32)  # what is representable stays
    np.testing.assert_allclose(np.asarray(again), back, atol=1e-6)


def test_nf4_finds_the_nearest_of_its_values():
    from reverie_jax.models.quantize import _NF4

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 5)).astype(np.float32)
    largest = np.abs(kernel).max(0)
    table = np.asarray(_NF4, np.float32)
    nearest = table[np.abs(kernel[:, :, None] / largest[None, :, None] - table).argmin(-1)] * largest
    back = unpack(*pack(jnp.asarray(kernel), "nf4"), jnp.float32)
    np.testing.assert_allclose(np.asarray(back), nearest, atol=1e-6)


@pytest.mark.parametrize("base", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_base_in_few_bits_trains_and_serves_the_whole_one(base, plain, tmp_path):
    found = losses(tmp_path, base=base, save_every=2)
    assert found == pytest.approx(plain, rel=0.05)
    whole = tiny.model()
    recipe = load_run(whole, tmp_path)  # the adapters go on the base as it is stored
    assert recipe.quantization == base
    assert all(layer.scales is None for _, layer in lora.linears(whole))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_base_in_few_bits_lies_on_a_mesh(base, tmp_path):
    assert losses(tmp_path / "mesh", base=base, rows=4, mesh=make_mesh(1, 2, 2)) == pytest.approx(
        losses(tmp_path / "one", base=base, rows=4), rel=1e-5
    )


def test_few_bits_take_the_room_that_they_say():
    model = tiny.model()
    kernels = [layer.kernel for path, layer in lora.linears(model) if path.startswith("decoder.layers")]
    whole = sum(kernel[...].size for kernel in kernels)
    lora.quantize(model, "nf4")
    layers = [layer for path, layer in lora.linears(model) if path.startswith("decoder.layers")]
    assert sum(layer.kernel[...].nbytes for layer in layers) == whole / 2
    lora.attach(model, rank=2, alpha=2.0)
    with pytest.raises(ValueError, match="few bits"):
        lora.merge(model)


def test_a_base_in_few_bits_is_frozen():
    with pytest.raises(UserError, match="freezes none"):
        recipes.override(tiny.recipe(), ["quantization=nf4", "trainable=full"])


def test_the_best_checkpoint_is_kept_and_served(tmp_path, monkeypatch):
    found = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(
        "reverie_jax.train.validation.Validation.__call__", lambda self, params, frozen: {VALIDATION: next(found)}
    )
    recipe = tiny.recipe(steps=8, save_steps=2, keep_checkpoints=1, holdout=2)
    train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    points = RunCheckpoints(tmp_path, recipe, read_identity(tmp_path)["base"])
    assert (points.latest, points.best) == (8, 4)
    points.close()


def test_held_out_records_are_not_trained_on_and_are_measured(tmp_path):
    recipe = tiny.recipe(steps=4, save_steps=2, holdout=3, dropout=0.0)
    result = train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path)
    assert result.dataset_stats.records == 9
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 < row[VALIDATION] < 20 for row in rows)
    with pytest.raises(UserError, match="leaves none"):
        train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(holdout=12), tmp_path / "none")


def test_a_jump_of_the_loss_names_the_records(tmp_path):
    with pytest.raises(TrainingFailed, match=r"the loss jumped from about .* Its records: r\d+"):
        losses(tmp_path, steps=60, spike=-10.0)  # any loss is above the median less ten
    assert len(read_metrics(tmp_path)) == 25


def test_sources_are_told_apart(tmp_path):
    import dataclasses

    mixed = tiny.Records(
        dataclasses.replace(
            record,
            conversations=tuple(
                dataclasses.replace(t, dataset="ab"[n % 2]) for n, t in enumerate(record.conversations)
            ),
        )
        for record in tiny.records()
    )
    recipe = tiny.recipe(
        steps=3, gradient_accumulation_steps=2, supervision=Supervision(answers="as-published"), dropout=0.0
    )
    train(tiny.model(), tiny.processor(), mixed, recipe, tmp_path)
    for row in read_metrics(tmp_path):
        parts = [row["loss/a"], row["loss/b"]]
        assert min(parts) <= row["loss"] + 1e-6 <= max(parts) + 2e-6
    assert not any(name.startswith("loss/") for row in read_metrics(tmp_path) for name in row) or len(parts) == 2


@pytest.mark.parametrize("mesh", [(1, 1, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_one_program_for_the_whole_run(tmp_path, monkeypatch, mesh):
    """A run of 200 steps compiles its step once (one shape of rows), and copies nothing inside it."""
    from reverie_jax.train import loop

    made = []
    make = loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *args, **options: made.append(make(*args, **options)) or made[-1])
    losses(tmp_path, steps=200, save_every=1000, rows=4, mesh=make_mesh(*mesh))
    assert len(made) == 1
    assert made[0]._cache_size() == 1


def test_a_profile_is_left(tmp_path):
    losses(tmp_path, steps=8, profile=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_speed_of_reading_does_not_hide_a_bad_loss(tmp_path, monkeypatch):
    """Numbers are read a step late on accelerators: a state whose loss is no number is not saved all the same."""
    from reverie_jax.train import monitor

    monkeypatch.setattr(monitor.jax, "default_backend", lambda: "gpu")
    recipe = tiny.recipe(steps=6, save_steps=2, learning_rate=float("inf"), max_grad_norm=None, dropout=0.0)
    with pytest.raises(TrainingFailed, match="the loss is nan"):
        train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path)
    assert not (tmp_path / "checkpoints" / "2").exists()
