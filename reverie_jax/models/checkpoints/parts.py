"""What a folder or file is, by its content, and which tensors of which parts make one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.configs import (
    LANGUAGE_MODELS,
    TOWER_KEY,
    known_tower,
    llava_hf_config,
    original_config,
    original_kind,
    text_config,
    tower_name,
    vision_config,
)
from reverie_jax.models.checkpoints.files import Tensors, read_json, resolve, weights_of
from reverie_jax.models.checkpoints.names import CLIP_REST, IGNORED, canonical, projector_name
from reverie_jax.models.config import ProjectorKind, VisionConfig, VLMConfig

Kind = Literal["llava-hf", "llava", "llava-lora", "projector", "llm", "clip", "peft", "orbax"]

SAID: dict[str, str] = {
    "llava-hf": "a llava-hf model",
    "llava": "an original LLaVA",
    "llava-lora": "an original LLaVA LoRA folder",
    "projector": "a projector",
    "llm": "a plain language model",
    "clip": "a CLIP vision tower",
    "peft": "a PEFT adapter",
    "orbax": "a reverie-jax model in Orbax format",
}
WHOLE = ("llava-hf", "llava", "orbax")

PROJECTOR_FILE, NON_LORA, ADAPTER_CONFIG = "mm_projector.bin", "non_lora_trainables.bin", "adapter_config.json"
ORBAX_PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class CheckpointPart:
    """A folder or file that holds a model or a piece of one.

    Attributes:
        raw: its config.json; empty where it has none.
    """

    place: Path
    kind: Kind
    raw: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.place / "config.json"


def recognise(name: str | Path) -> CheckpointPart:
    """What a path (or hub id) holds, by its content and never by its name.

    Raises:
        CheckpointError: it is not there, or nothing that is known.
    """
    place = resolve(name)
    if not place.is_dir():
        return CheckpointPart(place, "projector", {})
    if (place / ADAPTER_CONFIG).exists():
        if (place / NON_LORA).exists():
            return CheckpointPart(place, "llava-lora", read_json(place / "config.json"))
        return CheckpointPart(place, "peft", {})
    if not (place / "config.json").exists():
        if (place / PROJECTOR_FILE).exists():
            return CheckpointPart(place, "projector", {})
        raise CheckpointError(f"{place / 'config.json'}: no such file; a checkpoint folder has one")
    raw = read_json(place / "config.json")
    said = raw.get("model_type")
    if said == "reverie":
        return CheckpointPart(place, "orbax", raw)
    if said in ("clip", "clip_vision_model"):
        return CheckpointPart(place, "clip", raw)
    if isinstance(raw.get("text_config"), dict) and isinstance(raw.get("vision_config"), dict):
        return CheckpointPart(place, "llava-hf", raw)
    if tower_name(raw) or str(said).startswith("llava"):
        if weights_of(place) is None and (place / PROJECTOR_FILE).exists():
            return CheckpointPart(place, "projector", raw)
        return CheckpointPart(place, "llava", raw)
    if said in LANGUAGE_MODELS:
        return CheckpointPart(place, "llm", raw)
    raise CheckpointError(
        f"{place / 'config.json'}: describes a {said!r} model; llava-hf (text_config and vision_config), original LLaVA "
        f"(mm_vision_tower), {', '.join(LANGUAGE_MODELS)} and CLIP are read"
    )


@dataclasses.dataclass
class Assembly:
    """A model to be read: its architecture, and where every tensor lies.

    Attributes:
        tensors: canonical name to (files, stored name).
    """

    place: Path
    config: VLMConfig
    tensors: dict[str, tuple[Tensors, str]]


def _weights(part: CheckpointPart) -> Tensors:
    if part.kind == "projector":
        file = part.place if part.place.is_file() else part.place / PROJECTOR_FILE
        return Tensors([file])
    if part.kind == "llava-lora":
        return Tensors([part.place / NON_LORA])
    if (found := weights_of(part.place)) is None:
        raise CheckpointError(
            f"{part.place}: neither model.safetensors nor pytorch_model.bin nor an index of them is there"
        )
    return found


def _named(part: CheckpointPart, only: str = "") -> dict[str, tuple[Tensors, str]]:
    """A part's tensors by canonical name, without those that a named rule ignores.

    Args:
        only: take only names that begin so.

    Raises:
        CheckpointError: two tensors are one parameter, or a piece holds what does not belong to it.
    """
    tensors = _weights(part)
    spell = projector_name if part.kind in ("projector", "llava-lora") else canonical
    found: dict[str, tuple[Tensors, str]] = {}
    for name in tensors.stored:
        if IGNORED.search(name) or (part.kind == "clip" and CLIP_REST.match(name)):
            continue
        known = spell(name.removeprefix("base_model.model.") if part.kind == "llava-lora" else name)
        if known in found:
            file = tensors.stored[name].file
            raise CheckpointError(f"{file}: tensor {known} is there twice, as {found[known][1]} and as {name}")
        if known.startswith(only):
            found[known] = tensors, name
    belongs = {"clip": "vision_tower.", "llm": "language_model.", "projector": "multi_modal_projector."}
    belongs["llava-lora"] = belongs["projector"]
    if strange := [name for name in found if not name.startswith(belongs.get(part.kind, ""))]:
        raise CheckpointError(
            f"{part.place}: {len(strange)} tensor(s) have no place in {SAID[part.kind]}: {found[strange[0]][1]}, …"
        )
    return found


def assemble(name: str | Path, base: Sequence[str | Path] = ()) -> Assembly:
    """One whole model of a path and the parts that it lacks.

    Raises:
        CheckpointError: a part is missing, superfluous, there twice or broken.
    """
    main = recognise(name)
    parts = [recognise(other) for other in base]
    if main.kind == "peft":
        raise CheckpointError(
            f"{main.place}: {SAID['peft']}, not a model; give its base as the path and this folder as the adapter"
        )
    if any(part.kind in ("peft", "llava-lora", "orbax") for part in parts):
        wrong = next(part for part in parts if part.kind in ("peft", "llava-lora", "orbax"))
        raise CheckpointError(f"{wrong.place}: {SAID[wrong.kind]} cannot be a part of another model")
    if main.kind == "llava-hf":
        _none_left(parts, main)
        return Assembly(main.place, llava_hf_config(main.place, main.raw), _named(main))
    tower = _only(parts, ("clip",))
    if main.kind == "llava":
        _none_left([part for part in parts if part is not tower], main)
        return _original(main, main, tower, None)
    if main.kind in ("llm", "clip"):
        everything = [main, *parts]
        llm, tower, projector = (_only(everything, (kind,)) for kind in ("llm", "clip", "projector"))
        _none_left([part for part in everything if part not in (llm, tower, projector)], main)
        if llm is None or projector is None:
            missing = "a language model" if llm is None else "a projector (mm_projector.bin)"
            raise CheckpointError(f"{main.place}: {SAID[main.kind]}; {missing} is lacking, give it as a base")
        return _original(projector, llm, tower, projector)
    # A projector or a LoRA folder: both bring a projector, and stand on a language model or on a whole LLaVA.
    under = _only(parts, ("llm", "llava", "llava-hf"))
    _none_left([part for part in parts if part not in (under, tower)], main)
    under = under or recorded_base(main)
    if under.kind == "llava-hf":
        config = llava_hf_config(under.place, under.raw)
        found = {n: at for n, at in _named(under).items() if not n.startswith("multi_modal_projector.")} | _named(main)
        return Assembly(main.place, dataclasses.replace(config, projector=_projector_kind(found)), found)
    return _original(main, under, tower, main)


def _only(parts: Iterable[CheckpointPart], kinds: tuple[Kind, ...]) -> CheckpointPart | None:
    found = [part for part in parts if part.kind in kinds]
    if len(found) > 1:
        raise CheckpointError(f"{found[0].place} and {found[1].place}: both are {SAID[found[1].kind]}; one is needed")
    return found[0] if found else None


def _none_left(parts: Sequence[CheckpointPart], main: CheckpointPart) -> None:
    if parts:
        raise CheckpointError(
            f"{parts[0].place}: {SAID[parts[0].kind]} that {main.place} ({SAID[main.kind]}) has no use for"
        )


def recorded_base(main: CheckpointPart) -> CheckpointPart:
    """The language model that a LoRA folder says it was trained on."""
    lacking = f"{main.place}: {SAID[main.kind]} lacks its language model; give it as a base"
    if main.kind != "llava-lora":
        raise CheckpointError(lacking)
    said = read_json(main.place / ADAPTER_CONFIG).get("base_model_name_or_path")
    try:
        part = recognise(str(said or ""))
    except CheckpointError as error:
        raise CheckpointError(f"{lacking} (it was trained on {said!r}: {error})") from None
    if part.kind not in ("llm", "llava", "llava-hf"):
        raise CheckpointError(f"{lacking} (it was trained on {said!r}, which is {SAID[part.kind]})")
    return part


def _original(
    settings: CheckpointPart, under: CheckpointPart, tower: CheckpointPart | None, projector: CheckpointPart | None
) -> Assembly:
    """A model in original LLaVA's manner.

    Args:
        settings: whose config.json says how the parts meet (`mm_*`).
        under: language model, or whole original LLaVA.
        tower: CLIP; needed where `under` does not hold it.
        projector: what holds the projector, where it is not `under`.
    """
    found = _named(under)
    if projector is not None:
        found = {n: at for n, at in found.items() if not n.startswith("multi_modal_projector.")} | _named(projector)
    raw = {**under.raw, **settings.raw}
    config = settings.config if settings.raw else under.config
    inside = any(name.startswith("vision_tower.") for name in found)
    said = tower_name(raw)
    if tower is None and said and Path(said).is_dir():
        tower = recognise(said)
    sizes = known_tower(said)
    if isinstance(ours := raw.get(TOWER_KEY), dict):
        sizes = vision_config(config, ours)
    if tower is None and (not inside or sizes is None):
        try:
            tower = recognise(said)
        except CheckpointError as error:
            need = "the size of its vision tower" if inside else "its vision tower"
            raise CheckpointError(
                f"{config}: {need} ({said or 'not named'}) is lacking; give it as a base ({error})"
            ) from None
    if tower is not None:
        if tower.kind != "clip":
            raise CheckpointError(f"{tower.place}: {SAID[tower.kind]}, where a CLIP vision tower is needed")
        sizes = _tower_sizes(tower)
        if not inside:
            found |= _named(tower)
    assert sizes is not None
    kind = original_kind(under.raw) if under.kind != "llm" else str(under.raw["model_type"])
    text = text_config(under.config, under.raw, kind)
    shape = _projector_kind(found)
    asked = raw.get("mm_projector_type")
    if asked is not None and asked != shape:
        raise CheckpointError(f"{config}: mm_projector_type is {asked!r}; the tensors are those of {shape!r}")
    return Assembly(settings.place, original_config(config, raw, text, sizes, shape), found)


def _tower_sizes(tower: CheckpointPart) -> VisionConfig:
    raw = tower.raw.get("vision_config", tower.raw) if tower.raw["model_type"] == "clip" else tower.raw
    if not isinstance(raw, dict):
        raise CheckpointError(f"{tower.config}: vision_config is no object")
    return vision_config(tower.config, raw)


def _projector_kind(names: Iterable[str]) -> ProjectorKind:
    return "mlp2x_gelu" if "multi_modal_projector.linear_2.weight" in set(names) else "linear"


def rows(assembly: Assembly) -> int:
    """The vocabulary by the tensors: LLaVA-pp resizes it without telling every config.

    Raises:
        CheckpointError: embedding and head disagree.
    """
    sizes = []
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name not in assembly.tensors:
            return assembly.config.text.vocab  # the reader will say what is missing
        tensors, stored = assembly.tensors[name]
        shape = tensors.stored[stored].shape
        sizes.append(shape[0] if shape else 0)
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"{assembly.place}: the embedding has {sizes[0]} rows and lm_head {sizes[1]}")
    return sizes[0]


def stored_dtype(assembly: Assembly) -> np.dtype:
    """The type of the decoder's matrices in the files."""
    tensors, stored = assembly.tensors["language_model.model.embed_tokens.weight"]
    return tensors.stored[stored].dtype or np.dtype(np.float32)
