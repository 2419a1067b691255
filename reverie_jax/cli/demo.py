"""`reverie demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from reverie_jax.cli import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole workflow on drawn scenes: build data, tune twice, evaluate, report. Takes minutes on two CPU cores."""

    out: Annotated[Path, common.FOLDER] = Path("runs/demo")
    """Output folder: report.html, report.json, data, checkpoints, predictions."""
    seeds: Annotated[int, common.N] = 1
    """Number of repetitions, each with its own training data and random seed."""
    train_images: Annotated[int, common.N] = 800
    """Number of training images."""
    test_images: Annotated[int, common.N] = 120
    """Number of held-out images."""
    steps: common.Steps = None
    model: common.Model = "scenes-base"

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(
            1, seeds=self.seeds, train_images=self.train_images, test_images=self.test_images, steps=self.steps
        )
        from reverie_jax.scenes import demo

        size = demo.DemoSize(train_images=self.train_images, test_images=self.test_images, steps=self.steps)
        demo.run(self.out, size=size, seeds=self.seeds, model=self.model)
