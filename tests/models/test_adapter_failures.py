"""Adapters of another base model, broken ones, and ones that are more than plain LoRA.

What an adapter folder asks for is done as PEFT does it, or refused; it is never ignored.
"""

import copy
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model

import reverie_jax
from reverie_jax.convert import convert
from reverie_jax.errors import CheckpointError
from reverie_jax.models import lora
from reverie_jax.models.checkpoints import attach_adapter, read_model
from tests.models import makers, sisters_files, sisters_oracle
from tests.models.makers import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    DECODER,
    NON_LORA,
    Parts,
    assert_refused,
    assert_same_tensors,
    open_with_peft,
    with_adapter,
)
from tests.models.oracle import assert_close, flat, llava_logits, logits

INPUTS = makers.inputs()


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


# Another base model.


def test_other_weights_of_the_same_shape(written, stranger, tmp_path):
    model = read_model(stranger[0])
    before = flat(model)
    for adapter in written:
        assert_refused(lambda: attach_adapter(model, adapter), adapter, "decoder")  # noqa: B023
    after = flat(model)  # nothing was changed
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert_refused(lambda: convert(stranger[0], tmp_path / "no", adapter=written[0]), written[0])
    assert_refused(lambda: reverie_jax.load_model(stranger[0], adapter=written[1]), written[1])
    assert not (tmp_path / "no").exists()


def test_other_language_model_under_a_llava_lora(llama, stranger, tmp_path):
    convert(llama.lora, tmp_path / "out", to="llava-lora", components=[llama.llm, llama.clip])
    assert_refused(lambda: read_model(tmp_path / "out", components=[stranger[1], llama.clip]), tmp_path / "out")


def test_another_projector_matters_unless_the_adapter_has_its_own(written, llama, tmp_path):
    mixed = Parts("llama", llama.part.llm, llama.part.tower, makers.parts(seed=50).projector)
    base = makers.hf_folder(tmp_path / "mixed", makers.hf(mixed))
    assert_close(logits(with_adapter(base, written[True]), INPUTS), llama.full_logits)
    assert_refused(lambda: with_adapter(base, written[False]), written[False], "projector")
    with_adapter(llama.hf, written[False], dtype="bfloat16")  # the same base model in another dtype


@pytest.mark.parametrize(("kind", "hidden", "name"), [("llama", 48, "lora_"), ("phi3", 36, "_proj")])
def test_other_shapes_or_architecture(kind, hidden, name, llama, tmp_path):
    base = makers.hf_folder(tmp_path / "hf", makers.hf(makers.parts(kind, hidden=hidden)))
    assert_refused(lambda: with_adapter(base, llama.plain), llama.plain, name)


def test_lora_of_a_plain_language_model_on_a_complete_llava(llama, tmp_path):
    # The reference loads it silently and answers worse: haotian-liu/LLaVA#632.
    whole = makers.original_folder(tmp_path / "whole", makers.parts(seed=50))
    for call in (
        lambda: convert(whole, tmp_path / "no", to="llava", components=[llama.clip], adapter=llama.lora),
        lambda: read_model(llama.lora, components=[whole, llama.clip]),
    ):
        assert_refused(call, llama.lora, "somebody/a-plain-lm", whole)


@pytest.mark.parametrize(
    ("settings", "name"), [({"model_type": "llava_mpt"}, "mpt"), ({"mm_vision_tower": "a/siglip"}, "siglip")]
)
def test_lora_of_another_family(settings, name, llama, tmp_path):
    folder = shutil.copytree(llama.lora, tmp_path / "lora")
    makers.edit_json(folder / "config.json", **settings)
    assert_refused(lambda: read_model(folder, components=[llama.llm, llama.clip]), folder, name)


def test_recorded_base_gives_the_tokenizer_too(llama, tmp_path):
    """Where only the tower is added."""
    folder = shutil.copytree(llama.lora, tmp_path / "lora")
    makers.edit_json(folder / ADAPTER_CONFIG, base_model_name_or_path=str(llama.llm))
    model, _ = reverie_jax.load_model(folder, components=llama.clip)
    assert_close(logits(model, INPUTS), llama.lora_logits)


def test_lora_whose_projector_was_left_behind(llama, tmp_path, caplog):
    """As in original LLaVA's checkpoint-N: no base model has the projector that was tuned with it."""
    folder = shutil.copytree(llama.lora, tmp_path / "checkpoint-500")
    (folder / NON_LORA).unlink()
    (folder / "config.json").unlink()
    for base in (llama.hf, makers.original_folder(tmp_path / "whole", llama.part)):
        refused = lambda: with_adapter(base, folder, components=() if base == llama.hf else [llama.clip])  # noqa: B023, E731
        assert_refused(refused, folder, NON_LORA)
    for name in ("liuhaotian/llava-v1.5-7b", "/cache/models--liuhaotian--llava-v1.5-7b/snapshots/4481"):
        makers.edit_json(folder / ADAPTER_CONFIG, base_model_name_or_path=name)
        caplog.clear()
        with_adapter(llama.hf, folder)
        assert NON_LORA in caplog.text


# Broken adapters: (key of adapter_config.json, value), or (change of the tensors, names of which the message has one).

SETTINGS = [
    *(("r", value) for value in (4, None, "three", 0, 3.0, True)),
    *(("lora_alpha", value) for value in (None, "five", [5])),
    ("use_dora", True),  # without magnitudes
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("target_parameters", ["model.language_model.layers.0.mlp.up_proj.weight"]),
    ("arrow_config", {"top_k": 3}),
    ("kasa_config", {"beta": 0.1}),
    ("velora_config", {"num_groups": 2}),
    ("monteclora_config", {"num_samples": 2}),
    ("trainable_token_indices", [5]),
    *(("init_lora_weights", value) for value in ("loftq", "corda", "lora_ga", "pissa_niter_4")),
    # Not the modules that are stored, or no names of any.
    ("target_modules", r".*language_model\.layers\.0\..*_proj"),
    *(("target_modules", value) for value in (["q_proj"], [*"qkvo", "lm_head"], 7, [7], "(q_proj")),
    *(("exclude_modules", value) for value in (["q_proj"], r".*layers\.1\..*", {"q_proj": 1})),
    *(("layers_to_transform", value) for value in ([0], 0, "0", [True])),
    ("layers_pattern", ["(layers"]),
    ("bias", "lora_only"),
    ("peft_type", "ADALORA"),
    ("modules_to_save", ["multi_modal_projector", "lm_head"]),
    *(("modules_to_save", value) for value in (["1"], ["linear"], "multi_modal_projector", ["mm_projector"])),
    ("rank_pattern", {"q_proj": 2}),  # not the rank of what is stored
    ("rank_pattern", {"(q_proj": 3}),
    ("rank_pattern", {"v_proj": "3"}),
    ("alpha_pattern", [7]),
]
A, B = (f"base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{side}.weight" for side in "AB")
BIAS = "base_model.model.model.multi_modal_projector.linear_2.bias"
TENSORS = {
    "B missing": (lambda t: t.pop(B), ("lora_B", "query", "q_proj")),
    "A missing": (lambda t: t.pop(A), ("lora_A", "query", "q_proj")),
    "layer missing": (lambda t: [t.pop(A), t.pop(B)], ("layers.1.self_attn.q_proj",)),
    "module missing": (lambda t: [t.pop(name) for name in list(t) if "up_proj" in name], ("layers.0.mlp.up_proj",)),
    "unknown": (lambda t: t.update({A.replace("q_proj", "z_proj"): torch.zeros(3, 36)}), ("z_proj",)),
    "unknown layer": (lambda t: t.update({x.replace(".1.", ".2."): t[x].clone() for x in (A, B)}), ("layers.2",)),
    "transposed": (lambda t: t.update({A: t[A].T.contiguous()}), ("q_proj.lora_A",)),
    "integers": (lambda t: t.update({A: t[A].int()}), ("q_proj.lora_A",)),
    "two names": (lambda t: t.update({A.replace("_A", "_A.default"): t[A].clone()}), ("lora_A", "query", "q_proj")),
    "projector left out": (
        lambda t: [t.pop(name) for name in list(t) if "projector" in name],
        ("linear_1", "projector"),
    ),
    "half a projector": (lambda t: t.pop(BIAS), ("linear_2.bias", "projector")),
    "wide projector": (lambda t: t.update({BIAS: torch.zeros(37)}), ("linear_2.bias",)),
    "DoRA": (lambda t: t.update({A.replace("A.weight", "magnitude_vector"): torch.ones(60)}), ("magnitude_vector",)),
}


@pytest.fixture
def broken(llama, tmp_path):
    return shutil.copytree(llama.full, tmp_path / "adapter")


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=str)
def test_invalid_or_unsupported_setting_is_named(key, value, broken, llama):
    makers.edit_json(broken / ADAPTER_CONFIG, **{key: value})
    assert_refused(lambda: with_adapter(llama.hf, broken), broken, key)


@pytest.mark.parametrize("fault", TENSORS)
def test_broken_tensors_are_named(fault, broken, llama):
    change, any_of = TENSORS[fault]
    tensors = makers.load(broken / ADAPTER_FILE)
    change(tensors)
    makers.save(broken / ADAPTER_FILE, tensors)
    assert_refused(lambda: with_adapter(llama.hf, broken), broken, any_of=any_of)


def test_missing_files(broken, llama):
    (broken / ADAPTER_FILE).unlink()
    assert_refused(lambda: with_adapter(llama.hf, broken), broken, "adapter_model")
    (broken / ADAPTER_CONFIG).unlink()
    assert_refused(lambda: with_adapter(llama.hf, broken), broken)


# Files of a whole PeftModel, of LRV-Instruction's second version: (change of the tensors, a name that the message has).

LAYER_1 = "base_model.model.language_model.model.layers.1."
UP, BLOCK = f"{LAYER_1}mlp.up_proj.weight", "base_model.model.vision_model.encoder.layers.1.mlp.fc1.bias"
LORA_A, LORA_B = (f"{LAYER_1}self_attn.v_proj.lora_{side}.default.weight" for side in "AB")
PEFT_MODEL = {
    "another base": (lambda t: t.update({UP: t[UP].nextafter(torch.tensor(9.0).half())}), UP),
    "another tower": (lambda t: t.update({BLOCK: t[BLOCK] + 1}), BLOCK),
    "another width": (lambda t: t.update({UP: t[UP].T}), UP),
    "more of the base": (lambda t: t.update({UP.replace("s.1", "s.7"): t[UP]}), "layers.7.mlp.up_proj"),
    "integers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), UP),
    "NaN": (lambda t: t.update({UP: t[UP] * float("nan")}), UP),
    "saved module": (lambda t: t.update({UP.replace("up_proj", "up_proj.modules_to_save.default"): t[UP]}), "to_save"),
    "no adapters": (lambda t: [t.pop(name) for name in list(t) if "lora_" in name], "LoRA"),
    "B missing": (lambda t: t.pop(LORA_B), "lora_B"),
    "a layer's adapter missing": (lambda t: [t.pop(LORA_A), t.pop(LORA_B)], "layers.1.self_attn.v_proj"),
    "another rank": (lambda t: t.update({LORA_A: t[LORA_A][:4], LORA_B: t[LORA_B][:, :4]}), LORA_A),
    "another module": (
        lambda t: t.update({name.replace("v_proj", "k_proj"): t[name].clone() for name in (LORA_A, LORA_B)}),
        "layers.1.self_attn.k_proj",
    ),
}


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    """mPLUG-Owl, and the tensors of a file of adapters on it."""
    model, room = sisters_oracle.system("mplug-owl", 0), tmp_path_factory.mktemp("owl")
    folder = sisters_files.mplug_folder(room / "owl", model, dtype=torch.float16)
    sisters_files.lrv_v2_file(room / "model.bin", model)
    return read_model(folder), makers.load(room / "model.bin")


@pytest.mark.parametrize("fault", PEFT_MODEL)
def test_broken_file_of_a_peft_model_is_refused(fault, owl, tmp_path):
    (change, name), (model, tensors) = PEFT_MODEL[fault], (owl[0], dict(owl[1]))
    change(tensors)
    makers.save(tmp_path / "model.bin", tensors)
    assert_refused(lambda: attach_adapter(model, tmp_path / "model.bin"), tmp_path / "model.bin", name)
    assert next(lora.adapters(model), None) is None


def test_file_of_a_peft_model_on_another_base(llama, stranger, tmp_path):
    file, tuned = tmp_path / "model.bin", makers.adapted(llama.model)
    makers.save(file, dict(tuned.state_dict()))
    # The scale is in no tensor, and known for LRV-Instruction's alone.
    assert_refused(lambda: with_adapter(llama.hf, file), file, ADAPTER_CONFIG, "alpha")
    tuned.peft_config["default"].save_pretrained(tmp_path)
    assert_refused(lambda: with_adapter(stranger[0], file), file, next(iter(tuned.state_dict())))
    model = read_model(llama.hf)
    lora.quantize(model, "int8")
    assert_refused(lambda: attach_adapter(model, file), file, "quantized")
    file.write_bytes(b"")
    assert_refused(lambda: with_adapter(llama.hf, file), file)


# Options of PEFT, and how they are supported: "exact" is written again bit for bit, "equal" with rounded tensors. Those that
# are not may be refused, but never ignored.
LAYER = {"target_modules": ["up_proj", "down_proj"]}  # the tower has modules of other names
OPTIONS = {
    "rslora": ({"use_rslora": True}, "exact"),
    "some modules": ({"target_modules": r".*language_model.*\.(q_proj|down_proj)"}, "exact"),
    "one layer": ({"target_modules": r".*language_model\.layers\.0\..*_proj"}, "exact"),
    "layers that differ": (
        {"target_modules": r".*language_model\.layers\.(0\..*(q_proj|up_proj)|1\..*(v_proj|up_proj))"},
        "exact",
    ),
    "rank_pattern": ({"rank_pattern": {r".*q_proj": 2}}, "exact"),
    "alpha_pattern": ({"alpha_pattern": {r"q_proj": 9, r"[kvo]_proj": 7}}, "exact"),
    "patterns whose order counts": ({"alpha_pattern": {r"q_proj": 9, r".*_proj": 7}}, None),  # PEFT does not keep it
    "both patterns": ({"rank_pattern": {"down_proj": 4, "x": 9}, "alpha_pattern": {"mlp.down_proj": 2}}, "exact"),
    "patterns with rslora": (
        {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"o_proj": 1}},
        "exact",
    ),
    "patterns that match nothing": ({"rank_pattern": {"fc1": 2}, "alpha_pattern": {"c_attn": 9}}, "exact"),
    "patterns that match all": ({"rank_pattern": {".*": 2}, "alpha_pattern": {"[a-z_]+": 9}}, "exact"),
    "rank by layer": ({"rank_pattern": {r"layers\.0\..*q_proj": 5, r"layers\.1\..*up_proj": 1}}, "equal"),
    "alpha by layer": ({"alpha_pattern": {r"layers\.0\..*q_proj": 9, r"layers\.1\..*up_proj": 0}}, "equal"),
    "rank and alpha by layer": (  # as EVA distributes them
        {"rank_pattern": {r"layers\.0\..*q_proj": 6}, "alpha_pattern": {r"layers\.0\..*q_proj": 10}},
        "exact",
    ),
    "saved linear_1": ({"modules_to_save": ["linear_1"]}, "equal"),  # written with the whole projector
    "saved linear_2 by its path": ({"modules_to_save": ["multi_modal_projector.linear_2"]}, "equal"),
    "saved linear_1 and linear_2": ({"modules_to_save": ["linear_2", "linear_1"]}, "equal"),
    "saved projector by its path": ({"modules_to_save": ["model.multi_modal_projector"]}, "exact"),
    "layers_to_transform": (LAYER | {"layers_to_transform": 1}, "exact"),
    "layers_to_transform, layers_pattern": (LAYER | {"layers_to_transform": [1], "layers_pattern": "layers"}, "exact"),
    "layers_pattern of others": (
        LAYER | {"layers_to_transform": [0, 9], "layers_pattern": ["blocks", "language_model.layers"]},
        "exact",
    ),
    "no layers_to_transform": (LAYER | {"layers_to_transform": []}, "exact"),
    "layers_to_transform in the tower too": ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, None),
    "exclude_modules": (
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*vision_tower.*|.*layers\.0.*up_proj"},
        "exact",
    ),
    "dora": ({"use_dora": True}, "exact"),
    "dora with options": (
        {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "modules_to_save": ["multi_modal_projector"],
        },
        "exact",
    ),
    "dora in one layer": (LAYER | {"use_dora": True, "layers_to_transform": [1]}, "exact"),
    "dora in the tower": ({"use_dora": True, "target_modules": ".*vision_tower.*(q_proj|fc1)"}, None),
    "gaussian": ({"init_lora_weights": "gaussian"}, "exact"),
    "orthogonal": ({"init_lora_weights": "orthogonal", "r": 4}, "exact"),
    "mica": ({"init_lora_weights": "mica"}, "exact"),
    "bias all": ({"bias": "all"}, None),
    "lora_bias": ({"lora_bias": True, "target_modules": ".*vision_tower.*q_proj"}, None),
    "lm_head": ({"target_modules": ["lm_head"]}, None),
    "tower": ({"target_modules": ".*vision_tower.*q_proj"}, None),
    "projector": ({"target_modules": ".*multi_modal_projector.*linear_1"}, None),
    "dora on the projector": ({"use_dora": True, "target_modules": ".*multi_modal_projector.*linear_1"}, None),
    "embedding": ({"target_modules": ["embed_tokens"]}, None),
    "convolution": ({"target_modules": ["patch_embedding"]}, None),
    "saved lm_head": ({"modules_to_save": ["lm_head"]}, None),
    "saved norm": ({"modules_to_save": ["input_layernorm"]}, None),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [4, 5]}}, None),
    "alora": ({"alora_invocation_tokens": [20]}, None),
    "pissa": ({"init_lora_weights": "pissa"}, None),
    "olora": ({"init_lora_weights": "olora"}, None),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("option", OPTIONS)
def test_option_works_as_in_peft_or_is_refused(option, llama, tmp_path):
    (options, supported), folder = OPTIONS[option], tmp_path / "adapter"
    try:
        theirs = makers.peft_folder(folder, llama.model, **options)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this PEFT does not support it: {error}")
    expected = llava_logits(theirs, INPUTS)
    try:
        model = with_adapter(llama.hf, folder)
    except CheckpointError:
        assert supported is None
        assert_refused(lambda: with_adapter(llama.hf, folder), folder)
        return
    assert_close(logits(model, INPUTS), expected)
    if supported:
        convert(llama.hf, tmp_path / "out", to="peft", adapter=folder)
        assert_close(llava_logits(open_with_peft(llama.hf, tmp_path / "out"), INPUTS), expected)
        if supported == "exact":
            assert_same_tensors(folder / ADAPTER_FILE, tmp_path / "out" / ADAPTER_FILE)


def test_dora_on_a_quantized_base(llama, tmp_path):
    makers.peft_folder(tmp_path / "dora", llama.model, use_dora=True)
    model = read_model(llama.hf)
    lora.quantize(model, "int8")
    assert_refused(lambda: attach_adapter(model, tmp_path / "dora"), tmp_path / "dora", "use_dora", "decoder.layers")
    assert next(lora.adapters(model), None) is None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 9}}], ids=str)
def test_what_original_llavas_peft_ignores_is_not_written_for_it(options, llama, tmp_path):
    makers.peft_folder(tmp_path / "adapter", llama.model, **options)
    write = lambda: convert(llama.hf, tmp_path / "out", to="llava-lora", adapter=tmp_path / "adapter")  # noqa: E731
    assert_refused(write, *options)


def test_another_method_than_lora(llama, tmp_path):
    config = IA3Config(target_modules=DECODER, feedforward_modules=r".*down_proj")
    get_peft_model(copy.deepcopy(llama.model), config).save_pretrained(tmp_path / "adapter")
    assert_refused(lambda: with_adapter(llama.hf, tmp_path / "adapter"), "IA3")
