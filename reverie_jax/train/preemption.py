"""SIGTERM as a request: a scheduler that takes a machine back gives a run time to save."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_TOGETHER = 16
"""Steps between which hosts agree on the time."""


class Interruption:
    """While it is entered, SIGTERM ends training at the next step, on all hosts at the same one.

    On several hosts jax's coordination service listens for the signal; alone, a handler of our own does.

    Args:
        minutes: between saves; 0 for none by time.
    """

    def __init__(self, minutes: float = 0.0):
        self._every, self._saved, self._asked = 60 * minutes, time.monotonic(), False
        self._before: Any = None

    def asked(self, step: int) -> bool:
        """Whether to save and end, after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def due(self, step: int) -> bool:
        """Whether a save is due by time; then the next one is due so much later."""
        if not self._every:
            return False
        late = time.monotonic() - self._saved >= self._every
        if jax.process_count() > 1:
            late = step % _TOGETHER == 0 and bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
        if late:
            self._saved = time.monotonic()
        return late

    def __enter__(self) -> Interruption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
