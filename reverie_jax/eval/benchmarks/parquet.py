"""Parquet files of the hub's datasets, read as they are: rows without images, and images one by one."""

from __future__ import annotations

import bisect
import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reverie_jax import files
from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import BenchmarkError, require

T = TypeVar("T")

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\b")


class Table:
    """Rows of Parquet files of the hub, without their images, which are read one by one.

    Args:
        paths: Of the files.
        image: Name of the column of images: a struct with `bytes`, or a list of such.
    """

    def __init__(self, paths: Sequence[Path], image: str = "image"):
        self.paths, self._image = list(paths), image
        self._last: tuple[int, Any] = -1, None

    def parse(self, what: str, parse: Callable[[int, Any], T]) -> list[T]:
        """Return what `parse` returns for each row and its number, from 0.

        Raises:
            BenchmarkError: As `inputs.parse_rows`.
        """
        results: list[T] = []
        for path in self.paths:
            first = len(results)
            with _reading(path) as file:
                columns = [name for name in file.schema_arrow.names if name != self._image]
                for batch in file.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        number, where = len(results), f"{path}: row {len(results) - first}"
                        call = functools.partial(parse, number)
                        results.append(inputs.parse_row(call, files.well_formed(row), what, where))
        require(bool(results), f"{self.paths[0]}: no rows")
        return results

    def have_images(self) -> list[bool]:
        """Return whether each row has an image; reads all of them."""
        present: list[bool] = []
        for number in range(len(self._groups)):
            present += self._images(number).is_valid().to_pylist()
        return present

    def reader(self, numbers: Mapping[str, int]) -> Callable[[str], bytes]:
        """Return a function that reads an image by its name.

        Args:
            numbers: The row that has the image, by name.

        Raises (when called):
            BenchmarkError: There is no image of this name, or its row has none.
        """

        def read_image(name: str) -> bytes:
            require(name in numbers, f"image {name}: not in {self.paths[0].parent}")
            number = numbers[name]
            group = bisect.bisect_right(self._groups, number, key=lambda place: place[0]) - 1
            start, path, _ = self._groups[group]
            value = self._images(group)[number - start].as_py()
            value = value[0] if isinstance(value, list) and value else value
            data = value.get("bytes") if isinstance(value, dict) else None
            if not isinstance(data, bytes):
                raise BenchmarkError(f"{path}: image {name}: its row {number} has no bytes of an image")
            return data

        return read_image

    @functools.cached_property
    def _groups(self) -> list[tuple[int, Path, int]]:
        """(number of the first row, file, number in the file) of each row group."""
        groups, start = [], 0
        for path in self.paths:
            with _reading(path) as file:
                for index in range(file.num_row_groups):
                    groups.append((start, path, index))
                    start += file.metadata.row_group(index).num_rows
        return groups

    def _images(self, group: int) -> Any:
        """Return the images of a row group; questions about one image mostly follow each other."""
        number, column = self._last
        if number != group:
            _, path, index = self._groups[group]
            with _reading(path) as file:
                require(self._image in file.schema_arrow.names, f"{path}: column {self._image} is missing")
                column = file.read_row_group(index, columns=[self._image]).column(0)
            self._last = group, column
        return column


@contextlib.contextmanager
def _reading(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        BenchmarkError: It cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise BenchmarkError(f"{path}: not valid Parquet ({' '.join(str(error).split())[:200]})") from None


def find_table(data: Path, *patterns: str, image: str = "image") -> Table | None:
    """Return the rows of a hub dataset's Parquet files in a folder; None if it has none of them.

    Args:
        data: A folder as the hub has it, or with the files alone; or the file itself.
        patterns: Of the files, as `HubDataset.files`.
        image: Name of the column of images.

    Raises:
        BenchmarkError: Some of several files are missing.
    """
    if data.is_file():
        return Table([data], image) if data.suffix == ".parquet" else None
    matches = [sorted(data.glob(pattern)) or sorted(data.glob(Path(pattern).name)) for pattern in patterns]
    if not any(matches):
        return None
    paths = [path for match in matches for path in match]
    absent = [pattern for pattern, match in zip(patterns, matches, strict=True) if not match]
    require(not absent, f"{data}: {', '.join(absent)} is missing; fetch it again")
    found: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if shard := _SHARD.match(path.name):
            found.setdefault((shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (name, count), numbers in found.items():
        missing = sorted(set(range(count)) - numbers)
        require(not missing, f"{data}: file {missing[:1]} of the {count} files {name}-* is missing; fetch it again")
    return Table(paths, image)
