"""What the finished units say: scores of arms, and differences of arms, over seeds and pictures together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.eval import statistics
from reverie_jax.eval.statistics import Estimate
from reverie_jax.scenes import benchmark
from reverie_jax.scenes.benchmark import LABELS, LOWER_IS_BETTER
from reverie_jax.scenes.evidence import schedule
from reverie_jax.scenes.evidence.schedule import Choice
from reverie_jax.scenes.evidence.units import PLAIN, Evidence, Unit

NOTHING_FOUND = "no difference found"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm's score minus another's.

    Attributes:
        ours, theirs: names of what is compared.
        metric: name in `benchmark.METRICS`.
        estimate: of the difference, paired over seeds and pictures.
        seeds: number of seeds.
    """

    ours: str
    theirs: str
    metric: str
    estimate: Estimate
    seeds: int

    @property
    def verdict(self) -> str:
        """What the interval allows to say: better, worse, or no difference found."""
        low, high = self.estimate.low, self.estimate.high
        if low <= 0 <= high:
            return NOTHING_FOUND
        return "better" if (low > 0) != (self.metric in LOWER_IS_BETTER) else "worse"

    @property
    def cell(self) -> str:
        """The difference in a table: bold if there is one, else with the detectable difference."""
        return f"**{self._value}**" if self.verdict != NOTHING_FOUND else f"{self._value}{self._power}"

    @property
    def _value(self) -> str:
        return f"{self.estimate.value:+.3f} [{self.estimate.low:+.3f}, {self.estimate.high:+.3f}]"

    @property
    def _power(self) -> str:
        # Unknown where no resample differs.
        return f" (detectable: {self.estimate.detectable:.3f})" if self.estimate.error else ""

    def __str__(self) -> str:
        power = self._power if self.verdict == NOTHING_FOUND else ""
        return f"{LABELS[self.metric]} {self._value}: {self.verdict}{power}"


class Findings:
    """Scores of all units that are done.

    Args:
        evidence: the folder.
        choices: of the search.
    """

    def __init__(self, evidence: Evidence, choices: Mapping[str, Choice]):
        self.evidence, self.choices, self.sizes = evidence, choices, evidence.sizes
        self.arms = tuple(choices)

    def units(self, arm: str, pictures: int) -> list[Unit]:
        """Return the units of an arm that are done, one for each seed from 0 on."""
        units = (schedule.main_unit(self.sizes, arm, self.choices[arm], seed, pictures) for seed in self.seeds)
        return [unit for unit in units if self.evidence.is_done(unit.name)]

    @property
    def seeds(self) -> range:
        """Return all seeds."""
        return range(self.sizes.seeds)

    def counts(
        self, arm: str, pictures: int | None = None, test: str = "test", decoder: str = PLAIN
    ) -> Float[np.ndarray, "S N K"]:
        """Return an arm's counts by seed and picture, of the seeds that have them; the base model has one "seed".

        Args:
            arm: name in `arms.ARMS`, or "base".
            pictures: budget; the main one if omitted.
            test: set of pictures.
            decoder: way of decoding.
        """
        if arm == "base":
            return self.evidence.counts("base", test, decoder)[None]
        units = self.units(arm, pictures or self.sizes.main)
        return self.of_units([unit for unit in units if decoder in unit.decoders], test, decoder)

    def of_units(self, units: Sequence[Unit], test: str = "test", decoder: str = PLAIN) -> Float[np.ndarray, "S N K"]:
        """Return the counts of units, which must be done."""
        return np.stack([self.evidence.counts(unit.name, test, decoder) for unit in units])

    def scores(self, counts: Float[np.ndarray, "S N K"], metrics: Sequence[str]) -> dict[str, Estimate]:
        """Return scores with intervals over seeds and pictures."""
        return statistics.bootstrap(counts, {name: benchmark.METRICS[name] for name in metrics})

    def difference(
        self,
        metric: str,
        ours: tuple[str, Float[np.ndarray, "S N K"]],
        theirs: tuple[str, Float[np.ndarray, "T N K"]],
    ) -> Difference:
        """Return the difference of a score, over the seeds that both sides have.

        Args:
            metric: name in `benchmark.METRICS`.
            ours: name and counts of one side.
            theirs: of the other side; one seed is compared with each of the other's.
        """
        (name, mine), (other, yours) = ours, theirs
        seeds = max(len(mine), len(yours)) if 1 in (len(mine), len(yours)) else min(len(mine), len(yours))
        mine, yours = (x[0] if len(x) == 1 and seeds > 1 else x[:seeds] for x in (mine, yours))
        found = statistics.differences(mine, yours, {metric: benchmark.METRICS[metric]})
        return Difference(name, other, metric, found[metric], seeds)

    def between(self, metric: str, ours: str, theirs: str, **where: Any) -> Difference:
        """Return the difference of two arms in a score, in the same place (see `counts`)."""
        return self.difference(metric, (ours, self.counts(ours, **where)), (theirs, self.counts(theirs, **where)))

    def tokens(self) -> list[dict[str, Any]]:
        """Return what each arm was trained on at the main budget, means over seeds; seconds are medians."""
        rows = []
        for arm in self.arms:
            facts = [self.evidence.facts(unit.name) for unit in self.units(arm, self.sizes.main)]
            if not facts:
                continue
            pictures = float(np.mean([fact["records"] for fact in facts]))
            stats = {
                key: float(np.mean([fact["stats"][key] for fact in facts]))
                for key in ("tokens", "flat_tokens", "edges")
            }
            rows.append(
                {"arm": arm, "pictures": pictures, "tree": stats["tokens"] / pictures}
                | {"flat": stats["flat_tokens"] / pictures, "taught": stats["edges"] / pictures}
                | {"seconds": float(np.median([fact["train_seconds"] for fact in facts]))}
                | dict(self.choices[arm].best)
            )
        return rows
