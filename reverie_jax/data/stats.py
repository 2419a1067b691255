"""The numbers of a dataset card."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from reverie_jax.data.conversation import IMAGE, Conversation
from reverie_jax.data.reflection import classify_question

Counted = tuple[str, str | int]
"""What is counted, and its value: ("by kind", "negative")."""


def compute_stats(examples: Iterable[tuple[str, Conversation]]) -> dict[str, Any]:
    """Return the numbers of a dataset card.

    Args:
        examples: (image name, conversation) of each.

    Returns:
        Counts of images, of instructions (questions about an image with one answer) and of conversations by dataset and
        kind; negatives per instruction; shares of question types; words per rationale.
    """
    counts: collections.Counter[Counted] = collections.Counter()
    answers: dict[tuple[str, str], str] = {}
    images: set[str] = set()
    for image, conversation in examples:
        counts.update(count_conversation(image, conversation))
        images.update([image] if image else [])
        answers.setdefault((image, question_of(conversation)), conversation.turns[1].text)
    counts["images", ""] = len(images)
    counts.update(count_instruction(question, answer) for (_, question), answer in answers.items())
    return summarize(counts)


def question_of(conversation: Conversation) -> str:
    """Return the first question, without the image's marker; with the image it identifies an instruction."""
    return conversation.turns[0].text.replace(IMAGE, "").strip()


def count_conversation(image: str, conversation: Conversation) -> Iterator[Counted]:
    """Yield what is counted of a conversation.

    Args:
        image: name of its image; empty without one.
        conversation: The conversation.
    """
    yield "conversations", ""
    if not image:
        yield "without image", ""
    yield "by dataset", conversation.dataset
    yield "by kind", conversation.kind or "no rationale"
    if conversation.kind and len(conversation.turns) > 3:
        yield "words per rationale", len(conversation.turns[3].text.split())


def count_instruction(question: str, answer: str) -> Counted:
    """Return what is counted of an instruction: the type of its question."""
    return "question types", classify_question(question, answer)


def summarize(counts: Mapping[Counted, int]) -> dict[str, Any]:
    """Return the numbers of a dataset card; equal counts come in the order of `counts`."""
    groups: dict[str, collections.Counter[Any]] = collections.defaultdict(collections.Counter)
    for (what, value), count in counts.items():
        groups[what][value] = count
    types = groups["question types"]
    instructions = max(1, types.total())
    return {
        "images": groups["images"].total(),
        "without image": groups["without image"].total(),
        "conversations": groups["conversations"].total(),
        "by dataset": dict(groups["by dataset"].most_common()),
        "by kind": dict(groups["by kind"].most_common()),
        "instructions": types.total(),
        "negatives per instruction": round(groups["by kind"]["negative"] / instructions, 3),
        "question types": {type: round(count / instructions, 3) for type, count in types.most_common()},
        "words per rationale": _summarize(list(groups["words per rationale"].elements())),
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
