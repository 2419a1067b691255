"""What recipes tune, how they take a mean over micro-batches, and how long they run."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data.packing import Batch
from reverie_jax.data.pipeline import dataset_stats, training_batches
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.loop import train
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.step import adapt, lora_and_projector, loss_and_grads
from tests.train import tiny


@functools.cache
def whole_batch() -> Batch:
    recipe = tiny.recipe(batch_size=6)
    records = tiny.records()
    data = training_batches(records, tiny.processor(), recipe.sequence, rows=6, supervision=recipe.supervision, seed=0)
    iterator = iter(data)
    batch = Batch(*map(jnp.asarray, next(iterator)))
    iterator.close()
    return batch


@functools.cache
def split():
    model = tiny.model()
    adapt(model, tiny.recipe(dropout=0.0))
    for _, _, _, b in lora.adapters(model):  # B is zero at first, and A's gradient with it
        b.set_value(jax.random.normal(jax.random.key(1), b.shape) * 0.1)
    return nnx.split(model, lora_and_projector, ...)


jitted = jax.jit(loss_and_grads, static_argnums=0, static_argnames=("accumulate", "mean"))


def losses(batch: Batch, accumulate: int, mean: str):
    return jitted(*split(), batch, None, accumulate=accumulate, mean=mean)


def close(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = float(jnp.linalg.norm(b.ravel()))
        assert float(jnp.linalg.norm((a - b).ravel())) <= 1e-5 * max(scale, 1e-3)


@pytest.mark.parametrize("accumulate", [2, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (3, 6))])
def test_a_mean_over_tokens_does_not_see_micro_batches(accumulate):
    whole, parts = losses(whole_batch(), 1, "tokens"), losses(whole_batch(), accumulate, "tokens")
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-5)
    close(parts[1], whole[1])


def test_a_mean_of_means_is_that_of_the_micro_batches_alone():
    batch = whole_batch()
    batch = batch._replace(weight=batch.weight * jnp.arange(1.0, 7.0)[:, None])  # parts that weigh differently
    found = losses(batch, 3, "micro-batches")
    alone = [losses(Batch(*(x[part::3] for x in batch)), 1, "tokens") for part in range(3)]
    assert float(found[0]) == pytest.approx(np.mean([float(loss) for loss, _ in alone]), rel=1e-5)
    close(found[1], jax.tree.map(lambda *grads: sum(grads) / 3, *(grads for _, grads in alone)))
    assert abs(float(found[0]) - float(losses(batch, 1, "tokens")[0])) > 1e-6


def moved(before, model) -> set[str]:
    after = dict(tiny.flat(model))
    return {path.split(".")[0] for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize(("tune", "parts"), [("projector", {"projector"}), ("full", {"projector", "decoder"})])
def test_what_is_tuned_moves_and_comes_back(tmp_path, tune, parts):
    model, recipe = tiny.model(), tiny.recipe(steps=3, trainable=tune)
    before = dict(tiny.flat(model))
    train(model, tiny.processor(), tiny.records(), recipe, tmp_path)
    assert moved(before, model) == parts
    assert not list(lora.adapters(model))
    again = tiny.model()
    assert load_run(again, tmp_path) == recipe
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(tiny.flat(again), tiny.flat(model), strict=True))


def test_adapters_are_not_passed_over_by_a_recipe_that_tunes_none():
    model = tiny.model()
    adapt(model, tiny.recipe())
    with pytest.raises(UserError, match="merge them first"):
        adapt(model, tiny.recipe(trainable="full"))


def test_epochs_are_as_many_steps_as_they_fill(tmp_path):
    recipe = tiny.recipe(steps=0, epochs=2.0)
    rows = dataset_stats(tiny.records(), tiny.processor(), recipe.sequence, recipe.supervision).rows
    assert rows > 3
    result = train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path)
    assert result.steps == round(2 * rows / recipe.batch_size) == len(read_metrics(tmp_path))


def test_rows_must_share_out():
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3"):
        tiny.recipe(gradient_accumulation_steps=3)
    with pytest.raises(UserError, match="accumulate"):
        recipes.override(recipes.recipe("scenes-rationales"), ["gradient_accumulation_steps=3"])


# (rank, alpha, rate, projector's rate, rows, aspect) of LLaVA's scripts.
PUBLISHED = {
    "llava-1.0-7b-lora": (64, 16, 2e-5, 2e-5, 128, "square"),
    "llava-1.5-7b-lora": (128, 256, 2e-4, 2e-5, 128, None),
    "llava-1.5-13b-lora": (128, 256, 2e-4, 2e-5, 128, None),
    "llava-phi3-lora": (128, 256, 2e-4, 2e-5, 128, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    found = recipes.recipe(name)
    wanted = (found.rank, found.alpha, found.rate, found.projector_rate, found.rows, found.aspect)
    assert wanted == PUBLISHED[name]
    assert (found.dropout, found.warmup, found.clip, found.weight_decay, found.epochs) == (0.05, 0.03, None, 0, 1)
    assert (found.mean, found.rows // found.accumulate, found.sharing) == ("micro-batches", 16, False)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_survive_their_own_words(name):
    recipe = recipes.recipe(name)
    assert recipe.name == name
    assert recipes.Recipe.from_json(recipe.to_json()) == recipe
    assert dataclasses.asdict(recipes.override(recipe, ["seed=7"]))["seed"] == 7
    assert recipe.steps_for(1000) > 0


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_pretraining_makes_a_projector_between_bare_parts(tmp_path, kind):
    from reverie_jax.errors import CheckpointError
    from reverie_jax.loading import bare, load_with_projector
    from tests.models import makers

    part = makers.parts()
    llm, clip = makers.llm_folder(tmp_path / "llm", part), makers.clip_folder(tmp_path / "clip", part)
    assert bare(llm, [clip])
    assert not bare(clip)
    model, _ = load_with_projector(clip, components=[llm], kind=kind, seed=1)
    again, _ = load_with_projector(llm, components=[clip], kind=kind, seed=1)
    kernel = np.asarray(model.projector.linear1.kernel[...])
    assert np.array_equal(kernel, np.asarray(again.projector.linear1.kernel[...]))
    bound = kernel.shape[0] ** -0.5
    assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert (model.projector.linear2 is None) == (kind == "linear")
    with pytest.raises(CheckpointError, match="a fresh projector goes between"):
        load_with_projector(llm, kind=kind)


def test_small_updates_of_a_bfloat16_base_are_not_lost(tmp_path):
    """Each is below half a bfloat16 step of a weight of 0.2; without float32 copies nothing would move."""
    moved = {}
    for kind in (jnp.float32, jnp.bfloat16):
        model = VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(0), dtype=kind)
        before = np.asarray(model.projector.linear1.kernel[...], np.float32)
        recipe = tiny.recipe(steps=10, trainable="projector", projector_learning_rate=1e-5, warmup_ratio=0.0)
        train(model, tiny.processor(), tiny.records(), recipe, tmp_path / jnp.dtype(kind).name)
        assert model.compute_dtype == kind
        moved[kind] = np.asarray(model.projector.linear1.kernel[...], np.float32) - before
    whole, few = (moved[kind].ravel() for kind in (jnp.float32, jnp.bfloat16))
    assert np.abs(whole).max() < 2**-9 * 0.2
    assert whole @ few / np.linalg.norm(whole) / np.linalg.norm(few) > 0.9


@pytest.mark.parametrize("tune", ["lora", "projector", "full"])
def test_a_run_is_served_in_the_types_of_its_base(tune, tmp_path):
    def base():
        return VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

    model, served = base(), base()
    kinds = {path: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(served))}
    train(model, tiny.processor(), tiny.records(), tiny.recipe(steps=2, trainable=tune), tmp_path)
    load_run(served, tmp_path)
    trained, found = (dict(nnx.to_flat_state(nnx.state(one))) for one in (model, served))
    assert trained.keys() == found.keys()
    assert trained["projector", "linear1", "kernel"].dtype == jnp.float32
    for path, leaf in found.items():
        assert leaf.dtype == kinds.get(path, jnp.float32)
        np.testing.assert_array_equal(leaf.get_value(), trained[path].get_value().astype(leaf.dtype))
