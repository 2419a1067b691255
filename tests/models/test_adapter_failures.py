"""Adapters on the wrong base, broken ones, and ones that are more than plain LoRA.

What an adapter folder asks for is done as PEFT does it, or refused; it is never passed over.
"""

import copy
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file

import reverie_jax
from reverie_jax.convert import convert
from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import attach_adapter, read_model
from tests.models import makers
from tests.models.makers import DECODER, Bench, Parts, assert_close, opened, refused, with_adapter
from tests.models.oracle import flat, llava_logits, logits

FILE, CONFIG, PROJECTOR = "adapter_model.safetensors", "adapter_config.json", "multi_modal_projector"
FACTOR = "base_model.model.model.language_model.layers.1.{}.lora_{}.weight"
ROWS = makers.batch()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Bench("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A base of the same shapes and other weights, as (llava-hf folder, language model)."""
    other, room = makers.parts(seed=50), tmp_path_factory.mktemp("stranger")
    return makers.hf_folder(room / "hf", makers.hf(other)), makers.llm_folder(room / "llm", other)


def as_peft_or_refused(base, folder, theirs):
    said = None
    try:
        found = logits(with_adapter(base, folder), ROWS)
    except CheckpointError as error:
        said = str(error)
    if said is None:
        assert_close(found, llava_logits(theirs, ROWS))
    else:
        assert "\n" not in said
        assert str(folder) in said


# The wrong base.


@pytest.mark.parametrize("projector", [False, True])
def test_other_weights_of_the_same_shape(projector, llama, stranger, tmp_path):
    convert(llama.hf, tmp_path / "out", to="peft", adapter=llama.adapter(projector)[0])
    model = read_model(stranger[0])
    before = flat(model)
    refused(lambda: attach_adapter(model, tmp_path / "out"), tmp_path / "out", "base")
    after = flat(model)  # nothing was put on the model
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    refused(lambda: convert(stranger[0], tmp_path / "no", adapter=tmp_path / "out"), "base")
    refused(lambda: reverie_jax.load_model(stranger[0], adapter=tmp_path / "out"), "base")
    assert not (tmp_path / "no").exists()


def test_other_language_model_under_a_llava_lora(llama, stranger, tmp_path):
    convert(llama.lora, tmp_path / "out", to="llava-lora", components=[llama.llm, llama.clip])
    refused(lambda: read_model(tmp_path / "out", components=[stranger[1], llama.clip]), tmp_path / "out", "base")


@pytest.mark.parametrize("projector", [False, True])
def test_another_projector_is_another_base_unless_the_adapter_brings_its_own(projector, llama, tmp_path):
    folder, expected = llama.adapter(projector)
    convert(llama.hf, tmp_path / "out", to="peft", adapter=folder)
    mixed = Parts("llama", llama.part.llm, llama.part.tower, makers.parts(seed=50).projector)
    base = makers.hf_folder(tmp_path / "mixed", makers.hf(mixed))
    if projector:
        assert_close(logits(with_adapter(base, tmp_path / "out"), ROWS), expected)
    else:
        refused(lambda: with_adapter(base, tmp_path / "out"), "projector")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_base_in_another_type_is_the_same_base(dtype, llama, tmp_path):
    convert(llama.hf, tmp_path / "out", to="peft", adapter=llama.plain)
    with_adapter(llama.hf, tmp_path / "out", dtype=dtype)


def test_other_shapes(llama, tmp_path):
    base = makers.hf_folder(tmp_path / "hf", makers.hf(makers.parts(hidden=48)))
    refused(lambda: with_adapter(base, llama.plain), llama.plain, "lora_A", "48", "36")


def test_another_architecture(llama, tmp_path):
    base = makers.hf_folder(tmp_path / "hf", makers.hf(makers.parts("phi3")))
    refused(lambda: with_adapter(base, llama.plain), llama.plain, "_proj")


def test_fewer_layers_than_the_base(llama, tmp_path):
    model = makers.peft_folder(tmp_path / "one", llama.model, target_modules=r".*language_model\.layers\.0\..*_proj")
    as_peft_or_refused(llama.hf, tmp_path / "one", model)


@pytest.mark.parametrize("way", ["base", "adapter"])
def test_lora_of_a_plain_language_model_on_a_whole_llava(way, llama, tmp_path):
    # Loads without a murmur in the reference, and answers worse: haotian-liu/LLaVA#632.
    whole = makers.original_folder(tmp_path / "whole", makers.parts(seed=50))
    if way == "base":
        message = refused(lambda: read_model(llama.lora, components=[whole, llama.clip]), llama.lora)
    else:
        message = refused(
            lambda: convert(whole, tmp_path / "no", to="llava", components=[llama.clip], adapter=llama.lora), llama.lora
        )
    assert "somebody/a-plain-lm" in message
    assert "language model" in message


# Broken adapters.


@pytest.fixture
def broken(llama, tmp_path):
    return shutil.copytree(llama.full, tmp_path / "adapter")


def edit(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def test_rank_of_the_config_is_not_that_of_the_tensors(broken, llama):
    makers.edit_json(broken / CONFIG, r=4)
    refused(lambda: with_adapter(llama.hf, broken), broken, "lora_", "4", "3")


@pytest.mark.parametrize("value", [None, "three", 0, -3, 3.0, [3], True], ids=str)
def test_rank_is_a_whole_number(value, broken, llama):
    makers.edit_json(broken / CONFIG, r=value)
    refused(lambda: with_adapter(llama.hf, broken), broken, "r")


@pytest.mark.parametrize("value", [None, "five", [5]], ids=str)
def test_alpha_is_a_number(value, broken, llama):
    makers.edit_json(broken / CONFIG, lora_alpha=value)
    refused(lambda: with_adapter(llama.hf, broken), broken, "lora_alpha")


QUERY = FACTOR.format("self_attn.q_proj", "{}")
EXTRA = FACTOR.format("self_attn.z_proj", "A")
FAULTS = {
    "B missing": (lambda t: t.pop(QUERY.format("B")), ("lora_B", "query", "q_proj")),
    "A missing": (lambda t: t.pop(QUERY.format("A")), ("lora_A", "query", "q_proj")),
    "unexpected": (lambda t: t.update({EXTRA: torch.zeros(3, 36)}), ("z_proj",)),
    "layer too many": (
        lambda t: t.update({QUERY.replace(".1.", ".2.").format(s): t[QUERY.format(s)].clone() for s in "AB"}),
        ("layers.2",),
    ),
    "transposed": (lambda t: t.update({QUERY.format("A"): t[QUERY.format("A")].T.contiguous()}), ("q_proj.lora_A",)),
    "integers": (lambda t: t.update({QUERY.format("A"): t[QUERY.format("A")].int()}), ("q_proj.lora_A",)),
    "two spellings": (
        lambda t: t.update({QUERY.format("A").replace("lora_A", "lora_A.default"): t[QUERY.format("A")].clone()}),
        ("lora_A", "query", "q_proj"),
    ),
    "half a projector": (
        lambda t: t.pop(f"base_model.model.model.{PROJECTOR}.linear_2.bias"),
        ("linear_2.bias", "projector"),
    ),
    "wide projector": (
        lambda t: t.update({f"base_model.model.model.{PROJECTOR}.linear_2.bias": torch.zeros(37)}),
        ("linear_2.bias",),
    ),
    "DoRA's magnitudes": (
        lambda t: t.update({QUERY.format("A").replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(60)}),
        ("lora_magnitude_vector",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_tensors(fault, broken, llama):
    change, words = FAULTS[fault]
    edit(broken, change)
    message = refused(lambda: with_adapter(llama.hf, broken), broken)
    assert any(word in message for word in words), message


def test_no_weights_and_no_config(broken, llama):
    (broken / FILE).unlink()
    refused(lambda: with_adapter(llama.hf, broken), broken, "adapter_model")
    (broken / CONFIG).unlink()
    refused(lambda: with_adapter(llama.hf, broken), broken)


# What PEFT can do beside: as PEFT does it, or not at all.
OPTIONS = {
    "rslora": {"use_rslora": True},
    "some targets": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "rank_pattern": {"rank_pattern": {r".*q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r".*q_proj": 9}},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "target_modules": ".*vision_tower.*q_proj"},
    "lora_bias": {"lora_bias": True, "target_modules": ".*vision_tower.*q_proj"},
    "dora": {"use_dora": True},
    "lm_head": {"target_modules": ["lm_head"]},
    "tower": {"target_modules": ".*vision_tower.*q_proj"},
    "projector": {"target_modules": ".*multi_modal_projector.*linear_1"},
    "embedding": {"target_modules": ["embed_tokens"]},
    "convolution": {"target_modules": ["patch_embedding"]},
    "saved lm_head": {"modules_to_save": ["lm_head"]},
    "saved norm": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [4, 5]}},
    "alora": {"alora_invocation_tokens": [20]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_honoured_or_refused(option, llama, tmp_path):
    try:
        theirs = makers.peft_folder(tmp_path / "adapter", llama.model, **OPTIONS[option])
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this PEFT cannot make it: {error}")
    as_peft_or_refused(llama.hf, tmp_path / "adapter", theirs)


@pytest.mark.parametrize("option", ["rslora", "some targets"])
def test_the_common_options_are_honoured(option, llama, tmp_path):
    theirs = makers.peft_folder(tmp_path / "adapter", llama.model, **OPTIONS[option])
    assert_close(logits(with_adapter(llama.hf, tmp_path / "adapter"), ROWS), llava_logits(theirs, ROWS))
    convert(llama.hf, tmp_path / "out", to="peft", adapter=tmp_path / "adapter")
    assert_close(llava_logits(opened(llama.hf, tmp_path / "out"), ROWS), llava_logits(theirs, ROWS))


SETTINGS = {
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "layer_replication": [[0, 2], [1, 2]],
    "target_parameters": ["model.language_model.layers.0.mlp.up_proj.weight"],
    "alora_invocation_tokens": [20],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "bias": "lora_only",
    "peft_type": "ADALORA",
    "modules_to_save": ["multi_modal_projector", "lm_head"],
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_plain_lora_is_not(key, broken, llama):
    makers.edit_json(broken / CONFIG, **{key: SETTINGS[key]})
    refused(lambda: with_adapter(llama.hf, broken), broken, key)


def test_another_method_than_lora(llama, tmp_path):
    config = IA3Config(target_modules=DECODER, feedforward_modules=r".*down_proj")
    get_peft_model(copy.deepcopy(llama.model), config).save_pretrained(tmp_path / "adapter")
    refused(lambda: with_adapter(llama.hf, tmp_path / "adapter"), "IA3")
