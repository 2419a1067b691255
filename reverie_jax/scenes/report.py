"""The demo's report: one self-contained HTML page. It says what was measured; no sentence is ahead of the numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from reverie_jax.eval.benchmarks import pope
from reverie_jax.eval.benchmarks.interface import Question
from reverie_jax.scenes import scoring as free
from reverie_jax.scenes.benchmark import answer_file, questions
from reverie_jax.scenes.dataset import PICTURES, read_graphs
from reverie_jax.scenes.language import phrase

COLOURS = {"base": "#8a8f98", "responses": "#3b7dd8", "reflective": "#c2571a"}

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
    ("things described", lambda arm: arm["chair"]["coverage"]),
    ("correct rationales", lambda arm: arm["rationale_correct"]),
)

LABELS = {
    "pope_mean_f1": "POPE mean F1",
    "pope_adversarial_f1": "POPE adversarial F1",
    "chair_i": "hallucinated mentions (CHAIRi)",
    "chair_s": "hallucinating descriptions (CHAIRs)",
    "rationale_correct": "correct rationales",
}


def interval(estimate: Mapping[str, Any]) -> str:
    """ "0.812 [0.79, 0.83]"."""
    value = estimate.get("f1", estimate.get("value"))
    low, high = estimate["ci95"]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def scores_table(title: str, arms: Mapping[str, dict[str, Any]]) -> Table:
    """The scores as a terminal of 80 columns shows them: value, and the interval's ends."""
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


def verdict(estimate: Mapping[str, Any]) -> str:
    """What an interval of a difference allows to say."""
    low, high = estimate["ci95"]
    return "higher" if low > 0 else "lower" if high < 0 else "no difference beyond the interval"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def pope_chart(arms: Mapping[str, Any]) -> str:
    """F1 by split and arm, with intervals, as SVG."""
    figure, axes = plt.subplots(figsize=(6.4, 3.0))
    names = [*pope.SPLITS, "mean"]
    for place, (arm, scores) in enumerate(arms.items()):
        values = [scores["pope"][name]["f1"] for name in names]
        bounds = [scores["pope"][name]["ci95"] for name in names]
        below = [value - low for value, (low, _) in zip(values, bounds, strict=True)]
        above = [high - value for value, (_, high) in zip(values, bounds, strict=True)]
        spots = [index + (place - 1) * 0.26 for index in range(len(names))]
        axes.bar(spots, values, 0.24, yerr=[below, above], capsize=3, label=arm, color=COLOURS[arm], ecolor="#333")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1)
    axes.set_ylabel("F1")
    axes.legend(frameon=False, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def loss_chart(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Training loss by step, as SVG."""
    figure, axes = plt.subplots(figsize=(6.4, 3.0))
    for arm, rows in curves.items():
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label=arm, color=COLOURS[arm], lw=1.2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per taught token")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def gallery(folder: Path, predictions: Mapping[str, Path], *, shown: int = 9) -> list[dict[str, Any]]:
    """Pictures with what each model said: those where the models' yes/no answers disagree most, in the folder's order.

    Args:
        folder: scenes with their questions.
        predictions: each arm's folder of prediction files.
    """
    graphs = read_graphs(folder)
    by_image: dict[str, list[Question]] = {image: [] for image in graphs}
    for asked in questions(folder):
        by_image[asked.unit].append(asked)
    said = {arm: answer_file(folder, path) for arm, path in predictions.items()}
    truth = {(q.text, q.image): q.label for file in folder.glob("*_pope_*.json") for q in pope.read_questions(file)}

    def disagreement(image: str) -> int:
        yes = [
            [pope.says_yes(said[arm][str(a.id)]) for arm in predictions]
            for a in by_image[image]
            if a.known["kind"] == "pope/adversarial"
        ]
        return sum(len(set(row)) > 1 for row in yes)

    chosen = sorted(graphs, key=lambda image: -disagreement(image))[:shown]
    cards = []
    for image in sorted(chosen, key=list(graphs).index):
        scene, rows = graphs[image], []
        for asked in by_image[image]:
            kind = asked.known["kind"]
            if kind not in ("pope/adversarial", "description", "rationale"):
                continue
            question = " ".join([*(f"{q} {a}." for q, a in asked.before), asked.text])
            answers = []
            for arm in predictions:
                text = said[arm][str(asked.id)]
                if kind == "rationale":
                    good = free.check(scene, text).correct
                elif kind == "description":
                    good = not free.description_counts([scene], [text])[0, free.HALLUCINATED]
                else:
                    good = pope.says_yes(text) == truth[asked.text, image]
                answers.append({"arm": arm, "text": text or "(nothing)", "good": bool(good)})
            rows.append({"kind": kind.split("/")[0], "question": question, "answers": answers})
        cards.append(
            {
                "picture": base64.b64encode((folder / PICTURES / image).read_bytes()).decode(),
                "truth": ", ".join(phrase(scene, c) for c in scene.categories),
                "rows": rows,
            }
        )
    return cards


def render(result: Mapping[str, Any], curves: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        result: what report.json holds.
        curves: each tuned arm's metric rows.
        cards: `gallery(...)`.
    """
    source = (Path(__file__).parent / "report.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return page.render(
        result=result,
        arms=list(result["arms"]),
        rows=[(label, [interval(pick(arm)) for arm in result["arms"].values()]) for label, pick in ROWS],
        detail=[
            (f"{split}, {metric}", [f"{arm['pope'][split][metric]:.3f}" for arm in result["arms"].values()])
            for split in pope.SPLITS
            for metric in ("accuracy", "precision", "recall", "yes_ratio")
        ],
        differences=[
            (name.replace("_", " "), LABELS[metric], interval(estimate), verdict(estimate))
            for name, metrics in result["differences"].items()
            for metric, estimate in metrics.items()
        ],
        pope_chart=pope_chart(result["arms"]),
        loss_chart=loss_chart(curves),
        cards=cards,
        colours=COLOURS,
    )
