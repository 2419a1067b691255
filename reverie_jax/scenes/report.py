"""The demo's report: one self-contained HTML page. No sentence claims more than the numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from reverie_jax.eval.benchmarks import pope, pope_files
from reverie_jax.eval.benchmarks.interface import Question
from reverie_jax.eval.report.tables import axis
from reverie_jax.eval.report.template import COLORS, environment, number, verdict
from reverie_jax.scenes import scoring
from reverie_jax.scenes.benchmark import build_questions, read_predictions
from reverie_jax.scenes.dataset import IMAGES, read_graphs
from reverie_jax.scenes.language import noun_phrase

Pick = Callable[[dict[str, Any]], dict[str, Any]]


def _split(name: str) -> Pick:
    return lambda arm: arm["pope"][name]


ROWS: tuple[tuple[str, Pick], ...] = (
    ("POPE random F1", _split("random")),
    ("POPE popular F1", _split("popular")),
    ("POPE adversarial F1", _split("adversarial")),
    ("POPE mean F1", _split("mean")),
    ("hallucinated mentions (CHAIRi)", lambda arm: arm["chair"]["i"]),
    ("hallucinating descriptions (CHAIRs)", lambda arm: arm["chair"]["s"]),
    ("objects described", lambda arm: arm["chair"]["coverage"]),
    ("correct rationales", lambda arm: arm["rationale_correct"]),
)

LABELS = {
    "pope_mean_f1": "POPE mean F1",
    "pope_adversarial_f1": "POPE adversarial F1",
    "chair_i": "hallucinated mentions (CHAIRi)",
    "chair_s": "hallucinating descriptions (CHAIRs)",
    "rationale_correct": "correct rationales",
}


def interval(estimate: Mapping[str, Any]) -> tuple[str, str]:
    """Return a value and its interval, such as "0.812" and "[0.790, 0.830]"."""
    value = estimate.get("f1", estimate.get("value"))
    low, high = estimate["ci95"]
    return f"{value:.3f}", f"[{low:.3f}, {high:.3f}]"


def scores_table(title: str, arms: Mapping[str, dict[str, Any]]) -> Table:
    """Return the scores as a table for a terminal of 80 columns: values, and the ends of their intervals."""
    table = Table(title=title)
    table.add_column("")
    for name in arms:
        table.add_column(name, justify="right", no_wrap=True)
    for label, pick in ROWS:
        cells = []
        for arm in arms.values():
            estimate = pick(arm)
            low, high = estimate["ci95"]
            cells.append(f"{estimate.get('f1', estimate.get('value')):.3f} {low:.2f}-{high:.2f}")
        table.add_row(label, *cells)
    return table


def pope_plot(arms: Mapping[str, Any]) -> dict[str, Any]:
    """Return F1 by split and arm with intervals, for the template's `plot`."""
    rows = []
    for split in (*pope_files.SPLITS, "mean"):
        scores = {arm: scores["pope"][split] for arm, scores in arms.items()}
        cells = [
            {"run": arm, "value": score["f1"], "low": score["ci95"][0], "high": score["ci95"][1]}
            for arm, score in scores.items()
        ]
        rows.append({"name": split, "digits": 3, "cells": cells})
    return {"rows": rows, "scale": axis([0.0, 1.0])}


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
    graphs = read_graphs(folder)
    by_image: dict[str, list[Question]] = {image: [] for image in graphs}
    for question in build_questions(folder):
        by_image[question.cluster].append(question)
    texts = {arm: read_predictions(folder, path) for arm, path in predictions.items()}
    truth = {(q.text, q.image): q.label for file in folder.glob("*_pope_*.json") for q in pope.read_questions(file)}

    def disagreement(image: str) -> int:
        yes = [
            {pope.says_yes(texts[arm][str(question.id)]) for arm in predictions}
            for question in by_image[image]
            if question.metadata["kind"] == "pope/adversarial"
        ]
        return sum(len(answers) > 1 for answers in yes)

    def good(question: Question, text: str) -> bool:
        scene, kind = graphs[question.cluster], question.metadata["kind"]
        if kind == "rationale":
            return scoring.check_rationale(scene, text).correct
        if kind == "description":
            return not scoring.description_counts([scene], [text])[0, scoring.HALLUCINATED]
        return pope.says_yes(text) == truth[question.text, question.cluster]

    cards = []
    for image in sorted(sorted(graphs, key=lambda image: -disagreement(image))[:count], key=list(graphs).index):
        rows = []
        for question in by_image[image]:
            if question.metadata["kind"] in ("pope/adversarial", "description", "rationale"):
                answers = {arm: texts[arm][str(question.id)] for arm in predictions}
                prompt = " ".join([*(f"{q} {a}." for q, a in question.history), question.text])
                cells = [{"text": text or "(empty)", "good": bool(good(question, text))} for text in answers.values()]
                rows.append({"question": prompt, "answers": cells})
        scene = graphs[image]
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
            rows=[(label, [interval(pick(arm)) for arm in arms.values()]) for label, pick in ROWS],
            detail=[
                (f"{split}, {metric}", [f"{arm['pope'][split][metric]:.3f}" for arm in arms.values()])
                for split in pope_files.SPLITS
                for metric in ("accuracy", "precision", "recall", "yes_ratio")
            ],
            differences=[
                (
                    name.replace("_", " "),
                    LABELS[metric],
                    " ".join(interval(estimate)),
                    verdict(estimate["ci95"][0], estimate["ci95"][1], clusters),
                )
                for name, metrics in result["differences"].items()
                for metric, estimate in metrics.items()
            ],
            pope_plot=pope_plot(arms),
            loss_plot=loss_plot(curves),
            cards=cards,
            colors=dict(zip(arms, COLORS, strict=False)),
            lower={},
        )
    )
