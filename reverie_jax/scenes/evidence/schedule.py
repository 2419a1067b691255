"""Which units the evidence takes: the search on validation pictures, then all arms, seeds and budgets by its choice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reverie_jax.files import write_json
from reverie_jax.scenes import benchmark
from reverie_jax.scenes.evidence.arms import ARMS
from reverie_jax.scenes.evidence.units import DECODERS, PLAIN, SEARCH_SEED, Evidence, Sizes, Unit

DECODED = ("answers", "reflective")
"""Arms whose models are decoded in all ways, for the first seeds."""
CORE = ("answers", "reflective", "lrv-0", "lrv-1", "ddpo-5", "sentences")
"""Arms with more seeds than the others at all budgets."""
SEARCHED = {"REVERIE": ("pope/accuracy", "skills"), "LRV": ("pope/accuracy", "skills"), "RLHF-V": ("object_f1",)}
"""Scores whose mean the search chooses by."""


def _search_unit(sizes: Sizes, arm: str, rate: float, passes: int) -> Unit:
    return Unit(arm, sizes.main, rate, passes, SEARCH_SEED, tests=("validation",))


def rate_units(sizes: Sizes, arms: Sequence[str]) -> list[Unit]:
    """Return the first units of the search, one seed of each arm: every learning rate with the fewest passes."""
    return [_search_unit(sizes, arm, rate, min(sizes.passes)) for arm in arms for rate in ARMS[arm].rates]


def passes_units(evidence: Evidence, arms: Sequence[str]) -> list[Unit]:
    """Return the units of the search that follow `rate_units`: each arm's best learning rate with more passes."""
    units = []
    for arm in arms:
        best = max(rate_units(evidence.sizes, (arm,)), key=lambda unit: score(evidence, unit.name, arm)["score"])
        units += [
            _search_unit(evidence.sizes, arm, best.learning_rate, passes)
            for passes in evidence.sizes.passes
            if passes != best.passes
        ]
    return units


def score(evidence: Evidence, unit: str, arm: str) -> dict[str, float]:
    """Return what the search of an arm chooses by, of a unit or the base on validation pictures.

    It is `score`, the mean of the others.
    """
    sums = evidence.counts(unit, "validation").sum(0)
    scores = {name: float(benchmark.METRICS[name](sums)) for name in SEARCHED[ARMS[arm].question]}
    return {"score": float(np.mean(list(scores.values())))} | scores


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the search chose for an arm.

    Attributes:
        best: learning rate and passes with the best score.
        few: learning rate with the best score of those with the fewest passes, for the comparison at equal steps.
        taught: supervised tokens of a pass over a picture.
    """

    best: Mapping[str, Any]
    few: Mapping[str, Any]
    taught: float


def choose(evidence: Evidence, arms: Sequence[str]) -> dict[str, Choice]:
    """Return the choice of the search for each arm, and write search.json with all its scores."""
    choices, rows = {}, []
    for arm in arms:
        units = rate_units(evidence.sizes, (arm,)) + passes_units(evidence, (arm,))
        settings = [{"learning_rate": unit.learning_rate, "passes": unit.passes} for unit in units]
        scores = [score(evidence, unit.name, arm) for unit in units]
        for setting, found in zip(settings, scores, strict=True):
            rows.append({"arm": arm, **setting} | {name: round(value, 4) for name, value in found.items()})
        best = max(range(len(units)), key=lambda n: scores[n]["score"])
        few = max(range(len(ARMS[arm].rates)), key=lambda n: scores[n]["score"])
        facts = evidence.facts(units[0].name)
        choices[arm] = Choice(settings[best], settings[few], facts["stats"]["edges"] / facts["records"])
    chosen = {arm: dict(choice.best) for arm, choice in choices.items()}
    write_json(evidence.out / "search.json", {"scores": rows, "chosen": chosen})
    return choices


def main_unit(sizes: Sizes, arm: str, choice: Choice, seed: int, pictures: int) -> Unit:
    """Return the unit of an arm with the settings that the search chose; each picture is seen at least once."""
    settings = dict(choice.best)
    settings["passes"] = max(settings["passes"], pictures)
    decoded = arm in DECODED and pictures == sizes.main and seed < sizes.core_seeds
    decoders = tuple(DECODERS) if decoded else (PLAIN,)
    return Unit(arm, pictures, seed=seed, decoders=decoders, **settings)


def equal_steps(sizes: Sizes, arm: str, choice: Choice, seed: int) -> Unit:
    """Return the unit of an arm at the steps that all arms take in the comparison at equal steps."""
    if choice.few == choice.best:
        return main_unit(sizes, arm, choice, seed, sizes.main)
    return Unit(arm, sizes.main, seed=seed, **choice.few)


def equal_tokens(sizes: Sizes, choices: Mapping[str, Choice], seed: int) -> Unit:
    """Return the unit of the reflective arm that is taught as many tokens as the answers arm."""
    answers, reflective = choices["answers"], choices["reflective"]
    passes = max(8, round(answers.best["passes"] * answers.taught / reflective.taught))
    return Unit("reflective", sizes.main, reflective.best["learning_rate"], passes, seed)


def main_units(sizes: Sizes, choices: Mapping[str, Choice]) -> Iterator[Unit]:
    """Yield all units but the search's, the most telling first: all arms at the main budget, then the other budgets."""
    for seed, (arm, choice) in itertools.product(range(sizes.seeds), choices.items()):
        yield main_unit(sizes, arm, choice, seed, sizes.main)
    for seed in range(sizes.seeds):
        for arm in ("answers", "reflective"):
            if arm in choices:
                yield equal_steps(sizes, arm, choices[arm], seed)
        if {"answers", "reflective"} <= choices.keys():
            yield equal_tokens(sizes, choices, seed)
    for budget in sizes.budgets:
        if budget != sizes.main:
            for seed, (arm, choice) in itertools.product(range(sizes.seeds), choices.items()):
                if seed < (sizes.core_seeds if arm in CORE else sizes.few_seeds):
                    yield main_unit(sizes, arm, choice, seed, budget)
