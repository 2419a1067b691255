"""Metric loggers: metrics.jsonl, validation.jsonl, samples.jsonl, TensorBoard event files, trackers, a progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

from reverie_jax.errors import UserError
from reverie_jax.files import atomic_write
from reverie_jax.progress import ProgressBars, format_rate
from reverie_jax.train.evaluator import Evaluation, Sample
from reverie_jax.train.samples import cut_samples, write_samples
from reverie_jax.train.trackers import Trackers

_log = logging.getLogger(__name__)

_MIN_FREE_BYTES = 256 * 1024
"""Free disk space below which nothing is written to TensorBoard."""
_SCHEME = "reverie"
"""Of the paths that tensorboardX is given, so that it writes by `EventFile`."""


class EventFile:
    """A TensorBoard event file whose writes never fail: after an error, as of a full disk, it gets nothing more.

    tensorboardX writes in a thread. An error would end it, its queue would fill, and the training wait for it for ever.
    """

    def __init__(self, path: str):
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115
        self._failed = False

    def _try(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except OSError as error:
            self._failed = True
            _log.error("%s: cannot be written (%s); TensorBoard shows nothing more", self._path, error.strerror)

    def write(self, data: bytes) -> None:
        """Write to the buffer."""
        self._try(lambda: self._file.write(data))

    def flush(self) -> None:
        """Write the buffer to the file."""
        self._try(self._file.flush)

    def close(self) -> None:
        """Write the buffer and close the file."""
        self.flush()
        with contextlib.suppress(OSError):  # of what the buffer still holds
            self._file.close()


class _EventFiles:
    """What tensorboardX opens paths of our scheme with."""

    def open(self, path: str) -> EventFile:
        return EventFile(path.removeprefix(f"{_SCHEME}:"))

    def directory_check(self, path: str) -> None:
        os.makedirs(path.removeprefix(f"{_SCHEME}:"), exist_ok=True)


register_writer_factory(_SCHEME, _EventFiles())


class MetricsLog:
    """Context manager that logs each step to `metrics.jsonl`, TensorBoard, trackers and a progress bar.

    Only process 0 writes.

    Args:
        folder: run folder.
        total: steps of the run.
        resumed: step that a resumed run continues from; later lines of the interrupted run are removed, so that a file
            has one line per step. With 0 the files of a run that left no checkpoint are replaced.
        label: of the progress bar.
        console: of the progress bar.
        trackers: get all that is logged; None for none.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        *,
        resumed: int = 0,
        label: str = "train",
        console: Console | None = None,
        trackers: Trackers | None = None,
    ):
        self._is_writer = jax.process_index() == 0
        if not self._is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for path in (folder / "metrics.jsonl", folder / "validation.jsonl"):
            if path.exists():
                lines = [line for line in _complete_lines(path) if 0 < resumed >= json.loads(line)["step"]]
                atomic_write(path, "".join(line + "\n" for line in lines))
        cut_samples(folder, resumed)
        self._line = "".join(line + "\n" for line in _complete_lines(folder / "metrics.jsonl")[-1:]).encode()
        self._file, self._unwritten = (folder / "metrics.jsonl").open("ab", buffering=0), b""
        self._trackers = trackers
        # Events of later steps, or of an ended run that left no checkpoint, are not shown.
        self._tensorboard = SummaryWriter(f"{_SCHEME}:{folder / 'tensorboard'}", purge_step=resumed + 1)
        self._bars, self._label, self._total = ProgressBars(console=console), label, total
        self._bars.update(label, resumed, total)
        self._started, self._first, self._begun = time.perf_counter(), 0, 0.0

    def start(self, step: int) -> None:
        """Say that the step after `step` is being compiled, which takes from seconds to many minutes."""
        self._first, self._begun = step + 1, time.perf_counter()
        if self._is_writer and step < self._total:
            self._bars.update(self._label, step, self._total, "compiling the step")
            _log.info("compiling the training step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one step's metrics; the progress bar shows `loss` and `tokens_per_second`."""
        if not self._is_writer:
            return
        if step == self._first:
            _log.info("the first step took %.1f s, compiling included", time.perf_counter() - self._begun)
        row: dict[str, Any] = {"step": step, "time": round(time.perf_counter() - self._started, 4), **values}
        if self._append(step, row):
            self._scalars(step, values)
        if self._trackers is not None:
            self._trackers.log(step, values)
        speed = format_rate(values.get("tokens_per_second", 0))
        self._bars.update(self._label, step, self._total, f"loss {values['loss']:.3f}, {speed} tokens/s")

    def _append(self, step: int, row: Mapping[str, Any]) -> bool:
        """Add a line to metrics.jsonl; return whether the disk has room for more.

        On a full disk, lines are kept until there is space. TensorBoard's writer would fail for good, so it gets nothing.
        """
        self._line = json.dumps(row).encode() + b"\n"
        self._unwritten += self._line
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
        return not self._unwritten and free.f_bavail * free.f_frsize > _MIN_FREE_BYTES

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def note(self, step: int, text: str) -> None:
        """Show what is being done after a step."""
        if self._is_writer:
            self._bars.update(self._label, step, self._total, text)

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Add an evaluation's metrics to the step's line, and log its samples. What is not a number is left out."""
        if not self._is_writer:
            return
        values = {name: value for name, value in evaluation.metrics.items() if math.isfinite(value)}
        if values:
            row = json.loads(self._line or "{}")
            if row.get("step") != step:
                row = {"step": step}
            elif self._unwritten:
                self._unwritten = self._unwritten.removesuffix(self._line)
            else:
                self._file.truncate(self._file.seek(0, os.SEEK_END) - len(self._line))
            if self._append(step, row | values):
                self._scalars(step, values)
            if self._trackers is not None:
                self._trackers.log(step, values)
        if evaluation.samples:
            self._write_samples(step, evaluation.samples)

    def _write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        try:
            rows = write_samples(self._folder, step, samples)
        except UserError as error:
            _log.error("step %d: %s", step, error)
            return
        for row in rows:
            text = f"**{row.question}**\n\nbefore: {row.before}\n\nnow: {row.now}"
            self._tensorboard.add_text(f"samples/{row.id}", text, step)
            if row.picture is not None:
                self._tensorboard.add_image(f"samples/{row.id}", np.asarray(row.picture), step, dataformats="HWC")
        if self._trackers is not None:
            self._trackers.log_samples(step, rows)

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
        self._scalars(step, values)
        if self._trackers is not None:
            self._trackers.log(step, values)

    def __enter__(self) -> MetricsLog:
        if self._is_writer:
            self._bars.__enter__()
            if self._trackers is not None:
                self._trackers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_writer:
            return
        self._bars.__exit__()
        self._file.close()
        self._tensorboard.close()
        if self._trackers is not None:
            self._trackers.finish(error is None)


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
