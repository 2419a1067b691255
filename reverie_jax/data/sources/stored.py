"""Records as rows, one for each image with all its conversations: what `reverie data build --push-to-hub` uploads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reverie_jax.data.conversation import Conversation
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import Example, InvalidRow, ReadLog, parse_image, parse_rows


def is_record(row: dict[str, Any]) -> bool:
    """Return whether a row is a record: its conversations have turns and the numbers of the images that these show."""
    talks = row.get("conversations")
    return (
        isinstance(talks, list)
        and bool(talks)
        and isinstance(talks[0], dict)
        and {"turns", "images"} <= talks[0].keys()
    )


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversations of each row, as they are."""

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        name, encoded = parse_image(row.get("image"), row.get("id")) if row.get("image") else ("", b"")
        try:
            talks = [Conversation.from_json(talk) for talk in row["conversations"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRow(f"'conversations' are not those of a record ({error!r})") from None
        if any(talk.images and not name for talk in talks):
            raise InvalidRow("a conversation shows an image, and the row has none")
        return [Example(name, talk, where, encoded) for talk in talks]

    yield from parse_rows(rows, log, {"id", "image", "conversations"}, parse)
