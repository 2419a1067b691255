"""Broken, dangerous and incomplete checkpoints: each is refused in one line that names the file or the tensor."""

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import reverie_jax
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.models.checkpoints import read_model, write_model
from reverie_jax.models.checkpoints.configs import known_tower
from reverie_jax.models.lora import attach
from tests.models import makers, sisters_files, sisters_oracle
from tests.models.makers import ADAPTER_FILE, NON_LORA, TOWER, assert_refused, edit_json, load, write_json
from tests.models.oracle import assert_same, random_model

QUERY = "layers.1.self_attn.q_proj"
HF_QUERY = f"language_model.model.{QUERY}.weight"
MM_PROJECTOR = "projector/mm_projector.bin"
INDEX = {"hf": "model.safetensors.index.json"}
INDEX |= dict.fromkeys(("shards", "mplug-owl", "muffin"), "pytorch_model.bin.index.json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One folder of each format, all from the same components."""
    room, part = tmp_path_factory.mktemp("sound"), makers.parts()
    makers.hf_folder(room / "hf", makers.hf(part), max_shard_size="20KB")
    makers.hf_folder(room / "whole", makers.hf(part))
    makers.original_folder(room / "original", part)
    makers.original_folder(room / "shards", part, "bin shards")
    makers.original_folder(room / "towerless", part, tower=False)
    makers.projector_folder(room / "projector", part)
    makers.lora_folder(room / "lora", part)
    makers.llm_folder(room / "llm", part)
    makers.llm_folder(room / "llm2", makers.parts(seed=50))
    makers.llm_folder(room / "wide", makers.parts(hidden=48))
    makers.clip_folder(room / "clip", part)
    shutil.copytree(room / "llm", room / "unprojected")
    makers.write_json(room / "unprojected/config.json", makers.original_config(part))
    (room / "xtuner" / "visual_encoder").mkdir(parents=True)
    makers.write_json(room / "run/run.json", {})
    (room / "minigpt4").mkdir()
    sisters_files.minigpt4_files(room / "minigpt4", sisters_oracle.system("minigpt4"))
    sisters_files.mplug_folder(room / "mplug-owl", sisters_oracle.system("mplug-owl"))
    sisters_files.muffin_folder(room / "muffin", sisters_oracle.system("muffin"))
    makers.peft_folder(room / "adapter", makers.hf(part), modules_to_save=["multi_modal_projector"])
    return room


@pytest.fixture
def room(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "room")


FC1, ADAPTED, TWO = "encoder.layers.2.mlp.fc1.weight", "base_model.model.model.", ["llm", "clip"]
MINIGPT4, OTHERS = "minigpt4/checkpoint_19.pth", ["eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "vicuna-7b-v0"]
SOURCES, OUTPUT = [f"minigpt4/{name}" for name in OTHERS], "layer.1.output_query.dense"
OWL = "encoder.layers.1.self_attn.query_key_value"
BEIT3 = "beit3.encoder.layers.1.ffn.B.fc1"
# What is read, with which components, the file to break, a tensor of it, and names of that tensor in messages.
KINDS = {
    "llava-hf": ("whole", [], "whole/model.safetensors", HF_QUERY, [QUERY]),
    "llava-hf in shards": ("hf", [], None, HF_QUERY, [QUERY]),
    "original": ("original", ["clip"], "original/pytorch_model.bin", f"model.{QUERY}.weight", [QUERY]),
    "original in shards": ("shards", ["clip"], None, f"model.{QUERY}.weight", [QUERY]),
    "tower in an original": ("original", ["clip"], "original/pytorch_model.bin", TOWER + FC1, ["layers.2.mlp.fc1"]),
    "projector of a LoRA": ("lora", TWO, f"lora/{NON_LORA}", f"{ADAPTED}mm_projector.0.weight", ["linear_1", "tor.0"]),
    "adapters of a LoRA": ("lora", TWO, f"lora/{ADAPTER_FILE}", f"{ADAPTED}{QUERY}.lora_A.weight", [QUERY, ".query"]),
    "projector": (MM_PROJECTOR, TWO, MM_PROJECTOR, "model.mm_projector.2.bias", ["mm_projector.2", "linear_2"]),
    "language model": ("projector", TWO, "llm/model.safetensors", f"model.{QUERY}.weight", [QUERY]),
    "tower": ("projector", TWO, "clip/model.safetensors", FC1, ["layers.2.mlp.fc1"]),
    "EVA-CLIP": (MINIGPT4, SOURCES, SOURCES[0], "blocks.1.mlp.fc2.weight", ["blocks.1.mlp.fc2"]),
    "BLIP-2": (MINIGPT4, SOURCES, SOURCES[1], f"Qformer.bert.encoder.{OUTPUT}.weight", [OUTPUT]),
    "projector of a MiniGPT-4": (MINIGPT4, SOURCES, MINIGPT4, "llama_proj.weight", ["llama_proj"]),
    "mPLUG-Owl in shards": ("mplug-owl", [], None, f"vision_model.{OWL}.weight", [OWL]),
    "Muffin in shards": ("muffin", [], None, f"model.vision_tower.{BEIT3}.weight", [BEIT3]),
    "Muffin's LLaMA in shards": ("muffin", [], None, f"model.{QUERY}.weight", [QUERY]),
}
SHARDED = [kind for kind in KINDS if "shards" in kind]
# The same parameter under another name.
SECOND_NAMES = {
    "llava-hf": "lm_head.weight",
    "original": f"language_model.model.{QUERY}.weight",
    "tower in an original": f"vision_tower.{FC1}",
    "projector of a LoRA": "mm_projector.0.weight",
    "adapters of a LoRA": f"{ADAPTED}{QUERY}.lora_A.default.weight",
    "tower": f"vision_model.{FC1}",
    "Muffin's LLaMA in shards": f"language_model.model.{QUERY}.weight",
}


def file_of(room, kind):
    path, _, file, name, _ = KINDS[kind]
    return room / (file or f"{path}/{json.loads((room / path / INDEX[path]).read_text())['weight_map'][name]}")


def other_shard(room, kind):
    file = file_of(room, kind)
    return next(x for x in sorted(file.parent.glob("*" + file.suffix)) if x != file)


def edit(file, change):
    whole = load(file)
    change(whole.get("model", whole))
    makers.save(file, whole) if file.suffix == ".safetensors" else torch.save(whole, file)


def refused(room, path, components, *names, any_of=()):
    read = functools.partial(read_model, room / path, components=[room / name for name in components])
    return assert_refused(read, room, *names, any_of=any_of)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_checkpoints_are_read(kind, sound):
    path, components, *_ = KINDS[kind]
    read_model(sound / path, components=[sound / name for name in components])


def tensor(change):
    """A fault of the kind's tensor: `change` gets all tensors of its file, its name and the kind."""
    return lambda room, kind: edit(file_of(room, kind), lambda tensors: change(tensors, KINDS[kind][3], kind))


def replaced(change):
    return tensor(lambda tensors, name, _: tensors.update({name: change(tensors[name])}))


class Bomb:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(RAN),)


def armed(form):
    """Return the bytes of a file that runs code when it is unpickled."""
    state, buffer = {"model.norm.weight": torch.ones(36), "x": Bomb()}, io.BytesIO()
    if form == "pickle":
        return pickle.dumps(state, protocol=2)
    if form == "training state":  # beside a sound state dict
        state = {"model": {"model.norm.weight": torch.ones(36)}, "optimizer": state}
    torch.save(state, buffer, _use_new_zipfile_serialization=form != "legacy")
    return buffer.getvalue()


def content(change):
    def fault(room, kind):
        file = file_of(room, kind)
        file.write_bytes(change(file.read_bytes()))

    return fault


def index(change):
    """A fault of the index: `change` gets its map, the tensor's name, its shard and another shard."""

    def fault(room, kind):
        path = room / KINDS[kind][0] / INDEX[KINDS[kind][0]]
        raw = json.loads(path.read_text())
        change(raw["weight_map"], KINDS[kind][3], file_of(room, kind).name, other_shard(room, kind).name)
        write_json(path, raw)

    return fault


def outside(name):
    """Move the tensor's shard out of the folder, and list it there."""

    def fault(room, kind):
        file = file_of(room, kind)
        shutil.copy(file, room / f"outside{file.suffix}")
        where = name.format(room=room) + (file.suffix if "outside" in name else "")
        index(lambda files, _, own, other: files.update({n: where for n, f in files.items() if f == own}))(room, kind)

    return fault


def within(*keys):
    """Move a file's state dict under each of these keys, beside what a training leaves there."""

    def fault(room, kind):
        file = file_of(room, kind)
        torch.save({**dict.fromkeys(keys, load(file)), "optimizer": {"state": {}}, "epoch": 3}, file)

    return fault


def in_two_shards(room, kind):
    moved = {KINDS[kind][3]: load(file_of(room, kind))[KINDS[kind][3]]}
    edit(other_shard(room, kind), lambda tensors: tensors.update(moved))


FORMS, RAN = ("zip", "legacy", "pickle", "training state"), Path(tempfile.mkdtemp()) / "ran"
BINS = ["original", "original in shards", "projector of a LoRA", "projector"]
# A fault, the kinds that can have it, and what the message names: TENSOR, FILE, INDEX_FILE or a text.
TENSOR, FILE, INDEX_FILE = "the tensor", "the file", "the index"
FAULTS = [
    ("missing", tensor(lambda tensors, name, _: tensors.pop(name)), KINDS, TENSOR),
    ("flat", replaced(lambda x: x.reshape(1, -1)), KINDS, TENSOR),
    ("longer", replaced(lambda x: torch.cat([x, x])), KINDS, TENSOR),
    ("integers", replaced(lambda x: x.to(torch.int8)), KINDS, TENSOR),
    ("NaN", replaced(lambda x: x.index_fill(0, torch.tensor([0]), float("nan"))), KINDS, TENSOR),
    ("infinite", replaced(lambda x: x.index_fill(0, torch.tensor([0]), -float("inf"))), KINDS, TENSOR),
    ("float8", replaced(lambda x: x.to(torch.float8_e4m3fn)), KINDS, TENSOR),
    (
        "unknown",
        tensor(lambda tensors, name, _: tensors.update({name.rsplit(".", 2)[0] + ".extra.weight": torch.zeros(3)})),
        *(KINDS, "extra.weight"),
    ),
    (
        "two names",
        tensor(lambda tensors, name, kind: tensors.update({SECOND_NAMES[kind]: tensors[name].clone()})),
        *(SECOND_NAMES, TENSOR),
    ),
    ("empty file", content(lambda whole: b""), KINDS, FILE),
    ("cut within the header", content(lambda whole: whole[:100]), KINDS, FILE),
    ("half a file", content(lambda whole: whole[: len(whole) // 2]), KINDS, FILE),
    ("git-lfs pointer", content(lambda whole: b"version https://git-lfs.github.com/spec/v1\n"), KINDS, FILE),
    *((f"code in a {form}", content(lambda whole, form=form: armed(form)), BINS, FILE) for form in FORMS),
    ("two state dicts", within("model", "module"), BINS, FILE),
    ("state dict under another key", within("net"), BINS, FILE),
    ("nothing but a training's state", within(), BINS, FILE),
    ("no shard", lambda room, kind: file_of(room, kind).unlink(), SHARDED, FILE),
    ("in two shards", in_two_shards, SHARDED, TENSOR),
    ("not listed", index(lambda files, name, *_: files.pop(name)), SHARDED, TENSOR),
    ("listed elsewhere", index(lambda files, name, own, other: files.update({name: other})), SHARDED, TENSOR),
    *(
        (f"shard in {where}", outside(where), SHARDED, INDEX_FILE)
        for where in ("../outside", "{room}/outside", "sub/../../outside", "..")
    ),
]


@pytest.mark.parametrize(
    ("kind", "fault", "named"),
    [
        pytest.param(kind, fault, named, id=f"{name}-{kind}")
        for name, fault, kinds, named in FAULTS
        for kind in KINDS
        if kind in kinds
    ],
)
def test_broken_file_is_named(kind, fault, named, room):
    path, components, _, _, names_of_tensor = KINDS[kind]
    file = file_of(room, kind)
    fault(room, kind)
    names = {TENSOR: (*names_of_tensor, SECOND_NAMES.get(kind, file.name)), FILE: (file.name,)}
    any_of = names.get(named) or (INDEX[path] if named == INDEX_FILE else named,)
    refused(room, path, components, any_of=any_of)
    assert not RAN.exists()


NORM, CONV = "language_model.model.norm.weight", "vision_tower.embeddings.patch_embedding.weight"
UNUSED = {
    "language_model.model.rotary_emb.inv_freq": torch.ones(5),
    "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(NORM, (1, 36)), (CONV, (30, 192)), (CONV, (30, 3, 4, 16)), (CONV, (30, 12, 4, 4))]
)
def test_wrong_shape_with_as_many_numbers(name, shape, room):
    edit(room / "whole/model.safetensors", lambda tensors: tensors.update({name: tensors[name].reshape(shape)}))
    refused(room, "whole", [], name.removeprefix("vision_tower."), "(")


def test_missing_and_unused_tensors(room, sound):
    """Missing ones are counted; those of old versions are ignored, by their whole names."""
    file = room / "whole/model.safetensors"
    edit(file, lambda tensors: tensors.update(UNUSED))
    assert_same(read_model(room / "whole"), read_model(sound / "whole"))
    edit(file, lambda tensors: tensors.update({"my_rotary_emb.inv_freq.weight": torch.ones(5)}))
    refused(room, "whole", [], "my_rotary_emb.inv_freq.weight")
    edit(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    refused(room, "whole", [], "25 tensor(s)")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_broken_index(text, room):
    (room / "hf" / INDEX["hf"]).write_text(text)
    refused(room, "hf", [], INDEX["hf"])


@pytest.mark.parametrize("form", FORMS)
def test_the_code_in_those_files_works(form, tmp_path):
    (tmp_path / "x").write_bytes(armed(form))
    pickle.loads(armed(form)) if form == "pickle" else torch.load(tmp_path / "x", weights_only=False)
    RAN.rmdir()


@pytest.mark.parametrize(("path", "components"), [("hf", []), ("original", ["clip"]), ("lora", ["llm", "clip"])])
def test_other_code_in_a_repository_does_not_run(path, components, room, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    for name in ("training_args.bin", "optimizer.bin", "rng_state.pth", "scheduler.pt"):
        (room / path / name).write_bytes(armed("zip"))
    read_model(room / path, components=[room / name for name in components])
    (room / path / "evil.py").write_text(f"import os\nos.mkdir({str(RAN)!r})\nclass Evil: pass\n")
    mapped = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}
    for file in (room / path).glob("*config.json"):
        edit_json(file, auto_map=mapped)
    with contextlib.suppress(CheckpointError):
        reverie_jax.load_model(room / path, components=[room / name for name in components])
    assert not RAN.exists()


# config.json.


@pytest.mark.parametrize(
    ("path", "components", "broken"),
    [("hf", [], "hf"), ("original", ["clip"], "original")]
    + [("lora", ["llm", "clip"], broken) for broken in ("lora", "llm", "clip")],
)
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe{}"])
def test_config_missing_or_broken(path, components, broken, content, room):
    file = room / broken / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    refused(room, path, components, room / broken)


ABSENT = Ellipsis
NONE_FULL = {"max_window_layers": 0}
SETTINGS = [
    ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("text_config", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "factor"),
    ("text_config", {"rope_scaling": {"type": "llama3", "factor": 2.0}, "rope_parameters": None}, "low_freq_factor"),
    ("text_config", {"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "longrope"),
    ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ("text_config", {"rope_parameters": "linear"}, "rope"),
    ("text_config", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "rope"),
    (None, {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("text_config", {"model_type": "mixtral"}, "mixtral"),
    *(("text_config", {key: True}, key) for key in ("qkv_bias", "qk_layernorm", "alibi")),
    *(("text_config", {"model_type": "mistral", key: True}, key) for key in ("attention_bias", "mlp_bias")),
    (
        "text_config",
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": "4", **NONE_FULL},
        "sliding_window",
    ),
    *(("text_config", {key: 12.0}, key) for key in ("embedding_multiplier", "logits_scaling", "attention_multiplier")),
    *(("text_config", {key: 30.0}, key) for key in ("residual_multiplier", "final_logit_softcapping", "clip_qkv")),
    ("text_config", {"num_local_experts": 8}, "num_local_experts"),
    ("text_config", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    (None, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    (None, {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    *((None, {"model_type": kind}, kind) for kind in ("llava_next", "llava_onevision", "paligemma")),
    # Its own five are not in so small a tower.
    (None, {"model_type": "vipllava", "vision_feature_layer": ABSENT}, "vision_feature_layer"),
    ("vision_config", {"model_type": "siglip2_vision_model"}, "siglip2_vision_model"),
    ("text_config", {"hidden_act": "gelu_10"}, "hidden_act"),
    ("text_config", {"num_key_value_heads": 4, "num_attention_heads": 6, "head_dim": 5}, "num_key_value_heads"),
    *(("text_config", {key: "36"}, key) for key in ("hidden_size", "rms_norm_eps", "num_attention_heads")),
    ("text_config", {"num_hidden_layers": -1}, ""),
    ("text_config", {"num_attention_heads": 0, "head_dim": None}, ""),
    ("vision_config", {"hidden_act": "gelu_10"}, "gelu_10"),
    ("vision_config", {"image_size": 26}, "image_size"),  # not a whole number of patches
    ("vision_config", {"num_attention_heads": 4}, "num_attention_heads"),  # of a width of 30
    ("vision_config", {"patch_size": 0}, "patch_size"),
    ("vision_config", {"hidden_size": None}, ""),
    ("vision_config", {"hidden_size": ABSENT}, "hidden_size"),
    ("vision_config", {"patch_size": ABSENT}, "patch_size"),
    ("vision_config", {"num_hidden_layers": ABSENT}, "num_hidden_layers"),
    (None, {"projector_hidden_act": "gelu_10"}, "projector_hidden_act"),
    (None, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
    *((None, {"vision_feature_layer": layers}, "vision_feature_layer") for layers in ([-2, 9], ["-2"], [], [True])),
    (None, {"vision_feature_layer": 9}, "feature_layer"),
    (None, {"image_token_id": "x", "image_token_index": "x"}, "image_token"),
    (None, {"text_config": None}, ""),
    (None, {"text_config": None, "model_type": "gpt2"}, "gpt2"),
    (None, {"vision_config": []}, ""),
]


def edit_config(file, section, values):
    raw = json.loads(file.read_text())
    part = raw if section is None else raw[section]
    part |= values
    for key in [key for key, value in values.items() if value is ABSENT]:
        del part[key]
    write_json(file, raw)
    return file


@pytest.mark.parametrize(("section", "values", "name"), SETTINGS, ids=lambda x: str(x)[:60])
def test_unsupported_or_invalid_setting(section, values, name, room):
    refused(room, "whole", [], edit_config(room / "whole/config.json", section, values), name)


# Settings of other models than the one whose weights are there, with what is missing then.
OTHER_MODELS = [
    ("whole", "text_config", {"attention_bias": True}, "q_proj.bias"),
    ("whole", "text_config", {"mlp_bias": True}, "down_proj.bias"),
    ("whole", "text_config", {"model_type": "qwen3"}, "k_norm"),
    ("whole", "vision_config", {"model_type": "siglip_vision_model"}, "patch_embedding.bias"),
    ("whole", None, {"vision_feature_layer": [-2, -1]}, "linear_1"),
    ("whole", None, {"model_type": "vipllava"}, "projector_layernorm"),
    *(
        ("towerless", None, values, missing)
        for values, missing in (
            ({"model_type": "llava_qwen2"}, "k_proj.bias"),
            ({"architectures": ["LlavaQwenForCausalLM"]}, "k_proj.bias"),
            ({"architectures": ["LlavaStableLMForCausalLM"], "layer_norm_eps": 1e-5}, "input_layernorm.bias"),
            ({"model_type": "llava_phi", "hidden_act": "gelu_new"}, "gate_up_proj"),
            ({"model_type": "llava_phi", "rms_norm_eps": ABSENT, "partial_rotary_factor": 0.4}, "bias"),
        )
    ),
]


@pytest.mark.parametrize(("path", "section", "values", "missing"), OTHER_MODELS, ids=str)
def test_weights_of_another_model(path, section, values, missing, room):
    edit_config(room / path / "config.json", section, values)
    refused(room, path, ["clip"] if path == "towerless" else [], any_of=(missing,))


ORIGINAL_SETTINGS = [
    *({"model_type": f"llava_{name}"} for name in ("mixtral", "qwen2_moe", "gemma", "mpt", "granite", "cohere")),
    *({"architectures": [f"Llava{name}ForCausalLM"]} for name in ("Mixtral", "Mpt", "Foo")),
    *({"model_type": kind} for kind in ("mgm", "tiny_llava")),
    {"model_type": "tiny_llava_phi", "rms_norm_eps": ABSENT, "layer_norm_eps": 1e-5},
    {"quantization_config": {"quant_method": "gptq"}},
    {"mm_patch_merge_type": "spatial_unpad"},
    {"mm_use_im_start_end": True},
    {"mm_resampler_type": "perceiver"},
    {"mm_projector_type": "mlp3x_gelu"},
    {"image_aspect_ratio": "anyres"},
    {"s2": True},
    *({"mm_vision_tower": f"somebody/{name}"} for name in ("beit3", "dinov2-large", "eva02-l", "mobileclip_l")),
    {"unfreeze_mm_vision_tower": True},
    {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"},
    {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},  # of other sizes than the one given
]


@pytest.mark.parametrize("values", ORIGINAL_SETTINGS, ids=str)
def test_unsupported_setting_of_an_original(values, room):
    file = edit_config(room / "towerless/config.json", None, values)
    name = str(next(iter(values.values()))).strip("{}[]'").split("'")[-1]
    refused(room, "towerless", ["clip"], file, any_of=(name, "Phi-2", "vision tower"))


PROCESSOR = [
    {"image_mean": "clip"},
    *({key: value} for key in ("image_mean", "image_std") for value in ([0.5], [0.5, 0.5, 2], [1, 0, 1])),
    {"size": {"height": 24, "width": 24}, "do_center_crop": False},
    {"size": {"height": 24, "width": 24}},
    {"size": {"shortest_edge": 30}},
    {"crop_size": {"height": 20, "width": 24}},
    {"do_center_crop": False},
    {"resample": 2},
    {"rescale_factor": 1 / 127.5},
    *({key: False} for key in ("do_normalize", "do_rescale", "do_resize")),
]


@pytest.mark.parametrize("values", PROCESSOR, ids=str)
def test_images_that_are_prepared_otherwise(values, room):
    """By a llava-hf model's processor, and by that of the tower, which original LLaVA uses."""
    file = edit_config(room / "whole/processor_config.json", "image_processor", values)
    refused(room, "whole", [], file, any_of=tuple(values))
    file = edit_config(room / "clip/preprocessor_config.json", None, values)
    refused(room, "projector", ["llm", "clip"], file, any_of=tuple(values))


@pytest.mark.parametrize("size", [24, {"shortest_edge": 24, "longest_edge": None, "height": None}])
def test_image_sizes_as_versions_of_transformers_write_them(size, room):
    edit_config(room / "whole/processor_config.json", "image_processor", {"size": size, "do_pad": None})
    read_model(room / "whole")


def test_values_beyond_the_dtype_are_not_made_infinite(room):
    def grow(tensors):
        tensors[HF_QUERY][1, 2] = 7e4

    edit(room / "whole/model.safetensors", grow)
    assert_refused(lambda: read_model(room / "whole", dtype="float16"), QUERY, "float16")
    model = read_model(room / "whole", dtype="bfloat16")
    model.compute_dtype = np.float16  # what `convert --dtype` of an adapter's merge would meet
    assert_refused(lambda: write_model(model, room / "out"), QUERY, "float16")


TUNED = "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"


@pytest.mark.parametrize(
    ("folder", "settings", "accepted"),
    [
        ("clip-vit-large-patch14-336", {}, False),
        ("models--openai--clip-vit-large-patch14/snapshots/0123", {}, False),
        ("ShareGPT4V-7B_Pretrained_vit-large336-l12", {}, True),
        ("models--Lin-Chen--ShareGPT4V-7B_Pretrained_vit-large336-l12/snapshots/0123", {}, True),
        ("tower", {}, False),
        ("models--somebody--tower/snapshots/0123", {}, False),
        ("tower", {"architectures": ["CLIPModel"], "_name_or_path": TUNED}, True),
        # A tower that was tuned from it, and saved without the text tower.
        ("tower", {"architectures": ["CLIPVisionModel"], "_name_or_path": TUNED}, False),
    ],
)
@pytest.mark.parametrize("kind", ["towerless", "lora"])
def test_tuned_tower_is_not_replaced_by_another(kind, folder, settings, accepted, room):
    """What nothing says to be the tower is refused, until config.json names it."""
    file = edit_config(room / kind / "config.json", None, {"mm_vision_tower": TUNED})
    makers.edit_json(room / "clip/config.json", **settings)
    (room / folder).parent.mkdir(parents=True, exist_ok=True)
    (room / "clip").rename(room / folder)
    components = [folder, *(["llm"] if kind == "lora" else [])]
    if not accepted:
        refused(room, kind, components, file, TUNED, "mm_vision_tower")
        makers.edit_json(file, mm_vision_tower=str(room / folder))  # the way out that the message names
    read_model(room / kind, components=[room / name for name in components])


def test_component_that_describes_an_included_tower_has_its_sizes(room):
    """Heads, for one, cannot be told from the weights."""
    file = edit_config(room / "original/config.json", None, {"mm_vision_tower": "openai/clip-vit-large-patch14-336"})
    refused(room, "original", ["clip"], file, "openai")


@pytest.mark.parametrize(
    ("recorded", "folder"),
    [
        ("/data/clip_l_336", "clip_l_336"),
        ("/home/user/.cache/hub/models--openai--clip-vit-large-patch14/snapshots/45", "clip-vit-large-patch14"),
        ("/x/models--a--b/snapshots/45/", "models--a--b/snapshots/67"),
    ],
)
def test_tower_is_recognized_by_its_repository_or_by_a_link(recorded, folder, room, caplog):
    """A path of the hub's cache names a repository; a link says that a folder of another name is the tower."""
    edit_config(room / "towerless/config.json", None, {"mm_vision_tower": recorded})
    (room / "clip").rename(room / "clip-vit-large-patch14-336")
    (room / folder).parent.mkdir(parents=True, exist_ok=True)
    (room / folder).symlink_to(room / "clip-vit-large-patch14-336")
    read_model(room / "towerless", components=[room / folder])
    assert "tower" not in caplog.text
    assert (known_tower(recorded) is None) == ("openai" not in recorded)


def test_folder_of_checkpoints_names_the_last(room):
    for step in (5, 10):
        shutil.copytree(room / "whole", room / f"runs/checkpoint-{step}")
    refused(room, "runs", [], "runs/checkpoint-10")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64", "bool", "nonsense"])
def test_dtypes_that_no_model_has(dtype, sound):
    with pytest.raises(UserError, match=dtype):
        read_model(sound / "whole", dtype=dtype)


def test_weights_beside_the_index_of_earlier_shards(room, sound):
    """They are read, as transformers does."""
    shutil.copy(room / "whole/model.safetensors", room / "hf")
    edit(room / "hf/model.safetensors", lambda tensors: tensors[HF_QUERY].mul_(2))
    ours, before = read_model(room / "hf"), read_model(sound / "hf")
    kernels = [np.asarray(model.decoder.layers.query.kernel[...][1]) for model in (ours, before)]
    np.testing.assert_array_equal(kernels[0], 2 * kernels[1])


def test_config_with_fewer_layers(room):
    edit_config(room / "whole/config.json", "text_config", {"num_hidden_layers": 1})
    refused(room, "whole", [], "language_model.model.layers.1.")


# Components that are missing, unused or do not fit: (path, components, name in the message).
COMPONENTS = [
    ("towerless", [], makers.UNKNOWN_TOWER),
    ("projector", [], "language model"),
    ("projector", ["clip"], "language model"),
    ("projector/mm_projector.bin", ["llm"], "tower"),
    ("lora", [], "language model"),
    ("lora", ["llm"], "tower"),
    ("llm", [], "projector"),
    ("clip", [], "language model"),
    ("clip", ["llm"], "projector"),
    ("adapter", [], "adapter"),
    ("original", [], "tower"),  # the sizes of its tower are unknown
    ("projector", ["llm", "llm", "clip"], "room/llm"),
    ("projector", ["llm", "clip", "clip"], "room/clip"),
    ("lora", ["llm", "llm2", "clip"], "room/llm2"),
    ("llm", ["llm2", "clip", "projector"], "room/llm2"),
    ("hf", ["llm"], "room/llm"),
    ("original", ["llm", "clip"], "room/llm"),
    ("projector", ["lora", "llm", "clip"], "room/lora"),
    ("projector", ["adapter", "llm", "clip"], "room/adapter"),
    ("projector", ["llm", "clip", "nowhere"], "room/nowhere"),
    ("nowhere", [], "room/nowhere"),
    ("whole/model.safetensors", [], "whole/model.safetensors"),
    ("whole/config.json", [], "not a checkpoint"),
    ("xtuner", [], "XTuner"),
    ("run", ["llm", "clip"], "adapter"),
    ("unprojected", ["clip"], "projector is missing"),
    ("projector", ["wide", "clip"], "projector"),
    ("lora", ["whole", "clip"], "room/clip"),  # llava-hf has its tower
]


@pytest.mark.parametrize(("path", "components", "name"), COMPONENTS, ids=str)
def test_components_missing_unused_or_unfit(path, components, name, sound, tmp_path):
    (tmp_path / "room").symlink_to(sound)
    refused(tmp_path / "room", path, components, name)


def test_model_with_adapters_is_not_written(tmp_path):
    model = random_model()
    attach(model, rank=2, alpha=4.0)
    assert_refused(lambda: write_model(model, tmp_path / "out", dtype=np.float32), "adapters")
    assert not (tmp_path / "out").exists()
