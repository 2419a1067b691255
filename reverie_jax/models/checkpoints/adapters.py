"""LoRA and DoRA adapters of PEFT and of original LLaVA, and files of a whole `PeftModel`, read onto a model."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from reverie_jax.errors import CheckpointError
from reverie_jax.models import lora
from reverie_jax.models.checkpoints.adapter_settings import AdapterSettings, lrv_settings, read_settings
from reverie_jax.models.checkpoints.checksums import Checksums, base_checksums
from reverie_jax.models.checkpoints.components import (
    ADAPTER_CONFIG,
    COMPLETE_MODELS,
    NON_LORA,
    ComponentLike,
    detect_component,
)
from reverie_jax.models.checkpoints.families import repository_name
from reverie_jax.models.checkpoints.files import Tensors, read_json, weights_of
from reverie_jax.models.checkpoints.names import (
    IGNORED,
    canonical_name,
    canonical_projector_name,
    original_name,
    sister_name,
)
from reverie_jax.models.checkpoints.specs import AnyArray, Layout, ParameterSpec, parameter_specs, to_model_layout
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.layers import Linear
from reverie_jax.models.vlm import VisionLanguageModel

_log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
METADATA_FILE = "reverie.json"
"""Beside the files that this project writes: their sources, and the checksums of the (base) model."""

_FACTOR = re.compile(
    r"^(base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>A|B|magnitude_vector)(\.default)?(\.weight)?$"
)
MAGNITUDE = "magnitude_vector"
"""DoRA's, beside A and B in the names of an adapter's tensors."""
_IN_LAYERS = re.compile(r"\b(layers|h)\.\d+\..+")
"""A module's name from its layer's list on: what precedes that depends on the format and on transformers' version."""
_PLAIN = re.compile(r"^(base_model\.model\.)?model\.layers\.")
"""Names of a plain language model, and of original LLaVA's class; transformers' LLaVA has other ones."""

Stack = list[dict[str, str]]
"""Stored names of an adapter's tensors, by side (A, B, magnitude_vector), for each layer of a stack."""


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
        source: The adapter: a folder, or a file with the state dict of a `PeftModel`, which may hold all of the base model
            too (LRV-Instruction's). An adapter_config.json beside the file applies to it.
        base: The components that the model was read from.

    Raises:
        CheckpointError: It is not such an adapter, does not fit the model, or was made on another base model.
    """
    adapter = detect_component(source)
    path, is_file = adapter.path, adapter.path.is_file()
    if adapter.format not in ("peft", "llava-lora") and not is_file:
        raise CheckpointError(f"{adapter}, not an adapter")
    folder = path.parent if is_file else path
    if attached := next((name for name, *_ in lora.adapters(model)), None):
        raise CheckpointError(f"{path}: the model already has an adapter (on {attached}, …); merge it first")
    if is_file and not (folder / ADAPTER_CONFIG).exists():
        settings = lrv_settings(path, model.config.system)
    else:
        settings = read_settings(folder)
    trained_on = settings.base_model
    if adapter.format == "llava-lora":
        _check_base_format(path, trained_on, base)
    tensors = Tensors([path]) if is_file else weights_of(path, ADAPTER_WEIGHTS)
    if tensors is None:
        raise CheckpointError(f"{path}: no weights; expected {' or '.join(ADAPTER_WEIGHTS)}")
    frozen = [name for name in tensors.stored if is_file and not _FACTOR.match(name)]
    factors, projector_names = _group_tensors(path, tensors, model, frozen)
    _check_modules(path, factors, model, settings)
    if adapter.format == "llava-lora":
        projector_names = {}  # its projector is in a file of its own
    elif not frozen and model.config.system == "llava" and any(map(_PLAIN.match, tensors.stored)):
        _check_lacks_no_projector(path, trained_on)
    whole = projector_variables(model).keys()
    saved = settings.saved_tensors(whole, model.config) if settings.saved or not projector_names else whole
    if adapter.format != "llava-lora" and (different := saved ^ projector_names.keys()):
        raise CheckpointError(
            f"{path}: the projector's tensors are not those of modules_to_save ({', '.join(sorted(different))})"
        )
    has_projector = adapter.format == "llava-lora" or saved == whole
    _check_recorded_base(model, folder, has_projector=has_projector)
    layers = dict(lora.linears(model))
    quantized = [name for name in (layers if frozen else factors) if layers[name].scales is not None]
    if quantized and (settings.dora or frozen):
        reason = "use_dora" if settings.dora else f"comparing {frozen[0]} with the base's"
        raise CheckpointError(
            f"{path}: {reason} needs a base model without quantization, but {quantized[0]} is quantized"
        )
    _check_shapes(path, tensors, factors, layers, settings)
    _check_frozen(tensors, frozen, model)
    arrays: dict[str, AnyArray] = {}
    wanted = {name for stack in factors.values() for sides in stack for name in sides.values()}
    tensors.read_all(arrays.__setitem__, wanted | set(projector_names.values()))
    projector = {name: arrays[stored] for name, stored in projector_names.items()}
    if adapter.format == "llava-lora":
        projector = _read_projector(path / NON_LORA)
        _check_projector(path, projector.keys(), whole)
    _set_projector(model, path, projector)
    for name, stack in factors.items():
        _set_adapter(layers[name], stack, arrays, settings)
    return AttachedAdapter(trained_on, bool(projector))


def _set_adapter(layer: Linear, stack: Stack, arrays: dict[str, AnyArray], settings: AdapterSettings) -> None:
    """Set a layer's adapter. Where the layers of a stack differ, factors are padded with zeros, which training keeps."""
    modules = {number: _module(sides["A"]) for number, sides in enumerate(stack) if sides}
    rank = max(map(settings.rank_of, modules.values()))
    scale = max(map(settings.scale_of, modules.values()), key=abs)
    a = np.zeros((len(stack), layer.inputs, rank), np.float32)
    b = np.zeros((len(stack), rank, layer.outputs), np.float32)
    for number, module in modules.items():
        own = settings.rank_of(module)
        a[number, :, :own] = arrays[stack[number]["A"]].T
        b[number, :own] = arrays[stack[number]["B"]].T
        if settings.scale_of(module) != scale:
            b[number] *= settings.scale_of(module) / scale
    shape = layer.kernel.shape[:-2]
    lora.set_factors(layer, *(x.reshape(*shape, *x.shape[1:]) for x in (a, b)), scale=scale, dropout=0.0)
    if settings.dora:
        lora.set_magnitudes(layer, {number: arrays[stack[number][MAGNITUDE]] for number in modules})


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
    path: Path, tensors: Tensors, model: VisionLanguageModel, frozen: Collection[str]
) -> tuple[dict[str, Stack], dict[str, str]]:
    """Return stored names of adapters by linear layer; and those of a projector by canonical name; without the frozen ones.

    Raises:
        CheckpointError: A tensor is unknown or duplicate.
    """
    by_name = {name: (spec, place) for spec in parameter_specs(model.config) for place, name in enumerate(spec.names)}
    whole = projector_variables(model).keys()
    factors: dict[str, Stack] = {}
    projector: dict[str, str] = {}
    for stored_name, stored in tensors.stored.items():
        if stored_name in frozen:
            continue
        if stored.dtype is None:
            raise CheckpointError(f"{stored.file}: tensor {stored_name} is not floating-point")
        if match := _FACTOR.match(stored_name):
            spec, place = by_name.get(_canonical(match["module"] + ".weight", model.config), (None, 0))
            if spec is None or spec.layout != "linear":
                raise CheckpointError(f"{path}: tensor {stored_name} does not adapt a linear layer of this model")
            name, side = spec.path.removesuffix(".kernel"), match["side"]
            sides = factors.setdefault(name, [{} for _ in spec.names])[place]
            if side in sides:
                raise CheckpointError(f"{path}: duplicate lora_{side} of {name} ({stored_name})")
            sides[side] = stored_name
        elif (name := _canonical(stored_name.removeprefix("base_model.model."), model.config)) in whole:
            if name in projector:
                raise CheckpointError(f"{path}: duplicate tensor {name}")
            projector[name] = stored_name
        else:
            raise CheckpointError(f"{path}: tensor {stored_name} is not part of a LoRA adapter of this model")
    if not factors:
        raise CheckpointError(f"{path}: no LoRA factors")
    return factors, projector


def _check_modules(
    path: Path, factors: dict[str, Stack], model: VisionLanguageModel, settings: AdapterSettings
) -> None:
    """Check that the adapted modules of decoder and tower are those of the settings, and that none lacks a tensor.

    A module's name is that of the model which was tuned: it begins as the stored ones.
    """
    wanted = {"A", "B", MAGNITUDE} if settings.dora else {"A", "B"}
    modules: list[tuple[str, str, dict[str, str]]] = []
    starts: dict[str, str] = {}
    for spec in parameter_specs(model.config):
        if spec.layout != "linear":
            continue
        stack = factors.get(spec.path.removesuffix(".kernel"), [{}] * len(spec.names))
        for sides, tensor in zip(stack, spec.names, strict=True):
            if sides and (different := sides.keys() ^ wanted):
                side = min(different)
                fault = f"has {'no' if side in wanted else 'a'} lora_{side}, but use_dora is {settings.dora}"
                raise CheckpointError(f"{path}: {tensor.removesuffix('.weight')} ({spec.path}) {fault}")
            if match := _IN_LAYERS.search(original_name(tensor, model.config).removesuffix(".weight")):
                part = spec.path.split(".")[0]
                modules.append((part, match[0], sides))
                if sides and (stored := _module(sides["A"])).endswith(match[0]):
                    starts[part] = stored.removesuffix(match[0])
    for part, name, sides in modules:
        if part not in starts:
            continue
        module = _module(sides["A"]) if sides else starts[part] + name
        if bool(sides) != settings.adapts(module):
            fault = "has tensors, but is not among" if sides else "has no lora_A and lora_B, but is among"
            raise CheckpointError(
                f"{path}: {module} {fault} the modules of {settings.path.name} (target_modules, exclude_modules,"
                " layers_to_transform)"
            )


def _check_shapes(
    path: Path, tensors: Tensors, factors: dict[str, Stack], layers: dict[str, Linear], settings: AdapterSettings
) -> None:
    for layer_name, stack in factors.items():
        layer = layers[layer_name]
        for side, name in (pair for sides in stack for pair in sorted(sides.items())):
            rank = settings.rank_of(_module(name))
            source = "r" if rank == settings.rank else "rank_pattern"
            shapes = {"A": (rank, layer.inputs), "B": (layer.outputs, rank), MAGNITUDE: (layer.outputs,)}
            if (shape := tensors.stored[name].shape) != shapes[side]:
                raise CheckpointError(
                    f"{path}: tensor {name} is {shape}; this base model and {source} {rank} need {shapes[side]}"
                )


def _check_frozen(tensors: Tensors, names: Sequence[str], model: VisionLanguageModel) -> None:
    """Check that the tensors beside the adapters of a whole `PeftModel` are those of the base model.

    Raises:
        CheckpointError: One is not: the adapters were tuned on another model. The message names the first.
    """
    places = {name: (spec, place) for spec in parameter_specs(model.config) for name, place in spec.places}
    canonical = {
        name: _canonical(name.removeprefix("base_model.model.").replace(".base_layer.", "."), model.config)
        for name in names
        if not IGNORED.search(name)
    }
    for stored_name, name in canonical.items():
        if name not in places or tensors.stored[stored_name].dtype is None:
            fault = (
                "not floating-point" if name in places else "part of neither the base model nor a LoRA adapter of it"
            )
            raise CheckpointError(f"{tensors.stored[stored_name].file}: tensor {stored_name} is {fault}")

    def compare(stored_name: str, array: AnyArray) -> None:
        spec, place = places[canonical[stored_name]]
        stack = operator.attrgetter(spec.path)(model)[...]
        if not _is_equal(stack, tuple(map(jnp.int32, place)), array, layout=spec.layout):
            raise CheckpointError(
                f"{tensors.stored[stored_name].file}: tensor {stored_name} is not the base model's: the adapter was tuned on"
                " another one (or load this one in the dtype that its files have)"
            )

    tensors.read_all(compare, set(canonical))


@functools.partial(jax.jit, static_argnames="layout")
def _is_equal(
    stack: Array, place: tuple[Array, ...], tensor: Array | AnyArray, *, layout: Layout
) -> Bool[Array, ""] | bool:
    """Return whether a file's tensor is the one at a place of a stack, after both are cast to the dtype of one of them."""
    value, tensor = stack[place], to_model_layout(layout, tensor)
    if value.shape != tensor.shape:
        return False
    dtypes = (value.dtype, tensor.dtype)  # the narrower one decides; of bfloat16 and float16 neither is
    return jnp.stack([(value.astype(dtype) == tensor.astype(dtype)).all() for dtype in dtypes]).any()


def _canonical(name: str, config: VLMConfig) -> str:
    return canonical_name(name) if config.system == "llava" else sister_name(name, config.system, canonical=True)


def _module(stored_name: str) -> str:
    """Return the dotted name of the module that a factor adapts, as PEFT knew it."""
    match = _FACTOR.match(stored_name)
    assert match is not None
    return match["module"]


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


def projector_variables(model: VisionLanguageModel) -> dict[str, tuple[ParameterSpec, Any]]:
    """Return the projector's parameters by canonical name."""
    specs = [spec for spec in parameter_specs(model.config) if spec.path.startswith("projector.")]
    return {spec.name: (spec, operator.attrgetter(spec.path)(model)) for spec in specs}


def _check_projector(path: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    if different := set(stored) ^ set(wanted):
        raise CheckpointError(
            f"{path}: its projector's tensors and the model's differ ({', '.join(sorted(different))})"
        )


def _set_projector(model: VisionLanguageModel, path: Path, arrays: dict[str, AnyArray]) -> None:
    """Set those tensors of the projector that an adapter stores."""
    variables = projector_variables(model)
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
    content = read_json(path)
    if "checksums" in content:  # of a complete model, which a file lies beside
        return
    recorded = content.get("base")
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
