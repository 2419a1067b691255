"""LLaVA's annotation files (80k, 150k, 558k, 665k): rows of turns, with a picture or without.

Also read: `messages` with `role` and `content`, and `images`, as LLaMA-Factory writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.reference import show_first
from reverie_jax.data.sources.rows import Reading, Talk

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
_KNOWN = {"id", "image", "images", "conversations", "messages", "model", "source", "question_type"}


class BadRow(ValueError):
    """Why a row cannot be used."""


def turns_of(row: Any, reading: Reading) -> tuple[str, list[Turn]]:
    """(picture's name, turns) of a row; the first question shows the picture, once, where there is one.

    As in LLaVA's trainer, an answer before the first question is left off, and so is a question without an answer.

    Raises:
        BadRow: it cannot be used.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object")
    reading.unknown(row, _KNOWN)
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
            raise BadRow(f"a turn needs 'from' (human or gpt) and 'value'; found {str(turn)[:80]!r}") from None
        if not isinstance(text, str):
            raise BadRow(f"a turn needs 'from' (human or gpt) and 'value'; found {str(turn)[:80]!r}")
        turns.append(Turn(role, text))  # type: ignore[arg-type]
    if turns[0].role == "assistant":
        turns = turns[1:]
    if len(turns) % 2 == 1 and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise BadRow("no question with an answer")
    if image:
        turns = [_once(turn) if turn.role == "user" else turn for turn in turns]
        if not any(IMAGE in turn.text for turn in turns):
            turns[0] = shown(turns[0].text)
    elif any(IMAGE in turn.text for turn in turns):
        raise BadRow(f"{IMAGE} in a row without a picture")
    return image, turns


def shown(text: str) -> Turn:
    """A question about a picture, which it shows first where it does not say where."""
    return _once(Turn("user", text if IMAGE in text else f"{IMAGE}\n{text}"))


def _once(turn: Turn) -> Turn:
    return Turn(turn.role, show_first(turn.text)) if turn.text.count(IMAGE) > 1 else turn


def conversation(turns: Sequence[Turn], **options: Any) -> Conversation:
    """The turns about one picture, which each marker shows.

    Raises:
        BadRow: they do not alternate, or an answer holds a marker.
    """
    try:
        return Conversation(tuple(turns), (0,) * sum(turn.text.count(IMAGE) for turn in turns), **options)
    except ValueError as error:
        raise BadRow(str(error)) from None


def talks(name: str, rows: Iterable[Any], reading: Reading) -> Iterator[Talk]:
    """The rows' conversations; those that cannot be used go to `reading.problems`."""
    for number, row in enumerate(rows):
        where = f"{name}: row {number}"
        try:
            image, turns = turns_of(row, reading)
            yield Talk(image, conversation(turns, source="llava"), where)
        except BadRow as error:
            reading.problems.append((where, str(error)))
