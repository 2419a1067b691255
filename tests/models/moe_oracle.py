"""The oracle of MoE-LLaVA in torch, written from a description of it, apart from the package and from `moe_loops`.

Qwen-1 as known from its published code: c_attn is [q; k; v] by rows, its MLP c_proj(w1(x) * silu(w2(x))), so that w2 is
the gate; w1 and w2 are `intermediate_size // 2` wide; only c_attn has a bias; RMSNorm, eps 1e-6; every dimension rotates.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tests.models.moe_loops import EPS, capacity

AUX_WEIGHT = 0.01
torch.set_num_threads(1)  # so small a model waits for its threads, on a busy machine forty times as long


@dataclasses.dataclass(frozen=True)
class Kind:
    """A language model's block."""

    mlp: tuple[str, ...]
    rotary: float
    eps: float = 1e-5
    rms: bool = False
    parallel: bool = False
    biases: bool = False
    """Biases beside those of q, k and v, and the head's."""


KINDS = {
    "stablelm": Kind(("gate_proj", "up_proj", "down_proj"), 0.25),
    "qwen": Kind(("w1", "w2", "c_proj"), 1.0, eps=1e-6, rms=True),
    "phi": Kind(("fc1", "fc2"), 0.4, parallel=True, biases=True),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model's sizes; those that meet in one array differ.

    Attributes:
        kind: `stablelm`, `qwen` or `phi`.
        vocab: Rows of the embedding, which may be more than the tokenizer has tokens.
        moe_layers: Indices of the layers with experts; none is a stage-2 model.
        image: The id of an image's placeholder, one for each patch; may be outside the vocabulary.
        tower: `clip` or `siglip`; both lose their first token, which in SigLIP's case is a patch.
    """

    kind: str = "stablelm"
    vocab: int = 101
    hidden: int = 80
    layers: int = 6
    heads: int = 5
    mlp: int = 56
    theta: float = 10_000.0
    experts: int = 4
    moe_layers: tuple[int, ...] = (0, 2, 4)
    factors: tuple[float, float] = (1.5, 2.0)
    minimum: int = 0
    image: int = 7
    tower: str = "clip"
    vision_hidden: int = 28
    vision_layers: int = 3
    vision_heads: int = 2
    vision_mlp: int = 44
    image_size: int = 24
    patch_size: int = 8

    @property
    def patches(self) -> int:
        """Return how many placeholders an image has."""
        return (self.image_size // self.patch_size) ** 2 - (self.tower == "siglip")


class MLP(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        kind = KINDS[sizes.kind]
        self.names = kind.mlp
        for name in self.names[:-1]:
            self.add_module(name, nn.Linear(sizes.hidden, sizes.mlp, bias=kind.biases))
        self.add_module(self.names[-1], nn.Linear(sizes.mlp, sizes.hidden, bias=kind.biases))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *second, last = (getattr(self, name) for name in self.names)
        if not second:
            return last(functional.gelu(first(x), approximate="tanh"))
        gate, up = (first, second[0]) if "gate_proj" in self.names else (second[0], first)
        return last(functional.silu(gate(x)) * up(x))


@dataclasses.dataclass
class Gate:
    """Weights [S, E, C], zero where no token is; the auxiliary loss; choices [E] before dropping; how many are dropped."""

    combine: torch.Tensor
    aux: torch.Tensor
    counts: torch.Tensor
    dropped: int


def gate(
    logits: torch.Tensor, *, capacity: int, noise: torch.Tensor | None = None, used: torch.Tensor | None = None
) -> Gate:
    """Route a group of tokens as `route` does, with masks and cumulative sums, and with gradients."""
    E = logits.shape[1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    used = torch.ones_like(logits[:, :1]) if used is None else used[:, None].to(logits.dtype)
    chance = logits.softmax(1)
    first = functional.one_hot(chance.argmax(1), E).to(logits.dtype)
    others = (logits if noise is None else logits + noise.to(logits.dtype)).masked_fill(first.bool(), -math.inf)
    first, second = first * used, functional.one_hot(others.argmax(1), E).to(logits.dtype) * used
    total = used.sum().clamp(min=1)
    aux = E * ((chance * used).sum(0) / total * first.sum(0) / total).sum()
    chosen = torch.stack([first, second])
    slots = torch.stack([first.cumsum(0), second.cumsum(0) + first.sum(0)]) - 1
    kept = chosen * (slots < capacity)
    weights = (chance * kept).sum(2)
    weights = weights / weights.sum(0).clamp(min=float(EPS))
    places = kept[..., None] * (slots[..., None] == torch.arange(capacity))
    combine = (weights[..., None, None] * places).sum(0)
    return Gate(combine, aux, chosen.sum((0, 1)).long(), int(chosen.sum() - kept.sum()))


class Experts(nn.Module):
    """The MoE FFN, its parameters named as DeepSpeed names them."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(MLP(sizes) for _ in range(sizes.experts))

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor | None = None, used: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Gate]:
        """Return the output [S, d] of one group, and its gate."""
        sizes, moe = self.sizes, self.deepspeed_moe
        places = capacity(len(x), sizes.experts, sizes.factors[not self.training], sizes.minimum)
        found = gate(x.float() @ moe.gate.wg.weight.float().T, capacity=places, noise=noise, used=used)
        combine = found.combine.to(x.dtype)
        taken = torch.einsum("sec,sm->ecm", (combine != 0).to(x.dtype), x)
        made = torch.stack([expert(taken[e]) for e, expert in enumerate(moe.experts.deepspeed_experts)])
        return torch.einsum("sec,ecm->sm", combine, made), found


class Attention(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        kind, self.heads, d = KINDS[sizes.kind], sizes.heads, sizes.hidden
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))
        self.o_proj = nn.Linear(d, d, bias=kind.biases)
        rotary = int(kind.rotary * d / self.heads)
        self.frequencies = [sizes.theta ** (-i / rotary) for i in range(0, rotary, 2)]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the first dimensions of x [B, heads, L, head_dim]; the two of a pair are half of those apart."""
        half = len(self.frequencies)
        angles = torch.arange(x.shape[2])[:, None].to(x.dtype) * torch.tensor(self.frequencies, dtype=x.dtype)
        cos, sin = angles.cos(), angles.sin()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, d = x.shape
        q, k, v = (f(x).view(B, L, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        scores = self.rotate(q) @ self.rotate(k).transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, d))


class Block(nn.Module):
    def __init__(self, sizes: Sizes, index: int):
        super().__init__()
        kind = KINDS[sizes.kind]
        norm = nn.RMSNorm if kind.rms else nn.LayerNorm
        self.input_layernorm = norm(sizes.hidden, eps=kind.eps)
        if not kind.parallel:
            self.post_attention_layernorm = norm(sizes.hidden, eps=kind.eps)
        self.parallel = kind.parallel
        self.self_attn = Attention(sizes)
        self.mlp = Experts(sizes) if index in sizes.moe_layers else MLP(sizes)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A model's input.

    Attributes:
        tokens: [B, L].
        pixels: [N, 3, H, W]; their patches take the placeholders in order.
        targets: [B, L], the id that is to follow each token, -100 where none is supervised; only `train` reads it.
        noise: [MoE layers, B, L, E], for the second choices; None takes the largest logit.
        used: [B, L], False for padding that is to have no expert; None routes padding like text, as the original does.
        groups: Rows that share a capacity and an auxiliary loss, each row once, [[0], [1]] one by one; None is all.
    """

    tokens: torch.Tensor
    pixels: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    used: torch.Tensor | None = None
    groups: Sequence[Sequence[int]] | None = None


@dataclasses.dataclass
class Output:
    """Logits [B, L, vocab]; the auxiliary loss; for each MoE layer, the gates of its groups in order."""

    logits: torch.Tensor
    aux: torch.Tensor
    gates: list[list[Gate]]


class Model(nn.Module):
    """MoE-LLaVA; parameters are named as in a StableLM checkpoint, and `tensors` has those of every kind."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        kind, self.sizes = KINDS[sizes.kind], sizes
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.model.layers = nn.ModuleList(Block(sizes, i) for i in range(sizes.layers))
        self.model.norm = (nn.RMSNorm if kind.rms else nn.LayerNorm)(sizes.hidden, eps=kind.eps)
        self.model.mm_projector = nn.Module()
        self.model.mm_projector.image_spatial_proj = nn.Sequential(
            nn.Linear(sizes.vision_hidden, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.hidden)
        )
        shape = {"hidden_size": sizes.vision_hidden, "intermediate_size": sizes.vision_mlp}
        shape |= {"num_hidden_layers": sizes.vision_layers, "num_attention_heads": sizes.vision_heads}
        shape |= {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
        if sizes.tower == "clip":
            tower = CLIPVisionModel(CLIPVisionConfig(**shape))
        else:
            tower = SiglipVisionModel(SiglipVisionConfig(**shape, vision_use_head=False))
        self.model.image_tower = nn.Module()
        self.model.image_tower.image_tower = tower
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=kind.biases)

    @property
    def tower(self) -> nn.Module:
        """Return the vision tower; its `save_pretrained` writes the repository that `mm_image_tower` names."""
        return self.model.image_tower.image_tower

    def forward(self, batch: Batch) -> Output:
        """Run a batch; a layer's auxiliary loss is the mean of its groups', as data-parallel replicas average theirs."""
        tokens, noise, used = batch.tokens, batch.noise, batch.used
        at = tokens == self.sizes.image
        x = self.model.embed_tokens(tokens.masked_fill(at, 0))
        if batch.pixels is not None:
            seen = self.tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            features = self.model.mm_projector.image_spatial_proj(seen).flatten(0, 1)
            assert int(at.sum()) == len(features), "placeholders and patches differ in number"
            x = x.masked_scatter(at[..., None], features)
        groups = [list(rows) for rows in batch.groups or [range(len(tokens))]]
        assert sorted(row for rows in groups for row in rows) == list(range(len(tokens)))
        aux, gates = torch.zeros(()), []
        for index, block in enumerate(self.model.layers):
            normed = block.input_layernorm(x)
            x = x + block.self_attn(normed)
            normed = normed if block.parallel else block.post_attention_layernorm(x)
            if index not in self.sizes.moe_layers:
                x = x + block.mlp(normed)
                continue
            found = []
            for rows in groups:
                own = None if noise is None else noise[len(gates), rows].flatten(0, 1)
                out, one = block.mlp(normed[rows].flatten(0, 1), own, None if used is None else used[rows].flatten())
                x = x.index_add(0, torch.tensor(rows), out.view(len(rows), *x.shape[1:]))
                found.append(one)
            aux = aux + torch.stack([one.aux for one in found]).mean()
            gates.append(found)
        return Output(self.lm_head(self.model.norm(x)), aux, gates)


def build(sizes: Sizes, seed: int, *, spread: float = 1.0) -> Model:
    """Return a random model in evaluation mode, norms and biases too; `spread` is about the router logits' deviation."""
    model, random = Model(sizes).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            draw = torch.randn(tensor.shape, generator=random)
            if tensor.ndim == 1:
                tensor.copy_(name.endswith(".weight") + 0.1 * draw)
            elif name.endswith("wg.weight"):
                tensor.copy_(draw * spread / math.sqrt(sizes.hidden))
            else:
                tensor.copy_(draw / (10 if "embed_tokens" in name else math.sqrt(tensor[0].numel())))  # norms feel eps
    return model


def upcycle(dense: Model, moe_layers: tuple[int, ...], seed: int) -> Model:
    """Return a stage-2 model with each chosen layer's FFN copied to every expert, and routers drawn as nn.Linear draws."""
    sizes = dataclasses.replace(dense.sizes, moe_layers=moe_layers)
    model, random = copy.deepcopy(dense), torch.Generator().manual_seed(seed)
    model.sizes = sizes
    for index in moe_layers:
        made = Experts(sizes)
        for expert in made.deepspeed_moe.experts.deepspeed_experts:
            expert.load_state_dict(dense.model.layers[index].mlp.state_dict())
        nn.init.kaiming_uniform_(made.deepspeed_moe.gate.wg.weight, a=math.sqrt(5), generator=random)
        model.model.layers[index].mlp = made
    return model.train(dense.training)


@torch.no_grad()
def generate(model: Model, tokens: torch.Tensor, pixels: torch.Tensor | None, steps: int) -> torch.Tensor:
    """Return [B, steps] greedy tokens in evaluation mode, with everything computed anew at each step."""
    start = tokens.shape[1]
    for _ in range(steps):
        tokens = torch.cat([tokens, model(Batch(tokens, pixels)).logits[:, -1:].argmax(-1)], 1)
    return tokens[:, start:]


RENAMED = {
    "stablelm": {},
    "phi": {".self_attn.o_proj.": ".self_attn.dense.", "model.norm.": "model.final_layernorm."},
    "qwen": {
        ".self_attn.o_proj.": ".attn.c_proj.",
        ".input_layernorm.": ".ln_1.",
        ".post_attention_layernorm.": ".ln_2.",
        "model.layers.": "transformer.h.",
        "model.embed_tokens.": "transformer.wte.",
        "model.norm.": "transformer.ln_f.",
        "model.": "transformer.",
    },
}


def tensors(model: Model) -> dict[str, torch.Tensor]:
    """Return copies of the parameters by their names in a checkpoint of the model's kind."""
    found, own = {}, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in own.items():
        if model.sizes.kind == "qwen" and ".self_attn.q_proj." in name and "image_tower" not in name:
            tensor = torch.cat([own[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace(".self_attn.q_proj.", ".attn.c_attn.")
        elif model.sizes.kind == "qwen" and (".k_proj." in name or ".v_proj." in name) and "image_tower" not in name:
            continue
        ours, tower, inside = name.partition("image_tower.image_tower.")
        for old, new in RENAMED[model.sizes.kind].items():
            ours = ours.replace(old, new)
        # transformers 5 leaves out a prefix that its files and older versions have.
        found[ours + (f"{tower}vision_model.{inside.removeprefix('vision_model.')}" if tower else "")] = tensor
    return found


def config(sizes: Sizes) -> dict[str, Any]:
    """Return `config.json` of a checkpoint."""
    kind, dense = KINDS[sizes.kind], not sizes.moe_layers
    name = {"stablelm": "Stablelm", "qwen": "QWen", "phi": "Phi"}[sizes.kind]
    tower = {"clip": "openai/clip-vit-large-patch14-336", "siglip": "google/siglip-so400m-patch14-384"}[sizes.tower]
    base = {"num_attention_heads": sizes.heads, "intermediate_size": sizes.mlp}
    base |= {"num_key_value_heads": sizes.heads, "rope_theta": sizes.theta, "hidden_act": "silu"}
    if sizes.kind == "stablelm":
        text = base | {"norm_eps": kind.eps, "rope_pct": kind.rotary, "use_qkv_bias": True}
    elif sizes.kind == "phi":
        text = base | {"layer_norm_eps": kind.eps, "partial_rotary_factor": kind.rotary, "hidden_act": "gelu_new"}
    else:
        text = {"num_attention_heads": sizes.heads, "kv_channels": sizes.hidden // sizes.heads, "no_bias": True}
        text |= {"intermediate_size": 2 * sizes.mlp, "layer_norm_epsilon": kind.eps, "rotary_pct": kind.rotary}
        text |= {"rotary_emb_base": sizes.theta, "seq_length": 4096, "use_dynamic_ntk": True, "use_logn_attn": True}
    number = len(sizes.moe_layers)
    moe = {"moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": list(sizes.moe_layers), "ep_size": 1}
    moe |= {"num_experts": [sizes.experts] * number, "top_k_experts": 2, "min_capacity": sizes.minimum}
    moe |= {"capacity_factor": sizes.factors[0], "eval_capacity_factor": sizes.factors[1], "use_residual": False}
    moe |= {"router_aux_loss_coef": AUX_WEIGHT, "train_modules": [*kind.mlp, "wg"]}
    return (
        {"architectures": [f"{'Llava' if dense else 'MoELLaVA'}{name}ForCausalLM"], "torch_dtype": "float32"}
        | {"model_type": f"llava_{sizes.kind}" if dense else f"moe_llava_{sizes.kind}", "tie_word_embeddings": False}
        | {"vocab_size": sizes.vocab, "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers}
        | {"max_position_embeddings": 4096, "mm_hidden_size": sizes.vision_hidden, "mm_image_tower": tower}
        | {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_projector_type": "mlp2x_gelu"}
        | {"image_aspect_ratio": "pad", "mm_use_im_start_end": False, "mm_use_im_patch_token": False}
        | (text if dense else text | {"moe": moe})
    )


def save(folder: Path, model: Model, *, shard: str = "5GB") -> None:
    """Write a checkpoint, without experts one of stage 2; files larger than `shard` are split and get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors(model), folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config(model.sizes), indent=1))


def stage3(sizes: Sizes) -> tuple[str, ...]:
    """Return what the MoE stage trains: experts, routers, the other layers' MLPs too, and the projector."""
    return (*(f"mlp.{name}" for name in KINDS[sizes.kind].mlp), "deepspeed_moe", "mm_projector")


def train(
    model: Model,
    batches: Sequence[Batch],
    lr: float | Callable[[int], float],
    steps: int,
    trainable: tuple[str, ...] | None = None,
    *,
    clip: float | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with AdamW (betas 0.9 and 0.999, eps 1e-8, no decay), batches in turn, in training mode.

    The loss is the mean cross-entropy of a batch's supervised tokens plus 0.01 times the auxiliary loss.

    Args:
        lr: A number, or a function of the step from 0.
        trainable: Parts of names in `named_parameters`; None is everything. The tower never trains.
        clip: Largest norm of the gradient.

    Returns:
        The loss of each step before its update, and all parameters after the last, as `tensors` names them.
    """
    model.train()
    chosen = []
    for name, tensor in model.named_parameters():
        picked = trainable is None or any(part in name for part in trainable)
        tensor.requires_grad_("image_tower" not in name and picked)
        if tensor.requires_grad:
            # Zeros, not None: the original feeds text an empty image, so that AdamW updates the projector all the same.
            tensor.grad = torch.zeros_like(tensor)
            chosen.append(tensor)
    optimizer, losses = torch.optim.AdamW(chosen, lr=0.0, weight_decay=0.0), []
    for step in range(steps):
        batch = batches[step % len(batches)]
        out = model(batch)
        loss = (
            functional.cross_entropy(out.logits.flatten(0, 1).float(), batch.targets.flatten()) + AUX_WEIGHT * out.aux
        )
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(chosen, clip)
        optimizer.param_groups[0]["lr"] = lr(step) if callable(lr) else lr
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses, tensors(model)
