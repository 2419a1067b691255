"""LRV-Instruction's annotation files: an instruction, its answer and its task a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import BadRow, Example, ReadLog, conversation, each, shown

_KNOWN = {"image_id", "question", "instruction", "answer", "task", "kind"}


def talks(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """The rows' conversations; those that cannot be used go to `reading.problems`.

    A picture is named by its Visual Genome id; a name without a suffix gets `.jpg`.
    """

    def make(row: dict[str, Any], where: str) -> list[Example]:
        asked, answer, image = row.get("question", row.get("instruction")), row.get("answer"), row.get("image_id")
        if isinstance(image, bool) or not isinstance(image, int | str) or not str(image).strip():
            raise BadRow("needs 'image_id', a name or a number")
        if not (isinstance(asked, str) and isinstance(answer, str) and asked.strip() and answer.strip()):
            raise BadRow("needs 'image_id', 'question' and 'answer'")
        name = str(image).strip()
        kind = "negative" if row.get("task") == "negative" else ""
        said = conversation([shown(asked.strip()), Turn("assistant", answer.strip())], dataset="lrv", kind=kind)
        return [Example(name if "." in name.rsplit("/", 1)[-1] else f"{name}.jpg", said, where)]

    return each(rows, log, _KNOWN, make)
