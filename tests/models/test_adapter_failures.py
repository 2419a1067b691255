"""Adapters of another base model, broken ones, and ones that are more than plain LoRA.

What an adapter folder asks for is done as PEFT does it, or refused; it is never ignored.
"""

import contextlib
import copy
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model

import reverie_jax
from reverie_jax.convert import convert
from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import attach_adapter, read_model
from tests.models import makers
from tests.models.makers import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    DECODER,
    Parts,
    assert_refused,
    open_with_peft,
    with_adapter,
)
from tests.models.oracle import assert_close, flat, llava_logits, logits

INPUTS = makers.inputs()
QUERY = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def llama():
    return makers.bench()


@pytest.fixture(scope="module")
def written(llama, tmp_path_factory):
    """Adapters that we wrote, which record their base model: without and with a projector."""
    room = tmp_path_factory.mktemp("written")
    return [convert(llama.hf, room / str(p), to="peft", adapter=llama.adapter(p)[0]) for p in (False, True)]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A base model of the same shapes and other weights, as (llava-hf folder, language model)."""
    other, room = makers.parts(seed=50), tmp_path_factory.mktemp("stranger")
    return makers.hf_folder(room / "hf", makers.hf(other)), makers.llm_folder(room / "llm", other)


def assert_as_peft_or_refused(base, folder, theirs):
    with contextlib.suppress(CheckpointError):
        assert_close(logits(with_adapter(base, folder), INPUTS), llava_logits(theirs, INPUTS))
        return
    assert_refused(lambda: with_adapter(base, folder), folder)


# Another base model.


@pytest.mark.parametrize("projector", [False, True])
def test_other_weights_of_the_same_shape(projector, written, stranger, tmp_path):
    adapter, model = written[projector], read_model(stranger[0])
    before = flat(model)
    assert_refused(lambda: attach_adapter(model, adapter), adapter, "decoder")
    after = flat(model)  # nothing was changed
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert_refused(lambda: convert(stranger[0], tmp_path / "no", adapter=adapter), adapter)
    assert_refused(lambda: reverie_jax.load_model(stranger[0], adapter=adapter), adapter)
    assert not (tmp_path / "no").exists()


def test_other_language_model_under_a_llava_lora(llama, stranger, tmp_path):
    convert(llama.lora, tmp_path / "out", to="llava-lora", components=[llama.llm, llama.clip])
    assert_refused(lambda: read_model(tmp_path / "out", components=[stranger[1], llama.clip]), tmp_path / "out")


def test_another_projector_matters_unless_the_adapter_has_its_own(written, llama, tmp_path):
    mixed = Parts("llama", llama.part.llm, llama.part.tower, makers.parts(seed=50).projector)
    base = makers.hf_folder(tmp_path / "mixed", makers.hf(mixed))
    assert_close(logits(with_adapter(base, written[True]), INPUTS), llama.full_logits)
    assert_refused(lambda: with_adapter(base, written[False]), written[False], "projector")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_base_in_another_dtype_is_accepted(dtype, written, llama):
    with_adapter(llama.hf, written[False], dtype=dtype)


@pytest.mark.parametrize(("kind", "hidden", "name"), [("llama", 48, "lora_A"), ("phi3", 36, "_proj")])
def test_other_shapes_or_architecture(kind, hidden, name, llama, tmp_path):
    base = makers.hf_folder(tmp_path / "hf", makers.hf(makers.parts(kind, hidden=hidden)))
    assert_refused(lambda: with_adapter(base, llama.plain), llama.plain, name)


@pytest.mark.parametrize("as_adapter", [False, True])
def test_lora_of_a_plain_language_model_on_a_complete_llava(as_adapter, llama, tmp_path):
    # The reference loads it silently and answers worse: haotian-liu/LLaVA#632.
    whole = makers.original_folder(tmp_path / "whole", makers.parts(seed=50))
    if as_adapter:
        call = lambda: convert(whole, tmp_path / "no", to="llava", components=[llama.clip], adapter=llama.lora)  # noqa: E731
    else:
        call = lambda: read_model(llama.lora, components=[whole, llama.clip])  # noqa: E731
    assert_refused(call, llama.lora, "somebody/a-plain-lm", whole)


# Broken adapters.


@pytest.fixture
def broken(llama, tmp_path):
    return shutil.copytree(llama.full, tmp_path / "adapter")


CONFIG_FAULTS = [("r", value) for value in (4, None, "three", 0, 3.0, True)]
CONFIG_FAULTS += [("lora_alpha", value) for value in (None, "five", [5])]
CONFIG_FAULTS += [
    ("use_dora", True),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("target_parameters", ["model.language_model.layers.0.mlp.up_proj.weight"]),
    ("arrow_config", {"top_k": 3}),
    ("bias", "lora_only"),
    ("peft_type", "ADALORA"),
    ("modules_to_save", ["multi_modal_projector", "lm_head"]),
]


@pytest.mark.parametrize(("key", "value"), CONFIG_FAULTS, ids=str)
def test_invalid_or_unsupported_setting_is_named(key, value, broken, llama):
    makers.edit_json(broken / ADAPTER_CONFIG, **{key: value})
    assert_refused(lambda: with_adapter(llama.hf, broken), broken, key)


A, B = QUERY.format("A"), QUERY.format("B")
BIAS = "base_model.model.model.multi_modal_projector.linear_2.bias"
TENSOR_FAULTS = {
    "B missing": (lambda t: t.pop(B), ("lora_B", "query", "q_proj")),
    "A missing": (lambda t: t.pop(A), ("lora_A", "query", "q_proj")),
    "unknown": (lambda t: t.update({A.replace("q_proj", "z_proj"): torch.zeros(3, 36)}), ("z_proj",)),
    "unknown layer": (
        lambda t: t.update({name.replace(".1.", ".2."): t[name].clone() for name in (A, B)}),
        ("layers.2",),
    ),
    "transposed": (lambda t: t.update({A: t[A].T.contiguous()}), ("q_proj.lora_A",)),
    "integers": (lambda t: t.update({A: t[A].int()}), ("q_proj.lora_A",)),
    "two names": (
        lambda t: t.update({A.replace("lora_A", "lora_A.default"): t[A].clone()}),
        ("lora_A", "query", "q_proj"),
    ),
    "half a projector": (lambda t: t.pop(BIAS), ("linear_2.bias", "projector")),
    "wide projector": (lambda t: t.update({BIAS: torch.zeros(37)}), ("linear_2.bias",)),
    "DoRA": (
        lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(60)}),
        ("lora_magnitude_vector",),
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_broken_tensors_are_named(fault, broken, llama):
    change, any_of = TENSOR_FAULTS[fault]
    tensors = makers.load(broken / ADAPTER_FILE)
    change(tensors)
    makers.save(broken / ADAPTER_FILE, tensors)
    assert_refused(lambda: with_adapter(llama.hf, broken), broken, any_of=any_of)


def test_missing_files(broken, llama):
    (broken / ADAPTER_FILE).unlink()
    assert_refused(lambda: with_adapter(llama.hf, broken), broken, "adapter_model")
    (broken / ADAPTER_CONFIG).unlink()
    assert_refused(lambda: with_adapter(llama.hf, broken), broken)


# Options of PEFT.
OPTIONS = {
    "one layer": {"target_modules": r".*language_model\.layers\.0\..*_proj"},
    "rank_pattern": {"rank_pattern": {r".*q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r".*q_proj": 9}},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "bias all": {"bias": "all"},
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
def test_option_works_as_in_peft_or_is_refused(option, llama, tmp_path):
    try:
        theirs = makers.peft_folder(tmp_path / "adapter", llama.model, **OPTIONS[option])
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this PEFT does not support it: {error}")
    assert_as_peft_or_refused(llama.hf, tmp_path / "adapter", theirs)


COMMON = [{"use_rslora": True}, {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}]


@pytest.mark.parametrize("options", COMMON, ids=str)
def test_common_options_are_supported(options, llama, tmp_path):
    theirs = makers.peft_folder(tmp_path / "adapter", llama.model, **options)
    expected = llava_logits(theirs, INPUTS)
    assert_close(logits(with_adapter(llama.hf, tmp_path / "adapter"), INPUTS), expected)
    convert(llama.hf, tmp_path / "out", to="peft", adapter=tmp_path / "adapter")
    assert_close(llava_logits(open_with_peft(llama.hf, tmp_path / "out"), INPUTS), expected)


def test_another_method_than_lora(llama, tmp_path):
    config = IA3Config(target_modules=DECODER, feedforward_modules=r".*down_proj")
    get_peft_model(copy.deepcopy(llama.model), config).save_pretrained(tmp_path / "adapter")
    assert_refused(lambda: with_adapter(llama.hf, tmp_path / "adapter"), "IA3")
