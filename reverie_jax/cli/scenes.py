"""`reverie scenes`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from reverie_jax.cli import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Render:
    """Draw scenes: images, exact scene graphs, and annotations or POPE questions."""

    out: Positional[Path]
    """Output folder: images/, scenes.jsonl with the graphs, and annotation or question files."""
    count: int = 100
    """Number of scenes."""
    questions: str = "rationales"
    """rationales: training scenes with reverie.json. pope: held-out scenes that break the prior, with POPE files."""
    size: int = 128
    """Side of an image, in pixels."""
    seed: int = 0
    """Random seed."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.scenes import dataset

        common.at_least(1, count=self.count)
        common.at_least(32, size=self.size)
        common.one_of(("rationales", "pope"), questions=self.questions)
        if self.questions == "pope":
            dataset.make_test_set(self.out, self.count, size=self.size, seed=self.seed)
            print(f"{self.count} held-out scenes with POPE questions: {self.out}")
            return
        made = dataset.make_training_set(self.out, self.count, size=self.size, questions=4, seed=self.seed)
        print(f"{self.count} training scenes, {made.conversations} conversations: {self.out}")
        common.note(f"dropped: {reason}" for reason in made.dropped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Make the small base model from scratch (about half an hour on two CPU cores)."""

    out: Positional[Path]
    """Output folder: a llava-hf checkpoint with tokenizer and model card."""
    seed: int = 0
    """Random seed."""
    tower_steps: int | None = None
    """Steps of the vision tower's stage; the recipe's if omitted."""
    steps: int | None = None
    """Optimizer steps of the language stage; the recipe's if omitted."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.scenes import make_base

        make_base.make(self.out, seed=self.seed, tower_steps=self.tower_steps, steps=self.steps)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Draw synthetic scenes with exact ground truth, or make the small base model that ships with the package."""

    action: OmitArgPrefixes[Annotated[Render, subcommand("render")] | Annotated[Pretrain, subcommand("pretrain")]]

    def run(self) -> None:
        """Run the subcommand."""
        self.action.run()
