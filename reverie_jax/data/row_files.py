"""Files of rows: read one row at a time with one line for whatever is wrong, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from reverie_jax.errors import DataError
from reverie_jax.files import atomic_path

_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 20
_LONGEST = 1 << 28
"""Characters of one row: beyond them a file is taken to be broken, and not read into memory to its end."""


class Rows:
    """A file's rows, read anew at each pass and never all at once.

    A JSON list; a JSON object of rows by id (each row gets its id as `pid`); JSON lines, in a file that ends in `.jsonl` or
    begins with a line that is an object by itself (as POPE's `.json` files); or Parquet, in one that ends in `.parquet`.

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
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({_line(error.strerror or error)})") from None
        except RecursionError:
            raise DataError(f"{self.path}: not valid JSON (nested too deep)") from None
        except ValueError as error:
            raise DataError(f"{self.path}: not valid JSON ({_line(error)})") from None
        if count < self.least:
            raise self._no_list()

    def _no_list(self) -> DataError:
        return DataError(f"{self.path}: expected a list of rows{', and at least one' if self.least else ''}")

    def name(self, number: int, row: Any) -> str:
        """File and row, for people: by its id where it has one, by its number from 0 where not."""
        return f"{self.path}: row {row['pid'] if isinstance(row, dict) and 'pid' in row else number}"

    @property
    def by_id(self) -> bool:
        """Whether the file is an object of rows."""
        if self.path.suffix in (".parquet", ".jsonl"):
            return False
        with self.path.open(encoding="utf-8") as file:
            return _form(file) == "{"

    def _rows(self) -> Iterator[Any]:
        if self.path.suffix == ".parquet":
            yield from self._parquet()
            return
        with self.path.open(encoding="utf-8") as file:
            form = "lines" if self.path.suffix == ".jsonl" else _form(file)
            file.seek(0)
            match form:
                case "lines":
                    yield from _lines(file)
                case "[":
                    yield from JsonStream(file).items()
                case "{":
                    yield from self._by_id(file)
                case _:
                    json.loads(file.read(_CHUNK), parse_constant=_refuse)  # says what is wrong with it
                    raise self._no_list()

    def _by_id(self, file: TextIO) -> Iterator[Any]:
        found = False
        for key, row in JsonStream(file).pairs():
            if not found and not isinstance(row, dict):
                raise self._no_list()
            yield {"pid": key, **row} if isinstance(row, dict) else row
            found = True
        if not found:
            raise self._no_list()

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
            raise DataError(f"{self.path}: not valid Parquet ({_line(error)})") from None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _form(file: TextIO) -> str:
    """`[`, `{`, `lines` or nothing, by the beginning of the text."""
    for line in file:
        if text := line.strip(" \t\r\n"):
            if text[0] != "{":
                return text[0] if text[0] == "[" else ""
            try:
                first = json.loads(text)
            except (ValueError, RecursionError):
                return "{"
            by_id = not first or all(isinstance(value, dict) for value in first.values())
            more = not by_id and any(rest.strip(" \t\r\n") for rest in file)
            return "lines" if more else "{"
    return ""


def _lines(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip(" \t\r\n"):
            try:
                yield json.loads(line, parse_constant=_refuse)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at character {error.colno}") from None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


class JsonStream:
    """A JSON text of any length, value by value."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._at, self._read, self._ended = file, "", 0, 0, False
        self._decoder = json.JSONDecoder(parse_constant=_refuse)

    def _more(self, size: int = _CHUNK) -> bool:
        """Reads on; False at the end of the file."""
        part = self._file.read(size)
        self._read += self._at
        self._text, self._at = self._text[self._at :] + part, 0
        self._ended = not part
        return bool(part)

    def _next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _take(self, wanted: str) -> str:
        """Passes over one of the wanted characters, and says which."""
        found = self._next()
        if not found or found not in wanted:
            what = f"{found!r}" if found else "the end"
            raise ValueError(f"expected {' or '.join(wanted)} at character {self._read + self._at}, found {what}")
        self._at += 1
        return found

    def _value(self) -> Any:
        self._next()
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at character {self._read + error.pos}"
            else:
                # At the end of what was read, a number may go on.
                if end < len(self._text) or self._ended or isinstance(value, dict | list | str):
                    self._at = end
                    return value
                problem = ""
            if self._ended or len(self._text) - self._at > _LONGEST or not self._more(size):
                if not problem:
                    continue
                raise ValueError(problem)
            size *= 2

    def items(self) -> Iterator[Any]:
        """A list's."""
        self._take("[")
        if self._next() == "]":
            self._at += 1
        else:
            while True:
                yield self._value()
                if self._take(",]") == "]":
                    break
        self._end()

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """An object's."""
        self._take("{")
        if self._next() == "}":
            self._at += 1
        else:
            while True:
                if self._next() != '"':
                    self._take('"')
                key = self._value()
                self._take(":")
                yield key, self._value()
                if self._take(",}") == "}":
                    break
        self._end()

    def _end(self) -> None:
        if found := self._next():
            raise ValueError(f"more behind its end, at character {self._read + self._at}: {found!r}")


def read_list(path: Path, *, least: int = 1) -> list[Any]:
    """All rows of a file at once; see `Rows`.

    Raises:
        DataError: the file cannot be read, is something else, or is too short.
    """
    return list(Rows(path, least=least))


def write_list(path: Path, rows: Any) -> None:
    """The file is the old one or the new one, never half of it.

    Args:
        rows: a list, or an object of rows by id.
    """
    with atomic_path(path, DataError) as part, part.open("w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=4)
