"""`reverie demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole workflow on drawn scenes: build data, tune twice, evaluate, report. Takes minutes on two CPU cores."""

    out: Path = Path("runs/demo")
    """Output folder: report.html, report.json, data, checkpoints, predictions."""
    seeds: int = 1
    """Number of repetitions, each with its own training data and random seed."""
    train_images: int = 3200
    """Number of training images."""
    test_images: int = 250
    """Number of held-out images."""
    steps: int | None = None
    """Optimizer steps of each run; the recipe's if omitted."""
    model: str = "scenes-base"
    """Checkpoint to start from: a folder or hub id, or the small model that ships with the package."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.scenes import demo

        size = demo.DemoSize(train_images=self.train_images, test_images=self.test_images, steps=self.steps)
        demo.run(self.out, size=size, seeds=self.seeds, base=self.model)
