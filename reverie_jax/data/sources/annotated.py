"""Rows of the annotation pipeline, ours or REVERIE's own: a question, two answers, why each is right or wrong, a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reverie_jax.data.reflection import AnnotatedQuestion, Reflection, conversations
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import BadRow, Example, ReadLog, each

VERDICT = "gemini_pro_judge"
"""The original's name for the verdict, whoever judged: `no` keeps a row, `yes` drops it."""
ASKED = ("image", "question", "correct_answer", "confusing_answer")
REASONED = ("correct_rationale", "incorrect_rationale")
KEYS = (*ASKED, *REASONED)


def talks(rows: Rows, log: ReadLog, *, filtered: bool = True) -> Iterator[Example]:
    """The rows' conversations: a positive one for each question, and a negative one for each wrong answer.

    Args:
        filtered: leave out what the judge found to contradict itself, and what was not judged.
    """
    explained: set[tuple[str, ...]] = set()
    dropped = 0

    def make(row: dict[str, Any], where: str) -> list[Example]:
        nonlocal dropped
        lacking = [key for key in KEYS if not isinstance(row.get(key), str) or not row[key].strip()]
        if lacking:
            raise BadRow(f"lacks {', '.join(lacking)}")
        if filtered and str(row.get(VERDICT, "")).strip().lower() != "no":
            dropped += 1
            return []
        image, question, right, wrong, why, why_not = (row[key].strip() for key in KEYS)
        asked = AnnotatedQuestion.model_construct(question=question, correct_answer=right)
        try:
            positive, negative = conversations(Reflection(asked, why, ((wrong, why_not),)))
        except ValueError as error:
            raise BadRow(str(error)) from None
        about = (image, question, right, why)
        found = [Example(image, negative, where)]
        if about not in explained:
            explained.add(about)
            found.insert(0, Example(image, positive, where))
        return found

    yield from each(rows, log, {*KEYS, VERDICT, "judges", "question_type", "reason"}, make)
    if dropped:
        log.notes.append(f"{rows.path}: {dropped} rows without the judge's consent are left out")
