"""MiniGPT-4, mPLUG-Owl and Muffin: computation equal to oracles that were written apart, and their files in and out."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from reverie_jax.errors import CheckpointError
from reverie_jax.models import ModelInputs, VisionLanguageModel
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints import base_checksums, orbax, read_config, read_model, write_adapters
from reverie_jax.models.checkpoints.adapters import attach_adapter
from reverie_jax.models.checkpoints.write import write_model, write_original
from reverie_jax.models.image_size import resize_images
from reverie_jax.models.lora import adapters, attach
from reverie_jax.models.sharding import make_mesh
from reverie_jax.models.vision import normalize
from tests.models import makers, sisters_files
from tests.models import sisters_oracle as oracle
from tests.models.oracle import STEPS, Sizes, assert_close, assert_same, flat, greedy, image_inputs, logits

SYSTEMS = tuple(oracle.SYSTEMS)


def write(name, model, folder, **options):
    """Write a system's files; return what `read_model` takes: the path, and components."""
    if name != "minigpt4":
        write_folder = sisters_files.mplug_folder if name == "mplug-owl" else sisters_files.muffin_folder
        return write_folder(folder, model, **options), ()
    folder.mkdir()
    files = sisters_files.minigpt4_files(folder, model)
    return files.projector, (files.eva, files.blip2, files.llama)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(our model, read in float32 from the system's files, and the oracle) by system and seed."""

    @functools.cache
    def read(name, seed=0):
        theirs = oracle.system(name, seed)
        path, components = write(name, theirs, tmp_path_factory.mktemp("x") / name)
        return read_model(path, components=components, dtype=jnp.float32), theirs

    return read


def inputs_of(model, seed, images=(2, 2)) -> ModelInputs:
    config = model.config
    return image_inputs(Sizes(config.vision, config.text), seed, images, tokens=config.image_tokens)


def their_inputs(model, inputs):
    pixels = np.asarray(normalize(jnp.asarray(inputs.images), model.config.vision, jnp.float32))
    tokens, slots = (torch.tensor(x, dtype=torch.long) for x in (inputs.tokens, inputs.image_slots))
    return tokens, slots, torch.tensor(np.moveaxis(pixels, -1, 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SYSTEMS)
def test_features_logits_and_greedy_tokens(name, seed, models):
    ours, theirs = models(name, seed)
    assert ours.config.system == name
    inputs = inputs_of(ours, seed)
    tokens, slots, pixels = their_inputs(ours, inputs)
    with torch.no_grad():
        features = theirs.features(pixels.flatten(0, 1)).numpy()
    flat = normalize(jnp.asarray(inputs.images).reshape(-1, *inputs.images.shape[2:]), ours.config.vision, jnp.float32)
    found = ours.vision(flat, ours.config.feature_depths, select=ours.config.feature_select)
    assert found.shape[1:] == (ours.config.features, ours.config.feature_width)
    assert_close(found, features)
    reference = theirs.logits(tokens, slots, pixels).numpy()
    assert min(np.abs(features).max(), np.abs(reference).max()) > 1  # the tolerance means something
    graph, state = nnx.split(ours)
    found, decoded = greedy(graph, state, jax.tree.map(jnp.asarray, inputs))
    assert_close(found, reference)
    np.testing.assert_array_equal(decoded, theirs.greedy(tokens, slots, pixels, STEPS))


@pytest.mark.parametrize("name", SYSTEMS)
def test_original_names_and_bits(name, models, tmp_path):
    """What is written has the oracle's names, shapes and bits, and is read back as the same model."""
    ours, theirs = models(name)
    write_original(ours, tmp_path / "out", shard_bytes=20_000)
    tensors = {key: x for file in (tmp_path / "out").glob("*.safetensors") for key, x in makers.load(file).items()}
    wanted = theirs.state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    again = read_model(tmp_path / "out")
    again.config = dataclasses.replace(again.config, stop_ids=ours.config.stop_ids)  # LLaMA's by default
    assert_same(again, ours)
    orbax.write_model(ours, tmp_path / "orbax")
    assert_same(read_model(tmp_path / "orbax"), ours)
    settings = {"reverie_template": "muffin_reference", "reverie_image_aspect": "pad"}
    makers.edit_json(tmp_path / "out" / "config.json", **settings)
    config = read_config(tmp_path / "out")
    assert (config.template, config.image_aspect_ratio) == tuple(settings.values())
    makers.assert_refused(lambda: write_model(ours, tmp_path / "hf"), "llava-hf")


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_files_are_read_onto_a_mesh(name, axes, models, tmp_path):
    ours, theirs = models(name)
    path, components = write(name, theirs, tmp_path / "x")
    sharded = read_model(path, components=components, dtype=jnp.float32, mesh=make_mesh(*axes))
    assert_same(sharded, ours)


@pytest.mark.parametrize("with_projector", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_peft_adapters(name, with_projector, models, tmp_path):
    """What is written has names and targets of the modules in the oracle's class, and is read back bit for bit."""
    base, theirs = models(name)
    model = nnx.clone(base)
    attach(model, rank=2, alpha=4.0, targets=r"decoder\.layers\.(query|down)")
    for _, layer, _, b in adapters(model):
        b.set_value(0.1 * jax.random.normal(jax.random.key(layer.inputs), b.shape))
    if with_projector:
        model.projector.linear1.kernel.set_value(model.projector.linear1.kernel[...] + 1)

    def export():
        tmp_path.joinpath("adapter").mkdir(exist_ok=True)
        write_adapters.write_peft(model, tmp_path / "adapter", base_model="x", projector=with_projector)

    if name == "mplug-owl" and with_projector:
        makers.assert_refused(export, "vit_eos")
        return
    export()
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    modules = [module for module, _ in theirs.named_modules() if re.fullmatch(settings["target_modules"], module)]
    assert len(modules) == 2 * base.config.text.layers
    saved = settings["modules_to_save"] or []
    assert len(saved) == with_projector
    assert all(any(module.endswith(end) for module, _ in theirs.named_modules()) for end in saved)
    again = nnx.clone(base)
    attach_adapter(again, tmp_path / "adapter")
    for (path, a), (_, b) in zip(sorted(flat(again).items()), sorted(flat(model).items()), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("name", SYSTEMS)
def test_checksums_cover_every_part(name, models):
    """An adapter is refused on a base with another tower, resampler or projector."""
    ours, _ = models(name)
    other = nnx.clone(models(name, 1)[0])
    parts = {"vision.layers", "vision.resampler", "vision.queries", "projector.linear1", "projector.token"}
    for part in sorted(parts):
        changed, pieces = nnx.clone(ours), part.split(".")
        outer = getattr(changed, pieces[0])
        if getattr(outer, pieces[1], None) is not None:
            setattr(outer, pieces[1], getattr(getattr(other, pieces[0]), pieces[1]))
            assert base_checksums(changed)[pieces[0]] != base_checksums(ours)[pieces[0]], part


@pytest.mark.parametrize("name", SYSTEMS)
def test_files_without_their_last_layers(name, models, tmp_path, monkeypatch):
    """Where the width is the published one, a file that lacks layers is refused though its shapes fit."""
    ours, theirs = models(name)
    path, components = write(name, theirs, tmp_path / "x")
    published = next(key for key in ARCHITECTURES if key.startswith(name))
    monkeypatch.setitem(ARCHITECTURES, published, ours.config)
    assert read_config(path, components=components).vision == ours.config.vision
    deeper = dataclasses.replace(ours.config.vision, layers=ours.config.vision.layers + 1)
    known = dataclasses.replace(ours.config, vision=deeper)
    monkeypatch.setitem(ARCHITECTURES, published, known)
    if name != "mplug-owl":  # its config.json says how many
        makers.assert_refused(lambda: read_config(path, components=components), "layers")


def test_whole_files_of_muffin_and_eva(models, tmp_path):
    """BEiT-3's parts that Muffin does not use are ignored; EVA-CLIP without head and norm has no block too many."""
    ours, theirs = models("muffin")
    sisters_files.muffin_folder(tmp_path / "muffin", theirs, whole=True)
    assert_same(read_model(tmp_path / "muffin", dtype=jnp.float32), ours)
    ours, theirs = models("minigpt4")
    path, (eva, *others) = write("minigpt4", theirs, tmp_path / "x")
    makers.save(eva, {key: x.half() for key, x in theirs.visual_encoder.state_dict().items()})
    assert_same(read_model(path, components=(eva, *others), dtype=jnp.float32), ours)


def test_differences_are_told_from_weights(models, tmp_path):
    _, theirs = models("minigpt4")
    path, (eva, blip2, vicuna) = write("minigpt4", theirs, tmp_path / "x")
    delta = sisters_files.delta_folders(tmp_path, theirs.language)
    read_config(path, components=[eva, blip2, f"{delta.base}+{delta.delta}"])
    for wrong in (delta.delta, f"{delta.base}+{vicuna}"):
        makers.assert_refused(lambda wrong=wrong: read_config(path, components=[eva, blip2, str(wrong)]), "BASE+DELTA")


@pytest.mark.parametrize("side", [32, 64, 80])
def test_images_of_another_size(side, models):
    ours, theirs = models("muffin")
    ours = nnx.clone(ours)
    resize_images(ours, side)
    inputs = inputs_of(ours, 1)
    reference = theirs.resized(side).logits(*their_inputs(ours, inputs)).numpy()
    assert_close(logits(ours, inputs), reference)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("minigpt4-7b", {"tower": 985_894_528, "resampler": 105_162_240, "projector": 3_149_824}),
        ("mplug-owl-7b", {"tower": 303_179_776 - 2_048, "resampler and projector": 105_097_216}),
        ("muffin-13b", {"tower": 607_757_312 - 4_096, "queries": 65_536, "projector": 5_248_000}),
    ],
)
def test_published_sizes(name, counts):
    """The tower's last normalization is counted with mPLUG-Owl's and BEiT-3's towers, and apart from EVA-CLIP's."""
    model = nnx.eval_shape(lambda: VisionLanguageModel(ARCHITECTURES[name], rngs=nnx.Rngs(0), dtype=jnp.bfloat16))

    def size(part):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))

    vision, found = model.vision, {"projector": size(model.projector)}
    found["resampler"] = 0 if vision.resampler is None else size(vision.resampler)
    found["resampler and projector"] = found["resampler"] + found["projector"]
    found["queries"] = 0 if vision.queries is None else vision.queries.size
    found["tower"] = size(vision) - size(vision.post_norm) - found["resampler"] - found["queries"]
    assert {key: found[key] for key in counts} == counts
    assert size(vision.post_norm) == {"minigpt4-7b": 2_816, "mplug-owl-7b": 2_048, "muffin-13b": 4_096}[name]


def test_parts_of_a_minigpt4_that_are_missing_or_too_many(models, tmp_path):
    _, theirs = models("minigpt4")
    (tmp_path / "x").mkdir()
    files = sisters_files.minigpt4_files(tmp_path / "x", theirs)
    everything = [files.projector, files.eva, files.blip2, files.llama]
    for order in (everything, everything[::-1]):
        assert read_config(order[0], components=order[1:]).system == "minigpt4"
    for missing in everything:
        rest = [file for file in everything if file != missing]
        makers.assert_refused(lambda rest=rest: read_config(rest[0], components=rest[1:]))
    with pytest.raises(CheckpointError, match=r"eva_vit_g\.pth"):
        read_config(everything[0], components=[*everything[1:], files.eva])
