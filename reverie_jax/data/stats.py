"""The numbers of a dataset card."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from reverie_jax.data.conversation import IMAGE, Conversation
from reverie_jax.data.reflection import classify_question


def compute_stats(examples: Iterable[tuple[str, Conversation]]) -> dict[str, Any]:
    """Return the numbers of a dataset card.

    Args:
        examples: (image name, conversation) of each.

    Returns:
        Counts of images, of instructions (questions about an image with one answer) and of conversations by dataset and
        kind; negatives per instruction; shares of question types; words per rationale.
    """
    answers: dict[tuple[str, str], str] = {}
    kinds, datasets, words = collections.Counter[str](), collections.Counter[str](), []
    images: set[str] = set()
    without_image = total = 0
    for image, conversation in examples:
        total += 1
        without_image += not image
        images.update([image] if image else [])
        question = conversation.turns[0].text.replace(IMAGE, "").strip()
        answers.setdefault((image, question), conversation.turns[1].text)
        kinds[conversation.kind or "no rationale"] += 1
        datasets[conversation.dataset] += 1
        if conversation.kind and len(conversation.turns) > 3:
            words.append(len(conversation.turns[3].text.split()))
    types = collections.Counter(classify_question(question, answer) for (_, question), answer in answers.items())
    instructions = max(1, len(answers))
    return {
        "images": len(images),
        "without image": without_image,
        "conversations": total,
        "by dataset": dict(datasets.most_common()),
        "by kind": dict(kinds.most_common()),
        "instructions": len(answers),
        "negatives per instruction": round(kinds["negative"] / instructions, 3),
        "question types": {type: round(count / instructions, 3) for type, count in types.most_common()},
        "words per rationale": _summarize(words),
    }


def _summarize(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 1),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def stats_table(stats: dict[str, Any], lengths: Sequence[int] = ()) -> Table:
    """Return a table of `compute_stats`'s numbers, and of conversation lengths in tokens if there are any."""
    table = Table("", "", show_header=False)
    if lengths:
        stats = {**stats, "tokens per conversation": _summarize(lengths)}
    for name, value in stats.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int | float) else value))
    return table
