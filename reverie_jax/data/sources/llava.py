"""LLaVA's annotation files (80k, 150k, 558k, 665k): conversations with or without an image.

Also read: `messages` with `role` and `content`, and `images`, as LLaMA-Factory and TRL write them; contents may be lists of
parts (`text`, `image`), and TRL's rows may have `prompt` and `completion`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from reverie_jax.data.conversation import IMAGE, Role, Turn
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import (
    InvalidRow,
    ReadLog,
    answer_text,
    first_given,
    image_question,
    parse_image,
    with_one_marker,
)

EMPTY_ANSWER = "empty answer"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
KNOWN = {
    *("id", "image", "images", "conversations", "messages", "prompt", "completion", "model", "source", "question_type"),
}
_REMOTE = ("http:", "https:", "data:")


class ParsedRow(NamedTuple):
    """The conversation of a row.

    Attributes:
        image: name of its image; empty without one.
        encoded: the image, if the row contains it.
        turns: its turns, without what LLaVA's trainer leaves out.
        shortened: whether turns were left out.
        system: whether the first question begins with the text of a system turn.
    """

    image: str
    encoded: bytes
    turns: list[Turn]
    shortened: bool = False
    system: bool = False


def note_systems(rows: Rows, log: ReadLog, count: int) -> None:
    """Note the number of rows whose first question begins with the text of a system turn."""
    if count:
        log.notes.append(f"{rows.path}: put the text of the system turn before the first question of {count} rows")


def has_turns(row: dict[str, Any]) -> bool:
    """Return whether a row has turns, or TRL's `prompt` and `completion`."""
    return not {"conversations", "messages"}.isdisjoint(row) or {"prompt", "completion"} <= row.keys()


def parse_row(row: Any) -> ParsedRow:
    """Parse a row.

    Raises:
        InvalidRow: The row cannot be used.
    """
    if not isinstance(row, dict):
        raise InvalidRow("not an object")
    messages = first_given(row, "conversations", "messages")
    if messages is None and {"prompt", "completion"} <= row.keys():
        messages = [*as_messages(row["prompt"], "user"), *as_messages(row["completion"], "assistant")]
    if not isinstance(messages, list):
        raise InvalidRow("'conversations' must be a list of at least two turns")
    return parse_messages(messages, row)


def as_messages(value: Any, role: Role) -> list[Any]:
    """Return TRL's `prompt` or an answer as messages: it is a list of them, one of them, or the text of one."""
    if isinstance(value, list):
        return value
    return [value if isinstance(value, dict) else {"role": role, "content": value}]


def parse_messages(messages: Sequence[Any], row: dict[str, Any]) -> ParsedRow:
    """Parse the messages of a row.

    If it has an image, exactly one marker shows it: that of the first question with a marker, else one before the first.

    As in LLaVA's trainer, an answer before the first question and a question without an answer are left out. The text of a
    system turn is put before the first question, as chat templates without a system role do.

    Args:
        messages: The messages.
        row: Names the image, if the messages don't.

    Raises:
        InvalidRow: The row cannot be used.
    """
    instruction = ""
    inside: list[Any] = []
    if messages and isinstance(messages[0], dict) and "system" in (messages[0].get("from"), messages[0].get("role")):
        instruction, inside = _parse_content(messages[0], "system")
        messages = messages[1:]
    if len(messages) < 2:
        raise InvalidRow("'conversations' must be a list of at least two turns")
    turns = []
    for message in messages:
        turn, images = _parse_turn(message)
        turns.append(turn)
        inside += images
    image, encoded = find_image(row, inside)
    count = len(turns)
    if turns[0].role == "assistant":
        turns = turns[1:]
    if len(turns) % 2 == 1 and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise InvalidRow("no question with an answer")
    if instruction.strip():
        turns[0] = Turn(turns[0].role, f"{instruction.strip()}\n\n{turns[0].text}")
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
    return ParsedRow(image, encoded, turns, len(turns) < count, bool(instruction.strip()))


def find_image(row: dict[str, Any], inside: Sequence[Any] = ()) -> tuple[str, bytes]:
    """Return (name, the image if the row contains it) of a row's only image; both are empty without one.

    Args:
        row: The row.
        inside: Images that its messages name.

    Raises:
        InvalidRow: It is not an image, or the row has several.
    """
    given: list[Any] = list(inside)
    for value in (row.get("image"), row.get("images")):
        given += value if isinstance(value, list) else [] if value in (None, "") else [value]
    images = dict.fromkeys(parse_image(value, None) for value in given)
    if not all(name for name, _ in images):
        raise InvalidRow("'image' must be a file name or an image")
    if len(images) > 1:
        raise InvalidRow(f"{len(images)} images in one row; only one is supported")
    return next(iter(images), ("", b""))


def _parse_turn(message: Any) -> tuple[Turn, list[Any]]:
    """Return a turn, and the images that it names itself."""
    try:
        role = ROLES[message.get("from") or message["role"]]
    except (KeyError, TypeError, AttributeError):
        raise _invalid_turn(message) from None
    text, images = _parse_content(message, role)
    return Turn(role, text), images


def _parse_content(message: dict[str, Any], role: str) -> tuple[str, list[Any]]:
    """Return the text of a message, and the images that it names itself. An answer may be a number."""
    content = message.get("content") if message.get("value") is None else message["value"]
    if isinstance(content, list):
        parts = [_parse_part(part) for part in content]
        if all(text is not None for text, _ in parts):
            return "\n".join(str(text) for text, _ in parts), [image for _, image in parts if image is not None]
    text = answer_text(content) if role == "assistant" else content
    if not isinstance(text, str):
        raise _invalid_turn(message)
    return text, []


def _parse_part(part: Any) -> tuple[str | None, Any]:
    """Return (text, image) of a part of a content: an image is shown by a marker, and may be named by the row instead."""
    if isinstance(part, str):
        return part, None
    if not isinstance(part, dict):
        return None, None
    kind = part.get("type") or ("text" if part.get("image") is None else "image")
    if kind == "text":
        return part["text"] if isinstance(part.get("text"), str) else None, None
    if kind not in ("image", "image_url"):
        raise InvalidRow(f"a part of a content is {str(kind)[:40]!r}; it must be a text or an image")
    image = first_given(part, "image", "path", "url", "image_url")
    if isinstance(image, dict) and isinstance(image.get("url"), str):
        image = image["url"]
    if isinstance(image, str) and image.startswith(_REMOTE):
        raise InvalidRow(f"its image is an address ({image[:40]}); save the image as a file and name that")
    return IMAGE, image


def _invalid_turn(message: Any) -> InvalidRow:
    excerpt = json.dumps(message, default=str)[:80]
    return InvalidRow(f"a turn needs 'from' (human or gpt) and 'value' (text); found {excerpt}")
