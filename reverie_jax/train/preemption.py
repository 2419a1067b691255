"""Preemption handling: checkpoint and stop on SIGTERM or Ctrl-C, and saves by time."""

from __future__ import annotations

import os
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
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Preempted(UserError):
    """The run received SIGTERM or Ctrl-C, saved a checkpoint and stopped.

    Attributes:
        exit_code: of the command, 130 after Ctrl-C, as a shell reports it; else that of any `UserError`.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 130 if signal_number == signal.SIGINT else 2


class Preemption:
    """Context manager that turns SIGTERM and Ctrl-C into a request to stop after the current step.

    On several hosts JAX's coordination service receives SIGTERM, so that all stop after the same step; Ctrl-C then ends the
    process at once. On one host a signal handler does; a second Ctrl-C ends the process at once.

    Args:
        minutes: time between saves; 0 disables saves by time.
    """

    def __init__(self, minutes: float = 0.0):
        self._interval, self._last_save = 60 * minutes, time.monotonic()
        self._received: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    @property
    def signal_number(self) -> int:
        """The signal that asked to stop."""
        return self._received or signal.SIGTERM

    def requested(self, step: int) -> bool:
        """Return whether to save and stop after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received is not None

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
            # A job in the background of a script ignores Ctrl-C, and goes on doing so.
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        # Not by `print` or logging: the signal may have interrupted one of them.
        text = f"reverie: {_SIGNALS[signal.Signals(number)]}: saving after this step; press Ctrl-C to stop at once\n"
        os.write(2, text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
