"""COCO 2014's annotations, which captions are checked against: classes with a segment, and five captions per image."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.row_files import read_items
from reverie_jax.errors import DataError
from reverie_jax.eval.benchmarks import chair_words, inputs
from reverie_jax.eval.benchmarks.interface import BenchmarkError, require

SPLITS = ("val", "train", "all")
"""Splits of COCO's files; CHAIR's own script makes "all" of the others."""


@dataclasses.dataclass
class Coco:
    """Annotations by image id.

    Attributes:
        names: names of the image files.
        segments: classes with a segment.
        captions: the reference captions.
    """

    names: dict[int, str] = dataclasses.field(default_factory=dict)
    segments: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    captions: dict[int, list[str]] = dataclasses.field(default_factory=dict)


def items(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield the items of a list of a COCO file, one by one: the files have hundreds of megabytes.

    Raises:
        BenchmarkError: The file cannot be read, or the list is missing or empty.
    """
    empty = True
    try:
        for item in read_items(path, key):
            empty = False
            yield item
    except DataError as error:
        raise BenchmarkError(str(error)) from None
    require(not empty, f"{path}: no {key}, so it is not a file of COCO's annotations")


def annotation_folder(data: Path) -> Path:
    """Return the folder with COCO's annotations: the folder itself, or `annotations` in it."""
    return next((place for place in (data, data / "annotations") if any(place.glob("instances_*2014.json"))), data)


def read_coco(data: Path, ids: Sequence[int], needs: str) -> Coco:
    """Read the annotations of images, one split after the other until all images are found.

    Args:
        data: the folder of COCO's files, or its parent.
        ids: of the images.
        needs: completes the message of an error.

    Raises:
        BenchmarkError: A file is missing or invalid, or an image is in no file.
    """
    folder, coco, wanted = annotation_folder(data), Coco(), set(ids)
    splits = [split for split in SPLITS if (folder / f"instances_{split}2014.json").is_file()]
    require(bool(splits), f"{data}: instances_val2014.json is missing; {needs}")
    for split in splits:
        if wanted <= coco.segments.keys():
            break
        captions = folder / f"captions_{split}2014.json"
        require(captions.is_file(), f"{captions}: no such file; {needs}")
        _read_instances(folder / f"instances_{split}2014.json", wanted, coco)
        _read_captions(captions, wanted, coco)
    missing = [id for id in ids if id not in coco.segments]
    require(
        not missing,
        f"{folder}: {len(missing)} of {len(wanted)} images are not in {', '.join(f'{split}2014' for split in splits)}, "
        f"the first is {missing[0] if missing else ''}; {needs}",
    )
    return coco


def _read_instances(path: Path, wanted: set[int], coco: Coco) -> None:
    """Add classes and file names of a split's images."""
    classes = chair_words.chair().classes
    try:
        names = {item["id"]: classes[item["name"]] for item in items(path, "categories")}
        for item in items(path, "images"):
            if item["id"] in wanted:
                coco.names[item["id"]] = item.get("file_name", "")
                coco.segments.setdefault(item["id"], set())
        for item in items(path, "annotations"):
            if item["image_id"] in wanted:
                coco.segments.setdefault(item["image_id"], set()).add(names[item["category_id"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path}: not a file of COCO's annotations ({error!r})") from None


def _read_captions(path: Path, wanted: set[int], coco: Coco) -> None:
    """Add the reference captions of a split's images."""
    try:
        for item in items(path, "annotations"):
            if item["image_id"] in wanted:
                if not isinstance(item["caption"], str):
                    raise TypeError(f"a caption of image {item['image_id']} is {item['caption']!r}")
                coco.segments.setdefault(item["image_id"], set())
                coco.captions.setdefault(item["image_id"], []).append(item["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path}: not a file of COCO's annotations ({error!r})") from None


def classes_of(
    image: int, tables: Mapping[str, Any], words: chair_words.Vocabulary, lemma: Callable[[str], str] | None = None
) -> set[str]:
    """Return the classes in an image: those with a segment, and those that a reference caption mentions.

    Args:
        image: its id.
        tables: `segments` and `captions` of `Coco`.
        words: the vocabulary.
        lemma: see `chair_words.Vocabulary.mentions`.
    """
    captions = tables["captions"].get(image, ())
    return tables["segments"][image] | {name for text in captions for _, name in words.mentions(text, lemma)}


def image_number(row: Any) -> int:
    """Return COCO's id of an image from a number, the name of its file, or a row that has one of them.

    Raises:
        ValueError: It has no number.
    """
    if isinstance(row, Mapping):
        row = row["image_id"] if row.get("image_id") is not None else row["image"]
    digits = re.search(r"(\d+)(?:\.\w+)?\s*$", str(row))
    if digits is None:
        raise ValueError(f"no COCO id in {row!r}")
    return int(digits[1])


def match_image(image: Any, by_image: Mapping[int, str]) -> str:
    """Return the question about an image, or the image itself if there is none."""
    try:
        return str(by_image.get(image_number(image), image))
    except ValueError:
        return str(image)


def file_name(image: int) -> str:
    """Return the name of an image of val2014."""
    return f"COCO_val2014_{image:012d}.jpg"


def image_reader(folder: Path) -> Callable[[str], bytes]:
    """Return a reader of images in a folder or COCO's folders in it; see `inputs.image_reader`."""
    return inputs.image_reader(folder, *(folder / name for name in ("val2014", "train2014", "images")))
