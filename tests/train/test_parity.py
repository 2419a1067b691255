"""Fifty LoRA steps against transformers, peft and torch's AdamW: the same data, order, schedule and learning rates."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack_sequence, stack
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.models import lora
from reverie_jax.models.checkpoints import read_model
from reverie_jax.models.checkpoints.write_adapters import write_peft
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.step import TrainState, is_lora_or_projector, make_optimizer, make_step, make_trainable
from tests.models import makers
from tests.models.oracle import normalized

STEPS, BATCH_SIZE, PATCHES = 50, 4, 9
RECIPE = Recipe(
    name="parity",
    steps=STEPS,
    batch_size=BATCH_SIZE,
    sequence=SequenceShape(length=48, images=1, edges=32),
    rank=4,
    alpha=8.0,
    dropout=0.0,
    learning_rate=2e-3,
    projector_learning_rate=2e-4,
    warmup_ratio=0.1,
    max_grad_norm=None,
)


def batches(seed: int) -> list[Batch]:
    """Return sequences of one conversation each, of many lengths: an image, a question, a supervised answer."""
    random, batches = np.random.default_rng(seed), []
    for _ in range(STEPS):
        sequences = []
        for _ in range(BATCH_SIZE):
            before, question, answer = (int(n) for n in random.integers((1, 2, 3), (4, 9, 20)))
            words = random.integers(3, makers.WORDS, before + question + answer)
            ids = np.concatenate([words[:before], np.full(PATCHES, makers.WORDS), words[before:]]).astype(np.int32)
            weights = np.zeros(len(ids), np.float32)
            weights[-answer:] = 1
            slots = np.full(len(ids), -1, np.int32)
            slots[before : before + PATCHES] = np.arange(PATCHES)
            images = random.integers(0, 256, (1, makers.SIDE, makers.SIDE, 3), dtype=np.uint8)
            element = make_element(build_tree([Tokens(ids, weights, slots)]), images)
            sequences.append(pack_sequence([element], RECIPE.sequence, PATCHES))
        batches.append(stack(sequences, BATCH_SIZE))
    return batches


def torch_run(base: Path, adapter: Path, data: list[Batch]) -> tuple[list[float], PeftModel]:
    """Return the loss of each step and the trained model."""
    model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter, is_trainable=True)
    projector = [p for name, p in model.named_parameters() if "multi_modal_projector" in name]
    for parameter in projector:
        parameter.requires_grad_(True)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    groups = [
        {"params": factors, "lr": RECIPE.learning_rate},
        {"params": projector, "lr": RECIPE.projector_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(RECIPE.warmup_ratio * STEPS), STEPS)
    losses = []
    for batch in data:
        lengths = batch.flat_tokens[:, 0]
        ids = torch.tensor(batch.tokens, dtype=torch.long)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        out = model(input_ids=ids, attention_mask=mask.long(), pixel_values=normalized(batch.images)).logits
        weight = torch.tensor(batch.weight)
        picked = torch.take_along_dim(out, torch.tensor(batch.parent, dtype=torch.long)[..., None], 1)
        nll = torch.nn.functional.cross_entropy(
            picked.transpose(1, 2), torch.tensor(batch.target, dtype=torch.long), reduction="none"
        )
        loss = (nll * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.parametrize("kind", makers.KINDS)
def test_fifty_steps_equal_those_of_torch(kind, tmp_path):
    base = makers.hf_folder(tmp_path / "base", makers.hf(makers.parts(kind)))
    model, data = read_model(base), batches(3)
    make_trainable(model, RECIPE)
    absent = {"llama": [("gate", 0), ("query", 1)], "phi3": []}[kind]  # adapters on some layers stay on these
    for name, layer in absent:
        factor = getattr(model.decoder.layers, name).lora_a
        factor.set_value(factor[...].at[layer].set(0))
    for name in ("adapter", "trained"):
        (tmp_path / name).mkdir()
    write_peft(model, tmp_path / "adapter", base_model=str(base), projector=False)
    expected, theirs = torch_run(base, tmp_path / "adapter", data)

    graph, params, frozen = nnx.split(model, is_lora_or_projector, ...)
    optimizer = make_optimizer(RECIPE)
    step = make_step(graph, optimizer, RECIPE)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    losses = []
    for batch in data:
        state, metrics = step(state, frozen, Batch(*map(jnp.asarray, batch)))
        losses.append(float(metrics.loss))
    assert np.ptp(expected) > 0.1  # something was learned
    np.testing.assert_allclose(losses, expected, rtol=1e-3)

    nnx.update(model, jax.tree.map(jnp.copy, state.params))
    write_peft(model, tmp_path / "trained", base_model=str(base), projector=True)
    from safetensors.numpy import load_file

    ours = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    torch_factors = {name.replace(".default", ""): p.detach().numpy() for name, p in theirs.named_parameters()}
    factors = [name for name in ours if "lora_" in name]
    assert len(factors) == 2 * (2 * len(makers.MODULES[kind]) - len(absent))
    assert set(factors) == {name for name in torch_factors if "lora_" in name}
    assert len(list(lora.adapters(model))) == len(makers.MODULES[kind])
    for name in factors:
        error = np.linalg.norm(ours[name] - torch_factors[name]) / np.linalg.norm(torch_factors[name])
        assert error <= 1e-3, (name, error)
