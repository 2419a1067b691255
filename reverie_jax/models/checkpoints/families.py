"""Recognize what a config.json describes, and refuse what would be computed otherwise than its authors do.

All of it is known before any weight is downloaded or read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from reverie_jax.errors import CheckpointError
from reverie_jax.models.config import System

Json = dict[str, Any]

_OTHER_TOWERS = re.compile("dino|eva[-_0-9]|beit|intern_?vit|convnext|mobileclip|languagebind|imagebind")
"""Parts of the names of vision towers that are neither CLIP's nor SigLIP's."""

UNNAMED_TOWER = "vision_tower"
"""What this project writes for a tower whose name it does not know: checksums then say which one it is."""

LANGUAGE_MODELS = ("llama", "mistral", "phi3", "phi", "qwen", "qwen2", "qwen3", "stablelm", "stablelm_epoch")
"""`model_type` of the language models that are supported."""

TOWER_MODELS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
"""Likewise of vision towers."""

_NAMES = "LLaMA, Mistral, Phi-2, Phi-3, Qwen and StableLM"

_OTHERS = re.compile(
    "mixtral|ministral|qwen\\d?_?(vl|moe|next)|gemma|(?<!o)mpt|granite|cohere|falcon|internlm|baichuan|deepseek|olmo|openelm"
    "|bloom|gpt|chatglm|minicpm|smollm|exaone|mamba|jamba|yi_|mgm|mini_gemini|mipha|bunny|mobile|tiny_?llava|video"
    "|onevision|llava_?next|moe(?!_?llava)"
)
"""Parts of `model_type` and `architectures` of language models and of LLaVA's relatives that are not supported."""

# Settings that change what a decoder computes, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"), (1,)
    ),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "clip_qkv"), ()),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "no_rope_layers"), ()),
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "qk_norm", "use_parallel_residual", "parallel_attn", "alibi"), ()),
    **dict.fromkeys(("bias", "qkv_bias", "use_bias", "attention_bias", "mlp_bias", "attention_out_bias"), ()),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (1,)),
}

# Those of them that the families support.
_SUPPORTED: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "qwen3": ("attention_bias",),
    "stablelm": ("use_parallel_residual",),
    "stablelm_epoch": ("use_parallel_residual",),
}


_VARYING = "a picture's number of tokens varies, as in LLaVA-NeXT and LLaVA-OneVision"
_MARKS = "pictures are between tokens of their own, as in LLaVA's first version, its deltas and LISA"
# What original LLaVA's settings may say of how tower and language model are connected, and what other values mean.
_CONNECTION: dict[str, tuple[tuple[Any, ...], str]] = {
    "mm_patch_merge_type": (("flat",), _VARYING),
    "image_aspect_ratio": (("pad", "square", "stretch"), _VARYING),
    "mm_use_im_start_end": ((False,), _MARKS),
    "mm_resampler_type": (("", False), "a resampler is between tower and projector"),
    "mm_projector_type": (("linear", "mlp2x_gelu"), "another projector"),
    "image_projector_type": (("linear", "mlp2x_gelu"), "another projector"),
    "mm_vision_select_feature": (("patch", "cls_patch"), "other features of the tower"),
    "mm_video_tower": (("", False), "a second tower is for videos"),
    "s2": ((False,), "features of several scales"),
}


ConfigFormat = Literal["llava-hf", "llava", "llm", "clip", "orbax", "sister"]

SISTERS: dict[System, tuple[str, str]] = {
    "minigpt4": ("minigpt4", "MiniGPT4"),
    "mplug-owl": ("mplug-owl", "MplugOwlForConditionalGeneration"),
    "muffin": ("beit3_llava", "Beit3LlavaLlamaForCausalLM"),
}
"""`model_type` and class of the sister systems."""


def detect_format(path: Path, config: Json) -> ConfigFormat:
    """Return which format of model a config.json describes.

    Args:
        path: The file, for messages.
        config: Its content.

    Raises:
        CheckpointError: It is not supported, or its weights are quantized; the message names the setting.
    """
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and (settings := part.get(key)):
                method = settings.get("quant_method", settings) if isinstance(settings, dict) else settings
                raise CheckpointError(
                    f"{path}: {key}: weights that are quantized ({method}) are not supported; use the model that they were"
                    " made from (a recipe's `quantization` quantizes it)"
                )
    kind, text, vision = config.get("model_type"), config.get("text_config"), config.get("vision_config")
    if kind == "reverie":
        return "orbax"
    if kind in TOWER_MODELS:
        return "clip"
    if any(kind == model_type for model_type, _ in SISTERS.values()):
        return "sister"
    if isinstance(text, dict) and isinstance(vision, dict):
        if re.search("next|onevision|video", str(kind)):
            raise CheckpointError(f"{path}: model_type {kind!r} is not supported ({_VARYING})")
        _check_type(path, "model_type", config, ("llava", "vipllava"))
        _check_type(path, "text_config.model_type", text, LANGUAGE_MODELS)
        _check_type(path, "vision_config.model_type", vision, TOWER_MODELS)
        return "llava-hf"
    if tower_name(config) or str(kind).startswith(("llava", "moe_llava")):
        check_original(path, config)
        return "llava"
    if kind in LANGUAGE_MODELS:
        return "llm"
    raise CheckpointError(
        f"{path}: unknown model {kind!r}; supported are llava-hf (text_config and vision_config), original LLaVA"
        f" (mm_vision_tower), {', '.join(LANGUAGE_MODELS)}, CLIP, SigLIP, mPLUG-Owl and Muffin"
    )


def tower_name(config: Json) -> str:
    """Return the name of the vision tower's repository in an original LLaVA's config.json; empty without one."""
    keys = ("mm_vision_tower", "mm_image_tower", "vision_tower")  # the second is MoE-LLaVA's
    return next((str(config[key]) for key in keys if config.get(key)), "")


def tunes_tower(config: Json) -> bool:
    """Return whether an original LLaVA's config.json says that its vision tower was tuned with it."""
    return bool(config.get("unfreeze_mm_vision_tower")) or "vision_tower" in str(config.get("mm_tunable_parts") or "")


def repository_name(path: str | Path) -> str:
    """Return the last part of a hub id or path, or the repository's name where the path is in the hub's cache."""
    parts = str(path).rstrip("/").split("/")
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return (cached or parts)[-1]


def _check_type(path: Path, name: str, config: Json, supported: tuple[str, ...]) -> None:
    value = config.get("model_type")
    if value is not None and value not in supported:
        raise CheckpointError(f"{path}: {name} {value!r} is not supported; must be {' or '.join(supported)}")


def check_original(path: Path, config: Json) -> None:
    """Check that language model, vision tower and their connection are supported, by the config.json of an original LLaVA.

    Raises:
        CheckpointError: One is not.
    """
    original_language_model(path, config)
    check_connection(path, config)
    if _OTHER_TOWERS.search(repository_name(tower_name(config)).lower()):
        raise CheckpointError(
            f"{path}: vision tower {tower_name(config)} is not supported; only CLIP's and SigLIP's are"
        )


def check_connection(path: Path, config: Json) -> None:
    """Check how original LLaVA's settings connect vision tower and language model.

    Raises:
        CheckpointError: In a way that is not supported.
    """
    for key, (supported, meaning) in _CONNECTION.items():
        value = config.get(key)
        if value is not None and value not in supported:
            raise CheckpointError(f"{path}: {key} {value!r} is not supported ({meaning})")


def check_folders(path: str | Path, folders: Iterable[str]) -> None:
    """Check by a model's subfolders that it is not in XTuner's layout, which its config.json does not tell.

    Raises:
        CheckpointError: It is.
    """
    layout = {"llm_adapter", "projector", "visual_encoder", "visual_encoder_adapter"}
    if found := sorted(layout.intersection(folders)):
        raise CheckpointError(
            f"{path}: an XTuner folder ({', '.join(found)}), whose layout is not supported; use its export in llava-hf or"
            " original LLaVA format"
        )


def original_language_model(path: Path, config: Json) -> str:
    """Return which of `LANGUAGE_MODELS` the config.json of an original LLaVA describes, by its names.

    Raises:
        CheckpointError: It is another one, or unknown.
    """
    kind, classes = str(config.get("model_type") or ""), config.get("architectures") or []
    names = " ".join([kind, *map(str, classes if isinstance(classes, list) else [classes])]).lower()
    said = f"{path}: model_type {kind!r}, architectures {classes}"
    if other := _OTHERS.search(names):
        raise CheckpointError(f"{said}: {other[0].strip('_')} is not supported; only {_NAMES} are")
    if "stablelm" in names:
        return "stablelm_epoch" if {"rope_pct", "norm_eps"} & config.keys() else "stablelm"
    if "qwen" in names:
        if "qwen3" in names:
            return "qwen3"
        return "qwen" if "rms_norm_eps" not in config and "layer_norm_epsilon" in config else "qwen2"
    if "mistral" in names:
        return "mistral"
    if "phi" in names:
        return "phi3" if "rms_norm_eps" in config else "phi"
    if (classes and not re.search(r"llama|llavaforcausallm", names)) or not re.search(r"llama|^llava\b|share4v", names):
        raise CheckpointError(f"{said}: an unknown language model; only {_NAMES} are supported")
    return "llama"


def check_decoder(path: Path, config: Json, kind: str) -> None:
    """Check that no setting of a decoder's config.json makes it compute something that is not supported.

    Args:
        path: The file, for messages.
        config: Its content.
        kind: One of `LANGUAGE_MODELS`.

    Raises:
        CheckpointError: One does; the message names it.
    """
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        if value and value not in neutral and key not in _SUPPORTED.get(kind, ()):
            raise CheckpointError(f"{path}: {key} {value!r} in the language model is not supported")
