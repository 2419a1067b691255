"""The page of the evidence: docs/evidence.md and its curves. Every number and verdict on it is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.report.template import COLORS, environment
from reverie_jax.files import atomic_write, read_json
from reverie_jax.scenes.benchmark import LABELS
from reverie_jax.scenes.evidence.arms import ARMS
from reverie_jax.scenes.evidence.findings import Difference, Findings
from reverie_jax.scenes.evidence.schedule import DECODED, SEARCHED, equal_steps, equal_tokens, score
from reverie_jax.scenes.evidence.units import DECODERS, PLAIN

MAIN = (
    "pope/accuracy",
    "pope/adversarial/accuracy",
    "pope/f1",
    "pope/yes_ratio",
    "skills",
    "short_answers",
    "calibration_error",
    "chair_i",
    "chair_s",
    "coverage",
    "rationale_correct",
    "rationale_relevant",
)
"""Scores of the main table."""
HEADLINE = ("pope/accuracy", "skills")
SKILLS = ("skill/attribute", "skill/count", "skill/relation", "skill/comparison", "skill/two-step")
CURVES = ("pope/accuracy", "skills", "chair_i", "coverage")
_ANSWERING = (("reflective", "answers"), ("lrv-1", "lrv-0"))
_DESCRIBING = (("ddpo-5", "base"), ("sentences", "base"), ("sentences", "ddpo-5"))
"""Arms that are compared at the other budgets too, where they have most seeds."""
PAGE, FIGURE = "evidence.md", "evidence.svg"


def _scores_table(findings: Findings, arms: Sequence[str], metrics: Sequence[str], **where: Any) -> list[list[str]]:
    rows = [["", *(LABELS[name] for name in metrics)]]
    for arm in arms:
        scores = findings.scores(findings.counts(arm, **where), metrics)
        rows.append([arm, *(str(scores[name]) for name in metrics)])
    return rows


def _differences_table(
    findings: Findings, pairs: Sequence[tuple[str, str]], metrics: Sequence[str], **where: Any
) -> Any:
    rows = [["", *(LABELS[name] for name in metrics)]]
    for ours, theirs in pairs:
        cells = [findings.between(name, ours, theirs, **where).cell for name in metrics]
        rows.append([f"{ours} − {theirs}", *cells])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first one is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _summary(findings: Findings) -> list[str]:
    """Return what the page says on top: whether rationales helped, and if not, what would have to be different."""
    if not {"answers", "reflective"} <= set(findings.arms):
        return []
    found = [findings.between(name, "reflective", "answers") for name in HEADLINE]
    helped = [difference for difference in found if difference.verdict == "better"]
    differences = "; ".join(str(difference) for difference in found)
    if helped:
        return [f"**Rationales helped over answers alone here**: {differences}."]
    scores = findings.scores(findings.counts("reflective"), ("rationale_correct", "skills"))
    return [
        f"**Rationales did not help over answers alone here**: {differences}.",
        f"Of the rationales that the tuned models write, {scores['rationale_correct']} are correct, and of the yes-or-no "
        f"questions that need reasoning they answer {scores['skills']} rightly, 0.5 being chance. What would have to be "
        "different, and is not tested here: a base model that sees well enough to give correct reasons, and that has not "
        "learned these questions in pretraining already.",
    ]


def _claims(findings: Findings) -> list[tuple[str, list[str]]]:
    """Return the questions of the page, each with what was found, in sentences."""
    arms, between = set(findings.arms), findings.between
    claims: list[tuple[str, list[str]]] = []

    def add(question: str, pairs: Sequence[tuple[str, str]], metrics: Sequence[str], **where: Any) -> None:
        lines = [
            f"{ours} against {theirs}: {between(name, ours, theirs, **where)}."
            for ours, theirs in pairs
            if {ours, theirs} <= arms | {"base"}
            for name in metrics
        ]
        if lines and claims and claims[-1][0] == question:
            claims[-1][1].extend(lines)
        elif lines:
            claims.append((question, lines))

    add("Do answers alone help?", [("answers", "base")], HEADLINE)
    add("Do rationales help over answers alone?", [("reflective", "answers")], HEADLINE)
    add("For which questions?", [("reflective", "answers")], SKILLS)
    for test, words in (("pairs", "pairs of things never seen together"), ("compositions", "unseen compositions")):
        add(f"On {words}?", [("reflective", "answers")], HEADLINE, test=test)
    add("Do negative rationales add to positive ones?", [("reflective", "answers+positive")], HEADLINE)
    add("Does a context of its own for each rationale help?", [("reflective", "reflective-joined")], HEADLINE)
    add("Does more weight on the answers help?", [("reflective-weighted", "reflective")], HEADLINE)
    ratios = [arm for arm in findings.arms if ARMS[arm].question == "LRV"]
    if ratios:
        scores = {arm: findings.scores(findings.counts(arm), ("pope/accuracy",))["pope/accuracy"] for arm in ratios}
        best = max(ratios, key=lambda arm: scores[arm].value)
        add("Do LRV's negative instructions matter?", [(arm, "lrv-0") for arm in ratios if arm != "lrv-0"], HEADLINE)
        claims[-1][1].append(f"The best POPE accuracy of these ratios is that of {best}: {scores[best]}.")
    texts = ("chair_i", "coverage", "object_f1")
    add("Do corrections help?", [("dpo", "base"), ("ddpo-5", "base")], texts)
    add("Does dense DPO beat DPO?", [(f"ddpo-{gamma}", "dpo") for gamma in ("1", "1.1", "5")], texts)
    add(
        "Do sentences of the model's own help?",
        [("sentences", "base"), ("sentences", "dpo"), ("sentences", "ddpo-5")],
        texts,
    )
    for budget in findings.sizes.budgets:
        if budget != findings.sizes.main:
            done = {"base", *(arm for arm in arms if findings.units(arm, budget))}
            for pairs, metrics in ((_ANSWERING, HEADLINE), (_DESCRIBING, texts)):
                found = [pair for pair in pairs if done.issuperset(pair)]
                add(f"With {budget:,} pictures?", found, metrics, pictures=budget)
    ways = [
        f"{arm}, {way} against {PLAIN}: {_of_decoding(findings, 'pope/accuracy', arm, way)}."
        for arm in ("base", *(arm for arm in DECODED if arm in arms))
        for way in DECODERS
        if way != PLAIN
    ]
    return [*claims, ("Which way of decoding helps?", ways)]


def _of_decoding(findings: Findings, metric: str, arm: str, way: str) -> Difference:
    """Return the difference of a way of decoding from plain, of the same model."""
    ours, plain = ((name, findings.counts(arm, decoder=name)) for name in (way, PLAIN))
    return findings.difference(metric, ours, plain)


def _decoders(findings: Findings) -> list[list[str]]:
    """Return a table of ways of decoding, as differences from plain."""
    metrics = ("pope/accuracy", "pope/yes_ratio", "skills", "chair_i", "coverage")
    rows = [["", *(LABELS[name] for name in metrics)]]
    for arm in ("base", *DECODED):
        for decoder in DECODERS:
            if decoder == PLAIN or (arm != "base" and arm not in findings.arms):
                continue
            cells = []
            for name in metrics:
                if decoder == "reflect" and name in ("chair_i", "coverage"):
                    cells.append("–")
                    continue
                cells.append(_of_decoding(findings, name, arm, decoder).cell)
            rows.append([f"{arm}, {decoder}", *cells])
    return rows


def _equal_budgets(findings: Findings) -> list[list[str]]:
    """Return a table of the reflective arm minus the answers arm at equal budgets of three kinds."""
    choices, sizes = findings.choices, findings.sizes
    metrics = ("pope/accuracy", "skills", "chair_i", "coverage")
    rows = [["", *(LABELS[name] for name in metrics)]]
    if not {"answers", "reflective"} <= choices.keys():
        return rows
    answers = findings.counts("answers")
    kinds = {
        "equal steps": (
            [equal_steps(sizes, "reflective", choices["reflective"], seed) for seed in findings.seeds],
            [equal_steps(sizes, "answers", choices["answers"], seed) for seed in findings.seeds],
        ),
        "equal taught tokens": ([equal_tokens(sizes, choices, seed) for seed in findings.seeds], None),
        "each at its best": (findings.units("reflective", sizes.main), None),
    }
    for name, (ours, theirs) in kinds.items():
        if all(findings.evidence.is_done(unit.name) for unit in (*ours, *(theirs or ()))):
            yours = answers if theirs is None else findings.of_units(theirs)
            sides = ("reflective", findings.of_units(ours)), ("answers", yours)
            rows.append([name, *(findings.difference(metric, *sides).cell for metric in metrics)])
    return rows


def _search(findings: Findings) -> list[list[str]]:
    """Return a table of the search's scores; the base, which a learning rate of 0 would keep, comes first."""
    rows = [["arm", "learning rate", "passes", "score"]]
    for question in SEARCHED:
        arms = [arm for arm in findings.arms if ARMS[arm].question == question]
        rows += [
            [f"base, as {question}", "", "", f"{score(findings.evidence, 'base', arm)['score']:.3f}"]
            for arm in arms[:1]
        ]
    for row in read_json(findings.evidence.out / "search.json")["scores"]:
        rows.append([row["arm"], f"{row['learning_rate']:g}", f"{row['passes']:,}", f"{row['score']:.3f}"])
    return rows


def _curves(findings: Findings) -> str:
    """Return an SVG of scores against the number of pictures, a panel for each score."""
    budgets = sorted(findings.sizes.budgets)
    panels = []
    for metric in CURVES:
        base = findings.scores(findings.counts("base"), (metric,))[metric].value
        lines = {}
        for arm in findings.arms:
            found = {budget: findings.counts(arm, budget) for budget in budgets if findings.units(arm, budget)}
            lines[arm] = {budget: findings.scores(counts, (metric,))[metric] for budget, counts in found.items()}
        values = [base] + [end for line in lines.values() for point in line.values() for end in (point.low, point.high)]
        panels.append({"name": LABELS[metric], "low": min(values), "high": max(values), "base": base, "lines": lines})
    styles = {
        arm: (COLORS[number % len(COLORS)], "" if number < len(COLORS) else "4 3")
        for number, arm in enumerate(findings.arms)
    }
    left, right = math.log(budgets[0]), math.log(budgets[-1])

    def x(budget: float) -> float:
        return 150 if right == left else 30 + 240 * (math.log(budget) - left) / (right - left)

    def y(panel: Any, value: float) -> float:
        return 170 - 150 * (value - panel["low"]) / max(panel["high"] - panel["low"], 1e-9)

    template = environment(Path(__file__).parent).get_template("curves.svg")
    return template.render(panels=panels, budgets=budgets, styles=styles, x=x, y=y)


def write(findings: Findings, out: Path, base: dict[str, Any]) -> None:
    """Write the page and its figure to a folder.

    Args:
        findings: what the units say.
        out: folder; evidence.md and evidence.svg are replaced.
        base: facts about the run: its hours, machine and base model.
    """
    arms = [arm for arm in findings.arms if findings.units(arm, findings.sizes.main)]
    rows = ["base", *arms]
    tokens = [["", "pictures", "learning rate", "passes", "tokens as tree", "without trees", "taught", "seconds"]]
    tokens += [
        [row["arm"], f"{row['pictures']:.0f}", f"{row['learning_rate']:g}", f"{row['passes']:,}"]
        + [f"{row[name]:.0f}" for name in ("tree", "flat", "taught", "seconds")]
        for row in findings.tokens()
    ]
    pairs = [(arm, "base") for arm in arms]
    text = (
        environment(Path(__file__).parent)
        .get_template("page.md")
        .render(
            base=base,
            sizes=findings.sizes,
            seeds={
                budget: {arm: len(findings.units(arm, budget)) for arm in arms} for budget in findings.sizes.budgets
            },
            summary=_summary(findings),
            claims=_claims(findings),
            figure=FIGURE,
            tables={
                "main": markdown_table(_scores_table(findings, rows, MAIN)),
                "skills": markdown_table(_scores_table(findings, rows, SKILLS)),
                "pairs": markdown_table(_scores_table(findings, rows, ("pope/accuracy", "skills"), test="pairs")),
                "compositions": markdown_table(
                    _scores_table(findings, rows, ("pope/accuracy", "skills"), test="compositions")
                ),
                "differences": markdown_table(
                    _differences_table(findings, pairs, ("pope/accuracy", "skills", "chair_i", "coverage", "object_f1"))
                ),
                "equal": markdown_table(_equal_budgets(findings)),
                "decoders": markdown_table(_decoders(findings)),
                "tokens": markdown_table(tokens),
                "search": markdown_table(_search(findings)),
            },
        )
    )
    atomic_write(out / PAGE, text)
    atomic_write(out / FIGURE, _curves(findings))
