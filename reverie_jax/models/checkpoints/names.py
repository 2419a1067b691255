"""Which tensor of a checkpoint is which parameter, and how its axes turn.

The names that transformers writes for llava-hf stand for all formats: every other spelling is turned into them
(`canonical`), and out of them (`original_name`, `memory_name`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from reverie_jax.models.config import ProjectorKind, VLMConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensor, or the stack of tensors, that fills it.

    Attributes:
        path: dotted path of the parameter.
        name: tensor name on disk; `{}` stands for the layer where the parameter is stacked `layers` times.
        turn: which way the axes turn (see `to_ours` and `to_theirs`).
    """

    path: str
    name: str
    turn: str = "same"
    layers: int | None = None

    @property
    def names(self) -> list[str]:
        return [self.name] if self.layers is None else [self.name.format(i) for i in range(self.layers)]


def to_ours(turn: str, tensor: Any) -> Any:
    """A tensor of the file as the parameter has it: the same on host and on device."""
    if turn == "linear":  # torch: (out, in)
        return tensor.T
    if turn == "conv":  # torch: (out, channel, row, column)
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor


def to_theirs(turn: str, array: np.ndarray, patch: int) -> np.ndarray:
    """A parameter as the file has it; the inverse of `to_ours`."""
    if turn == "linear":
        return np.ascontiguousarray(array.T)
    if turn == "conv":
        return np.ascontiguousarray(array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array)


_ATTENTION = {"q": "query", "k": "key", "v": "value", "qkv": "qkv", "o": "out"}


def entries(config: VLMConfig) -> list[Entry]:
    """Every parameter of the model, by its name on disk (the prefixes that all transformers versions write)."""
    table: list[Entry] = []

    def add(path: str, name: str, turn: str = "same", layers: int | None = None) -> None:
        table.append(Entry(path, name, turn, layers))

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
    return table


IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Tensors that old files carry and no model needs: both are functions of the configuration."""

CLIP_REST = re.compile(r"^(text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale)$")
"""What a CLIP repository holds beside the tower."""

_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
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


def canonical(name: str) -> str:
    """A tensor's name, however it is spelt, with the prefixes that `entries` uses."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def projector_name(name: str) -> str:
    """A projector's tensor whatever stands before `mm_projector.`: original LLaVA writes several prefixes."""
    _, found, tail = name.rpartition("mm_projector.")
    return canonical(f"model.mm_projector.{tail}") if found else canonical(name)


def original_name(name: str, projector: ProjectorKind) -> str:
    """A name of `entries` as original LLaVA spells it."""
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
    """A name of `entries` as transformers >= 4.52 has it in memory, where PEFT finds modules."""
    for ours, theirs in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
