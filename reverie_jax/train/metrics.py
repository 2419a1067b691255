"""Metric loggers: metrics.jsonl, validation.jsonl, TensorBoard event files and a progress bar."""

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
from tensorboardX import SummaryWriter

from reverie_jax.errors import UserError
from reverie_jax.files import atomic_write
from reverie_jax.progress import ProgressBars

_log = logging.getLogger(__name__)

_MIN_FREE_BYTES = 256 * 1024
"""Free disk space below which nothing is written to TensorBoard."""


class MetricsLog:
    """Context manager that logs each step to `metrics.jsonl`, TensorBoard and a progress bar; only process 0 writes.

    Args:
        folder: run folder.
        total: steps of the run.
        resumed: step that a resumed run continues from; later lines of the interrupted run are removed, so that the file
            has one line per step.
        label: of the progress bar.
    """

    def __init__(
        self, folder: Path, total: int, *, resumed: int = 0, label: str = "train", console: Console | None = None
    ):
        self._is_writer = jax.process_index() == 0
        if not self._is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        path = folder / "metrics.jsonl"
        lines = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resumed]
        atomic_write(path, "".join(line + "\n" for line in lines))
        self._file, self._unwritten = path.open("ab", buffering=0), b""
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1 if resumed else None)
        self._bars, self._label, self._total = ProgressBars(console=console), label, total
        self._bars.update(label, resumed, total)
        self._started = time.perf_counter()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one step's metrics; the progress bar shows `loss` and `tokens_per_second`."""
        if not self._is_writer:
            return
        row: dict[str, Any] = {"step": step, "time": round(time.perf_counter() - self._started, 4), **values}
        # On a full disk, lines are kept until there is space. TensorBoard's writer would fail for good, so it gets nothing.
        self._unwritten += json.dumps(row).encode() + b"\n"
        size, free = self._file.seek(0, os.SEEK_END), os.statvfs(self._file.fileno())
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten = b""
        except OSError as error:
            _log.error(
                "step %d: metrics.jsonl cannot be written (%s); its lines are kept and written later",
                step,
                error.strerror,
            )
        if self._unwritten:
            self._file.truncate(size)
        elif free.f_bavail * free.f_frsize > _MIN_FREE_BYTES:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        speed = f"{values.get('tokens_per_second', 0):,.0f}"
        self._bars.update(self._label, step, self._total, f"loss {values['loss']:.3f}, {speed} tokens/s")

    def write_validation(self, step: int, values: dict[str, float] | None) -> None:
        """Log the metrics of held-out records, if there are any, as a line of `validation.jsonl`."""
        if not self._is_writer or not values:
            return
        path = self._folder / "validation.jsonl"
        lines = [line for line in _complete_lines(path) if json.loads(line)["step"] < step]
        try:
            atomic_write(path, "".join(line + "\n" for line in [*lines, json.dumps({"step": step, **values})]))
        except UserError as error:
            _log.error("step %d: %s", step, error)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        if self._is_writer:
            self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_writer:
            return
        self._bars.__exit__()
        self._file.close()
        self._tensorboard.close()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[None]:
    """Serve TensorBoard for a run folder while the context is active; it prints its address.

    Raises:
        UserError: the tensorboard package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard")
    (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "tensorboard")]
    server = subprocess.Popen(command)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def _complete_lines(path: Path) -> list[str]:
    """Return the lines of a JSONL file, without one that a kill truncated."""
    if not path.exists():
        return []
    return [line for line in path.read_text("utf-8").splitlines() if line.startswith("{") and line.endswith("}")]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return one dict per step from a run's metrics.jsonl."""
    return [json.loads(line) for line in _complete_lines(folder / "metrics.jsonl")]
