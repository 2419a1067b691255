"""Collect the tensors of one model from the components that it is given as."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.errors import CheckpointError
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints.components import (
    ADAPTER_CONFIG,
    DESCRIPTIONS,
    NON_LORA,
    PROJECTOR_FILE,
    Component,
    ComponentFormat,
    ComponentLike,
    detect_component,
    tower_sizes,
)
from reverie_jax.models.checkpoints.configs import (
    TOWER_KEY,
    known_tower,
    llava_hf_config,
    original_config,
    vision_config,
)
from reverie_jax.models.checkpoints.decoders import text_config
from reverie_jax.models.checkpoints.families import (
    UNNAMED_TOWER,
    original_language_model,
    repository_name,
    tower_name,
    tunes_tower,
)
from reverie_jax.models.checkpoints.files import SummedTensors, Tensors, read_json, weights_of
from reverie_jax.models.checkpoints.names import (
    CLIP_UNUSED,
    IGNORED,
    POOLING_HEAD,
    canonical_name,
    canonical_projector_name,
    sister_name,
)
from reverie_jax.models.checkpoints.processing import read_stop_ids
from reverie_jax.models.checkpoints.sisters import BLIP2_UNUSED, eva_unused, sister_config, with_stored_sizes
from reverie_jax.models.checkpoints.specs import EMBEDDING, HEAD, AnyArray
from reverie_jax.models.config import ProjectorKind, TextConfig, VisionConfig, VLMConfig

_log = logging.getLogger(__name__)

_PROJECTOR, _TOWER = "multi_modal_projector.", "vision_tower."


@dataclasses.dataclass
class ResolvedCheckpoint:
    """A model to be read: its architecture, and the file of every tensor.

    Attributes:
        tensors: Canonical name to (files, stored name).
    """

    path: Path
    config: VLMConfig
    tensors: dict[str, tuple[Tensors, str]]


def resolve_checkpoint(source: ComponentLike, components: Sequence[ComponentLike] = ()) -> ResolvedCheckpoint:
    """Return one complete model made of a path and the components that it lacks.

    Raises:
        CheckpointError: A component is missing, unused, duplicate or broken.
    """
    main = detect_component(source)
    others = [detect_component(other) for other in components]
    if main.format == "peft":
        raise CheckpointError(
            f"{main}, not a model; give the model that it was trained on as the path and this as the adapter"
        )
    if wrong := next((other for other in others if other.format in ("peft", "llava-lora", "orbax")), None):
        raise CheckpointError(f"{wrong}, which cannot be a component of another model")
    if main.format == "llava-hf":
        _reject_unused(others, main)
        tensors = _canonical_tensors(main)
        config = _with_stored_head(llava_hf_config(main.path, main.config), tensors)
        return ResolvedCheckpoint(main.path, config, _without_tied_head(main.config_path, config.text, tensors))
    if main.format == "sister":
        _reject_unused(others, main)
        return _resolve_sister(main)
    if any(part.format in ("eva", "blip2", "minigpt4") for part in (main, *others)):
        return _resolve_minigpt4(main, others)
    tower = _single(others, ("clip",))
    if main.format == "llava":
        _reject_unused([other for other in others if other is not tower], main)
        return _resolve_original(main, main, tower, None)
    if main.format in ("llm", "clip"):
        everything = [main, *others]
        llm, tower, projector = (_single(everything, (name,)) for name in ("llm", "clip", "projector"))
        _reject_unused([other for other in everything if other not in (llm, tower, projector)], main)
        if llm is None or projector is None:
            missing = "the language model" if llm is None else "the projector (mm_projector.bin)"
            raise CheckpointError(f"{main}; {missing} is missing: add it as a component")
        return _resolve_original(projector, llm, tower, projector)
    # A projector or a LoRA folder: both contain a projector, and need a language model or a complete LLaVA.
    base = _single(others, ("llm", "llava", "llava-hf"))
    _reject_unused([other for other in others if other not in (base, tower)], main)
    base = base or recorded_base(main)
    if base.format == "llava-hf":
        _reject_unused([] if tower is None else [tower], base)
        tensors = _without_projector(_canonical_tensors(base)) | _canonical_tensors(main)
        config = _with_stored_head(llava_hf_config(base.path, base.config), tensors)
        config = dataclasses.replace(config, projector=_projector_kind(tensors))
        return ResolvedCheckpoint(main.path, with_settings(config, main), tensors)
    return _resolve_original(main, base, tower, main)


def _resolve_sister(main: Component) -> ResolvedCheckpoint:
    """Return a complete MiniGPT-4, mPLUG-Owl or Muffin."""
    config = sister_config(main.config_path, main.config)
    tensors: dict[str, tuple[Tensors, str]] = {}
    _collect(tensors, _weights(main), functools.partial(sister_name, system=config.system, canonical=True))
    return ResolvedCheckpoint(main.path, _sized(main.path, config, tensors), tensors)


def _sized(path: Path, config: VLMConfig, tensors: dict[str, tuple[Tensors, str]]) -> VLMConfig:
    stored = {name: weights.stored[where] for name, (weights, where) in tensors.items()}
    return with_stored_sizes(path, config, stored)


def _resolve_minigpt4(main: Component, others: Sequence[Component]) -> ResolvedCheckpoint:
    """Return a MiniGPT-4 that is given as its sources: EVA-CLIP, BLIP-2's file, a language model and a projector."""
    everything = [main, *others]
    formats: tuple[ComponentFormat, ...] = ("eva", "blip2", "llm", "minigpt4")
    found = [_single(everything, (format,)) for format in formats]
    _reject_unused([part for part in everything if part not in found], main)
    for format, part in zip(formats, found, strict=True):
        if part is None:
            raise CheckpointError(f"{main}; for MiniGPT-4, {DESCRIPTIONS[format]} is missing: add it as a component")
    eva, blip2, llm, projector = (part for part in found if part is not None)
    tower = _weights(eva)
    text = text_config(llm.config_path, llm.config, llm.config["model_type"])
    tensors = _canonical_tensors(llm)
    _collect(tensors, tower, lambda name: f"visual_encoder.{name}", eva_unused(tower.stored))
    _collect(tensors, _weights(blip2), str, BLIP2_UNUSED)
    _collect(tensors, _weights(projector), str)
    # Vicuna v0's eos_token_id is wrong, as Muffin's.
    config = _sized(projector.path, dataclasses.replace(ARCHITECTURES["minigpt4-7b"], text=text), tensors)
    return ResolvedCheckpoint(projector.path, config, _without_tied_head(llm.config_path, text, tensors))


def with_settings(config: VLMConfig, tuned: Component) -> VLMConfig:
    """Return a llava-hf model's configuration with what the original LLaVA that was tuned on it says of its inputs.

    Args:
        config: Of the model.
        tuned: A LoRA folder or projector; its config.json, if it has one, says how it was tuned. A projector says nothing
            of prompts: the first stage is trained without.

    Raises:
        CheckpointError: A setting is not supported.
    """
    if not tuned.config:
        return config
    own = original_config(tuned.config_path, tuned.config, config.text, config.vision, config.projector)
    names = ["feature_layers", "image_aspect_ratio"]
    names += ["template", "tokenization"] if tuned.format == "llava-lora" else []
    return dataclasses.replace(config, **{name: getattr(own, name) for name in names})


def recorded_base(lora: Component) -> Component:
    """Return the language model that a LoRA folder records as its base model.

    Raises:
        CheckpointError: `lora` is not a LoRA folder, or the model that it names cannot be used.
    """
    missing = f"{lora}; the language model is missing: add it as a component"
    if lora.format != "llava-lora":
        raise CheckpointError(missing)
    name = read_json(lora.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    try:
        base = detect_component(str(name or ""))
    except CheckpointError as error:
        raise CheckpointError(f"{missing} (trained on {name!r}: {error})") from None
    if base.format not in ("llm", "llava", "llava-hf"):
        raise CheckpointError(f"{missing} (trained on {name!r}, which is {DESCRIPTIONS[base.format]})")
    return base


def _with_stored_head(config: VLMConfig, tensors: dict[str, tuple[Tensors, str]]) -> VLMConfig:
    """Return a llava-hf model's configuration with the head that is stored: Phi's lost its bias in transformers 4.52."""
    bias = config.text.head_bias and f"{HEAD}.bias" in tensors
    return dataclasses.replace(config, text=dataclasses.replace(config.text, head_bias=bias))


def _without_tied_head(
    path: Path, text: TextConfig, tensors: dict[str, tuple[Tensors, str]]
) -> dict[str, tuple[Tensors, str]]:
    """Return a checkpoint's tensors without a copy of the embedding that is stored as the LM head where the two are tied.

    Raises:
        CheckpointError: It is not a copy.
    """
    head, embedding = f"{HEAD}.weight", EMBEDDING
    if not text.tied_head or head not in tensors or embedding not in tensors:
        return tensors
    values: list[AnyArray] = []
    for name in (head, embedding):
        source, stored = tensors[name]
        source.read_all(lambda _, array: values.append(array), {stored})
    if not np.array_equal(values[0], values[1]):
        raise CheckpointError(f"{path}: tie_word_embeddings is true, but lm_head and the embedding differ")
    return {name: where for name, where in tensors.items() if name != head}


def vocab_size(checkpoint: ResolvedCheckpoint) -> int:
    """Return the vocabulary size by the tensors: LLaVA-pp resizes it without changing every config.

    Raises:
        CheckpointError: Embedding and head differ.
    """
    sizes = []
    for name in (EMBEDDING,) if checkpoint.config.text.tied_head else (EMBEDDING, f"{HEAD}.weight"):
        if name not in checkpoint.tensors:
            return checkpoint.config.text.vocab  # the reader reports what is missing
        tensors, stored = checkpoint.tensors[name]
        shape = tensors.stored[stored].shape
        sizes.append(shape[0] if shape else 0)
    if sizes[0] != sizes[-1]:
        raise CheckpointError(f"{checkpoint.path}: the embedding has {sizes[0]} rows and lm_head has {sizes[-1]}")
    return sizes[0]


def stored_dtype(checkpoint: ResolvedCheckpoint) -> np.dtype[Any]:
    """Return the dtype of the decoder's matrices in the files."""
    tensors, stored = checkpoint.tensors[EMBEDDING]
    return tensors.stored[stored].dtype or np.dtype(np.float32)


def _weights(component: Component) -> Tensors:
    """Return a component's tensors, or their sum with those that they are differences from.

    Raises:
        CheckpointError: The weights are missing; or a delta is given without its base, or a complete model as a delta.
    """
    if component.base is None:
        weights = _stored_weights(component)
        _check_differences(component, weights, wanted=False)
        return weights
    delta = _stored_weights(component)
    _check_differences(component, delta, wanted=True)
    return SummedTensors(_weights(component.base), delta)


def _check_differences(component: Component, weights: Tensors, *, wanted: bool) -> None:
    """Check that weights are a delta or that they are not, by `inv_freq`, which is 0 in a delta and in no model.

    Raises:
        CheckpointError: They are the other.
    """
    name = next((name for name in weights.stored if name.endswith("rotary_emb.inv_freq")), None)
    if name is None:
        return
    arrays: list[AnyArray] = []
    weights.read_all(lambda _, array: arrays.append(array), {name})
    if arrays[0].any() == wanted:
        fault = "not a delta" if wanted else "a delta, which needs its base model"
        raise CheckpointError(f"{component}, and its weights are {fault} (by {name}); write BASE+DELTA")


def _stored_weights(component: Component) -> Tensors:
    if component.path.is_file():
        return Tensors([component.path])
    if component.format == "projector":
        return Tensors([component.path / PROJECTOR_FILE])
    if component.format == "llava-lora":
        return Tensors([component.path / NON_LORA])
    if (tensors := weights_of(component.path)) is None:
        raise CheckpointError(
            f"{component.path}: no weights; expected model.safetensors, pytorch_model.bin or an index of one of them"
        )
    return tensors


def _canonical_tensors(component: Component) -> dict[str, tuple[Tensors, str]]:
    """Return a component's tensors by canonical name, without those that a named rule ignores.

    Raises:
        CheckpointError: Two tensors are one parameter, or a tensor does not belong to such a component.
    """
    weights = _weights(component)
    own_projector = component.format in ("projector", "llava-lora")
    tensors: dict[str, tuple[Tensors, str]] = {}
    rename = canonical_projector_name if own_projector else canonical_name
    _collect(tensors, weights, rename, CLIP_UNUSED if component.format == "clip" else None)
    expected = {"clip": _TOWER, "llm": "language_model.", "projector": _PROJECTOR, "llava-lora": _PROJECTOR}
    if unexpected := [name for name in tensors if not name.startswith(expected.get(component.format, ""))]:
        raise CheckpointError(
            f"{component} with {len(unexpected)} tensor(s) that do not belong to one: {tensors[unexpected[0]][1]}, …"
        )
    return tensors


def _collect(
    tensors: dict[str, tuple[Tensors, str]],
    weights: Tensors,
    rename: Callable[[str], str],
    unused: re.Pattern[str] | None = None,
) -> None:
    """Add the tensors of some files under their canonical names, without those that a named rule ignores.

    Raises:
        CheckpointError: Two tensors are one parameter.
    """
    for stored in weights.stored:
        if (unused is not None and unused.match(stored)) or IGNORED.search(stored) or POOLING_HEAD.search(stored):
            continue
        name = rename(stored)
        if name in tensors:
            file = weights.stored[stored].file
            raise CheckpointError(f"{file}: duplicate tensor {name}, stored as {tensors[name][1]} and as {stored}")
        tensors[name] = weights, stored


def _without_projector(tensors: dict[str, tuple[Tensors, str]]) -> dict[str, tuple[Tensors, str]]:
    return {name: where for name, where in tensors.items() if not name.startswith(_PROJECTOR)}


def _single(components: Iterable[Component], formats: tuple[ComponentFormat | str, ...]) -> Component | None:
    matches = [component for component in components if component.format in formats]
    if len(matches) > 1:
        raise CheckpointError(f"{matches[0].path} and {matches[1]}; only one is needed")
    return matches[0] if matches else None


def _reject_unused(unused: Sequence[Component], main: Component) -> None:
    if unused:
        raise CheckpointError(f"{unused[0]}, which does not apply to {main.path} ({DESCRIPTIONS[main.format]})")


def _resolve_original(
    settings: Component, base: Component, tower: Component | None, projector: Component | None
) -> ResolvedCheckpoint:
    """Return a model in original LLaVA's format.

    Args:
        settings: The component whose config.json says how the others are connected (`mm_*`).
        base: Language model, or complete original LLaVA.
        tower: Needed where `base` does not contain it.
        projector: The component with the projector, where that is not `base`.
    """
    tensors = _canonical_tensors(base)
    if projector is not None:
        tensors = _without_projector(tensors) | _canonical_tensors(projector)
    config = {**base.config, **settings.config}
    path = settings.config_path if settings.config else base.config_path
    included = any(name.startswith(_TOWER) for name in tensors)
    recorded = tower_name(config)
    if tower is None and recorded and Path(recorded).is_dir():
        tower = detect_component(recorded)
    sizes = known_tower(recorded)
    if isinstance(own_sizes := config.get(TOWER_KEY), dict):
        sizes = vision_config(path, own_sizes)
    if tower is None and (not included or sizes is None):
        try:
            tower = detect_component(recorded)
        except CheckpointError as error:
            missing = "the configuration of its vision tower" if included else "its vision tower"
            raise CheckpointError(
                f"{path}: {missing} ({recorded or 'unnamed'}) is missing: add the tower as a component ({error})"
            ) from None
    if tower is not None:
        sizes = tower_sizes(tower)
        if not included:
            tensors |= _canonical_tensors(tower)
        _check_tower(path, config, tower, sizes, included=included)
    assert sizes is not None
    language_model = (
        base.config["model_type"] if base.format == "llm" else original_language_model(base.config_path, base.config)
    )
    text = text_config(base.config_path, base.config, language_model)
    if not any(name.startswith(_PROJECTOR) for name in tensors):
        raise CheckpointError(f"{settings.path}: the projector is missing; {settings} should contain it (mm_projector)")
    kind = _projector_kind(tensors)
    if (wanted := config.get("mm_projector_type", config.get("image_projector_type"))) not in (None, kind):
        raise CheckpointError(f"{path}: mm_projector_type is {wanted!r}, but the projector's tensors are {kind!r}")
    if config.get("matryoshka_vis_token_scale"):
        _log.warning("%s: matryoshka_vis_token_scale: read as its form of all visual tokens", path)
    stops = read_stop_ids(settings.path, {}) or read_stop_ids(base.path, base.config)
    architecture = dataclasses.replace(original_config(path, config, text, sizes, kind), stop_ids=stops)
    return ResolvedCheckpoint(settings.path, architecture, _without_tied_head(base.config_path, text, tensors))


def _check_tower(path: Path, config: dict[str, Any], tower: Component, sizes: VisionConfig, *, included: bool) -> None:
    """Check that a tower is the one that config.json names: by its name, since weights say nothing of their origin.

    Raises:
        CheckpointError: It is another one, or nothing says that it is not.
    """
    if (recorded := tower_name(config)) in ("", UNNAMED_TOWER):
        return
    if tunes_tower(config) and not included:
        raise CheckpointError(f"{path}: its vision tower was tuned with it, but is not among its weights")
    names = {repository_name(name).lower() for name in (tower.path, tower.path.absolute(), tower.path.resolve())}
    if tower.config.get("architectures") in (["CLIPModel"], ["SiglipModel"]):  # as released
        names.add(repository_name(str(tower.config.get("_name_or_path") or "")).lower())
    wanted = repository_name(recorded)
    # Where its weights are in the checkpoint, the component only describes it.
    if wanted.lower() in names or (included and known_tower(recorded) in (None, sizes)):
        return
    raise CheckpointError(
        f"{path}: its vision tower is {recorded}, and nothing says that {tower.path} is it; add that one as a component (if"
        f" this is a copy of it, set mm_vision_tower in {path} to its path, or add a link to it named {wanted})"
    )


def _projector_kind(names: Iterable[str]) -> ProjectorKind:
    return "mlp2x_gelu" if f"{_PROJECTOR}linear_2.weight" in set(names) else "linear"
