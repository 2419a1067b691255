"""Broken, dangerous and incomplete checkpoints: each is refused in one line that names the file or the tensor."""

import contextlib
import functools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import reverie_jax
from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import read_model, write_model
from reverie_jax.models.lora import attach
from tests.models import makers
from tests.models.makers import NON_LORA, TOWER, assert_refused, edit_json, load, save, write_json
from tests.models.oracle import assert_same, random_model

QUERY = "layers.1.self_attn.q_proj"
HF_QUERY = f"language_model.model.{QUERY}.weight"
NORM = "language_model.model.norm.weight"
CONV = "vision_tower.embeddings.patch_embedding.weight"
INDEX = {"hf": "model.safetensors.index.json", "shards": "pytorch_model.bin.index.json"}


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
    makers.peft_folder(room / "adapter", makers.hf(part), modules_to_save=["multi_modal_projector"])
    return room


@pytest.fixture
def room(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "room", copy_function=os.link)


def unlink_first(path):
    """A copy's files are hard links: replace one by a real copy before it is changed."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


# What is read, from which components, the file to break, a tensor of it, and names of that tensor in messages.
KINDS = {
    "llava-hf": ("whole", [], "whole/model.safetensors", HF_QUERY, (QUERY,)),
    "llava-hf in shards": ("hf", [], None, HF_QUERY, (QUERY,)),
    "original": ("original", ["clip"], "original/pytorch_model.bin", f"model.{QUERY}.weight", (QUERY,)),
    "original in shards": ("shards", ["clip"], None, f"model.{QUERY}.weight", (QUERY,)),
    "tower in an original": (
        *("original", ["clip"], "original/pytorch_model.bin", TOWER + "encoder.layers.2.mlp.fc1.weight"),
        ("layers.2.mlp.fc1",),
    ),
    "projector of a LoRA": (
        *("lora", ["llm", "clip"], f"lora/{NON_LORA}", "base_model.model.model.mm_projector.0.weight"),
        ("mm_projector.0", "linear_1"),
    ),
    "adapters of a LoRA": (
        *("lora", ["llm", "clip"], "lora/adapter_model.safetensors", f"base_model.model.model.{QUERY}.lora_A.weight"),
        (QUERY, "layers.query"),
    ),
    "projector": (
        *("projector/mm_projector.bin", ["llm", "clip"], "projector/mm_projector.bin", "model.mm_projector.2.bias"),
        ("mm_projector.2", "linear_2"),
    ),
    "language model": ("projector", ["llm", "clip"], "llm/model.safetensors", f"model.{QUERY}.weight", (QUERY,)),
    "tower": (
        *("projector", ["llm", "clip"], "clip/model.safetensors", "encoder.layers.2.mlp.fc1.weight"),
        ("layers.2.mlp.fc1",),
    ),
}


def file_of(room, kind):
    path, _, file, name, _ = KINDS[kind]
    return room / (file or f"{path}/{json.loads((room / path / INDEX[path]).read_text())['weight_map'][name]}")


def edit(room, kind, change):
    """Change the tensors of the file; `change` gets them and the name of the one to break."""
    file = file_of(room, kind)
    tensors = load(file)
    change(tensors, KINDS[kind][3])
    file.unlink()
    torch.save(tensors, file) if file.suffix == ".bin" else save(file, tensors)


def refused(room, path, components, *names, any_of=()):
    read = functools.partial(read_model, room / path, components=[room / name for name in components])
    return assert_refused(read, room, *names, any_of=any_of)


def refused_kind(room, kind, *names, tensor=True):
    path, components, _, _, any_of = KINDS[kind]
    return refused(room, path, components, *names, any_of=any_of if tensor else ())


@pytest.mark.parametrize("kind", KINDS)
def test_sound_checkpoints_are_read(kind, sound):
    path, components, *_ = KINDS[kind]
    read_model(sound / path, components=[sound / name for name in components])


# What is done to a tensor of the file: (change, names in the message other than the tensor's).
FAULTS = {
    "missing": (lambda tensors, name: tensors.pop(name), ()),
    "flat": (lambda tensors, name: tensors.update({name: tensors[name].reshape(1, -1)}), ("(",)),
    "longer": (lambda tensors, name: tensors.update({name: torch.cat([tensors[name]] * 2)}), ("(",)),
    "integers": (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), ()),
    "float8": (lambda tensors, name: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}), ()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_tensor_is_named(kind, fault, room):
    change, names = FAULTS[fault]
    edit(room, kind, change)
    refused_kind(room, kind, *names)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_tensor_is_named(kind, room):
    edit(room, kind, lambda tensors, name: tensors.update({name.rsplit(".", 2)[0] + ".extra.weight": torch.zeros(3)}))
    refused_kind(room, kind, "extra.weight", tensor=False)


@pytest.mark.parametrize("content", [0, 100, 0.5, b"version https://git-lfs.github.com/spec/v1\n"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_or_other_file_is_named(kind, content, room):
    file = file_of(room, kind)
    if not isinstance(content, bytes):
        whole = file.read_bytes()
        content = whole[: content if isinstance(content, int) else int(content * len(whole))]
    file.unlink()
    file.write_bytes(content)
    refused_kind(room, kind, file.name, tensor=False)


DUPLICATES = {
    "llava-hf": "lm_head.weight",
    "llava-hf in shards": f"model.language_model.{QUERY}.weight",
    "original": f"language_model.model.{QUERY}.weight",
    "tower in an original": "vision_tower.encoder.layers.2.mlp.fc1.weight",
    "projector of a LoRA": "mm_projector.0.weight",
    "adapters of a LoRA": f"base_model.model.model.{QUERY}.lora_A.default.weight",
    "projector": "mm_projector.2.bias",
    "tower": "vision_model.encoder.layers.2.mlp.fc1.weight",
}


@pytest.mark.parametrize("kind", DUPLICATES)
def test_parameter_stored_under_two_names_is_named(kind, room):
    edit(room, kind, lambda tensors, name: tensors.update({DUPLICATES[kind]: tensors[name].clone()}))
    refused_kind(room, kind, tensor=kind != "llava-hf")


def test_config_with_fewer_layers(room):
    config = json.loads((room / "whole" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (room / "whole" / "config.json").unlink()
    write_json(room / "whole" / "config.json", config)
    refused(room, "whole", [], "language_model.model.layers.1.")


def test_many_missing_tensors_are_counted(room):
    edit(room, "llava-hf", lambda tensors, _: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    refused(room, "whole", [], "25 tensor(s)")


@pytest.mark.parametrize(
    ("name", "shape"), [(NORM, (1, 36)), (CONV, (30, 192)), (CONV, (30, 3, 4, 16)), (CONV, (30, 12, 4, 4))]
)
def test_wrong_shape_with_as_many_numbers(name, shape, room):
    edit(room, "llava-hf", lambda tensors, _: tensors.update({name: tensors[name].reshape(shape)}))
    refused(room, "whole", [], name.removeprefix("vision_tower."), "(")


def test_unused_tensors_of_old_versions_are_ignored(room, sound):
    unused = {
        "language_model.model.rotary_emb.inv_freq": torch.ones(5),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    edit(room, "llava-hf", lambda tensors, _: tensors.update(unused))
    assert_same(read_model(room / "whole"), read_model(sound / "whole"))
    edit(room, "llava-hf", lambda tensors, _: tensors.update({"my_rotary_emb.inv_freq.weight": torch.ones(5)}))
    refused(room, "whole", [], "my_rotary_emb.inv_freq.weight")


# Shards.


def edit_index(room, kind, change):
    index = room / KINDS[kind][0] / INDEX[KINDS[kind][0]]
    raw = json.loads(index.read_text())
    change(raw["weight_map"], KINDS[kind][3])
    index.unlink()
    write_json(index, raw)


def other_shard(room, kind):
    file = file_of(room, kind)
    return next(x for x in sorted(file.parent.glob("*" + file.suffix)) if x != file)


def copy_to_other_shard(room, kind):
    name, other = KINDS[kind][3], other_shard(room, kind)
    tensors = load(other) | {name: load(file_of(room, kind))[name]}
    other.unlink()
    save(other, tensors)


INDEX_FAULTS = {
    "tensor in two shards": copy_to_other_shard,
    "tensor not listed": lambda room, kind: edit_index(room, kind, lambda where, name: where.pop(name)),
    "tensor only listed": lambda room, kind: edit(room, kind, lambda tensors, name: tensors.pop(name)),
    "tensor in another shard": lambda room, kind: edit_index(
        room, kind, lambda where, name: where.update({name: other_shard(room, kind).name})
    ),
}
SHARDED = pytest.mark.parametrize("kind", ["llava-hf in shards", "original in shards"])


@SHARDED
@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_index_that_does_not_match_its_shards(fault, kind, room):
    INDEX_FAULTS[fault](room, kind)
    refused_kind(room, kind)


@SHARDED
def test_shard_missing(kind, room):
    file = file_of(room, kind)
    file.unlink()
    refused_kind(room, kind, file.name, tensor=False)


@SHARDED
@pytest.mark.parametrize("escape", ["../outside", "{room}/outside", "sub/../../outside", ".."])
def test_shard_outside_the_folder(kind, escape, room):
    file = file_of(room, kind)
    shutil.copy(file, room / f"outside{file.suffix}")
    escape = escape.format(room=room) + (file.suffix if "outside" in escape else "")
    edit_index(room, kind, lambda where, _: where.update({n: escape for n, f in where.items() if f == file.name}))
    refused_kind(room, kind, INDEX[KINDS[kind][0]], tensor=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_broken_index(text, room):
    (room / "hf" / INDEX["hf"]).unlink()
    (room / "hf" / INDEX["hf"]).write_text(text)
    refused(room, "hf", [], INDEX["hf"])


# Code in pickles and repositories.


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def arm(file, path, form="zip"):
    content = {"model.norm.weight": torch.ones(36), "x": Bomb(path)}
    file.unlink(missing_ok=True)
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")


BINS = {
    "hf": ("whole", [], "whole/pytorch_model.bin"),
    "shards": ("shards", ["clip"], "shards/pytorch_model-00002-of-00003.bin"),
    "projector": ("projector/mm_projector.bin", ["llm", "clip"], "projector/mm_projector.bin"),
    "lora": ("lora", ["llm", "clip"], f"lora/{NON_LORA}"),
    "adapter": ("lora", ["llm", "clip"], "lora/adapter_model.bin"),
    "clip": ("projector", ["llm", "clip"], "clip/pytorch_model.bin"),
}


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("which", BINS)
def test_code_in_a_pickle_does_not_run(which, form, room, tmp_path):
    path, components, file = BINS[which]
    for other in (room / file).parent.glob("*.safetensors*"):
        other.unlink()
    arm(room / file, tmp_path / "ran", form)
    refused(room, path, components, room / file)
    assert not (tmp_path / "ran").exists()
    torch.load(room / file, weights_only=False) if form != "pickle" else pickle.loads((room / file).read_bytes())
    assert (tmp_path / "ran").exists()  # the code works


@pytest.mark.parametrize(("path", "components"), [("hf", []), ("lora", ["llm", "clip"])])
def test_other_pickles_are_not_opened(path, components, room, tmp_path):
    for name in ("training_args.bin", "optimizer.bin", "rng_state.pth", "scheduler.pt"):
        arm(room / path / name, tmp_path / "ran")
    read_model(room / path, components=[room / name for name in components])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("path", "components"), [("hf", []), ("original", ["clip"])])
def test_code_in_a_repository_does_not_run(path, components, room, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    (room / path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n")
    mapped = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}
    for file in ("config.json", "tokenizer_config.json"):
        unlink_first(room / path / file)
        edit_json(room / path / file, auto_map=mapped)
    with contextlib.suppress(CheckpointError):
        reverie_jax.load_model(room / path, components=[room / name for name in components])
    assert not (tmp_path / "ran").exists()


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


UNSUPPORTED = [
    ("text_config", {"tie_word_embeddings": True}, "tied"),
    ("text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
    ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ("text_config", {"rope_parameters": "linear"}, "rope"),
    ("text_config", {"model_type": "mistral"}, "mistral"),
    ("text_config", {"attention_bias": True}, "bias"),
    ("text_config", {"mlp_bias": True}, "bias"),
    ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
    ("text_config", {"num_key_value_heads": 4, "num_attention_heads": 6, "head_dim": 5}, "num_key_value_heads"),
    ("text_config", {"hidden_size": "36"}, ""),
    ("text_config", {"num_hidden_layers": -1}, ""),
    ("text_config", {"num_attention_heads": 0, "head_dim": None}, ""),
    ("vision_config", {"hidden_act": "relu"}, "relu"),
    ("vision_config", {"image_size": 26}, "image_size"),  # not a whole number of patches
    ("vision_config", {"num_attention_heads": 4}, "num_attention_heads"),  # of a width of 30
    ("vision_config", {"patch_size": 0}, "patch_size"),
    ("vision_config", {"hidden_size": None}, ""),
    (None, {"projector_hidden_act": "relu"}, "projector_hidden_act"),
    (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
    (None, {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
    (None, {"vision_feature_layer": 9}, "feature_layer"),
    (None, {"image_token_id": "x", "image_token_index": "x"}, "image_token"),
    (None, {"text_config": None}, ""),
    (None, {"text_config": None, "model_type": "gpt2"}, "gpt2"),
    (None, {"vision_config": []}, ""),
]


@pytest.mark.parametrize(("section", "values", "name"), UNSUPPORTED, ids=lambda x: str(x)[:60])
def test_unsupported_or_invalid_setting(section, values, name, room):
    file = room / "whole" / "config.json"
    raw = json.loads(file.read_text())
    file.unlink()
    (raw if section is None else raw[section]).update(values)
    write_json(file, raw)
    refused(room, "whole", [], file, name)


@pytest.mark.parametrize("key", ["hidden_size", "patch_size", "num_hidden_layers"])
def test_missing_size_of_the_tower_is_named(key, room):
    file = room / "whole" / "config.json"
    raw = json.loads(file.read_text())
    file.unlink()
    del raw["vision_config"][key]
    write_json(file, raw)
    refused(room, "whole", [], file, key)


# Components that are missing, unused or do not fit: (path, components, names in the message).
COMPONENTS = [
    ("towerless", [], (makers.UNKNOWN_TOWER,)),
    ("projector", [], ("language model",)),
    ("projector", ["clip"], ("language model",)),
    ("projector/mm_projector.bin", ["llm"], ("tower",)),
    ("lora", [], ("language model",)),
    ("lora", ["llm"], ("tower",)),
    ("llm", [], ("projector",)),
    ("clip", [], ("language model",)),
    ("clip", ["llm"], ("projector",)),
    ("adapter", [], ("adapter",)),
    ("original", [], ("tower",)),  # the sizes of its tower are unknown
    ("projector", ["llm", "llm", "clip"], ("room/llm",)),
    ("projector", ["llm", "clip", "clip"], ("room/clip",)),
    ("lora", ["llm", "llm2", "clip"], ("room/llm2",)),
    ("llm", ["llm2", "clip", "projector"], ("room/llm2",)),
    ("hf", ["llm"], ("room/llm",)),
    ("original", ["llm", "clip"], ("room/llm",)),
    ("projector", ["lora", "llm", "clip"], ("room/lora",)),
    ("projector", ["adapter", "llm", "clip"], ("room/adapter",)),
    ("projector", ["llm", "clip", "nowhere"], ("room/nowhere",)),
    ("nowhere", [], ("room/nowhere",)),
    ("whole/model.safetensors", [], ("whole/model.safetensors",)),
    ("projector", ["wide", "clip"], ("projector",)),
]


@pytest.mark.parametrize(("path", "components", "names"), COMPONENTS, ids=str)
def test_components_missing_unused_or_unfit(path, components, names, sound, tmp_path):
    (tmp_path / "room").symlink_to(sound)
    refused(tmp_path / "room", path, components, *names)


def test_model_with_adapters_is_not_written(tmp_path):
    model = random_model()
    attach(model, rank=2, alpha=4.0)
    assert_refused(lambda: write_model(model, tmp_path / "out", dtype=np.float32), "adapters")
    assert not (tmp_path / "out").exists()
