"""COCO 2014's annotations, as captions are checked against them: classes with a segment, and five captions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.row_files import read_items
from reverie_jax.errors import DataError
from reverie_jax.eval.benchmarks import chair_words
from reverie_jax.eval.benchmarks.interface import BenchmarkError, require

SPLITS = ("val", "train", "all")
"""Of COCO's files; "all" is what CHAIR's own script makes of the others."""


def list_items(path: Path, *keys: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, item) for the items of some lists of a COCO file, one list after the other, `annotations` last.

    Raises:
        BenchmarkError: The file cannot be read, or has no annotations.
    """
    try:
        for key in keys:
            yield from ((key, item) for item in read_items(path, key))
        annotated = False
        for item in read_items(path, "annotations"):
            annotated = True
            yield "annotations", item
    except DataError as error:
        raise BenchmarkError(str(error)) from None
    require(annotated, f"{path}: not a file of COCO annotations (the list 'annotations' is missing or empty)")


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
    require(bool(splits), f"{data}: no instances_val2014.json there; {needs}")
    for split in splits:
        if wanted <= coco.segments.keys():
            break
        captions = place / f"captions_{split}2014.json"
        require(captions.is_file(), f"{captions}: no such file; {needs}")
        _read_split(place / f"instances_{split}2014.json", captions, wanted, coco)
    missing = [id for id in ids if id not in coco.segments]
    require(
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
        for key, item in list_items(instances, "categories", "images"):
            if key == "categories":
                names[item["id"]] = classes[item["name"]]
            elif key == "images":
                if item["id"] not in wanted:
                    continue
                coco.names[item["id"]] = item.get("file_name", "")
                found.setdefault(item["id"], set())
            elif item["image_id"] in wanted:
                found.setdefault(item["image_id"], set()).add(item["category_id"])
        require(bool(names), f"{instances}: no categories there, so it is no file of COCO's instances")
        path = captions
        for _, item in list_items(captions):
            if item["image_id"] in wanted:
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
