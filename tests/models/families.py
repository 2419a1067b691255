"""Tiny models of every family in transformers' classes, and the files in which each format has them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import makers
from tests.models.makers import Tensors
from tests.models.oracle import IMAGE, randomize

BASE = {"vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 3, "intermediate_size": 52, "num_attention_heads": 6}
BASE |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
RMS, WIDE = {"rms_norm_eps": 1e-3}, {"head_dim": 10}  # not hidden / heads
LAYER = {"layer_norm_eps": 1e-3}


def rope(kind="default", theta=500.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}
# Class in transformers, its settings, and what our configuration must say of them.
TEXTS = {
    "llama": ("Llama", RMS | WIDE | rope(), {}),
    "llama, attention bias": ("Llama", RMS | WIDE | {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    "llama, MLP bias": ("Llama", RMS | WIDE | {"mlp_bias": True}, {"mlp_bias": True}),
    "llama, both biases": ("Llama", RMS | {"attention_bias": True, "mlp_bias": True}, {"mlp_bias": True}),
    "llama, tied": ("Llama", RMS | WIDE | {"tie_word_embeddings": True}, {"tied_head": True}),
    "llama, exact GELU": ("Llama", RMS | {"hidden_act": "gelu"}, {"activation": "gelu"}),
    "llama, ReLU": ("Llama", RMS | {"hidden_act": "relu"}, {"activation": "relu"}),
    "llama, tanh GELU": ("Llama", RMS | {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    "llama, linear rope": ("Llama", RMS | WIDE | rope("linear", factor=3.0), {}),
    "llama, dynamic rope": ("Llama", RMS | WIDE | rope("dynamic", factor=3.0), {"rope_scaling": None}),
    "llama, llama3 rope": ("Llama", RMS | WIDE | rope("llama3", **LLAMA3), {}),
    "llama, Phi-3 in its layout": ("Llama", RMS | {"sliding_window": 4}, {"sliding_window": None}),
    "mistral": ("Mistral", RMS | WIDE | rope() | {"sliding_window": 80}, {"sliding_window": 80}),
    "mistral, no window": ("Mistral", RMS | {"sliding_window": None}, {"sliding_window": None}),
    "phi3": ("Phi3", RMS | rope() | {"sliding_window": 90}, {"sliding_window": 90, "fused_qkv": True}),
    "phi3, partial rotary": ("Phi3", RMS | rope(partial_rotary_factor=0.67), {"rotary_fraction": 0.67}),
    "phi": ("Phi", LAYER | WIDE | rope(partial_rotary_factor=0.4), {"rotary_fraction": 0.4, "parallel": True}),
    "phi, exact GELU": ("Phi", LAYER | {"hidden_act": "gelu", "num_attention_heads": 4, "num_key_value_heads": 4}, {}),
    "stablelm": ("StableLm", LAYER | rope(partial_rotary_factor=0.34) | {"use_qkv_bias": True}, {"qkv_bias": True}),
    "stablelm, parallel": (
        *("StableLm", LAYER | rope(partial_rotary_factor=0.67) | {"use_parallel_residual": True}),
        {"parallel": True, "qkv_bias": False},
    ),
    "qwen2": ("Qwen2", RMS | WIDE | rope(), {"qkv_bias": True, "out_bias": False}),
    "qwen2, tied": ("Qwen2", RMS | {"tie_word_embeddings": True}, {"tied_head": True}),
    "qwen2, window": (
        *("Qwen2", RMS | {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
        {"sliding_window": 70},
    ),
    "qwen3": ("Qwen3", RMS | WIDE | rope(), {"qk_norm": True, "qkv_bias": False}),
    "qwen3, attention bias": ("Qwen3", RMS | WIDE | {"attention_bias": True}, {"out_bias": True}),
    # Qwen-1, of which transformers has no class, is Qwen2 with other names, one matrix for queries, keys and values, and
    # as many of their heads.
    "qwen": ("Qwen2", RMS | rope() | {"num_key_value_heads": 6}, {"fused_qkv": True, "qkv_bias": True}),
}
CLIP = {"hidden_size": 30, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 44, "image_size": 24}
CLIP |= {"patch_size": 8, "layer_norm_eps": 1e-3}
SIGLIP = CLIP | {"image_size": 27, "vision_use_head": False}  # 27 pixels are three patches and a rest
VIP = {"vision_feature_layer": [-2, -3, -4, 1, 0], "projector_layernorm_eps": 1e-2}
# Text, tower, settings of the whole.
FAMILIES = {
    **{name: (name, "clip", {}) for name in TEXTS},
    "siglip, full": ("qwen2, tied", "siglip", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    # Since 4.52, transformers' LLaVA has a head of its own, without Phi's bias.
    "phi, no bias of the head": ("phi", "clip", {}),
    "siglip, default": ("stablelm", "siglip", {}),  # the original is MoE-LLaVA's second stage
    "clip, full": ("llama", "clip", {"vision_feature_layer": 1, "vision_feature_select_strategy": "full"}),
    "clip, two layers": ("mistral", "clip", {"vision_feature_layer": [-1, 2]}),
    "siglip, three layers": (
        "llama",
        "siglip",
        {"vision_feature_layer": [3, -2, 3], "vision_feature_select_strategy": "full"},
    ),
    "vip": ("llama", "clip", VIP),
    "vip, one layer": ("llama", "clip", VIP | {"vision_feature_layer": [-2]}),
    "projector without biases": ("llama", "clip", {"multimodal_projector_bias": False}),
    "projector of ReLU": ("llama", "clip", {"projector_hidden_act": "relu"}),
    "projector of tanh GELU": ("llama", "clip", {"projector_hidden_act": "gelu_pytorch_tanh"}),
}
ONLY_ORIGINAL = ("qwen", "phi", "phi, exact GELU")


@functools.cache
def theirs(name: str, seed: int = 0) -> Any:
    """Return transformers' model of a family, random; shared, so not to be changed."""
    text, tower, settings = FAMILIES[name]
    prefix, text_settings, _ = TEXTS[text]
    heads = {"num_key_value_heads": 6} if text == "stablelm, parallel" else {}
    head_bias = prefix == "Phi" and name in ONLY_ORIGINAL
    return build(prefix, heads | text_settings, tower, seed, head_bias=head_bias, vip="vip" in name, **settings)


def build(
    prefix: str,
    text: dict[str, Any],
    tower: str = "clip",
    seed: int = 0,
    *,
    vision: dict[str, Any] | None = None,
    head_bias: bool = False,
    linear: bool = False,
    vip: bool = False,
    **settings: Any,
) -> Any:
    """Return a random LLaVA of transformers' classes.

    Args:
        prefix: Of the names of the language model's classes.
        text: Its settings, beside `BASE`.
        tower: "clip" or "siglip".
        seed: Of the weights.
        vision: The tower's settings, beside those of the tables here.
        head_bias: Give the LM head a bias, which Phi's has and transformers' LLaVA has not.
        linear: Make the projector linear, which transformers' is not.
        vip: Build VIP-LLaVA.
        **settings: Of the whole.
    """
    config = getattr(transformers, f"{prefix}Config")(**(BASE | text))
    clip = tower == "clip"
    sizes = (CLIP if clip else SIGLIP) | (vision or {})
    tower_config = transformers.CLIPVisionConfig(**sizes) if clip else transformers.SiglipVisionConfig(**sizes)
    kind = "VipLlava" if vip else "Llava"
    settings = {"image_token_index": IMAGE, "image_seq_length": 9, **settings}
    whole = getattr(transformers, f"{kind}Config")(vision_config=tower_config, text_config=config, **settings)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(whole)
    model.generation_config.eos_token_id = None
    if head_bias:
        model.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size)
    if linear:
        model.model.multi_modal_projector = torch.nn.Linear(sizes["hidden_size"], config.hidden_size)
    return randomize(model, seed, half=True)


def names_of(model: Any, *, qwen: bool = False) -> tuple[Tensors, Tensors, Tensors]:
    """Return the tensors of (language model, projector, tower) as each repository of its own has them."""
    llm, projector, tower = {}, {}, {}
    for key, tensor in model.state_dict().items():
        if key.startswith("model.multi_modal_projector."):
            number = key.replace("linear_1", "0").replace("linear_2", "2")
            projector[number.removeprefix("model.multi_modal_projector.")] = tensor
        elif key.startswith("model.vision_tower."):
            tower[key.removeprefix("model.vision_tower.")] = tensor
        elif not (key == "lm_head.weight" and model.config.text_config.tie_word_embeddings):
            llm[key.replace("model.language_model.", "model.")] = tensor
    return (qwen_tensors(llm) if qwen else llm), projector, tower


def qwen_tensors(llm: Tensors) -> Tensors:
    """Name the tensors of a Qwen2 with as many key heads as heads as Qwen-1's code does."""
    renamed = {}
    for key, tensor in llm.items():
        if ".q_proj." in key:
            parts = [llm[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[key.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            for old, new in (
                ("self_attn.o_proj", "attn.c_proj"),
                ("gate_proj", "w2"),
                ("up_proj", "w1"),
                ("down_proj", "c_proj"),
            ):
                key = key.replace(old, new)
            renamed[key.replace("input_layernorm", "ln_1").replace("post_attention_layernorm", "ln_2")] = tensor
    roots = {
        "model.embed_tokens.": "transformer.wte.",
        "model.layers.": "transformer.h.",
        "model.norm.": "transformer.ln_f.",
    }
    return {
        next((new + key.removeprefix(old) for old, new in roots.items() if key.startswith(old)), key): tensor
        for key, tensor in renamed.items()
    }


def old_text(model: Any, *, qwen: bool = False) -> dict[str, Any]:
    """Return the language model's settings as transformers 4.x wrote them, or Qwen-1's repository."""
    raw = model.config.text_config.to_dict()
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    raw |= {"partial_rotary_factor": scaling.pop("partial_rotary_factor")} if "partial_rotary_factor" in scaling else {}
    scaling["type"] = scaling.pop("rope_type")
    raw["rope_scaling"] = None if scaling["type"] == "default" else scaling
    raw = {key: value for key, value in raw.items() if key not in ("dtype", "layer_types", "architectures")}
    if not qwen:
        return raw
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    own = {"model_type": "qwen", "intermediate_size": 2 * raw["intermediate_size"], "layer_norm_epsilon": 1e-3}
    own |= {"rotary_emb_base": 500, "rotary_pct": 1.0, "kv_channels": 6, "seq_length": 99, "no_bias": True}
    return {key: raw[key] for key in keys} | own | {"use_dynamic_ntk": True, "use_logn_attn": True, "bf16": False}


def prefixes(model: Any) -> tuple[str, str]:
    """Return the names of projector and tower in the original: MoE-LLaVA's where SigLIP's first patch is dropped."""
    siglip = model.config.vision_config.model_type.startswith("siglip")
    moe = siglip and model.config.vision_feature_select_strategy == "default"
    return ("mm_projector.image_spatial_proj.", "image_tower") if moe else ("mm_projector.", "vision_tower")


def connection(model: Any) -> dict[str, Any]:
    """Return the keys of original LLaVA's config.json about tower and projector."""
    full = model.config.vision_feature_select_strategy == "full"
    return {
        f"mm_{prefixes(model)[1]}": makers.UNKNOWN_TOWER,
        "mm_hidden_size": 30,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if full else "patch",
        "image_aspect_ratio": "pad",
    }


def original_folder(folder: Path, model: Any, *, qwen: bool = False, tower: bool = True, **changes: Any) -> Path:
    """Write original LLaVA's format; `changes` are keys of its config.json, ... removes one."""
    llm, projector, vision = names_of(model, qwen=qwen)
    root, (own, name_of_tower) = "transformer." if qwen else "model.", prefixes(model)
    tensors = llm | makers.prefixed(root + own, projector)
    if tower:
        tensors |= makers.prefixed(f"{root}{name_of_tower}.{name_of_tower}.vision_model.", vision)
    text = old_text(model, qwen=qwen)
    kind = {"model_type": f"llava_{text['model_type']}", "architectures": ["LlavaForCausalLM"]}
    makers.store(folder, tensors, "safetensors")
    config = text | connection(model) | kind | changes
    makers.write_json(folder / "config.json", {key: value for key, value in config.items() if value is not ...})
    return folder


def tower_folder(folder: Path, model: Any) -> Path:
    """Write the tower's own repository."""
    makers.store(folder, makers.prefixed("vision_model.", names_of(model)[2]), "safetensors")
    makers.write_json(folder / "config.json", model.config.vision_config.to_dict())
    return folder


def component_folders(room: Path, model: Any, *, qwen: bool = False) -> tuple[Path, list[Path]]:
    """Write language model, tower and projector by themselves; return the projector's folder and the others."""
    llm, projector, _ = names_of(model, qwen=qwen)
    makers.store(room / "llm", llm, "safetensors")
    makers.write_json(room / "llm/config.json", old_text(model, qwen=qwen))
    makers.write_json(room / "projector/config.json", connection(model) | {"model_type": "llava"})
    makers.save(room / "projector/mm_projector.bin", makers.prefixed(f"model.{prefixes(model)[0]}", projector))
    return room / "projector", [room / "llm", tower_folder(room / makers.UNKNOWN_TOWER.split("/")[1], model)]


def old_folder(folder: Path, model: Any, **changes: Any) -> Path:
    """Write llava-hf as transformers 4.x did; `changes` as for `original_folder`."""
    llm, _, tower = names_of(model)
    kept = {key.removeprefix("model."): x for key, x in model.state_dict().items() if "multi_modal" in key}
    tensors = makers.prefixed("language_model.", llm) | kept | makers.prefixed("vision_tower.vision_model.", tower)
    makers.store(folder, tensors, "safetensors shards")
    raw = model.config.to_dict() | {"text_config": old_text(model), "dtype": ..., "torch_dtype": "float32"}
    if raw["model_type"] == "vipllava":
        raw["vision_feature_layers"] = raw.pop("vision_feature_layer")
    makers.write_json(folder / "config.json", {key: x for key, x in (raw | changes).items() if x is not ...})
    return folder
