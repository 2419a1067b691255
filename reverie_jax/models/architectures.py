"""Sizes of published models: vision towers by the names that checkpoints give them, and whole models for recipes."""

from __future__ import annotations

import dataclasses
from typing import Any

from reverie_jax.models.config import ResamplerConfig, TextConfig, VisionConfig, VLMConfig

_CLIP_L = VisionConfig(hidden=1024, layers=24, heads=16, mlp=4096, image_size=224, patch_size=14)
_CLIP_L_336 = dataclasses.replace(_CLIP_L, image_size=336)

_SIGLIP_SO400M = VisionConfig(
    hidden=1152,
    layers=27,
    heads=16,
    mlp=4304,
    image_size=384,
    patch_size=14,
    norm_eps=1e-6,
    activation="gelu_tanh",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

_EVA_G = VisionConfig(
    hidden=1408,
    layers=39,
    heads=16,
    mlp=6144,
    image_size=224,
    patch_size=14,
    norm_eps=1e-6,
    activation="gelu",
    pre_norm=False,
    patch_bias=True,
    qkv="fused",
    key_bias=False,
    output_norm=True,
    output_norm_eps=1e-5,
    resampler=ResamplerConfig("qformer", queries=32, hidden=768, layers=12, heads=12, mlp=3072, norm_eps=1e-12),
)
_MPLUG_OWL = dataclasses.replace(
    _CLIP_L,
    norm_eps=1e-6,
    qkv="interleaved",
    output_norm=True,
    resampler=ResamplerConfig("abstractor", queries=64, hidden=1024, layers=6, heads=16, mlp=4096, norm_eps=1e-5),
)
_BEIT3_L = VisionConfig(
    hidden=1024,
    layers=24,
    heads=16,
    mlp=4096,
    image_size=448,
    patch_size=16,
    activation="gelu",
    pre_norm=False,
    patch_bias=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    output_norm=True,
    queries=64,
    query_positions=1024,
    position_offset=2,
)

TOWERS: dict[str, VisionConfig] = {
    "openai/clip-vit-large-patch14": _CLIP_L,
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
    "google/siglip-so400m-patch14-384": _SIGLIP_SO400M,
}
"""Towers that LLaVA and MoE-LLaVA use, by repository."""

_STABLELM_1_6B = TextConfig(
    vocab=100352,
    hidden=2048,
    layers=24,
    heads=32,
    kv_heads=32,
    head_dim=64,
    mlp=5632,
    norm="layernorm",
    rotary_fraction=0.25,
    qkv_bias=True,
)
_QWEN_1_8B = TextConfig(
    vocab=151936,
    hidden=2048,
    layers=24,
    heads=16,
    kv_heads=16,
    head_dim=128,
    mlp=5504,
    norm_eps=1e-6,
    max_positions=8192,
    fused_qkv=True,
    qkv_bias=True,
)
_PHI_2 = TextConfig(
    vocab=51200,
    hidden=2560,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=80,
    mlp=10240,
    max_positions=2048,
    norm="layernorm",
    activation="gelu_tanh",
    gated=False,
    parallel=True,
    rotary_fraction=0.4,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
)
_VICUNA_7B = TextConfig(vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11008)
_VICUNA_13B = TextConfig(vocab=32000, hidden=5120, layers=40, heads=40, kv_heads=40, head_dim=128, mlp=13824)
_PHI3_MINI = TextConfig(
    vocab=32064,
    hidden=3072,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=96,
    mlp=8192,
    fused_qkv=True,
    fused_mlp=True,
    sliding_window=2047,
)


def _llava(text: TextConfig, tower: str, **fields: Any) -> VLMConfig:
    return VLMConfig(
        TOWERS[tower],
        text,
        vision_tower=tower,
        image_token_id=0,
        tokenization="llava",
        **{"template": "vicuna_v1", **fields},
    )


def _moe_llava(text: TextConfig) -> VLMConfig:
    """Return MoE-LLaVA after its second stage; the third replaces MLPs by experts (a recipe's `upcycle`)."""
    return _llava(text, "openai/clip-vit-large-patch14-336", template="moe_llava")


_LLAMA_7B = dataclasses.replace(_VICUNA_7B, norm_eps=1e-6, max_positions=2048)


def _sister(vision: VisionConfig, text: TextConfig, template: str, tower: str, **fields: Any) -> VLMConfig:
    return VLMConfig(
        vision,
        text,
        projector="linear",
        feature_layers=(-1,),
        feature_select="full",
        template=template,
        tokenization="llava",
        image_aspect_ratio="stretch",
        vision_tower=tower,
        **{"image_token_id": 0, **fields},
    )


ARCHITECTURES: dict[str, VLMConfig] = {
    "llava-1.0-7b": _llava(
        _LLAMA_7B,
        "openai/clip-vit-large-patch14",
        projector="linear",
        image_aspect_ratio="square",
    ),
    "llava-1.5-7b": _llava(_VICUNA_7B, "openai/clip-vit-large-patch14-336"),
    "llava-1.5-13b": _llava(_VICUNA_13B, "openai/clip-vit-large-patch14-336"),
    "llava-phi3-mini": _llava(_PHI3_MINI, "openai/clip-vit-large-patch14-336", template="phi3_instruct"),
    "moe-llava-stablelm-1.6b": _moe_llava(_STABLELM_1_6B),
    "moe-llava-qwen-1.8b": _moe_llava(_QWEN_1_8B),
    "moe-llava-phi2-2.7b": _moe_llava(_PHI_2),
    "minigpt4-7b": _sister(_EVA_G, _LLAMA_7B, "minigpt4", "eva_clip_g"),
    "mplug-owl-7b": _sister(_MPLUG_OWL, _LLAMA_7B, "mplug_owl", "", projector_token=True),
    "muffin-13b": _sister(
        _BEIT3_L,
        dataclasses.replace(_VICUNA_13B, vocab=32004, norm_eps=1e-6, max_positions=2048),
        "muffin",
        "beit3_large_patch16_448",
        image_token_id=32001,
    ),
}
"""The models that recipes start from (haotian-liu/LLaVA, mbzuai-oryx/LLaVA-pp, PKU-YuanGroup/MoE-LLaVA,
Vision-CAIR/MiniGPT-4, X-PLUG/mPLUG-Owl, thunlp/Muffin)."""
