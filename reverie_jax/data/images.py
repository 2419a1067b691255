"""Encoded pictures to the square of pixels that a vision tower takes."""

from __future__ import annotations

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from reverie_jax.errors import UserError

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour in bytes, rounded down as LLaVA does."""


MAX_PIXELS = 80_000_000
"""A few kilobytes can say that they are gigabytes of pixels: such a picture is not opened."""


class BrokenImage(UserError):
    """Bytes that are no readable picture; the message says which and why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any of Pillow's modes in 8-bit RGB: palettes looked up, transparency dropped, as `convert` does.

    16-bit grey, which `convert` would clip to white, keeps its upper byte.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if image.mode != "I" or grey.max(initial=0) > 255:
            return Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # premultiplied; Pillow knows the way back, and no shorter one
        image = image.convert("LA")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours without Pillow's warning
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def decode(encoded: bytes, name: str) -> Image.Image:
    """An encoded file as RGB. Its EXIF orientation is not applied: original LLaVA opens and converts, and no more.

    Raises:
        BrokenImage: the bytes cannot be read as a picture.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{name}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            return to_rgb(image)
    except UnidentifiedImageError:
        raise BrokenImage(f"{name}: not a readable picture (unknown format)") from None
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage(f"{name}: has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # of Pillow's many readers, each fails in its own way
        raise BrokenImage(f"{name}: not a readable picture ({error or type(error).__name__})") from error


def preprocess(image: Image.Image, size: int, *, pad: bool = True) -> UInt8[np.ndarray, "S S 3"]:
    """LLaVA's square: padded with CLIP's mean colour (or cropped), shortest edge to `size` by bicubic.

    Normalisation is left to the device (`models.vision.normalise`), so a pixel travels as one byte.
    """
    if pad and image.width != image.height:
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), PAD_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    left, top = (width - size) // 2, (height - size) // 2
    box = tuple(edge * image.width / width for edge in (left, left + size))
    if left and all(float(np.float32(edge)) == edge for edge in box):
        # Only the square that is kept is computed, where Pillow, which keeps such edges in 32 bits, then gives the same
        # bytes (4 : 3 is such a shape); across first and then down, as it does for the whole.
        across = image.resize((size, image.height), Image.Resampling.BICUBIC, box=(box[0], 0, box[1], image.height))
        return np.asarray(across.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    if min(image.size) != size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def within(encoded: bytes, name: str, side: int) -> bytes:
    """The picture as it is where no side is longer; else scaled down to it, as a JPEG of quality 95.

    Raises:
        BrokenImage: the bytes are no picture.
    """
    image = decode(encoded, name)
    if max(image.size) <= side:
        return encoded
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def thumbnail(encoded: bytes, name: str, side: int) -> str:
    """A small JPEG of a picture as a data address, for pages.

    Raises:
        BrokenImage: the bytes are no picture.
    """
    image = decode(encoded, name)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
