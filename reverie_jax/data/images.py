"""Decode images, and preprocess them for a vision tower."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from reverie_jax.errors import UserError

PAD_COLOR = (122, 116, 104)
"""CLIP's mean color in bytes, rounded down as in LLaVA."""
MAX_PIXELS = 80_000_000
"""Larger images are not decoded: a file of a few kilobytes may claim gigabytes of pixels."""


class BrokenImage(UserError):
    """An image that cannot be decoded; the message names it and says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any of Pillow's modes to 8-bit RGB: palettes are applied, transparency is dropped.

    16-bit gray, which Pillow's `convert` would clip to white, keeps its upper byte.
    """
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        if image.mode != "I" or gray.max(initial=0) > 255:
            return Image.fromarray((gray >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # premultiplied alpha; Pillow converts it to LA only
        image = image.convert("LA")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colors without Pillow's warning
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def decode(encoded: bytes, name: str) -> Image.Image:
    """Decode an image file to RGB. As in original LLaVA, its EXIF orientation is not applied.

    Args:
        encoded: The file.
        name: Its name, for errors.

    Raises:
        BrokenImage: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{name}: {image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}")
            return to_rgb(image)
    except UnidentifiedImageError:
        raise BrokenImage(f"{name}: not a readable image (unknown format)") from None
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage(f"{name}: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's readers raise many types
        raise BrokenImage(f"{name}: not a readable image ({error or type(error).__name__})") from error


def preprocess(image: Image.Image, size: int, *, pad: bool = True) -> UInt8[np.ndarray, "S S 3"]:
    """Return LLaVA's square image: padded with CLIP's mean color (or cropped), resized to `size` with bicubic filter.

    Normalization is left to the device (`models.vision.normalize`), so that a pixel is transferred as one byte.
    """
    if pad and image.width != image.height:
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), PAD_COLOR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    left, top = (width - size) // 2, (height - size) // 2
    box = tuple(edge * image.width / width for edge in (left, left + size))
    if left and all(float(np.float32(edge)) == edge for edge in box):
        # Only the square that is kept is computed. Pillow stores these edges in 32 bits; if they are exact (as for 4 : 3),
        # the result is the same as that of resizing the whole, which goes across first and then down.
        across = image.resize((size, image.height), Image.Resampling.BICUBIC, box=(box[0], 0, box[1], image.height))
        return np.asarray(across.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    if min(image.size) != size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def downscale(encoded: bytes, name: str, max_side: int) -> bytes:
    """Scale a larger image down to `max_side` as a JPEG of quality 95; return others unchanged.

    Raises:
        BrokenImage: The image cannot be decoded.
    """
    image = decode(encoded, name)
    if max(image.size) <= max_side:
        return encoded
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _encode(image, format="JPEG", quality=95, subsampling=0)


def thumbnail(encoded: bytes, name: str, side: int) -> str:
    """Return a small JPEG of an image as a data URL, for HTML pages.

    Raises:
        BrokenImage: The image cannot be decoded.
    """
    image = decode(encoded, name)
    image.thumbnail((side, side))
    return "data:image/jpeg;base64," + base64.b64encode(_encode(image, format="JPEG", quality=80)).decode()


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return pixels as a PNG file."""
    return _encode(Image.fromarray(pixels), format="PNG", compress_level=1)


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()
