"""Map the tensors of a checkpoint to parameters, with their layouts.

The names that transformers writes for llava-hf are the canonical ones: names of other formats are converted into them
(`canonical_name`) and from them (`original_name`, `memory_name`).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reverie_jax.models.config import TextConfig, VisionConfig, VLMConfig

Layout = Literal["same", "linear", "conv"]
AnyArray = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter and the tensor, or the stack of tensors, that fills it.

    Attributes:
        path: Dotted path of the parameter.
        name: Tensor name on disk, with a `{}` for each leading axis of a stack: the layer, and the expert.
        layout: How the file's axes differ from the parameter's (see `to_model_layout`).
        stack: Numbers along each leading axis that take the places of `{}`.
    """

    path: str
    name: str
    layout: Layout = "same"
    stack: tuple[tuple[int, ...], ...] = ()

    @property
    def places(self) -> list[tuple[str, tuple[int, ...]]]:
        """Tensor names on disk, with their indices along the leading axes."""
        indices = itertools.product(*(range(len(numbers)) for numbers in self.stack))
        return list(zip(self.names, indices, strict=True))

    @property
    def names(self) -> list[str]:
        """Tensor names on disk."""
        return [self.name.format(*numbers) for numbers in itertools.product(*self.stack)]


def to_model_layout(layout: Layout, tensor: Any) -> Any:
    """Return a tensor of the file with the parameter's axes; on host or on device."""
    if layout == "linear":  # torch: (out, in)
        return tensor.T
    if layout == "conv":  # torch: (out, channel, row, column)
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor


def to_file_layout(layout: Layout, array: AnyArray, patch: int) -> AnyArray:
    """Return a parameter with the file's axes: the inverse of `to_model_layout`.

    Args:
        layout: How the axes differ.
        array: The parameter, or one layer of it.
        patch: Side of the tower's patches, in pixels.
    """
    if layout == "linear":
        return np.ascontiguousarray(array.T)
    if layout == "conv":
        return np.ascontiguousarray(array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array)


def parameter_specs(config: VLMConfig) -> list[ParameterSpec]:
    """Return every parameter of the model with its canonical tensor name, in the order of the files that are written."""
    specs: list[ParameterSpec] = []
    _add_tower(specs, config.vision)
    if config.projector_norm_eps is not None:
        _add_norm(specs, "projector.norm", "multi_modal_projector.projector_layernorm")
    for number in (1, 2)[: 2 if config.projector == "mlp2x_gelu" else 1]:
        name = f"multi_modal_projector.linear_{number}"
        _add_linear(specs, f"projector.linear{number}", name, bias=config.projector_bias)
    text, root = config.text, "language_model.model."
    specs.append(ParameterSpec("decoder.embedding", root + "embed_tokens.weight"))
    if text.dense_layers:
        _add_decoder_layers(specs, "decoder.layers.", text, text.dense_layers, None)
    if text.experts:
        _add_decoder_layers(specs, "decoder.expert_layers.", text, text.expert_layers, text.experts.count)
    _add_norm(specs, "decoder.norm", root + "norm", bias=text.norm == "layernorm")
    if not text.tied_head:
        _add_linear(specs, "decoder.head", HEAD, bias=text.head_bias)
    return specs


HEAD, EMBEDDING = "language_model.lm_head", "language_model.model.embed_tokens.weight"

Stack = tuple[tuple[int, ...], ...]


def _add_linear(specs: list[ParameterSpec], path: str, name: str, stack: Stack = (), *, bias: bool) -> None:
    specs.append(ParameterSpec(f"{path}.kernel", f"{name}.weight", "linear", stack))
    if bias:
        specs.append(ParameterSpec(f"{path}.bias", f"{name}.bias", stack=stack))


def _add_norm(specs: list[ParameterSpec], path: str, name: str, stack: Stack = (), *, bias: bool = True) -> None:
    specs.append(ParameterSpec(f"{path}.scale", f"{name}.weight", stack=stack))
    if bias:
        specs.append(ParameterSpec(f"{path}.bias", f"{name}.bias", stack=stack))


def _add_tower(specs: list[ParameterSpec], vision: VisionConfig) -> None:
    tower, stack = "vision_tower.vision_model.", (tuple(range(vision.layers)),)
    specs.append(ParameterSpec("vision.patch.kernel", tower + "embeddings.patch_embedding.weight", "conv"))
    if vision.patch_bias:
        specs.append(ParameterSpec("vision.patch.bias", tower + "embeddings.patch_embedding.bias"))
    if vision.class_token:
        specs.append(ParameterSpec("vision.cls", tower + "embeddings.class_embedding"))
    specs.append(ParameterSpec("vision.position", tower + "embeddings.position_embedding.weight"))
    if vision.pre_norm:
        _add_norm(specs, "vision.pre_norm", tower + "pre_layrnorm")
    _add_norm(specs, "vision.post_norm", tower + "post_layernorm")
    layer = tower + "encoder.layers.{}."
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
        _add_linear(specs, f"vision.layers.{ours}", f"{layer}self_attn.{theirs}", stack, bias=True)
    _add_linear(specs, "vision.layers.up", layer + "mlp.fc1", stack, bias=True)
    _add_linear(specs, "vision.layers.down", layer + "mlp.fc2", stack, bias=True)
    _add_norm(specs, "vision.layers.norm1", layer + "layer_norm1", stack)
    _add_norm(specs, "vision.layers.norm2", layer + "layer_norm2", stack)


def _add_decoder_layers(
    specs: list[ParameterSpec], path: str, text: TextConfig, layers: tuple[int, ...], experts: int | None
) -> None:
    layer, stack = "language_model.model.layers.{}.", (layers,)
    mlp_stack: Stack = stack
    qkv = {"qkv": "qkv"} if text.fused_qkv else {"query": "q", "key": "k", "value": "v"}
    for ours, theirs in qkv.items():
        _add_linear(specs, path + ours, f"{layer}self_attn.{theirs}_proj", stack, bias=text.qkv_bias)
    _add_linear(specs, f"{path}out", layer + "self_attn.o_proj", stack, bias=text.out_bias)
    if text.qk_norm:
        _add_norm(specs, f"{path}query_norm", layer + "self_attn.q_norm", stack, bias=False)
        _add_norm(specs, f"{path}key_norm", layer + "self_attn.k_norm", stack, bias=False)
    mlp = layer + "mlp."
    if experts is not None:
        _add_linear(specs, f"{path}router", layer + "mlp.router", stack, bias=False)
        mlp, mlp_stack = layer + "mlp.experts.{}.", (*stack, tuple(range(experts)))
    for name in ("gate_up", "down") if text.fused_mlp else ("gate", "up", "down") if text.gated else ("up", "down"):
        _add_linear(specs, path + name, f"{mlp}{name}_proj", mlp_stack, bias=text.mlp_bias)
    bias = text.norm == "layernorm"
    _add_norm(specs, f"{path}norm1", layer + "input_layernorm", stack, bias=bias)
    if not text.parallel:
        _add_norm(specs, f"{path}norm2", layer + "post_attention_layernorm", stack, bias=bias)


IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Tensors that old files contain and no model needs: both are functions of the configuration."""

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


def canonical_projector_name(name: str) -> str:
    """Return the canonical form of a projector's tensor name; original LLaVA writes several prefixes."""
    _, separator, tail = name.rpartition("mm_projector.")
    return canonical_name(f"model.mm_projector.{tail}") if separator else canonical_name(name)


def is_moe_llava(config: VLMConfig) -> bool:
    """Return whether the original format of a model is MoE-LLaVA's: it has experts, or loses SigLIP's first patch."""
    return config.text.experts is not None or (config.feature_select == "patch" and not config.vision.class_token)


def original_name(name: str, config: VLMConfig) -> str:
    """Return a canonical name as original LLaVA writes it, or MoE-LLaVA."""
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


def memory_name(name: str) -> str:
    """Return a canonical name as transformers >= 4.52 has it in memory, where PEFT finds modules."""
    for ours, theirs in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
