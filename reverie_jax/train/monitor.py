"""What is read from a run while it runs: its numbers, and when it must not go on."""

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
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import StepMetrics, schedule

_REMEMBERED = 50
"""Losses that a spike is measured against; fewer than half of them judge nothing."""


class TrainingFailed(UserError):
    """Training that must not go on."""


class _Pending(NamedTuple):
    number: int
    metrics: StepMetrics
    records: Int32[np.ndarray, "B M"]
    waited: float


class StepMonitor:
    """Reads each step's numbers, one step late on accelerators, so that these never wait for the host.

    Args:
        model: what a step's FLOPs follow from.
        source: to name the records of a step that failed.
        sources: names, as `origin` counts them.
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
        self._losses: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._ready = time.perf_counter()

    def after(self, number: int, metrics: StepMetrics, records: Int32[np.ndarray, "B M"], waited: float) -> None:
        """Takes a step's numbers; those of the one before are read now.

        Args:
            records: of this process's rows.
            waited: seconds for the batch.

        Raises:
            TrainingFailed: the loss is no number, or jumped.
        """
        before, self._pending = self._pending, _Pending(number, metrics, records, waited)
        if before is not None:
            self._read(before)
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Reads what is not read yet."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)

    def _read(self, step: _Pending) -> None:
        sums = {name: np.asarray(value) for name, value in step.metrics.sums.items()}
        numbers = {name: float(value) for name, value in step.metrics._asdict().items() if name != "sums"}
        now = time.perf_counter()
        seconds, self._ready = now - self._ready, now
        self._judge(step, numbers["loss"])
        self.log.write(
            step.number,
            {
                **numbers,
                "tokens_per_second": numbers["tokens"] / seconds,
                "supervised_per_second": numbers["supervised"] / seconds,
                "supervised_share": numbers["supervised"] / max(1.0, numbers["tokens"]),
                "packing": numbers["tokens"] / (self.recipe.batch_size * self.recipe.sequence.length),
                "input_wait": min(1.0, step.waited / seconds),
                **self._work(numbers, seconds),
                "rate": float(schedule(self.recipe.learning_rate, self.recipe)(step.number - 1)),
                "projector_rate": float(schedule(self.recipe.projector_learning_rate, self.recipe)(step.number - 1)),
                **self._parts(sums),
                **self._memory(),
            },
        )

    def _judge(self, step: _Pending, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"step {step.number}: the loss is {loss}; lower the rate or clip gradients. {self._named(step)}"
            )
        usual = statistics.median(self._losses) if len(self._losses) >= _REMEMBERED // 2 else math.inf
        if self.recipe.loss_spike_threshold is not None and loss > usual + self.recipe.loss_spike_threshold:
            raise TrainingFailed(
                f"step {step.number}: the loss jumped from about {usual:.3f} to {loss:.3f}; look at its records, lower the"
                f" rate, or set spike=none to go on whatever happens. {self._named(step)}"
            )
        self._losses.append(loss)

    def _named(self, step: _Pending) -> str:
        ids = [self.records[number - 1].id for number in np.unique(step.records[step.records > 0]).tolist()]
        return f"Its records: {', '.join(ids)}"

    def _parts(self, sums: dict[str, Any]) -> dict[str, float]:
        """Losses by source where there are several, and rewards of pairs."""
        if "pairs" in sums:
            pairs = max(1.0, float(sums.pop("pairs")))
            return {name: float(value) / pairs for name, value in sums.items()}
        if len(self.datasets) < 2:
            return {}
        return {
            f"loss/{name or 'unnamed'}": float(loss) / float(weight)
            for name, loss, weight in zip(self.datasets, sums["source_loss"], sums["source_weight"], strict=True)
            if weight > 0
        }

    def _work(self, numbers: dict[str, float], seconds: float) -> dict[str, float]:
        """Useful TFLOP/s of a device (`costs.FLOPS_FORMULA`), and their share of its peak where that is known."""
        counts = {"tokens": numbers["tokens"], "pairs": numbers["seen"], "edges": numbers["supervised"]}
        flops = costs.model_flops(
            self._config,
            self._sizes,
            self.recipe,
            images=round(numbers["images"]),
            **{name: round(count) for name, count in counts.items()},
        )
        rate, chip = flops / seconds / len(self._devices), chip_of(self._devices[0].device_kind)
        return {"tflops_per_device": rate / 1e12} | ({"mfu": rate / chip.flops} if chip else {})

    def _memory(self) -> dict[str, float]:
        """Largest use of a device's memory so far, in GiB, where devices say it."""
        stats = [device.memory_stats() for device in self._devices if device.process_index == jax.process_index()]
        peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
        return {"hbm_peak_gib": max(peaks) / 2**30} if peaks else {}
