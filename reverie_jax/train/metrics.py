"""Numbers while a run runs: JSONL always, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricsLog:
    """Writes each step's numbers to `metrics.jsonl` and TensorBoard event files, and shows a progress bar.

    A resumed run passes the step that it resumes from: later lines of an interrupted run are cut, so that each step stands
    there once.
    """

    def __init__(
        self, folder: Path, total: int, *, resumed: int = 0, label: str = "train", console: Console | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resumed]
        path.write_text("".join(line + "\n" for line in kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")
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
        row: dict[str, Any] = {"step": step, "time": round(time.perf_counter() - self._started, 4), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        speed = f"{values.get('tokens_per_second', 0):,.0f}"
        self._progress.update(self._task, completed=step, loss=f"{values['loss']:.3f}", speed=speed)

    def __enter__(self) -> MetricsLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines of a JSONL file, without one that a kill cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text("utf-8").splitlines() if line.startswith("{") and line.endswith("}")]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in _whole_lines(folder / "metrics.jsonl")]
