"""Change the size of a model's images: resize the tower's learned positions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from reverie_jax.models.lora import assign
from reverie_jax.models.vlm import VisionLanguageModel

_CUBIC = -0.75
"""Coefficient of the cubic convolution, torch's; `jax.image.resize` has -0.5."""


def resize_images(model: VisionLanguageModel, size: int) -> None:
    """Give a model's tower positions for images of another size, in place, as BEiT-3's and EVA-CLIP's loaders do.

    The grid of patches is resized by torch's bicubic interpolation, without antialiasing; rows before it are kept.

    Args:
        model: The model.
        size: Side of an image, in pixels.

    Raises:
        ValueError: The size is not a multiple of the patches' side.
    """
    config, vision = model.config, model.config.vision
    if size < vision.patch_size or size % vision.patch_size:
        raise ValueError(f"not a multiple of the patches' side, {vision.patch_size}")
    old, new = vision.image_size // vision.patch_size, size // vision.patch_size
    if old != new:
        table = np.asarray(model.vision.position[...].astype(jnp.float32))
        first = len(table) - vision.patches
        weights = _bicubic(old, new)
        grid = np.einsum("ia,jb,abw->ijw", weights, weights, table[first:].reshape(old, old, -1))
        table = np.concatenate([table[:first], grid.reshape(new * new, -1).astype(np.float32)])
        assign(model.vision.position, jnp.asarray(table, model.vision.position.dtype))
    vision = dataclasses.replace(vision, image_size=size)
    model.config = dataclasses.replace(config, vision=vision, vision_tower="")  # it is not the named one any more
    model.vision.config = vision


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Return the weights of old points in each new point (`align_corners=False`)."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    floor = np.floor(at)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        x = np.abs(at - floor - offset)
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x**2 + 1
        far = _CUBIC * (((x - 5) * x + 8) * x - 4)
        column = np.clip(floor + offset, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), column), np.where(x <= 1, near, far))
    return weights
