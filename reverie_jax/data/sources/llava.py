"""LLaVA's annotation files (80k, 150k, 558k, 665k): rows of turns, with a picture or without.

Also read: `messages` with `role` and `content`, and `images`, as LLaMA-Factory writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import IMAGE, Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import BadRow, Example, ReadLog, conversation, each, once, shown

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
KNOWN = {"id", "image", "images", "conversations", "messages", "model", "source", "question_type"}


def turns_of(row: Any) -> tuple[str, list[Turn]]:
    """(picture's name, turns) of a row; the first question shows the picture, once, where there is one.

    As in LLaVA's trainer, an answer before the first question is left off, and so is a question without an answer.

    Raises:
        BadRow: it cannot be used.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object")
    image = row.get("image", row.get("images")) or ""
    if isinstance(image, list):
        if len(image) > 1:
            raise BadRow(f"{len(image)} pictures in one row; one is supported")
        image = image[0]
    if not isinstance(image, str):
        raise BadRow("'image' must be a file name")
    said = row.get("conversations", row.get("messages"))
    if not isinstance(said, list) or len(said) < 2:
        raise BadRow("'conversations' must be a list of at least two turns")
    turns: list[Turn] = []
    for turn in said:
        try:
            who = turn["from"] if "from" in turn else turn["role"]
            text = turn["value"] if "value" in turn else turn["content"]
            role = ROLES[who]
        except (KeyError, TypeError):
            raise _no_turn(turn) from None
        if not isinstance(text, str):
            raise _no_turn(turn)
        turns.append(Turn(role, text))  # type: ignore[arg-type]
    if turns[0].role == "assistant":
        turns = turns[1:]
    if len(turns) % 2 == 1 and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise BadRow("no question with an answer")
    if image:
        turns = [once(turn) if turn.role == "user" else turn for turn in turns]
        if not any(IMAGE in turn.text for turn in turns):
            turns[0] = shown(turns[0].text)
    elif any(IMAGE in turn.text for turn in turns):
        raise BadRow(f"{IMAGE} in a row without a picture")
    return image, turns


def _no_turn(turn: Any) -> BadRow:
    found = json.dumps(turn, default=str)[:80]
    return BadRow(f"a turn needs 'from' (human or gpt) and 'value'; found {found}")


def talks(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """The rows' conversations; those that cannot be used go to `reading.problems`."""

    def make(row: dict[str, Any], where: str) -> list[Example]:
        image, turns = turns_of(row)
        return [Example(image, conversation(turns, dataset="llava"), where)]

    return each(rows, log, KNOWN, make)
