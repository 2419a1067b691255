"""Rows of the annotation pipeline, ours or REVERIE's own: a question, two answers, why each is right or wrong, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from reverie_jax.data.annotate.interface import AnnotatedQuestion
from reverie_jax.data.annotate.stages import Reflection, conversations
from reverie_jax.data.sources.rows import Reading, Talk

VERDICT = "gemini_pro_judge"
KEYS = ("image", "question", "correct_answer", "confusing_answer", "correct_rationale", "incorrect_rationale")


def talks(name: str, rows: Iterable[Any], reading: Reading, *, filtered: bool = True) -> Iterator[Talk]:
    """The rows' conversations: a positive one for each question, and a negative one for each wrong answer.

    Args:
        filtered: leave out what the judge found to contradict itself, and what was not judged.
    """
    explained: set[tuple[str, ...]] = set()
    dropped = 0
    for number, row in enumerate(rows):
        where = f"{name}: row {number}"
        lacking = [key for key in KEYS if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if lacking:
            reading.problems.append((where, f"lacks {', '.join(lacking)}"))
            continue
        reading.unknown(row, {*KEYS, VERDICT, "judges", "question_type", "reason"})
        if filtered and str(row.get(VERDICT, "")).strip().lower() != "no":
            dropped += 1
            continue
        image, question, right, wrong, why, why_not = (row[key].strip() for key in KEYS)
        asked = AnnotatedQuestion.model_construct(question=question, correct_answer=right)
        positive, negative = conversations(Reflection(asked, why, ((wrong, why_not),)))
        if (image, question, right, why) not in explained:
            explained.add((image, question, right, why))
            yield Talk(image, positive, where)
        yield Talk(image, negative, where)
    if dropped:
        reading.notes.append(f"{name}: {dropped} rows without the judge's consent are left out")
