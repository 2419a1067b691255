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

    out: Annotated[Positional[Path], common.FOLDER]
    """Output folder: images/, scenes.jsonl with the graphs, and annotation or question files."""
    count: Annotated[int, common.N] = 100
    """Number of scenes."""
    split: Annotated[str, common.option("train|test")] = "train"
    """Kind of scenes: train, with annotations (reverie.json), or test, held out, with POPE files."""
    size: Annotated[int, common.option("PIXELS")] = 128
    """Side of an image, in pixels."""
    seed: common.Seed = 0

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, count=self.count)
        common.check_at_least(32, size=self.size)
        common.check_choice(("train", "test"), split=self.split)
        from reverie_jax.scenes import dataset

        if self.split == "test":
            dataset.make_test_set(self.out, self.count, size=self.size, seed=self.seed)
            print(f"{self.count} held-out scenes with POPE questions: {self.out}")
            return
        annotated = dataset.make_training_set(self.out, self.count, size=self.size, questions=4, seed=self.seed)
        print(f"{self.count} training scenes, {annotated.conversations} conversations: {self.out}")
        common.note(f"dropped: {reason}" for reason in annotated.dropped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Make the small base model from scratch (about an hour on two CPU cores)."""

    out: Annotated[Positional[Path], common.FOLDER]
    """Output folder: a llava-hf checkpoint with tokenizer and model card."""
    seed: common.Seed = 0
    tower_steps: Annotated[int | None, common.N] = None
    """Steps of the vision tower's stage; the recipe's if omitted."""
    steps: common.Steps = None

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, tower_steps=self.tower_steps, steps=self.steps)
        from reverie_jax.scenes import make_base

        make_base.make(self.out, seed=self.seed, tower_steps=self.tower_steps, steps=self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """Tune the small model in many ways, and measure on held-out scenes what each of them does. Takes hours.

    REVERIE's rationales, LRV's negative instructions, RLHF-V's corrections, sentences of the model's own, and ways of
    decoding; learning rates and steps are chosen on validation scenes first. Run it again to resume.
    """

    out: Annotated[Positional[Path], common.FOLDER]
    """Output folder: all trained and evaluated units, search.json, evidence.md and evidence.svg."""
    quick: Annotated[bool, common.FLAG] = False
    """A small part, in about a quarter of an hour: it shows that everything works, not what is true."""
    workers: Annotated[int, common.N] = 2
    """Number of processes, each on a core of its own."""
    model: common.Model = "scenes-base"
    page: Annotated[Path | None, common.FOLDER] = None
    """Folder of the page evidence.md with its figure; the output folder if omitted."""

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, workers=self.workers)
        from reverie_jax.scenes.evidence import run

        run.run(self.out, quick=self.quick, workers=self.workers, model=self.model, page_folder=self.page)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Draw synthetic scenes with exact ground truth, make the small base model that ships with the package, or measure."""

    action: OmitArgPrefixes[
        Annotated[Render, subcommand("render")]
        | Annotated[Pretrain, subcommand("pretrain")]
        | Annotated[Evidence, subcommand("evidence")]
    ]

    def run(self) -> None:
        """Run the subcommand."""
        self.action.run()
