"""REVERIE's released form: one row per (question, answer, rationale), as a four-turn LLaVA conversation.

REVERIE-PLUS's six-turn rows, which explain both answers in one talk, become two conversations: REVERIE's authors found that
both in one talk is worse than either.
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
from reverie_jax.data.sources.common import BadRow, Example, ReadLog, conversation, each
from reverie_jax.errors import DataError
from reverie_jax.files import atomic_write

Kind = Literal["positive", "negative"]
_NEGATIVE = re.compile(
    r"explain why (?:this|the|that)?\s*(?:answer)?\s*(?:is|was) (?:wrong|incorrect|not correct)\s*:?\s*(.*)",
    re.I | re.S,
)
_POSITIVE = re.compile(r"explain why\b", re.I)
_TAIL = re.compile(r"\s*\.?\s*Including any necessary facts or knowledge\.?\s*$", re.I)


def write(path: Path, images: Iterable[tuple[str, str, Sequence[Conversation]]]) -> int:
    """Writes (id, image file, conversations) rows as a LLaVA annotation file; returns how many conversations."""
    back = {"user": "human", "assistant": "gpt"}
    rows = [
        {
            "id": id,
            "image": image,
            "conversations": [{"from": back[turn.role], "value": turn.text} for turn in talk.turns],
        }
        for id, image, talks in images
        for talk in talks
    ]
    atomic_write(path, json.dumps(rows, ensure_ascii=False), DataError)
    return len(rows)


def explains(prompt: str) -> tuple[Kind, str] | None:
    """(kind, the wrong answer that it quotes) of a question that asks for a rationale; None of any other."""
    text = prompt.strip()
    if (found := _NEGATIVE.match(text)) is not None:
        return "negative", _TAIL.sub("", found[1]).strip()
    return ("positive", "") if _POSITIVE.match(text) else None


def is_reflective(row: Any) -> bool:
    """Whether a row asks for a rationale in its second question."""
    try:
        _, turns = llava.turns_of(row)
    except (BadRow, RecursionError):
        return False
    return len(turns) > 2 and explains(turns[2].text) is not None


def talks(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """The rows' conversations; those that cannot be used go to `reading.problems`.

    A negative row opens with the right answer; where one opens with the wrong answer that it explains, the right answer is
    taken from the question's positive row.

    """
    right = {
        (talk.image, talk.conversation.turns[0].text): talk.conversation.turns[1]
        for talk in _split(rows, ReadLog())
        if talk.conversation.kind == "positive"
    }
    swapped = 0
    for talk in _split(rows, log):
        turns = talk.conversation.turns
        about = explains(turns[2].text) if len(turns) > 2 else None
        if about is not None and about[0] == "negative" and turns[1].text.strip(" .") == about[1].strip(" ."):
            known = right.get((talk.image, turns[0].text))
            if known is None or known.text == turns[1].text:
                why = "its answer is the wrong one that it explains, and no row has the right one"
                log.problems.append((talk.where, why))
                continue
            said = dataclasses.replace(talk.conversation, turns=(turns[0], known, *turns[2:]))
            talk, swapped = dataclasses.replace(talk, conversation=said), swapped + 1
        yield talk
    if swapped:
        log.notes.append(
            f"{swapped} negative rows opened with the wrong answer; they got the right one of their question"
        )


def _split(rows: Rows, log: ReadLog) -> Iterator[Example]:
    def make(row: dict[str, Any], where: str) -> list[Example]:
        image, turns = llava.turns_of(row)
        if not image:
            raise BadRow("needs 'image', a file name")
        pairs = list(zip(turns[2::2], turns[3::2], strict=True))
        kinds = [explains(prompt.text) for prompt, _ in pairs]
        if None in kinds:
            raise BadRow(f"asks for no rationale that is known: {pairs[kinds.index(None)][0].text[:60]!r}")
        if not pairs:
            return [Example(image, conversation(turns, dataset="reverie"), where)]
        return [
            Example(image, conversation([*turns[:2], *pair], dataset="reverie", kind=kind[0]), where)
            for pair, kind in zip(pairs, kinds, strict=True)
            if kind is not None
        ]

    return each(rows, log, llava.KNOWN, make)
