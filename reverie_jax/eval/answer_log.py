"""Answers so far, kept in a file that a further run reads; with several processes, one of them writes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from reverie_jax.errors import UserError
from reverie_jax.eval.engine import Answer


def on_first_process(action: Callable[[], None]) -> None:
    """Run `action` on process 0 alone. If it fails, all processes fail: none may wait for one that has ended.

    Raises:
        UserError: `action` raised it; in the other processes, it names process 0.
    """
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None, np.int32))
        if failed and error is None:
            raise UserError("process 0 failed; see its log")
    if error is not None:
        raise error


class AnswerLog:
    """A stage's answers so far, one JSON line each, in the order of the batches. Only process 0 writes."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: list[tuple[int, Answer]] = []
        self._file: Any = None

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: the buffer is flushed once more
                self._file.close()

    def resume(self, batches: Sequence[list[int]]) -> int:
        """Cut the file after the last complete batch; return the number of complete batches.

        Raises:
            UserError: The file cannot be written, or processes see different files.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        rows, end, complete = list(_readable(lines)), 0, 0
        for numbers in batches:
            part = rows[end : end + len(numbers)]
            if [row["number"] for row in part] != list(numbers):
                break
            self.answers += [(row["number"], Answer(row["text"], tuple(row["tracked"]))) for row in part]
            end, complete = end + len(numbers), complete + 1
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.asarray(complete, np.int32))
            if np.ptp(counts):
                raise UserError(f"{self.path}: processes see different answers; the folder must be shared by all hosts")
        on_first_process(lambda: self._open(sum(len(line) + 1 for line in lines[:end])))
        return complete

    def _open(self, size: int) -> None:
        with self._writing():
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
            self._file.truncate(size)
            self._file.seek(size)

    def add(self, batch: Mapping[int, Answer]) -> None:
        """Write a batch's answers.

        Raises:
            UserError: The file cannot be written.
        """
        on_first_process(lambda: self._write(batch))

    def _write(self, batch: Mapping[int, Answer]) -> None:
        rows = [{"number": number, "text": a.text, "tracked": list(a.tracked)} for number, a in batch.items()]
        with self._writing():
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); run again to resume") from None


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Yield rows up to the first broken one, which a kill left."""
    for line in lines:
        try:
            row = json.loads(line)
            yield {"number": int(row["number"]), "text": str(row["text"]), "tracked": list(row["tracked"])}
        except (ValueError, KeyError, TypeError):
            return
