"""Detect what a folder or file is, by its content."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.configs import (
    llava_hf_config,
    vision_config,
)
from reverie_jax.models.checkpoints.decoders import text_config
from reverie_jax.models.checkpoints.families import (
    check_folders,
    check_original,
    detect_format,
    original_language_model,
)
from reverie_jax.models.checkpoints.files import Tensors, read_json, resolve, split_delta, weights_of
from reverie_jax.models.checkpoints.processing import read_image_processor
from reverie_jax.models.checkpoints.sisters import sister_config
from reverie_jax.models.config import VisionConfig

ComponentFormat = Literal[
    "llava-hf", "llava", "llava-lora", "projector", "llm", "clip", "peft", "orbax", "sister", "eva", "blip2", "minigpt4"
]

DESCRIPTIONS: dict[ComponentFormat, str] = {
    "llava-hf": "a llava-hf model",
    "llava": "an original LLaVA",
    "llava-lora": "an original LLaVA LoRA folder",
    "projector": "a projector",
    "llm": "a plain language model",
    "clip": "a vision tower",
    "peft": "a PEFT adapter",
    "orbax": "a reverie-jax model in Orbax format",
    "sister": "a MiniGPT-4, mPLUG-Owl or Muffin",
    "eva": "an EVA-CLIP tower",
    "blip2": "a BLIP-2 file, with a Q-Former",
    "minigpt4": "a MiniGPT-4's projector",
}
COMPLETE_MODELS = ("llava-hf", "llava", "orbax", "sister")

PROJECTOR_FILE, NON_LORA, ADAPTER_CONFIG = "mm_projector.bin", "non_lora_trainables.bin", "adapter_config.json"
RUN_FILE = "run.json"
"""Identifies a run folder of `reverie train`."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A folder or file that holds a model or a component of one.

    Attributes:
        config: Content of its config.json; empty where it has none.
        base: The model that its tensors are differences from, if they are.
    """

    path: Path
    format: ComponentFormat
    config: dict[str, Any]
    base: Component | None = None

    @property
    def config_path(self) -> Path:
        """The path of its config.json."""
        return self.path / "config.json"

    def __str__(self) -> str:
        return f"{self.path}: {DESCRIPTIONS[self.format]}"


ComponentLike = str | Path | Component
"""A path, a hub id (see `files.resolve`), or what `detect_component` returned for one."""


def as_list(components: ComponentLike | Sequence[ComponentLike] | None) -> list[ComponentLike]:
    """Return one, several or no components as a list."""
    if components is None:
        return []
    return [components] if isinstance(components, str | Path | Component) else list(components)


def detect_component(source: ComponentLike) -> Component:
    """Return what a path or hub id holds, by its content and never by its name.

    Raises:
        CheckpointError: It is missing, or of no known format.
    """
    if isinstance(source, Component):
        return source
    if (pair := split_delta(str(source))) is not None:
        base, delta = map(detect_component, pair)
        if base.format not in ("llm", *COMPLETE_MODELS) or base.base is not None:
            raise CheckpointError(
                f"{base}, which cannot be the base of a delta; write BASE+DELTA, the language model first"
            )
        return dataclasses.replace(delta, base=base)
    path = resolve(source, check=check_config)
    if not path.is_dir():
        if path.suffix not in (".bin", ".safetensors", ".pt", ".pth"):
            raise CheckpointError(f"{path}: not a checkpoint; give a model's folder, or an {PROJECTOR_FILE}")
        return Component(path, _file_format(path), {})
    if (path / RUN_FILE).exists():
        raise CheckpointError(
            f"{path}: a run folder of `reverie train`; give its base model as the path and this as the adapter"
        )
    if (path / ADAPTER_CONFIG).exists():
        if (path / NON_LORA).exists():
            config = read_json(path / "config.json")
            if config.get("model_type"):
                check_original(path / "config.json", config)
            return Component(path, "llava-lora", config)
        return Component(path, "peft", {})
    if not (path / "config.json").exists() and (path / PROJECTOR_FILE).exists():
        return Component(path, "projector", {})
    check_folders(path, (entry.name for entry in path.iterdir() if entry.is_dir()))
    if not (path / "config.json").exists() and (inner := _models_within(path)):
        raise CheckpointError(f"{path}: no config.json; give the folder of one model, as {path / inner[-1]}")
    config = read_json(path / "config.json")
    format = detect_format(path / "config.json", config)
    if format == "llava" and weights_of(path) is None and (path / PROJECTOR_FILE).exists():
        return Component(path, "projector", config)
    return Component(path, format, config)


def _file_format(path: Path) -> ComponentFormat:
    names = Tensors([path]).stored.keys()
    if any(".lora_A." in name for name in names):  # a PeftModel's state dict
        return "peft"
    if "blocks.0.attn.q_bias" in names:
        return "eva"
    if "query_tokens" in names:
        return "blip2"
    return "minigpt4" if "llama_proj.weight" in names else "projector"


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Check all that a config.json and the settings beside it say, before any weight is downloaded.

    Raises:
        CheckpointError: The model is not supported, or a setting of it.
    """
    format = detect_format(path, config)
    if format == "llava-hf":
        llava_hf_config(path.parent, config)
    elif format == "sister":
        sister_config(path, config)
    elif format == "clip":
        tower_sizes(Component(path.parent, format, config))
    elif format == "llm" or (format == "llava" and "hidden_size" in config):
        text_config(path, config, config["model_type"] if format == "llm" else original_language_model(path, config))


def _models_within(path: Path) -> list[str]:
    """Return the subfolders that are models or adapters, as trainers' `checkpoint-N`; the last step's is last."""
    names = [file.parent.name for name in ("config.json", ADAPTER_CONFIG) for file in path.glob(f"*/{name}")]
    return sorted(set(names), key=lambda name: (len(name), name))


def tower_sizes(tower: Component) -> VisionConfig:
    """Return the sizes of a CLIP or SigLIP by its config.json, and the normalization by its image processor's file.

    Raises:
        CheckpointError: The component is something else, or a setting is not supported.
    """
    if tower.format != "clip":
        raise CheckpointError(f"{tower}, not a vision tower")
    config = tower.config
    if config["model_type"] in ("clip", "siglip"):
        kind = f"{config['model_type']}_vision_model"
        config = config.get("vision_config", config)
        if not isinstance(config, dict):
            raise CheckpointError(f"{tower.config_path}: vision_config is not an object")
        config = {**config, "model_type": kind}
    return read_image_processor(tower.path, vision_config(tower.config_path, config))[0]
