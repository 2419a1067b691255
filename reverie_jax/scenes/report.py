"""The demo's report: one self-contained HTML page. No sentence claims more than the numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from reverie_jax.eval.benchmarks import pope
from reverie_jax.eval.benchmarks.interface import Question
from reverie_jax.eval.report.tables import axis
from reverie_jax.eval.report.template import COLORS, environment, number, verdict
from reverie_jax.scenes.benchmark import LABELS, Scenes, is_good, read_predictions
from reverie_jax.scenes.dataset import IMAGES
from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.language import noun_phrase
from reverie_jax.scenes.questions import SKILLS

HEADLINES = ("pope/accuracy", "pope/adversarial/accuracy", "skills", "rationale_correct")
"""Scores of the picture and of the claims above all."""
ROWS = (
    "pope/accuracy",
    "pope/adversarial/accuracy",
    "pope/f1",
    "pope/yes_ratio",
    "skills",
    *(f"skill/{skill}" for skill in SKILLS if skill != "existence"),
    "chair_i",
    "chair_s",
    "coverage",
    "rationale_correct",
    "rationale_relevant",
)
"""Scores of the table."""


def interval(estimate: Mapping[str, Any], sign: str = "") -> tuple[str, str]:
    """Return a value and its interval, such as "0.812" and "[0.790, 0.830]"."""
    low, high = estimate["ci95"]
    return f"{estimate['value']:{sign}.3f}", f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def scores_table(title: str, arms: Mapping[str, dict[str, Any]]) -> Table:
    """Return the scores as a table for a terminal of 80 columns: values, and the ends of their intervals."""
    table = Table(title=title)
    table.add_column("")
    for name in arms:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ROWS:
        cells = []
        for arm in arms.values():
            low, high = arm[name]["ci95"]
            cells.append(f"{arm[name]['value']:.3f} {low:.2f}-{high:.2f}")
        table.add_row(LABELS[name], *cells)
    return table


def headline_plot(arms: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headline scores of each arm with intervals, for the template's `plot`."""
    rows = []
    for name in HEADLINES:
        cells = []
        for arm, scores in arms.items():
            low, high = scores[name]["ci95"]
            cells.append({"run": arm, "value": scores[name]["value"], "low": low, "high": high})
        rows.append({"name": LABELS[name], "digits": 3, "cells": cells})
    return {"rows": rows, "scale": axis([0.0, 1.0])}


def claims(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence on each headline score of each pair of arms, with its interval."""
    sentences = []
    for pair, metrics in result["differences"].items():
        ours, theirs = pair.split("_minus_")
        for name in HEADLINES:
            low, high = metrics[name]["ci95"]
            value, ends = interval(metrics[name], "+")
            how = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
            sentences.append(f"{LABELS[name]}: {ours} is {how} {theirs}, {value} {ends}.")
    return sentences


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return training loss by step on a logarithmic axis, as lines and ticks in a square of 100 x 100."""
    logs = {
        arm: [(row["step"], math.log10(row["loss"])) for row in rows if row["loss"] > 0] for arm, rows in curves.items()
    }
    points = [point for line in logs.values() for point in line] or [(1.0, 0.0)]
    steps, scale = max(step for step, _ in points), axis([loss for _, loss in points])
    height = scale["high"] - scale["low"]
    lines = {
        arm: " ".join(f"{100 * step / steps:.2f},{100 * (scale['high'] - loss) / height:.2f}" for step, loss in line)
        for arm, line in logs.items()
    }
    ends = [(100.0, number(10 ** scale["low"], 3)), (0.0, number(10 ** scale["high"], 3))]
    return {"lines": lines, "ticks": ends, "steps": f"{steps:.0f}"}


def gallery(folder: Path, predictions: Mapping[str, Path], *, count: int = 9) -> list[dict[str, Any]]:
    """Return the images where the models' yes/no answers disagree most, with all answers, in the folder's order.

    Args:
        folder: Scenes with their questions.
        predictions: Folder of prediction files by arm.
        count: Number of images.
    """
    data = Scenes().load(folder)
    graphs: Mapping[str, Scene] = data.tables["graphs"]
    shown: dict[str, list[Question]] = {image: [] for image in graphs}
    for question in data.questions:
        if not question.metadata["kind"].startswith(("pope/random", "pope/popular")):
            shown[question.cluster].append(question)
    texts = {arm: read_predictions(folder, path) for arm, path in predictions.items()}

    def disagreement(image: str) -> int:
        asked = [question for question in shown[image] if question.metadata.get("answer") in ("Yes", "No")]
        return sum(len({pope.says_yes(texts[arm][str(question.id)]) for arm in predictions}) > 1 for question in asked)

    cards = []
    for image in sorted(sorted(graphs, key=lambda image: -disagreement(image))[:count], key=list(graphs).index):
        rows = []
        scene = graphs[image]
        for question in shown[image]:
            prompt = " ".join([*(f"{q} {a}." for q, a in question.history), question.text])
            answers = [texts[arm][str(question.id)] for arm in predictions]
            cells = [{"text": text or "(empty)", "good": is_good(scene, question, text)} for text in answers]
            rows.append({"question": prompt, "answers": cells})
        encoded = base64.b64encode((folder / IMAGES / image).read_bytes()).decode()
        cards.append(
            {"image": encoded, "truth": ", ".join(noun_phrase(scene, c) for c in scene.categories), "rows": rows}
        )
    return cards


def render(result: Mapping[str, Any], curves: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        result: The content of report.json.
        curves: Metric rows of each tuned arm.
        cards: From `gallery`.
    """
    arms = result["arms"]
    clusters = result["data"]["test_images"]
    return (
        environment(Path(__file__).parent)
        .get_template("report.html")
        .render(
            result=result,
            arms=list(arms),
            claims=claims(result),
            rows=[(LABELS[name], [interval(arm[name]) for arm in arms.values()]) for name in ROWS],
            differences=[
                (
                    name.replace("_", " "),
                    LABELS[metric],
                    " ".join(interval(estimate, "+")),
                    verdict(estimate["ci95"][0], estimate["ci95"][1], clusters),
                )
                for name, metrics in result["differences"].items()
                for metric, estimate in metrics.items()
            ],
            headline_plot=headline_plot(arms),
            loss_plot=loss_plot(curves),
            cards=cards,
            colors=dict(zip(arms, COLORS, strict=False)),
            lower={},
        )
    )
