"""Step monitor: throughput, MFU and memory of each step; stops a run on NaN or a loss spike."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.train.metrics import MetricsLog
from reverie_jax.train.plan import costs
from reverie_jax.train.plan.topology import chip_of
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.step import StepMetrics, schedule

_MEDIAN_STEPS = 50
"""Steps whose median loss a spike is measured against; with fewer than half of them no spike is detected."""


class TrainingFailed(UserError):
    """A run that must not continue: the loss is not finite or jumped, or the last checkpoint was not written."""


class _Pending(NamedTuple):
    number: int
    metrics: StepMetrics
    records: Int32[np.ndarray, "B M"]
    waited: float


class StepMonitor:
    """Reader of each step's metrics; one step late on accelerators, so that they never wait for the host.

    Args:
        model: its sizes give the FLOPs of a step.
        records: training records, to name those of a failed step.
        datasets: names, in the order of `Batch.origin`.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        records: Sequence[ImageRecord],
        datasets: Sequence[str],
        recipe: Recipe,
        mesh: Mesh,
        log: MetricsLog,
    ):
        self.records, self.datasets, self.recipe, self.log = records, datasets, recipe, log
        self._config, self._sizes = model.config, costs.Sizes.of(model)
        self._devices = mesh.devices.reshape(-1).tolist()
        # Several fake devices on few cores can deadlock where steps are not waited for.
        self._late = jax.default_backend() != "cpu"
        self._pending: _Pending | None = None
        self._losses: collections.deque[float] = collections.deque(maxlen=_MEDIAN_STEPS)
        self._ready = time.perf_counter()

    def after(self, number: int, metrics: StepMetrics, records: Int32[np.ndarray, "B M"], waited: float) -> None:
        """Take a step's metrics and read those of the previous step.

        Args:
            number: of the step, from 1.
            metrics: of the step, on the device.
            records: record numbers of this process's sequences, from 1; 0 for none.
            waited: seconds spent waiting for the batch.

        Raises:
            TrainingFailed: the loss is not finite or jumped.
        """
        previous, self._pending = self._pending, _Pending(number, metrics, records, waited)
        if previous is not None:
            self._read(previous)
        if not self._late:
            self.flush()

    def flush(self) -> None:
        """Read the metrics that are still pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)

    def restart_clock(self) -> None:
        """Leave out of the next step's time what has passed since the last one: an evaluation is no part of a step."""
        self._ready = time.perf_counter()

    def _read(self, step: _Pending) -> None:
        sums = {name: np.asarray(value) for name, value in step.metrics.sums.items()}
        numbers = {name: float(value) for name, value in step.metrics._asdict().items() if name != "sums"}
        now = time.perf_counter()
        seconds, self._ready = now - self._ready, now
        self._check(step, numbers["loss"])
        self.log.write(
            step.number,
            {
                **numbers,
                "tokens_per_second": numbers["tokens"] / seconds,
                "supervised_per_second": numbers["supervised"] / seconds,
                "supervised_share": numbers["supervised"] / max(1.0, numbers["tokens"]),
                "packing": numbers["tokens"] / (self.recipe.batch_size * self.recipe.sequence.length),
                "input_wait": min(1.0, step.waited / seconds),
                **self._utilization(numbers, seconds),
                "learning_rate": self._scheduled(self.recipe.learning_rate, step.number),
                "projector_learning_rate": self._scheduled(self.recipe.projector_learning_rate, step.number),
                **self._means(sums),
                **self._memory(),
            },
        )

    def _scheduled(self, peak: float, number: int) -> float:
        return float(schedule(peak, self.recipe)(number - 1))

    def _check(self, step: _Pending, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"step {step.number}: the loss is {loss}; lower learning_rate or set max_grad_norm. {self._ids(step)}"
            )
        usual = statistics.median(self._losses) if len(self._losses) >= _MEDIAN_STEPS // 2 else math.inf
        if self.recipe.loss_spike_threshold is not None and loss > usual + self.recipe.loss_spike_threshold:
            raise TrainingFailed(
                f"step {step.number}: the loss jumped from about {usual:.3f} to {loss:.3f}; check its records, lower"
                f" learning_rate, or set loss_spike_threshold=none to continue. {self._ids(step)}"
            )
        self._losses.append(loss)

    def _ids(self, step: _Pending) -> str:
        ids = [self.records[number - 1].id for number in np.unique(step.records[step.records > 0]).tolist()]
        return f"Records: {', '.join(ids)}"

    def _means(self, sums: dict[str, Any]) -> dict[str, float]:
        """Return the loss of each of several datasets, or the rewards of preference pairs; and what the routers did."""
        routers = {name: sums.pop(name) for name in list(sums) if name.startswith("router")}
        means = {}
        if routers:
            count = float(routers.pop("routers"))
            load = routers.pop("router_load") / count
            means = {name: float(value) / count for name, value in routers.items()}
            means |= {f"router_load/{expert}": float(share) for expert, share in enumerate(load)}
        if "pairs" in sums:
            pairs = max(1.0, float(sums.pop("pairs")))
            return means | {name: float(value) / pairs for name, value in sums.items()}
        if len(self.datasets) < 2:
            return means
        return means | {
            f"loss/{name or 'unnamed'}": float(loss) / float(weight)
            for name, loss, weight in zip(self.datasets, sums["dataset_loss"], sums["dataset_weight"], strict=True)
            if weight > 0
        }

    def _utilization(self, numbers: dict[str, float], seconds: float) -> dict[str, float]:
        """Return useful TFLOP/s per device (`costs.FLOPS_FORMULA`), and MFU if the device's peak is known."""
        counts = {
            "tokens": numbers["tokens"],
            "pairs": numbers["attention_pairs"],
            "edges": numbers["supervised"],
            "images": numbers["images"],
        }
        flops = costs.model_flops(
            self._config, self._sizes, self.recipe, **{name: round(count) for name, count in counts.items()}
        )
        rate, chip = flops / seconds / len(self._devices), chip_of(self._devices[0].device_kind)
        return {"tflops_per_device": rate / 1e12} | ({"mfu": rate / chip.flops} if chip else {})

    def _memory(self) -> dict[str, float]:
        """Return the peak memory use of a device in GiB, if devices report it."""
        stats = [device.memory_stats() for device in self._devices if device.process_index == jax.process_index()]
        peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
        return {"hbm_peak_gib": max(peaks) / 2**30} if peaks else {}
