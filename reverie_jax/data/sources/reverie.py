"""REVERIE's released form: one row for each (question, answer, rationale), as a four-turn LLaVA conversation.

REVERIE-PLUS's six-turn rows explain both answers in one conversation. They become two conversations: REVERIE's authors found
that both in one are worse than either.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from reverie_jax.data.conversation import Conversation
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import llava
from reverie_jax.data.sources.common import Example, InvalidRow, ReadLog, content_digest, image_conversation, parse_rows
from reverie_jax.errors import DataError
from reverie_jax.files import atomic_write

RationaleKind = Literal["positive", "negative"]
_NEGATIVE = re.compile(
    r"explain why (?:this|the|that)?\s*(?:answer)?\s*(?:is|was) (?:wrong|incorrect|not correct)\s*:?\s*(.*)",
    re.I | re.S,
)
_POSITIVE = re.compile(r"explain why\b", re.I)
_TAIL = re.compile(r"\s*\.?\s*Including any necessary facts or knowledge\.?\s*$", re.I)


def write_annotations(path: Path, images: Iterable[tuple[str, str, Sequence[Conversation]]]) -> int:
    """Write a LLaVA annotation file, atomically; return its number of conversations.

    Args:
        path: The file.
        images: (id, image file, conversations) of each image.

    Raises:
        DataError: The file cannot be written.
    """
    roles = {"user": "human", "assistant": "gpt"}
    rows = [
        {
            "id": id,
            "image": image,
            "conversations": [{"from": roles[turn.role], "value": turn.text} for turn in conversation.turns],
        }
        for id, image, conversations in images
        for conversation in conversations
    ]
    atomic_write(path, json.dumps(rows, ensure_ascii=False), DataError)
    return len(rows)


def parse_rationale_prompt(prompt: str) -> tuple[RationaleKind, str] | None:
    """Return (kind, wrong answer that it quotes) of a question that asks for a rationale; None for any other."""
    text = prompt.strip()
    if (match := _NEGATIVE.match(text)) is not None:
        return "negative", _TAIL.sub("", match[1]).strip()
    return ("positive", "") if _POSITIVE.match(text) else None


def is_reflective(row: Any) -> bool:
    """Return whether the second question of a row asks for a rationale."""
    try:
        *_, turns = llava.parse_turns(row)
    except (InvalidRow, RecursionError):
        return False
    return len(turns) > 2 and parse_rationale_prompt(turns[2].text) is not None


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversations of each row.

    A negative row opens with the right answer. If one opens with the wrong answer that it explains, the right answer is
    taken from the question's positive row.
    """
    right_answers = {
        (_identify(example), example.conversation.turns[0].text): example.conversation.turns[1]
        for example in _split(rows, ReadLog())
        if example.conversation.kind == "positive"
    }
    swapped = 0
    for example in _split(rows, log):
        turns = example.conversation.turns
        asked = parse_rationale_prompt(turns[2].text) if len(turns) > 2 else None
        if asked is not None and asked[0] == "negative" and turns[1].text.strip(" .") == asked[1].strip(" ."):
            right = right_answers.get((_identify(example), turns[0].text))
            if right is None or right.text == turns[1].text:
                reason = "opens with the wrong answer that it explains, and no row has the right answer"
                log.problems.append((example.where, reason))
                continue
            conversation = dataclasses.replace(example.conversation, turns=(turns[0], right, *turns[2:]))
            example, swapped = dataclasses.replace(example, conversation=conversation), swapped + 1
        yield example
    if swapped:
        log.notes.append(f"{swapped} negative rows opened with the wrong answer; it was replaced by the right one")


def _identify(example: Example) -> str:
    """Return what identifies an image: its content if the file has it, as names of such images may all be alike."""
    return content_digest(example.encoded) if example.encoded else example.image


def _split(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield a conversation for each rationale of each row."""
    shortened = 0

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        nonlocal shortened
        image, encoded, turns = llava.parse_turns(row)
        shortened += llava.is_shortened(row, turns)
        if not image:
            raise InvalidRow("'image' must be a file name")
        pairs = list(zip(turns[2::2], turns[3::2], strict=True))
        prompts = [parse_rationale_prompt(prompt.text) for prompt, _ in pairs]
        if None in prompts:
            raise InvalidRow(f"unknown prompt for a rationale: {pairs[prompts.index(None)][0].text[:60]!r}")
        if not pairs:
            return [Example(image, image_conversation(turns, dataset="reverie"), where, encoded)]
        return [
            Example(image, image_conversation([*turns[:2], *pair], dataset="reverie", kind=prompt[0]), where, encoded)
            for pair, prompt in zip(pairs, prompts, strict=True)
            if prompt is not None
        ]

    yield from parse_rows(rows, log, llava.KNOWN, parse)
    llava.note_shortened(rows, log, shortened)
