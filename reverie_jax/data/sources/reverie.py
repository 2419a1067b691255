"""REVERIE's released form: one row per (question, answer, rationale), as a four-turn LLaVA conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.images import BrokenImage, decode
from reverie_jax.errors import DataError

Answers = Literal["once", "as-published"]
_ROLES = {"human": "user", "gpt": "assistant"}


def write(path: Path, images: Iterable[tuple[str, str, Sequence[Conversation]]]) -> int:
    """Writes (id, image file, conversations) rows as a LLaVA annotation file; returns how many conversations."""
    back = {ours: theirs for theirs, ours in _ROLES.items()}
    rows = [
        {
            "id": id,
            "image": image,
            "conversations": [{"from": back[turn.role], "value": turn.text} for turn in talk.turns],
        }
        for id, image, talks in images
        for talk in talks
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return len(rows)


def _turns(where: str, raw: Any) -> list[Turn]:
    if not isinstance(raw, list) or len(raw) < 2:
        raise DataError(f"{where}: 'conversations' must be a list of at least two turns")
    turns = []
    for turn in raw:
        try:
            if not isinstance(turn["value"], str):
                raise TypeError
            turns.append(Turn(_ROLES[turn["from"]], turn["value"]))  # type: ignore[arg-type]
        except (KeyError, TypeError):
            raise DataError(f"{where}: a turn needs 'from' (human or gpt) and 'value'; found {turn!r}") from None
    first = turns[0]
    if IMAGE not in first.text:
        turns[0] = Turn(first.role, f"{IMAGE}\n{first.text}")
    return turns


def read(path: Path, pictures: Path, *, answers: Answers = "once") -> Iterator[ImageRecord]:
    """Records of an annotation file, one an image, in the order of the images' first rows.

    Args:
        path: the JSON file.
        pictures: folder that the rows' `image` paths are relative to, and cannot leave.
        answers: whether an answer that several rows repeat is taught once, or as often as it is written.

    Raises:
        DataError: the file, a row or a picture cannot be used; all are named.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a JSON list of rows, and at least one")
    if not pictures.is_dir():
        raise DataError(f"{pictures}: no such folder of pictures")
    by_image: dict[str, list[Conversation]] = {}
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise DataError(f"{where}: needs 'image', a file name")
        turns = _turns(where, row.get("conversations"))
        about = (row["image"], turns[0].text, turns[1].text)
        if answers == "once" and about in seen:
            turns[1] = Turn(turns[1].role, turns[1].text, weight=0.0)
        seen.add(about)
        try:
            talk = Conversation(tuple(turns), source="reverie")
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        by_image.setdefault(row["image"], []).append(talk)
    for name, talks in by_image.items():
        yield ImageRecord(name, _picture(pictures, name), tuple(talks))


def _picture(folder: Path, name: str) -> bytes:
    """The bytes of a picture that is known to open."""
    root = folder.resolve()
    try:
        file = (root / name).resolve()
    except ValueError as error:
        raise DataError(f"{folder}: {name!r} is no file name ({error})") from None
    if not file.is_relative_to(root):
        raise DataError(f"{name}: leaves the picture folder {folder}")
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise DataError(f"{folder / name}: cannot be read ({error.strerror})") from None
    try:
        decode(encoded, str(folder / name))
    except BrokenImage as error:
        raise DataError(f"{error}; replace the file or remove its rows") from None
    return encoded
