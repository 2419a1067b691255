"""Convert config.json of llava-hf, original LLaVA, LLaMA, Phi-3 and CLIP to architectures and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.families import (
    LANGUAGE_MODELS,
    UNNAMED_TOWER,
    Json,
    check_decoder,
    repository_name,
    tower_name,
)
from reverie_jax.models.checkpoints.processing import check_image_processor, choice, read_stop_ids
from reverie_jax.models.config import (
    CLIP_TOWERS,
    Activation,
    ImageAspectRatio,
    ProjectorKind,
    TextConfig,
    Tokenization,
    VisionConfig,
    VLMConfig,
)
from reverie_jax.models.vision import CLIP_MEAN, CLIP_STD

TOWER_KEY = "reverie_vision_config"
"""Key for the vision tower's sizes in an original LLaVA's config.json that this project wrote: the format has none."""

# Defaults of the transformers classes LlamaConfig and Phi3Config, for keys that a config.json omits.
_DEFAULTS: dict[str, Json] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
}


def text_config(path: Path, raw: Json, kind: str) -> TextConfig:
    """Return the decoder that the keys of a LLaMA or Phi-3 describe.

    Args:
        path: The config.json, for messages.
        raw: Its content.
        kind: One of `LANGUAGE_MODELS`.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    raw = {**_DEFAULTS[kind], **_given(raw)}
    check_decoder(path, raw)
    choice(path, raw, "hidden_act", "silu", ("silu", "swish"))
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if raw.get("rope_scaling") not in (None, {}, rope):
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling differ; they are two names of one setting")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: rope_parameters or rope_scaling must be an object of values, not {rope!r}")
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise CheckpointError(f"{path}: rope scaling {scaling!r} is not supported")
    for settings in (rope, raw):
        choice(path, settings, "partial_rotary_factor", 1.0, (1.0,))
    heads, hidden = _size(path, raw, "num_attention_heads"), _size(path, raw, "hidden_size")
    config = TextConfig(
        vocab=_size(path, raw, "vocab_size"),
        hidden=hidden,
        layers=_size(path, raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_size(path, {"num_key_value_heads": heads, **raw}, "num_key_value_heads"),
        head_dim=_size(path, {"head_dim": hidden // heads, **raw}, "head_dim"),
        mlp=_size(path, raw, "intermediate_size"),
        norm_eps=_number(path, raw, "rms_norm_eps"),
        rope_theta=_number(path, {"rope_theta": 10000.0, **raw, **_given(rope)}, "rope_theta"),
        max_positions=_size(path, raw, "max_position_embeddings"),
        fused=kind == "phi3",
        sliding_window=_size(path, raw, "sliding_window") if kind == "phi3" and "sliding_window" in raw else None,
    )
    _check_divisible(path, config.heads, config.kv_heads, "num_attention_heads", "num_key_value_heads")
    _check_divisible(path, config.head_dim, 2, "head_dim", "2")
    return config


def vision_config(path: Path, raw: Json) -> VisionConfig:
    """Return the vision tower that the keys of a CLIPVisionConfig describe.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    config = VisionConfig(
        hidden=_size(path, raw, "hidden_size"),
        layers=_size(path, raw, "num_hidden_layers"),
        heads=_size(path, raw, "num_attention_heads"),
        mlp=_size(path, raw, "intermediate_size"),
        image_size=_size(path, raw, "image_size"),
        patch_size=_size(path, raw, "patch_size"),
        norm_eps=_number(path, {"layer_norm_eps": 1e-5, **raw}, "layer_norm_eps"),
        activation=choice(path, raw, "hidden_act", "quick_gelu", get_args(Activation)),
    )
    _check_divisible(path, config.image_size, config.patch_size, "image_size", "patch_size")
    _check_divisible(path, config.hidden, config.heads, "the tower's hidden_size", "its num_attention_heads")
    return config


def _given(raw: Json) -> Json:
    """Return the settings that are not null."""
    return {key: value for key, value in raw.items() if value is not None}


def _size(path: Path, raw: Json, key: str) -> int:
    if key not in raw:
        raise CheckpointError(f"{path}: {key} of the vision tower is missing")
    if type(raw[key]) is not int or raw[key] < 1:
        raise CheckpointError(f"{path}: {key} must be a positive integer, not {raw[key]!r}")
    return int(raw[key])


def _number(path: Path, raw: Json, key: str) -> float:
    if type(raw[key]) not in (int, float) or not 0 < raw[key] < math.inf:
        raise CheckpointError(f"{path}: {key} must be a positive number, not {raw[key]!r}")
    return float(raw[key])


def _check_divisible(path: Path, size: int, divisor: int, size_name: str, divisor_name: str) -> None:
    if size % divisor:
        raise CheckpointError(f"{path}: {size_name} ({size}) must be a multiple of {divisor_name} ({divisor})")


def _int(path: Path, key: str, value: Any) -> int:
    if type(value) is not int:
        raise CheckpointError(f"{path}: {key} must be one integer, not {value!r}")
    return value


def _check_feature_layer(path: Path, config: VLMConfig) -> VLMConfig:
    layer, states = config.feature_layer, config.vision.layers + 1
    if not -states <= layer < states:
        raise CheckpointError(f"{path}: vision_feature_layer {layer} is outside the tower's {states} hidden states")
    return config


def llava_hf_config(folder: Path, raw: Json) -> VLMConfig:
    """Return the architecture of a llava-hf folder (`LlavaConfig`).

    Args:
        folder: The folder, which may have files of the processor too.
        raw: Content of its config.json.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    path = folder / "config.json"
    text, vision = raw.get("text_config"), raw.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(f"{path}: no text_config and vision_config")
    kind = choice(path, text, "model_type", "llama", LANGUAGE_MODELS)
    if raw.get("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError(f"{path}: vision_feature_select_strategy must be 'default' (class token dropped)")
    choice(path, raw, "projector_hidden_act", "gelu", ("gelu",))
    choice(path, raw, "multimodal_projector_bias", True, (True,))
    choice(path, raw, "tie_word_embeddings", False, (False,))
    keys = [key for key in ("image_token_index", "image_token_id") if raw.get(key) is not None]  # of two versions
    if len(image_ids := {str(raw[key]) for key in keys}) > 1:
        raise CheckpointError(f"{path}: image_token_index and image_token_id differ: {' and '.join(sorted(image_ids))}")
    key = (*keys, "image_token_id")[0]
    layer = raw.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) == 1:  # transformers concatenates the features of all
        (layer,) = layer
    tower = vision_config(path, vision)
    aspect = "pad" if check_image_processor(folder, tower.image_size) else "square"
    return _check_feature_layer(
        path,
        VLMConfig(
            vision=tower,
            text=text_config(path, text, kind),
            feature_layer=_int(path, "vision_feature_layer", layer),
            image_token_id=_int(path, key, raw.get(key, 32000)),
            template=str(raw.get("reverie_template", "phi3_instruct" if kind == "phi3" else "llava-hf")),
            tokenization=choice(path, raw, "reverie_tokens", "hf", get_args(Tokenization)),
            image_aspect_ratio=choice(path, raw, "reverie_image_aspect", aspect, get_args(ImageAspectRatio)),
            vision_tower=str(raw.get("reverie_vision_tower", "")),
            stop_ids=read_stop_ids(folder, text),
        ),
    )


def original_config(
    path: Path, raw: Json, text: TextConfig, vision: VisionConfig, projector: ProjectorKind
) -> VLMConfig:
    """Return the architecture of an original LLaVA, from the `mm_*` keys of its config.json, all of them optional.

    Raises:
        CheckpointError: A setting is not supported.
    """
    choice(path, raw, "mm_vision_select_feature", "patch", ("patch",))
    for key in ("mm_use_im_start_end", "s2"):
        choice(path, raw, key, False, (False,))
    choice(path, raw, "mm_patch_merge_type", "flat", ("flat",))
    aspect = choice(path, raw, "image_aspect_ratio", "square", get_args(ImageAspectRatio))
    if raw.get("mm_resampler_type"):
        raise CheckpointError(f"{path}: mm_resampler_type {raw['mm_resampler_type']!r} is not supported")
    layer = raw.get("mm_vision_select_layer")
    return _check_feature_layer(
        path,
        VLMConfig(
            vision=vision,
            text=text,
            projector=projector,
            feature_layer=_int(path, "mm_vision_select_layer", -2 if layer is None else layer),
            # The format has no such token; an image feature replaces whatever token is there.
            image_token_id=_int(path, "image_token_index", raw.get("image_token_index", 0)),
            template=str(raw.get("reverie_template", "phi3_instruct" if text.fused else "vicuna_v1")),
            tokenization=choice(path, raw, "reverie_tokens", "llava", get_args(Tokenization)),
            image_aspect_ratio=aspect,
            vision_tower=tower_name(raw),
        ),
    )


def known_tower(name: str) -> VisionConfig | None:
    """Return the sizes of one of OpenAI's towers by its repository's name, which mirrors and local copies keep."""
    return {repository_name(full): config for full, config in CLIP_TOWERS.items()}.get(repository_name(name))


def _text_json(text: TextConfig) -> Json:
    return {
        "vocab_size": text.vocab,
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.mlp,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        **(
            {"original_max_position_embeddings": text.max_positions, "sliding_window": text.sliding_window}
            if text.fused
            else {"mlp_bias": False}
        ),
    }


def _vision_json(vision: VisionConfig) -> Json:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": vision.activation,
        "projection_dim": vision.hidden,
    }


def _reverie_json(config: VLMConfig) -> Json:
    """Return the settings that travel with a checkpoint under keys of this project."""
    return {
        "reverie_template": config.template,
        "reverie_tokens": config.tokenization,
        "reverie_image_aspect": config.image_aspect_ratio,
        **({"reverie_vision_tower": config.vision_tower} if config.vision_tower else {}),
    }


def llava_hf_json(config: VLMConfig, dtype: str, special_ids: Json) -> Json:
    """Return config.json of a llava-hf folder.

    Args:
        config: The architecture.
        dtype: Name of the weights' dtype.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **_reverie_json(config),
        "vision_config": _vision_json(config.vision),
        "text_config": {
            "model_type": "phi3" if config.text.fused else "llama",
            **_text_json(config.text),
            **special_ids,
        },
    }


def original_json(config: VLMConfig, dtype: str, special_ids: Json, *, tower_included: bool = True) -> Json:
    """Return the flat config.json of an original LLaVA (LLaVA-pp where the decoder is Phi-3).

    Original LLaVA loads the tower that is named, and then, if told so, the weights that are included.

    Args:
        config: As for `llava_hf_json`.
        dtype: As for `llava_hf_json`.
        special_ids: As for `llava_hf_json`.
        tower_included: Whether the weights include the vision tower.
    """
    phi = config.text.fused
    tower, own_tower = config.vision_tower or UNNAMED_TOWER, False
    if tower_included:
        own_tower = known_tower(tower) != config.vision
        tower = next((name for name, sizes in CLIP_TOWERS.items() if sizes == config.vision), tower)
    return {
        "architectures": ["LlavaPhiForCausalLM" if phi else "LlavaLlamaForCausalLM"],
        "model_type": "llava_phi" if phi else "llava_llama",
        "torch_dtype": dtype,
        **_text_json(config.text),
        **special_ids,
        "use_cache": True,
        "use_mm_proj": True,
        "mm_vision_tower": tower,
        **({"unfreeze_mm_vision_tower": True} if own_tower else {}),
        "mm_hidden_size": config.vision.hidden,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": config.image_aspect_ratio,
        # Only where the tokenizer has such a token: the original has none.
        **({"image_token_index": config.image_token_id} if config.tokenization == "hf" else {}),
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        TOWER_KEY: _vision_json(config.vision),
        **_reverie_json(config),
    }


def preprocessor_json(config: VLMConfig) -> Json:
    """Return preprocessor_config.json: transformers' LLaVA processor if images are padded, CLIP's if they are cropped."""
    size, padded = config.vision.image_size, config.image_aspect_ratio == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if padded else "CLIPImageProcessor",
        **({"do_pad": True} if padded else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
