"""Names of tensors in other formats than llava-hf's, to the canonical names of `specs` and from them."""

from __future__ import annotations

import re

from reverie_jax.models.config import System, TextConfig, VLMConfig

IGNORED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids|vision_embed\.mask_token|beit3\.text_embed\.weight)$"
)
"""Tensors that files contain and no model needs: functions of the configuration, and BEiT-3's inputs that Muffin lacks."""

CLIP_UNUSED = re.compile(r"^(text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale|logit_bias)$")
"""Tensors of a CLIP or SigLIP repository that are not the vision tower's."""

POOLING_HEAD = re.compile(r"(^|\.)vision_model\.head\.")
"""Tensors of SigLIP's pooling head, which makes one vector of an image; no LLaVA uses it."""

_LAYER = r"(?P<layer>language_model\.model\.layers\.\d+\.)"

_RENAMINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # transformers >= 4.52 in memory: state_dict() dumps and adapters
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^llama_model\.", "language_model."),  # MiniGPT-4
        # Qwen-1
        (r"^(language_model\.)?transformer\.wte\.", "language_model.model.embed_tokens."),
        (r"^(language_model\.)?transformer\.h\.", "language_model.model.layers."),
        (r"^(language_model\.)?transformer\.ln_f\.", "language_model.model.norm."),
        (r"^transformer\.(?=(mm_projector|image_tower|vision_tower)\.)", "model."),
        # MoE-LLaVA
        (r"^model\.mm_projector\.image_spatial_proj\.", "model.mm_projector."),
        (r"^model\.image_tower\.image_tower\.", "vision_tower."),
        # original LLaVA, LLaVA-pp, plain language models
        (r"^model\.(?=(embed_tokens|layers|norm|final_layernorm)\.)", "language_model.model."),
        (r"^model\.mm_projector\.(0\.|(?=weight$|bias$))", "multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
        (r"^model\.(?=(vision_tower|multi_modal_projector)\.)", ""),
        # CLIP alone, with and without the outer level
        (r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower.vision_model."),
        # transformers 5.23 writes a fresh model's tower without this level
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        (r"^language_model\.model\.final_layernorm\.", "language_model.model.norm."),
        (r"(?<=\.mlp\.)deepspeed_moe\.gate\.wg\.", "router."),
        (r"(?<=\.mlp\.)deepspeed_moe\.experts\.deepspeed_experts\.", "experts."),
    )
)

_LEAVES: dict[str, dict[str, str]] = {
    "phi": {"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    "qwen": {
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    },
}
"""Names of a layer's modules in families that have other ones than LLaMA, by the canonical name."""

_CANONICAL_LEAVES = {theirs: ours for leaves in _LEAVES.values() for ours, theirs in leaves.items()}
_LEAF = re.compile(r"(language_model\.model\.layers\.\d+\.)(mlp\.)?(experts\.\d+\.)?(.+)\.(weight|bias)")


def _rename_leaf(name: str, leaves: dict[str, str]) -> str:
    """Return the name with its module within a decoder layer renamed."""
    if (match := _LEAF.fullmatch(name)) is None:
        return name
    layer, mlp, expert, leaf, tensor = (part or "" for part in match.groups())
    if (renamed := leaves.get(mlp + leaf)) is None:
        return name
    return f"{layer}{mlp}{expert}{renamed.removeprefix(mlp)}.{tensor}"


def canonical_name(name: str) -> str:
    """Return the canonical form of a tensor name of any format."""
    for pattern, replacement in _RENAMINGS:
        name = pattern.sub(replacement, name)
    return _rename_leaf(name, _CANONICAL_LEAVES)


def family_name(name: str, text: TextConfig) -> str:
    """Return a canonical name with the modules of a decoder's layers called as its family calls them."""
    kind = text.family
    if kind == "phi" and name.startswith("language_model.model.norm."):
        return name.replace(".norm.", ".final_layernorm.")
    return _rename_leaf(name, _LEAVES.get(kind, {}))


_SISTERS: dict[System, tuple[tuple[str, str], ...]] = {
    "minigpt4": (("language_model.", "llama_model."),),
    "mplug-owl": (),
    "muffin": (
        ("language_model.lm_head.", "lm_head."),
        *((f"language_model.model.{part}", f"model.{part}") for part in ("embed_tokens.", "layers.", "norm.")),
    ),
}
"""Beginnings of canonical names, and what they are in the sister systems' formats; the other names are the same."""


def sister_name(name: str, system: System, *, canonical: bool = False) -> str:
    """Return a canonical name as a sister system's format has it; with `canonical`, the other way round."""
    for pair in _SISTERS[system]:
        ours, theirs = reversed(pair) if canonical else pair
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def canonical_projector_name(name: str) -> str:
    """Return the canonical form of a projector's tensor name; original LLaVA writes several prefixes."""
    _, separator, tail = name.rpartition("mm_projector.")
    return canonical_name(f"model.mm_projector.{tail}") if separator else canonical_name(name)


def is_moe_llava(config: VLMConfig) -> bool:
    """Return whether the original format of a model is MoE-LLaVA's: it has experts, or loses SigLIP's first patch."""
    return config.text.experts is not None or (config.feature_select == "patch" and not config.vision.class_token)


def original_name(name: str, config: VLMConfig) -> str:
    """Return a canonical name as original LLaVA writes it, or MoE-LLaVA, or a sister system."""
    if config.system != "llava":
        return sister_name(name, config.system)
    root = "transformer." if config.text.family == "qwen" else "model."
    projector, tower = f"{root}mm_projector.", f"{root}vision_tower.vision_tower."
    if is_moe_llava(config):
        projector, tower = f"{projector}image_spatial_proj.", f"{root}image_tower.image_tower."
    name = family_name(name, config.text)
    for ours, theirs in (
        ("language_model.lm_head.", "lm_head."),
        *(
            (
                ("language_model.model.embed_tokens.", "transformer.wte."),
                ("language_model.model.norm.", "transformer.ln_f."),
            )
            if root == "transformer."
            else ()
        ),
        ("language_model.model.layers.", "transformer.h." if root == "transformer." else "model.layers."),
        ("language_model.model.", "model."),
        ("vision_tower.", tower),
        ("multi_modal_projector.linear_1.", projector if config.projector == "linear" else f"{projector}0."),
        ("multi_modal_projector.linear_2.", f"{projector}2."),
    ):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    name = name.replace(".mlp.router.", ".mlp.deepspeed_moe.gate.wg.")
    return name.replace(".mlp.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts.")


def memory_name(name: str, config: VLMConfig) -> str:
    """Return a canonical name as PEFT finds modules: in memory, by transformers >= 4.52 or a sister system's code."""
    if config.system != "llava":
        return sister_name(name, config.system)
    name = family_name(name, config.text)
    for ours, theirs in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
