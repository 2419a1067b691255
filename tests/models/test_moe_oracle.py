"""The two oracles of MoE-LLaVA agree with each other, and with transformers where it has a class."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.models import moe_oracle as oracle
from tests.models.moe_loops import capacity, ffn, layer, route
from tests.models.moe_oracle import Batch, Sizes

KINDS = ("stablelm", "qwen", "phi")


def numbers(sizes: Sizes, seed: int, rows: int = 3, length: int = 21) -> Batch:
    """Return text with an image in every row but the last, targets for some of it, and noise."""
    random = np.random.default_rng(seed)
    tokens, follow = random.integers(8, sizes.vocab, (2, rows, length))
    tokens[:-1, 4 : 4 + sizes.patches] = sizes.image
    targets = np.where(random.random(tokens.shape) < 0.4, follow, -100)
    pixels = random.normal(size=(rows - 1, 3, sizes.image_size, sizes.image_size)).astype(np.float32)
    noise = random.gumbel(size=(len(sizes.moe_layers), rows, length, sizes.experts)).astype(np.float32)
    return Batch(*map(torch.from_numpy, (tokens, pixels, targets, noise)))


@pytest.mark.parametrize(
    ("tokens", "experts", "places"),
    [(64, 4, 32), (64, 4, 48), (64, 4, 64), (1, 4, 1), (1, 2, 0), (9, 5, 0), (37, 3, 1)],
)
def test_loops_and_masks_route_alike(tokens, experts, places):
    random = np.random.default_rng(tokens + places)
    logits, gumbel = random.normal(size=(tokens, experts)), random.gumbel(size=(tokens, experts))
    logits = logits.astype(np.float32)
    for noise in (None, gumbel.astype(np.float32)):
        for used in (None, random.random(tokens) < 0.7, np.zeros(tokens, bool)):
            options = {name: one for name, one in {"noise": noise, "used": used}.items() if one is not None}
            found = route(logits, capacity=places, **options)
            options = {name: torch.from_numpy(one) for name, one in options.items()}
            other = oracle.gate(torch.from_numpy(logits), capacity=places, **options)
            combine = np.zeros((tokens, experts, places), np.float32)
            for s, c in zip(*np.nonzero(found.kept), strict=True):
                combine[s, found.experts[s, c], found.slots[s, c]] = found.weights[s, c]
            np.testing.assert_allclose(other.combine, combine, atol=1e-6)
            np.testing.assert_allclose(found.weights.sum(1), found.kept.any(1), atol=1e-6)
            assert float(other.aux) == pytest.approx(found.aux, rel=1e-6)
            assert (other.counts.tolist(), other.dropped) == (found.counts.tolist(), found.dropped)


def test_the_gate_by_hand():
    """Two experts of three are wanted by all: the last first choice and every second one after it are dropped."""
    chance = np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    found = route(np.log(chance).astype(np.float32), capacity=2)
    assert found.experts.tolist() == [[0, 1], [0, 1], [1, 2], [0, 2]]
    assert found.slots.tolist() == [[0, 1], [1, 2], [0, 0], [2, 1]]
    assert found.kept.tolist() == [[True, True], [True, False], [True, True], [False, True]]
    np.testing.assert_allclose(found.weights, [[2 / 3, 1 / 3], [1, 0], [5 / 8, 3 / 8], [0, 1]], atol=1e-6)
    assert (found.counts.tolist(), found.dropped) == ([3, 3, 2], 2)
    assert found.aux == pytest.approx(3 * (0.5 * 0.75 + 0.3 * 0.25))  # mean chances 0.5, 0.3; first choices 3/4, 1/4
    noise = np.zeros((4, 3))
    noise[0] = [9, 0, 9]  # the first choice is never noisy, and cannot be chosen twice
    assert route(np.log(chance), capacity=4, noise=noise).experts[0].tolist() == [0, 2]
    assert [capacity(64, 4, factor) for factor in (1.0, 1.5, 2.0)] == [32, 48, 64]
    assert [capacity(1, 4, 1.5), capacity(1, 4, 1.5, 4), capacity(7, 5, 1.5)] == [1, 4, 5]


def test_gradients_of_the_gate_are_differences_of_the_loops():
    random = np.random.default_rng(4)
    logits, scale = random.normal(size=(9, 4)), random.normal(size=(9, 4))

    def value(at: np.ndarray) -> float:
        found = route(at, capacity=4, dtype=np.float64)
        pairs = zip(*np.nonzero(found.kept), strict=True)
        return found.aux + sum(found.weights[s, c] * scale[s, found.experts[s, c]] for s, c in pairs)

    tensor = torch.tensor(logits, requires_grad=True)
    found = oracle.gate(tensor, capacity=4)
    assert found.dropped > 0
    (found.aux + (found.combine.sum(2) * torch.from_numpy(scale)).sum()).backward()
    steps = 1e-6 * np.eye(36).reshape(36, 9, 4)
    differences = [(value(logits + step) - value(logits - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(tensor.grad.flatten(), differences, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_layers_agree(kind, training):
    model = oracle.build(Sizes(kind, factors=(0.5, 2.0)), 3, spread=2.0)
    block = model.model.layers[2].mlp.train(training)
    random = np.random.default_rng(5)
    x, noise = (draw.astype(np.float32) for draw in (random.normal(size=(33, 80)), random.gumbel(size=(33, 4))))
    used = random.random(33) < 0.9
    moe = block.deepspeed_moe
    experts = [ffn({n: t.numpy() for n, t in e.state_dict().items()}) for e in moe.experts.deepspeed_experts]
    places = 9 if training else 33
    with torch.no_grad():
        out, found = block(*map(torch.from_numpy, (x, noise, used)))
    expected, routing = layer(x, moe.gate.wg.weight.detach().numpy(), experts, capacity=places, noise=noise, used=used)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert not out[~used].any()
    assert found.dropped == routing.dropped
    assert (routing.dropped > 0) == training
    assert (~routing.kept.any(1) & used).any() == training  # some token loses both


QWEN_NAMES = """transformer.h.=model.layers. transformer.wte.=model.embed_tokens. transformer.ln_f.=model.norm.
    .ln_1.=.input_layernorm. .ln_2.=.post_attention_layernorm. .attn.c_proj.=.self_attn.o_proj. .w2.=.gate_proj.
    .w1.=.up_proj. .mlp.c_proj.=.mlp.down_proj. transformer.=model."""
NAMES = """model.layers.=model.language_model.layers. model.embed_tokens.=model.language_model.embed_tokens.
    model.norm.=model.language_model.norm. model.final_layernorm.=model.language_model.final_layernorm.
    image_tower.image_tower.vision_model.=vision_tower. mm_projector.image_spatial_proj.0=multi_modal_projector.linear_1
    mm_projector.image_spatial_proj.2=multi_modal_projector.linear_2"""


def read(folder: Path) -> dict[str, torch.Tensor]:
    assert (folder / "model.safetensors.index.json").exists()
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def theirs(folder: Path) -> transformers.LlavaForConditionalGeneration:
    """Return transformers' LLaVA with a dense checkpoint's weights; Qwen2 computes what Qwen-1 does, by other names."""
    shape = {"vocab_size": 101, "hidden_size": 80, "num_hidden_layers": 6, "num_attention_heads": 5}
    shape |= {"num_key_value_heads": 5, "intermediate_size": 56}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    kind, tower = folder.name.split("-")
    text = {
        "stablelm": lambda: transformers.StableLmConfig(
            **shape, layer_norm_eps=1e-5, use_qkv_bias=True, rope_parameters=rope | {"partial_rotary_factor": 0.25}
        ),
        "phi": lambda: transformers.PhiConfig(
            **shape, layer_norm_eps=1e-5, rope_parameters=rope | {"partial_rotary_factor": 0.4}
        ),
        "qwen": lambda: transformers.Qwen2Config(**shape, rms_norm_eps=1e-6, rope_parameters=rope),
    }[kind]()
    shape = {"hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44}
    vision = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[tower](
        **shape, image_size=24, patch_size=8, **({"vision_use_head": False} if tower == "siglip" else {})
    )
    state = read(folder)
    for name in [name for name in state if "c_attn" in name]:
        for part, tensor in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = tensor
    for pair in (QWEN_NAMES * (kind == "qwen") + " " + NAMES).split():
        state = {name.replace(*pair.split("=")): tensor for name, tensor in state.items()}
    made = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    )
    made.lm_head = torch.nn.Linear(80, 101, bias=kind == "phi")  # LLaVA's own has no bias
    made.load_state_dict(state)
    return made.eval()


@pytest.mark.parametrize(("kind", "tower"), [*((kind, "clip") for kind in KINDS), ("qwen", "siglip")])
def test_checkpoints(tmp_path, kind, tower):
    """A stage-2 checkpoint is transformers' model, and its upcycled one as long as nothing is dropped."""
    dense = oracle.build(Sizes(kind, moe_layers=(), factors=(0.3, 2.0), tower=tower), 11)
    model = oracle.upcycle(dense, (1, 3), 12)
    batch = numbers(model.sizes, 13)
    folder = tmp_path / f"{kind}-{tower}"
    oracle.save(folder, dense, shard="400KB")
    with torch.no_grad():
        expected = theirs(folder)(input_ids=batch.tokens, pixel_values=batch.pixels).logits
        np.testing.assert_allclose(dense(batch).logits, expected, atol=1e-5)
        np.testing.assert_allclose(model(batch).logits, expected, atol=1e-5)
        assert (model.train()(batch).logits - expected).abs().max() > 1e-2
    oracle.save(tmp_path / "moe", model, shard="400KB")
    configs = [json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "moe")]
    assert ["moe" in config for config in configs] == [False, True]
    stored, found = read(folder), read(tmp_path / "moe")
    block = "transformer.h" if kind == "qwen" else "model.layers"
    for index in (1, 3):
        assert found.pop(f"{block}.{index}.mlp.deepspeed_moe.gate.wg.weight").shape == (4, 80)
        for name in [name for name in stored if name.startswith(f"{block}.{index}.mlp.")]:
            tensor = stored.pop(name)
            for expert in range(4):
                inner = f".mlp.deepspeed_moe.experts.deepspeed_experts.{expert}."
                assert torch.equal(found.pop(name.replace(".mlp.", inner)), tensor)
    assert stored.keys() == found.keys()


def test_groups_and_unused_tokens():
    """Rows that route by themselves do as alone; padding that is not used leaves the other tokens' routing as it is."""
    model = oracle.build(Sizes(), 17).train()
    batch = dataclasses.replace(numbers(model.sizes, 18, rows=2), noise=None)
    with torch.no_grad():
        alone = [model(Batch(batch.tokens[:1], batch.pixels)), model(Batch(batch.tokens[1:]))]
        split, joint = (model(dataclasses.replace(batch, groups=groups)) for groups in ([[1], [0]], None))
        padded = model.eval()(dataclasses.replace(batch, used=torch.arange(21).expand(2, 21) < 17))
        short = model(Batch(batch.tokens[:, :17], batch.pixels))
    np.testing.assert_allclose(split.logits, torch.cat([one.logits for one in alone]), atol=1e-5)
    np.testing.assert_allclose(padded.logits[:, :17], short.logits, atol=1e-5)
    assert (joint.logits - split.logits).abs().max() > 1e-2
    assert float(split.aux) == pytest.approx(sum(float(one.aux) for one in alone) / 2, rel=1e-5)
    assert float(padded.aux) == pytest.approx(float(short.aux), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_what_stage_3_trains(kind):
    model = oracle.build(Sizes(kind), 19)
    before, chosen = oracle.tensors(model), oracle.stage3(model.sizes)
    batches = [numbers(model.sizes, seed) for seed in (20, 21)]
    with torch.no_grad():
        out = model.train()(batches[0])
    rows, columns = torch.nonzero(batches[0].targets >= 0, as_tuple=True)
    logs = out.logits.log_softmax(-1)[rows, columns, batches[0].targets[rows, columns]]
    losses, after = oracle.train(model, batches, 3e-3, 10, chosen)
    assert losses[0] == pytest.approx(float(0.01 * out.aux - logs.mean()), rel=1e-6)
    assert losses[-1] < losses[1] - 0.3
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = (name for name in before if ".mlp." in name or "mm_projector" in name)
    assert moved == {name for name in expected if "image_tower" not in name}
