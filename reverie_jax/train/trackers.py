"""Trackers: W&B, MLflow and trackio. Each is imported only where it is named, and works in a thread of its own.

A tracker that fails stops nothing: it is said once, and what it lacks is sent again until the run ends.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from reverie_jax.errors import UserError
from reverie_jax.files import read_json, write_json

_log = logging.getLogger(__name__)

IDS = "trackers.json"
"""File of a run folder: the id of the tracked run by tracker, so that a resumed run continues it."""
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 600.0
"""Seconds before a failed call is repeated: twice as many after each failure, up to a limit."""
_SAMPLE_TRIES = 8
"""Calls with the same samples; together about 20 minutes."""
_LAST_WAIT = 20.0
"""Seconds that the end of a run waits for its trackers; schedulers kill soon after SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Where a run is tracked, beside metrics.jsonl and TensorBoard.

    Attributes:
        trackers: of `TRACKERS`; addresses and keys are those of their own environment variables.
        project: W&B's or trackio's project, MLflow's experiment.
        run: name of the tracked run; that of the run folder if empty.

    Raises:
        UserError: a tracker is unknown or not installed, or listed twice.
    """

    trackers: tuple[str, ...] = ()
    project: str = "reverie-jax"
    run: str = ""

    def __post_init__(self) -> None:
        for name in self.trackers:
            if name not in TRACKERS or self.trackers.count(name) > 1:
                raise UserError(f"--tracker {name}: must be {' or '.join(TRACKERS)}, each at most once")
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a folder of that name, as W&B makes them, is no package
                raise UserError(f"--tracker {name} needs the {name} package: pip install {name}")


class RunInfo(NamedTuple):
    """What a tracked run is opened with.

    Attributes:
        project: see `Tracking`.
        name: of the tracked run.
        id: of the tracked run to continue; None for a new one.
        folder: of the run.
        config: what identifies the run, as plain nested values.
    """

    project: str
    name: str
    id: str | None
    folder: Path
    config: Mapping[str, Any]


class SampleRow(NamedTuple):
    """A sample as it is logged.

    Attributes:
        id: of the record.
        picture: None for a question without an image.
        before: the answer at the run's first sampled step: 0, unless sampling was turned on later.
        now: the answer at this step.
    """

    id: str
    picture: Image.Image | None
    question: str
    before: str
    now: str


class Tracker:
    """A tracked run, opened by the constructor. Any method may raise anything.

    Attributes:
        id: continues the tracked run in another process.
        last_step: newest step that it has something of; 0 for none, or where that is not known.
    """

    id: str
    last_step: int

    def __init__(self, info: RunInfo):
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        raise NotImplementedError

    def log_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Log samples of a step."""
        raise NotImplementedError

    def finish(self, succeeded: bool) -> None:
        """End the tracked run."""
        raise NotImplementedError


_COLUMNS = ("step", "picture", "question", "before", "now")


class WandbTracker(Tracker):
    """A run of Weights & Biases."""

    def __init__(self, info: RunInfo):
        wandb: Any = importlib.import_module("wandb")
        self._wandb, self.id = wandb, info.id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=info.project,
            name=info.name,
            id=self.id,
            resume="allow",
            dir=str(info.folder),
            config=dict(info.config),
            reinit="create_new",
            settings=wandb.Settings(console="off"),  # a progress bar makes no log
        )
        # W&B drops what comes for a step that is over; by this metric, what is sent again is kept.
        self._run.define_metric("*", step_metric="step")
        self.last_step = int(self._run.summary.get("step") or 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self._run.log({**values, "step": step})

    def log_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Log a table of a step's samples."""
        picture = self._wandb.Image
        rows = [[step, s.picture and picture(s.picture), s.question, s.before, s.now] for s in samples]
        self._run.log({"samples": self._wandb.Table(columns=list(_COLUMNS), data=rows), "step": step})

    def finish(self, succeeded: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if succeeded else 1)


class MlflowTracker(Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, info: RunInfo):
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        if info.id is None:
            experiment = self._client.get_experiment_by_name(info.project)
            where = self._client.create_experiment(info.project) if experiment is None else experiment.experiment_id
            self.id, self.last_step = self._client.create_run(where, run_name=info.name).info.run_id, 0
            param = self._mlflow.entities.Param  # at most 100 in a call
            params = [param(name, str(value)[:500]) for name, value in _flat(info.config)]
            for start in range(0, len(params), 100):
                self._client.log_batch(self.id, params=params[start : start + 100])
        else:
            self.id = info.id
            self._client.update_run(self.id, status="RUNNING")
            self.last_step = max((m.step for m in self._client.get_metric_history(self.id, "loss")), default=0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step; in their names, characters that MLflow refuses are underscores."""
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        names = {name: re.sub(r"[^\w\-. /]", "_", name) for name in values}
        self._client.log_batch(self.id, metrics=[metric(names[name], values[name], now, step) for name in values])

    def log_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Add a step's samples to the table samples.json."""
        blank = Image.new("RGB", (1, 1))  # a column has pictures only, or none
        rows = [(step, self._mlflow.Image(s.picture or blank), s.question, s.before, s.now) for s in samples]
        table = dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        self._client.log_table(self.id, table, "samples.json")

    def finish(self, succeeded: bool) -> None:
        """End the run."""
        self._client.set_terminated(self.id, "FINISHED" if succeeded else "FAILED")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, with names as `recipe.rank`."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class TrackioTracker(Tracker):
    """A run of trackio, local or on the Space of TRACKIO_SPACE_ID."""

    def __init__(self, info: RunInfo):
        self._trackio: Any = importlib.import_module("trackio")
        # trackio continues runs by name.
        self.id = info.id or f"{info.name}-{uuid.uuid4().hex[:8]}"
        self._run = self._trackio.init(
            project=info.project,
            name=self.id,
            resume="allow",
            config=dict(info.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.last_step = getattr(self._run, "_next_step", 1) - 1  # there is no public name for it

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self._run.log(dict(values), step=step)

    def log_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Log a table of a step's samples."""
        picture = self._trackio.Image
        rows = [[step, s.picture and picture(s.picture), s.question, s.before, s.now] for s in samples]
        self._run.log({"samples": self._trackio.Table(columns=list(_COLUMNS), data=rows)}, step=step)

    def finish(self, succeeded: bool) -> None:
        """End the run."""
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker, "trackio": TrackioTracker}


class _Sender(threading.Thread):
    """A tracker's thread: it opens the tracked run, then sends what it is given, in order.

    What fails is said once and repeated until it succeeds or the run ends. What the tracked run has from before is not sent
    again, but for its newest step, of which it may have only a part.
    """

    def __init__(self, name: str, connect: Callable[[], Tracker]):
        super().__init__(name=f"tracker {name}", daemon=True)
        self.label, self._connect = name, connect
        self._items: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._tracker: Tracker | None = None
        self._failed, self._ending, self._left = False, threading.Event(), threading.Event()

    def put(self, step: int, method: str, value: Any) -> None:
        """Send something of a step: the tracker's method of that name is called with the step and the value."""
        self._items.put((step, method, value))

    def run(self) -> None:
        """Work until `finish` is sent."""
        if not self._repeat(self._open):
            return
        while True:
            step, method, value = self._items.get()
            assert self._tracker is not None
            if method == "finish":
                self._repeat(functools.partial(self._tracker.finish, value))
                return
            call = functools.partial(getattr(self._tracker, method), step, value)
            # Samples have many forms; what a tracker refuses for good must not hold up the metrics behind it.
            tries = _SAMPLE_TRIES if method == "log_samples" else None
            if step >= self._tracker.last_step and not self._repeat(call, tries):
                return

    def _open(self) -> None:
        self._tracker = self._connect()

    def _repeat(self, action: Callable[[], object], tries: int | None = None) -> bool:
        """Repeat an action until it succeeds, or `tries` times at most; return False if the run ends before."""
        wait, number = _FIRST_WAIT, 0
        while True:
            number += 1
            try:
                action()
                return True
            except Exception as error:  # of three libraries and their transports
                if not self._failed:
                    self._failed = True
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    _log.error(
                        "tracker %s: %s; training goes on, and what it lacks is sent later. metrics.jsonl has everything",
                        *(self.label, reason),
                    )
            if number == tries:
                _log.error("tracker %s: samples are left out; samples.jsonl has them", self.label)
                return True
            # When the run ends, it is tried at once and again until there is no time left.
            if self._ending.wait(wait) and self._left.wait(_FIRST_WAIT / 10):
                return False
            wait = min(2 * wait, _LONGEST_WAIT)

    def end(self, succeeded: bool) -> None:
        """Have the tracked run ended behind all that was sent."""
        self.put(0, "finish", succeeded)
        self._ending.set()

    def leave(self, deadline: float) -> None:
        """Wait until `deadline` (`time.monotonic`), then go on without it; say if it lacks something."""
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            self._left.set()
            _log.error("tracker %s: does not have everything; metrics.jsonl and samples.jsonl do", self.label)


class Trackers:
    """The trackers of a run; only process 0 has any.

    Args:
        tracking: which.
        folder: of the run.
        config: what identifies the run.
        resumed: step that the run continues from; 0 begins new tracked runs.
    """

    def __init__(self, tracking: Tracking, folder: Path, config: Mapping[str, Any], resumed: int):
        self._path, self._lock = folder / IDS, threading.Lock()
        ids = read_json(self._path) if resumed and self._path.exists() else {}
        self._ids: dict[str, str] = ids

        def connect(name: str) -> Tracker:
            info = RunInfo(tracking.project, tracking.run or folder.resolve().name, self._ids.get(name), folder, config)
            tracker = TRACKERS[name](info)
            with self._lock:
                self._ids[name] = tracker.id
                write_json(self._path, self._ids)
            return tracker

        self._senders = [_Sender(name, functools.partial(connect, name)) for name in tracking.trackers]

    def start(self) -> None:
        """Open the tracked runs, in the background."""
        for sender in self._senders:
            sender.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics of a step."""
        for sender in self._senders:
            sender.put(step, "log", dict(values))

    def log_samples(self, step: int, samples: Sequence[SampleRow]) -> None:
        """Send samples of a step."""
        for sender in self._senders:
            sender.put(step, "log_samples", samples)

    def finish(self, succeeded: bool) -> None:
        """End the tracked runs; wait for them for a limited time."""
        deadline = time.monotonic() + _LAST_WAIT
        for sender in self._senders:
            sender.end(succeeded)
        for sender in self._senders:
            sender.leave(deadline)
