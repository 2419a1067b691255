"""REVERIE's released form: one row for each (question, answer, rationale), as a four-turn LLaVA conversation.

REVERIE-PLUS's six-turn rows explain both answers in one conversation. They become two conversations: REVERIE's authors found
that both in one are worse than either.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from reverie_jax.data.conversation import Conversation, Turn
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
_OWN_WORDS = re.compile(
    r"\s*explain why\s*(?:$|[.:?!]|including\b"
    r"|(?:this|the|that)?\s*(?:answer )?(?:is|was) (?:wrong|incorrect|not correct)\s*:.*\w)",
    re.I | re.S,
)
"""Requests for rationales; a conversation of LLaVA's may ask to explain why something is so, too."""
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


def read_examples(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield the conversations of each row: REVERIE's are those that show an image and ask for rationales, others LLaVA's.

    A negative row opens with the right answer. If one opens with the wrong answer that it explains, the right answer is
    taken from the question's positive row.
    """
    answers: dict[tuple[str, str], Turn] | None = None
    swapped = 0
    for example in split_rows(rows, log):
        turns = example.conversation.turns
        asked = parse_rationale_prompt(turns[2].text) if example.conversation.kind else None
        if asked is not None and asked[0] == "negative" and turns[1].text.strip(" .") == asked[1].strip(" ."):
            answers = _right_answers(rows) if answers is None else answers
            right = answers.get((_identify(example), turns[0].text))
            if right is None or right.text == turns[1].text:
                reason = "opens with the wrong answer that it explains, and no row has the right answer"
                log.problems.append((example.where, reason))
                continue
            conversation = dataclasses.replace(example.conversation, turns=(turns[0], right, *turns[2:]))
            example, swapped = dataclasses.replace(example, conversation=conversation), swapped + 1
        yield example
    if swapped:
        log.notes.append(f"{swapped} negative rows opened with the wrong answer; it was replaced by the right one")


def _right_answers(rows: Rows) -> dict[tuple[str, str], Turn]:
    """Return the answers of positive rows, by image and question."""
    return {
        (_identify(example), example.conversation.turns[0].text): example.conversation.turns[1]
        for example in split_rows(rows, ReadLog())
        if example.conversation.kind == "positive"
    }


def _identify(example: Example) -> str:
    """Return what identifies an image: its content if the file has it, as names of such images may all be alike."""
    return content_digest(example.encoded) if example.encoded else example.image


def split_rows(rows: Rows, log: ReadLog) -> Iterator[Example]:
    """Yield a conversation for each rationale of each row, or the only one of a row without rationales, as it is written."""
    counts = collections.Counter[str]()
    firsts: dict[str, str] = {}

    def parse(row: dict[str, Any], where: str) -> list[Example]:
        image, encoded, turns, shortened, system = llava.parse_row(row)
        pairs = list(zip(turns[2::2], turns[3::2], strict=True))
        asks = bool(pairs) and all(_OWN_WORDS.match(prompt.text) for prompt, _ in pairs)
        if asks and not image and not {"image", "images"}.isdisjoint(row):
            raise InvalidRow("'image' must be a file name")
        dataset = "reverie" if asks and image else "llava"
        firsts.setdefault(dataset, where)
        counts.update({dataset: 1, "shortened": shortened, "system": system, "blind": asks and not image})
        if dataset == "llava":
            return [Example(image, image_conversation(turns, dataset=dataset), where, encoded)]
        prompts = [parse_rationale_prompt(prompt.text) for prompt, _ in pairs]
        return [
            Example(image, image_conversation([*turns[:2], *pair], dataset=dataset, kind=prompt[0]), where, encoded)
            for pair, prompt in zip(pairs, prompts, strict=True)
            if prompt is not None
        ]

    yield from parse_rows(rows, log, llava.KNOWN, parse)
    notes = {
        "shortened": "dropped answers without a question or questions without an answer of {} rows",
        "blind": "{} rows ask for rationales without an image; they are read as text alone",
    }
    log.notes += [f"{rows.path}: {note.format(counts[name])}" for name, note in notes.items() if counts[name]]
    llava.note_systems(rows, log, counts["system"])
    if len(firsts) > 1:
        second = list(firsts.values())[1].removeprefix(f"{rows.path}: ")
        log.notes.append(
            f"{rows.path}: {counts['reverie']} rows ask for rationales, as REVERIE's, and {counts['llava']} do not, as"
            f" LLaVA's ({second} is the first of another kind); each is read as what it is"
        )
