"""Datasets on the Hugging Face hub: annotation files to build records from, and records as a dataset that others read."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.files import read_json, write_json
from reverie_jax.hub.repository import HubError, download, look_up

PREFIX = "hub:"
"""What the name of an annotation file on the hub begins with."""
SOURCES = "sources.json"
"""File of a records folder: what it was built from."""
_SOURCE = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")
_SHARD = re.compile(r"(.*?)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
_ROWS = (".parquet", ".jsonl", ".json")
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
_EVALUATION = re.compile(r"(?:^|[/._-])(?:test|testdev|val|valid|validation|dev|eval)(?:[/._-]|$)", re.I)
_TRAINING = re.compile(r"(?:^|[/._-])train(?:ing)?(?:[/._-]|$)", re.I)
_SHARD_BYTES = 500_000_000
"""Images in a Parquet file of records, about."""
_GROUP = 32
"""Records in a row group, which readers hold at once."""


@functools.cache
def fetch_annotations(source: str, images: bool = True) -> tuple[Path, ...]:
    """Return the annotation files that a source on the hub names, in the hub's cache, at one fixed commit.

    Without a file's name, these are the only annotation file or split of the repository, or else the only one for training.
    What is for evaluation is never read unasked.

    Args:
        source: hub:owner/name[@revision][/FILE]; FILE may be a pattern, as data/train-*.parquet, and slashes in a revision
            are written as %2F.
        images: Download the folder `images` beside the files too, if there is one.

    Raises:
        HubError: It cannot be read, or several files could be meant; they are named.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise HubError(f"{source}: write it as hub:owner/name, hub:owner/name@revision or hub:owner/name@revision/FILE")
    repository, revision, file = match[1], unquote(match[2] or ""), match[3]
    info = look_up(repository, revision or None)
    names = [sibling.rfilename for sibling in info.siblings or []]
    chosen = _choose(source, names, file)
    folders = {f"{PurePosixPath(name).parent / 'images'}/" for name in chosen} if images else ()
    beside = [name for name in names if any(name.startswith(folder) for folder in folders)]
    folder = download(source, info, [*chosen, *(set(beside) - set(chosen))], pinned=bool(revision))
    return tuple(folder / name for name in chosen)


def _choose(source: str, names: Sequence[str], file: str | None) -> list[str]:
    """Return the files of rows that a source means, in order.

    Raises:
        HubError: There are none, one of several shards is missing, or several files could be meant.
    """
    rows = sorted(
        name
        for name in names
        if name.endswith(_ROWS) and PurePosixPath(name).name not in _METADATA and not re.search(r"(^|/)\.", name)
    )
    groups: dict[str, list[str]] = {}
    for name in rows:
        stem, suffix = name.rsplit(".", 1)
        shard = _SHARD.fullmatch(stem)
        groups.setdefault(f"{shard[1]}-*.{suffix}" if shard else name, []).append(name)
    if file is not None:
        chosen = [name for name in rows if name == file] or fnmatch.filter(rows, file)
    else:
        usable = [group for group in groups if not _EVALUATION.search(group)]
        usable = [group for group in usable if _TRAINING.search(group)] if len(usable) > 1 else usable
        chosen = groups[usable[0]] if len(usable) == 1 else []
    if not chosen:
        listed = ", ".join(itertools.islice(groups, 12)) + (f" and {len(groups) - 12} more" if len(groups) > 12 else "")
        raise HubError(
            f"{source}: it has {listed or 'no annotation file (.json, .jsonl or .parquet)'}"
            + ("; name what to read, as hub:owner/name/FILE" if groups else "")
        )
    for group in groups.values():
        numbers = [shard for name in group if (shard := _SHARD.fullmatch(name.rsplit(".", 1)[0]))]
        if file is None and group == chosen and numbers and len(numbers) != int(numbers[0][3]):
            raise HubError(f"{source}: {len(numbers)} of the {int(numbers[0][3])} files {numbers[0][1]}-* are there")
    return chosen


def write_sources(folder: Path, names: Sequence[str]) -> None:
    """Write down, in a records folder, what it was built from.

    Args:
        folder: The records folder.
        names: The annotation files, without their image folders; of those that are not on the hub, only the file's name
            is kept.
    """
    found = {name: _SOURCE.fullmatch(name) for name in names}
    shown = [name if match else Path(name).name for name, match in found.items()]
    datasets = list(dict.fromkeys(match[1] for match in found.values() if match))
    write_json(folder / SOURCES, {"sources": shown, "datasets": datasets})


def read_sources(folder: Path) -> dict[str, Any]:
    """Return what `write_sources` wrote; nothing for records of other makers."""
    path = folder / SOURCES
    content = read_json(path) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def write_parquet(records: Sequence[ImageRecord], folder: Path) -> dict[str, int]:
    """Write records as the Parquet files of a dataset, a row for each image; return how many of what they hold.

    `reverie data build` reads them back, with the same images and conversations.

    Args:
        records: The records; one at a time is read.
        folder: An existing folder; the files are in its folder `data`.

    Raises:
        DataError: A record cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.string()
    turn = [("role", text), ("text", text), ("weight", pa.float64()), ("prefix", text), ("ended", pa.bool_())]
    talk = [("turns", pa.list_(pa.struct(turn))), ("images", pa.list_(pa.int64()))]
    talk += [(name, text) for name in ("dataset", "kind", "pair")]
    image = pa.struct([("bytes", pa.binary()), ("path", text)])
    columns = [("id", text), ("image", image), ("conversations", pa.list_(pa.struct(talk)))]
    # With this, the library `datasets` and the hub's viewer show images.
    features = {"info": {"features": {"image": {"_type": "Image"}, **_FEATURES}}}
    schema = pa.schema(columns, {"huggingface": json.dumps(features)})
    (folder / "data").mkdir()
    files: list[Path] = []
    counts = {"images": 0, "texts without an image": 0, "conversations": 0}
    number = 0
    while number < len(records):
        files.append(folder / "data" / f"{len(files)}.part")
        size = 0
        with pyarrow.parquet.ParquetWriter(files[-1], schema) as writer:
            while number < len(records) and size < _SHARD_BYTES:
                group = [records[index] for index in range(number, min(number + _GROUP, len(records)))]
                number += len(group)
                size += sum(len(record.image) for record in group)
                for record in group:
                    counts["images" if record.image else "texts without an image"] += 1
                    counts["conversations"] += len(record.conversations)
                writer.write_table(pa.Table.from_pylist([_row(record) for record in group], schema))
    for index, file in enumerate(files):
        file.rename(file.with_name(f"train-{index:05}-of-{len(files):05}.parquet"))
    return counts


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


_FEATURES = {
    "id": _value("string"),
    "conversations": [
        {
            "turns": [
                {name: _value("string") for name in ("role", "text", "prefix")}
                | {"weight": _value("float64"), "ended": _value("bool")}
            ],
            "images": [_value("int64")],
            **{name: _value("string") for name in ("dataset", "kind", "pair")},
        }
    ],
}
"""The columns but the image, as the library `datasets` names their types."""


def _row(record: ImageRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "image": {"bytes": record.image, "path": record.id} if record.image else None,
        "conversations": [dataclasses.asdict(conversation) for conversation in record.conversations],
    }
