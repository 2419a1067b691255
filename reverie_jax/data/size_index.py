"""The index of sizes (`TreeSizes`) beside the records: training reads it, and tokenizes nothing before the first step.

An index is known by its content: a digest of all that the sizes depend on (tokenizer, template, supervision, sequence) names
it, in a folder that a fingerprint of the records' files names. An index of other records is therefore never found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.records import RecordSource
from reverie_jax.data.tree_sizes import DatasetStats, TreeSizes
from reverie_jax.errors import DataError
from reverie_jax.files import atomic_path, atomic_write, read_json, write_json

_FOLDER, _DIGEST = "index", "digest"
_FORMAT = 1


def records_digest(records: Sequence[ImageRecord]) -> str:
    """Return a digest of the records' ids, images and conversations, in their order; no record is read if it is stored."""
    if isinstance(records, RecordSource):
        path = _folder(records) / _DIGEST
        if path.exists() and re.fullmatch(r"[0-9a-f]{16}", known := path.read_text("utf-8", "replace").strip()):
            return known
    digest = hashlib.sha256()
    for number in range(len(records)):
        record = records[number]
        for part in (record.id.encode("utf-8", "surrogatepass"), record.image, record.conversations_json().encode()):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def index_path(source: RecordSource, training: int, builder: TreeBuilder) -> Path:
    """Return where the index of some records' sizes is, or would be.

    Args:
        source: all records.
        training: number of the first ones, which are trained on.
        builder: builds their trees.
    """
    encoder, supervision = builder.processor.encoder, builder.supervision
    if isinstance(supervision, DPOConfig):  # the rest of it weights tokens, and changes no size
        supervision = DPOConfig(gamma=supervision.gamma)
    parts = (
        *(_FORMAT, training, _tokenizer_content(encoder.tokenizer), encoder.template, encoder.patches),
        *(encoder.image_token_id, encoder.tokenization, encoder.further_stop_ids, builder.processor.context),
        *(builder.shape, supervision, builder.prefix_sharing),
    )
    key = hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16]
    return _folder(source) / f"{key}.json"


def _folder(source: RecordSource) -> Path:
    """Return the folder of all indices of these records. It is within their own, so new records have none."""
    return source.folder / _FOLDER / source.fingerprint


def _tokenizer_content(tokenizer: Any) -> tuple[str, ...]:
    """Return all that decides a tokenizer's ids, wherever its files are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "legacy", "add_bos_token", "add_eos_token")
    return (
        type(tokenizer).__name__,
        backend.to_str() if backend else "",
        *(str(getattr(tokenizer, name, None)) for name in names),
    )


def write_index(source: RecordSource, sizes: TreeSizes, builder: TreeBuilder) -> Path:
    """Write sizes beside the records that they are of; return the file.

    Raises:
        DataError: it cannot be written.
    """
    path = index_path(source, sizes.stats.records, builder)
    atomic_write(path.parent / _DIGEST, records_digest(source) + "\n", DataError)
    with atomic_path(path.with_suffix(".npy"), DataError) as part, part.open("wb") as file:
        np.save(file, sizes.trees)
    content = {"stats": dataclasses.asdict(sizes.stats), "warning": sizes.warning}
    write_json(path, content | {"checksum": zlib.crc32(sizes.trees.data)}, DataError)  # last: it says that all is there
    return path


def read_index(source: RecordSource, training: int, builder: TreeBuilder) -> TreeSizes | None:
    """Return the sizes that `write_index` wrote for these records and settings, None if there are none.

    Raises:
        DataError: the index is damaged.
    """
    path = index_path(source, training, builder)
    if not path.exists():
        return None
    content = read_json(path, DataError)
    try:
        stats = DatasetStats(**content["stats"] | {"datasets": tuple(content["stats"]["datasets"])})
        trees = np.load(path.with_suffix(".npy"), mmap_mode="r")
        if trees.dtype != np.int32 or zlib.crc32(trees.data) != content["checksum"]:
            raise ValueError(f"{path.stem}.npy is incomplete, or of another index")
        return TreeSizes(stats, trees, str(content["warning"]), path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not an index of sizes ({error}); delete it and run `reverie data index` again"
        ) from None
