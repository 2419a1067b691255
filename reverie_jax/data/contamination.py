"""Evaluation pictures inside training data: by name, and by how they look."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
from jaxtyping import Int16, UInt64
from PIL import Image

from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError

COLOURS, PLAIN = 24, 12
"""Mean difference of the colours (of 255) of two plain pictures that look alike, and spread of what is plain."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
_COCO = re.compile(r"(?:^|_)(\d{12})$")


@dataclasses.dataclass(frozen=True)
class Match:
    """A picture of the training data that is one of the evaluation's.

    Attributes:
        how: `name`: the same file name, or COCO number; `look`: the perceptual hashes are near; `name and look`.
        distance: bits in which the hashes differ; None where one of the pictures was not at hand.
    """

    training: str
    evaluation: str
    how: str
    distance: int | None


@dataclasses.dataclass(frozen=True)
class ImageHash:
    """How a picture looks.

    Attributes:
        bits: 64 that stay nearly the same when it is scaled or compressed (DCT of its 32 x 32 greys).
        colours: of its 8 x 8 parts. Plain pictures have bits by chance, and colours that differ.
    """

    bits: int
    colours: Int16[np.ndarray, "8 8 3"]


@dataclasses.dataclass
class Evaluation:
    """Evaluation pictures by name, with their looks where they are at hand.

    Attributes:
        unreadable: files that are no pictures, and why.
    """

    looks: dict[str, ImageHash | None] = dataclasses.field(default_factory=dict)
    unreadable: list[str] = dataclasses.field(default_factory=list)


def canonical_name(name: str) -> str:
    """What identifies a picture in its name: COCO's number, whatever the release puts before it; else the name's stem."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0].lower()
    return found[1] if (found := _COCO.search(stem)) else stem


def image_hash(encoded: bytes, name: str) -> ImageHash:
    """How a picture looks.

    Raises:
        BrokenImage: the bytes are no picture.
    """
    image = decode(encoded, name)
    bits = imagehash.phash(image).hash.flatten()
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.int16)
    return ImageHash(int.from_bytes(np.packbits(bits).tobytes(), "big"), colours)


def evaluation(places: Sequence[Path], threads: int) -> Evaluation:
    """The pictures of folders, and those that question files name.

    Raises:
        DataError: a place is neither, or holds no picture.
    """
    found = Evaluation()
    for place in places:
        count = 0
        if place.is_dir():
            files = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES]
            with ThreadPoolExecutor(threads) as pool:
                for path, value in zip(files, pool.map(_look_of, files), strict=True):
                    if isinstance(value, str):
                        found.unreadable.append(value)
                    else:
                        found.looks[str(path)] = value
                        count += 1
        else:
            for row in Rows(place):
                name = row.get("image", row.get("image_id")) if isinstance(row, dict) else row
                if isinstance(name, int) and not isinstance(name, bool):
                    name = f"{name:012d}"  # COCO's number
                if isinstance(name, str) and name:
                    found.looks.setdefault(name, None)
                    count += 1
        if not count:
            raise DataError(f"{place}: holds or names no picture")
    return found


def _look_of(path: Path) -> ImageHash | str:
    try:
        return image_hash(path.read_bytes(), str(path))
    except (BrokenImage, OSError) as error:
        return str(error)


def find(pictures: Iterable[tuple[str, bytes]], against: Evaluation, *, distance: int, threads: int) -> Iterator[Match]:
    """The training pictures that are evaluation pictures.

    One name for two pictures that do not look alike is no leak, where both are at hand.

    Args:
        pictures: (name, encoded) of the training data; without bytes, names alone are compared.
        distance: bits in which two looks may differ.
    """
    seen = {name: value for name, value in against.looks.items() if value is not None}
    names, hashes = list(seen), np.asarray([value.bits for value in seen.values()], np.uint64)
    by_name: dict[str, list[str]] = {}
    for name in against.looks:
        by_name.setdefault(canonical_name(name), []).append(name)

    def compare(one: tuple[str, bytes]) -> list[Match]:
        name, encoded = one
        own = image_hash(encoded, name) if encoded else None
        near: dict[str, int] = {}
        if own is not None and len(hashes):
            bits = distances(own.bits, hashes)
            for place in np.flatnonzero(bits <= distance):
                other = seen[names[place]]
                plain = min(_spread(own), _spread(other)) < PLAIN
                if not plain or np.abs(own.colours - other.colours).mean() <= COLOURS:
                    near[names[place]] = int(bits[place])
        same = by_name.get(canonical_name(name), [])
        found = [Match(name, other, "name and look" if other in same else "look", bits) for other, bits in near.items()]
        # Where a picture of that name is at hand, what it looks like decides.
        if own is None or not any(other in seen for other in same):
            found += [Match(name, other, "name", None) for other in same if other not in near]
        return found

    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for one in pictures:
            waiting.append(pool.submit(compare, one))
            if len(waiting) >= 8 * threads:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def _spread(one: ImageHash) -> float:
    """How much the colours differ from place to place."""
    return float(one.colours.std((0, 1)).mean())


def distances(one: int, hashes: UInt64[np.ndarray, "n"]) -> np.ndarray:
    """Bits in which each hash differs from one."""
    return np.bitwise_count(hashes ^ np.uint64(one))
