"""The tensors of a checkpoint: which of them fills which parameter, and in which layout.

Canonical names of tensors are those that transformers writes for llava-hf; for the parts of the sister systems that LLaVA
does not have, those of their authors. Names of other formats: see `names`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reverie_jax.models.config import TextConfig, VLMConfig

HEAD, EMBEDDING = "language_model.lm_head", "language_model.model.embed_tokens.weight"

Stack = tuple[tuple[int, ...], ...]
Layout = Literal["same", "linear", "conv", "batched", "token"]
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
    if layout in ("batched", "token"):  # torch: (1, …), (1, 1, …)
        return tensor.reshape(tensor.shape[1 if layout == "batched" else 2 :])
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
    if layout in ("batched", "token"):
        array = array[None] if layout == "batched" else array[None, None]
    return np.ascontiguousarray(array)


def parameter_specs(config: VLMConfig) -> list[ParameterSpec]:
    """Return every parameter of the model with its canonical tensor name, in the order of the files that are written."""
    specs: list[ParameterSpec] = []
    _ENCODERS[config.system](specs, config)
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


def _add_linear(specs: list[ParameterSpec], path: str, name: str, stack: Stack = (), *, bias: bool) -> None:
    specs.append(ParameterSpec(f"{path}.kernel", f"{name}.weight", "linear", stack))
    if bias:
        specs.append(ParameterSpec(f"{path}.bias", f"{name}.bias", stack=stack))


def _add_norm(specs: list[ParameterSpec], path: str, name: str, stack: Stack = (), *, bias: bool = True) -> None:
    specs.append(ParameterSpec(f"{path}.scale", f"{name}.weight", stack=stack))
    if bias:
        specs.append(ParameterSpec(f"{path}.bias", f"{name}.bias", stack=stack))


def _add_linears(specs: list[ParameterSpec], path: str, name: str, stack: Stack, **parts: str) -> None:
    for ours, theirs in parts.items():
        _add_linear(specs, path + ours, name + theirs, stack, bias=True)


def _add_norms(specs: list[ParameterSpec], path: str, name: str, stack: Stack, **parts: str) -> None:
    for ours, theirs in parts.items():
        _add_norm(specs, path + ours, name + theirs, stack)


def _add_llava(specs: list[ParameterSpec], config: VLMConfig) -> None:
    vision = config.vision
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
    if config.projector_norm_eps is not None:
        _add_norm(specs, "projector.norm", "multi_modal_projector.projector_layernorm")
    for number in (1, 2)[: 2 if config.projector == "mlp2x_gelu" else 1]:
        name = f"multi_modal_projector.linear_{number}"
        _add_linear(specs, f"projector.linear{number}", name, bias=config.projector_bias)


def _add_minigpt4(specs: list[ParameterSpec], config: VLMConfig) -> None:
    vision, resampler, tower = config.vision, config.vision.resampler, "visual_encoder."
    assert resampler is not None
    specs.append(ParameterSpec("vision.cls", tower + "cls_token", "token"))
    specs.append(ParameterSpec("vision.position", tower + "pos_embed", "batched"))
    specs.append(ParameterSpec("vision.patch.kernel", tower + "patch_embed.proj.weight", "conv"))
    specs.append(ParameterSpec("vision.patch.bias", tower + "patch_embed.proj.bias"))
    layer, stack = tower + "blocks.{}.", (tuple(range(vision.layers)),)
    _add_linear(specs, "vision.layers.qkv", layer + "attn.qkv", stack, bias=False)
    for ours, theirs in (("query_bias", "q_bias"), ("value_bias", "v_bias")):
        specs.append(ParameterSpec(f"vision.layers.{ours}", f"{layer}attn.{theirs}", stack=stack))
    _add_linears(specs, "vision.layers.", layer, stack, out="attn.proj", up="mlp.fc1", down="mlp.fc2")
    _add_norms(specs, "vision.layers.", layer, stack, norm1="norm1", norm2="norm2")
    _add_norm(specs, "vision.post_norm", "ln_vision")
    specs.append(ParameterSpec("vision.resampler.queries", "query_tokens", "batched"))
    _add_norm(specs, "vision.resampler.norm", QFORMER + "embeddings.LayerNorm")
    for path, first in (("vision.resampler.layers.first.", 0), ("vision.resampler.layers.second.", 1)):
        layer, stack = QFORMER + "encoder.layer.{}.", (tuple(range(first, resampler.layers, 2)),)
        for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))[: 1 if first else 2]:
            parts = {name: f"self.{name}" for name in ("query", "key", "value")}
            _add_linears(specs, f"{path}{ours}.", f"{layer}{theirs}.", stack, **parts, out="output.dense")
            _add_norm(specs, f"{path}{ours}_norm", f"{layer}{theirs}.output.LayerNorm", stack)
        _add_linears(specs, path, layer, stack, up="intermediate_query.dense", down="output_query.dense")
        _add_norm(specs, f"{path}mlp_norm", layer + "output_query.LayerNorm", stack)
    _add_linear(specs, "projector.linear1", "llama_proj", bias=True)


QFORMER, BEIT3 = "Qformer.bert.", "model.vision_tower.beit3."


def _add_mplug_owl(specs: list[ParameterSpec], config: VLMConfig) -> None:
    vision, resampler, tower = config.vision, config.vision.resampler, "vision_model."
    assert resampler is not None
    specs.append(ParameterSpec("vision.cls", tower + "embeddings.cls_token", "token"))
    specs.append(ParameterSpec("vision.position", tower + "embeddings.position_embedding", "batched"))
    specs.append(ParameterSpec("vision.patch.kernel", tower + "embeddings.patch_embed.weight", "conv"))
    _add_norm(specs, "vision.pre_norm", tower + "embeddings.pre_layernorm")
    layer, stack = tower + "encoder.layers.{}.", (tuple(range(vision.layers)),)
    attention = {"qkv": "self_attn.query_key_value", "out": "self_attn.dense"}
    _add_linears(specs, "vision.layers.", layer, stack, **attention, up="mlp.fc1", down="mlp.fc2")
    _add_norms(specs, "vision.layers.", layer, stack, norm1="input_layernorm", norm2="post_attention_layernorm")
    _add_norm(specs, "vision.post_norm", tower + "post_layernorm")
    specs.append(ParameterSpec("vision.resampler.queries", "query_tokens", "batched"))
    path, layer = "vision.resampler.layers.", "abstractor.encoder.layers.{}.crossattention."
    stack = (tuple(range(resampler.layers)),)
    parts = {name: f"attention.{name}" for name in ("query", "key", "value")}
    _add_linears(specs, f"{path}attention.", layer, stack, **parts, out="output.out_proj")
    mlp = layer + "output.mlp."
    _add_linears(specs, path, mlp, stack, gate="w1", down="w2", up="w3")
    _add_norms(specs, path, layer, stack, query_norm="norm1", token_norm="normk", norm2="output.norm2")
    _add_norm(specs, f"{path}mlp_norm", mlp + "ffn_ln", stack)
    _add_linear(specs, "projector.linear1", "abstractor.visual_fc", bias=True)
    specs.append(ParameterSpec("projector.token", "abstractor.vit_eos", "token"))


def _add_muffin(specs: list[ParameterSpec], config: VLMConfig) -> None:
    specs.append(ParameterSpec("vision.queries", "model.query"))
    specs.append(ParameterSpec("vision.cls", BEIT3 + "vision_embed.cls_token", "token"))
    specs.append(ParameterSpec("vision.patch.kernel", BEIT3 + "vision_embed.proj.weight", "conv"))
    specs.append(ParameterSpec("vision.patch.bias", BEIT3 + "vision_embed.proj.bias"))
    specs.append(ParameterSpec("vision.position", BEIT3 + "encoder.embed_positions.A.weight"))
    specs.append(ParameterSpec("vision.query_position", BEIT3 + "encoder.embed_positions.B.weight"))
    layer, stack = BEIT3 + "encoder.layers.{}.", (tuple(range(config.vision.layers)),)
    for side, letter in (("image", "A"), ("query", "B")):
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
            _add_linear(specs, f"vision.layers.{ours}.{side}", f"{layer}self_attn.{theirs}.{letter}", stack, bias=True)
        for ours, theirs in (("up", "fc1"), ("down", "fc2")):
            _add_linear(specs, f"vision.layers.{ours}.{side}", f"{layer}ffn.{letter}.{theirs}", stack, bias=True)
        for ours, theirs in (
            ("norm1", f"self_attn_layer_norm.{letter}"),
            ("norm2", f"final_layer_norm.{letter}"),
            ("attention_norm", f"self_attn.inner_attn_ln.{letter}"),
            ("mlp_norm", f"ffn.{letter}.ffn_layernorm"),
        ):
            _add_norm(specs, f"vision.layers.{ours}.{side}", layer + theirs, stack)
        _add_norm(specs, f"vision.post_norm.{side}", f"{BEIT3}encoder.layer_norm.{letter}")
    _add_linear(specs, "projector.linear1", "model.mm_projector", bias=True)


_ENCODERS = {"llava": _add_llava, "minigpt4": _add_minigpt4, "mplug-owl": _add_mplug_owl, "muffin": _add_muffin}
"""What adds the tensors of tower, resampler and projector, by system."""


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
