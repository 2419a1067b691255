"""LoRA adapters of PEFT and of original LLaVA: onto a model, and off it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from reverie_jax.errors import CheckpointError
from reverie_jax.files import write_json
from reverie_jax.models import lora
from reverie_jax.models.checkpoints.configs import original_json
from reverie_jax.models.checkpoints.files import Tensors, read_json, weights_of
from reverie_jax.models.checkpoints.identity import Checksums, base_checksums
from reverie_jax.models.checkpoints.names import (
    ParameterSpec,
    canonical_name,
    parameter_specs,
    memory_name,
    original_name,
    canonical_projector_name,
    to_model_layout,
    to_file_layout,
)
from reverie_jax.models.checkpoints.parts import ADAPTER_CONFIG, NON_LORA, SAID, WHOLE, CheckpointPart, recognise
from reverie_jax.models.vlm import VisionLanguageModel

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RECORD = "reverie.json"
"""Beside what we write: where it comes from, and for an adapter the identity of its base."""

_FACTOR = re.compile(r"^(base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_SAVED = re.compile(r"^base_model\.model\.(?P<name>.*multi_modal_projector\..+)$")

# Settings of an adapter_config.json that change what it computes, with the values under which it is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # The other ways to start an adapter also change the base's weights.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    "modules_to_save": (None, [], ["multi_modal_projector"]),
}

# Settings that say where an adapter came from or how it was trained, whatever their value.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config"),
    *("megatron_core", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type"),
    *("ensure_weight_tying", "use_rslora", "_custom_modules", "runtime_config"),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter folder brought.

    Attributes:
        base: the base's name, as the folder records it.
        projector: it brought a projector too.
    """

    base: str
    projector: bool


def attach_adapter(model: VisionLanguageModel, folder: str | Path, *, base: Sequence[str | Path] = ()) -> Adapter:
    """Puts a PEFT adapter, or an original LLaVA LoRA folder, on a model, in place; it stays apart from the weights.

    Args:
        base: what the model was read from.

    Raises:
        CheckpointError: the folder is no such adapter, does not fit, or was made on another base.
    """
    part = recognise(folder)
    if part.kind not in ("peft", "llava-lora"):
        raise CheckpointError(f"{part.place}: {SAID[part.kind]}, not an adapter")
    return attach_lora(model, part, base)


def attach_lora(model: VisionLanguageModel, part: CheckpointPart, base: Sequence[str | Path]) -> Adapter:
    """See `attach_adapter`.

    Args:
        base: what the model was put together from.
    """
    if carriers := [path for path, *_ in lora.adapters(model)]:
        raise CheckpointError(
            f"{part.place}: the model carries an adapter already (on {carriers[0]}, …); merge it first"
        )
    settings = read_json(part.place / ADAPTER_CONFIG)
    scale = _scale(part.place / ADAPTER_CONFIG, settings)
    trained_on = str(settings.get("base_model_name_or_path") or "")
    if part.kind == "llava-lora":
        _check_base_kind(part, trained_on, base)
    tensors = weights_of(part.place, ADAPTER_WEIGHTS)
    if tensors is None:
        raise CheckpointError(f"{part.place}: neither {' nor '.join(ADAPTER_WEIGHTS)} is there")
    by_name = {name: (spec, layer) for spec in parameter_specs(model.config) for layer, name in enumerate(spec.names)}
    factors, saved = _sorted(part, tensors, by_name)
    if part.kind == "llava-lora":
        saved = {}  # its projector lies in a file of its own
    _check_identity(model, part.place, brings_projector=bool(saved) or part.kind == "llava-lora")
    layers = dict(lora.linears(model))
    _check_shapes(part, tensors, factors, layers, settings["r"])
    ready: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    arrays: dict[str, np.ndarray] = {}
    wanted = {name for sides in factors.values() for names in sides.values() for name in names} | set(saved.values())
    tensors.read_all(lambda name, array: arrays.__setitem__(name, array), wanted)
    for path, sides in factors.items():
        layer = layers[path]
        a, b = (np.stack([arrays[name].astype(np.float32).T for name in sides[side]]) for side in "AB")
        ready[path] = (a, b) if layer.layers is not None else (a[0], b[0])
    brought = {known: arrays[name] for known, name in saved.items()}
    if part.kind == "llava-lora":
        brought = _non_lora(part)
    _set_projector(model, part.place, brought)
    for path, (a, b) in ready.items():
        lora.set_factors(layers[path], a, b, scale=scale, dropout=0.0)
    return Adapter(trained_on, bool(brought))


def _scale(path: Path, settings: dict[str, Any]) -> float:
    for key, plain in _PLAIN.items():
        if settings.get(key) not in plain:
            raise CheckpointError(
                f"{path}: {key} {settings.get(key)!r} is not supported; the adapter would be read wrongly"
            )
    for key in sorted(settings.keys() - _PLAIN.keys() - _HARMLESS):
        if settings[key]:
            raise CheckpointError(
                f"{path}: {key} {settings[key]!r} is not known here; the adapter could be read wrongly"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: r {rank!r} and lora_alpha {alpha!r} are no rank and no number")
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _check_base_kind(part: CheckpointPart, trained_on: str, base: Sequence[str | Path]) -> None:
    """LLaVA's adapters stand on the plain language model; on a LLaVA they load without a murmur and answer worse."""
    last = trained_on.rstrip("/").split("/")[-1]
    for name in base:
        under = recognise(name)
        if under.kind in WHOLE and "llava" not in last.lower() and under.place.name != last:
            raise CheckpointError(
                f"{part.place}: was trained on {trained_on!r}, a plain language model, and {under.place} is"
                f" {SAID[under.kind]}; give the language model (and CLIP) as base. If it was trained on this LLaVA, say so"
                f" in base_model_name_or_path of {ADAPTER_CONFIG}"
            )


def _sorted(
    part: CheckpointPart, tensors: Tensors, by_name: dict[str, tuple[ParameterSpec, int]]
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """Stored names by linear layer, side and depth; and a projector's by canonical name.

    Raises:
        CheckpointError: a tensor has no place, a place is taken twice, or one is left empty.
    """
    factors: dict[str, dict[str, list[str | None]]] = {}
    saved: dict[str, str] = {}
    for name, stored in tensors.stored.items():
        if stored.dtype is None:
            raise CheckpointError(f"{stored.file}: tensor {name} holds no floating-point numbers")
        if match := _FACTOR.match(name):
            spec, layer = by_name.get(canonical_name(match["module"] + ".weight"), (None, 0))
            if spec is None or spec.layout != "linear":
                raise CheckpointError(f"{part.place}: tensor {name} adapts nothing in this model")
            path, side = spec.path.removesuffix(".kernel"), match["side"]
            depth = len(spec.names)
            places = factors.setdefault(path, {"A": [None] * depth, "B": [None] * depth})[side]
            if places[layer] is not None:
                raise CheckpointError(f"{part.place}: {path} (layer {layer}) has two lora_{side}")
            places[layer] = name
        elif (match := _SAVED.match(name)) and canonical_name(match["name"]) in by_name:
            known = canonical_name(match["name"])
            if known in saved:
                raise CheckpointError(f"{part.place}: {known} is there twice")
            saved[known] = name
        else:
            raise CheckpointError(f"{part.place}: tensor {name} has no place in a LoRA adapter of this model")
    if not factors:
        raise CheckpointError(f"{part.place}: no adapter in it")
    full: dict[str, dict[str, list[str]]] = {}
    for path, sides in factors.items():
        for side, names in sides.items():
            if None in names:
                raise CheckpointError(f"{part.place}: lora_{side} of {path} is missing in layer {names.index(None)}")
        full[path] = {side: [name for name in names if name is not None] for side, names in sides.items()}
    return full, saved


def _check_shapes(
    part: CheckpointPart, tensors: Tensors, factors: dict[str, dict[str, list[str]]], layers: dict[str, Any], rank: int
) -> None:
    for side in "AB":
        for path, sides in factors.items():
            layer = layers[path]
            wanted = (rank, layer.inputs) if side == "A" else (layer.outputs, rank)
            for name in sides[side]:
                if (found := tensors.stored[name].shape) != wanted:
                    raise CheckpointError(
                        f"{part.place}: tensor {name} is {found}; on this base, with r {rank}, it must be {wanted}"
                    )


def _non_lora(part: CheckpointPart) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def use(name: str, array: np.ndarray) -> None:
        found[canonical_projector_name(name)] = array

    tensors = Tensors([part.place / NON_LORA])
    for name, stored in tensors.stored.items():
        if stored.dtype is None:
            raise CheckpointError(f"{stored.file}: tensor {name} holds no floating-point numbers")
        if canonical_projector_name(name) in found:
            raise CheckpointError(f"{stored.file}: {canonical_projector_name(name)} is there twice")
        found[canonical_projector_name(name)] = np.empty(0)
    tensors.read_all(use, set(tensors.stored))
    return found


def _set_projector(model: VisionLanguageModel, place: Path, brought: dict[str, np.ndarray]) -> None:
    if not brought:
        return
    wanted = {
        spec.name: spec
        for spec in parameter_specs(model.config)
        if spec.path.startswith("projector.") and spec.layers is None
    }
    if brought.keys() != wanted.keys():
        different = ", ".join(sorted(brought.keys() ^ wanted.keys()))
        raise CheckpointError(f"{place}: its projector and the model's are not of one kind ({different})")
    for name, array in brought.items():
        spec = wanted[name]
        _, part, leaf = spec.path.split(".")
        variable = getattr(getattr(model.projector, part), leaf)
        ours = to_model_layout(spec.layout, array)
        if ours.shape != variable.shape:
            raise CheckpointError(f"{place}: projector tensor {name} is {array.shape}; the model's is {variable.shape}")
        lora.assign(variable, ours)


def _check_identity(model: VisionLanguageModel, place: Path, *, brings_projector: bool) -> None:
    path = place / RECORD
    if not path.exists():
        return
    recorded = read_json(path).get("base")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{path}: base is {recorded!r}, no identity of a base")
    check_identity(base_checksums(model), recorded, str(place), ignore=("projector",) if brings_projector else ())


def check_identity(found: Checksums, recorded: Checksums, who: str, *, ignore: Sequence[str] = ()) -> None:
    """An adapter made on other weights is an error.

    Raises:
        CheckpointError: a part differs; it is named.
    """
    different = [part for part in recorded if part not in ignore and recorded[part] != found.get(part)]
    if different:
        raise CheckpointError(
            f"{who}: was made on another base: {', '.join(different)} differ (recorded"
            f" {', '.join(recorded[part] for part in different)}; here {', '.join(str(found.get(p)) for p in different)})"
        )


def _factors_out(model: VisionLanguageModel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Adapters by module name (`entries`' names, without `.weight`), each as torch has them: (r, in) and (out, r).

    Raises:
        CheckpointError: the model carries none, or one where the formats have no place for it.
    """
    table = {spec.path: spec for spec in parameter_specs(model.config)}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, layer, *factors in lora.adapters(model):
        if not path.startswith("decoder."):
            raise CheckpointError(f"an adapter on {path} cannot be written; only those of the decoder can")
        a, b = (np.asarray(factor[...]) for factor in factors)
        if layer.layers is None:
            a, b = a[None], b[None]
        for name, one_a, one_b in zip(table[f"{path}.kernel"].names, a, b, strict=True):
            pair = np.ascontiguousarray(one_a.T), np.ascontiguousarray(one_b.T)
            found[name.removesuffix(".weight")] = pair
    if not found:
        raise CheckpointError("the model carries no adapter to write")
    return found


def _adapter_json(model: VisionLanguageModel, base: str, targets: Any, saved: list[str] | None) -> dict[str, Any]:
    found = list(lora.adapters(model))
    ranks, scales = {a.shape[-1] for _, _, a, _ in found}, {layer.lora_scale for _, layer, *_ in found}
    if len(ranks) > 1 or len(scales) > 1:
        raise CheckpointError(f"adapters of several ranks or scales ({ranks}, {scales}) have no place in one folder")
    rank = ranks.pop()
    alpha = scales.pop() * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": max(layer.lora_dropout for _, layer, *_ in found),
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


def _projector_out(model: VisionLanguageModel) -> dict[str, np.ndarray]:
    patch, found = model.config.vision.patch_size, {}
    for spec in parameter_specs(model.config):
        if spec.path.startswith("projector."):
            _, part, leaf = spec.path.split(".")
            value = np.asarray(getattr(getattr(model.projector, part), leaf)[...])
            found[spec.name] = to_file_layout(spec.layout, value, patch)
    return found


def write_peft(model: VisionLanguageModel, folder: Path, *, base: str, projector: bool) -> None:
    """adapter_config.json and adapter_model.safetensors for `PeftModel` on `LlavaForConditionalGeneration`.

    Args:
        base: the base's name, for `base_model_name_or_path`.
        projector: write the projector too (`modules_to_save`): it was tuned with the adapters.

    Raises:
        CheckpointError: the model carries no adapter, or one that this format has no place for.
    """
    if model.config.projector != "mlp2x_gelu":
        raise CheckpointError("transformers' LLaVA has no linear projector: no PEFT adapter fits it; write llava-lora")
    tensors, leaves = {}, set()
    for module, (a, b) in _factors_out(model).items():
        name = memory_name(module + ".").rstrip(".")
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        leaves.add(name.split(".")[-1])
    if projector:
        for name, array in _projector_out(model).items():
            tensors[f"base_model.model.{memory_name(name)}"] = array
    # A pattern, not leaf names: the vision tower has projections of the same names.
    inside = "|".join(sorted(leaves - {"lm_head"}))
    targets = rf".*language_model.*\.layers\.\d+\.(self_attn|mlp)\.({inside})"
    if "lm_head" in leaves:
        targets = rf"({targets})|(.*\.)?lm_head"
    saved = ["multi_modal_projector"] if projector else None
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, _adapter_json(model, base, targets, saved))


def write_llava_lora(model: VisionLanguageModel, folder: Path, *, base: str, special_ids: dict[str, Any]) -> None:
    """The files that original LLaVA's loader wants of a LoRA folder; it asks that the folder's name hold llava and lora.

    Raises:
        CheckpointError: the model carries no adapter, or PyTorch, which writes the projector's file, is not there.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(f"writing {NON_LORA} needs PyTorch; install reverie-jax[convert]") from None
    tensors, leaves = {}, set()
    for module, (a, b) in _factors_out(model).items():
        name = original_name(module + ".", model.config.projector).rstrip(".")
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        leaves.add(name.split(".")[-1])
    projector = {
        f"base_model.model.{original_name(name, model.config.projector)}": torch.from_numpy(np.array(array, np.float32))
        for name, array in _projector_out(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    torch.save(projector, folder / NON_LORA)
    write_json(folder / ADAPTER_CONFIG, _adapter_json(model, base, sorted(leaves), None))
    dtype = np.dtype(model.compute_dtype).name
    (folder / "config.json").write_text(json.dumps(original_json(model.config, dtype, special_ids), indent=2) + "\n")
