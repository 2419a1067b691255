"""The numbers of a dataset card."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from reverie_jax.data.conversation import IMAGE, Conversation
from reverie_jax.data.reflection import kind_of


def statistics_of(talks: Iterable[tuple[str, Conversation]]) -> dict[str, Any]:
    """The numbers of a dataset card.

    Args:
        talks: (picture's name, conversation).

    Returns:
        images, instructions (questions of a picture with one answer), conversations by source and kind, negatives an
        instruction, shares of question types, words of rationales.
    """
    instructions: dict[tuple[str, str], str] = {}
    kinds, by_source, words = collections.Counter[str](), collections.Counter[str](), []
    images: set[str] = set()
    without = conversations = 0
    for image, said in talks:
        conversations += 1
        without += not image
        images.update([image] if image else [])
        question = said.turns[0].text.replace(IMAGE, "").strip()
        instructions.setdefault((image, question), said.turns[1].text)
        kinds[said.kind or "no rationale"] += 1
        by_source[said.dataset] += 1
        if said.kind and len(said.turns) > 3:
            words.append(len(said.turns[3].text.split()))
    types = collections.Counter(kind_of(question, answer) for (_, question), answer in instructions.items())
    return {
        "images": len(images),
        "without picture": without,
        "conversations": conversations,
        "by source": dict(by_source.most_common()),
        "by kind": dict(kinds.most_common()),
        "instructions": len(instructions),
        "negatives an instruction": round(kinds["negative"] / max(1, len(instructions)), 3),
        "question types": {kind: round(count / max(1, len(instructions)), 3) for kind, count in types.most_common()},
        "words a rationale": _spread(words),
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 1),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "most": ordered[-1],
    }


def statistics_table(numbers: dict[str, Any], lengths: Sequence[int] = ()) -> Table:
    """The same to look at."""
    table = Table("", "", show_header=False)
    shown = numbers | ({"tokens a conversation": _spread(lengths)} if lengths else {})
    for name, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        table.add_row(name, f"{value:,}" if isinstance(value, int | float) else value)
    return table
