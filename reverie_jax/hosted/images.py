"""Images of requests: the file as it is, if every service accepts its format."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, UnidentifiedImageError

from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.row_files import read_rows
from reverie_jax.errors import UserError
from reverie_jax.files import files_below
from reverie_jax.hosted.interface import RequestImage, UnusableError

_ACCEPTED = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
}
"""Of files that are images; one that cannot be decoded here is reported, not passed over."""


def encode_image(image: RequestImage, max_size: int | None = None) -> tuple[str, bytes]:
    """Return (media type, bytes); the type is read from the content. Other formats, and CMYK, become PNG.

    Args:
        image: The image.
        max_size: Longest side, in pixels; a larger image is scaled down.

    Raises:
        UnusableError: The bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(image.encoded)) as opened:
            kind = "" if opened.mode == "CMYK" else opened.format or ""
            size, exif = opened.size, opened.info.get("exif", b"")
        large = max_size is not None and max(size) > max_size
        if kind in _ACCEPTED and not large:
            return _ACCEPTED[kind], image.encoded
        decoded, buffer = decode(image.encoded, image.key), io.BytesIO()
        options: dict[str, Any] = {"format": "PNG"}
        if max_size is not None and large:
            decoded.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
            options["exif"] = exif  # its orientation
            if kind == "JPEG":
                options |= {"format": "JPEG", "quality": 90}
        decoded.save(buffer, **options)
        return _ACCEPTED[options["format"]], buffer.getvalue()
    except UnidentifiedImageError:
        raise UnusableError("not a readable image (unknown format)") from None
    except (BrokenImage, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableError(f"not a readable image ({' '.join(str(error).split())})") from None


def estimate_tokens(provider: str, width: int, height: int, max_size: int | None = None) -> int:
    """Return about how many input tokens an image takes: as Gemini tiles it, or as OpenAI does at high detail."""
    if max_size is not None and max(width, height) > max_size:
        scale = max_size / max(width, height)
        width, height = (max(1, round(side * scale)) for side in (width, height))
    if provider.startswith(("gemini", "google")):
        return 258 * (1 if max(width, height) <= 384 else math.ceil(width / 768) * math.ceil(height / 768))
    scale = min(1.0, 2048 / max(width, height, 1))
    scale *= min(1.0, 768 / max(min(width, height) * scale, 1.0))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def mean_tokens(
    provider: str, folder: Path, names: Sequence[str], max_size: int | None = None, most: int = 100
) -> float:
    """Return the mean of `estimate_tokens` over evenly spaced images; 0 if none can be read."""
    counts = []
    for name in names[:: max(1, len(names) // most)]:
        unreadable = contextlib.suppress(OSError, ValueError, UserError, Image.DecompressionBombError)
        with unreadable, Image.open(resolve_image(folder, name)) as opened:  # reads the header alone
            counts.append(estimate_tokens(provider, *opened.size, max_size))
    return sum(counts) / len(counts) if counts else 0.0


def read_image(folder: Path, name: str) -> RequestImage:
    """Read an image and check that it can be decoded.

    Raises:
        UnusableError: It cannot; no request is sent about it.
    """
    try:
        encoded = resolve_image(folder, name).read_bytes()
        decode(encoded, name)
    except OSError as error:
        raise UnusableError(f"image cannot be read ({error.strerror})") from None
    except UserError as error:
        raise UnusableError(str(error).replace(f"{name}: ", "", 1)) from None
    return RequestImage(name, encoded)


def resolve_image(folder: Path, name: str) -> Path:
    """Return the path of an image; names in the original scripts' output may begin with the folder.

    A name may lead through links that are in the folder, as those in training data may.

    Raises:
        UserError: The name is not a file name, or is outside the folder.
    """
    roots = [os.path.abspath(folder), os.path.realpath(folder)]
    try:
        paths = [Path(os.path.abspath(place)) for place in (folder / name, name)]
        inside = [path for path in paths if any(path.is_relative_to(root) for root in roots)]
        if b"\0" in os.fsencode(name):
            raise ValueError("a null byte")
        found = next((path for path in inside if path.exists()), None)
    except (ValueError, OSError) as error:
        raise UserError(f"{name!r} is not a file name ({type(error).__name__})") from None
    if not inside:
        raise UserError(f"{name}: is outside the image folder {folder}")
    return found or inside[0]


def localize_name(folder: Path, name: str) -> str:
    """Return the longest suffix of another machine's path that is a file in the folder; `name` itself if none is."""
    parts = PurePath(name.replace("\\", "/")).parts
    for start in range(len(parts)):
        suffix = PurePath(*parts[start:])
        with contextlib.suppress(ValueError, OSError):
            if ".." not in suffix.parts and not suffix.is_absolute() and (folder / suffix).is_file():
                return suffix.as_posix()
    return name


def list_images(folder: Path, list_file: Path | None = None) -> list[str]:
    """Return the names of the images, relative to the folder: those of the list in its order, or all files, sorted.

    Args:
        folder: Images, also in folders below it.
        list_file: JSON list of names, as the original scripts' `image_list.json`.

    Raises:
        UserError: The folder or the list is missing, empty or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    if list_file is not None:
        names = read_rows(list_file, min_rows=0)
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{list_file}: must be a JSON list of image names")
    else:
        paths = (path for path in files_below(folder) if path.suffix.lower() in SUFFIXES and path.is_file())
        names = sorted(path.relative_to(folder).as_posix() for path in paths)
    if not names:
        raise UserError(f"{list_file or folder}: no images")
    for name in names:
        resolve_image(folder, name)
    return list(dict.fromkeys(names))
