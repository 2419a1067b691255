"""Preemption handling: checkpoint and stop on SIGTERM, and saves by time."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from reverie_jax.errors import UserError

_SYNC_STEPS = 16
"""Steps between which hosts agree on whether a save by time is due."""


class Preempted(UserError):
    """The run received SIGTERM, saved a checkpoint and stopped."""


class Preemption:
    """Context manager that turns SIGTERM into a request to stop after the current step, the same step on all hosts.

    On several hosts JAX's coordination service receives the signal; on one host a signal handler does.

    Args:
        minutes: time between saves; 0 disables saves by time.
    """

    def __init__(self, minutes: float = 0.0):
        self._interval, self._last_save, self._requested = 60 * minutes, time.monotonic(), False
        self._previous_handler: Any = None

    def requested(self, step: int) -> bool:
        """Return whether to save and stop after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._requested

    def save_due(self, step: int) -> bool:
        """Return whether the time between saves has passed; if so, restart it."""
        if not self._interval:
            return False
        due = time.monotonic() - self._last_save >= self._interval
        if jax.process_count() > 1:
            due = step % _SYNC_STEPS == 0 and bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))
        if due:
            self._last_save = time.monotonic()
        return due

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
