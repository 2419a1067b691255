"""Map the tensors of a checkpoint to parameters, with their layouts.

The names that transformers writes for llava-hf are the canonical ones: names of other formats are converted into them
(`canonical_name`) and from them (`original_name`, `memory_name`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reverie_jax.models.config import ProjectorKind, VLMConfig

Layout = Literal["same", "linear", "conv"]
AnyArray = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter and the tensor, or the stack of tensors, that fills it.

    Attributes:
        path: Dotted path of the parameter.
        name: Tensor name on disk; `{}` stands for the layer where the parameter is stacked `layers` times.
        layout: How the file's axes differ from the parameter's (see `to_model_layout`).
    """

    path: str
    name: str
    layout: Layout = "same"
    layers: int | None = None

    @property
    def names(self) -> list[str]:
        """Tensor names on disk, one for each layer."""
        return [self.name] if self.layers is None else [self.name.format(i) for i in range(self.layers)]


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


_ATTENTION = {"q": "query", "k": "key", "v": "value", "qkv": "qkv", "o": "out"}


def parameter_specs(config: VLMConfig) -> list[ParameterSpec]:
    """Return every parameter of the model with its canonical tensor name, in the order of the files that are written."""
    specs: list[ParameterSpec] = []

    def add(path: str, name: str, layout: Layout = "same", layers: int | None = None) -> None:
        specs.append(ParameterSpec(path, name, layout, layers))

    def linear(path: str, name: str, layers: int | None = None, bias: bool = True) -> None:
        add(f"{path}.kernel", f"{name}.weight", "linear", layers)
        if bias:
            add(f"{path}.bias", f"{name}.bias", layers=layers)

    def norm(path: str, name: str, layers: int | None = None, bias: bool = True) -> None:
        add(f"{path}.scale", f"{name}.weight", layers=layers)
        if bias:
            add(f"{path}.bias", f"{name}.bias", layers=layers)

    tower, depth = "vision_tower.vision_model.", config.vision.layers
    add("vision.patch.kernel", tower + "embeddings.patch_embedding.weight", "conv")
    add("vision.cls", tower + "embeddings.class_embedding")
    add("vision.position", tower + "embeddings.position_embedding.weight")
    norm("vision.pre_norm", tower + "pre_layrnorm")
    norm("vision.post_norm", tower + "post_layernorm")
    layer = tower + "encoder.layers.{}."
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
        linear(f"vision.layers.{ours}", f"{layer}self_attn.{theirs}", depth)
    linear("vision.layers.up", layer + "mlp.fc1", depth)
    linear("vision.layers.down", layer + "mlp.fc2", depth)
    norm("vision.layers.norm1", layer + "layer_norm1", depth)
    norm("vision.layers.norm2", layer + "layer_norm2", depth)

    linear("projector.linear1", "multi_modal_projector.linear_1")
    if config.projector == "mlp2x_gelu":
        linear("projector.linear2", "multi_modal_projector.linear_2")

    text, depth = "language_model.model.", config.text.layers
    add("decoder.embedding", text + "embed_tokens.weight")
    layer = text + "layers.{}."
    attention, mlp = (("qkv",), ("gate_up", "down")) if config.text.fused else (("q", "k", "v"), ("gate", "up", "down"))
    for name in (*attention, "o"):
        linear(f"decoder.layers.{_ATTENTION[name]}", f"{layer}self_attn.{name}_proj", depth, bias=False)
    for name in mlp:
        linear(f"decoder.layers.{name}", f"{layer}mlp.{name}_proj", depth, bias=False)
    norm("decoder.layers.norm1", layer + "input_layernorm", depth, bias=False)
    norm("decoder.layers.norm2", layer + "post_attention_layernorm", depth, bias=False)
    norm("decoder.norm", text + "norm", bias=False)
    linear("decoder.head", "language_model.lm_head", bias=False)
    return specs


IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Tensors that old files contain and no model needs: both are functions of the configuration."""

CLIP_UNUSED = re.compile(r"^(text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale)$")
"""Tensors of a CLIP repository that are not the vision tower's."""

_RENAMINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # transformers >= 4.52 in memory: state_dict() dumps and adapters
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        # original LLaVA, LLaVA-pp, plain LLaMA and Phi-3
        (r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model."),
        (r"^model\.mm_projector\.(0\.|(?=weight$|bias$))", "multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
        (r"^model\.(?=(vision_tower|multi_modal_projector)\.)", ""),
        # CLIP alone, with and without the outer level
        (r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower.vision_model."),
        # transformers 5.23 writes a fresh model's tower without this level
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    )
)


def canonical_name(name: str) -> str:
    """Return the canonical form of a tensor name of any format."""
    for pattern, replacement in _RENAMINGS:
        name = pattern.sub(replacement, name)
    return name


def canonical_projector_name(name: str) -> str:
    """Return the canonical form of a projector's tensor name; original LLaVA writes several prefixes."""
    _, separator, tail = name.rpartition("mm_projector.")
    return canonical_name(f"model.mm_projector.{tail}") if separator else canonical_name(name)


def original_name(name: str, projector: ProjectorKind) -> str:
    """Return a canonical name as original LLaVA writes it."""
    first = "model.mm_projector." if projector == "linear" else "model.mm_projector.0."
    for ours, theirs in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model."),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", first),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


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
