"""Read files of rows one at a time, with one line for whatever is wrong; write them atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ijson

from reverie_jax.errors import DataError
from reverie_jax.files import atomic_path

_BUFFER = 1 << 14
_MAX_ROW_BYTES = 1 << 28
_MAX_LINE_BYTES = 1 << 24
"""Length of a first line beyond which a file that begins with an object is not JSON lines."""
_MAX_DEPTH = 10_000
"""Brackets that may be open within one row; ijson's memory grows with the square of the depth."""


class Rows:
    """The rows of a file, read anew in each pass and never all at once.

    A file is a JSON list; a JSON object of rows by id (each row gets its id as `pid`); JSON lines, if its name ends in
    `.jsonl` or its first line is an object by itself (as in POPE's `.json` files); or Parquet, if it ends in `.parquet`.

    Args:
        path: The file.
        min_rows: Number of rows below which the file is an error.
    """

    def __init__(self, path: Path, *, min_rows: int = 1):
        self.path, self.min_rows = path, min_rows

    def __iter__(self) -> Iterator[Any]:
        """Yield each row.

        Raises:
            DataError: The file cannot be read, has another form or has too few rows.
        """
        count = 0
        try:
            for row in self._rows():
                yield row
                count += 1
        except DataError:  # which is a ValueError
            raise
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        except RecursionError:
            raise DataError(f"{self.path}: row {count}: not valid JSON (nested too deep)") from None
        except ijson.JSONError as error:
            raise DataError(f"{self.path}: row {count}: not valid JSON ({_first_line(error)})") from None
        except ValueError as error:
            raise DataError(f"{self.path}: row {count}: not valid JSON ({_one_line(error)})") from None
        if count < self.min_rows:
            raise self._not_a_list()

    def _not_a_list(self) -> DataError:
        return DataError(f"{self.path}: must be a list of rows{', at least one' if self.min_rows else ''}")

    def locate(self, number: int, row: Any) -> str:
        """Return "FILE: row ID" for messages; rows without an id are named by their number, from 0."""
        return f"{self.path}: row {row['pid'] if isinstance(row, dict) and 'pid' in row else number}"

    @property
    def is_object(self) -> bool:
        """Whether the file is a JSON object of rows by id."""
        if self.path.suffix in (".parquet", ".jsonl"):
            return False
        with self.path.open("rb") as file:
            return _detect_form(file) == "object"

    def _rows(self) -> Iterator[Any]:
        if self.path.suffix == ".parquet":
            yield from self._parquet()
            return
        with self.path.open("rb") as file:
            form = "lines" if self.path.suffix == ".jsonl" else _detect_form(file)
            file.seek(0)
            match form:
                case "lines":
                    yield from _json_lines(file)
                case "list":
                    yield from _stream(file, ijson.items, "item", _MAX_ROW_BYTES)
                case "object":
                    yield from self._rows_by_id(file)
                case _:
                    json.loads(file.read(_BUFFER).decode(), parse_constant=_refuse)  # raises what is wrong with it
                    raise self._not_a_list()

    def _rows_by_id(self, file: IO[bytes]) -> Iterator[Any]:
        empty = True
        for key, row in _stream(file, ijson.kvitems, "", _MAX_ROW_BYTES):
            if empty and not isinstance(row, dict):
                raise self._not_a_list()
            yield {"pid": key, **row} if isinstance(row, dict) else row
            empty = False
        if empty:
            raise self._not_a_list()

    def _parquet(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=16):
                    yield from batch.to_pylist()
        except FileNotFoundError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not valid Parquet ({_one_line(error)})") from None


class _BoundedReader:
    """A file for ijson, which has no limits of its own: a broken file is not read into memory to its end."""

    def __init__(self, file: IO[bytes], max_bytes: float):
        self._file, self._max_bytes, self.size, self.depth = file, max_bytes, 0, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.size += len(data)
        self.depth += data.count(b"[") + data.count(b"{") - data.count(b"]") - data.count(b"}")
        if self.size > self._max_bytes:
            raise ValueError(f"a row of more than {self._max_bytes:,} bytes")
        if self.depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        return data


def _stream(file: IO[bytes], parse: Any, prefix: str, max_bytes: float) -> Iterator[Any]:
    """Yield what `ijson.items` or `ijson.kvitems` finds below a prefix, each of at most `max_bytes`."""
    reader = _BoundedReader(file, max_bytes)
    for value in parse(reader, prefix, use_float=True, buf_size=_BUFFER):
        yield value
        reader.size = reader.depth = 0


def read_items(path: Path, key: str) -> Iterator[Any]:
    """Yield the items of one list in a large JSON object, `{key: [item, …], …}`, whatever comes before and after it.

    Raises:
        DataError: The file cannot be read or is not valid JSON.
    """
    try:
        with path.open("rb") as file:
            yield from _stream(file, ijson.items, f"{key}.item", math.inf)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ijson.JSONError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    """Return ijson's reason; an excerpt of the file follows it in lines of its own."""
    return str(error).removeprefix("b'").replace("\\n", "\n").split("\n", 1)[0].rstrip(".")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _detect_form(file: IO[bytes]) -> str:
    """Return `list`, `object`, `lines` or nothing, from the beginning of the file."""
    while (start := file.read(1)) and start in b" \t\r\n":
        pass
    if start != b"{":
        return "list" if start == b"[" else ""
    try:
        first = json.loads(start + file.readline(_MAX_LINE_BYTES))
    except (ValueError, RecursionError):
        return "object"
    by_id = not first or all(isinstance(value, dict) for value in first.values())
    more = not by_id and any(line.strip(b" \t\r\n") for line in file)
    return "lines" if more else "object"


def _json_lines(file: IO[bytes]) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip(b" \t\r\n"):
            try:
                yield json.loads(line.decode(), parse_constant=_refuse)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at character {error.colno}") from None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def read_rows(path: Path, *, min_rows: int = 1) -> list[Any]:
    """Return all rows of a file at once; see `Rows`.

    Raises:
        DataError: The file cannot be read, has another form or has too few rows.
    """
    return list(Rows(path, min_rows=min_rows))


def write_rows(path: Path, rows: Any) -> None:
    """Write rows as JSON, atomically.

    Args:
        path: The file.
        rows: A list, or an object of rows by id.

    Raises:
        DataError: The file cannot be written.
    """
    with atomic_path(path, DataError) as part, part.open("w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=4)
