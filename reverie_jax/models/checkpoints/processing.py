"""Read what prepares a model's inputs and ends its answers: the settings of its image processor and of generation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.families import Json
from reverie_jax.models.checkpoints.files import read_json
from reverie_jax.models.config import ImageAspectRatio, VisionConfig


def choice(path: Path, config: Json, key: str, default: Any, supported: tuple[Any, ...]) -> Any:
    """Return a setting that must be one of the supported values.

    Raises:
        CheckpointError: It is another.
    """
    value = config.get(key)
    value = default if value is None else value
    if value not in supported:
        raise CheckpointError(f"{path}: {key} {value!r} is not supported; must be {' or '.join(map(str, supported))}")
    return value


def given(raw: Json) -> Json:
    """Return the settings that are not null."""
    return {key: value for key, value in raw.items() if value is not None}


def size(path: Path, raw: Json, key: str) -> int:
    """Return a setting that must be a positive integer.

    Raises:
        CheckpointError: It is missing, or something else.
    """
    if key not in raw:
        raise CheckpointError(f"{path}: {key} is missing")
    if type(raw[key]) is not int or raw[key] < 1:
        raise CheckpointError(f"{path}: {key} must be a positive integer, not {raw[key]!r}")
    return int(raw[key])


def number(path: Path, raw: Json, key: str) -> float:
    """Return a setting that must be a positive number.

    Raises:
        CheckpointError: It is missing, or something else.
    """
    if type(raw.get(key)) not in (int, float) or not 0 < raw[key] < math.inf:
        raise CheckpointError(f"{path}: {key} must be a positive number, not {raw.get(key)!r}")
    return float(raw[key])


def check_divisible(path: Path, size: int, divisor: int, size_name: str, divisor_name: str) -> None:
    """Check that a size is a multiple of another.

    Raises:
        CheckpointError: It is not.
    """
    if size % divisor:
        raise CheckpointError(f"{path}: {size_name} ({size}) must be a multiple of {divisor_name} ({divisor})")


def read_image_processor(folder: Path, tower: VisionConfig) -> tuple[VisionConfig, ImageAspectRatio]:
    """Return the tower with its image processor's mean and deviation, and how that makes squares of images.

    Args:
        folder: Of a llava-hf model, or of a tower; without files of a processor, the tower's own settings hold.
        tower: The vision tower.

    Raises:
        CheckpointError: The processor computes something else than `data.images.preprocess` and `models.vision.normalize`;
            the message names the setting.
    """
    side = tower.image_size
    square = {"height": side, "width": side}
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        content = read_json(path) if path.exists() else {}
        raw = content["image_processor"] if isinstance(content.get("image_processor"), dict) else content
        if not {"do_pad", "image_mean", "size", "do_resize", "do_center_crop"} & raw.keys():
            continue
        raw = {key: given(value) if isinstance(value, dict) else value for key, value in raw.items()}
        kind = str(raw.get("image_processor_type", raw.get("feature_extractor_type", "")))
        padded, stretched = raw.get("do_pad") is True, kind.startswith("Siglip")
        sizes: tuple[Any, ...] = ({"shortest_edge": side}, side, *([square] if padded else []))
        supported: dict[str, tuple[Any, ...]] = {
            "size": (square,) if stretched else sizes,
            "resample": (3,),
            **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True,)),
        }
        default = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}  # of CLIP's class
        if stretched:
            default = {"size": {"height": 224, "width": 224}}
        else:
            supported["crop_size"] = (square, side)
            supported["do_center_crop"] = (True, False) if padded else (True,)  # a square is not cropped
        for key, values in supported.items():
            choice(path, raw, key, default.get(key, values[0]), values)
        _check_rescale(path, raw.get("rescale_factor"))
        own = (0.5,) * 3 if stretched else tower.mean, (0.5,) * 3 if stretched else tower.std
        mean, std = (
            channels(path, raw, key, value) for key, value in zip(("image_mean", "image_std"), own, strict=True)
        )
        tower = dataclasses.replace(tower, mean=mean, std=std)
        return tower, "pad" if padded else "stretch" if stretched else "square"
    return tower, "square" if tower.class_token else "stretch"


def _check_rescale(path: Path, factor: Any) -> None:
    if factor is not None and not (type(factor) in (int, float) and math.isclose(factor, 1 / 255, abs_tol=1e-5)):
        raise CheckpointError(f"{path}: rescale_factor {factor!r} is not supported; must be 1/255")


def channels(path: Path, raw: Json, key: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    """Return a setting for three channels; values that only rounding tells from the default are the default.

    Raises:
        CheckpointError: It is something else than three numbers between 0 and 1.
    """
    value = raw.get(key)
    value = list(default) if value is None else value
    if not isinstance(value, list) or len(value) != 3 or not all(type(x) in (int, float) and 0 < x < 1 for x in value):
        raise CheckpointError(f"{path}: {key} {value!r} is not supported; must be three numbers between 0 and 1")
    near = all(math.isclose(x, y, abs_tol=1e-5) for x, y in zip(value, default, strict=True))
    first, second, third = default if near else value
    return float(first), float(second), float(third)


def read_stop_ids(folder: Path, config: Json) -> tuple[int, ...]:
    """Return the ids that end an answer by a folder's generation_config.json, or else by config.json, as in transformers.

    Args:
        folder: The folder.
        config: The part of its config.json that describes the language model.

    Raises:
        CheckpointError: They are not ids of tokens.
    """
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for id in ids:
        if type(id) is not int or (id < 0 and path.exists()):
            source = path if path.exists() else folder / "config.json"
            raise CheckpointError(f"{source}: eos_token_id must be a token id or a list of them, not {id!r}")
    return tuple(id for id in ids if id >= 0)  # old config.json files have -1 for none
