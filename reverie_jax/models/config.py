"""Architectures as frozen dataclasses. Every size that shapes a parameter is here, and nothing else is."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "quick_gelu"]
ProjectorKind = Literal["linear", "mlp2x_gelu"]


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
    """A LLaMA-shaped decoder: RMSNorm, rotary positions (rotate-half), SwiGLU, no biases."""

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


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Vision tower, projector and decoder, and how they meet.

    Attributes:
        feature_layer: which hidden state of the tower feeds the projector; -2 is the output of the last layer but one.
        image_token_id: vocabulary id that stands where an image feature goes.
        template: name of the chat template that the weights were tuned with (see `data.conversation`).
    """

    vision: VisionConfig
    text: TextConfig
    projector: ProjectorKind = "mlp2x_gelu"
    feature_layer: int = -2
    image_token_id: int = 32000
    template: str = "llava-hf"

    @property
    def feature_depth(self) -> int:
        """Encoder layers that run: hidden state k is the output of layer k, and state 0 is the embedding."""
        states = self.vision.layers + 1
        depth = self.feature_layer % states
        if not -states <= self.feature_layer < states:
            raise ValueError(f"feature_layer {self.feature_layer} is outside the tower's {states} hidden states")
        return depth
