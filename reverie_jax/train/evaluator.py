"""Evaluation during training: the interface of evaluators. How they answer is known above `train` alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jax.sharding import Mesh

from reverie_jax.data.processor import Processor
from reverie_jax.models import VisionLanguageModel


class Snapshot(NamedTuple):
    """A model during training.

    Attributes:
        step: steps taken so far.
        model: with its adapters, on the run's mesh. It shares the arrays of the training state: keep none of them.
        processor: of the run.
        mesh: of the run.
        folder: of the run.
    """

    step: int
    model: VisionLanguageModel
    processor: Processor
    mesh: Mesh
    folder: Path


class Sample(NamedTuple):
    """A question about a training or held-out image, and the model's answer now.

    Attributes:
        id: of the record.
        image: the encoded file; empty for a question without an image.
    """

    id: str
    image: bytes
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What evaluators found at a step.

    Attributes:
        metrics: for metrics.jsonl, TensorBoard and trackers; the same in every process.
        score: by which the best checkpoint is chosen, the higher the better; None for none.
        samples: for samples.jsonl, TensorBoard and trackers.
    """

    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    score: float | None = None
    samples: Sequence[Sample] = ()


@runtime_checkable
class Evaluator(Protocol):
    """Looks at the model every `every` steps and after the last one; several processes call it alike."""

    @property
    def every(self) -> int:
        """Steps between two calls, at least 1."""

    @property
    def at_start(self) -> bool:
        """Whether it is called before the first step too."""

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        """Evaluate the model."""


@dataclasses.dataclass(frozen=True)
class Evaluators:
    """The evaluators of a run.

    Attributes:
        all: in the order in which they are called; the first score counts.
        graph: of the model.
        processor: of the run.
        mesh: of the run.
        folder: of the run.
        last: the run's last step.
    """

    all: Sequence[Evaluator]
    graph: nnx.GraphDef[VisionLanguageModel]
    processor: Processor
    mesh: Mesh
    folder: Path
    last: int

    def due(self, step: int) -> list[Evaluator]:
        """Return those to call after a step; 0 stands for before the first one."""
        return [one for one in self.all if (one.at_start if not step else step % one.every == 0 or step == self.last)]

    def __call__(self, step: int, params: nnx.State[Any, Any], frozen: nnx.State[Any, Any]) -> Evaluation:
        """Call those that are due, with trained and frozen parameters; return what all of them found."""
        model = nnx.merge(self.graph, params, frozen)
        found = [one(Snapshot(step, model, self.processor, self.mesh, self.folder)) for one in self.due(step)]
        return Evaluation(
            {name: value for one in found for name, value in one.metrics.items()},
            next((one.score for one in found if one.score is not None), None),
            [sample for one in found for sample in one.samples],
        )
