"""Agreement of reviewers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from reverie_jax.data.sources.marks import RowMarks


class Agreement(NamedTuple):
    """How two reviewers mark the rows that both of them mark.

    Attributes:
        reviewers: their names.
        both_good: rows that both mark good.
        first_good: rows that the first marks good, and the second bad.
        second_good: rows that the second marks good, and the first bad.
        both_bad: rows that both mark bad.
    """

    reviewers: tuple[str, str]
    both_good: int
    first_good: int
    second_good: int
    both_bad: int

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.both_good + self.first_good + self.second_good + self.both_bad

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960): agreement beyond chance; None where chance alone gives full agreement, or without rows."""
        if not self.total:
            return None
        first, second = (self.both_good + one for one in (self.first_good, self.second_good))
        expected = first * second + (self.total - first) * (self.total - second)
        if expected == self.total**2:
            return None
        return (self.total * (self.both_good + self.both_bad) - expected) / (self.total**2 - expected)


def agreements(rows: Iterable[RowMarks]) -> list[Agreement]:
    """Return the agreement of each two reviewers who mark some of the same rows, by name."""
    counts: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
    for row in rows:
        for (one, first), (two, second) in itertools.combinations(sorted(row.marks.items()), 2):
            pair = counts.setdefault((one, two), {})
            pair[first, second] = pair.get((first, second), 0) + 1
    cells = [("good", "good"), ("good", "bad"), ("bad", "good"), ("bad", "bad")]
    return [Agreement(names, *(pair.get(cell, 0) for cell in cells)) for names, pair in sorted(counts.items())]
