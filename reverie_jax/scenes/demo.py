"""The demo: tune a small model twice, with and without rationales, on drawn scenes, and measure the difference."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.tree_sizes import DatasetStats
from reverie_jax.errors import UserError
from reverie_jax.eval.engine import Engine
from reverie_jax.loading import SCENES_BASE, load_model
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.scenes import benchmark, dataset, report
from reverie_jax.scenes.benchmark import Counts
from reverie_jax.train.loop import finetune
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.recipes import RECIPES

ARMS = {"responses": "scenes-responses", "reflective": "scenes-rationales"}


@dataclasses.dataclass(frozen=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        train_images: images that both arms are tuned on.
        test_images: held-out images that all models are evaluated on.
        questions: annotated questions for each training image.
        steps: optimizer steps of each arm; None for the recipe's.
    """

    train_images: int = 800
    test_images: int = 120
    questions: int = 3
    steps: int | None = None


class _StageTimer:
    """Measures and prints the seconds of each stage."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}
        version = importlib.metadata.version("reverie-jax")
        self.console.print(f"reverie {version} on {jax.device_count()} {jax.default_backend()} device(s)")

    @contextlib.contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        started = time.perf_counter()
        self.console.print(f"[bold]{text}[/bold]")
        yield
        spent = time.perf_counter() - started
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
        self.console.print(f"  {spent:.0f} s")


class _Results:
    """What the demo measures, by arm: counts of each seed, and the last run's data and recipe."""

    def __init__(self) -> None:
        self.counts: dict[str, list[Counts]] = {}
        self.stats: dict[str, DatasetStats] = {}
        self.recipes: dict[str, Recipe] = {}
        self.annotated = dataset.AnnotationResult(0, ())

    def scores(self) -> dict[str, Any]:
        """Return the measured part of report.json."""
        counts = {arm: np.stack(tables) if len(tables) > 1 else tables[0] for arm, tables in self.counts.items()}
        tree = self.stats["reflective"]
        return {
            "arms": {arm: benchmark.estimates(table) for arm, table in counts.items()},
            "differences": {
                f"{first}_minus_{second}": benchmark.differences(counts[first], counts[second], report.ROWS)
                for first, second in (("responses", "base"), ("reflective", "base"), ("reflective", "responses"))
            },
            "tokens": {
                "flat": tree.flat_tokens,
                "tree": tree.tokens,
                "by_arm": {
                    arm: {"flat": stats.flat_tokens, "tree": stats.tokens, "taught": stats.edges}
                    for arm, stats in self.stats.items()
                },
            },
        }


def run(out: Path, *, size: DemoSize | None = None, seeds: int = 1, model: str = SCENES_BASE) -> dict[str, Any]:
    """Build data, evaluate the base model, tune and evaluate both arms, and write report.html and report.json.

    Args:
        out: output folder; an earlier demo's files are replaced.
        size: how much to do.
        seeds: repetitions of both arms, each with training data and a random seed of its own.
        model: llava-hf checkpoint to start from.

    Returns:
        The content of report.json.

    Raises:
        UserError: `seeds` is below 1, the model cannot be loaded, or the folder has files of something else.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    size, console, test = size or DemoSize(), Console(), out / "data" / "test"
    base, processor = load_model(model, dtype=jnp.float32)
    _clear(out)
    timer, results = _StageTimer(console), _Results()
    pixels = base.config.vision.image_size
    with timer.stage("data", f"Drawing {size.test_images} held-out scenes that break the prior"):
        dataset.make_test_set(test, size.test_images, size=pixels, seed=0)

    def evaluate(arm: str, tuned: VisionLanguageModel, seed: int) -> None:
        with timer.stage(f"evaluate_{arm}", f"Evaluating the {arm} model" + (f", seed {seed}" if seeds > 1 else "")):
            tuned.decoder.unstack()
            predictions = out / "predictions" / arm / f"seed{seed}"
            benchmark.predict(Engine(tuned, processor), test, predictions)
            results.counts.setdefault(arm, []).append(benchmark.count_predictions(test, predictions))

    evaluate("base", base, 0)
    for seed in range(seeds):
        folder, records = out / "data" / f"train{seed}", out / "data" / f"records{seed}"
        with timer.stage("data", f"Drawing and annotating {size.train_images} training scenes, seed {seed}"):
            results.annotated = dataset.make_training_set(
                folder,
                size.train_images,
                size=pixels,
                questions=size.questions,
                seed=seed,
                plain=size.train_images // 3,
            )
            source = RecordSource(write_records(records, {"train": dataset.read_records(folder)}))
        for arm, name in ARMS.items():
            recipe = dataclasses.replace(RECIPES[name], seed=seed)
            if size.steps is not None:
                recipe = dataclasses.replace(recipe, steps=size.steps, save_steps=size.steps)
            tuned, _ = load_model(model, dtype=jnp.float32)
            with timer.stage(f"train_{arm}", f"Tuning on {arm} ({recipe.steps} steps of {recipe.batch_size} images)"):
                result = finetune(tuned, processor, source, recipe, out / "runs" / arm / f"seed{seed}", console=console)
            results.stats[arm], results.recipes[arm] = result.stats, recipe
            lora.merge(tuned)
            evaluate(arm, tuned, seed)
    total = sum(timer.seconds.values())
    content = {
        **results.scores(),
        "seconds": timer.seconds | {"total": round(total, 2)},
        "recipe": {arm: dataclasses.asdict(recipe) for arm, recipe in results.recipes.items()},
        "data": dataclasses.asdict(size)
        | {"seeds": seeds, "conversations": results.annotated.conversations}
        | {"dropped": len(results.annotated.dropped), "base": str(model)},
        "machine": _describe_machine(),
    }
    _write_report(out, content)
    console.print(report.scores_table("Held-out scenes that break the prior (95 % interval)", content["arms"]))
    console.print(f"{total:.0f} s in total. Report: {out / 'report.html'}")
    return content


def _describe_machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


def _write_report(out: Path, content: dict[str, Any]) -> None:
    """Write report.json and report.html; the page shows the loss and the answers of the first seed."""
    (out / "report.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    curves = {arm: read_metrics(out / "runs" / arm / "seed0") for arm in ARMS}
    predictions = {arm: out / "predictions" / arm / "seed0" for arm in content["arms"]}
    cards = report.gallery(out / "data" / "test", predictions)
    (out / "report.html").write_text(report.render(content, curves, cards), "utf-8")


def _clear(out: Path) -> None:
    """Remove an earlier demo's files.

    Raises:
        UserError: the folder has other files.
    """
    names = {"data", "runs", "predictions", "report.html", "report.json"}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose an output folder with --out")
    others = sorted({path.name for path in out.iterdir()} - names) if out.exists() else []
    if others:
        raise UserError(f"{out}: contains {others[0]!r}, which is not a demo's; choose an empty folder with --out")
    for path in (out / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
