"""Find evaluation images in training data with a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from reverie_jax.beam import rows
from reverie_jax.beam.pipeline import Attempt, raise_first, run, scratch_folder
from reverie_jax.beam.rows import Groups
from reverie_jax.data.contamination import ImageMatch, Matcher
from reverie_jax.data.mixture import MixtureEntry
from reverie_jax.data.sources import ReadLog


class _Load(Attempt):
    """Reads the image of a group."""

    def attempt(self, element: Any) -> Iterator[Any]:
        """Yield (place, record)."""
        yield element.place, Groups([element])[0]


class _Compare(Attempt):
    """Compares (place, record) with the evaluation images."""

    def __init__(self, matcher: Matcher):
        self._matcher = matcher

    def attempt(self, element: Any) -> Iterator[Any]:
        """Yield (place, number, match) of each match."""
        place, record = element
        for number, match in enumerate(self._matcher.compare(record.id, record.image)):
            yield place, number, dataclasses.asdict(match)


def find_matches(
    entries: Sequence[MixtureEntry],
    folders: Sequence[str],
    matcher: Matcher,
    log: ReadLog,
    options: PipelineOptions,
) -> tuple[list[ImageMatch], int]:
    """Return the training images that are evaluation images, and the number of records; see `Matcher`.

    Raises:
        UserError: Data cannot be used, or the pipeline failed.
    """
    with scratch_folder(options) as work:

        def steps(pipeline: beam.Pipeline) -> dict[str, beam.PCollection]:
            if folders:
                records, unread = rows.read_stored(pipeline, folders)
                outputs = {"unread": unread, "count": records | "Places" >> beam.Map(lambda record: record[0])}
            else:
                groups, logs = rows.read(pipeline, entries, work)
                pictured = rows.name_records(groups) | "With picture" >> beam.Filter(lambda group: group.key)
                loaded = _Load().apply(pictured, "Load")
                records, outputs = loaded.found, {"unread": loaded.errors, "logs": logs, "count": groups}
            outputs["count"] |= beam.combiners.Count.Globally()
            pictured = records | "With image" >> beam.Filter(lambda record: record[1].image)
            compared = _Compare(matcher).apply(pictured, "Compare")
            return {**outputs, "matches": compared.found, "errors": compared.errors}

        results = run(options, work, steps)
    rows.merge_logs(results.get("logs", ()), log)
    raise_first([*results["unread"], *results["errors"]])
    return [ImageMatch(**match) for *_, match in sorted(results["matches"])], results["count"][0]
