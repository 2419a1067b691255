"""Read the output of REVERIE's own scripts, whose rows become replies in the journal."""

from __future__ import annotations

import json
from pathlib import Path

from reverie_jax.annotate import parsing
from reverie_jax.annotate.files import JUDGED, QUESTIONS, RATIONALES, Row
from reverie_jax.annotate.schemas import QuestionSet
from reverie_jax.data.reflection import AnnotatedQuestion, classify_question
from reverie_jax.data.row_files import read_rows
from reverie_jax.data.sources.annotated import KEYS, QUESTION_KEYS, RATIONALE_KEYS, VERDICT
from reverie_jax.hosted.images import localize_name
from reverie_jax.hosted.interface import AnnotationError

ADOPTED = "original_rows.json"
"""The original scripts' rows, kept in a file of their own because outputs have the names of theirs."""
_RAW_FOLDERS = {
    QUESTIONS: ("reasoning_instruct_raw_data", QUESTION_KEYS),
    RATIONALES: ("rationale_raw_data", KEYS),
    JUDGED: ("check_results", (*KEYS, VERDICT)),
}


def read_original_rows(folder: Path, images_folder: Path) -> tuple[list[Row], int]:
    """Read the scripts' rows: combined files first, then raw files for missing rows.

    Returns:
        The usable rows, each merged over all stages, and the number of broken rows and files.

    Raises:
        UserError: A combined file is broken.
    """
    num_broken, merged = 0, dict[tuple[str, ...], Row]()
    for file, (raw, keys) in _RAW_FOLDERS.items():
        rows = list(read_rows(folder / file, min_rows=0)) if (folder / file).exists() else []
        for path in sorted((folder / raw).glob("*.json"), key=lambda path: (len(path.name), path.name)):
            try:
                content = json.loads(path.read_text("utf-8"))
                rows += _raw_question_rows(content) if file == QUESTIONS else [content]
            except (OSError, ValueError, KeyError, TypeError, AnnotationError, RecursionError):
                num_broken += 1  # cut off by a kill, or never usable: requested again
        for row in rows:
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
                num_broken += 1
                continue
            given = [key for key in RATIONALE_KEYS if isinstance(row.get(key), str)]  # a human's, with the question
            values = {key: parsing.clean(row[key]) for key in dict.fromkeys([*keys, *given])}
            image, question, right, wrong = (values[key] for key in QUESTION_KEYS)
            if not (image and question and right and wrong) or right.lower() == wrong.lower():
                num_broken += 1
                continue
            values["image"] = localize_name(images_folder, image)
            identity = (values["image"], question, right, wrong)
            merged.setdefault(identity, {}).update({key: value for key, value in values.items() if value})
    return list(merged.values()), num_broken


def _raw_question_rows(content: Row) -> list[Row]:
    """Return the rows of one raw reply; a row for each confusing answer."""
    return [
        dict(zip(QUESTION_KEYS, (content["image"], q.question, q.correct_answer, wrong), strict=True))
        for q in parsing.parse_questions(json.dumps(content["content"]))
        for wrong in q.confusing_answers
    ]


def question_replies(rows: list[Row]) -> dict[str, str]:
    """Return replies to the stage `questions`, as a model would have given them, by image."""
    by_image: dict[str, dict[tuple[str, str], list[str]]] = {}
    for row in rows:
        questions = by_image.setdefault(row["image"], {})
        questions.setdefault((row["question"], row["correct_answer"]), []).append(row["confusing_answer"])
    return {
        image: QuestionSet(
            questions=[
                AnnotatedQuestion(
                    question=question,
                    type=classify_question(question, answer),
                    correct_answer=answer,
                    confusing_answers=wrong,
                )
                for (question, answer), wrong in questions.items()
            ]
        ).model_dump_json()
        for image, questions in by_image.items()
    }
