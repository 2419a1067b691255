"""Writers of complete models: llava-hf and original LLaVA, as safetensors in shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors.numpy import save_file

from reverie_jax.errors import CheckpointError
from reverie_jax.files import write_json
from reverie_jax.models.checkpoints.configs import llava_hf_json, original_json, preprocessor_json
from reverie_jax.models.checkpoints.files import is_finite
from reverie_jax.models.checkpoints.names import family_name, original_name
from reverie_jax.models.checkpoints.sisters import sister_json
from reverie_jax.models.checkpoints.specs import AnyArray, ParameterSpec, parameter_specs, to_file_layout
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.lora import assign
from reverie_jax.models.vlm import VisionLanguageModel

SHARD_BYTES = 5_000_000_000
_LLAMA_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def write_model(
    model: VisionLanguageModel,
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    special_ids: dict[str, Any] | None = None,
) -> None:
    """Write a llava-hf folder (`LlavaForConditionalGeneration`): config.json, preprocessor_config.json, weights.

    Args:
        model: The model.
        folder: Created if it is missing.
        dtype: Of all tensors; the model's own by default.
        shard_bytes: Size of the largest file of weights.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; LLaMA's by default.

    Raises:
        CheckpointError: The format does not support the model (linear projector, unmerged adapters).
    """
    config = model.config
    check_llava(config, "llava-hf")
    for what in missing_in_llava_hf(config):
        raise CheckpointError(f"llava-hf does not support {what}; write llava or orbax")
    check_merged(model)
    dtype = np.dtype(model.compute_dtype if dtype is None else dtype)
    folder.mkdir(parents=True, exist_ok=True)
    names = {spec.path: [family_name(name, config.text) for name in spec.names] for spec in parameter_specs(config)}
    _write_weights(model, folder, dtype, shard_bytes, names)
    write_json(folder / "config.json", llava_hf_json(config, dtype.name, special_ids or _LLAMA_SPECIAL_IDS))
    write_json(folder / "preprocessor_config.json", preprocessor_json(config))


def write_original(
    model: VisionLanguageModel,
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    special_ids: dict[str, Any] | None = None,
) -> None:
    """Write a folder in the format of the model's authors, vision tower included: original LLaVA's, or a sister system's.

    Arguments and errors are as for `write_model`.
    """
    check_merged(model)
    dtype = np.dtype(model.compute_dtype if dtype is None else dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    text = config.text
    for lacking, what in (
        (len(config.feature_layers) > 1, "several feature layers"),
        (config.projector_norm_eps is not None, "a normalization before the projector"),
        (config.projector_activation != "gelu", f"{config.projector_activation} in the projector"),
        (not config.projector_bias, "projectors without biases"),
        (text.family == "phi" and not text.head_bias, "Phi-2 without a bias of the LM head"),
    ):
        if lacking:
            raise CheckpointError(f"original LLaVA's format does not support {what}; write llava-hf or orbax")
    names = {spec.path: [original_name(name, config) for name in spec.names] for spec in parameter_specs(config)}
    _write_weights(model, folder, dtype, shard_bytes, names)
    describe = original_json if config.system == "llava" else sister_json
    write_json(folder / "config.json", describe(config, dtype.name, special_ids or _LLAMA_SPECIAL_IDS))


def missing_in_llava_hf(config: VLMConfig) -> list[str]:
    """Return what a LLaVA has that transformers' class does not support."""
    features = {
        "linear projectors": config.projector != "mlp2x_gelu",
        "experts": config.text.experts is not None,
        "Qwen-1": config.text.family == "qwen",
        "an LM head with a bias (Phi-2's)": config.text.head_bias,  # transformers >= 4.52 would drop it
    }
    return [what for what, present in features.items() if present]


def check_llava(config: VLMConfig, format: str) -> None:
    """Check that a model is not a sister system's.

    Raises:
        CheckpointError: It is, and the format supports none.
    """
    if config.system != "llava":
        raise CheckpointError(
            f"{format} does not support MiniGPT-4, mPLUG-Owl and Muffin; write original, orbax or, of adapters, peft"
        )


def check_merged(model: VisionLanguageModel) -> None:
    """Check that a model has no adapters.

    Raises:
        CheckpointError: It has.
    """
    if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)).leaves:
        raise CheckpointError("the model has adapters, which this format does not support; merge them first")


def _write_weights(
    model: VisionLanguageModel, folder: Path, dtype: np.dtype[Any], shard_bytes: int, names: dict[str, list[str]]
) -> None:
    """Write shards one by one, in the order of `parameter_specs`: the host holds one shard beside the model."""
    values = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    shards: list[list[tuple[ParameterSpec, int]]] = [[]]
    room = shard_bytes
    for spec in parameter_specs(model.config):
        size = values[spec.path].size * dtype.itemsize // len(spec.names)
        for number in range(len(spec.names)):
            if size > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append((spec, number))
            room -= size
    files = [_shard_name(number, len(shards)) for number in range(len(shards))]
    weight_map: dict[str, str] = {}
    total = 0
    for file, members in zip(files, shards, strict=True):
        shard: dict[str, AnyArray] = {}
        for spec, number in members:
            name, place = spec.places[number]
            value = values[spec.path].get_value()
            with np.errstate(over="ignore"):  # said below
                array = np.asarray(value[place] if place else value).astype(dtype, copy=False)
            if not is_finite(array):
                raise CheckpointError(f"{name}: has values that are NaN, infinite or beyond {dtype.name}")
            shard[names[spec.path][number]] = to_file_layout(spec.layout, array, model.config.vision.patch_size)
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in shard.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def resize_vocabulary(model: VisionLanguageModel, rows: int) -> None:
    """Cut embedding and head to `rows`, or add rows that are the mean of the others, in place."""
    decoder = model.decoder
    assign(decoder.embedding, _resized(decoder.embedding.get_value(), rows, axis=0))
    if (head := decoder.head) is not None:
        assign(head.kernel, _resized(head.kernel.get_value(), rows, axis=1))
        if head.bias is not None:
            assign(head.bias, _resized(head.bias.get_value(), rows, axis=0))
        head.outputs = rows
    text = dataclasses.replace(model.config.text, vocab=rows)
    model.config = dataclasses.replace(model.config, text=text)
    decoder.config = text


def _resized(x: Array, size: int, axis: int) -> Array:
    more = size - x.shape[axis]
    if more <= 0:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    mean = x.astype(jnp.float32).mean(axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, more, axis)], axis=axis)
