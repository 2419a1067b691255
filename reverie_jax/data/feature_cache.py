"""A frozen tower's features of every picture, kept on disk: read instead of pictures, epoch after epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from reverie_jax.errors import DataError
from reverie_jax.files import atomic_path, write_json

_FILE, _ABOUT = "features.array_record", "features.json"
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class FeatureCache(Sequence[np.ndarray]):
    """Features by record number, each [P, W]; of a record without a picture an empty [0, W].

    Args:
        folder: that `write` wrote.
        key: what they must be of.

    Raises:
        DataError: there are none, or of something else.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        try:
            about = json.loads((folder / _ABOUT).read_text("utf-8"))
            self.shape, self.dtype = tuple(map(int, about["shape"])), _DTYPES[about["dtype"]]
            found, self._length = about["key"], int(about["records"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder}: no vision features here ({error!r})") from None
        if found != key:
            raise DataError(f"{folder}: features of another tower, size or data; choose another folder")
        self._source = grain.sources.ArrayRecordDataSource([os.fspath(folder / _FILE)])
        if len(self._source) != self._length:
            raise DataError(f"{folder}: {len(self._source)} features of {self._length} records; delete the folder")

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return np.frombuffer(self._source[index], self.dtype).reshape(-1, self.shape[1])

    def __repr__(self) -> str:
        return f"FeatureCache({self._length} records)"


def exists(folder: Path) -> bool:
    """Whether a whole cache is there: its description is written last."""
    return (folder / _ABOUT).exists()


def write(folder: Path, key: str, shape: tuple[int, int], features: Iterable[np.ndarray]) -> None:
    """Keeps features, in the order of the records.

    Args:
        key: of tower, picture size and data.
        shape: (P, W) of a picture's.
    """
    count, dtype = 0, None
    with atomic_path(folder / _FILE) as part:
        writer = ArrayRecordWriter(os.fspath(part), "group_size:1")
        for one in features:
            writer.write(np.ascontiguousarray(one).tobytes())
            count, dtype = count + 1, one.dtype.name
        writer.close()
    write_json(folder / _ABOUT, {"key": key, "shape": list(shape), "dtype": dtype, "records": count})
