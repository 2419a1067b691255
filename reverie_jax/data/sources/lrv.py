"""LRV-Instruction's annotation files: an instruction, its answer and its task in each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import Turn
from reverie_jax.data.row_files import Rows, as_integer
from reverie_jax.data.sources.common import (
    Example,
    InvalidRow,
    ReadLog,
    answer_text,
    first_given,
    image_conversation,
    image_question,
    parse_rows,
)

_KNOWN = {"image_id", "question", "instruction", "answer", "task", "kind"}


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversation of each row. Images are named by Visual Genome id; a name without a suffix gets `.jpg`."""

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        question, image = first_given(row, "question", "instruction"), row.get("image_id")
        answer = answer_text(row.get("answer"))
        if isinstance(image, float) or (isinstance(image, str) and image.endswith(".0")):  # as tables write numbers
            image = as_integer(image)
        if isinstance(image, bool) or not isinstance(image, int | str) or not str(image).strip():
            raise InvalidRow("'image_id' must be a name or a number")
        if not (isinstance(question, str) and answer is not None and question.strip() and answer.strip()):
            raise InvalidRow("'question' and 'answer' must be texts; an answer may be a number")
        name = str(image).strip()
        turns = [image_question(question.strip()), Turn("assistant", answer.strip())]
        kind = "negative" if row.get("task") == "negative" else ""
        file = name if "." in name.rsplit("/", 1)[-1] else f"{name}.jpg"
        return [Example(file, image_conversation(turns, dataset="lrv", kind=kind), where)]

    return parse_rows(rows, log, _KNOWN, parse)
