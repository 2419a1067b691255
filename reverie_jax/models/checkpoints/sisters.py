"""Architectures of the sister systems, by mPLUG-Owl's and Muffin's config.json, or by the tensors of MiniGPT-4's files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from reverie_jax.errors import CheckpointError
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints.decoders import text_config, text_json
from reverie_jax.models.checkpoints.families import SISTERS, Json
from reverie_jax.models.checkpoints.files import Stored
from reverie_jax.models.checkpoints.processing import check_divisible, choice, given, number, read_stop_ids, size
from reverie_jax.models.checkpoints.specs import BEIT3, QFORMER
from reverie_jax.models.config import ResamplerConfig, TextConfig, VisionConfig, VLMConfig

ARCHITECTURE_KEY = "reverie_architecture"
"""Key for the whole architecture in a config.json that this project wrote: the authors' keys leave sizes out."""

_EVA_HEAD, _BERT_HEAD, _BEIT3_HEAD = 88, 64, 64
"""Widths of heads, which no file says."""

BLIP2_UNUSED = re.compile(
    r"^(t5_proj|opt_proj|vision_proj|text_proj|itm_head|visual_encoder|Qformer\.cls)\.|^temp$"
    r"|^Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings)\."
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
)
"""Tensors of BLIP-2's files that MiniGPT-4 does not use: other projections, and the Q-Former's text side."""


def sister_config(path: Path, raw: Json) -> VLMConfig:
    """Return the architecture of a sister system by its config.json.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    if ARCHITECTURE_KEY in raw:
        return read_architecture(path, raw, ARCHITECTURE_KEY)
    if raw["model_type"] == "minigpt4":
        raise CheckpointError(f"{path}: {ARCHITECTURE_KEY} is missing")
    return (_mplug_owl_config if raw["model_type"] == "mplug-owl" else _muffin_config)(path, raw)


def read_architecture(path: Path, raw: Json, key: str) -> VLMConfig:
    """Return the architecture under a key of a config.json.

    Raises:
        CheckpointError: It is invalid.
    """
    try:
        return pydantic.TypeAdapter(VLMConfig).validate_python(raw.get(key))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (key, *first["loc"])))
        raise CheckpointError(f"{path}: {field}: {first['msg']}") from None


def _mplug_owl_config(path: Path, raw: Json) -> VLMConfig:
    known = ARCHITECTURES["mplug-owl-7b"]
    parts = [raw.get(key) or {} for key in ("vision_config", "visual_abstractor_config", "text_config")]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path}: vision_config, visual_abstractor_config and text_config must be objects")
    vision, abstractor, text = map(given, parts)
    tower, resampler = known.vision, known.vision.resampler
    assert resampler is not None
    choice(path, text, "model_type", "llama", ("llama",))
    # The class's own defaults are the sizes of the 7B model. It ignores the tower's hidden_act.
    own = {
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp",
    }
    own_sizes: Json = {
        field: size(path, {key: getattr(resampler, field), **abstractor}, key) for key, field in own.items()
    }
    own |= {"image_size": "image_size", "patch_size": "patch_size"}
    sizes: Json = {field: size(path, {key: getattr(tower, field), **vision}, key) for key, field in own.items()}
    eps = number(path, {"layer_norm_eps": tower.norm_eps, **vision}, "layer_norm_eps")
    resampler = dataclasses.replace(
        resampler,
        queries=size(path, {"num_query_tokens": resampler.queries, **given(raw)}, "num_query_tokens"),
        # Of the normalization within the MLP only; the others have torch's default.
        mlp_norm_eps=number(path, {"layer_norm_eps": resampler.mlp_norm_eps, **abstractor}, "layer_norm_eps"),
        **own_sizes,
    )
    width = size(path, {"encoder_hidden_size": resampler.hidden, **abstractor}, "encoder_hidden_size")
    if not width == resampler.hidden == sizes["hidden"]:
        raise CheckpointError(
            f"{path}: hidden_size of vision_config, hidden_size and encoder_hidden_size of visual_abstractor_config differ"
        )
    check_divisible(path, sizes["hidden"], sizes["heads"], "the tower's hidden_size", "its num_attention_heads")
    check_divisible(path, resampler.hidden, resampler.heads, "the abstractor's hidden_size", "its num_attention_heads")
    return dataclasses.replace(
        known,
        vision=dataclasses.replace(tower, **sizes, norm_eps=eps, resampler=resampler),
        text=text_config(path, text, "llama"),
        stop_ids=read_stop_ids(path.parent, text),
    )


def _muffin_config(path: Path, raw: Json) -> VLMConfig:
    known, name = ARCHITECTURES["muffin-13b"], str(raw.get("mm_vision_tower"))
    if not (match := re.fullmatch(r"beit3_large(?:_itc)?_patch16_(\d+)", name)):
        raise CheckpointError(
            f"{path}: mm_vision_tower {name} is not supported; must be beit3_large_patch16_ and a size"
        )
    if not raw.get("use_mm_proj", True):
        raise CheckpointError(f"{path}: use_mm_proj must be true")
    choice(path, raw, "mm_use_im_start_end", True, (True,))
    return dataclasses.replace(
        known,
        vision=dataclasses.replace(known.vision, image_size=int(match[1]), queries=size(path, raw, "num_query")),
        text=text_config(path, raw, "llama"),
        vision_tower=name,  # its eos_token_id is wrong: the tokenizer's counts
    )


def with_stored_sizes(path: Path, config: VLMConfig, tensors: Mapping[str, Stored]) -> VLMConfig:
    """Return a Muffin's architecture with the sizes of its tower by its tensors: config.json has only a name for them.

    Args:
        path: The folder, for messages.
        config: By config.json.
        tensors: By stored name.

    Raises:
        CheckpointError: The shapes are not those of such a tower.
    """
    width, _, _, patch = _shape(path, tensors, f"{BEIT3}vision_embed.proj.weight", 4)
    vision = dataclasses.replace(
        config.vision,
        hidden=width,
        layers=_count(tensors, re.escape(BEIT3) + r"encoder\.layers\.(\d+)\."),
        heads=max(1, width // _BEIT3_HEAD),
        mlp=_shape(path, tensors, f"{BEIT3}encoder.layers.0.ffn.A.fc1.weight", 2)[0],
        patch_size=patch,
        query_positions=_shape(path, tensors, f"{BEIT3}encoder.embed_positions.B.weight", 2)[0],
    )
    check_divisible(path, vision.hidden, vision.heads, "BEiT-3's width", "its number of heads")
    return dataclasses.replace(config, vision=vision)


def _shape(path: Path, tensors: Mapping[str, Stored], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != rank:
        raise CheckpointError(f"{path}: tensor {name} of rank {rank} is missing")
    return tensors[name].shape


def _count(tensors: Mapping[str, Stored], pattern: str) -> int:
    """Return the number of layers whose names match."""
    numbers = (re.match(pattern, name) for name in tensors)
    return 1 + max((int(match[1]) for match in numbers if match), default=0)


def minigpt4_config(
    paths: tuple[Path, Path], eva: Mapping[str, Stored], blip2: Mapping[str, Stored], text: TextConfig
) -> tuple[VLMConfig, re.Pattern[str]]:
    """Return the architecture of a MiniGPT-4 that is given as its sources, and the names that EVA-CLIP's file has more.

    Sizes are the tensors'; what shapes do not tell is as published: widths of heads, epsilons, and that EVA-CLIP's last
    layer is left out.

    Args:
        paths: EVA-CLIP's file and BLIP-2's, for messages.
        eva: Its tensors.
        blip2: Those of BLIP-2's file, Q-Former and queries.
        text: The language model.

    Raises:
        CheckpointError: The shapes are not those of such files.
    """
    known = ARCHITECTURES["minigpt4-7b"]
    tower, resampler = known.vision, known.vision.resampler
    assert resampler is not None
    width, _, _, patch = _shape(paths[0], eva, "patch_embed.proj.weight", 4)
    tokens, blocks = _shape(paths[0], eva, "pos_embed", 3)[1], _count(eva, r"blocks\.(\d+)\.")
    _, queries, inner = _shape(paths[1], blip2, "query_tokens", 3)
    vision = dataclasses.replace(
        tower,
        hidden=width,
        layers=blocks - 1,
        heads=max(1, width // _EVA_HEAD),
        mlp=_shape(paths[0], eva, "blocks.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=math.isqrt(tokens - 1) * patch,
        resampler=dataclasses.replace(
            resampler,
            queries=queries,
            hidden=inner,
            heads=max(1, inner // _BERT_HEAD),
            layers=_count(blip2, re.escape(QFORMER) + r"encoder\.layer\.(\d+)\."),
            mlp=_shape(paths[1], blip2, f"{QFORMER}encoder.layer.0.intermediate_query.dense.weight", 2)[0],
        ),
    )
    check_divisible(paths[0], width, vision.heads, "EVA-CLIP's width", "its number of heads")
    check_divisible(paths[1], inner, max(1, inner // _BERT_HEAD), "the Q-Former's width", "its number of heads")
    return dataclasses.replace(known, vision=vision, text=text), re.compile(
        rf"^(blocks\.{blocks - 1}|norm|fc_norm|head)\."
    )


def sister_json(config: VLMConfig, dtype: str, special_ids: Json) -> Json:
    """Return config.json of a sister system, with the keys that its authors' code reads.

    Args:
        config: The architecture.
        dtype: Name of the weights' dtype.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    text, vision, resampler = text_json(config.text) | special_ids, config.vision, config.vision.resampler
    own: dict[str, Json] = {"minigpt4": {}}
    if resampler is not None:
        own["mplug-owl"] = {
            "num_query_tokens": resampler.queries,
            "text_config": {"model_type": "llama", **text},
            "vision_config": {
                "model_type": "mplug_owl_vision_model",
                **_sizes(vision),
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": vision.norm_eps,
            },
            "visual_abstractor_config": {
                "model_type": "mplug_owl_visual_abstract",
                **_sizes(resampler),
                "encoder_hidden_size": vision.hidden,
                "layer_norm_eps": resampler.mlp_norm_eps,
            },
        }
    own["muffin"] = {
        **text,
        "mm_vision_tower": f"beit3_large_patch{vision.patch_size}_{vision.image_size}",
        "use_mm_proj": True,
        "num_query": vision.queries,
        "mm_use_im_start_end": True,
    }
    model_type, name = SISTERS[config.system]
    return {
        "architectures": [name],
        "model_type": model_type,
        "torch_dtype": dtype,
        **own[config.system],
        ARCHITECTURE_KEY: dataclasses.asdict(config),
    }


def _sizes(part: VisionConfig | ResamplerConfig) -> dict[str, Any]:
    return {
        "hidden_size": part.hidden,
        "num_hidden_layers": part.layers,
        "num_attention_heads": part.heads,
        "intermediate_size": part.mlp,
    }
