"""Pairs of a better and a worse answer to one question: RLHF-V's and RLAIF-V's Parquet files, or the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import (
    Example,
    InvalidRow,
    ReadLog,
    content_digest,
    image_conversation,
    image_question,
    parse_image,
    parse_rows,
)

_SIDES = ("chosen", "rejected")
_KNOWN = {
    *("ds_name", "image", "text", "origin_dataset", "origin_split", "idx", "image_path", "logps", "question"),
    *_SIDES,
}


def is_preference_pair(row: dict[str, Any]) -> bool:
    """Return whether a row is a pair: its texts are JSON in `text` (RLHF-V), or columns (RLAIF-V)."""
    return {"chosen", "rejected"} <= row.keys() or (isinstance(row.get("text"), str) and '"rejected"' in row["text"])


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield two conversations for each row, `chosen` and `rejected`, of one `pair`, which is a digest of the content."""
    return parse_rows(rows, log, _KNOWN, _parse)


def _parse(row: dict[str, Any], where: str) -> list[Example]:
    texts: Any = row
    if isinstance(row.get("text"), str):
        try:
            texts = json.loads(row["text"])
        except ValueError as error:
            raise InvalidRow(f"'text' is not JSON ({error})") from None
    values: list[Any] = [texts.get(key) if isinstance(texts, dict) else None for key in ("question", *_SIDES)]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise InvalidRow("'question', 'chosen' and 'rejected' must be texts")
    question, *answers = values
    if answers[0].strip() == answers[1].strip():
        raise InvalidRow("both answers are the same")
    image, encoded = parse_image(row.get("image"), row.get("image_path"))
    if not image:
        raise InvalidRow("no image")
    dataset = str(row.get("ds_name") or "preferences").lower()
    pair = content_digest(json.dumps([content_digest(encoded) if encoded else image, *values]).encode())[:16]
    examples = []
    for side, answer in zip(_SIDES, answers, strict=True):
        turns = [image_question(question), Turn("assistant", answer)]
        examples.append(
            Example(image, image_conversation(turns, dataset=dataset, kind=side, pair=pair), where, encoded)
        )
    return examples
