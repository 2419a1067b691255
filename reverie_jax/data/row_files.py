"""Read files of rows one at a time, with one line for whatever is wrong; write them atomically."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import ijson

from reverie_jax.errors import DataError
from reverie_jax.files import atomic_path

_BUFFER = 1 << 14
_SPACE = b" \t\r\n"
_MAX_ROW_BYTES = 1 << 28
_MAX_LINE_BYTES = 1 << 24
"""Length of a first line beyond which a file that begins with an object is not JSON lines."""
Form = Literal["parquet", "lines", "list", "object", "wrapped", ""]
_WRAPPED = re.compile(rb'\{\s*"annotations"\s*:\s*\[\s*[{\]]')
_HALF = re.compile(rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])")
_NOT_A_NUMBER = re.compile(r"-?(?:NaN|Inf(?:inity)?)\b", re.I)
_LAST_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:[^"]*$')
_MAX_DEPTH = 10_000
"""Brackets that may be open within one row; ijson's memory grows with the square of the depth."""


class Rows:
    """The rows of a file, read anew in each pass and never all at once.

    A file is a JSON list, also as `{"annotations": [row, …]}` like MiniGPT-4's; a JSON object of rows by id (each row gets
    its id as `pid`); JSON lines, if its name ends in `.jsonl` (but for a list) or its first line is a row by itself, as in
    POPE's `.json` files; or Parquet, if its name ends in `.parquet`. A byte order mark at the beginning, as Windows writes
    it, is skipped; UTF-16 needs one.

    Args:
        path: The file.
        min_rows: Number of rows below which the file is an error.
    """

    def __init__(self, path: Path, *, min_rows: int = 1):
        self.path, self.min_rows = path, min_rows

    @functools.cached_property
    def form(self) -> Form:
        """The form of the file, by its name and its beginning.

        Raises:
            OSError: The file cannot be read.
        """
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            return "parquet"
        with open_json(self.path) as file:
            form = _detect_form(file)
        return "lines" if suffix == ".jsonl" and form != "list" else form

    def __iter__(self) -> Iterator[Any]:
        """Yield each row; those of an object with their id as `pid`.

        Raises:
            DataError: The file cannot be read, has another form, an id twice, or too few rows.
        """
        for _, row in self.located():
            yield row

    def located(self) -> Iterator[tuple[str, Any]]:
        """Yield ("FILE: row ID", row): the row's key in an object, else its number, from 0.

        Raises:
            DataError: As for iteration.
        """
        for number, (id, row) in enumerate(self.items()):
            is_object = id is not None and isinstance(row, dict)
            yield self._where(number, id), {**row, "pid": id} if is_object else row

    def items(self) -> Iterator[tuple[str | None, Any]]:
        """Yield (id, row) as they are in the file; the id is None unless the file is one object.

        Raises:
            DataError: As for iteration.
        """
        count = 0
        try:
            for item in self._items():
                yield item
                count += 1
        except DataError:  # which is a ValueError
            raise
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        except RecursionError:
            raise DataError(f"{self.path}: row {count}: not valid JSON (nested too deep)") from None
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: row {count}: not text in UTF-8; save the file in this encoding") from None
        except ijson.JSONError as error:
            raise DataError(f"{self.path}: row {count}: not valid JSON ({_explain(error)})") from None
        except ValueError as error:
            raise DataError(f"{self.path}: row {count}: not valid JSON ({_one_line(error)})") from None
        if count < self.min_rows:
            raise self._not_a_list()

    def parquet_row(self, number: int) -> Any:
        """Return one row of a Parquet file, without reading those of other row groups.

        Raises:
            DataError: The file cannot be read, or has fewer rows.
        """
        return next(itertools.islice(self._parquet(number), 1), None)

    def _not_a_list(self) -> DataError:
        return DataError(f"{self.path}: must be a list of rows{', at least one' if self.min_rows else ''}")

    def locate(self, number: int, row: Any) -> str:
        """Return "FILE: row ID" for messages: the row's key in an object, else its number, from 0."""
        is_object = isinstance(row, dict) and self.form == "object"
        return self._where(number, row["pid"] if is_object else None)

    def _where(self, number: int, id: str | None) -> str:
        return f"{self.path}: row {number if id is None else id}".encode("utf-8", "backslashreplace").decode()

    def write_some(self, path: Path, drop: Collection[str]) -> int:
        """Write the rows to another file of the same form, as they are, without some; return how many remain.

        Args:
            path: The file to write.
            drop: Rows to leave out, as `located` names them.

        Raises:
            DataError: The file cannot be written, or a name that ends in `.parquet` or `.jsonl` promises another form.
        """
        suffix = path.suffix.lower()
        other = {".parquet": "parquet", ".jsonl": "lines"}.get(suffix)
        promises_another = other not in (None, self.form) or (self.form == "parquet" and other is None)
        if promises_another and suffix != self.path.suffix.lower():  # a list may be named .jsonl
            raise DataError(f"{path}: must have the form of {self.path}; give it the suffix {self.path.suffix}")
        kept = [self._where(number, id) not in drop for number, (id, _) in enumerate(self.items())]
        rows = itertools.compress(self.items(), kept)
        match self.form:
            case "parquet":
                _filter_parquet(self.path, path, kept)
            case "lines":
                with open_json(self.path) as file, atomic_path(path, DataError) as part:
                    lines = (line.rstrip(b"\r\n") + b"\n" for line in file if line.strip(_SPACE))
                    part.write_bytes(b"".join(itertools.compress(lines, kept)))
            case "object":
                write_rows(path, dict(rows))
            case "wrapped":
                write_rows(path, {"annotations": [row for _, row in rows]})
            case _:
                write_rows(path, [row for _, row in rows])
        return sum(kept)

    def _items(self) -> Iterator[tuple[str | None, Any]]:
        if self.form == "parquet":
            yield from ((None, row) for row in self._parquet())
            return
        with open_json(self.path) as file:
            match self.form:
                case "lines":
                    yield from ((None, row) for row in _json_lines(file))
                case "list":
                    yield from ((None, row) for row in _stream(file, "items", "item", _MAX_ROW_BYTES))
                case "wrapped":
                    yield from ((None, row) for row in _stream(file, "items", "annotations.item", _MAX_ROW_BYTES))
                case "object":
                    yield from self._rows_by_id(file)
                case _:
                    if not file.read(1).strip(_SPACE) and not _has_more(file):
                        raise DataError(f"{self.path}: is empty")
                    file.seek(0)
                    _parse_json(file.read(_BUFFER).decode())  # raises what is wrong with it
                    raise self._not_a_list()

    def _rows_by_id(self, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key, row in _stream(file, "kvitems", "", _MAX_ROW_BYTES):
            if not seen and not isinstance(row, dict):
                raise DataError(
                    f"{self.path}: one object, but its {key!r} is not a row; put the rows in a list, even a single one"
                )
            if key in seen:
                raise DataError(f"{self.path}: row {key}: its id occurs twice; keep one of the rows")
            seen.add(key)
            yield key, row

    def _parquet(self, start: int = 0) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                group = 0
                while group < file.num_row_groups and start >= (size := file.metadata.row_group(group).num_rows):
                    group, start = group + 1, start - size
                batches = file.iter_batches(batch_size=16, row_groups=range(group, file.num_row_groups))
                yield from itertools.islice((row for batch in batches for row in batch.to_pylist()), start, None)
        except FileNotFoundError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not valid Parquet ({_one_line(error)})") from None


def open_json(path: Path) -> IO[bytes]:
    """Open a file of JSON behind its byte order mark, if it has one; UTF-16 with a mark is read as UTF-8.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It has the mark of UTF-16 and is not in it.
    """
    file = path.open("rb")
    start = file.read(len(codecs.BOM_UTF8))
    if start == codecs.BOM_UTF8:
        return file
    file.seek(0)
    if not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return file
    decoder, copy = codecs.getincrementaldecoder("utf-16")(), tempfile.TemporaryFile()  # noqa: SIM115, it is returned
    try:
        with file:
            while chunk := file.read(1 << 20):
                copy.write(decoder.decode(chunk).encode())
        copy.write(decoder.decode(b"", final=True).encode())
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


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


def _stream(file: IO[bytes], what: str, prefix: str, max_bytes: float) -> Iterator[Any]:
    """Yield the `items` or `kvitems` that ijson finds below a prefix, each of at most `max_bytes`."""
    backend = ijson.get_backend("python") if _has_halves(file) else ijson
    reader = _BoundedReader(file, max_bytes)
    for value in getattr(backend, what)(reader, prefix, use_float=True, buf_size=_BUFFER):
        yield value
        reader.size = reader.depth = 0


def _has_halves(file: IO[bytes]) -> bool:
    """Return whether a file of JSON escapes lone surrogates, of which ijson's parser in C makes other characters."""
    if not os.fstat(file.fileno()).st_size:
        return False
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _HALF.search(content) is not None


def read_items(path: Path, key: str) -> Iterator[Any]:
    """Yield the items of one list in a large JSON object, `{key: [item, …], …}`, whatever comes before and after it.

    Raises:
        DataError: The file cannot be read or is not valid JSON.
    """
    try:
        with open_json(path) as file:
            yield from _stream(file, "items", f"{key}.item", math.inf)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ijson.JSONError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON ({_explain(error)})") from None


def _explain(error: Exception) -> str:
    """Return ijson's reason, in plain words for NaN and Infinity.

    An excerpt of the file follows the reason, and a line with an arrow to the second character of what is wrong.
    """
    reason, *more = str(error).removeprefix("b'").replace("\\n", "\n").split("\n")
    if len(more) > 1:
        place = more[1].find("^") - 1
        if place >= 0 and (word := _NOT_A_NUMBER.match(more[0], place)):
            key = _LAST_KEY.search(more[0], 0, place)
            return _describe_constant(word[0], key[1] if key else None)
    return reason.rstrip(".")


def _describe_constant(word: str, key: str | None) -> str:
    where = f"field {key[:80]!r} is " if key else ""
    return f"{where}{word}, which is not a number in JSON; write null or leave the field out"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def _parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is not valid, or a field is NaN or infinite, which Python's parser accepts.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except _NotANumber as error:
        json.loads(
            text, parse_constant=_NotANumber, object_pairs_hook=_refuse_field
        )  # raises with the name of the field
        raise ValueError(_describe_constant(str(error), None)) from None


class _NotANumber(Exception):
    """A constant that JSON does not have."""


def _refuse(constant: str) -> Any:
    raise _NotANumber(constant)


def _refuse_field(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        found = next(
            (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, _NotANumber)), None
        )
        if found is not None:
            raise ValueError(_describe_constant(str(found), key))
    return dict(pairs)


def _detect_form(file: IO[bytes]) -> Form:
    """Return the form of a file of JSON from its beginning; nothing if it is neither list nor object."""
    while (start := file.read(1)) and start in _SPACE:
        pass
    if start == b"[":
        several = _is_json(start + file.readline(_MAX_LINE_BYTES)) and _has_more(file)
        return "lines" if several else "list"
    if start != b"{":
        return ""
    begin = file.tell()
    whole: Form = "wrapped" if _WRAPPED.match(start + file.read(_BUFFER)) else "object"
    file.seek(begin)
    try:
        first = json.loads(start + file.readline(_MAX_LINE_BYTES))
    except (ValueError, RecursionError):
        return whole
    rows = sum(isinstance(value, dict) for value in first.values())
    if rows == len(first):
        return "object"
    return "lines" if _has_more(file) or (whole == "object" and 2 * rows <= len(first)) else whole


def _has_more(file: IO[bytes]) -> bool:
    return any(line.strip(_SPACE) for line in file)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(file: IO[bytes]) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip(_SPACE):
            try:
                yield _parse_json(line.decode("utf-8-sig"))
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


def as_integer(value: Any) -> int | None:
    """Return the number in a field, also if it is written as `7.0`, "7" or "7.0", as tables do; None without an integer."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        digits = value.strip().removesuffix(".0")
        return int(digits) if digits.isascii() and digits.removeprefix("-").isdigit() else None
    return int(value) if isinstance(value, int | float) and value == value // 1 else None


def write_rows(path: Path, rows: Any) -> None:
    """Write rows as JSON, atomically.

    Args:
        path: The file.
        rows: A list, or an object of rows by id.

    Raises:
        DataError: The file cannot be written.
    """
    with atomic_path(path, DataError) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        # Half a character (a lone surrogate) stays the escape that it was in JSON.
        json.dump(rows, file, ensure_ascii=False, indent=4)


def _filter_parquet(source: Path, path: Path, kept: Sequence[bool]) -> None:
    """Write the rows of a Parquet file that are kept, with its schema and metadata."""
    import pyarrow
    import pyarrow.parquet

    start = 0
    with (
        pyarrow.parquet.ParquetFile(source) as file,
        atomic_path(path, DataError) as part,
        pyarrow.parquet.ParquetWriter(part, file.schema_arrow) as writer,
    ):
        for batch in file.iter_batches():
            stop = start + len(batch)
            writer.write_batch(batch.filter(pyarrow.array(kept[start:stop], pyarrow.bool_())))
            start = stop
