"""Evaluation pictures inside training data: by name, and by how they look."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
from jaxtyping import UInt64

from reverie_jax.data.files import Rows
from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
_COCO = re.compile(r"(?:^|_)(\d{12})$")


@dataclasses.dataclass(frozen=True)
class Leak:
    """A picture of the training data that is one of the evaluation's.

    Attributes:
        how: `name`: the same file name, or COCO number; `look`: the perceptual hashes are near; `name and look`.
        distance: bits in which the hashes differ; None where one of the pictures was not at hand.
    """

    training: str
    evaluation: str
    how: str
    distance: int | None


@dataclasses.dataclass
class Evaluation:
    """Evaluation pictures by name, with their hashes where they are at hand.

    Attributes:
        unreadable: files that are no pictures, and why.
    """

    hashes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    unreadable: list[str] = dataclasses.field(default_factory=list)


def known_as(name: str) -> str:
    """What identifies a picture in its name: COCO's number, whatever the release puts before it; else the name's stem."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0].lower()
    return found[1] if (found := _COCO.search(stem)) else stem


def perceptual_hash(encoded: bytes, name: str) -> int:
    """64 bits that stay nearly the same when a picture is scaled or compressed (DCT of its 32 x 32 greys).

    Raises:
        BrokenImage: the bytes are no picture.
    """
    bits = imagehash.phash(decode(encoded, name)).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def evaluation(places: Sequence[Path], threads: int) -> Evaluation:
    """The pictures of folders, and those that question files name.

    Raises:
        DataError: a place is neither, or holds no picture.
    """
    found = Evaluation()
    for place in places:
        before = len(found.hashes)
        if place.is_dir():
            files = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES]
            with ThreadPoolExecutor(threads) as pool:
                for path, value in zip(files, pool.map(_hash_of, files), strict=True):
                    if isinstance(value, str):
                        found.unreadable.append(value)
                    else:
                        found.hashes[str(path)] = value
        else:
            for row in _lines(place):
                name = row.get("image", row.get("image_id")) if isinstance(row, dict) else row
                if isinstance(name, str | int) and str(name):
                    found.hashes.setdefault(str(name), None)
        if len(found.hashes) == before:
            raise DataError(f"{place}: holds or names no picture")
    return found


def _lines(path: Path) -> Iterable[object]:
    """A question file's rows: POPE's are JSON lines in a file that ends in .json."""
    try:
        return list(Rows(path))
    except DataError:
        if path.suffix != ".json" or not path.is_file():
            raise
        try:
            return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        except ValueError:
            raise DataError(f"{path}: neither a JSON list nor JSON lines") from None


def _hash_of(path: Path) -> int | str:
    try:
        return perceptual_hash(path.read_bytes(), str(path))
    except (BrokenImage, OSError) as error:
        return str(error)


def find(pictures: Iterable[tuple[str, bytes]], against: Evaluation, *, distance: int, threads: int) -> Iterator[Leak]:
    """The training pictures that are evaluation pictures.

    One name for two pictures that do not look alike is no leak, where both are at hand.

    Args:
        pictures: (name, encoded) of the training data; without bytes, names alone are compared.
        distance: bits in which two hashes may differ.
    """
    seen = {name: value for name, value in against.hashes.items() if value is not None}
    names, hashes = list(seen), np.asarray(list(seen.values()), np.uint64)
    by_name: dict[str, list[str]] = {}
    for name in against.hashes:
        by_name.setdefault(known_as(name), []).append(name)

    def compare(one: tuple[str, bytes]) -> list[Leak]:
        name, encoded = one
        own = perceptual_hash(encoded, name) if encoded else None
        near: Mapping[str, int] = {}
        if own is not None and len(hashes):
            bits = distances(own, hashes)
            near = {names[place]: int(bits[place]) for place in np.flatnonzero(bits <= distance)}
        found = [Leak(name, other, "look", bits) for other, bits in near.items()]
        for other in by_name.get(known_as(name), []):
            if other in near:
                found = [dataclasses.replace(f, how="name and look") if f.evaluation == other else f for f in found]
            elif own is None or against.hashes[other] is None:
                found.append(Leak(name, other, "name", None))
        return found

    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for one in pictures:
            waiting.append(pool.submit(compare, one))
            if len(waiting) >= 8 * threads:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def distances(one: int, hashes: UInt64[np.ndarray, "n"]) -> np.ndarray:
    """Bits in which each hash differs from one."""
    return np.bitwise_count(hashes ^ np.uint64(one))
