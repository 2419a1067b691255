import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import read_model, write_model
from reverie_jax.models.lora import attach
from tests.models.oracle import flat, random_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
NORM = "language_model.model.norm.weight"
PATCH = "vision_tower.vision_model.embeddings.patch_embedding.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_model(random_model(), folder, dtype=np.float32)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


def edit_tensors(folder, edit):
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def edit_config(folder, section, values):
    raw = json.loads((folder / "config.json").read_text())
    (raw if section is None else raw[section]).update(values)
    (folder / "config.json").write_text(json.dumps(raw))


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        read_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert str(word) in message
    return message


def test_sound_folder_reads(folder):
    assert read_model(folder).config == random_model().config


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "nowhere")


def test_file_for_a_folder(folder):
    refused(folder / FILE, folder / FILE)


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, folder / "config.json")


def test_no_tensors(folder):
    (folder / FILE).unlink()
    refused(folder, folder, FILE)


@pytest.mark.parametrize("text", ['{"text_config": ', "", "\x00", "not json"])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, folder / "config.json")


def test_config_in_no_utf8(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, folder / "config.json")


@pytest.mark.parametrize("value", [3, None, "text_config vision_config", ["text_config", "vision_config"]])
def test_config_that_is_no_object(folder, value):
    (folder / "config.json").write_text(json.dumps(value))
    refused(folder, folder / "config.json")


def test_config_of_another_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 36}')
    refused(folder, folder, "a plain language model", "projector")


@pytest.mark.parametrize("key", ["hidden_size", "patch_size", "num_hidden_layers"])
def test_config_key_missing(folder, key):
    raw = json.loads((folder / "config.json").read_text())
    del raw["vision_config"][key]
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, folder / "config.json", key)


UNSUPPORTED = [
    ("text_config", {"tie_word_embeddings": True}, "tied"),
    ("text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("text_config", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ("text_config", {"model_type": "mistral"}, "mistral"),
    ("text_config", {"attention_bias": True}, "bias"),
    ("text_config", {"mlp_bias": True}, "bias"),
    ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
    ("vision_config", {"hidden_act": "relu"}, "relu"),
    (None, {"projector_hidden_act": "relu"}, "projector_hidden_act"),
    (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
    (None, {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
    (None, {"vision_feature_layer": 9}, "feature_layer"),
    ("vision_config", {"image_size": 26}, "image_size"),  # no whole number of patches
    ("vision_config", {"num_attention_heads": 4}, "num_attention_heads"),  # of a width of 30
    ("text_config", {"num_key_value_heads": 4, "num_attention_heads": 6, "head_dim": 5}, "num_key_value_heads"),
]


@pytest.mark.parametrize(("section", "values", "word"), UNSUPPORTED, ids=lambda x: str(x)[:60])
def test_unsupported_config(folder, section, values, word):
    edit_config(folder, section, values)
    refused(folder, folder / "config.json", word)


WRONG = [
    (None, {"text_config": None}),
    (None, {"vision_config": []}),
    ("text_config", {"hidden_size": "36"}),
    ("text_config", {"rope_scaling": "linear"}),
    ("text_config", {"num_hidden_layers": -1}),
    ("vision_config", {"patch_size": 0}),
    ("text_config", {"num_attention_heads": 0, "head_dim": None}),
    ("vision_config", {"hidden_size": None}),
    (None, {"image_token_index": None}),
]


@pytest.mark.parametrize(("section", "values"), WRONG, ids=lambda x: str(x)[:40])
def test_config_value_of_a_wrong_kind(folder, section, values):
    edit_config(folder, section, values)
    refused(folder, folder / "config.json")


def test_whole_numbers_serve_as_floats(folder):
    edit_config(folder, "text_config", {"rope_theta": 500000})
    assert read_model(folder).config.text.rope_theta == 500000.0


def test_tensor_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(QUERY))
    refused(folder, folder, QUERY)


def test_many_missing_are_counted(folder):
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    assert "25 tensor(s)" in refused(folder, folder)


def test_tensor_too_many(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"language_model.model.extra.weight": np.zeros(3, np.float32)}))
    refused(folder, folder, "language_model.model.extra.weight")


def test_layer_too_many(folder):
    edit_config(folder, "text_config", {"num_hidden_layers": 1})
    refused(folder, folder, "language_model.model.layers.1.")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (QUERY, (36, 60)),  # transposed
        (QUERY, (2160,)),
        (QUERY, (1, 60, 36)),
        (NORM, (1, 36)),
        (PATCH, (30, 192)),
        (PATCH, (30, 3, 4, 16)),  # as many numbers in a patch, otherwise cut
        (PATCH, (30, 12, 4, 4)),
    ],
)
def test_wrong_shape(folder, name, shape):
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].reshape(shape)}))
    refused(folder, folder, name, "(")


def test_integers_are_no_weights(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NORM: np.ones(36, np.int8)}))
    refused(folder, folder, NORM)


def test_float8_is_refused(folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / FILE)
    tensors[QUERY] = tensors[QUERY].to(torch.float8_e4m3fn)
    save_file(tensors, folder / FILE)
    refused(folder, folder, QUERY)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_file(folder, keep):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:keep])
    refused(folder, folder / FILE)


def test_tensor_twice_under_two_names(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["language_model.lm_head.weight"]}))
    refused(folder, folder / FILE, "language_model.lm_head.weight", "twice")


def shard(folder, weight_map=None, **files):
    """Splits the checkpoint in two, then writes `files` over it."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    for file, part in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    if weight_map is None:
        weight_map = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_shards_read(folder):
    whole = flat(read_model(folder))
    shard(folder)
    parts = flat(read_model(folder))
    assert all(np.array_equal(whole[path], parts[path]) for path in whole)


def test_tensor_twice_in_two_shards(folder):
    tensors = shard(folder)
    second = load_file(folder / "b.safetensors")
    first_name = sorted(tensors)[0]
    save_file(second | {first_name: tensors[first_name]}, folder / "b.safetensors")
    refused(folder, folder / "b.safetensors", first_name, "twice")


def test_shard_missing(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    refused(folder, folder / "b.safetensors")


def test_shard_not_in_the_index(folder):
    tensors = shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {sorted(tensors)[0]: "a.safetensors"}}))
    refused(folder, folder, sorted(tensors)[2])


@pytest.mark.parametrize("escape", ["../b.safetensors", "/etc/hostname", "sub/../../b.safetensors", "..", "sub/b"])
def test_shard_outside_the_folder(folder, escape):
    tensors = shard(folder)
    shutil.copy(folder / "b.safetensors", folder.parent / "b.safetensors")
    names = sorted(tensors)
    files = {name: "a.safetensors" if i % 2 == 0 else escape for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    refused(folder, folder, escape)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_broken_index(folder, text):
    shard(folder)
    (folder / INDEX).write_text(text)
    refused(folder, folder)


def test_leftovers_of_old_versions_are_ignored(folder):
    whole = flat(read_model(folder))
    leftovers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32),
        "language_model.model.rotary_emb.inv_freq": np.ones(5, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.arange(10)[None],
    }
    edit_tensors(folder, lambda tensors: tensors.update(leftovers))
    again = flat(read_model(folder))
    assert all(np.array_equal(whole[path], again[path]) for path in whole)


def test_names_that_only_resemble_leftovers_are_not(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"my_rotary_emb.inv_freq.weight": np.ones(5, np.float32)}))
    refused(folder, folder, "my_rotary_emb.inv_freq.weight")


def test_adapters_are_not_written(tmp_path):
    model = random_model()
    attach(model, rank=2, alpha=4.0)
    with pytest.raises(CheckpointError, match="carries adapters") as caught:
        write_model(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
