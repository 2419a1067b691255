"""Find evaluation images in training data, by name and by perceptual hash."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
from jaxtyping import Int16, UInt8, UInt64
from PIL import Image

from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.row_files import Rows, as_integer
from reverie_jax.data.sources.common import first_given
from reverie_jax.errors import DataError
from reverie_jax.files import files_below

MAX_COLOR_DIFFERENCE, PLAIN = 24, 12
"""Maximum mean color difference (of 255) of similar plain images; standard deviation of colors below which one is plain."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
_COCO = re.compile(r"(?:^|_)(\d{12})$")


@dataclasses.dataclass(frozen=True)
class ImageMatch:
    """An evaluation image that occurs in the training data.

    Attributes:
        training: name of the training image.
        evaluation: name of the evaluation image.
        matched_by: `name`: same file name or COCO number; `hash`: similar perceptual hashes; or both.
        distance: number of bits in which the hashes differ; None if one of the images was not available.
    """

    training: str
    evaluation: str
    matched_by: Literal["name", "hash", "name and hash"]
    distance: int | None


@dataclasses.dataclass(frozen=True)
class ImageHash:
    """Perceptual hash of an image.

    Attributes:
        bits: 64 bits that hardly change when the image is scaled or compressed (DCT of its 32 x 32 grays).
        colors: mean colors of 8 x 8 tiles. They tell plain images apart, whose bits are noise.
    """

    bits: int
    colors: Int16[np.ndarray, "8 8 3"]


@dataclasses.dataclass
class EvaluationImages:
    """Evaluation images.

    Attributes:
        hashes: hash of each, by name; None if only the name is known.
        unreadable: messages about files that cannot be decoded.
    """

    hashes: dict[str, ImageHash | None] = dataclasses.field(default_factory=dict)
    unreadable: list[str] = dataclasses.field(default_factory=list)


def normalize_name(name: str) -> str:
    """Return COCO's image number if a name ends in one, whatever a release puts before it; else the name's stem."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0].lower()
    return match[1] if (match := _COCO.search(stem)) else stem


def hash_image(encoded: bytes, name: str) -> ImageHash:
    """Return the perceptual hash of an encoded image.

    Raises:
        BrokenImage: The image cannot be decoded.
    """
    image = decode(encoded, name)
    bits = imagehash.phash(image).hash.flatten()
    colors = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.int16)
    return ImageHash(int.from_bytes(np.packbits(bits).tobytes(), "big"), colors)


def read_evaluation_images(paths: Sequence[Path], threads: int) -> EvaluationImages:
    """Return the images in folders, and those that question files name.

    Args:
        paths: Folders, or files whose rows name an image as `image` or by its COCO number as `image_id`.
        threads: Number of threads that hash images.

    Raises:
        DataError: A path is neither, or has no images.
    """
    result = EvaluationImages()
    for path in paths:
        count = 0
        if path.is_dir():
            files = [file for file in sorted(files_below(path)) if file.suffix.lower() in SUFFIXES]
            with ThreadPoolExecutor(threads) as pool:
                for file, value in zip(files, pool.map(_hash_file, files), strict=True):
                    if isinstance(value, str):
                        result.unreadable.append(value)
                    else:
                        result.hashes[str(file)] = value
                        count += 1
        else:
            for row in Rows(path):
                name = first_given(row, "image", "image_id") if isinstance(row, dict) else row
                is_number = not isinstance(name, str) or (isinstance(row, dict) and not row.get("image"))
                if is_number and (number := as_integer(name)) is not None:
                    name = f"{number:012d}"  # COCO's number
                if isinstance(name, str) and name:
                    result.hashes.setdefault(name, None)
                    count += 1
        if not count:
            raise DataError(f"{path}: no images")
    return result


def _hash_file(path: Path) -> ImageHash | str:
    try:
        return hash_image(path.read_bytes(), str(path))
    except (BrokenImage, OSError) as error:
        return str(error)


class Matcher:
    """Compares training images with the evaluation images.

    Two images of the same name do not match if both are available and their hashes differ.

    Args:
        evaluation: The evaluation images.
        max_distance: Number of bits in which the hashes of similar images may differ.
    """

    def __init__(self, evaluation: EvaluationImages, max_distance: int):
        self._max_distance = max_distance
        self._hashes = {name: value for name, value in evaluation.hashes.items() if value is not None}
        self._names = list(self._hashes)
        self._bits = np.asarray([value.bits for value in self._hashes.values()], np.uint64)
        self._by_name: dict[str, list[str]] = {}
        for name in evaluation.hashes:
            self._by_name.setdefault(normalize_name(name), []).append(name)

    def compare(self, name: str, encoded: bytes) -> list[ImageMatch]:
        """Return the evaluation images that a training image is; without its bytes, only names are compared.

        Raises:
            BrokenImage: The image cannot be decoded.
        """
        value = hash_image(encoded, name) if encoded else None
        similar: dict[str, int] = {}
        if value is not None and len(self._bits):
            distances = hamming_distances(value.bits, self._bits)
            for index in np.flatnonzero(distances <= self._max_distance):
                if _similar_colors(value, self._hashes[self._names[index]]):
                    similar[self._names[index]] = int(distances[index])
        same = self._by_name.get(normalize_name(name), [])
        matches = [
            ImageMatch(name, other, "name and hash" if other in same else "hash", distance)
            for other, distance in similar.items()
        ]
        if value is None or not any(other in self._hashes for other in same):  # else the hashes decide
            matches += [ImageMatch(name, other, "name", None) for other in same if other not in similar]
        return matches


def find_matches(
    images: Iterable[tuple[str, bytes]], evaluation: EvaluationImages, *, max_distance: int, threads: int
) -> Iterator[ImageMatch]:
    """Yield the training images that are evaluation images; see `Matcher`.

    Args:
        images: (name, encoded) of the training images; if there are no bytes, only names are compared.
        evaluation: The evaluation images.
        max_distance: Number of bits in which the hashes of similar images may differ.
        threads: Number of threads that hash images.
    """
    matcher = Matcher(evaluation, max_distance)
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for image in images:
            waiting.append(pool.submit(matcher.compare, *image))
            if len(waiting) >= 8 * threads:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def _similar_colors(one: ImageHash, other: ImageHash) -> bool:
    """Return whether colors allow two images to be similar; those of images that are not plain always do."""
    if min(float(value.colors.std((0, 1)).mean()) for value in (one, other)) >= PLAIN:
        return True
    return bool(np.abs(one.colors - other.colors).mean() <= MAX_COLOR_DIFFERENCE)


def hamming_distances(bits: int, others: UInt64[np.ndarray, "n"]) -> UInt8[np.ndarray, "n"]:
    """Return the number of bits, [n], in which each hash differs from one."""
    distances: np.ndarray = np.bitwise_count(others ^ np.uint64(bits))
    return distances
