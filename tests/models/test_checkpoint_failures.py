"""Broken, dangerous and incomplete checkpoints of every kind but one llava-hf file (see test_checkpoint_errors).

Each is refused in one line that names the file or the tensor, and nothing in a pickle is executed.
"""

import contextlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

import reverie_jax
from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import read_model
from tests.models import makers
from tests.models.makers import TOWER

QUERY = "layers.1.self_attn.q_proj"
INDEX = {"hf": "model.safetensors.index.json", "shards": "pytorch_model.bin.index.json"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One folder of each kind, all from the same parts."""
    room, part = tmp_path_factory.mktemp("sound"), makers.parts()
    makers.hf_folder(room / "hf", makers.hf(part), max_shard_size="20KB")
    makers.original_folder(room / "original", part)
    makers.original_folder(room / "shards", part, shards=3)
    makers.original_folder(room / "bare", part, tower=False)
    makers.projector_file(room / "projector", part)
    makers.lora_folder(room / "lora", part)
    makers.llm_folder(room / "llm", part)
    makers.llm_folder(room / "llm2", makers.parts(seed=50))
    makers.llm_folder(room / "wide", makers.parts(hidden=48))
    makers.clip_folder(room / "clip", part)
    makers.peft_folder(room / "adapter", makers.hf(part), modules_to_save=["multi_modal_projector"])
    return room


@pytest.fixture
def room(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "room")


# What is read, from which parts, the file that is broken, a tensor of it, and words one of which names that tensor.
HF_QUERY = f"language_model.model.{QUERY}.weight"
KINDS = {
    "llava-hf in shards": ("hf", [], None, HF_QUERY, (QUERY,)),
    "original": ("original", ["clip"], "original/pytorch_model.bin", f"model.{QUERY}.weight", (QUERY,)),
    "original in shards": ("shards", ["clip"], None, f"model.{QUERY}.weight", (QUERY,)),
    "tower in an original": (
        *("original", ["clip"], "original/pytorch_model.bin", TOWER + "encoder.layers.2.mlp.fc1.weight"),
        ("layers.2.mlp.fc1",),
    ),
    "projector of a LoRA": (
        *("lora", ["llm", "clip"], "lora/non_lora_trainables.bin", "base_model.model.model.mm_projector.0.weight"),
        ("mm_projector.0", "linear_1"),
    ),
    "adapters of a LoRA": (
        *("lora", ["llm", "clip"], "lora/adapter_model.safetensors", f"base_model.model.model.{QUERY}.lora_A.weight"),
        (QUERY, "layers.query"),
    ),
    "projector": (
        *("projector", ["llm", "clip"], "projector/mm_projector.bin", "model.mm_projector.0.weight"),
        ("mm_projector.0", "linear_1"),
    ),
    "projector's file": (
        *("projector/mm_projector.bin", ["llm", "clip"], "projector/mm_projector.bin", "model.mm_projector.2.bias"),
        ("mm_projector.2", "linear_2"),
    ),
    "language model": ("projector", ["llm", "clip"], "llm/model.safetensors", f"model.{QUERY}.weight", (QUERY,)),
    "tower": (
        *("projector", ["llm", "clip"], "clip/model.safetensors", "encoder.layers.2.mlp.fc1.weight"),
        ("layers.2.mlp.fc1",),
    ),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def file_of(room, kind):
    path, _, file, name, _ = KINDS[kind]
    return room / (file or f"{path}/{json.loads((room / path / INDEX[path]).read_text())['weight_map'][name]}")


def tensors_of(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def edit(room, kind, change):
    """Changes the tensors of the file; `change` gets them and the name of the one to break."""
    file = file_of(room, kind)
    tensors = tensors_of(file)
    change(tensors, KINDS[kind][3])
    makers.resave(file, tensors)


def refused(room, path, base, *words, any_of=()):
    with pytest.raises(CheckpointError) as caught:
        read_model(room / path, components=[room / name for name in base])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert str(room) in message, message  # a place to look at
    for word in words:
        assert str(word) in message, message
    assert not any_of or any(word in message for word in any_of), message
    return message


def refused_kind(room, kind, *words, named=True):
    path, base, _, _, any_of = KINDS[kind]
    return refused(room, path, base, *words, any_of=any_of if named else ())


@EVERY
def test_sound_folders_read(kind, sound):
    path, base, *_ = KINDS[kind]
    read_model(sound / path, components=[sound / name for name in base])


@EVERY
def test_tensor_missing(kind, room):
    edit(room, kind, lambda tensors, name: tensors.pop(name))
    refused_kind(room, kind)


@EVERY
def test_tensor_too_many(kind, room):
    def change(tensors, name):
        tensors[name.rsplit(".", 2)[0] + ".extra.weight"] = torch.zeros(3)

    edit(room, kind, change)
    refused_kind(room, kind, "extra.weight", named=False)


@EVERY
@pytest.mark.parametrize("shape", ["flat", "turned", "longer"])
def test_wrong_shape(kind, shape, room):
    def change(tensors, name):
        x = tensors[name]
        tensors[name] = {"flat": x.reshape(1, -1), "turned": x[None].mT[..., None], "longer": torch.cat([x, x])}[shape]

    edit(room, kind, change)
    refused_kind(room, kind, "(")


@EVERY
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_no_floating_point_numbers(kind, dtype, room):
    edit(room, kind, lambda tensors, name: tensors.update({name: tensors[name].to(dtype)}))
    refused_kind(room, kind)


@EVERY
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -10])
def test_truncated(kind, keep, room):
    file = file_of(room, kind)
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    refused_kind(room, kind, file.name, named=False)


@EVERY
@pytest.mark.parametrize("content", [b"not weights at all\n" * 20, b"version https://git-lfs.github.com/spec/v1\n"])
def test_something_else_under_the_name(kind, content, room):
    file_of(room, kind).write_bytes(content)
    refused_kind(room, kind, file_of(room, kind).name, named=False)


SPELLINGS = {
    "llava-hf in shards": f"model.language_model.{QUERY}.weight",
    "original": f"language_model.model.{QUERY}.weight",
    "tower in an original": "vision_tower.encoder.layers.2.mlp.fc1.weight",
    "projector of a LoRA": "mm_projector.0.weight",
    "adapters of a LoRA": f"base_model.model.model.{QUERY}.lora_A.default.weight",
    "projector": "mm_projector.0.weight",
    "tower": "vision_model.encoder.layers.2.mlp.fc1.weight",
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_one_parameter_under_two_spellings(kind, room):
    edit(room, kind, lambda tensors, name: tensors.update({SPELLINGS[kind]: tensors[name].clone()}))
    refused_kind(room, kind)


SHARDED = pytest.mark.parametrize("kind", ["llava-hf in shards", "original in shards"])


def edit_index(room, kind, change):
    path = KINDS[kind][0]
    raw = json.loads((room / path / INDEX[path]).read_text())
    change(raw["weight_map"], KINDS[kind][3])
    makers.write_json(room / path / INDEX[path], raw)
    return room / path


def another_shard(room, kind):
    file = file_of(room, kind)
    return next(x for x in sorted(file.parent.glob("*" + file.suffix)) if x != file)


@SHARDED
def test_tensor_in_two_shards(kind, room):
    name, other = KINDS[kind][3], another_shard(room, kind)
    makers.resave(other, tensors_of(other) | {name: tensors_of(file_of(room, kind))[name]})
    refused_kind(room, kind, name)


@SHARDED
def test_index_names_an_absent_file(kind, room):
    file = file_of(room, kind)
    file.unlink()
    refused_kind(room, kind, file.name, named=False)


@SHARDED
def test_index_lacks_a_tensor(kind, room):
    edit_index(room, kind, lambda where, name: where.pop(name))
    refused_kind(room, kind)


@SHARDED
def test_index_promises_a_tensor(kind, room):
    edit(room, kind, lambda tensors, name: tensors.pop(name))
    refused_kind(room, kind)


@SHARDED
def test_index_names_the_wrong_shard(kind, room):
    other = another_shard(room, kind).name
    edit_index(room, kind, lambda where, name: where.update({name: other}))
    refused_kind(room, kind)


@SHARDED
@pytest.mark.parametrize("escape", ["../outside", "{room}/outside", "sub/../../outside", "..", ""])
def test_index_points_outside_the_folder(kind, escape, room):
    file = file_of(room, kind)
    shutil.copy(file, room / f"outside{file.suffix}")
    escape = escape.format(room=room) + (file.suffix if "outside" in escape else "")
    edit_index(room, kind, lambda where, _: where.update({n: escape for n, f in where.items() if f == file.name}))
    refused_kind(room, kind, INDEX[KINDS[kind][0]], named=False)


# Pickles that would run code.


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def armed(file, place, form):
    content = {"model.norm.weight": torch.ones(36), "x": Bomb(place)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")


BINS = {
    "hf": ("hf", [], "hf/pytorch_model.bin"),
    "original": ("original", ["clip"], "original/pytorch_model.bin"),
    "shards": ("shards", ["clip"], "shards/pytorch_model-00002-of-00003.bin"),
    "projector": ("projector", ["llm", "clip"], "projector/mm_projector.bin"),
    "file": ("projector/mm_projector.bin", ["llm", "clip"], "projector/mm_projector.bin"),
    "lora": ("lora", ["llm", "clip"], "lora/non_lora_trainables.bin"),
    "adapter": ("lora", ["llm", "clip"], "lora/adapter_model.bin"),
    "llm": ("projector", ["llm", "clip"], "llm/pytorch_model.bin"),
    "clip": ("projector", ["llm", "clip"], "clip/pytorch_model.bin"),
}


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("which", BINS)
def test_no_code_of_a_pickle_runs(which, form, room, tmp_path):
    path, base, file = BINS[which]
    if "shards" not in file:
        for other in (room / file).parent.glob("*.safetensors*"):
            other.unlink()
    armed(room / file, tmp_path / "ran", form)
    refused(room, path, base, room / file)
    assert not (tmp_path / "ran").exists()
    torch.load(room / file, weights_only=False) if form != "pickle" else pickle.loads((room / file).read_bytes())
    assert (tmp_path / "ran").exists()  # it was a live one


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "rng_state.pth", "scheduler.pt"])
@pytest.mark.parametrize(("path", "base"), [("hf", []), ("original", ["clip"]), ("lora", ["llm", "clip"])])
def test_other_pickles_stay_shut(name, path, base, room, tmp_path):
    armed(room / path / name, tmp_path / "ran", "zip")
    read_model(room / path, components=[room / x for x in base])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("path", "base"), [("hf", []), ("original", ["clip"])])
def test_no_code_of_a_repository_runs(path, base, room, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    (room / path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n")
    mapped = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}
    for file in ("config.json", "tokenizer_config.json"):
        makers.edit_json(room / path / file, auto_map=mapped)
    with contextlib.suppress(CheckpointError):
        reverie_jax.load_model(room / path, components=[room / x for x in base])
    assert not (tmp_path / "ran").exists()


# Configurations and parts that are not there, or too many.


@pytest.mark.parametrize(
    ("path", "base", "broken"),
    [
        ("hf", [], "hf"),
        ("original", ["clip"], "original"),
        ("lora", ["llm", "clip"], "lora"),
        ("lora", ["llm", "clip"], "llm"),
        ("lora", ["llm", "clip"], "clip"),
        ("projector", ["llm", "clip"], "clip"),
    ],
)
@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3"])
def test_config_missing_or_broken(path, base, broken, content, room):
    file = room / broken / "config.json"
    file.write_text(content) if content is not None else file.unlink()
    refused(room, path, base, room / broken, "config.json")


LACKING = [
    ("bare", [], ("somebody/a-tiny-clip", "base")),
    ("projector", [], ("language model", "base")),
    ("projector", ["clip"], ("language model", "base")),
    ("projector", ["llm"], ("tower", "base")),
    ("projector/mm_projector.bin", ["llm"], ("tower", "base")),
    ("lora", [], ("language model", "base")),
    ("lora", ["clip"], ("language model", "base")),
    ("lora", ["llm"], ("tower", "base")),
    ("llm", [], ("projector", "base")),
    ("llm", ["clip"], ("projector", "base")),
    ("clip", [], ("language model", "base")),
    ("clip", ["llm"], ("projector", "base")),
    ("adapter", [], ("adapter", "base")),
    ("original", [], ("tower", "base")),  # its tower's sizes stand nowhere
]


@pytest.mark.parametrize(("path", "base", "words"), LACKING, ids=lambda x: str(x))
def test_what_lacks_is_said(path, base, words, room):
    refused(room, path, base, *words)


TOO_MANY = [
    ("projector", ["llm", "llm", "clip"], "llm"),
    ("projector", ["llm", "clip", "clip"], "clip"),
    ("projector", ["llm", "llm2", "clip"], "llm2"),
    ("lora", ["llm", "llm2", "clip"], "llm2"),
    ("llm", ["llm2", "clip", "projector"], "llm2"),
    ("hf", ["llm"], "llm"),
    ("hf", ["original"], "original"),
    ("original", ["llm", "clip"], "llm"),
    ("projector", ["lora", "llm", "clip"], "lora"),
    ("projector", ["adapter", "llm", "clip"], "adapter"),
    ("projector", ["llm", "clip", "nowhere"], "nowhere"),
    ("nowhere", [], "nowhere"),
]


@pytest.mark.parametrize(("path", "base", "word"), TOO_MANY, ids=lambda x: str(x))
def test_parts_too_many_or_of_no_use(path, base, word, room):
    refused(room, path, base, room / word)


def test_parts_that_do_not_fit(room):
    refused(room, "projector", ["wide", "clip"], any_of=("mm_projector", "multi_modal_projector"))
    refused(room, "lora", ["wide", "clip"], any_of=("mm_projector", "multi_modal_projector"))
