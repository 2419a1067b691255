"""Recipes: their fields and files, what they train, and how they average over micro-batches."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.pipeline import TreeBuilder, dataset_stats, ordered_batches
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.step import is_lora_or_projector, make_trainable
from tests.train import tiny


@functools.cache
def six_sequences() -> Batch:
    builder = TreeBuilder(tiny.processor(), tiny.recipe().sequence, tiny.recipe().supervision)
    batch = next(ordered_batches(tiny.records(), builder, batch_size=6))
    return Batch(*map(jnp.asarray, batch))


@functools.cache
def split():
    model = tiny.model()
    make_trainable(model, tiny.recipe(dropout=0.0))
    for _, _, _, b in lora.adapters(model):  # B starts at zero, and A's gradient with it
        b.set_value(jax.random.normal(jax.random.key(1), b.shape) * 0.1)
    return nnx.split(model, is_lora_or_projector, ...)


jitted = jax.jit(tiny.loss_and_grads, static_argnums=0, static_argnames=("steps", "loss_reduction"))


def losses(batch: Batch, steps: int, loss_reduction: str):
    return jitted(*split(), batch, steps=steps, loss_reduction=loss_reduction)


def assert_close(grads, expected) -> None:
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.linalg.norm(b.ravel()))
        assert float(jnp.linalg.norm((a - b).ravel())) <= 1e-5 * max(scale, 1e-3)


@pytest.mark.parametrize("steps", [3, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (2, 6))])
def test_mean_over_tokens_does_not_depend_on_micro_batches(steps):
    whole, parts = losses(six_sequences(), 1, "tokens"), losses(six_sequences(), steps, "tokens")
    assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-5)
    assert_close(parts[1], whole[1])


def test_mean_of_means_is_that_of_the_micro_batches_alone():
    batch = six_sequences()
    batch = batch._replace(weight=batch.weight * jnp.arange(1.0, 7.0)[:, None])  # parts that weigh differently
    loss, grads = losses(batch, 3, "micro-batches")
    # The other sequences have no weight, so that one program does.
    part = [batch._replace(weight=batch.weight * (np.arange(6)[:, None] % 3 == n).astype(np.float32)) for n in range(3)]
    alone = [losses(batch, 1, "tokens") for batch in part]
    assert float(loss) == pytest.approx(np.mean([float(one) for one, _ in alone]), rel=1e-5)
    assert_close(grads, jax.tree.map(lambda *grads: sum(grads) / 3, *(grads for _, grads in alone)))
    assert abs(float(loss) - float(losses(batch, 1, "tokens")[0])) > 1e-6


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [("lora", {"projector"}), ("projector", {"projector"}), ("full", {"projector", "decoder"})],
)
def test_trained_parts_change_and_load_in_the_dtypes_of_the_base(trainable, parts, tmp_path):
    """In bfloat16, with updates below half a rounding step of its weights: without float32 copies none would move."""

    def base():
        return VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

    model, loaded = base(), base()
    before, dtypes = dict(tiny.flat(base())), {path: x.dtype for path, x in tiny.flat(loaded)}
    rates = {"learning_rate": 1e-5, "projector_learning_rate": 1e-5}
    run = tiny.run(tmp_path, on=model, trainable=trainable, **rates)
    assert model.compute_dtype == jnp.bfloat16
    after = dict(tiny.flat(model))
    assert {path.split(".")[0] for path in before if not np.array_equal(before[path], after[path])} == parts
    kernel = "projector.linear1.kernel"
    change = after[kernel] - before[kernel].astype(np.float32)
    assert after[kernel].dtype == np.float32
    assert np.abs(change).max() < 2**-9 * 0.2
    assert (change != 0).mean() > 0.99
    assert bool(list(lora.adapters(model))) == (trainable == "lora")

    assert load_run(loaded, run.folder) == tiny.recipe(trainable=trainable, **rates)
    served = dict(tiny.flat(loaded))
    assert served.keys() == after.keys()
    for path, x in served.items():
        assert x.dtype == dtypes.get(path, np.float32)
        np.testing.assert_array_equal(x, after[path].astype(x.dtype))


def test_model_with_adapters():
    model = tiny.model()
    assert make_trainable(model, tiny.recipe())
    assert not make_trainable(model, tiny.recipe(dropout=0.2))
    assert {layer.lora_dropout for _, layer, _, _ in lora.adapters(model)} == {0.2}
    for changes in ({"trainable": "full"}, {"rank": 8}, {"alpha": 4.0}):
        with pytest.raises(UserError, match="tiny" if "trainable" in changes else "adapter on decoder"):
            make_trainable(model, tiny.recipe(**changes))


def test_epochs_determine_the_steps(tmp_path):
    recipe = tiny.recipe()
    builder = TreeBuilder(tiny.processor(), recipe.sequence, recipe.supervision)
    sequences = dataset_stats(tiny.records(), builder).sequences
    assert sequences > 3
    assert tiny.run(tmp_path, steps=0, epochs=8 * recipe.batch_size / sequences).result.steps == 8
    assert recipe.steps_for(1000) == 8
    assert tiny.recipe(steps=0).steps_for(1) == 1


# (rank, alpha, learning rate, projector's learning rate, batch size, aspect ratio) of LLaVA's scripts.
PUBLISHED = {
    "llava-1.0-7b-lora": (64, 16, 2e-5, 2e-5, 128, "square"),
    "llava-1.5-7b-lora": (128, 256, 2e-4, 2e-5, 128, None),
    "llava-1.5-13b-lora": (128, 256, 2e-4, 2e-5, 128, None),
    "llava-phi3-lora": (128, 256, 2e-4, 2e-5, 128, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_llava_recipes_are_the_published_ones(name):
    r = recipes.find_recipe(name)
    rates = r.learning_rate, r.projector_learning_rate
    assert (r.rank, r.alpha, *rates, r.batch_size, r.image_aspect_ratio) == PUBLISHED[name]
    assert (r.dropout, r.warmup_ratio, r.max_grad_norm, r.weight_decay, r.epochs) == (0.05, 0.03, None, 0, 1)
    assert (r.loss_reduction, r.micro_batch_size, r.prefix_sharing) == ("micro-batches", 16, False)


def test_every_recipe_survives_json_and_yaml(tmp_path):
    for name, recipe in recipes.RECIPES.items():
        assert recipe.name == name
        assert recipes.Recipe.from_json(recipe.to_json()) == recipe
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert recipes.read_recipe(str(tmp_path / "recipe.yaml")) == recipe == recipes.read_recipe(name)
        assert recipe.steps_for(1000) > 0
        assert recipe.summary()


@pytest.mark.parametrize(
    "content", [None, "name: [", "\xff", "name: a", "name: a\nsteps: 1\nbatch_size: 2\nsequence: {length: 1}\nlr: 1"]
)
def test_broken_recipe_files_are_named(tmp_path, content):
    path = tmp_path / "recipe.yml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=str(path)):
        recipes.read_recipe(str(path))


def test_override_changes_typed_fields():
    base = recipes.find_recipe("scenes-rationales")
    settings = ["steps=7", "learning_rate=1e-3", "sequence.length=512", "max_grad_norm=none"]
    sequence = SequenceShape(512, base.sequence.images, base.sequence.edges)
    assert recipes.override(base, settings) == dataclasses.replace(
        base, steps=7, learning_rate=1e-3, sequence=sequence, max_grad_norm=None
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["stepz=3"],
        ["steps"],
        ["steps=many"],
        ["sequence=3"],
        ["supervision=everything"],
        ["gradient_accumulation_steps=3"],
        ["quantization=nf4", "trainable=full"],
    ],
)
def test_bad_overrides_are_refused(settings):
    with pytest.raises(UserError, match=settings[0].partition("=")[0]):
        recipes.override(recipes.find_recipe("scenes-rationales"), settings)


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match="scenes-responses"):
        recipes.find_recipe("scenes-nothing")


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_pretraining_starts_with_a_new_projector(tmp_path, kind):
    from reverie_jax.errors import CheckpointError
    from reverie_jax.loading import lacks_projector, load_with_projector
    from tests.models import makers

    part = makers.parts()
    llm, clip = makers.llm_folder(tmp_path / "llm", part), makers.clip_folder(tmp_path / "clip", part)
    assert lacks_projector(llm, [clip])
    assert not lacks_projector(clip)
    model, _ = load_with_projector(clip, components=[llm], kind=kind, seed=1)
    same, _ = load_with_projector(llm, components=[clip], kind=kind, seed=1)
    kernel = np.asarray(model.projector.linear1.kernel[...])
    assert np.array_equal(kernel, np.asarray(same.projector.linear1.kernel[...]))
    bound = kernel.shape[0] ** -0.5
    assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert (model.projector.linear2 is None) == (kind == "linear")
    with pytest.raises(CheckpointError, match=str(llm)):
        load_with_projector(llm, kind=kind)
