"""Read what prepares a model's inputs and ends its answers: the settings of its image processor and of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.families import Json
from reverie_jax.models.checkpoints.files import read_json
from reverie_jax.models.vision import CLIP_MEAN, CLIP_STD


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


def check_image_processor(folder: Path, side: int) -> bool:
    """Check that a folder's image processor, if it has one, computes what `data.images.preprocess` and `normalize` do.

    Args:
        folder: Of a llava-hf model, or of a CLIP tower.
        side: Of the tower's input, in pixels.

    Returns:
        Whether it pads images to squares.

    Raises:
        CheckpointError: It computes something else; the message names the setting.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        content = read_json(path) if path.exists() else {}
        raw = content["image_processor"] if isinstance(content.get("image_processor"), dict) else content
        if not {"do_pad", "image_mean", "size", "do_resize", "do_center_crop"} & raw.keys():
            continue
        padded = raw.get("do_pad") is True
        square = {"height": side, "width": side}
        cropped = ({"shortest_edge": side}, side, *([square] if padded else []))
        supported: dict[str, tuple[Any, ...]] = {
            "size": cropped,
            "crop_size": (square, side),
            "resample": (3,),
            **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True,)),
            "do_center_crop": (True, False) if padded else (True,),  # a square is not cropped
        }
        default = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}  # of CLIP's class
        for key, values in supported.items():
            if isinstance(sides := raw.get(key), dict):  # transformers may write the sides that are not set, too
                raw = {**raw, key: {name: value for name, value in sides.items() if value is not None}}
            choice(path, raw, key, default.get(key, values[0]), values)
        for key, wanted in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD), ("rescale_factor", 1 / 255)):
            value = raw.get(key)
            if value is not None and not _close(value, wanted):
                raise CheckpointError(f"{path}: {key} {value!r} is not supported; must be CLIP's {wanted}")
        return padded
    return False


def _close(value: Any, wanted: Any) -> bool:
    try:
        return np.shape(value) == np.shape(wanted) and bool(np.allclose(value, wanted, rtol=0, atol=1e-5))
    except (TypeError, ValueError):
        return False


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
