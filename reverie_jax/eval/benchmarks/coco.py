"""COCO 2014's annotations, as captions are checked against them: classes with a segment, and five captions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.row_files import JsonStream
from reverie_jax.eval.benchmarks import chair_words
from reverie_jax.eval.benchmarks.interface import BenchmarkError, need

SPLITS = ("val", "train", "all")
"""Of COCO's files; "all" is what CHAIR's own script makes of the others."""


class _Members(JsonStream):
    """A JSON object of lists, item by item: COCO's files are of hundreds of megabytes."""

    def members(self) -> Iterator[tuple[str, Any]]:
        """The lists' items, each with its list's key; members that are no lists are passed over.

        Raises:
            ValueError: there is no list of annotations.
        """
        self._take("{")
        lists = set[str]()
        while True:
            if self._next() != '"':
                self._take('"')
            key = self._value()
            self._take(":")
            if self._next() != "[":
                self._value()
            else:
                lists.add(key)
                self._take("[")
                if self._next() == "]":
                    self._take("]")
                else:
                    while True:
                        yield key, self._value()
                        if self._take(",]") == "]":
                            break
            if self._take(",}") == "}":
                break
        if "annotations" not in lists:
            raise ValueError("no list of annotations in it")


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of every list of a COCO file, with the list's key.

    Raises:
        BenchmarkError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _Members(file).members()
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: no file of COCO's annotations ({' '.join(str(error).split())[:200]})") from None


@dataclasses.dataclass
class Coco:
    """What COCO says of some pictures, by their ids.

    Attributes:
        names: of the pictures' files.
        segments: classes with a segment.
        captions: the reference captions.
    """

    names: dict[int, str] = dataclasses.field(default_factory=dict)
    segments: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    captions: dict[int, list[str]] = dataclasses.field(default_factory=dict)


def folder(data: Path) -> Path:
    """Where COCO's annotations lie: the folder, or `annotations` in it."""
    return next((place for place in (data, data / "annotations") if any(place.glob("instances_*2014.json"))), data)


def read_coco(data: Path, ids: Sequence[int], needs: str) -> Coco:
    """What COCO's files in a folder say of pictures, one split after the other until all are found.

    Raises:
        BenchmarkError: a file is missing or broken, or a picture is in none.
    """
    place, coco, wanted = folder(data), Coco(), set(ids)
    splits = [split for split in SPLITS if (place / f"instances_{split}2014.json").is_file()]
    need(bool(splits), f"{data}: no instances_val2014.json there; {needs}")
    for split in splits:
        if wanted <= coco.segments.keys():
            break
        captions = place / f"captions_{split}2014.json"
        need(captions.is_file(), f"{captions}: no such file; {needs}")
        _read_split(place / f"instances_{split}2014.json", captions, wanted, coco)
    missing = [id for id in ids if id not in coco.segments]
    need(
        not missing,
        f"{place}: {len(missing)} of {len(wanted)} pictures are not in {', '.join(f'{split}2014' for split in splits)}, "
        f"the first is {missing[0] if missing else ''}; {needs}",
    )
    return coco


def _read_split(instances: Path, captions: Path, wanted: set[int], coco: Coco) -> None:
    """Adds what a split's two files say of the wanted pictures."""
    classes, names = chair_words.chair().classes, dict[int, str]()
    found: dict[int, set[int]] = {}
    path = instances
    try:
        for key, item in members(instances):
            if key == "categories":
                names[item["id"]] = classes[item["name"]]
            elif key == "images" and item["id"] in wanted:
                coco.names[item["id"]] = item.get("file_name", "")
                found.setdefault(item["id"], set())
            elif key == "annotations" and item["image_id"] in wanted:
                found.setdefault(item["image_id"], set()).add(item["category_id"])
        need(bool(names), f"{instances}: no categories there, so it is no file of COCO's instances")
        path = captions
        for key, item in members(captions):
            if key == "annotations" and item["image_id"] in wanted:
                found.setdefault(item["image_id"], set())
                if not isinstance(item["caption"], str):
                    raise TypeError(f"a caption of picture {item['image_id']} is {item['caption']!r}")
                coco.captions.setdefault(item["image_id"], []).append(item["caption"])
        path = instances
        for id, numbers in found.items():
            coco.segments.setdefault(id, set()).update(names[number] for number in numbers)
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path}: no file of COCO's annotations ({error!r})") from None


def number(row: Any) -> int:
    """COCO's id of a picture: a number, the name of its file, or a row that has one of them.

    Raises:
        ValueError: none is in it.
    """
    if isinstance(row, Mapping):
        row = row["image_id"] if row.get("image_id") is not None else row["image"]
    digits = re.search(r"(\d+)(?:\.\w+)?\s*$", str(row))
    if digits is None:
        raise ValueError(f"no COCO id in {row!r}")
    return int(digits[1])
