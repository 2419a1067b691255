"""Recognize what a config.json describes, and refuse what would be computed otherwise than its authors do.

All of it is known before any weight is downloaded or read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from reverie_jax.errors import CheckpointError

Json = dict[str, Any]

_OTHER_TOWERS = re.compile("siglip|dino|eva[-_0-9]|intern_?vit|convnext|mobileclip|languagebind|imagebind")
"""Parts of the names of vision towers that are not CLIP's."""

UNNAMED_TOWER = "vision_tower"
"""What this project writes for a tower whose name it does not know: checksums then say which one it is."""

LANGUAGE_MODELS = ("llama", "phi3")

_OTHERS = re.compile(
    "mistral|mixtral|ministral|qwen|gemma|(?<!o)mpt|granite|cohere|stablelm|falcon|internlm|baichuan|deepseek|olmo|openelm"
    "|bloom|gpt|chatglm|minicpm|smollm|exaone|mamba|jamba|yi_|mgm|mini_gemini|mipha|bunny|moe|mobile|tinyllava|video"
)
"""Parts of `model_type` and `architectures` of language models and of LLaVA's relatives that are not supported."""

# Settings that change what a decoder computes, with the values under which it is a plain LLaMA or Phi-3.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"), (1,)
    ),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "clip_qkv"), ()),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "no_rope_layers"), ()),
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "qk_norm", "use_parallel_residual", "parallel_attn", "alibi"), ()),
    **dict.fromkeys(("bias", "qkv_bias", "use_bias", "attention_bias", "mlp_bias", "attention_out_bias"), ()),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (1,)),
    "tie_word_embeddings": (),
}


ConfigFormat = Literal["llava-hf", "llava", "llm", "clip", "orbax"]


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
    if kind in ("clip", "clip_vision_model"):
        return "clip"
    if isinstance(text, dict) and isinstance(vision, dict):
        _check_type(path, "model_type", config, ("llava",))
        _check_type(path, "text_config.model_type", text, LANGUAGE_MODELS)
        _check_type(path, "vision_config.model_type", vision, ("clip_vision_model",))
        return "llava-hf"
    if tower_name(config) or str(kind).startswith("llava"):
        check_original(path, config)
        return "llava"
    if kind in LANGUAGE_MODELS:
        return "llm"
    raise CheckpointError(
        f"{path}: unknown model {kind!r}; supported are llava-hf (text_config and vision_config), original LLaVA"
        f" (mm_vision_tower), {', '.join(LANGUAGE_MODELS)} and CLIP"
    )


def tower_name(config: Json) -> str:
    """Return the name of the vision tower's repository in an original LLaVA's config.json; empty without one."""
    return str(config.get("mm_vision_tower") or config.get("vision_tower") or "")


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
    """Check that the config.json of an original LLaVA names a language model and a vision tower that are supported.

    Raises:
        CheckpointError: It names others.
    """
    original_language_model(path, config)
    if _OTHER_TOWERS.search(repository_name(tower_name(config)).lower()):
        raise CheckpointError(f"{path}: vision tower {tower_name(config)} is not supported; only CLIP's are")


def original_language_model(path: Path, config: Json) -> str:
    """Return which of `LANGUAGE_MODELS` the config.json of an original LLaVA describes, by its names.

    Raises:
        CheckpointError: It is another one, or unknown.
    """
    kind, classes = str(config.get("model_type") or ""), config.get("architectures") or []
    names = " ".join([kind, *map(str, classes if isinstance(classes, list) else [classes])]).lower()
    said = f"{path}: model_type {kind!r}, architectures {classes}"
    if other := _OTHERS.search(names):
        raise CheckpointError(f"{said}: {other[0].strip('_')} is not supported; only LLaMA and Phi-3 are")
    if "phi" in names:
        if "rms_norm_eps" not in config or str(config.get("hidden_act", "silu")).startswith("gelu"):
            signs = ", ".join(f"{key} {config.get(key)!r}" for key in ("hidden_act", "rms_norm_eps"))
            raise CheckpointError(f"{said}: Phi-2 is not supported ({signs}); Phi-3 is")
        return "phi3"
    if (classes and not re.search(r"llama|llavaforcausallm", names)) or not re.search(r"llama|^llava\b|share4v", names):
        raise CheckpointError(f"{said}: an unknown language model; only LLaMA and Phi-3 are supported")
    return "llama"


def check_decoder(path: Path, config: Json) -> None:
    """Check that no setting of a decoder's config.json makes it compute something else than a plain LLaMA or Phi-3.

    Raises:
        CheckpointError: One does; the message names it.
    """
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        if value and value not in neutral:
            raise CheckpointError(f"{path}: {key} {value!r} in the language model is not supported")
