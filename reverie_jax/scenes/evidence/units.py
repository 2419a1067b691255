"""Units of the evidence: a seed's pictures, an arm tuned and evaluated. Each writes its folder once, so that all resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from reverie_jax.data.processor import Processor
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.files import atomic_folder, read_json, write_json
from reverie_jax.loading import SCENES_BASE, load_model
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.scenes import benchmark, dataset
from reverie_jax.scenes.evidence.arms import ARMS, PLAIN_SHARE, Pictures
from reverie_jax.scenes.evidence.samples import draw_descriptions, draw_siblings
from reverie_jax.scenes.graph import Split, World
from reverie_jax.train.loop import finetune
from reverie_jax.train.recipe import Recipe

QUESTIONS = 3
"""Annotated questions about a training picture."""
PLAIN = "plain"
DECODERS: dict[str, tuple[Decoding | None, bool]] = {
    PLAIN: (None, False),
    "reflect": (None, True),
    "contrast-image": (Decoding(benchmark.Scenes.max_new_tokens, contrast="image"), False),
    "contrast-nothing": (Decoding(benchmark.Scenes.max_new_tokens, contrast="nothing"), False),
}
"""Ways of decoding, and whether the model answers, explains and answers again."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much the evidence does.

    Attributes:
        seeds: repetitions, each with training pictures and a random seed of its own.
        budgets: numbers of training pictures.
        main: the budget at which all arms are compared.
        core_seeds: repetitions, at other budgets than the main one, of the arms in `schedule.CORE`; and those that are
            decoded in all ways.
        few_seeds: repetitions, at other budgets than the main one, of the other arms.
        passes: passes over pictures that are searched; a budget with more pictures is passed over once.
        test: test pictures.
        held_out: test pictures of each hold-out.
        validation: validation pictures.
    """

    seeds: int = 8
    budgets: tuple[int, ...] = (800, 200, 3200)
    main: int = 800
    core_seeds: int = 3
    few_seeds: int = 1
    passes: tuple[int, ...] = (800, 1600)
    test: int = 120
    held_out: int = 60
    validation: int = 100


TESTS: dict[str, tuple[World, Split]] = {
    "test": (World.broken(), "test"),
    "pairs": (World.new_pairs(), "test"),
    "compositions": (World.new_compositions(), "test"),
    "validation": (World.broken(), "validation"),
}
"""Sets of pictures that models are evaluated on."""
HELD_OUT = ("pairs", "compositions")
SEARCH_SEED = 1000
"""Seed of the training pictures of the search; those of the comparison count from 0."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """One arm, tuned once and evaluated.

    Attributes:
        arm: name in `arms.ARMS`.
        pictures: training pictures.
        learning_rate: of the adapters; the projector's is a tenth.
        passes: passes over pictures; a step has a batch of them.
        seed: of the pictures and of the run.
        tests: sets that the model is evaluated on.
        decoders: ways of decoding; those other than `plain` on the first set alone.
    """

    arm: str
    pictures: int
    learning_rate: float
    passes: int
    seed: int
    tests: tuple[str, ...] = ("test", *HELD_OUT)
    decoders: tuple[str, ...] = (PLAIN,)

    @property
    def name(self) -> str:
        """Name of the unit's folder."""
        return f"{self.arm}-{self.pictures}-{self.learning_rate:g}-{self.passes}-seed{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """The unit's recipe."""
        base = ARMS[self.arm].recipe
        steps = max(1, round(self.passes / base.batch_size))
        return dataclasses.replace(
            base,
            steps=steps,
            save_steps=steps,
            learning_rate=self.learning_rate,
            projector_learning_rate=self.learning_rate / 10,
            seed=self.seed,
        )


class Evidence:
    """A folder of evidence, with all that its units share.

    Args:
        out: the folder.
        sizes: how much to do.
        model: checkpoint to start from.
    """

    def __init__(self, out: Path, sizes: Sizes, model: str = SCENES_BASE):
        self.out, self.sizes, self.model = out, sizes, model
        self._pictures: dict[int, Pictures] = {}

    def load(self) -> tuple[VisionLanguageModel, Processor]:
        """Return a fresh copy of the base model, and its processor."""
        return load_model(self.model, dtype=jnp.float32)

    def test_folder(self, name: str) -> Path:
        """Return the folder of a set of `TESTS`; it is written if missing."""
        folder = self.out / "data" / name
        if not folder.exists():
            count = {"test": self.sizes.test, "validation": self.sizes.validation}.get(name, self.sizes.held_out)
            world, split = TESTS[name]
            pixels = self.load()[0].config.vision.image_size
            with atomic_folder(folder) as part:
                dataset.make_test_set(part, count, size=pixels, seed=0, world=world, split=split)
        return folder

    def pictures(self, seed: int) -> Pictures:
        """Return the training pictures of a seed, with the base model's texts about them; they are made if missing."""
        if seed not in self._pictures:
            folder = self.out / "data" / f"train{seed}"
            count = max(self.sizes.budgets) if seed < self.sizes.core_seeds else self.sizes.main
            if not folder.exists():
                with atomic_folder(folder) as part:
                    self._make_pictures(part, count, seed)
            texts = read_json(folder / "samples.json")
            graphs = dataset.read_graphs(folder)
            mixture = dataset.read_records(folder)
            records = {record.id: record for record in (mixture[n] for n in range(len(mixture)))}
            drawn = len(texts["descriptions"])
            siblings = [[(one[0], one[1], one[2]) for one in row] for row in texts["siblings"]]
            # One seed at a time: the records hold the encoded images.
            self._pictures = {
                seed: Pictures(
                    [records[name] for name in graphs][:drawn],
                    [records[name] for name in graphs][drawn:],
                    list(graphs.values())[:drawn],
                    texts["descriptions"],
                    siblings,
                    seed,
                )
            }
        return self._pictures[seed]

    def _make_pictures(self, folder: Path, count: int, seed: int) -> None:
        model, processor = self.load()
        pixels = model.config.vision.image_size
        plain = round(PLAIN_SHARE * count)
        dataset.make_training_set(folder, count, size=pixels, questions=QUESTIONS, seed=seed, plain=plain)
        graphs = dict(itertools.islice(dataset.read_graphs(folder).items(), count))
        images = [(folder / dataset.IMAGES / name).read_bytes() for name in graphs]
        model.decoder.unstack()
        engine = Engine(model, processor)
        descriptions = draw_descriptions(engine, images, seed)
        siblings = draw_siblings(engine, images, list(graphs.values()), seed)
        write_json(folder / "samples.json", {"descriptions": descriptions, "siblings": siblings})

    def run(self, unit: Unit) -> None:
        """Tune and evaluate, unless it was done before; write the counts and what was trained to the unit's folder."""
        folder = self.out / "units" / unit.name
        with _once(folder) as part:
            if part is None:
                return
            started = time.perf_counter()
            records = ARMS[unit.arm].records(self.pictures(unit.seed), unit.pictures)
            model, processor = self.load()
            with tempfile.TemporaryDirectory() as scratch:
                quiet = Console(quiet=True)
                result = finetune(model, processor, records, unit.recipe, Path(scratch) / "run", console=quiet)
                trained = time.perf_counter() - started
                lora.merge(model)
                keep = unit.seed == 0 and unit.pictures == self.sizes.main
                self.evaluate(model, processor, part, unit.tests, unit.decoders, keep=keep)
            write_json(
                part / "unit.json",
                dataclasses.asdict(unit)
                | {
                    "records": len(records),
                    "stats": dataclasses.asdict(result.stats),
                    "steps": unit.recipe.steps,
                    "train_seconds": round(trained, 2),
                    "seconds": round(time.perf_counter() - started, 2),
                },
            )

    def run_base(self) -> None:
        """Evaluate the base model, with every way of decoding."""
        with _once(self.out / "units" / "base") as part:
            if part is not None:
                model, processor = self.load()
                self.evaluate(model, processor, part, tuple(TESTS), tuple(DECODERS), keep=True)

    def evaluate(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        folder: Path,
        tests: Sequence[str],
        decoders: Sequence[str],
        *,
        keep: bool,
    ) -> None:
        """Write the counts of a model to `folder`, one file for each set and way of decoding.

        On pictures with what is held out of training, only short answers are counted.

        Args:
            model: to evaluate; its layers are unstacked.
            processor: its own.
            folder: to write to.
            tests: sets of `TESTS`.
            decoders: ways of `DECODERS`; other ways than plain on the first set alone.
            keep: keep the predictions.
        """
        model.decoder.unstack()
        engine = Engine(model, processor)
        for name in decoders:
            decoding, reflect = DECODERS[name]
            for test in tests if name == PLAIN else tests[:1]:
                data, out = self.test_folder(test), folder / f"{test}-{name}"
                short = reflect or test in HELD_OUT
                benchmark.predict(engine, data, out, decoding, reflect=reflect, short=short)
                np.save(folder / f"{test}-{name}.npy", benchmark.count_predictions(data, out, partial=short))
                if not keep:
                    shutil.rmtree(out)

    def counts(self, unit: str, test: str, decoder: str = PLAIN) -> np.ndarray:
        """Return a unit's counts, float [pictures, columns] (see `benchmark.COLUMNS`)."""
        return np.asarray(np.load(self.out / "units" / unit / f"{test}-{decoder}.npy"))

    def is_done(self, unit: str) -> bool:
        """Return whether a unit's folder is complete."""
        return (self.out / "units" / unit).exists()

    def facts(self, unit: str) -> dict[str, Any]:
        """Return what a unit's run recorded."""
        content: dict[str, Any] = json.loads((self.out / "units" / unit / "unit.json").read_text("utf-8"))
        return content


@contextlib.contextmanager
def _once(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to write, which is renamed to `folder` at the end; None if `folder` exists."""
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as part:
        yield part
