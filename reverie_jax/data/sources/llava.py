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
    first_given,
    image_conversation,
    image_question,
    parse_image,
    parse_rows,
    with_one_marker,
)

EMPTY_ANSWER = "empty answer"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
KNOWN = {"id", "image", "images", "conversations", "messages", "model", "source", "question_type"}


def parse_turns(row: Any) -> tuple[str, bytes, list[Turn]]:
    """Return (image name, the image if the row contains it, turns) of a row.

    If it has an image, exactly one marker shows it: that of the first question with a marker, else one before the first.

    As in LLaVA's trainer, an answer before the first question and a question without an answer are left out.

    Raises:
        InvalidRow: The row cannot be used.
    """
    if not isinstance(row, dict):
        raise InvalidRow("not an object")
    image, encoded = _parse_image(row)
    messages = first_given(row, "conversations", "messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise InvalidRow("'conversations' must be a list of at least two turns")
    turns = [_parse_turn(message) for message in messages]
    if turns[0].role == "assistant":
        turns = turns[1:]
    if len(turns) % 2 == 1 and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise InvalidRow("no question with an answer")
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise InvalidRow(f"{EMPTY_ANSWER}: turn {number} has no text")
    if image:
        shows = next((n for n, turn in enumerate(turns) if turn.role == "user" and IMAGE in turn.text), 0)
        turns = [
            Turn(turn.role, turn.text.replace(IMAGE, "").strip()) if turn.role == "user" and n != shows else turn
            for n, turn in enumerate(turns)
        ]
        turns[shows] = with_one_marker(image_question(turns[shows].text))
    elif any(IMAGE in turn.text for turn in turns):
        raise InvalidRow(f"{IMAGE} in a row without an image")
    return image, encoded, turns


def _parse_image(row: dict[str, Any]) -> tuple[str, bytes]:
    given: list[Any] = []
    for value in (row.get("image"), row.get("images")):
        given += value if isinstance(value, list) else [] if value in (None, "") else [value]
    images = dict.fromkeys(parse_image(value, None) for value in given)
    if not all(name for name, _ in images):
        raise InvalidRow("'image' must be a file name or an image")
    if len(images) > 1:
        raise InvalidRow(f"{len(images)} images in one row; only one is supported")
    return next(iter(images), ("", b""))


def _parse_turn(message: Any) -> Turn:
    try:
        role = ROLES[message.get("from") or message["role"]]
        text = message["content"] if message.get("value") is None else message["value"]
        if isinstance(text, str):
            return Turn(role, text)
    except (KeyError, TypeError, AttributeError):
        pass
    excerpt = json.dumps(message, default=str)[:80]
    raise InvalidRow(f"a turn needs 'from' (human or gpt) and 'value' (text); found {excerpt}")


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversation of each row."""
    shortened = 0

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        nonlocal shortened
        image, encoded, turns = parse_turns(row)
        shortened += is_shortened(row, turns)
        return [Example(image, image_conversation(turns, dataset="llava"), where, encoded)]

    yield from parse_rows(rows, log, KNOWN, parse)
    note_shortened(rows, log, shortened)


def is_shortened(row: dict[str, Any], turns: list[Turn]) -> bool:
    """Return whether `parse_turns` left out a turn: an answer without a question, or the reverse."""
    return len(turns) < len(first_given(row, "conversations", "messages"))


def note_shortened(rows: Rows, log: ReadLog, count: int) -> None:
    """Note the number of rows of which a turn was left out."""
    if count:
        log.notes.append(
            f"{rows.path}: dropped answers without a question or questions without an answer of {count} rows"
        )
