"""Adapters on disk, read and written: held against PEFT on transformers' LLaVA and on the plain language models.

What an adapter folder asks for is done exactly or refused, never passed over.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import reverie_jax
from reverie_jax.convert import convert
from reverie_jax.models import lora
from reverie_jax.models.checkpoints import read_model
from tests.models import makers
from tests.models.makers import KINDS, LEAVES, WORDS, Bench, assert_close, opened, refused, with_adapter
from tests.models.oracle import llava_logits, logits

FILE, CONFIG, PROJECTOR = "adapter_model.safetensors", "adapter_config.json", "multi_modal_projector"
FACTOR = "base_model.model.model.language_model.layers.1.{}.lora_{}.weight"
ROWS = makers.batch()


@pytest.fixture(scope="module", params=KINDS)
def bench(request, tmp_path_factory):
    return Bench(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Bench("llama", tmp_path_factory.mktemp("llama-alone"))


# Reading.


def test_adapters_matter(bench):
    # What the tests below take for granted.
    assert np.abs(bench.plain_logits - bench.base_logits).max() > 0.1
    assert np.abs(bench.full_logits - bench.plain_logits).max() > 0.1
    assert np.abs(bench.lora_logits - bench.base_logits[..., :WORDS]).max() > 0.1


@pytest.mark.parametrize("projector", [False, True])
def test_peft_adapter_gives_pefts_logits(projector, bench):
    folder, expected = bench.adapter(projector)
    model = with_adapter(bench.hf, folder)
    assert_close(logits(model, ROWS), expected)
    carriers = {path for path, layer in lora.linears(model) if layer.lora_a is not None}
    assert len(carriers) == len(LEAVES[bench.kind])  # Phi-3's fused matrices carry one adapter each
    assert all(path.startswith("decoder.layers.") for path in carriers)


@pytest.mark.parametrize("spelling", ["transformers before 4.52", "in memory"])
def test_other_spellings(spelling, llama, tmp_path):
    shutil.copytree(llama.full, tmp_path / "adapter")
    old = {
        "transformers before 4.52": [("model.model.language_model.", "model.language_model.model."),
                                     ("model.model.multi_modal", "model.multi_modal")],
        "in memory": [("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default.")],
    }[spelling]  # fmt: skip
    tensors = {}
    for name, tensor in load_file(llama.full / FILE).items():
        for before, after in old:
            name = name.replace(before, after)
        tensors[name] = tensor
    save_file(tensors, tmp_path / "adapter" / FILE)
    assert_close(logits(with_adapter(llama.hf, tmp_path / "adapter"), ROWS), llama.full_logits)


def test_adapter_in_a_bin(llama, tmp_path):
    shutil.copytree(llama.full, tmp_path / "adapter")
    torch.save(load_file(llama.full / FILE), tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / FILE).unlink()
    assert_close(logits(with_adapter(llama.hf, tmp_path / "adapter"), ROWS), llama.full_logits)


def test_llava_lora_gives_the_merged_models_logits(bench):
    model = read_model(bench.lora, components=[bench.llm, bench.clip])
    assert_close(logits(model, ROWS), bench.lora_logits)
    assert any(layer.lora_a is not None for _, layer in lora.linears(model))


@pytest.mark.parametrize("projector", [False, True])
def test_merged_equals_unmerged(projector, bench):
    model = with_adapter(bench.hf, bench.adapter(projector)[0])
    apart = logits(model, ROWS)
    lora.merge(model)
    assert all(layer.lora_a is None for _, layer in lora.linears(model))
    assert_close(logits(model, ROWS), apart, atol=1e-5)


def test_switched_off_is_the_base_exactly(bench):
    base, model = read_model(bench.hf), with_adapter(bench.hf, bench.plain)
    on = logits(model, ROWS)
    lora.set_adapters_enabled(model, False)
    np.testing.assert_array_equal(logits(model, ROWS), logits(base, ROWS))
    lora.set_adapters_enabled(model, True)
    np.testing.assert_array_equal(logits(model, ROWS), on)


def test_load_model_takes_an_adapter(bench):
    model, processor = reverie_jax.load_model(bench.hf, adapter=bench.full)
    assert_close(logits(model, ROWS), bench.full_logits)
    assert reverie_jax.generate(model, processor, [reverie_jax.ask(None, "baba?")], max_new_tokens=2)


def test_load_model_takes_a_lora_folder_and_its_parts(bench):
    model, _ = reverie_jax.load_model(bench.lora, components=[bench.llm, bench.clip])
    assert_close(logits(model, ROWS), bench.lora_logits)


# Writing for PEFT on transformers' LLaVA.


@pytest.mark.parametrize("projector", [False, True])
def test_peft_opens_what_was_written(projector, bench, tmp_path):
    folder, expected = bench.adapter(projector)
    convert(bench.hf, tmp_path / "out", to="peft", adapter=folder)
    theirs = opened(bench.hf, tmp_path / "out")
    assert_close(llava_logits(theirs, ROWS), expected)
    adapted = sorted(name.removesuffix(".lora_A") for name, _ in theirs.named_modules() if name.endswith(".lora_A"))
    leaves = sorted(f"layers.{n}.{leaf}" for n in range(2) for leaf in LEAVES[bench.kind])
    assert [name.split("language_model.")[-1] for name in adapted] == leaves
    assert bool(theirs.peft_config["default"].modules_to_save) == projector


@pytest.mark.parametrize("projector", [False, True])
def test_peft_tensors_come_back_bit_by_bit(projector, bench, tmp_path):
    folder, _ = bench.adapter(projector)
    convert(bench.hf, tmp_path / "out", to="peft", adapter=folder)
    before, after = load_file(folder / FILE), load_file(tmp_path / "out" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_written_adapter_loads_again(bench, tmp_path):
    convert(bench.hf, tmp_path / "out", to="peft", adapter=bench.full)
    assert_close(logits(with_adapter(bench.hf, tmp_path / "out"), ROWS), bench.full_logits)
    model, _ = reverie_jax.load_model(bench.hf, adapter=tmp_path / "out")
    assert_close(logits(model, ROWS), bench.full_logits)


def test_llava_lora_becomes_a_peft_adapter(bench, tmp_path):
    convert(bench.lora, tmp_path / "out", to="peft", components=[bench.llm, bench.clip])
    theirs = opened(bench.hf, tmp_path / "out")
    assert_close(llava_logits(theirs, ROWS)[..., :WORDS], bench.lora_logits)


@pytest.mark.parametrize("to", ["peft", "llava-lora"])
def test_without_an_adapter_there_is_nothing_to_write(to, llama, tmp_path):
    refused(lambda: convert(llama.hf, tmp_path / "out", to=to), "adapter")
    assert not list(tmp_path.iterdir())


# Writing for original LLaVA.


def test_llava_lora_opens_on_the_plain_language_model(bench, tmp_path):
    convert(bench.hf, tmp_path / "out", to="llava-lora", adapter=bench.full)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bench.part.llm), tmp_path / "out").eval()
    expected = makers.words_logits(bench.full_model)[..., :WORDS]
    assert np.abs(expected - makers.words_logits(bench.part.llm)).max() > 0.1
    assert_close(makers.words_logits(theirs), expected)


def test_llava_lora_has_the_names_and_files_of_the_original(bench, tmp_path):
    convert(bench.hf, tmp_path / "out", to="llava-lora", adapter=bench.full)
    names = {
        f"base_model.model.model.layers.{n}.{leaf}.lora_{side}.weight"
        for n in range(2)
        for leaf in LEAVES[bench.kind]
        for side in "AB"
    }
    assert load_file(tmp_path / "out" / FILE).keys() == names
    rest = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    expected = load_file(bench.full / FILE)
    assert len(rest) == 4
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        for name in ("weight", "bias"):
            found = rest[f"base_model.model.model.mm_projector.{ours}.{name}"]
            assert torch.equal(found, expected[f"base_model.model.model.{PROJECTOR}.{theirs}.{name}"])
    settings = makers.original_config(bench.part)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("mm_projector_type", "mm_hidden_size", "mm_vision_select_layer", "hidden_size", "architectures"):
        assert raw[key] == settings[key], key
    tuned = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (tuned["r"], tuned["lora_alpha"], tuned["peft_type"]) == (3, 5, "LORA")
    assert sorted(tuned["target_modules"]) == sorted(leaf.split(".")[1] for leaf in LEAVES[bench.kind])


def test_llava_lora_loads_again(bench, tmp_path):
    convert(bench.hf, tmp_path / "out", to="llava-lora", adapter=bench.full)
    model = read_model(tmp_path / "out", components=[bench.llm, bench.clip])
    assert_close(logits(model, ROWS), bench.full_logits[..., :WORDS])


def test_llava_lora_comes_back_bit_by_bit(bench, tmp_path):
    convert(bench.lora, tmp_path / "out", to="llava-lora", components=[bench.llm, bench.clip])
    before, after = load_file(bench.lora / FILE), load_file(tmp_path / "out" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (torch.load(f / "non_lora_trainables.bin") for f in (bench.lora, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["image_aspect_ratio"] == "pad"
    assert_close(
        logits(read_model(tmp_path / "out", components=[bench.llm, bench.clip]), ROWS),
        bench.lora_logits,
    )


# Merging on the way out.


@pytest.mark.parametrize("to", ["llava-hf", "orbax"])
def test_whole_models_are_written_merged(to, bench, tmp_path):
    convert(bench.hf, tmp_path / "out", to=to, adapter=bench.full)
    model = read_model(tmp_path / "out")
    assert all(layer.lora_a is None for _, layer in lora.linears(model))
    assert_close(logits(model, ROWS), bench.full_logits)
    if to == "llava-hf":
        assert_close(
            llava_logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "out"), ROWS), bench.full_logits
        )


def test_merged_lora_folder_has_the_original_names(bench, tmp_path):
    convert(bench.lora, tmp_path / "out", to="llava", components=[bench.llm, bench.clip])
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in makers.original_tensors(bench.lora_parts, tower=False).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_half_precision_is_merged_in_float32_and_cast_once(llama, tmp_path):
    half = makers.hf(llama.part).half()
    base = makers.hf_folder(tmp_path / "half", half)
    convert(base, tmp_path / "out", adapter=llama.plain)
    found = load_file(tmp_path / "out" / "model.safetensors")["language_model.model.layers.1.self_attn.q_proj.weight"]
    factors = load_file(llama.plain / FILE)
    a, b = (factors[FACTOR.format("self_attn.q_proj", side)].double() for side in "AB")
    kernel = half.model.language_model.layers[1].self_attn.q_proj.weight.double()
    exact = kernel + 5 / 3 * (b @ a)
    assert found.dtype == torch.float16
    assert (found.double() - exact).abs().max() <= 2.0**-11 * exact.abs().max() * 1.01
    assert torch.equal(found, exact.half()) or (found != exact.half()).float().mean() < 0.01
