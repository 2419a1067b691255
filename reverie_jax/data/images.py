"""Decode images, and preprocess them for a vision tower."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, UnidentifiedImageError

from reverie_jax.errors import UserError
from reverie_jax.models.config import ImageAspectRatio

_log = logging.getLogger(__name__)

PAD_COLOR = (122, 116, 104)
"""CLIP's mean color in bytes, rounded down as in LLaVA."""


def pad_color(mean: Sequence[float]) -> tuple[int, int, int]:
    """Return a tower's mean color in bytes, rounded down as in LLaVA."""
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


MAX_PIXELS = 80_000_000
"""Larger images are not decoded: a file of a few kilobytes may claim gigabytes of pixels."""
_LARGE = 1 << 22
"""Pixels that are held at once while an image is resized, besides the image and the result."""


def gray_depth(image: Image.Image) -> int:
    """Return the bits of gray values: 8, or in deeper modes those of the smallest usual depth that holds the largest value.

    Files of 16 bits often hold the 8 or 12 bits of a camera or scanner, and nothing in them says so. It is 1 for floats from
    0 to 1.
    """
    if not is_deep(image):
        return 8
    largest = float(_gray(image).max(initial=0))
    if image.mode == "F" and largest <= 1:
        return 1
    return next((bits for bits in (8, 10, 12, 14, 16, 24) if largest < 2**bits), 32)


def is_deep(image: Image.Image) -> bool:
    """Return whether an image's mode has gray values of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _gray(image: Image.Image) -> Float64[np.ndarray, "H W"]:
    return np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0).clip(0)


class BrokenImage(UserError):
    """An image that cannot be decoded; the message names it and says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any of Pillow's modes to 8-bit RGB: palettes are applied, transparency is dropped.

    Transparent pixels keep their stored color, as in original LLaVA; transformers 5 lays them on white. Gray of more than 8
    bits, which Pillow's `convert` would clip to white, keeps its upper 8 bits (`gray_depth`).
    """
    if is_deep(image):
        depth = gray_depth(image)
        levels = _gray(image) * (255 if depth == 1 else 2.0 ** (8 - depth))
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # premultiplied alpha; Pillow converts it to LA only
        image = image.convert("LA")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colors without Pillow's warning
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def describe_conversion(image: Image.Image) -> tuple[str, str] | None:
    """Return (kind, what `to_rgb` does) of an opened image that others may read in another way; None for most images."""
    if is_deep(image):
        bits = gray_depth(image)
        if bits == 1:
            return "deep image", "gray values from 0 to 1, as floats, are scaled to 8 bits"
        return "deep image", f"gray values of more than 8 bits are read as {bits} bits, which hold the largest one"
    if any(";16" in str(tile[-1]) for tile in getattr(image, "tile", ())):
        return "deep image", "colors of 16 bits keep their upper 8, which are dark if only the lower 12 were used"
    if image.has_transparency_data:
        has_alpha = image.getbands()[-1] in ("A", "a")
        alpha = np.asarray(image if has_alpha else image.convert("RGBA"))[..., -1]
        if alpha.min(initial=255) < 255:
            return "transparent image", (
                "transparency is dropped, as in original LLaVA: such pixels show the color that is stored, often black;"
                " transformers 5 lays them on white"
            )
    return None


_warned: set[str] = set()
"""Kinds of images of which `decode` has said what it does."""


def _warn_once(image: Image.Image, name: str) -> None:
    if len(_warned) < 2 and (found := describe_conversion(image)) is not None and found[0] not in _warned:
        _warned.add(found[0])
        _log.warning("%s: %s (said once; `reverie data check` lists all such images)", name, found[1])


def decode(encoded: bytes, name: str, *, warn: bool = True) -> Image.Image:
    """Decode an image file to RGB. As in original LLaVA, its EXIF orientation is not applied.

    Args:
        encoded: The file.
        name: Its name, for errors.
        warn: Say once in the log what is done with transparency, and with gray of more than 8 bits.

    Raises:
        BrokenImage: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{name}: {image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS:,}")
            if warn:
                _warn_once(image, name)
            return to_rgb(image)
    except UnidentifiedImageError:
        raise BrokenImage(f"{name}: not a readable image (unknown format)") from None
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage(f"{name}: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's readers raise many types
        raise BrokenImage(f"{name}: not a readable image ({error or type(error).__name__})") from error


def preprocess(
    image: Image.Image, size: int, aspect: ImageAspectRatio = "pad", color: tuple[int, int, int] = PAD_COLOR
) -> UInt8[np.ndarray, "S S 3"]:
    """Return LLaVA's square image, resized to `size` with bicubic filter: padded with `color`, cropped or stretched.

    Memory is bounded by the image and the result, also for thin images, whose square would be large.

    Normalization is left to the device (`models.vision.normalize`), so that a pixel is transferred as one byte.
    """
    if aspect == "stretch":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    if aspect == "pad" and image.width != image.height:
        return _pad_and_resize(image, size, color)
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    left, top = (width - size) // 2, (height - size) // 2
    box = tuple(edge * image.width / width for edge in (left, left + size))
    if left and all(float(np.float32(edge)) == edge for edge in box):
        # Only the square that is kept is computed. Pillow stores these edges in 32 bits; if they are exact (as for 4 : 3),
        # the result is the same as that of resizing the whole, which goes across first and then down.
        across = image.resize((size, image.height), Image.Resampling.BICUBIC, box=(box[0], 0, box[1], image.height))
        return np.asarray(across.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    if width * height > _LARGE:  # the whole would be a hundred times the square that is kept
        down = tuple(edge * image.height / height for edge in (top, top + size))
        box = (box[0], down[0], box[1], down[1])
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), np.uint8)
    if min(image.size) != size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def random_resized_crop(
    image: Image.Image, size: int, scale: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "S S 3"]:
    """Return a random part of an image, stretched to a square with bicubic filter: torchvision's RandomResizedCrop.

    Args:
        image: The image.
        size: Side of the square, in pixels.
        scale: Least share of the image's area; the largest is 1. Width / height is 3/4 to 4/3, uniform in its logarithm.
        rng: Source of the draws.
    """
    return np.asarray(
        image.crop(_crop_box(*image.size, scale, rng)).resize((size, size), Image.Resampling.BICUBIC), np.uint8
    )


def _crop_box(width: int, height: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom edges of a random part of an image."""
    least, most = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    # An image this thin has hardly such a part: its middle, or all of it.
    w = round(height * most) if width / height > most else width
    h = round(width / least) if width / height < least else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _pad_and_resize(image: Image.Image, size: int, color: tuple[int, int, int]) -> UInt8[np.ndarray, "S S 3"]:
    """Resize an image's padded square, a part of the square at a time.

    Pillow resizes across first and then down, so rows of the square can be resized across in strips. Of a tall, thin image
    only the columns around it are computed: the others have the color of the padding.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    across = Image.new("RGB", (size, side), color)
    first, last, start, stop = 0, size, 0, side  # columns of the result, and of the square
    scale = side / size
    if side > 4 * image.width:
        reach = 3 * max(1, scale)  # pixels of the square; the filter's are 2, and 2 of the result where it shrinks
        first, last = max(0, int((left - reach) / scale)), min(size, int((left + image.width + reach) / scale) + 1)
        start, stop = max(0, int(first * scale - reach)), min(side, int(last * scale + reach) + 1)
    rows = max(1, _LARGE // (stop - start))
    for row in range(0, image.height, rows):
        height = min(rows, image.height - row)
        strip = Image.new("RGB", (stop - start, height), color)
        strip.paste(image.crop((0, row, image.width, row + height)), (left - start, 0))
        box = (first * scale - start, 0, last * scale - start, height)
        across.paste(strip.resize((last - first, height), Image.Resampling.BICUBIC, box=box), (first, top + row))
    return np.asarray(across.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


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


def small_jpeg(encoded: bytes, name: str, side: int) -> bytes:
    """Return an image as a JPEG of at most `side` pixels in width and height, for HTML pages.

    Raises:
        BrokenImage: The image cannot be decoded.
    """
    image = decode(encoded, name)
    image.thumbnail((side, side))
    return _encode(image, format="JPEG", quality=80)


def thumbnail(encoded: bytes, name: str, side: int) -> str:
    """Return the `small_jpeg` of an image as a data URL.

    Raises:
        BrokenImage: The image cannot be decoded.
    """
    return "data:image/jpeg;base64," + base64.b64encode(small_jpeg(encoded, name, side)).decode()


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return pixels as a PNG file."""
    return _encode(Image.fromarray(pixels), format="PNG", compress_level=1)


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()
