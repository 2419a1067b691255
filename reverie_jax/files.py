"""Read a JSON file with one line for whatever is wrong; write a file or a folder as a whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import json
import operator
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reverie_jax.errors import UserError


def read_json(path: Path, error: type[UserError] = UserError) -> Any:
    """Return the content of a JSON file; see `decode_text` for its encoding.

    Raises:
        error: The file is missing, cannot be read or is not valid JSON.
    """
    try:
        return json.loads(decode_text(path.read_bytes()))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except UnicodeDecodeError:
        raise error(f"{path}: not text in UTF-8; save it in this encoding") from None
    except RecursionError:
        raise error(f"{path}: not valid JSON (nested too deep)") from None
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({' '.join(str(problem).split())[:200]})") from None


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Return the text of a file: UTF-8, or UTF-16 with a byte order mark as Windows writes it. Marks are dropped.

    Args:
        content: The file.
        errors: As for `bytes.decode`.

    Raises:
        UnicodeDecodeError: It is in another encoding.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig", errors)


def write_json(path: Path, content: Any, error: type[UserError] = UserError) -> None:
    """Write JSON with an indent of 2, atomically (see `atomic_path`)."""
    atomic_write(path, json.dumps(content, indent=2) + "\n", error)


def atomic_write(path: Path, data: str | bytes, error: type[UserError] = UserError) -> None:
    """Write a file atomically (see `atomic_path`); text is encoded as UTF-8, lone surrogates as escapes."""
    with atomic_path(path, error) as part:
        part.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_path(path: Path, error: type[UserError] = UserError) -> Iterator[Path]:
    """Yield a hidden path beside `path`; the file written there takes the name `path` when the block succeeds.

    `path` is therefore the old file or the complete new one, also after a crash. Parent folders are created.

    Raises:
        error: The file cannot be written. Nothing is left behind.
    """
    path = path.resolve() if path.is_symlink() else path  # the link stays
    if path.is_dir():
        raise error(f"{path}: is a folder; name a file")
    if path.exists() and not path.is_file():  # a device or a pipe, as /dev/stdout
        yield path
        return
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as problem:
        raise error(f"{path}: cannot be written ({problem.strerror or problem})") from problem
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, error: type[UserError] = UserError) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that takes the name `path` when the block succeeds.

    Raises:
        error: `path` already exists and is not an empty folder, or writing fails. Nothing is left behind.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise error(f"{path}: already exists; choose another output folder")
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)
        for inner in part.rglob("*"):  # safetensors creates files that only their owner can read
            inner.chmod((0o777 if inner.is_dir() else 0o666) & ~umask)
        if path.exists():
            path.rmdir()
        part.rename(path)
    except UserError as problem:
        raise type(problem)(str(problem).replace(str(part), str(path))) from problem
    except OSError as problem:
        raise error(f"{path}: cannot be written ({problem.strerror or problem})") from problem
    finally:
        for _ in range(20):  # a writer's own threads may still be writing when its error arrives
            if part is None or not part.exists():
                break
            shutil.rmtree(part, ignore_errors=True)
            if part.exists():
                time.sleep(0.5)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files anywhere below a folder, also behind links to folders, each folder once; in no particular order."""
    seen: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # two links to one folder, or a circle
            below.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def well_formed(value: Any) -> Any:
    """Return a JSON value without lone surrogates (halves of characters), which JSON can hold and no file or request can.

    The value itself is returned where nothing is dropped.
    """
    if isinstance(value, str):
        whole = value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
        return value if len(whole) == len(value) else whole
    if isinstance(value, list):
        items = list(map(well_formed, value))
        return value if all(map(operator.is_, items, value)) else items
    if isinstance(value, dict):
        fields = {well_formed(key): well_formed(item) for key, item in value.items()}
        same = len(fields) == len(value) and all(
            map(operator.is_, (*fields, *fields.values()), (*value, *value.values()))
        )
        return value if same else fields
    return value
