"""Vision features of every image on disk: a frozen tower's output, read instead of images in every epoch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from reverie_jax.errors import DataError
from reverie_jax.files import atomic_path, read_json, write_json

_FEATURES, _METADATA = "features.array_record", "features.json"
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class FeatureCache(Sequence[np.ndarray]):
    """Features by record number, each [P, W]; [0, W] for a record without an image.

    Args:
        folder: The folder that `write_features` wrote.
        key: What the features must have been computed from (see `write_features`).

    Raises:
        DataError: The folder has no complete features, or those of another key.
    """

    def __init__(self, folder: Path, key: str):
        metadata = read_json(folder / _METADATA, DataError)
        try:
            self.shape, self.dtype = tuple(map(int, metadata["shape"])), _DTYPES[metadata["dtype"]]
            stored_key, self._length = metadata["key"], int(metadata["records"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _METADATA}: not metadata of vision features ({error!r})") from None
        if stored_key != key:
            raise DataError(f"{folder}: features of another vision tower, image size or dataset; choose another folder")
        self._source = grain.sources.ArrayRecordDataSource([os.fspath(folder / _FEATURES)])
        if len(self._source) != self._length:
            raise DataError(f"{folder}: {len(self._source)} features for {self._length} records; delete the folder")

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return np.frombuffer(self._source[index % len(self)], self.dtype).reshape(-1, self.shape[1])

    def __repr__(self) -> str:
        return f"FeatureCache({self._length} records)"


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a complete cache: its metadata are written last."""
    return (folder / _METADATA).exists()


def write_features(folder: Path, key: str, shape: tuple[int, int], features: Iterable[np.ndarray]) -> None:
    """Write features, in the order of the records.

    Args:
        folder: The folder.
        key: Identifies vision tower, image size and dataset.
        shape: (P, W), tokens and width, of an image's features.
        features: [P, W] of each record; [0, W] for a record without an image.

    Raises:
        ValueError: The features of an image have another shape.
    """
    count, dtype = 0, None
    with atomic_path(folder / _FEATURES) as part:
        writer = ArrayRecordWriter(os.fspath(part), "group_size:1")
        for array in features:
            if len(array) and array.shape != shape:
                raise ValueError(f"features of an image are {array.shape}, not {shape}")
            writer.write(np.ascontiguousarray(array).tobytes())
            count, dtype = count + 1, array.dtype.name
        writer.close()
    write_json(folder / _METADATA, {"key": key, "shape": list(shape), "dtype": dtype, "records": count})
