"""mPLUG-Owl's instruction files, also LRV-Instruction's second version: each row holds a whole conversation as one text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import llava
from reverie_jax.data.sources.common import Example, InvalidRow, ReadLog, image_conversation, parse_rows
from reverie_jax.data.templates import find_template

_KNOWN = {"image", "text", "task_type", "prompt"}
_ROLE = re.compile(r"(?:^|\n)(Human|AI):(?: |$|(?=\n))")
_PREAMBLES = {find_template(name).system for name in ("mplug_owl", "mplug_owl_eval")}


def is_conversation(row: dict[str, Any]) -> bool:
    """Return whether a row's text is a conversation of a human and an AI."""
    return isinstance(row.get("text"), str) and {"Human", "AI"} <= set(_ROLE.findall(row["text"]))


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversation of each row. Consecutive turns of the human are one: the first may show the image alone.

    The sentence that the model's template begins with is left out; any other is a system turn, as in LLaVA's rows.
    """
    systems = 0

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        nonlocal systems
        if not isinstance(row.get("text"), str):
            raise InvalidRow("'text' must be a conversation: lines that begin with 'Human: ' or 'AI: '")
        preamble, *parts = _ROLE.split(row["text"])
        turns: list[dict[str, str]] = []
        for role, text in zip(parts[::2], parts[1::2], strict=True):
            if turns and turns[-1]["from"] == role:
                turns[-1]["value"] += f"\n{text}"
            else:
                turns.append({"from": role, "value": text})
        messages = [{**turn, "from": {"Human": "human", "AI": "gpt"}[turn["from"]]} for turn in turns]
        if preamble.strip() not in ("", *_PREAMBLES):
            messages.insert(0, {"from": "system", "value": preamble})
        image, encoded, parsed, _, system = llava.parse_messages(messages, row)
        systems += system
        return [Example(image, image_conversation(parsed, dataset="mplug-owl"), where, encoded)]

    yield from parse_rows(rows, log, _KNOWN, parse)
    llava.note_systems(rows, log, systems)
