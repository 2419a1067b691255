"""Convert config.json of LLaVAs and vision towers to architectures and back; language models: see `decoders`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

from reverie_jax.errors import CheckpointError
from reverie_jax.models.architectures import TOWERS
from reverie_jax.models.checkpoints.decoders import (
    ACTIVATIONS,
    hf_activation,
    text_config,
    text_json,
)
from reverie_jax.models.checkpoints.families import (
    LANGUAGE_MODELS,
    UNNAMED_TOWER,
    Json,
    check_connection,
    repository_name,
    tower_name,
)
from reverie_jax.models.checkpoints.names import is_moe_llava
from reverie_jax.models.checkpoints.processing import (
    channels,
    check_divisible,
    choice,
    number,
    read_image_processor,
    read_stop_ids,
    size,
)
from reverie_jax.models.config import (
    CLIP_MEAN,
    CLIP_STD,
    ImageAspectRatio,
    ProjectorKind,
    TextConfig,
    Tokenization,
    VisionConfig,
    VLMConfig,
)

TOWER_KEY = "reverie_vision_config"
"""Key for the vision tower's sizes in an original LLaVA's config.json that this project wrote: the format has none."""


def vision_config(path: Path, raw: Json) -> VisionConfig:
    """Return the vision tower that the keys of a CLIPVisionConfig or SiglipVisionConfig describe.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    siglip = str(raw.get("model_type", "")).startswith("siglip")
    eps, activation = (1e-6, "gelu_pytorch_tanh") if siglip else (1e-5, "quick_gelu")
    half = (0.5, 0.5, 0.5)
    config = VisionConfig(
        hidden=size(path, raw, "hidden_size"),
        layers=size(path, raw, "num_hidden_layers"),
        heads=size(path, raw, "num_attention_heads"),
        mlp=size(path, raw, "intermediate_size"),
        image_size=size(path, raw, "image_size"),
        patch_size=size(path, raw, "patch_size"),
        norm_eps=number(path, {"layer_norm_eps": eps, **raw}, "layer_norm_eps"),
        activation=ACTIVATIONS[choice(path, raw, "hidden_act", activation, tuple(ACTIVATIONS))],
        class_token=not siglip,
        pre_norm=not siglip,
        patch_bias=siglip,
        # Where this project wrote them; otherwise they are in the image processor's file.
        mean=channels(path, raw, "image_mean", half if siglip else CLIP_MEAN),
        std=channels(path, raw, "image_std", half if siglip else CLIP_STD),
    )
    if not siglip:
        check_divisible(path, config.image_size, config.patch_size, "image_size", "patch_size")
    check_divisible(path, config.hidden, config.heads, "the tower's hidden_size", "its num_attention_heads")
    return config


def _int(path: Path, key: str, value: Any) -> int:
    if type(value) is not int:
        raise CheckpointError(f"{path}: {key} must be one integer, not {value!r}")
    return value


def _check_feature_layers(path: Path, config: VLMConfig) -> VLMConfig:
    try:
        depths = config.feature_depths
    except ValueError as error:
        raise CheckpointError(f"{path}: vision_feature_layer: {error}") from None
    if not depths:
        raise CheckpointError(f"{path}: vision_feature_layer must name at least one layer")
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
    vip = raw.get("model_type") == "vipllava"
    keys = [key for key in ("image_token_index", "image_token_id") if raw.get(key) is not None]  # of two versions
    if len(image_ids := {str(raw[key]) for key in keys}) > 1:
        raise CheckpointError(f"{path}: image_token_index and image_token_id differ: {' and '.join(sorted(image_ids))}")
    key = (*keys, "image_token_id")[0]
    layers = raw.get("vision_feature_layer", -2)
    if vip:  # of two versions
        layers = raw.get("vision_feature_layers", raw.get("vision_feature_layer", [-2, -5, -8, -11, 6]))
    tower, aspect = read_image_processor(folder, vision_config(path, vision))
    strategy = choice(path, raw, "vision_feature_select_strategy", "default", ("default", "full"))
    activation = choice(path, raw, "projector_hidden_act", "gelu", tuple(ACTIVATIONS))
    decoder = text_config(path, text, kind)
    if raw.get("tie_word_embeddings"):
        decoder = dataclasses.replace(decoder, tied_head=True)
    return _check_feature_layers(
        path,
        VLMConfig(
            vision=tower,
            text=decoder,
            projector_activation=ACTIVATIONS[activation],
            projector_bias=vip or bool(choice(path, raw, "multimodal_projector_bias", True, (True, False))),
            projector_norm_eps=number(path, {"projector_layernorm_eps": 1e-5, **raw}, "projector_layernorm_eps")
            if vip
            else None,
            # transformers concatenates the features of several
            feature_layers=tuple(
                _int(path, "vision_feature_layer", layer)
                for layer in (layers if isinstance(layers, list) else [layers])
            ),
            feature_select="full" if strategy == "full" and not vip else "patch",
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
    check_connection(path, raw)
    aspect = choice(path, raw, "image_aspect_ratio", "square", get_args(ImageAspectRatio))
    if aspect == "square" and not vision.class_token:  # SigLIP's image processor does not crop
        aspect = "stretch"
    layer = raw.get("mm_vision_select_layer")
    moe = text.experts is not None or bool(raw.get("mm_image_tower"))
    # Without a class token, original LLaVA's code for SigLIP keeps all patches; MoE-LLaVA's drops the first.
    full = raw.get("mm_vision_select_feature") == "cls_patch" or not (vision.class_token or moe)
    return _check_feature_layers(
        path,
        VLMConfig(
            vision=vision,
            text=text,
            projector=projector,
            feature_layers=(_int(path, "mm_vision_select_layer", -2 if layer is None else layer),),
            feature_select="full" if full else "patch",
            # The format has no such token; an image feature replaces whatever token is there.
            image_token_id=_int(path, "image_token_index", raw.get("image_token_index", 0)),
            template=str(raw.get("reverie_template", "phi3_instruct" if text.fused_mlp else "vicuna_v1")),
            tokenization=choice(path, raw, "reverie_tokens", "llava", get_args(Tokenization)),
            image_aspect_ratio=aspect,
            vision_tower="" if (name := tower_name(raw)) == UNNAMED_TOWER else name,
        ),
    )


def known_tower(name: str) -> VisionConfig | None:
    """Return the sizes of a known tower by its repository's name, which mirrors and local copies keep."""
    return {repository_name(full): config for full, config in TOWERS.items()}.get(repository_name(name))


def _vision_json(vision: VisionConfig) -> Json:
    siglip = not vision.class_token
    return {
        "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
        "hidden_size": vision.hidden,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": hf_activation(vision.activation),
        **({"vision_use_head": False} if siglip else {"projection_dim": vision.hidden}),
    }


def with_own_settings(path: Path, config: VLMConfig, raw: Json) -> VLMConfig:
    """Return an architecture with the settings that a config.json has under keys of this project.

    Raises:
        CheckpointError: One is invalid.
    """
    return dataclasses.replace(
        config,
        template=str(raw.get("reverie_template", config.template)),
        tokenization=choice(path, raw, "reverie_tokens", config.tokenization, get_args(Tokenization)),
        image_aspect_ratio=choice(
            path, raw, "reverie_image_aspect", config.image_aspect_ratio, get_args(ImageAspectRatio)
        ),
        vision_tower=str(raw.get("reverie_vision_tower", config.vision_tower)),
    )


def own_settings(config: VLMConfig) -> Json:
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
    vip = config.projector_norm_eps is not None
    layers = list(config.feature_layers)
    own: Json = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "full" if config.feature_select == "full" else "default",
        "multimodal_projector_bias": config.projector_bias,
    }
    if vip:
        own = {
            "architectures": ["VipLlavaForConditionalGeneration"],
            "model_type": "vipllava",
            "vision_feature_layers": layers,
            "projector_layernorm_eps": config.projector_norm_eps,
        }
    return {
        **own,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": hf_activation(config.projector_activation),
        "tie_word_embeddings": config.text.tied_head,
        "torch_dtype": dtype,
        **own_settings(config),
        "vision_config": _vision_json(config.vision),
        "text_config": {"model_type": config.text.family, **text_json(config.text), **special_ids},
    }


def original_json(config: VLMConfig, dtype: str, special_ids: Json, *, tower_included: bool = True) -> Json:
    """Return the flat config.json of an original LLaVA, or of a MoE-LLaVA (see `names.is_moe_llava`).

    Original LLaVA loads the tower that is named, and then, if told so, the weights that are included.

    Args:
        config: As for `llava_hf_json`.
        dtype: As for `llava_hf_json`.
        special_ids: As for `llava_hf_json`.
        tower_included: Whether the weights include the vision tower.
    """
    family = "phi" if config.text.family == "phi3" else config.text.family
    moe, experts = is_moe_llava(config), config.text.experts is not None
    name = {"stablelm": "Stablelm", "qwen": "QWen"}.get(family, family.capitalize())
    tower, own_tower = config.vision_tower or UNNAMED_TOWER, False
    if tower_included:
        own_tower = known_tower(tower) != config.vision
        tower = next((name for name, sizes in TOWERS.items() if sizes == config.vision), tower)
    return {
        "architectures": [f"MoELLaVA{name}ForCausalLM" if experts else f"Llava{name}ForCausalLM"],
        "model_type": f"moe_llava_{family}" if experts else f"llava_{family}",
        "torch_dtype": dtype,
        **text_json(config.text),
        **special_ids,
        "use_cache": True,
        "use_mm_proj": True,
        "mm_image_tower" if moe else "mm_vision_tower": tower,
        **({"unfreeze_mm_vision_tower": True} if own_tower else {}),
        "mm_hidden_size": config.vision.hidden,
        "image_projector_type" if moe else "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.feature_layers[0],
        "mm_vision_select_feature": "cls_patch"
        if config.feature_select == "full" and config.vision.class_token
        else "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": config.image_aspect_ratio,
        # Only where the tokenizer has such a token: the original has none.
        **({"image_token_index": config.image_token_id} if config.tokenization == "hf" else {}),
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        TOWER_KEY: {
            **_vision_json(config.vision),
            "image_mean": list(config.vision.mean),
            "image_std": list(config.vision.std),
        },
        **own_settings(config),
    }


def preprocessor_json(config: VLMConfig) -> Json:
    """Return preprocessor_config.json: transformers' LLaVA processor if images are padded, SigLIP's or CLIP's otherwise."""
    size, aspect = config.vision.image_size, config.image_aspect_ratio
    square = {"height": size, "width": size}
    kinds = {"pad": "LlavaImageProcessor", "square": "CLIPImageProcessor", "stretch": "SiglipImageProcessor"}
    crop: Json = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    return {
        "image_processor_type": kinds[aspect],
        **({"do_pad": True} if aspect == "pad" else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        **({"size": square} if aspect == "stretch" else crop),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.vision.mean),
        "image_std": list(config.vision.std),
    }
