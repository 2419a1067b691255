"""Numbers while a run runs: JSONL always, TensorBoard, and a progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from reverie_jax.errors import UserError

_log = logging.getLogger(__name__)

_ROOM = 256 * 1024
"""Free bytes below which a disk counts as full for TensorBoard."""


class MetricsLog:
    """Writes each step's numbers to `metrics.jsonl` and TensorBoard event files, and shows a progress bar.

    Of several processes the first one writes.

    A resumed run passes the step that it resumes from: later lines of an interrupted run are cut, so that each step stands
    there once.
    """

    def __init__(
        self, folder: Path, total: int, *, resumed: int = 0, label: str = "train", console: Console | None = None
    ):
        self._speaks = jax.process_index() == 0
        if not self._speaks:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resumed]
        path.write_text("".join(line + "\n" for line in kept), "utf-8")
        self._file, self._waiting = path.open("ab", buffering=0), b""
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1 if resumed else None)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task = self._progress.add_task(label, total=total, completed=resumed, loss="-", speed="-")
        self._started = time.perf_counter()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One step's numbers; `loss` and `tokens_per_second` are shown."""
        if not self._speaks:
            return
        row: dict[str, Any] = {"step": step, "time": round(time.perf_counter() - self._started, 4), **values}
        # On a full disk lines wait for room; TensorBoard's writer, which such a disk would end, gets nothing meanwhile.
        self._waiting += json.dumps(row).encode() + b"\n"
        size, free = self._file.seek(0, os.SEEK_END), os.statvfs(self._file.fileno())
        try:
            if self._file.write(self._waiting) == len(self._waiting):
                self._waiting = b""
        except OSError as error:
            _log.error("step %d: metrics.jsonl cannot be written (%s); its lines are kept", step, error.strerror)
        if self._waiting:
            self._file.truncate(size)
        elif free.f_bavail * free.f_frsize > _ROOM:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        speed = f"{values.get('tokens_per_second', 0):,.0f}"
        self._progress.update(self._task, completed=step, loss=f"{values['loss']:.3f}", speed=speed)

    def validated(self, step: int, values: dict[str, float] | None) -> None:
        """What was measured on held-out records, if there are some: a line of `validation.jsonl`."""
        if not self._speaks or not values:
            return
        path = self._folder / "validation.jsonl"
        lines = [line for line in _whole_lines(path) if json.loads(line)["step"] < step]
        try:
            path.write_text("".join(line + "\n" for line in [*lines, json.dumps({"step": step, **values})]), "utf-8")
        except OSError as error:
            _log.error("step %d: validation.jsonl cannot be written (%s)", step, error.strerror)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        if self._speaks:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._speaks:
            return
        self._progress.stop()
        self._file.close()
        self._board.close()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[None]:
    """TensorBoard over a run folder, at the address that it prints, until the block is left.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--watch needs the tensorboard package: pip install tensorboard")
    (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "tensorboard")]
    server = subprocess.Popen(command)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def _whole_lines(path: Path) -> list[str]:
    """Lines of a JSONL file, without one that a kill cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text("utf-8").splitlines() if line.startswith("{") and line.endswith("}")]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in _whole_lines(folder / "metrics.jsonl")]
