"""Which tensor of a llava-hf checkpoint is which parameter, and how its axes turn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from reverie_jax.models.config import VLMConfig


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


def to_ours(turn: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor of the file as the parameter has it."""
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
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        linear(f"decoder.layers.{ours}", f"{layer}self_attn.{theirs}", depth, bias=False)
    for name in ("gate", "up", "down"):
        linear(f"decoder.layers.{name}", f"{layer}mlp.{name}_proj", depth, bias=False)
    norm("decoder.layers.norm1", layer + "input_layernorm", depth, bias=False)
    norm("decoder.layers.norm2", layer + "post_attention_layernorm", depth, bias=False)
    norm("decoder.norm", text + "norm", bias=False)
    linear("decoder.head", "language_model.lm_head", bias=False)
    return table


IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Tensors that old files carry and no model needs: both are functions of the configuration."""

_PREFIXES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.)"), ""),
    # transformers 5.23 writes a fresh model's tower without this level.
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
)


def canonical(name: str) -> str:
    """A tensor name with the prefixes that `entries` uses."""
    for pattern, replacement in _PREFIXES:
        name = pattern.sub(replacement, name)
    return name
