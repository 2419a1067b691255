"""LoRA and DoRA adapters, written for PEFT and for original LLaVA."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from reverie_jax.errors import CheckpointError
from reverie_jax.files import write_json
from reverie_jax.models import lora
from reverie_jax.models.checkpoints.adapters import ADAPTER_WEIGHTS, MAGNITUDE, projector_variables
from reverie_jax.models.checkpoints.components import ADAPTER_CONFIG, NON_LORA
from reverie_jax.models.checkpoints.configs import original_json
from reverie_jax.models.checkpoints.names import memory_name, original_name
from reverie_jax.models.checkpoints.specs import AnyArray, parameter_specs, to_file_layout
from reverie_jax.models.checkpoints.write import check_llava
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.vlm import VisionLanguageModel

Strength = tuple[int, float]
"""A module's rank and alpha."""


def _lora_tensors(
    model: VisionLanguageModel, rename: Callable[[str], str]
) -> tuple[dict[str, AnyArray], dict[str, Strength]]:
    """Return adapters as PEFT stores them, and ranks and alphas of the adapted modules.

    A layer lacks an adapter if both its factors are zero: `attach_adapter` fills stacks up so. Likewise for ranks.

    Args:
        model: The model.
        rename: Converts canonical names to those of the format.

    Raises:
        CheckpointError: The model has no adapter, an adapter outside the decoder, or experts.
    """
    if model.config.text.experts is not None:
        raise CheckpointError("formats of adapters do not support experts; write the merged model, as llava or orbax")
    specs = {spec.path: spec for spec in parameter_specs(model.config)}
    tensors: dict[str, AnyArray] = {}
    modules: dict[str, Strength] = {}
    for path, layer, *factors in lora.adapters(model):
        if not path.startswith("decoder."):
            raise CheckpointError(f"the adapter on {path} cannot be written; the formats support only the decoder's")
        variables = (*factors, layer.lora_magnitude, layer.lora_norm)
        arrays = [np.asarray(variable[...]) for variable in variables if variable is not None]
        stack = len(layer.kernel.shape) - 2
        rows = (array.reshape(-1, *array.shape[stack:]) for array in arrays)
        for name, a, b, *dora in zip(specs[f"{path}.kernel"].names, *rows, strict=True):
            rank = int(np.flatnonzero(a.any(0) | b.any(1)).max(initial=-1)) + 1
            if not rank and not (dora and np.any(dora[0] != dora[1])):
                continue
            rank, module = max(rank, 1), rename(name).removesuffix(".weight")
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a[:, :rank].T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b[:rank].T)
            if dora:
                tensors[f"base_model.model.{module}.lora_{MAGNITUDE}"] = np.ascontiguousarray(dora[0])
            modules[module] = rank, layer.lora_scale * rank
    if not tensors:
        raise CheckpointError("the model has no adapter to write")
    return tensors, modules


def _projector_tensors(model: VisionLanguageModel) -> dict[str, AnyArray]:
    patch = model.config.vision.patch_size
    return {
        name: to_file_layout(spec.layout, np.asarray(variable[...]), patch)
        for name, (spec, variable) in projector_variables(model).items()
    }


def write_peft(model: VisionLanguageModel, folder: Path, *, base_model: str, projector: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors for `PeftModel` on `LlavaForConditionalGeneration`.

    Args:
        model: The model with its adapters.
        folder: An existing folder.
        base_model: The base model's name, for `base_model_name_or_path`.
        projector: Write the projector too (`modules_to_save`): it was tuned with the adapters.

    Raises:
        CheckpointError: The model has no adapter, or one that this format does not support.
    """
    if model.config.system == "llava" and model.config.projector != "mlp2x_gelu":
        raise CheckpointError(
            "transformers' LLaVA does not support linear projectors, so no PEFT adapter; write llava-lora"
        )
    tensors, modules = _lora_tensors(model, lambda name: memory_name(name, model.config))
    saved: list[str] | None = None
    if projector:
        if model.config.projector_token:  # a parameter, not a module
            raise CheckpointError(
                "PEFT's modules_to_save cannot store the learned token after the features (abstractor.vit_eos), which was"
                " tuned with the adapters; write original or orbax, or train with trainable=adapters"
            )
        own = {memory_name(name, model.config): array for name, array in _projector_tensors(model).items()}
        tensors |= {f"base_model.model.{name}": array for name, array in own.items()}
        modules_of_it = sorted({name.rpartition(".")[0] for name in own})
        saved = ["multi_modal_projector"] if model.config.system == "llava" else modules_of_it
    targets = _target_pattern(modules, model.config)
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, _settings(model, modules, base_model, targets, saved))


def write_llava_lora(model: VisionLanguageModel, folder: Path, *, base_model: str, special_ids: dict[str, Any]) -> None:
    """Write the files of an original LLaVA LoRA folder; its loader needs llava and lora in the folder's name.

    Args:
        model: The model with its adapters.
        folder: An existing folder.
        base_model: The base model's name, for `base_model_name_or_path`.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
        CheckpointError: The model has no adapter, or one that this format does not support; or PyTorch, which writes the
            projector's file, is not installed.
    """
    check_llava(model.config, "llava-lora")
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(
            f"writing {NON_LORA} needs PyTorch: pip install -e '.[convert]' in the checkout"
        ) from None
    tensors, modules = _lora_tensors(model, lambda name: original_name(name, model.config))
    names = {module.split(".")[-1] for module in modules}
    of_decoder = (spec for spec in parameter_specs(model.config) if spec.layout == "linear" and "decoder" in spec.path)
    named = {original_name(name, model.config).removesuffix(".weight") for spec in of_decoder for name in spec.names}
    complete = {module for module in named if module.split(".")[-1] in names} == modules.keys()
    targets = sorted(names if complete else modules)
    settings = _settings(model, modules, base_model, targets, None)
    if ignored := settings.keys() & {"use_dora", "rank_pattern", "alpha_pattern"}:
        raise CheckpointError(
            f"original LLaVA's PEFT ignores {', '.join(sorted(ignored))}, which this adapter needs; write peft, or"
            " a merged model"
        )
    projector = {
        f"base_model.model.{original_name(name, model.config)}": torch.from_numpy(np.array(array, np.float32))
        for name, array in _projector_tensors(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    torch.save(projector, folder / NON_LORA)
    write_json(folder / ADAPTER_CONFIG, settings)
    dtype = np.dtype(model.compute_dtype).name
    write_json(folder / "config.json", original_json(model.config, dtype, special_ids, tower_included=False))


def _settings(
    model: VisionLanguageModel,
    modules: Mapping[str, Strength],
    base_model: str,
    targets: str | list[str],
    saved: list[str] | None,
) -> dict[str, Any]:
    """Return an adapter_config.json; `targets` and `saved` are its `target_modules` and `modules_to_save`."""
    layers = [layer for _, layer, *_ in lora.adapters(model)]
    rank, alpha = collections.Counter(modules.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": max(layer.lora_dropout for layer in layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": saved,
        "revision": None,
        "target_modules": targets,
    }
    # From the list of layers on: what precedes it differs between versions of transformers.
    names = {module: re.escape(re.sub(r"^.*?(?=layers\.\d)", "", module)) for module in modules}
    ranks = {names[module]: own for module, (own, _) in modules.items() if own != rank}
    alphas = {names[module]: _number(own) for module, (_, own) in modules.items() if own != alpha}
    dora = any(layer.lora_magnitude is not None for layer in layers)
    # Old versions of PEFT do not know these.
    more = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_dora": dora}
    return settings | {key: value for key, value in more.items() if value}


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _target_pattern(modules: Iterable[str], config: VLMConfig) -> str:
    """Return `target_modules` for modules of a decoder, by dotted names: the tower has modules of the same names."""
    # What precedes it differs between versions of transformers.
    own = re.escape(memory_name("language_model.model.layers.", config))
    start = r".*language_model.*\.layers\." if config.system == "llava" else own
    layers: dict[str, list[str]] = {}
    for match in filter(None, (re.search(r"layers\.(\d+)\.(.+)", module) for module in modules)):
        layers.setdefault(re.escape(match[2]), []).append(match[1])
    groups: dict[str, list[str]] = {}
    for name, numbers in layers.items():
        groups.setdefault(r"\d+" if len(numbers) == config.text.layers else f"({'|'.join(numbers)})", []).append(name)
    inside = "|".join(rf"{numbers}\.({'|'.join(names)})" for numbers, names in groups.items())
    pattern = rf"{start}({inside})"
    return rf"({pattern})|(.*\.)?lm_head" if any(module.endswith("lm_head") for module in modules) else pattern
