"""Readers of the official files of benchmarks, and writers of their upload files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reverie_jax import files
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError
from reverie_jax.eval.benchmarks.hub import fetch
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, require

T = TypeVar("T")

HUB = Path("hub")


def load(benchmark: Benchmark, data: Path) -> BenchmarkData:
    """Load a benchmark from the folder of its files, or from a folder of such folders by benchmark (or by LLaVA's names).

    `hub`, if there is no such folder, stands for the benchmark's dataset on the Hugging Face hub, which is downloaded.

    Raises:
        BenchmarkError: A file is missing or invalid; see `Benchmark.load`.
    """
    if data == HUB and not data.exists():
        folder = fetch(benchmark)
        loaded = benchmark.load(folder)
        origin = f"{benchmark.hub.repository if benchmark.hub else ''}@{folder.name}"
        return dataclasses.replace(loaded, protocol={**loaded.protocol, "hub": origin})
    require(data.exists(), f"{data}: no such file or folder; {benchmark.name} needs {benchmark.required_files}")
    names = (benchmark.name, *benchmark.folder_names)
    return benchmark.load(next((data / name for name in names if (data / name).is_dir()), data))


def find_file(data: Path, *patterns: str, benchmark: Benchmark | type[Benchmark]) -> Path:
    """Return the only file of the first pattern that matches in a folder or below it; or `data` itself if it is a file.

    Raises:
        BenchmarkError: No file or several files match.
    """
    if data.is_file():
        return data
    for depth in ("", "*/", "*/*/"):
        for pattern in patterns:
            if path := find_only(data, depth + pattern):
                return path
    names = " or ".join(patterns)
    raise BenchmarkError(f"{data}: {names} is missing; {benchmark.name} needs {benchmark.required_files}")


def find_only(folder: Path, pattern: str) -> Path | None:
    """Return the only file that matches a pattern in a folder; None if there is none.

    Raises:
        BenchmarkError: Several files match.
    """
    paths = sorted(folder.glob(pattern))
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise BenchmarkError(f"{folder}: several files match {pattern} ({names}); name one of them, or keep only one")
    return paths[0] if paths else None


def parse_rows(path: Path, what: str, parse: Callable[[Any], T], *, min_rows: int = 1) -> list[T]:
    """Return what `parse` returns for each row of a JSON, JSON-lines or Parquet file.

    Args:
        path: of the file.
        what: name of a row in error messages.
        parse: called with each row.
        min_rows: number of rows that the file must have.

    Raises:
        BenchmarkError: The file cannot be read, or `parse` raised ValueError, LookupError, TypeError or AttributeError.
    """
    rows = Rows(path, min_rows=min_rows)
    try:
        return [
            parse_row(parse, files.well_formed(row), what, rows.locate(number, row)) for number, row in enumerate(rows)
        ]
    except DataError as error:
        raise BenchmarkError(str(error)) from None


def parse_list(path: Path, what: str, parse: Callable[[Any], T], rows: Any, key: str) -> list[T]:
    """Return what `parse` returns for each row of a list that a JSON file holds under `key`.

    Raises:
        BenchmarkError: There is no such list, or `parse` failed (see `parse_rows`).
    """
    if not isinstance(rows, list) or not rows:
        raise BenchmarkError(f'{path}: expected an object with a list of rows as "{key}"')
    return [parse_row(parse, row, what, f"{path}: row {number}") for number, row in enumerate(rows)]


def parse_row(parse: Callable[[Any], T], row: Any, what: str, where: str) -> T:
    """Return what `parse` returns for a row; its errors name the place.

    Raises:
        BenchmarkError: see `parse_rows`.
    """
    try:
        return parse(row)
    except BenchmarkError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{where}: invalid {what} ({error!r})") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        BenchmarkError: The file is missing, cannot be read or is not valid JSON.
    """
    return files.well_formed(files.read_json(path, BenchmarkError))


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a TSV file with a header, by column; a cell may have megabytes (images in base64).

    Raises:
        BenchmarkError: The file cannot be read, or lacks one of `columns`.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # some files begin with a byte order mark
            reader = csv.DictReader(file, delimiter="\t")
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise BenchmarkError(f"{path}: column {', '.join(sorted(missing))} is missing")
            for row in reader:
                if None in row or None in row.values():
                    raise BenchmarkError(f"{path}: line {reader.line_num} has another number of cells than the header")
                yield row
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: not a TSV file ({error})") from None


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a workbook, CSV or TSV file by column; all cells are text.

    Raises:
        BenchmarkError: The file cannot be read, or is not a table.
    """
    import pandas

    options: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    try:
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            text = files.decode_text(path.read_bytes())
            table = pandas.read_csv(io.StringIO(text), sep="\t" if suffix == ".tsv" else _delimiter(text), **options)
        else:
            table = pandas.read_excel(path, **options)
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, zipfile.BadZipFile, pandas.errors.ParserError) as error:
        raise BenchmarkError(f"{path}: not a table ({' '.join(str(error).split())[:200]})") from None
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.fillna("").to_dict("records")]


def _delimiter(text: str) -> str:
    """Return what separates the names in the first line of a CSV file: a comma, or what Excel writes in many languages."""
    names = re.sub(r'"[^"]*"', "", text.lstrip("\r\n").split("\n", 1)[0])
    return max(",;\t", key=names.count)


def check_unique(path: Path, ids: Sequence[Any]) -> None:
    """Raise BenchmarkError if an id is a duplicate."""
    seen: set[str] = set()
    for id in map(str, ids):
        if id in seen:
            raise BenchmarkError(f"{path}: duplicate question {id}")
        seen.add(id)


def image_reader(*folders: Path) -> Callable[[str], bytes]:
    """Return a function that reads an image by its name, from the first folder that has it.

    Raises (when called):
        BenchmarkError: The image is in no folder, or its name leads out of the folder.
    """

    def read_image(name: str) -> bytes:
        for folder in folders:
            path = folder / name
            if not any(path.resolve().is_relative_to(root) for root in _roots(folder)):
                raise BenchmarkError(f"image {name}: the path leads out of {folder}")
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except OSError as error:
                raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
        searched = ", ".join(map(str, folders))
        raise BenchmarkError(f"image {name}: not found in {searched}; name the folder of images with --images")

    return read_image


def _roots(folder: Path) -> list[Path]:
    """Return where an image of a folder may lie: in it, or where the hub's cache has the files that a snapshot links to."""
    root = folder.resolve()
    snapshots = (place.parent for place in (root, *root.parents) if place.parent.name == "snapshots")
    return [root, *(place.parent / "blobs" for place in snapshots)]


def either(first: Callable[[str], bytes], second: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return an image reader that tries `second` where `first` fails, and reports the error of `first`."""

    def read_image(name: str) -> bytes:
        try:
            return first(name)
        except BenchmarkError as missing:
            try:
                return second(name)
            except BenchmarkError:
                raise missing from None

    return read_image


def with_images(loaded: BenchmarkData, images: Path | None) -> BenchmarkData:
    """Return the questions with a folder of the user's in which images are looked up first.

    Raises:
        BenchmarkError: The folder is missing.
    """
    if images is None:
        return loaded
    if not images.is_dir():
        raise BenchmarkError(f"--images {images}: no such folder")
    return dataclasses.replace(loaded, read_image=either(image_reader(images), loaded.read_image))


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines and return the path; the folder is created."""
    files.atomic_write(path, "".join(json.dumps(files.well_formed(row), ensure_ascii=False) + "\n" for row in rows))
    return path


def write_json(path: Path, content: Any, indent: int | None = None) -> Path:
    """Write JSON and return the path; the folder is created."""
    files.atomic_write(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")
    return path
