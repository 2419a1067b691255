"""Recipes: their fields and files, what they train, and how they average over micro-batches."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.templates import find_template
from reverie_jax.errors import UserError
from reverie_jax.loading import load_adapter
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.plan.plan import architecture_of
from reverie_jax.train.step import make_trainable, trainable_filter
from tests.train import tiny


def in_bfloat16() -> VisionLanguageModel:
    return VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


def in_turns(record):
    """Assign the record's conversations to two datasets."""
    talks = (dataclasses.replace(talk, dataset="ab"[n % 2]) for n, talk in enumerate(record.conversations))
    return dataclasses.replace(record, conversations=tuple(talks))


@pytest.fixture(scope="module", params=["lora", "adapters", "projector", "full", "all"])
def small_run(request, tmp_path_factory):
    """A run in bfloat16 on two datasets, in micro-batches, with updates below half a rounding step of the weights."""
    changes = {
        "trainable": request.param,
        "learning_rate": 1e-5,
        "projector_learning_rate": 1e-5,
        "gradient_accumulation_steps": 2,
        "supervision": Supervision(answers="as-published"),
    }
    data = tiny.Records(map(in_turns, tiny.records()))
    run = tiny.run(tmp_path_factory.mktemp(request.param), on=in_bfloat16(), data=data, **changes)
    return run, tiny.recipe(**changes)


def test_losses_are_reported_by_dataset(small_run):
    for row in read_metrics(small_run[0].folder):
        parts = [row["loss/a"], row["loss/b"]]
        assert min(parts) <= row["loss"] + 1e-6 <= max(parts) + 2e-6


def test_trained_parts_change_and_load_in_the_dtypes_of_the_base(small_run):
    (run, recipe), loaded = small_run, in_bfloat16()
    before, dtypes = dict(tiny.flat(in_bfloat16())), {path: x.dtype for path, x in tiny.flat(loaded)}
    assert run.model.compute_dtype == jnp.bfloat16
    after = dict(tiny.flat(run.model))
    parts = {"adapters": set(), "full": {"projector", "decoder"}, "all": {"projector", "decoder", "vision"}}
    trained = parts.get(recipe.trainable, {"projector"})
    assert {path.split(".")[0] for path in before if not np.array_equal(before[path], after[path])} == trained
    kernels = {"projector": "projector.linear1.kernel", "vision": "vision.layers.up.kernel"}
    for kernel in (kernels[part] for part in trained & kernels.keys()):
        change = after[kernel] - before[kernel].astype(np.float32)
        assert after[kernel].dtype == np.float32
        assert np.abs(change).max() < 2**-9 * 0.2
        assert (change != 0).mean() > (0.6 if "vision" in kernel else 0.99)  # the last of three layers does not run
    assert bool(list(lora.adapters(run.model))) == (recipe.trainable in ("lora", "adapters"))

    assert load_run(loaded, run.folder) == recipe
    assert load_adapter(in_bfloat16(), run.folder, ["base"]) == ("", recipe.trainable != "adapters")
    served = dict(tiny.flat(loaded))
    assert served.keys() == after.keys()
    for path, x in served.items():
        assert x.dtype == dtypes.get(path, np.float32)
        np.testing.assert_array_equal(x, after[path].astype(x.dtype))


def trained_parameters(config, recipe):
    """Return the number of parameters that a recipe trains of an architecture."""

    def make():
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        make_trainable(model, recipe)
        return model

    return sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make), trainable_filter(recipe))))


def beit3(queries):
    """Return the parameters of BEiT-3 Large that compute the image's tokens, or those of the queries."""
    width, mlp = 1024, 4096
    layer = 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width + 3 * 2 * width + 2 * mlp
    first = (64 + 1024) * width if queries else (3 * 16**2 + 1) * width + width + (2 + 785) * width
    return 24 * layer + 2 * width + first


VICUNA_13B = 13_015_864_320 + 2 * 4 * 5120  # and four rows for Muffin's tokens, in embedding and head
TRAINED = {
    "lrv-minigpt4": 3_149_824,
    "lrv-mplug-owl": 4_194_304,
    "rlhfv-muffin-paper": VICUNA_13B + 5_248_000 + beit3(True) + beit3(False),
    "rlhfv-muffin-script": VICUNA_13B + 5_248_000 + beit3(True),
    "muffin-sft": VICUNA_13B + 5_248_000 + beit3(True),
}


@pytest.mark.parametrize("name", TRAINED)
def test_published_numbers_of_trained_parameters(name):
    recipe = recipes.find_recipe(name)
    assert trained_parameters(ARCHITECTURES[architecture_of(name)], recipe) == TRAINED[name]
    assert recipe.template == ARCHITECTURES[architecture_of(name)].template


def test_image_experts_are_frozen_only_where_there_are_some():
    with pytest.raises(UserError, match="tiny: freeze_image_experts"):
        make_trainable(tiny.model(), tiny.recipe(trainable="all", freeze_image_experts=True))


def test_model_with_adapters():
    model = tiny.model()
    assert make_trainable(model, tiny.recipe())
    assert not make_trainable(model, tiny.recipe(dropout=0.2))
    assert {layer.lora_dropout for _, layer, _, _ in lora.adapters(model)} == {0.2}
    for changes in ({"trainable": "full"}, {"rank": 8}, {"alpha": 4.0}):
        with pytest.raises(UserError, match="tiny" if "trainable" in changes else "adapter on decoder"):
            make_trainable(model, tiny.recipe(**changes))
    lora.set_magnitudes(model.decoder.layers.query, {})
    with pytest.raises(UserError, match=r"decoder\.layers\.query.*use_dora"):
        make_trainable(model, tiny.recipe())


def test_targets_that_no_layer_has_are_refused():
    with pytest.raises(UserError, match="target_modules=nothing"):
        make_trainable(tiny.model(), tiny.recipe(target_modules="nothing"))


def test_an_adapter_on_other_layers_is_refused_with_their_names():
    """A run is loaded by its recipe, so it must adapt what the adapter does."""
    model = tiny.model()
    lora.attach(model, rank=4, alpha=8.0, targets=r"decoder\.layers\.(query|value)")
    with pytest.raises(UserError, match=r"decoder\.layers\.query, decoder\.layers\.value") as refused:
        make_trainable(model, tiny.recipe())
    (setting,) = re.findall(r"add '(\S+)' to --set", str(refused.value))
    assert not make_trainable(model, recipes.override(tiny.recipe(), [setting]))


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


# (steps, batch size, micro-batch, rates, schedule, warm-up in steps and ratio, weight decay, clipping) of other scripts.
OTHERS_PUBLISHED = {
    "lrv-minigpt4": (400_000, 1, 1, 3e-5, 1e-6, 1e-5, "cosine-lavis", 200, 0.0, 0.05, None),
    "lrv-mplug-owl": (0, 32, 4, 2e-5, 0.0, 0.0, "linear", 50, 0.0, 1e-4, 1.0),
    "rlhfv-muffin-paper": (0, 32, 32, 5e-7, 0.0, 0.0, "cosine", 0, 0.1, 0.0, 1.0),
    "rlhfv-muffin-script": (2160, 8, 8, 5e-7, 0.0, 0.0, "cosine", 0, 0.03, 0.0, 1.0),
    "muffin-sft": (2800, 512, 4, 2e-5, 0.0, 0.0, "cosine", 0, 0.03, 0.0, 1.0),
}


@pytest.mark.parametrize("name", OTHERS_PUBLISHED)
def test_other_recipes_are_the_published_ones(name):
    r = recipes.find_recipe(name)
    rates = r.learning_rate, r.warmup_learning_rate, r.min_learning_rate
    figures = (r.steps, r.batch_size, r.micro_batch_size, *rates, r.schedule, r.warmup_steps, r.warmup_ratio)
    assert (*figures, r.weight_decay, r.max_grad_norm) == OTHERS_PUBLISHED[name]
    assert r.projector_learning_rate == r.learning_rate


def test_every_recipe_survives_json_and_yaml(tmp_path):
    for name, recipe in recipes.RECIPES.items():
        assert recipe.name == name
        assert recipes.Recipe.from_json(recipe.to_json()) == recipe
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert recipes.read_recipe(str(tmp_path / "recipe.yaml")) == recipe == recipes.read_recipe(name)
        assert recipe.steps_for(1000) > 0
        assert recipe.summary()
        assert recipe.template is None or find_template(recipe.template)


# What a file holds instead of a recipe, or changes in one; and the field that the error names.
BROKEN = [
    (None, ""),
    ("[steps", "YAML"),
    ("\xff", "YAML"),
    ("steps", ""),
    ("name: a", "steps"),
    ({"pace": 3}, "pace"),
    ({"steps": "many"}, "steps"),
    ({"steps": None}, "steps"),
    ({"sequence": {"length": 448, "width": 2}}, "sequence.width"),
    ({"batch_size": 3, "gradient_accumulation_steps": 2}, "batch_size"),
]


@pytest.mark.parametrize(("change", "field"), BROKEN, ids=str)
def test_broken_recipe_files_are_named_with_their_field(tmp_path, change, field):
    path = tmp_path / "mine.yml"
    if isinstance(change, dict):
        change = yaml.safe_dump(dataclasses.asdict(recipes.find_recipe("scenes-responses")) | change)
    if change is not None:
        path.write_bytes(change.encode("latin-1"))
    with pytest.raises(UserError, match=f"{path}.*{field}"):
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
        ["steps"],
        ["steps=many"],
        *(
            [f"{name}=-1"]
            for name in ("steps", "holdout", "save_minutes", "weight_decay", "learning_rate", "warmup_ratio")
        ),
        *(
            [f"{name}=0"]
            for name in ("batch_size", "rank", "save_steps", "keep_checkpoints", "alpha", "epochs", "max_grad_norm")
        ),
        *([f"{name}=nan"] for name in ("learning_rate", "projector_learning_rate", "dropout", "loss_spike_threshold")),
        ["dropout=1"],
        ["warmup_ratio=1.5"],
        ["sequence.length=0"],
        ["sequence.edges=0"],
        ["target_modules=("],
        ["gradient_accumulation_steps=0"],
        ["sequence=3"],
        ["sequence.length=long"],
        ["supervision=everything"],
        ["gradient_accumulation_steps=3"],
        ["quantization=nf4", "trainable=full"],
        ["quantization=nf4", "trainable=all"],
        ["warmup_steps=5"],  # and a ratio
        ["min_learning_rate=1e-6", "schedule=constant"],
        ["min_learning_rate=1e-3"],  # above the projector's
        ["warmup_learning_rate=1e-2", "trainable=adapters"],
        ["schedule=wsd"],
        ["crop_scale=0"],
    ],
)
def test_bad_overrides_are_refused(settings):
    with pytest.raises(UserError, match=settings[0].partition("=")[0]):
        recipes.override(recipes.find_recipe("scenes-rationales"), settings)


@pytest.mark.parametrize(
    ("setting", "facts"),
    [
        ("sequence.lengt=5", ["from sequence.length, "]),
        ("sequence=5", ["from sequence.length, "]),
        ("sequence.length.x=5", ["from sequence.length, "]),
        ("supervision.kind=x", ["from supervision.kinds, "]),
        ("nothing.length=5", ["learning_rate", "sequence.length", "supervision.kinds"]),
        ("lenght=5", ["learning_rate", "sequence.length"]),
        ("preference.beta=5", ["preference is not set"]),
        ("sequence.length=x", ["sequence.length: "]),
    ],
)
def test_errors_name_nested_fields_as_they_are_set(setting, facts):
    with pytest.raises(UserError) as error:
        recipes.override(recipes.find_recipe("scenes-rationales"), [setting])
    assert all(fact in str(error.value) for fact in (*facts, setting.partition("=")[0]))


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
