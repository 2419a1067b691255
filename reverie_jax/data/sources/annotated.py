"""Rows of the annotation pipeline, or of REVERIE's scripts: a question, two answers, a rationale for each, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reverie_jax.data.reflection import AnnotatedQuestion, Reflection, reflection_conversations
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import Example, InvalidRow, ReadLog, answer_text, parse_rows

VERDICT = "gemini_pro_judge"
"""The verdict's key in REVERIE's files, whichever model judged: `yes` (the rationales contradict) drops a row."""
QUESTION_KEYS = ("image", "question", "correct_answer", "confusing_answer")
RATIONALE_KEYS = ("correct_rationale", "incorrect_rationale")
KEYS = (*QUESTION_KEYS, *RATIONALE_KEYS)
_ANSWERS = ("correct_answer", "confusing_answer")
"""Keys of texts that may be numbers."""


def read_examples(rows: Rows, log: ReadLog, *, filtered: bool = True) -> Iterator[Example]:
    """Yield a positive conversation for each question, and a negative one for each of its wrong answers.

    Args:
        rows: The file.
        log: Gets problems and notes.
        filtered: Skip rows that the judge rejected or did not judge.
    """
    explained: set[tuple[str, ...]] = set()
    dropped = 0

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        nonlocal dropped
        texts = {key: answer_text(row.get(key)) if key in _ANSWERS else row.get(key) for key in KEYS}
        missing = [key for key, text in texts.items() if not isinstance(text, str) or not text.strip()]
        if missing:
            raise InvalidRow(f"missing or empty: {', '.join(missing)}")
        if filtered and str(row.get(VERDICT, "")).strip().lower() != "no":
            dropped += 1
            return []
        image, question, right, wrong, why_right, why_wrong = (str(texts[key]).strip() for key in KEYS)
        annotated = AnnotatedQuestion.model_construct(question=question, correct_answer=right)
        try:
            positive, negative = reflection_conversations(Reflection(annotated, why_right, ((wrong, why_wrong),)))
        except ValueError as error:
            raise InvalidRow(str(error)) from None
        examples = [Example(image, negative, where)]
        key = (image, question, right, why_right)
        if key not in explained:
            explained.add(key)
            examples.insert(0, Example(image, positive, where))
        return examples

    yield from parse_rows(rows, log, {*KEYS, VERDICT, "judges", "question_type", "reason"}, parse)
    if dropped:
        log.notes.append(f"{rows.path}: skipped {dropped} rows that the judge did not accept")
