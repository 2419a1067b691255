"""Pairs of a better and a worse answer to one question: RLHF-V's and RLAIF-V's Parquet files, or the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import BadRow, Example, ReadLog, content_name, conversation, each, embedded, shown

_SIDES = ("chosen", "rejected")
_KNOWN = {
    "ds_name",
    "image",
    "text",
    "origin_dataset",
    "origin_split",
    "idx",
    "image_path",
    "logps",
    "question",
    *_SIDES,
}


def is_one(row: dict[str, Any]) -> bool:
    """Whether a row is a pair: the three texts are in `text` as JSON (RLHF-V), or in columns (RLAIF-V)."""
    return {"chosen", "rejected"} <= row.keys() or (isinstance(row.get("text"), str) and '"rejected"' in row["text"])


def talks(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Two conversations a row, `chosen` and `rejected`, of one `pair`, which its content names; rows that cannot be used go
    to `reading.problems`.
    """
    return each(rows, log, _KNOWN, _pair)


def _pair(row: dict[str, Any], where: str) -> list[Example]:
    said = row
    if isinstance(row.get("text"), str):
        try:
            said = json.loads(row["text"])
        except ValueError as error:
            raise BadRow(f"'text' is not JSON ({error})") from None
    found = [said.get(key) if isinstance(said, dict) else None for key in ("question", *_SIDES)]
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if len(texts) < 3:
        raise BadRow("needs 'question', 'chosen' and 'rejected'")
    question, *answers = texts
    if answers[0].strip() == answers[1].strip():
        raise BadRow("both answers are the same")
    image, encoded = embedded(row.get("image"), row.get("image_path"))
    if not image:
        raise BadRow("has no picture")
    source = str(row.get("ds_name") or "preferences").lower()
    pair = content_name(json.dumps([content_name(encoded) if encoded else image, *texts]).encode())[:16]
    return [
        Example(
            image,
            conversation([shown(question), Turn("assistant", answer)], dataset=source, kind=side, pair=pair),
            where,
            encoded,
        )
        for side, answer in zip(_SIDES, answers, strict=True)
    ]
