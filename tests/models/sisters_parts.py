"""Towers and bridges of MiniGPT-4, mPLUG-Owl and Muffin in torch, written from a description, apart from the package.

Their parameters have the published names. Images are normalized already: [n, 3, side, side].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

torch.set_num_threads(1)  # so small a model waits for its threads


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A system's sizes.

    Attributes:
        vision: Width, layers, heads and MLP of the tower.
        bridge: The same of the Q-Former or the abstractor; Muffin has none.
        queries: Learned queries, in the bridge or, in Muffin's case, within the tower.
        rows: Of the embedding and the head of the language model.
        hidden: Width of the language model.
        positions: Rows of Muffin's table of the queries' positions.
    """

    vision: tuple[int, int, int, int]
    bridge: tuple[int, int, int, int]
    queries: int
    image_size: int
    patch_size: int
    rows: int
    hidden: int
    positions: int = 0

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Let every query see every key; [n, tokens, heads * width] each."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


# MiniGPT-4: EVA ViT-g and BLIP-2's Q-Former.


class EvaAttention(nn.Module):
    """One matrix for queries, keys and values, in this order; keys have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj(attend(query + self.q_bias, key, value + self.v_bias, self.heads))


class EvaBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, 1e-6), EvaAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, 1e-6), MLP(width, mlp, functional.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Eva(nn.Module):
    """Without a last normalization: `ln_vision` is a part of its own."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, layers, heads, mlp = sizes.vision
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.patches + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size)
        self.blocks = nn.ModuleList(EvaBlock(width, heads, mlp) for _ in range(layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class BertAttention(nn.Module):
    """BERT's attention, post-norm; names as BERT's."""

    def __init__(self, width: int, heads: int, source: int):
        super().__init__()
        self.heads = heads
        self.self, self.output = nn.Module(), nn.Module()
        self.self.query = nn.Linear(width, width)
        self.self.key, self.self.value = nn.Linear(source, width), nn.Linear(source, width)
        self.output.dense, self.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        mixed = attend(self.self.query(x), self.self.key(source), self.self.value(source), self.heads)
        return self.output.LayerNorm(x + self.output.dense(mixed))


class QFormerLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, source: int, *, crosses: bool):
        super().__init__()
        self.attention = BertAttention(width, heads, width)
        if crosses:
            self.crossattention = BertAttention(width, heads, source)
        self.intermediate_query, self.output_query = nn.Module(), nn.Module()
        self.intermediate_query.dense = nn.Linear(width, mlp)
        self.output_query.dense, self.output_query.LayerNorm = nn.Linear(mlp, width), nn.LayerNorm(width, 1e-12)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, image)
        inner = functional.gelu(self.intermediate_query.dense(x))
        return self.output_query.LayerNorm(x + self.output_query.dense(inner))


class QFormer(nn.Module):
    """Every second layer, the first included, sees the image."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, layers, heads, mlp = sizes.bridge
        self.bert = nn.Module()
        self.bert.embeddings, self.bert.encoder = nn.Module(), nn.Module()
        self.bert.embeddings.LayerNorm = nn.LayerNorm(width, 1e-12)
        self.bert.encoder.layer = nn.ModuleList(
            QFormerLayer(width, heads, mlp, sizes.vision[0], crosses=n % 2 == 0) for n in range(layers)
        )

    def forward(self, queries: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.bert.embeddings.LayerNorm(queries)
        for layer in self.bert.encoder.layer:
            x = layer(x, image)
        return x


# mPLUG-Owl: a vision transformer of its own and the visual abstractor.


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


class OwlAttention(nn.Module):
    """One matrix, in which query, key and value of a head are side by side."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1))
        return self.dense(attend(*(split[..., n, :].flatten(2) for n in range(3)), self.heads))


class OwlLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.self_attn = OwlAttention(width, heads)
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(width, 1e-6) for _ in range(2))
        self.mlp = MLP(width, mlp, quick_gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class OwlVision(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, layers, heads, mlp = sizes.vision
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings.patch_embed = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size, bias=False)
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, sizes.patches + 1, width))
        self.embeddings.pre_layernorm = nn.LayerNorm(width, 1e-6)
        self.encoder.layers = nn.ModuleList(OwlLayer(width, heads, mlp) for _ in range(layers))
        self.post_layernorm = nn.LayerNorm(width, 1e-6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        parts = self.embeddings
        patches = parts.patch_embed(pixels).flatten(2).mT
        x = torch.cat([parts.cls_token.expand(len(pixels), -1, -1), patches], 1)
        x = parts.pre_layernorm(x + parts.position_embedding)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorLayer(nn.Module):
    """The queries see themselves and the image at once; the residual is the normalized query."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.crossattention = part = nn.Module()
        part.attention, part.output = nn.Module(), nn.Module()
        part.attention.query, part.attention.key, part.attention.value = (nn.Linear(width, width) for _ in range(3))
        part.norm1, part.normk, part.output.norm2 = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        part.output.out_proj, part.output.mlp = nn.Linear(width, width), nn.Module()
        part.output.mlp.w1, part.output.mlp.w3 = nn.Linear(width, mlp), nn.Linear(width, mlp)
        part.output.mlp.w2, part.output.mlp.ffn_ln = nn.Linear(mlp, width), nn.LayerNorm(mlp, 1e-6)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        part, output = self.crossattention, self.crossattention.output
        x, mlp = part.norm1(x), output.mlp
        seen = torch.cat([x, part.normk(image)], 1)
        project = part.attention
        x = x + output.out_proj(attend(project.query(x), project.key(seen), project.value(seen), self.heads))
        y = output.norm2(x)
        return x + mlp.w2(mlp.ffn_ln(functional.silu(mlp.w1(y)) * mlp.w3(y)))


class Abstractor(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, layers, heads, mlp = sizes.bridge
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(AbstractorLayer(width, heads, mlp) for _ in range(layers))
        self.visual_fc = nn.Linear(width, sizes.hidden)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, sizes.hidden))


# Muffin: BEiT-3, with the queries as its text.


class Multiway(nn.Module):
    """Two experts: A for the tokens before `split`, the image's; B for the others."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.A, self.B = make(), make()

    def forward(self, x: torch.Tensor, split: int) -> torch.Tensor:
        return torch.cat([self.A(x[:, :split]), self.B(x[:, split:])], 1)


class Beit3FFN(nn.Module):
    def __init__(self, width: int, mlp: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.ffn_layernorm = nn.LayerNorm(mlp, 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.ffn_layernorm(functional.gelu(self.fc1(x))))


class Beit3Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads, part = heads, nn.Module()
        part.q_proj, part.k_proj, part.v_proj, part.out_proj = (
            Multiway(lambda: nn.Linear(width, width)) for _ in range(4)
        )
        part.inner_attn_ln, self.self_attn_layer_norm, self.final_layer_norm = (
            Multiway(lambda: nn.LayerNorm(width, 1e-5)) for _ in range(3)
        )
        self.self_attn, self.ffn = part, Multiway(lambda: Beit3FFN(width, mlp))

    def forward(self, x: torch.Tensor, split: int) -> torch.Tensor:
        part, y = self.self_attn, self.self_attn_layer_norm(x, split)
        mixed = attend(*(project(y, split) for project in (part.q_proj, part.k_proj, part.v_proj)), self.heads)
        x = x + part.out_proj(part.inner_attn_ln(mixed, split), split)
        return x + self.ffn(self.final_layer_norm(x, split), split)


class Beit3(nn.Module):
    """Positions count from 2 in both tables, as fairseq's; image and queries have one each."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, layers, heads, mlp = sizes.vision
        self.vision_embed, self.encoder = nn.Module(), nn.Module()
        self.vision_embed.proj = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size)
        self.vision_embed.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder.embed_positions = nn.Module()
        self.encoder.embed_positions.A = nn.Embedding(sizes.patches + 3, width)
        self.encoder.embed_positions.B = nn.Embedding(sizes.positions, width)
        self.encoder.layers = nn.ModuleList(Beit3Layer(width, heads, mlp) for _ in range(layers))
        self.encoder.layer_norm = Multiway(lambda: nn.LayerNorm(width, 1e-5))

    def forward(self, pixels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return the queries' outputs."""
        tables = self.encoder.embed_positions
        patches = self.vision_embed.proj(pixels).flatten(2).mT
        image = torch.cat([self.vision_embed.cls_token.expand(len(pixels), -1, -1), patches], 1) + tables.A.weight[2:]
        text = (queries + tables.B.weight[2 : 2 + len(queries)]).expand(len(pixels), -1, -1)
        x, split = torch.cat([image, text], 1), image.shape[1]
        for layer in self.encoder.layers:
            x = layer(x, split)
        return self.encoder.layer_norm(x, split)[:, split:]


def resized_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """Resize BEiT-3's table A, [3 + patches, width], to `side` patches in a row; the first three rows stay."""
    before = round((len(table) - 3) ** 0.5)
    grid = table[3:].T.reshape(1, -1, before, before)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:3], grid[0].flatten(1).T])
