"""Yes or no, as toolkits read it in answers of any form."""

from __future__ import annotations

import re

from reverie_jax.eval.benchmarks.textvqa import without_marks


def vlmevalkit_yes_no(answer: str) -> str:
    """VLMEvalKit: one of yes and no as a word, and not the other; "" else."""
    said = {"yes", "no"} & set(without_marks(answer.lower()).split())
    return said.pop() if len(said) == 1 else ""


def neither(answer: str) -> bool:
    """Nothing in the answer says yes, no or not, in whatever case and between whatever marks."""
    return not {"yes", "no", "not"} & set(re.findall(r"\w+", answer.lower()))
