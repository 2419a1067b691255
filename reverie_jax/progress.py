"""Progress of long work: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SPEED_SECONDS = 600.0
"""Time over which a speed is averaged: long enough for several updates of the slowest work."""
_LOG_SECONDS = 60.0
"""Time between two lines where the console is not a terminal."""


def format_rate(rate: float) -> str:
    """Return a rate with three digits, also a slow one, or all of its digits before the point: 0.0123, 12.3, 12,345."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class ProgressBars:
    """A context that shows progress: a bar for each stage on a terminal, otherwise a line every minute.

    Args:
        name: the job, shown before the stage.
        show: False for processes other than the first.
        console: stderr by default.
    """

    def __init__(self, name: str = "", *, show: bool = True, console: Console | None = None):
        self.name, self.console = name, console or Console(stderr=True)
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[int, float]] = {}
        self._logged = time.monotonic()
        self._log = show and not self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=_SPEED_SECONDS,
            disable=not (show and self.console.is_terminal),
        )

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def speed(self, stage: str) -> float:
        """Return a stage's speed in items per second; 0 before there is progress."""
        task = next((task for task in self._progress.tasks if task.id == self._tasks.get(stage)), None)
        if task is None:
            return 0.0
        done, since = self._begun[stage]
        elapsed = self.console.get_time() - since
        return task.speed or ((task.completed - done) / elapsed if elapsed > 0 else 0.0)

    def update(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` items of a stage are finished, with a note behind the bar."""
        label = f"{self.name} {stage}".strip()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(label, total=total, completed=done, note=note)
            self._begun[stage] = done, self.console.get_time()
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)
        if self._log and time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            text = f"reverie: {label}: {count}{note and ', '}{note}"
            self.console.print(text, highlight=False, markup=False)
