"""Convert the part of a config.json that describes a language model to a decoder's architecture and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.families import Json, check_decoder
from reverie_jax.models.checkpoints.processing import check_divisible, choice, given, number, size
from reverie_jax.models.config import Activation, ExpertsConfig, RopeScaling, Routing, TextConfig

ACTIVATIONS: dict[str, Activation] = {
    **{name: name for name in get_args(Activation)},
    "swish": "silu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}
"""Activations by the names that transformers gives them."""

# Defaults of the classes in transformers (LlamaConfig, …), for keys that a config.json omits; of Qwen-1 and StableLM-Epoch,
# whose code is in their repositories, what their files always say.
_DEFAULTS: dict[str, Json] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
    },
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
    },
    "phi": {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu_new",
    },
    "stablelm": {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 6912,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
        "hidden_act": "silu",
    },
    "qwen": {"max_position_embeddings": 8192, "hidden_act": "silu"},
}
_DEFAULTS["qwen3"] = {**_DEFAULTS["qwen2"], "head_dim": 128}
_DEFAULTS["stablelm_epoch"] = _DEFAULTS["stablelm"]

# Other names of the same settings: Qwen-1's and StableLM-Epoch's.
_SYNONYMS = {
    "layer_norm_epsilon": "rms_norm_eps",
    "norm_eps": "layer_norm_eps",
    "kv_channels": "head_dim",
    "rotary_emb_base": "rope_theta",
    "rope_pct": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "seq_length": "max_position_embeddings",
}


def hf_activation(name: Activation) -> str:
    """Return what transformers calls an activation."""
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name


_WINDOWED: dict[str, int | None] = {"phi3": None, "mistral": 4096, "qwen2": 4096, "qwen3": 4096}
"""Sliding windows of the families that have them, where config.json says nothing; null switches them off."""


def text_config(path: Path, raw: Json, kind: str) -> TextConfig:
    """Return the decoder that the keys of a language model describe.

    Args:
        path: The config.json, for messages.
        raw: Its content.
        kind: One of `LANGUAGE_MODELS`.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    window = _window(raw, kind)
    raw = given(raw)
    if kind in ("qwen", "stablelm_epoch"):
        raw = {**{_SYNONYMS[key]: value for key, value in raw.items() if key in _SYNONYMS}, **raw}
        if "seq_length" in raw:  # what it was trained for; beyond it, its code changes what it computes
            raw["max_position_embeddings"] = raw["seq_length"]
    if kind == "qwen":
        raw["intermediate_size"] = size(path, raw, "intermediate_size") // 2  # of gate and up together
    raw = {**_DEFAULTS[kind], **raw}
    check_decoder(path, raw, kind)
    heads, hidden = size(path, raw, "num_attention_heads"), size(path, raw, "hidden_size")
    theta, fraction, scaling = _rope(path, raw, kind)
    layer_norm, bias = kind in ("phi", "stablelm", "stablelm_epoch"), kind == "phi"
    all_biases = kind in ("llama", "qwen3") and bool(raw.get("attention_bias"))
    qkv = {"qwen": True, "qwen2": True, "stablelm": raw.get("use_qkv_bias"), "stablelm_epoch": raw.get("use_qkv_bias")}
    config = TextConfig(
        vocab=size(path, raw, "vocab_size"),
        hidden=hidden,
        layers=size(path, raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=size(path, {"num_key_value_heads": heads, **raw}, "num_key_value_heads"),
        head_dim=size(path, {"head_dim": hidden // heads, **raw}, "head_dim"),
        mlp=size(path, raw, "intermediate_size"),
        norm_eps=number(path, raw, "layer_norm_eps" if layer_norm else "rms_norm_eps"),
        rope_theta=theta,
        max_positions=size(path, raw, "max_position_embeddings"),
        fused_qkv=kind in ("phi3", "qwen"),
        fused_mlp=kind == "phi3",
        sliding_window=None if window is None else size(path, {"sliding_window": window}, "sliding_window"),
        norm="layernorm" if layer_norm else "rmsnorm",
        activation=ACTIVATIONS[choice(path, raw, "hidden_act", "silu", tuple(ACTIVATIONS))],
        gated=kind != "phi",
        parallel=kind == "phi" or bool(raw.get("use_parallel_residual")),
        rotary_fraction=fraction,
        rope_scaling=scaling,
        qkv_bias=bias or all_biases or bool(qkv.get(kind)),
        out_bias=bias or all_biases,
        mlp_bias=bias or (kind == "llama" and bool(raw.get("mlp_bias"))),
        head_bias=bias,
        tied_head=bool(raw.get("tie_word_embeddings")),
        qk_norm=kind == "qwen3",
        experts=_experts(path, raw["moe"], size(path, raw, "num_hidden_layers")) if raw.get("moe") else None,
    )
    check_divisible(path, config.heads, config.kv_heads, "num_attention_heads", "num_key_value_heads")
    check_divisible(path, config.rotary_dim, 2, "the rotated part of head_dim (partial_rotary_factor)", "2")
    return config


def _window(raw: Json, kind: str) -> Any:
    """Return the smallest window of any layer, as stated; None without one. LLaMA's class ignores the key."""
    window = raw.get("sliding_window", _WINDOWED.get(kind)) if kind in _WINDOWED else None
    if kind in ("qwen2", "qwen3"):
        types, first, layers = (
            raw.get("layer_types"),
            raw.get("max_window_layers", 28),
            raw.get("num_hidden_layers", 32),
        )
        none = type(first) is int and type(layers) is int and first >= layers
        if isinstance(types, list):
            none = "sliding_attention" not in types
        if none or not raw.get("use_sliding_window"):
            return None
    return window


def _rope(path: Path, raw: Json, kind: str) -> tuple[float, float, RopeScaling | None]:
    """Return theta, the share of a head that is rotated, and the scaling of frequencies."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if raw.get("rope_scaling") not in (None, {}, rope):
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling differ; they are two names of one setting")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: rope_parameters or rope_scaling must be an object of values, not {rope!r}")
    merged = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **raw, **given(rope)}
    type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if type in ("linear", "llama3"):
        factor = number(path, {"factor": None, **rope}, "factor")
        scaling = RopeScaling(type, factor)
        if type == "llama3":
            scaling = RopeScaling(
                type,
                factor,
                number(path, {"low_freq_factor": None, **rope}, "low_freq_factor"),
                number(path, {"high_freq_factor": None, **rope}, "high_freq_factor"),
                size(path, rope, "original_max_position_embeddings"),
            )
    # Dynamic scaling changes nothing up to max_position_embeddings, where `TextConfig.context` ends.
    elif type not in ("default", "dynamic"):
        raise CheckpointError(f"{path}: rope scaling {type!r} is not supported; only linear, dynamic and llama3 are")
    fraction = number(path, merged, "partial_rotary_factor")
    if fraction > 1 or (fraction < 1 and kind in ("llama", "mistral", "qwen2", "qwen3")):
        # Their classes ignore it without scaling, and heed it with some.
        raise CheckpointError(f"{path}: partial_rotary_factor {fraction} is not supported for {kind}")
    return number(path, merged, "rope_theta"), fraction, scaling


def _experts(path: Path, raw: Any, layers: int) -> ExpertsConfig | None:
    """Return the experts that `moe` of a MoE-LLaVA's config.json describes."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: moe must be an object, not {raw!r}")
    if raw.get("moe_enable") is False:
        return None
    if raw.get("use_residual"):
        raise CheckpointError(f"{path}: moe.use_residual is not supported")
    if (top := raw.get("top_k_experts", raw.get("top_k", 2))) != 2:
        raise CheckpointError(f"{path}: moe.top_k_experts {top!r} is not supported; must be 2")
    raw = given(raw)
    chosen, counts = raw.get("moe_layers_idx"), raw.get("num_experts")
    if not isinstance(chosen, list) or not all(type(layer) is int and 0 <= layer < layers for layer in chosen):
        raise CheckpointError(f"{path}: moe.moe_layers_idx must be a list of layers below {layers}, not {chosen!r}")
    counts = counts if isinstance(counts, list) else [counts]
    if len(set(map(str, counts))) != 1 or type(counts[0]) is not int or counts[0] < 2:
        raise CheckpointError(
            f"{path}: moe.num_experts must be one number of at least 2 for all layers, not {raw.get('num_experts')!r}"
        )
    routing = Routing(
        capacity_factor=number(path, {"capacity_factor": 1.5, **raw}, "capacity_factor"),
        min_capacity=size(path, raw, "min_capacity") if raw.get("min_capacity") else 0,
        aux_coefficient=number(path, raw, "router_aux_loss_coef") if raw.get("router_aux_loss_coef", 0) else 0.0,
        second_expert="gumbel",  # as DeepSpeed trains them; evaluation takes the likeliest
    )
    if not chosen:
        return None
    return ExpertsConfig(tuple(sorted(set(chosen))), counts[0], routing)


def text_json(text: TextConfig) -> Json:
    """Return the keys of a config.json that describe a decoder, `model_type` aside."""
    kind = text.family
    window: Json = {"sliding_window": text.sliding_window} if kind in _WINDOWED else {}
    if kind in ("qwen2", "qwen3"):
        window |= {"use_sliding_window": text.sliding_window is not None, "max_window_layers": 0}
    special: dict[str, Json] = {
        "llama": {"attention_bias": text.qkv_bias, "mlp_bias": text.mlp_bias},
        "phi3": {"attention_bias": False, "original_max_position_embeddings": text.max_positions},
        "qwen3": {"attention_bias": text.qkv_bias},
        "phi": {"qk_layernorm": False},
        "stablelm": {"use_qkv_bias": text.qkv_bias, "use_parallel_residual": text.parallel, "qk_layernorm": False},
        "qwen": {
            "kv_channels": text.head_dim,
            "rotary_emb_base": text.rope_theta,
            "rotary_pct": text.rotary_fraction,
            "seq_length": text.max_positions,
            "no_bias": True,
        },
    }
    # By the name of this key, Qwen-1 differs from Qwen2.
    eps = "layer_norm_epsilon" if kind == "qwen" else "layer_norm_eps" if text.norm == "layernorm" else "rms_norm_eps"
    return {
        "vocab_size": text.vocab,
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.mlp * (2 if kind == "qwen" else 1),
        eps: text.norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_positions,
        "hidden_act": hf_activation(text.activation),
        "tie_word_embeddings": text.tied_head,
        # Phi's and StableLM's default is not 1.
        **(
            {"partial_rotary_factor": fraction}
            if (fraction := text.rotary_fraction) != 1 or text.norm == "layernorm"
            else {}
        ),
        **({"rope_scaling": _scaling_json(text.rope_scaling)} if text.rope_scaling else {}),
        **special.get(kind, {}),
        **window,
        **({"moe": _experts_json(text.experts)} if text.experts else {}),
    }


def _scaling_json(scaling: RopeScaling) -> Json:
    wavelengths = {
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_positions,
    }
    return {"rope_type": scaling.kind, "factor": scaling.factor, **(wavelengths if scaling.kind == "llama3" else {})}


def _experts_json(experts: ExpertsConfig) -> Json:
    return {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": list(experts.layers),
        "num_experts": [experts.count] * len(experts.layers),
        "top_k_experts": 2,
        "capacity_factor": experts.routing.capacity_factor or experts.count / 2,
        "eval_capacity_factor": experts.count / 2,  # drops none
        "min_capacity": experts.routing.min_capacity,
        "ep_size": 1,
        "use_residual": False,
        "router_aux_loss_coef": experts.routing.aux_coefficient,
    }
