"""Parsers of yes and no in answers of any form."""

from __future__ import annotations

import re

from reverie_jax.eval.benchmarks.vqa_normalization import strip_punctuation


def vlmevalkit_yes_no(answer: str) -> str:
    """Return "yes" or "no" if only one of them is a word of the answer, as VLMEvalKit; else ""."""
    words = {"yes", "no"} & set(strip_punctuation(answer.lower()).split())
    return words.pop() if len(words) == 1 else ""


def has_no_verdict(answer: str) -> bool:
    """Return whether none of yes, no and not is a word of the answer, in any case and between any punctuation."""
    return not {"yes", "no", "not"} & set(re.findall(r"\w+", answer.lower()))
