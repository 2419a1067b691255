"""Published scores, on the scale of our metrics, with their sources; a report shows them beside measured ones.

Not included: LLaVA-1.5 13B with LoRA (its row of the model zoo was not read) and the ablations of REVERIE-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SOURCES: Mapping[str, tuple[str, bool]] = {
    "zoo": ("LLaVA's docs/MODEL_ZOO.md", False),
    "splits": ("LLaVA-1.5's paper; LLaVA's own answer files give the same", False),
    "recalled": ("LLaVA-1.5's paper, from memory", True),
    "reverie": ("REVERIE's paper, by a public reading note of it", True),
    "rlaif": ("RLAIF-V's paper, as later papers quote it", True),
    "rerun": ("one public rerun, 512 tokens, another list of 500 pictures", True),
    "amber": ("AMBER's paper, from memory", True),
    "hallusion": ("HallusionBench's README, judged by GPT-4; it does not say which size", False),
    "gavie": ("LRV-Instruction's README, judged by GPT-4", False),
}
"""A short description, and whether it is second-hand: quoted by others or from memory, not read in the original."""


class Published(NamedTuple):
    """A score of a model on a benchmark; `source` is a key of `SOURCES`."""

    model: str
    benchmark: str
    metric: str
    value: float
    source: str


_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "SQA": ("scienceqa", "img_accuracy", 1),
    "POPE": ("pope", "f1", 0.01),
    "POPE-R": ("pope", "random/f1", 0.01),
    "POPE-P": ("pope", "popular/f1", 0.01),
    "POPE-A": ("pope", "adversarial/f1", 0.01),
    "MME": ("mme", "perception", 1),
    "MMB": ("mmbench", "accuracy", 1),
    "MMB-CN": ("mmbench-cn", "accuracy", 1),
    "SEED": ("seed", "accuracy", 1),
    "SEED-I": ("seed", "image/accuracy", 1),
    "SEED-V": ("seed", "video/accuracy", 1),
    "LLaVA-W": ("llava-bench", "all", 1),
    "MM-Vet": ("mm-vet", "total", 1),
    "GQA": ("gqa", "accuracy", 1),
    "TextVQA": ("textvqa", "accuracy", 1),
    "MMHal": ("mmhal", "score", 1),
    "MMHal-H": ("mmhal", "hallucination_rate", 1),
    "GAVIE-A": ("gavie", "accuracy", 1),
    "GAVIE-R": ("gavie", "relevancy", 1),
    "Hallusion-a": ("hallusionbench", "aAcc", 1),
    "Hallusion-q": ("hallusionbench", "qAcc", 1),
    "Hallusion-f": ("hallusionbench", "fAcc", 1),
    "OHal": ("object-halbench", "CHAIRs_refine", 1),
    "OHal-i": ("object-halbench", "CHAIRi", 1),
    "CHAIRs": ("chair", "CHAIRs", 1),
    "CHAIRi": ("chair", "CHAIRi", 1),
    "CHAIR-R": ("chair", "Recall", 1),
    "CHAIR-L": ("chair", "Len", 1),
    "AMBER": ("amber", "AMBER", 1),
    "AMBER-C": ("amber", "CHAIR", 1),
    "AMBER-cover": ("amber", "Cover", 1),
    "AMBER-hal": ("amber", "Hal", 1),
    "AMBER-cog": ("amber", "Cog", 1),
    "AMBER-acc": ("amber", "Accuracy", 1),
    "AMBER-f1": ("amber", "F1", 1),
}
"""Columns of the tables below: benchmark, our name of the metric, and the factor from the published figure to ours."""

_ZOO = ("SQA", "POPE", "MME", "MMB", "MMB-CN", "SEED", "LLaVA-W", "MM-Vet", "GQA", "TextVQA")
_PAPER = ("SQA", "POPE", "MME", "MMB", "MM-Vet", "GQA")
_FEW = ("POPE", "MMB", "SQA")
_SPLITS = ("POPE-R", "POPE-P", "POPE-A")
_MMHAL = ("MMHal", "MMHal-H")
_AMBER = ("AMBER", "AMBER-C", "AMBER-cover", "AMBER-hal", "AMBER-cog", "AMBER-acc", "AMBER-f1")

_TABLES: tuple[tuple[str, str, tuple[str, ...], tuple[float, ...]], ...] = (
    ("LLaVA-1.5-7B", "zoo", _ZOO, (66.8, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1, 62.0, 58.2)),
    ("LLaVA-1.5-7B LoRA", "zoo", _ZOO, (68.4, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2, 63.0, 58.2)),
    ("LLaVA-1.5-13B", "zoo", _ZOO, (71.6, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1, 63.3, 61.3)),
    ("LLaVA-1.5-7B", "recalled", _SPLITS, (87.3, 86.1, 84.2)),
    ("LLaVA-1.5-13B", "splits", _SPLITS, (87.1, 86.2, 84.5)),
    ("LLaVA-1.5-7B", "recalled", ("SEED-I", "SEED-V"), (66.1, 37.3)),
    ("LLaVA-1.0-7B LoRA", "reverie", _PAPER, (42.7, 71.1, 819.8, 27.2, 30.0, 7.10)),
    ("REVERIE-1.0-7B LoRA", "reverie", _PAPER, (70.1, 83.8, 1168.1, 55.4, 27.8, 36.5)),
    ("REVERIE-1.0-7B LoRA", "reverie", _SPLITS, (87.10, 84.03, 80.31)),
    ("LLaVA-1.5-7B LoRA + ScienceQA answers", "reverie", _PAPER, (76.3, 86.6, 1439.2, 67.9, 31.1, 60.7)),
    ("REVERIE-1.5-7B LoRA", "reverie", _PAPER, (80.5, 86.4, 1474.9, 67.3, 30.8, 61.8)),
    ("MoE-LLaVA-1.6Bx4", "reverie", _FEW, (85.9, 63.3, 63.9)),
    ("MoE-REVERIE-1.6Bx4", "reverie", _FEW, (86.7, 64.5, 77.1)),
    ("LLaVA-Phi3 LoRA", "reverie", _FEW, (85.6, 68.2, 73.8)),
    ("REVERIE-Phi3 LoRA", "reverie", _FEW, (86.3, 69.0, 86.7)),
    ("LLaVA-1.0-7B LoRA", "reverie", _MMHAL, (1.39, 0.76)),
    ("REVERIE-1.0-7B LoRA", "reverie", _MMHAL, (1.43, 0.73)),
    ("LLaVA-1.5-7B", "reverie", _MMHAL, (2.23, 0.55)),
    ("REVERIE-1.5-7B LoRA", "reverie", _MMHAL, (2.36, 0.50)),
    ("LLaVA-1.5-7B", "rlaif", ("OHal", "OHal-i"), (53.6, 25.2)),
    ("LLaVA-1.5-7B", "rerun", ("CHAIRs", "CHAIRi", "CHAIR-R", "CHAIR-L"), (49.9, 14.1, 78.3, 94.7)),
    ("LLaVA-1.5-7B", "amber", _AMBER, (83.5, 7.8, 51.0, 36.4, 4.2, 72.0, 74.7)),
    ("LLaVA-1.5", "hallusion", ("Hallusion-a", "Hallusion-q", "Hallusion-f"), (46.94, 10.55, 24.86)),
    ("LLaVA-1.0-7B", "gavie", ("GAVIE-A", "GAVIE-R"), (4.36, 6.11)),
    ("LLaVA-1.5-7B", "gavie", ("GAVIE-A", "GAVIE-R"), (6.42, 8.20)),
)

SCORES: tuple[Published, ...] = tuple(
    Published(model, benchmark, metric, round(value * scale, 6), source)
    for model, source, columns, values in _TABLES
    for column, value in zip(columns, values, strict=True)
    for benchmark, metric, scale in (_COLUMNS[column],)
)


def published_scores(benchmark: str) -> list[Published]:
    """Return the published scores of a benchmark, by its official rule."""
    return [score for score in SCORES if score.benchmark == benchmark]
