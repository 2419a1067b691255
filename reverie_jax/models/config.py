"""Architectures as frozen dataclasses. Every size that shapes a parameter is here, and nothing else is."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Activation = Literal["silu", "gelu", "quick_gelu"]
ProjectorKind = Literal["linear", "mlp2x_gelu"]
Tokenization = Literal["hf", "llava"]
ImageAspectRatio = Literal["pad", "square"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer (`CLIPVisionModel` in transformers).

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels.
        activation: CLIP as OpenAI trained it uses quick-GELU, x * sigmoid(1.702 x).
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"

    @property
    def patches(self) -> int:
        """Patch tokens of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A LLaMA-shaped decoder: RMSNorm, rotary positions (rotate-half), SwiGLU, no biases.

    Attributes:
        fused: query, key and value are one matrix, gate and up another (Phi-3); each then carries one adapter.
        max_positions: longest sequence that the weights were made for.
        sliding_window: how far back a token sees, where the weights were made with such a limit. Attention here is
            full, so `context` ends where the two would differ.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096
    fused: bool = False
    sliding_window: int | None = None

    @property
    def context(self) -> int:
        """Longest sequence on which this decoder is exact."""
        return min(self.max_positions, self.sliding_window or self.max_positions)


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Vision tower, projector and decoder, and how they meet.

    Attributes:
        feature_layer: which hidden state of the tower feeds the projector; -2 is the output of the last layer but one.
        image_token_id: vocabulary id that stands where an image feature goes; its embedding is never used.
        template: name of the chat template that the weights were tuned with (see `data.conversation`).
        tokens: whose tokenisation they were tuned with: Hugging Face's one pass, or original LLaVA's.
        image_aspect: whether pictures were padded to squares or cropped.
        vision_tower: name of the tower's own repository, where one is known.
    """

    vision: VisionConfig
    text: TextConfig
    projector: ProjectorKind = "mlp2x_gelu"
    feature_layer: int = -2
    image_token_id: int = 32000
    template: str = "llava-hf"
    tokenization: Tokenization = "hf"
    image_aspect_ratio: ImageAspectRatio = "pad"
    vision_tower: str = ""

    @property
    def feature_depth(self) -> int:
        """Encoder layers that run: hidden state k is the output of layer k, and state 0 is the embedding."""
        states = self.vision.layers + 1
        depth = self.feature_layer % states
        if not -states <= self.feature_layer < states:
            raise ValueError(f"feature_layer {self.feature_layer} is outside the tower's {states} hidden states")
        return depth


_CLIP_L = VisionConfig(hidden=1024, layers=24, heads=16, mlp=4096, image_size=224, patch_size=14)
_CLIP_L_336 = dataclasses.replace(_CLIP_L, image_size=336)

CLIP_TOWERS: dict[str, VisionConfig] = {
    "openai/clip-vit-large-patch14": _CLIP_L,
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
}
"""OpenAI's towers that LLaVA was built on, by repository."""

_VICUNA_7B = TextConfig(vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11008)
_VICUNA_13B = TextConfig(vocab=32000, hidden=5120, layers=40, heads=40, kv_heads=40, head_dim=128, mlp=13824)
_PHI3_MINI = TextConfig(
    vocab=32064, hidden=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192, fused=True, sliding_window=2047
)


def _llava(text: TextConfig, tower: str, **fields: Any) -> VLMConfig:
    return VLMConfig(
        CLIP_TOWERS[tower],
        text,
        vision_tower=tower,
        image_token_id=0,
        tokenization="llava",
        **{"template": "vicuna_v1", **fields},
    )


ARCHITECTURES: dict[str, VLMConfig] = {
    "llava-1.0-7b": _llava(
        dataclasses.replace(_VICUNA_7B, norm_eps=1e-6, max_positions=2048),
        "openai/clip-vit-large-patch14",
        projector="linear",
        image_aspect_ratio="square",
    ),
    "llava-1.5-7b": _llava(_VICUNA_7B, "openai/clip-vit-large-patch14-336"),
    "llava-1.5-13b": _llava(_VICUNA_13B, "openai/clip-vit-large-patch14-336"),
    "llava-phi3-mini": _llava(_PHI3_MINI, "openai/clip-vit-large-patch14-336", template="phi3_instruct"),
}
"""The published models that REVERIE was tuned from (haotian-liu/LLaVA, mbzuai-oryx/LLaVA-pp)."""
