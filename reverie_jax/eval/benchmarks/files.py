"""Reading benchmarks' files and answer files, with one clear line for whatever is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reverie_jax import files
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError

PREDICTIONS, RUN, SCORES = "predictions.jsonl", "run.json", "scores.json"
"""What `reverie eval` leaves in a folder."""

T = TypeVar("T")


def find(data: Path, *patterns: str, benchmark: Benchmark | type[Benchmark]) -> Path:
    """The one file that the first matching pattern names, below a folder; or `data` itself where it is a file.

    Raises:
        BenchmarkError: there is none, or more than one; it says what the benchmark needs and where that comes from.
    """
    if data.is_file():
        return data
    for pattern in patterns:
        found = sorted(data.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise BenchmarkError(f"{data}: {names} are all {pattern}; name one of them, or leave one there")
    raise BenchmarkError(f"{data}: no {' or '.join(patterns)} there; {benchmark.name} needs {benchmark.needs}")


def parse_rows(path: Path, what: str, make: Callable[[Any], T], *, least: int = 1) -> list[T]:
    """What `make` makes of each row of a JSON, JSON-lines or Parquet file.

    Args:
        what: a row is, for errors.

    Raises:
        BenchmarkError: the file cannot be read; `make` raised ValueError, KeyError, TypeError or AttributeError.
    """
    rows, found = Rows(path, least=least), []
    try:
        for number, row in enumerate(rows):
            try:
                found.append(make(row))
            except BenchmarkError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise BenchmarkError(f"{rows.name(number, row)} is no {what} ({error!r})") from None
    except DataError as error:
        raise BenchmarkError(str(error)) from None
    return found


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        BenchmarkError: The file is missing, cannot be read or is not valid JSON.
    """
    return files.read_json(path, BenchmarkError)


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a TSV with a head, by column; cells may be megabytes (pictures in base64).

    Raises:
        BenchmarkError: it cannot be read, or lacks one of `columns`.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise BenchmarkError(f"{path}: no column {', '.join(sorted(missing))}")
            for row in reader:
                if None in row or None in row.values():
                    raise BenchmarkError(f"{path}: line {reader.line_num} has not as many cells as the head")
                yield row
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: not a TSV file ({error})") from None


def check_unique(path: Path, ids: Sequence[Any]) -> None:
    """Raises BenchmarkError where an id stands twice."""
    seen: set[str] = set()
    for id in map(str, ids):
        if id in seen:
            raise BenchmarkError(f"{path}: question {id} stands there twice")
        seen.add(id)


def image_reader(*folders: Path, flag: str = "--images") -> Callable[[str], bytes]:
    """Finds a picture's file by its name in the first folder that has it.

    Raises (when called):
        BenchmarkError: none has it, or the name leads out of the folder.
    """

    def picture(name: str) -> bytes:
        for folder in folders:
            path, root = folder / name, folder.resolve()
            if not path.resolve().is_relative_to(root):
                raise BenchmarkError(f"picture {name}: leads out of {folder}")
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except OSError as error:
                raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
        raise BenchmarkError(
            f"picture {name}: not in {', '.join(map(str, folders))}; name the folder of pictures with {flag}"
        )

    return picture


def with_images(loaded: BenchmarkData, images: Path | None) -> BenchmarkData:
    """The questions, their pictures looked for in a folder of the user's first, and then where the benchmark has them.

    Raises:
        BenchmarkError: there is no such folder.
    """
    if images is None:
        return loaded
    if not images.is_dir():
        raise BenchmarkError(f"--images {images}: no such folder")
    first = image_reader(images)

    def picture(name: str) -> bytes:
        try:
            return first(name)
        except BenchmarkError as missing:
            try:
                return loaded.read_image(name)
            except BenchmarkError:
                raise missing from None

    return dataclasses.replace(loaded, read_image=picture)


def read_answers(path: Path, benchmark: Benchmark, loaded: BenchmarkData, *, partial: bool = False) -> dict[str, str]:
    """Answers by `str(question.id)`, from an answer file of ours, LLaVA's, or the benchmark's own form.

    Rows are joined by id, never by position.

    Args:
        partial: questions may lack an answer: they count as the rule says.

    Raises:
        BenchmarkError: the file cannot be read; an id stands there twice, is unknown, or (unless `partial`) is missing; a
            row says another question than ours of the same id.
    """
    questions = {str(question.id): question for question in loaded.questions}
    answers: dict[str, str] = {}

    def take(row: Any) -> None:
        if not isinstance(row, Mapping):
            raise TypeError("it is no object")
        for one in benchmark.unfold(row):
            take_one(one)

    def take_one(row: Mapping[str, Any]) -> None:
        key, text = benchmark.key(row, loaded), benchmark.text(row)
        if key is None:
            raise KeyError("question_id")
        if not isinstance(text, str):
            raise TypeError(f"question {key}: its text is {text!r}")
        if key not in questions:
            raise BenchmarkError(f"{path}: question {key} is none of {benchmark.name}'s {len(questions)}; {_VERSION}")
        if key in answers:
            key = next((twin for twin in benchmark.duplicates(key, row, loaded) if twin not in answers), key)
        if key in answers:
            raise BenchmarkError(f"{path}: question {key} stands there twice")
        said, ours = row.get("prompt"), questions[key].text
        if isinstance(said, str) and not benchmark.same(said, questions[key]):
            raise BenchmarkError(f"{path}: question {key} is {said!r} there and {ours!r} here; {_VERSION}")
        answers[key] = text

    whole = by_id(path)
    if whole is None:
        parse_rows(path, "answer", take)
    else:
        for id, text in whole.items():
            take({"question_id": id, "text": text})
    # None of the left out, or all of them.
    wanted = questions if any(key in answers for key in loaded.left_out) else {str(q.id) for q in loaded.asked}
    missing = [key for key in questions if key in wanted and key not in answers]
    if missing and not partial:
        raise BenchmarkError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]}; "
            f"{_VERSION}, or count them as the rule does with --partial"
        )
    return answers


def by_id(path: Path) -> dict[str, str] | None:
    """The content of a file that is one object of texts by id (MM-Vet's form); None where it is another."""
    try:
        with path.open(encoding="utf-8") as file:
            if file.read(1) != "{" or path.suffix == ".jsonl":
                return None
        found = read_json(path)
    except (OSError, UnicodeDecodeError, BenchmarkError):
        return None
    plain = isinstance(found, dict) and all(isinstance(text, str) for text in found.values())
    return found if plain and "question_id" not in found else None


_VERSION = "the answers belong to another version of the questions"


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines, in a folder that is made."""
    files.atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
