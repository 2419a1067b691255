"""Pairs of a better and a worse answer to one question: RLHF-V's and RLAIF-V's Parquet files, or the same as JSON.

Also read: TRL's `prompt`, `chosen` and `rejected`, as texts or as messages, and LLaMA-Factory's, whose question is in
`conversations`. Messages may begin with other questions and their answers: only the last answer is supervised.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import llava
from reverie_jax.data.sources.common import (
    Example,
    InvalidRow,
    ReadLog,
    answer_text,
    content_digest,
    first_given,
    image_conversation,
    image_question,
    parse_image,
    parse_rows,
)

_SIDES = ("chosen", "rejected")
_KNOWN = {
    *("ds_name", "image", "text", "origin_dataset", "origin_split", "idx", "image_path", "logps", "question"),
    *("prompt", "conversations", "messages", "images", "id"),
    *_SIDES,
}


def is_preference_pair(row: dict[str, Any]) -> bool:
    """Return whether a row is a pair: its texts are JSON in `text` (RLHF-V), or columns (RLAIF-V)."""
    return {"chosen", "rejected"} <= row.keys() or (isinstance(row.get("text"), str) and '"rejected"' in row["text"])


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield two conversations for each row, `chosen` and `rejected`, of one `pair`, which is a digest of the content."""
    systems = 0

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        nonlocal systems
        examples, system = _parse(row, where)
        systems += system
        return examples

    yield from parse_rows(rows, log, _KNOWN, parse)
    llava.note_systems(rows, log, systems)


def _parse(row: dict[str, Any], where: str) -> tuple[list[Example], bool]:
    """Return the two conversations of a row, and whether its question begins with the text of a system turn."""
    texts: Any = row
    if isinstance(row.get("text"), str):
        try:
            texts = json.loads(row["text"])
        except ValueError as error:
            raise InvalidRow(f"'text' is not JSON ({error})") from None
    system, before = False, list[Turn]()
    if any(isinstance(row.get(side), list | dict) for side in _SIDES):
        image, encoded, system, before, *values = _parse_messages(row)
    else:
        named = first_given(row, "image", "image_path") is not None
        image, encoded = parse_image(row.get("image"), row.get("image_path")) if named else llava.find_image(row)
        values = _parse_texts(texts if isinstance(texts, dict) else {})
    question, *answers = values
    if answers[0].strip() == answers[1].strip():
        raise InvalidRow("both answers are the same")
    if not image:
        raise InvalidRow("no image")
    dataset = str(row.get("ds_name") or "preferences").lower()
    content = [content_digest(encoded) if encoded else image, *(turn.text for turn in before), *values]
    pair = content_digest(json.dumps(content).encode())[:16]
    examples = []
    for side, answer in zip(_SIDES, answers, strict=True):
        asked = Turn("user", question) if before else image_question(question)
        turns = [*before, asked, Turn("assistant", answer)]
        examples.append(
            Example(image, image_conversation(turns, dataset=dataset, kind=side, pair=pair), where, encoded)
        )
    return examples, system


def _parse_texts(texts: dict[str, Any]) -> list[str]:
    """Return question, chosen and rejected answer, which may be numbers."""
    question = first_given(texts, "question", "prompt")
    answers = [answer_text(texts.get(side)) for side in _SIDES]
    values = [value for value in (question, *answers) if isinstance(value, str) and value.strip()]
    if len(values) < 3:
        raise InvalidRow("'question', 'chosen' and 'rejected' must be texts; an answer may be a number")
    return values


def _parse_messages(row: dict[str, Any]) -> tuple[str, bytes, bool, list[Turn], str, str, str]:
    """Return (image, its content, whether there is a system turn, turns before, question, chosen, rejected) of a row.

    TRL's `prompt` may be part of both sides; LLaMA-Factory's is `conversations`.
    """
    prompt = first_given(row, "prompt", "conversations", "messages")
    prompt = [] if prompt is None else llava.as_messages(prompt, "user")
    sides = [llava.parse_messages([*prompt, *llava.as_messages(row[side], "assistant")], row) for side in _SIDES]
    chosen, rejected = sides
    if chosen.shortened or rejected.shortened:
        raise InvalidRow("'chosen' and 'rejected' must end with an answer, and their prompt must begin with a question")
    if chosen[:2] != rejected[:2] or chosen.turns[:-1] != rejected.turns[:-1]:
        raise InvalidRow("'chosen' and 'rejected' answer different questions")
    *before, question, answer = chosen.turns
    before = [dataclasses.replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in before]
    return chosen.image, chosen.encoded, chosen.system, before, question.text, answer.text, rejected.turns[-1].text
