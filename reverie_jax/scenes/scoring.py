"""Scoring of free text by the scene graph: hallucinated objects in descriptions, and false claims in rationales.

CHAIR (Rohrbach et al., arXiv 1809.02156) counts mentions of objects that are not there. Scene graphs are exact, so neither a
list of synonyms nor incomplete annotation adds errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.language import Claim, parse_claims, parse_mentions
from reverie_jax.scenes.questions import Query

DESCRIPTION_TOKENS = 80
RATIONALE_TOKENS = 80

# Columns of the description counts.
MENTIONS, HALLUCINATED, CAPTIONS, HALLUCINATING, PRESENT, COVERED = range(6)


def description_counts(scenes: Sequence[Scene], texts: Sequence[str]) -> Float[np.ndarray, "N 6"]:
    """Return per image: mentions, hallucinated mentions, 1, whether any is hallucinated, categories present, those named.

    A repeated mention counts each time, as in CHAIR's own script.
    """
    rows = []
    for scene, text in zip(scenes, texts, strict=True):
        named, present = parse_mentions(text), set(scene.categories)
        false = [name for name in named if name not in present]
        rows.append((len(named), len(false), 1, bool(false), len(present), len(present & set(named))))
    return np.asarray(rows, float)


@dataclasses.dataclass(frozen=True)
class CheckedRationale:
    """A rationale with its claims and whether each holds.

    Attributes:
        text: as written.
        checked: its claims, and whether each holds.
        relevant: whether a claim is about a category that the question is about.
    """

    text: str
    checked: tuple[tuple[Claim, bool], ...]
    relevant: bool

    @property
    def correct(self) -> bool:
        """Whether it makes claims about the image and all of them are true."""
        return bool(self.checked) and all(holds for _, holds in self.checked)


def check_rationale(scene: Scene, text: str, question: str) -> CheckedRationale:
    """Check each claim of a rationale for an answer to `question` against the scene."""
    claims, query = parse_claims(text), Query.parse(question)
    about = {category for claim in claims for category in (claim.category, claim.other)}
    relevant = query is not None and bool(about & query.subjects(scene))
    return CheckedRationale(text, tuple((claim, claim.holds(scene)) for claim in claims), relevant)


# Columns of the rationale counts.
RATIONALES, CORRECT, CLAIMS, TRUE_CLAIMS, EMPTY, RELEVANT = range(6)


def rationale_counts(checked: Sequence[CheckedRationale]) -> Float[np.ndarray, "6"]:
    """Return one image's counts: rationales, correct ones, claims, true claims, rationales without any, relevant ones."""
    facts = [holds for rationale in checked for _, holds in rationale.checked]
    correct = sum(rationale.correct for rationale in checked)
    empty = sum(not rationale.checked for rationale in checked)
    relevant = sum(rationale.relevant for rationale in checked)
    return np.asarray([len(checked), correct, len(facts), sum(facts), empty, relevant], float)
