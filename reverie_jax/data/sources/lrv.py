"""LRV-Instruction's annotation files: an instruction, its answer and its task a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from reverie_jax.data.conversation import Turn
from reverie_jax.data.sources.llava import BadRow, conversation, shown
from reverie_jax.data.sources.rows import Reading, Talk

_KNOWN = {"image_id", "question", "instruction", "answer", "task", "kind"}


def talks(name: str, rows: Iterable[Any], reading: Reading) -> Iterator[Talk]:
    """The rows' conversations; those that cannot be used go to `reading.problems`.

    A picture is named by its Visual Genome id; a name without a suffix gets `.jpg`.
    """
    for number, row in enumerate(rows):
        where = f"{name}: row {number}"
        try:
            if not isinstance(row, dict):
                raise BadRow("not an object")
            reading.unknown(row, _KNOWN)
            asked, answer = row.get("question", row.get("instruction")), row.get("answer")
            image = str(row.get("image_id", ""))
            if not (isinstance(asked, str) and isinstance(answer, str) and asked.strip() and answer.strip() and image):
                raise BadRow("needs 'image_id', 'question' and 'answer'")
            turns = [shown(asked.strip()), Turn("assistant", answer.strip())]
            kind = "negative" if row.get("task") == "negative" else ""
            image = image if "." in image.rsplit("/", 1)[-1] else f"{image}.jpg"
            yield Talk(image, conversation(turns, source="lrv", kind=kind), where)
        except BadRow as error:
            reading.problems.append((where, str(error)))
