"""Architectures of the sister systems, by config.json and, where that leaves sizes out, by the shapes of the tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from reverie_jax.errors import CheckpointError
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints.configs import own_settings, with_own_settings
from reverie_jax.models.checkpoints.decoders import text_config, text_json
from reverie_jax.models.checkpoints.families import SISTERS, Json
from reverie_jax.models.checkpoints.files import Stored
from reverie_jax.models.checkpoints.processing import check_divisible, choice, given, number, read_stop_ids, size
from reverie_jax.models.checkpoints.specs import BEIT3, QFORMER
from reverie_jax.models.config import ResamplerConfig, VisionConfig, VLMConfig

_EVA_HEAD, _BERT_HEAD, _BEIT3_HEAD = 88, 64, 64
"""Widths of heads, which no file says."""

BLIP2_UNUSED = re.compile(
    r"^(t5_proj|opt_proj|vision_proj|text_proj|itm_head|Qformer\.cls)\.|^temp$"
    r"|^Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings)\."
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
)
"""Tensors of BLIP-2's files that MiniGPT-4 does not use: other projections, and the Q-Former's text side."""

_SIZES = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
}
_IMAGES = {"image_size": "image_size", "patch_size": "patch_size"}


def eva_unused(names: Iterable[str]) -> re.Pattern[str]:
    """Return the names of EVA-CLIP's file that MiniGPT-4 does not use: norm and head, and with these the last block."""
    names = set(names)
    whole = any(re.match(r"(norm|head)\.", name) for name in names)
    blocks = _count(names, r"blocks\.(\d+)\.")
    last = rf"|blocks\.{blocks - 1}" if whole else ""
    return re.compile(rf"^(norm|fc_norm|head{last})\.")


def sister_config(path: Path, raw: Json) -> VLMConfig:
    """Return the architecture of a sister system by its config.json; `with_stored_sizes` completes it.

    Raises:
        CheckpointError: A setting is not supported or invalid.
    """
    config = {"minigpt4": _minigpt4_config, "mplug-owl": _mplug_owl_config, "beit3_llava": _muffin_config}
    return with_own_settings(path, config[raw["model_type"]](path, raw), raw)


def _minigpt4_config(path: Path, raw: Json) -> VLMConfig:
    return dataclasses.replace(ARCHITECTURES["minigpt4-7b"], text=text_config(path, raw, "llama"))


def _mplug_owl_config(path: Path, raw: Json) -> VLMConfig:
    known = ARCHITECTURES["mplug-owl-7b"]
    parts = [raw.get(key) or {} for key in ("vision_config", "visual_abstractor_config", "text_config")]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path}: vision_config, visual_abstractor_config and text_config must be objects")
    # The class's own defaults are the sizes of the 7B model. It ignores the tower's hidden_act.
    defaults = _sizes(known.vision) | _sizes(known.vision.resampler) | {"encoder_hidden_size": 1024}
    defaults |= {"image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6, "num_query_tokens": 64}
    vision, abstractor, text = (given(part) for part in parts)
    vision, abstractor = {**defaults, **_sizes(known.vision), **vision}, {**defaults, **abstractor}
    choice(path, text, "model_type", "llama", ("llama",))
    assert known.vision.resampler is not None
    own: Json = {field: size(path, abstractor, key) for key, field in _SIZES.items()}
    resampler = dataclasses.replace(
        known.vision.resampler,
        queries=size(path, {**defaults, **given(raw)}, "num_query_tokens"),
        # Of the normalization within the MLP only; the others have torch's default.
        mlp_norm_eps=number(path, abstractor, "layer_norm_eps"),
        **own,
    )
    own = {field: size(path, vision, key) for key, field in (_SIZES | _IMAGES).items()}
    if not size(path, abstractor, "encoder_hidden_size") == resampler.hidden == own["hidden"]:
        raise CheckpointError(
            f"{path}: hidden_size of vision_config, hidden_size and encoder_hidden_size of visual_abstractor_config differ"
        )
    check_divisible(path, own["hidden"], own["heads"], "the tower's hidden_size", "its num_attention_heads")
    check_divisible(path, resampler.hidden, resampler.heads, "the abstractor's hidden_size", "its num_attention_heads")
    return dataclasses.replace(
        known,
        vision=dataclasses.replace(
            known.vision, **own, norm_eps=number(path, vision, "layer_norm_eps"), resampler=resampler
        ),
        text=text_config(path, text, "llama"),
        stop_ids=read_stop_ids(path.parent, text),
    )


def _muffin_config(path: Path, raw: Json) -> VLMConfig:
    known, name = ARCHITECTURES["muffin-13b"], str(raw.get("mm_vision_tower"))
    if not (match := re.fullmatch(r"beit3_large(?:_itc)?_patch16_(\d+)", name)):
        raise CheckpointError(
            f"{path}: mm_vision_tower {name} is not supported; must be beit3_large_patch16_ and a size"
        )
    choice(path, raw, "use_mm_proj", True, (True,))
    choice(path, raw, "mm_use_im_start_end", True, (True,))
    return dataclasses.replace(
        known,
        vision=dataclasses.replace(known.vision, image_size=int(match[1]), queries=size(path, raw, "num_query")),
        text=text_config(path, raw, "llama"),
        vision_tower=name,  # its eos_token_id is wrong: the tokenizer's counts
    )


def with_stored_sizes(path: Path, config: VLMConfig, tensors: Mapping[str, Stored]) -> VLMConfig:
    """Return an architecture with the sizes of its tensors, where config.json has only a name for them, or is missing.

    Args:
        path: The checkpoint, for messages.
        config: By config.json.
        tensors: By canonical name.

    Raises:
        CheckpointError: The shapes are not those of such a model.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            raise CheckpointError(f"{path}: tensor {name} of rank {rank} is missing")
        return tensors[name].shape

    vision, resampler = config.vision, config.vision.resampler
    if config.system == "muffin":
        width, _, _, patch = shape(f"{BEIT3}vision_embed.proj.weight", 4)
        vision = dataclasses.replace(
            vision,
            hidden=width,
            layers=_count(tensors, re.escape(BEIT3) + r"encoder\.layers\.(\d+)\."),
            heads=max(1, width // _BEIT3_HEAD),
            mlp=shape(f"{BEIT3}encoder.layers.0.ffn.A.fc1.weight", 2)[0],
            patch_size=patch,
            query_positions=(rows := shape(f"{BEIT3}encoder.embed_positions.B.weight", 2)[0]),
        )
        if rows < (needed := vision.position_offset + vision.queries):
            raise CheckpointError(f"{path}: embed_positions.B has {rows} rows; {vision.queries} queries need {needed}")
    elif config.system == "minigpt4":
        assert resampler is not None
        tower, layer = "visual_encoder.", f"{QFORMER}encoder.layer."
        width, _, _, patch = shape(f"{tower}patch_embed.proj.weight", 4)
        _, queries, inner = shape("query_tokens", 3)
        resampler = dataclasses.replace(
            resampler,
            queries=queries,
            hidden=inner,
            heads=max(1, inner // _BERT_HEAD),
            layers=_count(tensors, re.escape(layer) + r"(\d+)\."),
            mlp=shape(f"{layer}0.intermediate_query.dense.weight", 2)[0],
        )
        if resampler.layers % 2:
            raise CheckpointError(f"{path}: a Q-Former of {resampler.layers} layers; their number must be even")
        vision = dataclasses.replace(
            vision,
            hidden=width,
            layers=_count(tensors, re.escape(tower) + r"blocks\.(\d+)\."),
            heads=max(1, width // _EVA_HEAD),
            mlp=shape(f"{tower}blocks.0.mlp.fc1.weight", 2)[0],
            patch_size=patch,
            image_size=math.isqrt(shape(f"{tower}pos_embed", 3)[1] - 1) * patch,
            resampler=resampler,
        )
        _check_depth(path, resampler, config.vision.resampler)
        check_divisible(path, resampler.hidden, resampler.heads, "the Q-Former's width", "its number of heads")
    _check_depth(path, vision, config.vision)
    check_divisible(path, vision.hidden, vision.heads, "the tower's width", "its number of heads")
    return dataclasses.replace(config, vision=vision)


def _check_depth(
    path: Path, found: VisionConfig | ResamplerConfig, known: VisionConfig | ResamplerConfig | None
) -> None:
    """Check that a part of the published width has the published number of layers: files that lack the last look whole."""
    if known is not None and found.hidden == known.hidden and found.layers != known.layers:
        raise CheckpointError(
            f"{path}: {found.layers} layers of width {found.hidden} in the tower or Q-Former; there must be {known.layers}"
        )


def _count(names: Iterable[str], pattern: str) -> int:
    """Return the number of layers whose names match."""
    numbers = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def sister_json(config: VLMConfig, dtype: str, special_ids: Json) -> Json:
    """Return config.json of a sister system, with the keys that its authors' code reads.

    Args:
        config: The architecture.
        dtype: Name of the weights' dtype.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    own, vision, resampler = text_json(config.text) | special_ids, config.vision, config.vision.resampler
    if config.system == "mplug-owl" and resampler is not None:
        eps = {"layer_norm_eps": vision.norm_eps}
        tower = _sizes(vision) | {key: getattr(vision, key) for key in _IMAGES} | eps
        abstractor = _sizes(resampler) | {"layer_norm_eps": resampler.mlp_norm_eps}
        own = {
            "num_query_tokens": resampler.queries,
            "text_config": {"model_type": "llama", **own},
            "vision_config": {"model_type": "mplug_owl_vision_model", **tower, "hidden_act": "quick_gelu"},
            "visual_abstractor_config": {
                "model_type": "mplug_owl_visual_abstract",
                **abstractor,
                "encoder_hidden_size": vision.hidden,
            },
        }
    elif config.system == "muffin":
        own |= {
            "mm_vision_tower": f"beit3_large_patch{vision.patch_size}_{vision.image_size}",
            "use_mm_proj": True,
            "num_query": vision.queries,
            "mm_use_im_start_end": True,
        }
    model_type, name = SISTERS[config.system]
    return {"architectures": [name], "model_type": model_type, "torch_dtype": dtype, **own, **own_settings(config)}


def _sizes(part: VisionConfig | ResamplerConfig | None) -> Json:
    return {key: getattr(part, field) for key, field in _SIZES.items()}
