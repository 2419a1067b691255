"""Adapters on disk, read and written, compared with PEFT on transformers' LLaVA and on the plain language models."""

import copy
import dataclasses
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import reverie_jax
from reverie_jax.convert import convert
from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.packing import SequenceShape
from reverie_jax.loading import load_processor, load_with_projector
from reverie_jax.models import lora
from reverie_jax.models.checkpoints import attach_adapter, read_model
from reverie_jax.models.checkpoints.write_adapters import write_peft
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train.loop import finetune
from reverie_jax.train.recipe import Recipe
from tests.models import makers, sisters_files, sisters_oracle
from tests.models.makers import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    KINDS,
    MODULES,
    NON_LORA,
    WORDS,
    Parts,
    assert_refused,
    assert_same_tensors,
    open_with_peft,
    parts,
    with_adapter,
)
from tests.models.oracle import assert_close, assert_same, assert_sharded, flat, llava_logits, logits, random_model
from tests.models.test_sisters import inputs_of, their_inputs

PROJECTOR = "multi_modal_projector"
INPUTS = makers.inputs()


@pytest.fixture(scope="module", params=KINDS)
def bench(request):
    return makers.bench(request.param)


@pytest.fixture(scope="module")
def llama():
    return makers.bench()


def has_adapters(model):
    return next(lora.adapters(model), None) is not None


# Reading.


def test_adapters_change_the_logits(bench):
    # The tests below assume this.
    assert np.abs(bench.plain_logits - bench.base_logits).max() > 0.1
    assert np.abs(bench.full_logits - bench.plain_logits).max() > 0.1
    assert np.abs(bench.lora_logits - bench.base_logits[..., :WORDS]).max() > 0.1


@pytest.mark.parametrize("projector", [False, True])
def test_peft_adapter_gives_pefts_logits_apart_merged_and_disabled(projector, bench):
    folder, expected = bench.adapter(projector)
    model = with_adapter(bench.hf, folder)
    assert_close(logits(model, INPUTS), expected)
    paths = {path for path, *_ in lora.adapters(model)}
    assert len(paths) == len(MODULES[bench.kind])  # Phi-3's fused matrices have one adapter each
    assert all(path.startswith("decoder.layers.") for path in paths)
    if not projector:
        lora.set_adapters_enabled(model, False)
        np.testing.assert_array_equal(logits(model, INPUTS), logits(read_model(bench.hf), INPUTS))
        lora.set_adapters_enabled(model, True)
    lora.merge(model)
    assert not has_adapters(model)
    assert_close(logits(model, INPUTS), expected)


@pytest.mark.parametrize("peft_0_4", [False, True])
def test_names_before_transformers_4_52_and_files_of_old_peft(peft_0_4, llama, tmp_path):
    folder, tensors = shutil.copytree(llama.full, tmp_path / "adapter"), {}
    for name, tensor in load_file(folder / ADAPTER_FILE).items():
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        name = name.replace("model.model.multi_modal", "model.multi_modal")
        tensors[name.replace("lora_A.", "lora_A.default.")] = tensor
    makers.save(folder / ADAPTER_FILE, tensors)
    makers.edit_json(folder / ADAPTER_CONFIG, target_modules=makers.DECODER.replace("_model", r"_model\.model"))
    if peft_0_4:
        makers.as_old_peft(folder)
    assert_close(logits(with_adapter(llama.hf, folder), INPUTS), llama.full_logits)


LORA = [
    ("llama", {}, ("bin shards", "full")),
    ("llama", {"use_rslora": True, "modules": ["q_proj", "down_proj"]}, ("safetensors", "vision saved")),
    ("llama", {"use_dora": True, "layers_to_transform": [1]}, ("bin", "full")),
    ("llava-1.0", {"old": True}, ("bin", "full bin")),
    ("phi3", {}, ("safetensors shards", "vision saved")),
    ("phi3", {"old": True, "dtype": torch.float16, "modules": ["gate_up_proj"]}, ("saved", "full bin")),
]


@pytest.mark.parametrize(("kind", "options", "forms"), LORA, ids=str)
def test_llava_lora_gives_the_merged_models_logits(kind, options, forms, tmp_path):
    tuned = makers.lora_folder(tmp_path / "lora", parts(kind), **options)
    llm = makers.llm_folder(tmp_path / "llm", parts(kind), forms[0])
    clip = makers.clip_folder(tmp_path / "clip", parts(kind), forms[1])
    model = read_model(tmp_path / "lora", components=[llm, clip], dtype=jnp.float32)
    expected = tuned.logits(INPUTS)
    assert np.abs(expected - parts(kind).logits(INPUTS)).max() > 0.1
    assert has_adapters(model)
    assert_close(logits(model, INPUTS), expected)
    lora.merge(model)
    assert_close(logits(model, INPUTS), expected)


def test_llava_lora_as_an_adapter_replaces_the_projector(llama, tmp_path):
    other = Parts("llama", llama.part.llm, llama.part.tower, parts(seed=50).projector)
    path = makers.projector_folder(tmp_path / "x", other)
    model = read_model(path, components=[llama.llm, llama.clip], dtype=jnp.float32)
    attach_adapter(model, llama.lora)
    assert_close(logits(model, INPUTS), llama.lora_logits)


def test_adapters_stay_float32_beside_a_half_precision_base(tmp_path):
    part = parts("phi3")
    makers.lora_folder(tmp_path / "lora", part)
    llm = makers.llm_folder(tmp_path / "llm", part, "safetensors")
    model = read_model(tmp_path / "lora", components=[llm, makers.clip_folder(tmp_path / "clip", part)])
    layer = model.decoder.layers.gate_up
    assert model.compute_dtype == layer.kernel.dtype == jnp.float16
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((2, 36, 3), (2, 3, 104))
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32


DORA = {"use_dora": True, "target_modules": r".*(language_model|vision_tower)\..*(q_proj|out_proj|down_proj|fc1)"}


@pytest.mark.parametrize("seed", range(3))
def test_dora_gives_pefts_logits_apart_merged_and_disabled(seed, llama, tmp_path):
    theirs = makers.peft_folder(tmp_path / "dora", llama.model, seed, **DORA)
    inputs = makers.inputs(seed)
    expected = llava_logits(theirs, inputs)
    model = with_adapter(llama.hf, tmp_path / "dora")
    assert_close(logits(model, inputs), expected)
    for _, layer, *_ in lora.adapters(model):  # as plain LoRA it would be another model
        assert np.abs(layer.lora_magnitude[...] / layer.lora_norm[...] - 1).max() > 0.1
    lora.set_adapters_enabled(model, False)
    np.testing.assert_array_equal(logits(model, inputs), logits(read_model(llama.hf), inputs))
    lora.set_adapters_enabled(model, True)
    mesh = make_mesh(data=2, fsdp=1, tensor=2)
    sharded = with_adapter(llama.hf, tmp_path / "dora", mesh=mesh)
    assert_sharded(mesh, sharded)
    one = flat(model)
    for path, x in flat(sharded).items():  # a norm is a sum over devices
        assert_close(x, one[path], atol=1e-6)
    lora.merge(model)
    assert not has_adapters(model)
    assert_close(logits(model, inputs), expected)


# Files of a whole PeftModel.


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    """mPLUG-Owl as its folder, inputs, and the oracle's logits."""
    model = sisters_oracle.system("mplug-owl", 0)
    folder = sisters_files.mplug_folder(tmp_path_factory.mktemp("x") / "owl", model, dtype=torch.float16)
    return folder, model, inputs_of(read_model(folder), 0)


@pytest.mark.parametrize("form", ["0.2", "0.3", "0.6", "adapters alone"])
def test_file_of_lrvs_second_version_gives_the_oracles_logits(form, owl, tmp_path, caplog):
    """All of mPLUG-Owl, and adapters whose alpha is not in the file."""
    (folder, base, inputs), file = owl, tmp_path / "pytorch_model.bin"
    tuned = sisters_files.lrv_v2_file(file, base, peft="0.3" if form == "adapters alone" else form)
    if form == "adapters alone":
        makers.save(file, {name: x for name, x in makers.load(file).items() if "lora_" in name})
    expected, plain = (model.logits(*their_inputs(read_model(folder), inputs)).numpy() for model in (tuned, base))
    assert np.abs(expected - plain).max() > 0.1
    model = with_adapter(folder, file, dtype=jnp.float32)
    assert "r 8, alpha 32" in caplog.text
    assert_close(logits(model, inputs), expected)
    assert {path for path, *_ in lora.adapters(model)} == {"decoder.layers.query", "decoder.layers.value"}


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_settings_beside_a_file_of_a_peft_model_win(suffix, llama, tmp_path):
    tuned = makers.adapted(llama.model)
    file, expected = tmp_path / f"model.{suffix}", llava_logits(tuned, INPUTS)
    makers.save(file, dict(tuned.state_dict()))
    tuned.peft_config["default"].save_pretrained(tmp_path)
    assert_close(logits(with_adapter(llama.hf, file), INPUTS), expected)
    convert(llama.hf, tmp_path / "out", to="peft", adapter=file)
    assert_close(llava_logits(open_with_peft(llama.hf, tmp_path / "out"), INPUTS), expected)
    mesh = make_mesh(data=2, fsdp=1, tensor=2)
    assert_same(with_adapter(llama.hf, file, mesh=mesh), with_adapter(llama.hf, file))


HALVES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_base_weights_in_a_file_may_have_another_dtype(dtype, llama, tmp_path):
    tuned = makers.adapted(llama.model)
    makers.save(tmp_path / "model.bin", {n: x if "lora_" in n else x.to(dtype) for n, x in tuned.state_dict().items()})
    tuned.peft_config["default"].save_pretrained(tmp_path)
    for loaded in HALVES:  # the base model is exact in float16
        assert has_adapters(with_adapter(llama.hf, tmp_path / "model.bin", dtype=str(loaded).removeprefix("torch.")))


def test_second_adapter_is_refused(llama):
    model = with_adapter(llama.hf, llama.plain)
    assert_refused(lambda: attach_adapter(model, llama.full), llama.full, "decoder.layers")


def test_mesh_gets_the_same_adapters(bench):
    components, mesh = [bench.llm, bench.clip], make_mesh(data=2, fsdp=1, tensor=2)
    model = read_model(bench.lora, components=components, mesh=mesh)
    assert_sharded(mesh, model)
    assert_same(model, read_model(bench.lora, components=components))


def test_load_model_takes_an_adapter_and_components(llama):
    model, processor = reverie_jax.load_model(llama.hf, adapter=llama.full)
    assert_close(logits(model, INPUTS), llama.full_logits)
    assert reverie_jax.generate(model, processor, [reverie_jax.ask(None, "baba?")], max_new_tokens=2)
    model, _ = reverie_jax.load_model(llama.lora, components=[llama.llm, llama.clip])
    assert_close(logits(model, INPUTS), llama.lora_logits)


# Writing for PEFT on transformers' LLaVA.


@pytest.mark.parametrize("projector", [False, True])
def test_peft_opens_what_was_written(projector, bench, tmp_path):
    folder, expected = bench.adapter(projector)
    convert(bench.hf, tmp_path / "out", to="peft", adapter=folder)
    assert_same_tensors(folder / ADAPTER_FILE, tmp_path / "out" / ADAPTER_FILE)
    theirs = open_with_peft(bench.hf, tmp_path / "out")
    assert_close(llava_logits(theirs, INPUTS), expected)
    adapted = sorted(name.removesuffix(".lora_A") for name, _ in theirs.named_modules() if name.endswith(".lora_A"))
    modules = sorted(f"layers.{n}.{module}" for n in range(2) for module in MODULES[bench.kind])
    assert [name.split("language_model.")[-1] for name in adapted] == modules
    assert bool(theirs.peft_config["default"].modules_to_save) == projector
    if projector:
        model, _ = reverie_jax.load_model(bench.hf, adapter=tmp_path / "out")
        assert_close(logits(model, INPUTS), expected)


@pytest.mark.parametrize("to", ["peft", "llava-lora"])
def test_model_without_adapters_is_refused(to, llama, tmp_path):
    assert_refused(lambda: convert(llama.hf, tmp_path / "out", to=to), "adapter")
    assert not list(tmp_path.iterdir())


def test_adapter_outside_the_decoder_cannot_be_written(tmp_path):
    model = random_model()
    lora.attach(model, rank=2, alpha=2.0, targets=r"projector\.linear1")
    assert_refused(lambda: write_peft(model, tmp_path, base_model="", projector=False), "projector.linear1")


# Writing for original LLaVA.


def test_llava_lora_of_a_peft_adapter(bench, tmp_path):
    """PEFT opens it on the plain language model; names, files and settings are the original's."""
    out = tmp_path / "out"
    convert(bench.hf, out, to="llava-lora", adapter=bench.full)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bench.part.llm), out).eval()
    expected = makers.text_logits(bench.full_model)[..., :WORDS]
    assert np.abs(expected - makers.text_logits(bench.part.llm)).max() > 0.1
    assert_close(makers.text_logits(theirs), expected)
    assert_close(logits(read_model(out, components=[bench.llm, bench.clip]), INPUTS), bench.full_logits[..., :WORDS])
    names = {f"layers.{n}.{module}.lora_{side}" for n in range(2) for module in MODULES[bench.kind] for side in "AB"}
    assert load_file(out / ADAPTER_FILE).keys() == {f"base_model.model.model.{name}.weight" for name in names}
    rest, saved = torch.load(out / NON_LORA, weights_only=True), load_file(bench.full / ADAPTER_FILE)
    names = {
        f"mm_projector.{n}.{x}": f"{PROJECTOR}.linear_{n // 2 + 1}.{x}" for n in (0, 2) for x in ("weight", "bias")
    }
    assert rest.keys() == {f"base_model.model.model.{name}" for name in names}
    for ours, theirs in names.items():
        assert torch.equal(rest[f"base_model.model.model.{ours}"], saved[f"base_model.model.model.{theirs}"])
    settings, raw = makers.original_config(bench.part), json.loads((out / "config.json").read_text())
    for key in ("mm_projector_type", "mm_hidden_size", "mm_vision_select_layer", "hidden_size", "architectures"):
        assert raw[key] == settings[key], key
    tuned = json.loads((out / ADAPTER_CONFIG).read_text())
    assert (tuned["r"], tuned["lora_alpha"], tuned["peft_type"]) == (3, 5, "LORA")
    assert sorted(tuned["target_modules"]) == sorted(module.split(".")[1] for module in MODULES[bench.kind])


def test_llava_lora_of_some_layers(llama, tmp_path):
    makers.lora_folder(tmp_path / "lora", llama.part, layers_to_transform=[1])
    components = [llama.llm, llama.clip]
    convert(tmp_path / "lora", tmp_path / "out", to="llava-lora", components=components)
    assert_same_tensors(tmp_path / "lora" / ADAPTER_FILE, tmp_path / "out" / ADAPTER_FILE)
    theirs = [PeftModel.from_pretrained(copy.deepcopy(llama.part.llm), tmp_path / x).eval() for x in ("lora", "out")]
    np.testing.assert_array_equal(*map(makers.text_logits, theirs))
    assert theirs[0].targeted_module_names == theirs[1].targeted_module_names


def test_llava_lora_in_every_other_form(bench, tmp_path):
    components = [bench.llm, bench.clip]
    for to in ("llava-lora", "peft", "llava"):
        convert(bench.lora, tmp_path / to, to=to, components=components)
    for file in (ADAPTER_FILE, NON_LORA):
        assert_same_tensors(bench.lora / file, tmp_path / "llava-lora" / file)
    assert json.loads((tmp_path / "llava-lora" / "config.json").read_text())["image_aspect_ratio"] == "pad"
    assert_close(logits(read_model(tmp_path / "llava-lora", components=components), INPUTS), bench.lora_logits)
    theirs = open_with_peft(bench.hf, tmp_path / "peft")
    assert_close(llava_logits(theirs, INPUTS)[..., :WORDS], bench.lora_logits)
    merged = load_file(tmp_path / "llava" / "model.safetensors")
    for name, tensor in makers.original_tensors(bench.lora_parts, tower=False).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


# Merging.


@pytest.mark.parametrize("to", ["llava-hf", "orbax"])
def test_complete_models_are_written_merged(to, bench, tmp_path):
    convert(bench.hf, tmp_path / "out", to=to, adapter=bench.full)
    model = read_model(tmp_path / "out")
    assert not has_adapters(model)
    assert_close(logits(model, INPUTS), bench.full_logits)
    if to == "llava-hf":
        theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert_close(llava_logits(theirs, INPUTS), bench.full_logits)


def test_llava_lora_on_llava_hf_is_asked_as_it_was_tuned(llama, tmp_path):
    """By its config.json, whether it is the model or the adapter; the base model's prompt is another."""
    folder = shutil.copytree(llama.lora, tmp_path / "lora")
    makers.edit_json(folder / ADAPTER_CONFIG, base_model_name_or_path="somebody/llava-v1.5")
    for main, options in ((folder, {"components": llama.hf}), (llama.hf, {"adapter": folder})):
        model, processor = reverie_jax.load_model(main, dtype="float32", **options)
        assert_close(logits(model, INPUTS)[..., :WORDS], llama.lora_logits)
        for config in (model.config, processor.encoder, load_processor(main, **options).encoder):
            template = config.template if config is model.config else config.template.name
            assert (template, config.tokenization) == ("vicuna_v1", "llava")
        assert processor.image_aspect_ratio == model.config.image_aspect_ratio == "pad"
    base = load_processor(llama.hf)
    assert (base.encoder.template.name, base.encoder.tokenization, base.image_aspect_ratio) == (
        "llava-hf",
        "hf",
        "square",
    )
    makers.edit_json(folder / "config.json", mm_vision_select_layer=-1)
    assert_refused(lambda: reverie_jax.load_model(llama.hf, adapter=folder), folder, "mm_vision_select_layer")


# Runs of `reverie train`.


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector_of_the_first_stage_is_used_by_naming_its_run(kind, llama, tmp_path):
    parts_of_it = {"components": [llama.clip], "dtype": "float32"}
    model, processor = load_with_projector(llama.llm, kind=kind, **parts_of_it)
    image = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 90, 40)).save(image, format="PNG")
    conversation = Conversation((Turn("user", "<image>\nba?"), Turn("assistant", "deki.")), (0,))
    sizes = SequenceShape(length=64, images=1, edges=32)
    recipe = Recipe("first", 2, 1, sizes, trainable="projector", template="plain", projector_type=kind)
    recipe = dataclasses.replace(recipe, projector_learning_rate=0.1, save_steps=2)
    before = logits(model, INPUTS)
    finetune(model, processor, [ImageRecord("a", image.getvalue(), (conversation,))], recipe, tmp_path / "run")
    expected = logits(model, INPUTS)
    assert np.abs(expected - before).max() > 0.1
    opened, _ = reverie_jax.load_model(llama.llm, adapter=tmp_path / "run", **parts_of_it)
    assert_close(logits(opened, INPUTS), expected)
    for to in ("llava", "orbax"):
        convert(llama.llm, tmp_path / to, to=to, adapter=tmp_path / "run", components=[llama.clip])
        assert_close(logits(read_model(tmp_path / to), INPUTS), expected)
    assert load_processor(llama.llm, components=[llama.clip]).encoder.template.name == "vicuna_v1"
    assert_refused(lambda: reverie_jax.load_model(tmp_path / "run"), tmp_path / "run", "adapter")
