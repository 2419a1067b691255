"""Pictures on their way to a model: the file as it is where its format is one that every service takes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path, PurePath

from PIL import Image, UnidentifiedImageError

from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.row_files import read_rows
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Refused, RequestImage

_TAKEN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def as_sent(picture: RequestImage) -> tuple[str, bytes]:
    """(media type, bytes) by content, whatever the name says; other formats become PNG.

    Raises:
        Refused: no picture.
    """
    try:
        with Image.open(io.BytesIO(picture.encoded)) as image:
            kind = "" if image.mode == "CMYK" else image.format or ""
        if kind in _TAKEN:
            return _TAKEN[kind], picture.encoded
        buffer = io.BytesIO()
        decode(picture.encoded, picture.key).save(buffer, format="PNG")
        return "image/png", buffer.getvalue()
    except UnidentifiedImageError:
        raise Refused("not a readable picture (unknown format)") from None
    except (BrokenImage, OSError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(f"not a readable picture ({' '.join(str(error).split())})") from None


def hashed(path: Path) -> str:
    """A file's content by name: 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def read(folder: Path, name: str) -> RequestImage:
    """A picture that opens.

    Raises:
        Refused: it does not; nothing is asked about it then.
    """
    try:
        encoded = place(folder, name).read_bytes()
        decode(encoded, name)
    except OSError as error:
        raise Refused(f"picture cannot be read ({error.strerror})") from None
    except UserError as error:
        raise Refused(str(error).replace(f"{name}: ", "", 1)) from None
    return RequestImage(name, encoded)


def place(folder: Path, name: str) -> Path:
    """Where a picture of that name lies. Names in the original scripts' output have the folder before them.

    Raises:
        UserError: it leaves the folder.
    """
    root = folder.resolve()
    try:
        for path in ((root / name).resolve(), Path(name).resolve()):
            if path.is_relative_to(root) and path.exists():
                return path
        path = (root / name).resolve()
        os.fsencode(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{name!r} is no file name ({type(error).__name__})") from None
    if not path.is_relative_to(root):
        raise UserError(f"{name}: leaves the picture folder {folder}")
    return path


def local(folder: Path, name: str) -> str:
    """A name of another machine's by the longest end of it that is a file in the folder; unchanged where there is none."""
    parts = PurePath(name.replace("\\", "/")).parts
    for start in range(len(parts)):
        end = PurePath(*parts[start:])
        with contextlib.suppress(ValueError, OSError):
            if ".." not in end.parts and not end.is_absolute() and (folder / end).is_file():
                return end.as_posix()
    return name


def listed(folder: Path, names: Path | None = None) -> list[str]:
    """Names of the pictures, relative to the folder: the list's, in its order, or all that lie there, sorted.

    Args:
        names: a JSON list of names, as the original scripts' `image_list.json`.

    Raises:
        UserError: there is no folder, no picture, or the list is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    if names is not None:
        found = read_rows(names, min_rows=0)
        if not all(isinstance(name, str) and name for name in found):
            raise UserError(f"{names}: expected a JSON list of picture names")
    else:
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        found = sorted(path.relative_to(folder).as_posix() for path in paths)
    if not found:
        raise UserError(f"{names or folder}: no pictures")
    for name in found:
        place(folder, name)
    return list(dict.fromkeys(found))
