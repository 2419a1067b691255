"""Files of rows: read one row at a time with one line for whatever is wrong, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from reverie_jax.errors import DataError


class Rows:
    """A file's rows, read anew at each pass and never all at once.

    A JSON list, a JSON object of rows by id (each row gets its id as `pid`), JSON lines in a file that ends in `.jsonl`, or
    Parquet in one that ends in `.parquet`.

    Args:
        least: rows that must be there.
    """

    def __init__(self, path: Path, *, least: int = 1):
        self.path, self.least = path, least

    def __iter__(self) -> Iterator[Any]:
        """Raises DataError: the file cannot be read, is something else, or is too short."""
        count = 0
        try:
            for row in self._rows():
                yield row
                count += 1
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        except (ijson.JSONError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not valid JSON ({' '.join(str(error).split())})") from None
        if count < self.least:
            raise DataError(f"{self.path}: expected a list of rows{', and at least one' if self.least else ''}")

    def _rows(self) -> Iterator[Any]:
        match self.path.suffix:
            case ".parquet":
                yield from self._parquet()
            case ".jsonl":
                with self.path.open(encoding="utf-8") as lines:
                    yield from (json.loads(line) for line in lines if line.strip())
            case _:
                with self.path.open("rb") as file:
                    first = file.read(64).lstrip()[:1]
                    file.seek(0)
                    if first == b"{":
                        found = False
                        for key, row in ijson.kvitems(file, "", use_float=True):
                            if not isinstance(row, dict):
                                break
                            yield {"pid": key, **row}
                            found = True
                        if not found:
                            raise DataError(f"{self.path}: expected a list of rows")
                    else:
                        yield from ijson.items(file, "item", use_float=True)

    def _parquet(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=16):
                    yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path}: not valid Parquet ({' '.join(str(error).split())})") from None


def read_list(path: Path, *, least: int = 1) -> list[Any]:
    """All rows of a file at once; see `Rows`.

    Raises:
        DataError: the file cannot be read, is something else, or is too short.
    """
    return list(Rows(path, least=least))


def write_list(path: Path, rows: list[Any]) -> None:
    """The file is the old one or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=4)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
