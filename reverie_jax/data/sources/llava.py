"""LLaVA's annotation files (80k, 150k, 558k, 665k): conversations with or without an image.

Also read: `messages` with `role` and `content`, and `images`, as LLaMA-Factory writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import IMAGE, Role, Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import (
    Example,
    InvalidRow,
    ReadLog,
    image_conversation,
    image_question,
    parse_rows,
    with_one_marker,
)

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
KNOWN = {"id", "image", "images", "conversations", "messages", "model", "source", "question_type"}


def parse_turns(row: Any) -> tuple[str, list[Turn]]:
    """Return (image name, turns) of a row. If it has an image, exactly one marker of the first question shows it.

    As in LLaVA's trainer, an answer before the first question and a question without an answer are dropped.

    Raises:
        InvalidRow: The row cannot be used.
    """
    if not isinstance(row, dict):
        raise InvalidRow("not an object")
    image = row.get("image", row.get("images")) or ""
    if isinstance(image, list):
        if len(image) > 1:
            raise InvalidRow(f"{len(image)} images in one row; only one is supported")
        image = image[0]
    if not isinstance(image, str):
        raise InvalidRow("'image' must be a file name")
    messages = row.get("conversations", row.get("messages"))
    if not isinstance(messages, list) or len(messages) < 2:
        raise InvalidRow("'conversations' must be a list of at least two turns")
    turns = [_parse_turn(message) for message in messages]
    if turns[0].role == "assistant":
        turns = turns[1:]
    if len(turns) % 2 == 1 and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise InvalidRow("no question with an answer")
    if image:
        turns = [with_one_marker(turn) if turn.role == "user" else turn for turn in turns]
        if not any(IMAGE in turn.text for turn in turns):
            turns[0] = image_question(turns[0].text)
    elif any(IMAGE in turn.text for turn in turns):
        raise InvalidRow(f"{IMAGE} in a row without an image")
    return image, turns


def _parse_turn(message: Any) -> Turn:
    try:
        role = ROLES[message["from"] if "from" in message else message["role"]]
        text = message["value"] if "value" in message else message["content"]
        if isinstance(text, str):
            return Turn(role, text)
    except (KeyError, TypeError):
        pass
    excerpt = json.dumps(message, default=str)[:80]
    raise InvalidRow(f"a turn needs 'from' (human or gpt) and 'value' (text); found {excerpt}")


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversation of each row."""

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        image, turns = parse_turns(row)
        return [Example(image, image_conversation(turns, dataset="llava"), where)]

    return parse_rows(rows, log, KNOWN, parse)
