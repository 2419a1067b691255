"""The main job on the embedded world: tune the base twice, with and without rationales, and measure what that did."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import reverie_jax
from reverie_jax.data.pipeline import DatasetStats
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.errors import UserError
from reverie_jax.eval.engine import Engine
from reverie_jax.loading import SCENES_BASE, load_model
from reverie_jax.models import lora
from reverie_jax.scenes import benchmark, dataset, report
from reverie_jax.scenes.benchmark import SceneCounts
from reverie_jax.train.loop import train
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.recipes import RECIPES, Recipe

ARMS = {"responses": "scenes-responses", "reflective": "scenes-rationales"}


@dataclasses.dataclass(frozen=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        train_images: pictures that both arms are tuned on.
        test_images: held-out pictures that everything is measured on.
        questions: annotated questions a training picture.
        steps: optimizer steps of each arm; None for the recipe's.
    """

    train_images: int = 3200
    test_images: int = 250
    questions: int = 4
    steps: int | None = None


class _Clock:
    """Seconds by stage, said aloud as stages end."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}
        self.console.print(
            f"reverie {reverie_jax.__version__} on {jax.device_count()} {jax.default_backend()} device(s)"
        )

    @contextlib.contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        started = time.perf_counter()
        self.console.print(f"[bold]{text}[/bold]")
        yield
        spent = time.perf_counter() - started
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
        self.console.print(f"  {spent:.0f} s")


def run(out: Path, *, size: DemoSize | None = None, seeds: int = 1, base: str = SCENES_BASE) -> dict[str, Any]:
    """Builds data, evaluates the base, tunes and evaluates both arms, and writes report.html and report.json in `out`.

    Args:
        out: run folder; what an earlier demo left there is replaced.
        seeds: how many times to repeat both arms, each on training data and randomness of its own.
        base: llava-hf checkpoint to start from.

    Returns:
        What report.json holds.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one run is needed")
    size, console, test = size or DemoSize(), Console(), out / "data" / "test"
    model, processor = load_model(base, dtype=jnp.float32)
    _clear(out)
    clock = _Clock(console)
    pixels = model.config.vision.image_size
    with clock.stage("data", f"Drawing {size.test_images} held-out scenes that break the prior"):
        dataset.make_test_set(test, size.test_images, size=pixels, seed=0)
    counts: dict[str, SceneCounts] = {}
    per_seed: dict[str, list[float]] = {arm: [] for arm in ("base", *ARMS)}

    def evaluate(arm: str, model: Any, seed: int) -> None:
        with clock.stage(f"evaluate_{arm}", f"Asking the {arm} model" + (f", seed {seed}" if seeds > 1 else "")):
            predictions = out / "predictions" / arm / f"seed{seed}"
            benchmark.predict(Engine(model, processor), test, predictions)
            found = benchmark.score(test, predictions)
        per_seed[arm].append(round(float(benchmark.pope.mean_f1(found.all_pope.sum(0))), 4))
        counts[arm] = counts[arm] + found if arm in counts else found

    evaluate("base", model, 0)
    surveys: dict[str, DatasetStats] = {}
    recipes: dict[str, Recipe] = {}
    annotated = None
    for seed in range(seeds):
        folder = out / "data" / f"train{seed}"
        with clock.stage("data", f"Drawing and annotating {size.train_images} training scenes, seed {seed}"):
            annotated = dataset.make_training_set(
                folder, size.train_images, size=pixels, questions=size.questions, seed=seed
            )
            records = write_records(out / "data" / f"records{seed}", {"train": dataset.records(folder)})
        source = RecordSource(records)
        for arm, name in ARMS.items():
            recipe = dataclasses.replace(RECIPES[name], seed=seed)
            if size.steps is not None:
                recipe = dataclasses.replace(recipe, steps=size.steps, save_steps=size.steps)
            tuned, _ = load_model(base, dtype=jnp.float32)
            with clock.stage(f"train_{arm}", f"Tuning on {arm} ({recipe.steps} steps of {recipe.batch_size} images)"):
                result = train(tuned, processor, source, recipe, out / "runs" / arm / f"seed{seed}", console=console)
            surveys[arm], recipes[arm] = result.stats, recipe
            lora.merge(tuned)
            evaluate(arm, tuned, seed)
    found = {
        arm: benchmark.estimates(table) | {"pope_mean_f1_per_seed": per_seed[arm]} for arm, table in counts.items()
    }
    reflective = surveys["reflective"]
    result_json: dict[str, Any] = {
        "arms": found,
        "differences": {
            "responses_minus_base": benchmark.differences(counts["responses"], counts["base"]),
            "reflective_minus_base": benchmark.differences(counts["reflective"], counts["base"]),
            "reflective_minus_responses": benchmark.differences(counts["reflective"], counts["responses"]),
        },
        "tokens": {
            "flat": reflective.flat_tokens,
            "tree": reflective.tokens,
            "by_arm": {arm: {"flat": s.flat_tokens, "tree": s.tokens, "taught": s.edges} for arm, s in surveys.items()},
        },
        "seconds": clock.seconds | {"total": round(sum(clock.seconds.values()), 2)},
        "recipe": {arm: dataclasses.asdict(recipe) for arm, recipe in recipes.items()},
        "data": dataclasses.asdict(size)
        | {"seeds": seeds, "conversations": annotated.conversations if annotated else 0}
        | {"dropped": len(annotated.dropped) if annotated else 0, "base": str(base)},
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "devices": [str(device.device_kind) for device in jax.devices()],
        },
    }
    (out / "report.json").write_text(json.dumps(result_json, indent=2) + "\n", "utf-8")
    curves = {arm: read_metrics(out / "runs" / arm / "seed0") for arm in ARMS}
    gallery = report.gallery(test, {arm: out / "predictions" / arm / "seed0" for arm in found})
    (out / "report.html").write_text(report.render(result_json, curves, gallery), "utf-8")
    console.print(report.scores_table("Held-out scenes that break the prior (95 % interval)", result_json["arms"]))
    console.print(f"{sum(clock.seconds.values()):.0f} s in all. Report: {out / 'report.html'}")
    return result_json


def _clear(out: Path) -> None:
    """Removes what an earlier demo wrote, and nothing else: a folder that is not a demo's is refused."""
    ours = {"data", "runs", "predictions", "report.html", "report.json"}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; the demo needs a folder")
    strangers = {path.name for path in out.iterdir()} - ours if out.exists() else set()
    if strangers:
        raise UserError(
            f"{out}: holds {sorted(strangers)[0]!r}, which no demo wrote; choose an empty folder with --out"
        )
    for name in ours:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
