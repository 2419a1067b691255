"""LoRA adapters of PEFT and of original LLaVA: read onto a model, and written from it."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from reverie_jax.errors import CheckpointError
from reverie_jax.files import write_json
from reverie_jax.models import lora
from reverie_jax.models.checkpoints.adapter_settings import AdapterSettings, read_settings
from reverie_jax.models.checkpoints.checksums import Checksums, base_checksums
from reverie_jax.models.checkpoints.components import (
    ADAPTER_CONFIG,
    COMPLETE_MODELS,
    NON_LORA,
    ComponentLike,
    detect_component,
)
from reverie_jax.models.checkpoints.configs import original_json
from reverie_jax.models.checkpoints.families import repository_name
from reverie_jax.models.checkpoints.files import Tensors, read_json, weights_of
from reverie_jax.models.checkpoints.names import (
    AnyArray,
    ParameterSpec,
    canonical_name,
    canonical_projector_name,
    memory_name,
    original_name,
    parameter_specs,
    to_file_layout,
    to_model_layout,
)
from reverie_jax.models.layers import Linear
from reverie_jax.models.vlm import VisionLanguageModel

_log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
METADATA_FILE = "reverie.json"
"""Beside the files that this project writes: their sources, and the checksums of the (base) model."""

_FACTOR = re.compile(r"^(base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_PLAIN = re.compile(r"^(base_model\.model\.)?model\.layers\.")
"""Names of a plain language model, and of original LLaVA's class; transformers' LLaVA has other ones."""
_SAVED_PROJECTOR = re.compile(r"^base_model\.model\.(?P<name>.*multi_modal_projector\..+)$")


@dataclasses.dataclass(frozen=True)
class AttachedAdapter:
    """What `attach_adapter` read from an adapter folder.

    Attributes:
        base_model: The base model's name, as the folder records it; empty where it does not.
        projector: Whether the folder contained a projector too.
    """

    base_model: str
    projector: bool


def attach_adapter(
    model: VisionLanguageModel, source: ComponentLike, *, base: Sequence[ComponentLike] = ()
) -> AttachedAdapter:
    """Attach a PEFT adapter or an original LLaVA LoRA folder to a model, in place, without merging it.

    Args:
        model: The base model.
        source: The adapter.
        base: The components that the model was read from.

    Raises:
        CheckpointError: It is not such an adapter, does not fit the model, or was made on another base model.
    """
    adapter = detect_component(source)
    if adapter.format not in ("peft", "llava-lora"):
        raise CheckpointError(f"{adapter}, not an adapter")
    path = adapter.path
    if attached := next((name for name, *_ in lora.adapters(model)), None):
        raise CheckpointError(f"{path}: the model already has an adapter (on {attached}, …); merge it first")
    settings = read_settings(path)
    trained_on = settings.base_model
    if adapter.format == "llava-lora":
        _check_base_format(path, trained_on, base)
    tensors = weights_of(path, ADAPTER_WEIGHTS)
    if tensors is None:
        raise CheckpointError(f"{path}: no weights; expected {' or '.join(ADAPTER_WEIGHTS)}")
    factors, projector_names = _group_tensors(path, tensors, model)
    if adapter.format == "llava-lora":
        projector_names = {}  # its projector is in a file of its own
    elif any(map(_PLAIN.match, tensors.stored)):
        _check_lacks_no_projector(path, trained_on)
    whole = _projector_variables(model).keys()
    saved = settings.saved_tensors(whole) if settings.saved or not projector_names else whole
    if adapter.format == "peft" and (different := saved ^ projector_names.keys()):
        raise CheckpointError(
            f"{path}: the projector's tensors are not those of modules_to_save ({', '.join(sorted(different))})"
        )
    has_projector = adapter.format == "llava-lora" or saved == whole
    _check_recorded_base(model, path, has_projector=has_projector)
    layers = dict(lora.linears(model))
    _check_shapes(path, tensors, factors, layers, settings)
    scales = {name: _scale(settings, sides["A"]) for name, sides in factors.items()}
    arrays: dict[str, AnyArray] = {}
    wanted = {name for sides in factors.values() for names in sides.values() for name in names}
    tensors.read_all(arrays.__setitem__, wanted | set(projector_names.values()))
    ready: dict[str, tuple[AnyArray, AnyArray]] = {}
    for name, sides in factors.items():
        a, b = (np.stack([arrays[stored].astype(np.float32).T for stored in sides[side]]) for side in "AB")
        ready[name] = (a, b) if layers[name].layers is not None else (a[0], b[0])
    projector = {name: arrays[stored] for name, stored in projector_names.items()}
    if adapter.format == "llava-lora":
        projector = _read_projector(path / NON_LORA)
        _check_projector(path, projector.keys(), whole)
    _set_projector(model, path, projector)
    for name, (a, b) in ready.items():
        lora.set_factors(layers[name], a, b, scale=scales[name], dropout=0.0)
    return AttachedAdapter(trained_on, bool(projector))


def _check_base_format(path: Path, trained_on: str, base: Sequence[ComponentLike]) -> None:
    """Refuse an adapter of a plain language model on a full LLaVA: it would load silently but degrade accuracy."""
    name = repository_name(trained_on)
    for component in map(detect_component, base):
        if (
            component.format in COMPLETE_MODELS
            and "llava" not in name.lower()
            and repository_name(component.path) != name
        ):
            raise CheckpointError(
                f"{path}: trained on {trained_on!r}, a plain language model, but {component}; add the language model"
                f" (and CLIP) as components instead. If it was trained on this LLaVA, set base_model_name_or_path in"
                f" {ADAPTER_CONFIG}"
            )


def _check_lacks_no_projector(path: Path, trained_on: str) -> None:
    """Refuse what original LLaVA leaves in checkpoint-N: the projector that was tuned with the adapter is not in it."""
    if "llava" not in repository_name(trained_on).lower():
        raise CheckpointError(
            f"{path}: a LoRA adapter of original LLaVA on {trained_on or 'a plain language model'!r}, but without"
            f" {NON_LORA}, which holds the projector that was tuned with it; use the folder that the end of the training"
            " wrote"
        )
    _log.warning("%s: no %s: if the projector was tuned with the adapter, it is missing", path, NON_LORA)


def _group_tensors(
    path: Path, tensors: Tensors, model: VisionLanguageModel
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """Return stored names by linear layer, side ("A", "B") and depth; and those of a projector by canonical name.

    Raises:
        CheckpointError: A tensor is unknown, duplicate or missing.
    """
    by_name = {name: (spec, layer) for spec in parameter_specs(model.config) for layer, name in enumerate(spec.names)}
    factors: dict[str, dict[str, list[str]]] = {}
    projector: dict[str, str] = {}
    for stored_name, stored in tensors.stored.items():
        if stored.dtype is None:
            raise CheckpointError(f"{stored.file}: tensor {stored_name} is not floating-point")
        if match := _FACTOR.match(stored_name):
            spec, layer = by_name.get(canonical_name(match["module"] + ".weight"), (None, 0))
            if spec is None or spec.layout != "linear":
                raise CheckpointError(f"{path}: tensor {stored_name} does not adapt a linear layer of this model")
            name, side, depth = spec.path.removesuffix(".kernel"), match["side"], len(spec.names)
            by_layer = factors.setdefault(name, {"A": [""] * depth, "B": [""] * depth})[side]
            if by_layer[layer]:
                raise CheckpointError(f"{path}: duplicate lora_{side} of {name} (layer {layer})")
            by_layer[layer] = stored_name
        elif (match := _SAVED_PROJECTOR.match(stored_name)) and canonical_name(match["name"]) in by_name:
            if (name := canonical_name(match["name"])) in projector:
                raise CheckpointError(f"{path}: duplicate tensor {name}")
            projector[name] = stored_name
        else:
            raise CheckpointError(f"{path}: tensor {stored_name} is not part of a LoRA adapter of this model")
    if not factors:
        raise CheckpointError(f"{path}: no LoRA factors")
    for name, sides in factors.items():
        for side, by_layer in sides.items():
            if "" in by_layer:
                raise CheckpointError(f"{path}: lora_{side} of {name} is missing in layer {by_layer.index('')}")
    return factors, projector


def _check_shapes(
    path: Path,
    tensors: Tensors,
    factors: dict[str, dict[str, list[str]]],
    layers: dict[str, Linear],
    settings: AdapterSettings,
) -> None:
    for side in "AB":
        for layer_name, sides in factors.items():
            layer = layers[layer_name]
            for name in sides[side]:
                rank = settings.rank_of(_module(name))
                source = "r" if rank == settings.rank else "rank_pattern"
                wanted = (rank, layer.inputs) if side == "A" else (layer.outputs, rank)
                if (shape := tensors.stored[name].shape) != wanted:
                    raise CheckpointError(
                        f"{path}: tensor {name} is {shape}; this base model and {source} {rank} need {wanted}"
                    )


def _module(stored_name: str) -> str:
    """Return the dotted name of the module that a factor adapts, as PEFT knew it."""
    match = _FACTOR.match(stored_name)
    assert match is not None
    return match["module"]


def _scale(settings: AdapterSettings, stored_names: Sequence[str]) -> float:
    """Return the scale of a stack of layers.

    Raises:
        CheckpointError: Its layers differ in rank or scale.
    """
    modules = [_module(name) for name in stored_names]
    found = {(settings.rank_of(module), settings.scale_of(module)) for module in modules}
    if len(found) > 1:
        raise CheckpointError(
            f"{settings.path}: rank_pattern or alpha_pattern gives {modules[0].split('.')[-1]} another rank or scale in some"
            " layers than in others, which is not supported"
        )
    return found.pop()[1]


def _read_projector(path: Path) -> dict[str, AnyArray]:
    tensors = Tensors([path])
    names: dict[str, str] = {}
    for stored_name, stored in tensors.stored.items():
        if stored.dtype is None:
            raise CheckpointError(f"{path}: tensor {stored_name} is not floating-point")
        if (name := canonical_projector_name(stored_name)) in names.values():
            raise CheckpointError(f"{path}: duplicate tensor {name}")
        names[stored_name] = name
    projector: dict[str, AnyArray] = {}
    tensors.read_all(lambda stored_name, array: projector.__setitem__(names[stored_name], array), set(names))
    return projector


def _projector_variables(model: VisionLanguageModel) -> dict[str, tuple[ParameterSpec, Any]]:
    """Return the projector's parameters by canonical name."""
    variables = {}
    for spec in parameter_specs(model.config):
        if spec.path.startswith("projector."):
            _, layer, leaf = spec.path.split(".")
            variables[spec.name] = spec, getattr(getattr(model.projector, layer), leaf)
    return variables


def _check_projector(path: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    if different := set(stored) ^ set(wanted):
        raise CheckpointError(
            f"{path}: its projector's tensors and the model's differ ({', '.join(sorted(different))})"
        )


def _set_projector(model: VisionLanguageModel, path: Path, arrays: dict[str, AnyArray]) -> None:
    """Set those tensors of the projector that an adapter stores."""
    variables = _projector_variables(model)
    for name, array in arrays.items():
        spec, variable = variables[name]
        value = to_model_layout(spec.layout, array)
        if value.shape != variable.shape:
            raise CheckpointError(f"{path}: projector tensor {name} is {value.shape}; the model's is {variable.shape}")
        lora.assign(variable, value)


def _check_recorded_base(model: VisionLanguageModel, folder: Path, *, has_projector: bool) -> None:
    path = folder / METADATA_FILE
    if not path.exists():
        return
    recorded = read_json(path).get("base")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{path}: base must be an object of checksums, not {recorded!r}")
    check_base(base_checksums(model), recorded, str(folder), ignore=("projector",) if has_projector else ())


def check_base(actual: Checksums, recorded: Checksums, source: str, *, ignore: Sequence[str] = ()) -> None:
    """Check that a base model has the checksums that an adapter recorded.

    Args:
        actual: `base_checksums` of the base model.
        recorded: Those of the adapter.
        source: The adapter, for the message.
        ignore: Components that may differ.

    Raises:
        CheckpointError: A component differs; the message names it.
    """
    different = [part for part in recorded if part not in ignore and recorded[part] != actual.get(part)]
    if different:
        raise CheckpointError(
            f"{source}: made on another base model: {', '.join(different)} differ (recorded"
            f" {', '.join(recorded[part] for part in different)}; loaded"
            f" {', '.join(str(actual.get(part)) for part in different)})"
        )


def _lora_tensors(model: VisionLanguageModel, rename: Callable[[str], str]) -> tuple[dict[str, AnyArray], list[str]]:
    """Return adapters as PEFT stores them, A (r, in) and B (out, r), and the sorted names of the adapted modules.

    Args:
        model: The model.
        rename: Converts canonical names to those of the format.

    Raises:
        CheckpointError: The model has no adapter, or one outside the decoder.
    """
    specs = {spec.path: spec for spec in parameter_specs(model.config)}
    tensors: dict[str, AnyArray] = {}
    modules = set()
    for path, layer, *factors in lora.adapters(model):
        if not path.startswith("decoder."):
            raise CheckpointError(f"the adapter on {path} cannot be written; the formats support only the decoder's")
        a, b = (np.asarray(factor[...]) for factor in factors)
        if layer.layers is None:
            a, b = a[None], b[None]
        for name, one_a, one_b in zip(specs[f"{path}.kernel"].names, a, b, strict=True):
            module = rename(name).removesuffix(".weight")
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(one_a.T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(one_b.T)
            modules.add(module.split(".")[-1])
    if not tensors:
        raise CheckpointError("the model has no adapter to write")
    return tensors, sorted(modules)


def _adapter_config(
    model: VisionLanguageModel, base_model: str, targets: str | list[str], saved: list[str] | None
) -> dict[str, Any]:
    adapters = list(lora.adapters(model))
    ranks, scales = {a.shape[-1] for _, _, a, _ in adapters}, {layer.lora_scale for _, layer, *_ in adapters}
    if len(ranks) > 1 or len(scales) > 1:
        raise CheckpointError(f"the format supports one rank and one scale, not ranks {ranks} and scales {scales}")
    rank = ranks.pop()
    alpha = scales.pop() * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": max(layer.lora_dropout for _, layer, *_ in adapters),
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


def _projector_tensors(model: VisionLanguageModel) -> dict[str, AnyArray]:
    patch = model.config.vision.patch_size
    return {
        name: to_file_layout(spec.layout, np.asarray(variable[...]), patch)
        for name, (spec, variable) in _projector_variables(model).items()
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
    if model.config.projector != "mlp2x_gelu":
        raise CheckpointError(
            "transformers' LLaVA does not support linear projectors, so no PEFT adapter; write llava-lora"
        )
    tensors, modules = _lora_tensors(model, memory_name)
    if projector:
        for name, array in _projector_tensors(model).items():
            tensors[f"base_model.model.{memory_name(name)}"] = array
    # A pattern, not names of modules: the vision tower has projections of the same names.
    inside = "|".join(module for module in modules if module != "lm_head")
    targets = rf".*language_model.*\.layers\.\d+\.(self_attn|mlp)\.({inside})"
    if "lm_head" in modules:
        targets = rf"({targets})|(.*\.)?lm_head"
    saved = ["multi_modal_projector"] if projector else None
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, _adapter_config(model, base_model, targets, saved))


def write_llava_lora(model: VisionLanguageModel, folder: Path, *, base_model: str, special_ids: dict[str, Any]) -> None:
    """Write the files of an original LLaVA LoRA folder; its loader needs llava and lora in the folder's name.

    Args:
        model: The model with its adapters.
        folder: An existing folder.
        base_model: The base model's name, for `base_model_name_or_path`.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
        CheckpointError: The model has no adapter, or PyTorch, which writes the projector's file, is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(
            f"writing {NON_LORA} needs PyTorch: pip install -e '.[convert]' in the checkout"
        ) from None
    kind = model.config.projector
    tensors, modules = _lora_tensors(model, lambda name: original_name(name, kind))
    projector = {
        f"base_model.model.{original_name(name, kind)}": torch.from_numpy(np.array(array, np.float32))
        for name, array in _projector_tensors(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    torch.save(projector, folder / NON_LORA)
    write_json(folder / ADAPTER_CONFIG, _adapter_config(model, base_model, modules, None))
    dtype = np.dtype(model.compute_dtype).name
    write_json(folder / "config.json", original_json(model.config, dtype, special_ids, tower_included=False))
