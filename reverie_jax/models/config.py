"""Architectures as frozen dataclasses: every size that determines a parameter's shape, and how inputs are prepared."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Activation = Literal["silu", "gelu", "quick_gelu"]
ProjectorKind = Literal["linear", "mlp2x_gelu"]
Tokenization = Literal["hf", "llava"]
ImageAspectRatio = Literal["pad", "square"]
Remat = Literal["full", "dots", "none"]

DEFAULT_TARGETS = r"decoder\.layers\.(query|key|value|qkv|out|gate|up|gate_up|down)"
"""Regular expression of the layers that get adapters by default: every linear layer of the decoder's blocks, as in LLaVA;
not the tower, the projector or the LM head."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer (`CLIPVisionModel` in transformers).

    Attributes:
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch, in pixels.
        activation: OpenAI's CLIP uses quick-GELU, x * sigmoid(1.702 x).
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

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
        """Number of patch tokens of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A LLaMA-like decoder: RMSNorm, rotary positions (rotate-half), SwiGLU, no biases.

    Attributes:
        fused: Whether query, key and value are one matrix, and gate and up another (Phi-3); each then has one adapter.
        max_positions: Longest sequence that the weights were trained for.
        sliding_window: Attention window that the weights were trained with, if any. Attention here is full, so
            `context` is limited to the lengths at which the two agree.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

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
        """Longest sequence on which this decoder is exact, in tokens."""
        return min(self.max_positions, self.sliding_window or self.max_positions)


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Vision tower, projector and decoder, how they are connected, and how their inputs are prepared.

    Attributes:
        feature_layer: Hidden state of the tower that is the projector's input; -2 is the last layer's input.
        image_token_id: Placeholder token at the position of an image feature; its embedding is never used.
        template: Name of the chat template that the weights were tuned with (see `data.templates`).
        tokenization: Tokenization that the weights were tuned with: Hugging Face's in one pass, or original LLaVA's.
        image_aspect_ratio: How images become squares: padded, or cropped ("square").
        vision_tower: Name of the tower's own repository, where it is known.
        stop_ids: Tokens that end an answer, beside the tokenizer's end of sequence and the template's.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vision: VisionConfig
    text: TextConfig
    projector: ProjectorKind = "mlp2x_gelu"
    feature_layer: int = -2
    image_token_id: int = 32000
    template: str = "llava-hf"
    tokenization: Tokenization = "hf"
    image_aspect_ratio: ImageAspectRatio = "pad"
    vision_tower: str = ""
    stop_ids: tuple[int, ...] = ()

    @property
    def feature_depth(self) -> int:
        """Number of encoder layers to run: hidden state k is the output of layer k, and state 0 is the embedding."""
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
"""OpenAI's towers that LLaVA uses, by repository."""

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
