"""Adapters of both kinds, held against PEFT itself: original LLaVA's LoRA folders, and PEFT on transformers' LLaVA."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from reverie_jax.models.checkpoints import attach_adapter, read_model
from reverie_jax.models.lora import merge, set_adapters_enabled
from reverie_jax.models.sharding import make_mesh
from tests.models import variants
from tests.models.tiny import (
    LINEAR,
    LLAMA,
    PHI,
    Kind,
    assert_close,
    assert_on,
    assert_same,
    decoded,
    logits,
    parts,
    prompts,
)


def said(value):
    """A parameter in a test's name."""
    return value.name if isinstance(value, Kind) else str(value)


LORA = [
    (LLAMA, {}, ("bin shards", "full"), 0),
    (LLAMA, {"old": True}, ("safetensors", "vision saved"), 2),
    (LINEAR, {"old": True}, ("bin", "full bin"), 0),
    (LINEAR, {"dtype": torch.bfloat16}, ("saved", "vision bin"), 3),
    (PHI, {}, ("safetensors shards", "vision saved"), 0),
    (PHI, {"old": True, "dtype": torch.float16}, ("saved", "full bin"), 2),
]


@pytest.mark.parametrize(("kind", "how", "base", "seed"), LORA, ids=said)
def test_lora_folder(kind, how, base, seed, tmp_path):
    plain, rows = parts(kind, seed), prompts(kind, seed)
    tuned = variants.with_lora(plain, seed=seed)
    path = variants.lora_folder(tmp_path / "x", tuned, **how)
    model = read_model(path, components=variants.lora_base(tmp_path, plain, *base), dtype=jnp.float32)
    theirs = tuned.logits(rows)
    assert np.abs(theirs - plain.logits(rows)).max() > 1  # the adapters do something
    apart = logits(model, rows)
    assert_close(apart, theirs)
    merge(model)
    together = logits(model, rows)
    assert_close(together, variants.merged(tuned).logits(rows))
    assert_close(together, apart, atol=1e-5 * np.abs(apart).max())


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(LLAMA, ["q_proj", "v_proj"]), (LLAMA, ["down_proj"]), (PHI, ["qkv_proj"]), (PHI, ["gate_up_proj", "o_proj"])],
    ids=said,
)
def test_lora_folder_of_some_targets(kind, targets, tmp_path):
    tuned, rows = variants.with_lora(parts(kind), targets), prompts(kind, 0)
    path = variants.lora_folder(tmp_path / "x", tuned)
    model = read_model(path, components=variants.lora_base(tmp_path, parts(kind)), dtype=jnp.float32)
    merge(model)
    assert_close(logits(model, rows), tuned.logits(rows))


def test_lora_scale_by_the_root_of_the_rank(tmp_path):
    tuned, rows = variants.with_lora(parts(LLAMA), use_rslora=True), prompts(LLAMA, 0)
    path = variants.lora_folder(tmp_path / "x", tuned)
    model = read_model(path, components=variants.lora_base(tmp_path, parts(LLAMA)), dtype=jnp.float32)
    merge(model)
    assert_close(logits(model, rows), tuned.logits(rows))


def test_lora_folder_as_an_adapter(tmp_path):
    """On a model of stage one. The projector that was tuned with the adapters takes the other's place."""
    plain, rows = parts(LLAMA), prompts(LLAMA, 0)
    tuned, before = variants.with_lora(plain), dataclasses.replace(plain, projector=parts(LLAMA, 2).projector)
    path = variants.projector_file(tmp_path / "x", before)
    model = read_model(path, components=variants.lora_base(tmp_path, plain), dtype=jnp.float32)
    assert_close(logits(model, rows), before.logits(rows))
    attach_adapter(model, variants.lora_folder(tmp_path / "y", tuned))
    assert_close(logits(model, rows), tuned.logits(rows))


def test_greedy_tokens_of_a_lora_folder(tmp_path):
    tuned, rows = variants.with_lora(parts(PHI)), prompts(PHI, 0)
    path = variants.lora_folder(tmp_path / "x", tuned)
    model = read_model(path, components=variants.lora_base(tmp_path, parts(PHI)), dtype=jnp.float32)
    np.testing.assert_array_equal(decoded(model, rows), tuned.greedy(rows))


def test_adapters_stay_float32_and_apart(tmp_path):
    path = variants.lora_folder(tmp_path / "x", variants.with_lora(parts(PHI)))
    model = read_model(path, components=variants.lora_base(tmp_path, parts(PHI)))
    fused = parts(PHI).llm.model.layers[0].mlp.gate_up_proj.weight.detach().numpy()
    layer = model.decoder.layers.gate_up
    assert model.compute_dtype == jnp.float16
    np.testing.assert_array_equal(layer.kernel[...][0].astype(np.float32), fused.T)  # the base is as it was
    assert layer.lora_a.shape == (2, 192, variants.RANK)
    assert layer.lora_b.shape == (2, variants.RANK, 88)
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32


def hf_model(at, kind):
    return read_model(variants.hf_folder(at, parts(kind), "safetensors"), dtype=jnp.float32)


PEFT = [
    (LLAMA, False, {}),
    (LLAMA, True, {}),
    (LLAMA, True, {"old_names": True}),
    (LLAMA, False, {"old_names": True, "old_file": True}),
    (PHI, False, {}),
    (PHI, True, {"old_file": True}),
    (PHI, False, {"old_names": True}),
]


@pytest.mark.parametrize(("kind", "projector", "how"), PEFT, ids=said)
def test_peft_adapter(kind, projector, how, tmp_path):
    tuned, rows = variants.peft_llava(parts(kind), projector=projector), prompts(kind, 0)
    folder = variants.peft_folder(tmp_path / "y", tuned, **how)
    model = hf_model(tmp_path / "x", kind)
    attach_adapter(model, folder)
    theirs, plain = tuned.logits(rows), parts(kind).logits(rows)
    assert np.abs(theirs - plain).max() > 1  # the adapters do something
    apart = logits(model, rows)
    assert_close(apart, theirs)
    merge(model)
    together = logits(model, rows)
    assert_close(together, variants.Tuned(tuned.model.merge_and_unload()).logits(rows))
    assert_close(together, apart, atol=1e-5 * np.abs(apart).max())


def test_peft_adapter_of_some_targets(tmp_path):
    tuned, rows = variants.peft_llava(parts(LLAMA), leaves=["q_proj", "v_proj"]), prompts(LLAMA, 0)
    model = hf_model(tmp_path / "x", LLAMA)
    attach_adapter(model, variants.peft_folder(tmp_path / "y", tuned))
    merge(model)
    assert_close(logits(model, rows), tuned.logits(rows))


def test_a_switched_off_adapter_leaves_the_base(tmp_path):
    model, rows = hf_model(tmp_path / "x", PHI), prompts(PHI, 0)
    before = logits(model, rows)
    attach_adapter(model, variants.peft_folder(tmp_path / "y", variants.peft_llava(parts(PHI))))
    set_adapters_enabled(model, False)
    np.testing.assert_array_equal(logits(model, rows), before)


def test_a_mesh_gets_the_same_adapters(tmp_path):
    path = variants.lora_folder(tmp_path / "x", variants.with_lora(parts(PHI)))
    base, mesh = variants.lora_base(tmp_path, parts(PHI)), make_mesh(data=2, fsdp=1, tensor=2)
    model = read_model(path, components=base, mesh=mesh)
    assert_on(mesh, model)
    assert_same(model, read_model(path, components=base))
