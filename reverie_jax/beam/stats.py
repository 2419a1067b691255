"""Count what annotation files or records contain with a pipeline."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from reverie_jax.beam import rows
from reverie_jax.beam.pipeline import raise_first, run, scratch_folder
from reverie_jax.beam.rows import Group, Place
from reverie_jax.data import stats as data_stats
from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.mixture import MixtureEntry
from reverie_jax.data.sources import ReadLog


def _conversations(group: Group) -> Iterator[tuple[Place, str, Conversation]]:
    name = group.name if group.key else ""
    yield from ((place, name, Conversation.from_json(json.loads(text))) for place, text in group.texts)


def _stored_conversations(element: tuple[Place, ImageRecord]) -> Iterator[tuple[Place, str, Conversation]]:
    place, record = element
    name = record.id if record.image else ""
    yield from (((*place, number), name, one) for number, one in enumerate(record.conversations))


def _counted(element: tuple[Place, str, Conversation]) -> Iterator[Any]:
    place, name, conversation = element
    yield from ((counted, (1, place)) for counted in data_stats.count_conversation(name, conversation))


def _instruction(element: tuple[Place, str, Conversation]) -> Any:
    place, name, conversation = element
    return (name, data_stats.question_of(conversation)), (place, conversation.turns[1].text)


def _question_type(element: Any) -> Any:
    (_, question), (place, answer) = element
    return data_stats.count_instruction(question, answer), (1, place)


def _add(values: Iterable[tuple[int, Place]]) -> tuple[int, Place]:
    counts, places = zip(*values, strict=True)
    return sum(counts), min(places)


def count(examples: beam.PCollection) -> beam.PCollection:
    """Return ((what, value), (count, place of the first)) of all that `compute_stats` counts.

    Args:
        examples: (place, image name, conversation) of each.
    """
    types = (
        examples
        | "Instructions" >> beam.Map(_instruction)
        | "First answers" >> beam.CombinePerKey(min)
        | "Types" >> beam.Map(_question_type)
    )
    images = (
        examples
        | "With image" >> beam.Filter(lambda example: example[1])
        | "Images" >> beam.Map(lambda example: example[1])
        | "Distinct images" >> beam.Distinct()
        | "Image counts" >> beam.Map(lambda _: (("images", ""), (1, ())))
    )
    facts = examples | "Facts" >> beam.FlatMap(_counted)
    return (facts, types, images) | "All counts" >> beam.Flatten() | "Sums" >> beam.CombinePerKey(_add)


def summarize(counts: Sequence[Any]) -> dict[str, Any]:
    """Return the numbers of a dataset card from what `count` gives."""
    ordered = sorted(counts, key=lambda item: item[1][1])
    return data_stats.summarize(collections.Counter({(what, value): count for (what, value), (count, _) in ordered}))


def compute_stats(
    entries: Sequence[MixtureEntry], folders: Sequence[str], log: ReadLog, options: PipelineOptions
) -> dict[str, Any]:
    """Return the numbers of annotation files, or of records folders, as `data.stats.compute_stats` returns them.

    Raises:
        UserError: Data cannot be used, or the pipeline failed.
    """
    with scratch_folder(options) as work:

        def steps(pipeline: beam.Pipeline) -> dict[str, beam.PCollection]:
            if folders:
                stored, errors = rows.read_stored(pipeline, folders)
                examples = stored | "Conversations" >> beam.FlatMap(_stored_conversations)
                return {"counts": count(examples), "errors": errors}
            groups, logs = rows.read(pipeline, entries, work)
            return {"counts": count(groups | "Conversations" >> beam.FlatMap(_conversations)), "logs": logs}

        results = run(options, work, steps)
    rows.merge_logs(results.get("logs", ()), log)
    raise_first(results.get("errors", ()))
    return summarize(results["counts"])
