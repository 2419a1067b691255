"""Build records with a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from reverie_jax.beam import rows
from reverie_jax.beam.pipeline import Attempt, raise_first, run
from reverie_jax.beam.rows import Groups
from reverie_jax.data.mixture import MixtureEntry
from reverie_jax.data.records import ShardWriter, publish_shards, writing
from reverie_jax.data.sources import NO_CONVERSATION, ReadLog
from reverie_jax.data.sources.marks import Marks
from reverie_jax.errors import UserError


class Built(NamedTuple):
    """Records that were built.

    Attributes:
        folder: folder to read.
        images: number of records with an image.
        texts: number of records without one.
        conversations: number of conversations.
    """

    folder: Path
    images: int
    texts: int
    conversations: int


class _WriteShard(Attempt):
    """Writes (shard, its numbered groups), unless an earlier run or another try has finished it."""

    def __init__(self, work: Path, max_side: int | None):
        self._work, self._max_side = work, max_side

    def attempt(self, element: Any) -> Iterator[Any]:
        """Yield (shard, file name, records, images, conversations)."""
        shard, values = element
        groups = [group for _, group in sorted(values)]
        file, count = ShardWriter(self._work, Groups(groups, self._max_side)).write_shard(0)
        yield shard, file.name, count, sum(bool(group.key) for group in groups), sum(len(g.texts) for g in groups)


def build(
    entries: Sequence[MixtureEntry],
    out: Path,
    work: Path,
    log: ReadLog,
    options: PipelineOptions,
    *,
    seed: int = 0,
    max_side: int | None = None,
    marks: Marks | None = None,
) -> Built:
    """Build records as `read_mixture` and `write_records` do, byte for byte.

    Args:
        entries: The annotation files.
        out: The output folder.
        work: The folder of `work_folder(out)`, which all workers can write to.
        log: Gets notes.
        options: Of the pipeline.
        seed: For caps.
        max_side: Larger images are scaled down.
        marks: Of reviewers.

    Raises:
        UserError: Data cannot be used, or the pipeline failed.
    """

    def steps(pipeline: beam.Pipeline) -> dict[str, beam.PCollection]:
        groups, logs = rows.read(pipeline, entries, work, seed=seed, marks=marks)
        numbered = rows.number_records(rows.name_records(groups))
        failed = logs | "Failed" >> beam.Filter(lambda one: one[-1])
        shards = numbered | "By shard" >> beam.GroupByKey()
        written = _WriteShard(work, max_side).apply(shards, "Write shards", beam.pvalue.AsList(failed))
        return {"logs": logs, "shards": written.found, "errors": written.errors}

    results = run(options, work, steps)
    rows.merge_logs(results["logs"], log, marks)
    raise_first(results["errors"])
    shards = sorted(results["shards"])
    if not shards:
        raise UserError(f"{', '.join(str(entry.file) for entry in entries)}: {NO_CONVERSATION}")
    with writing(out):
        folder = publish_shards(out, {"train": [(work / name, count) for _, name, count, *_ in shards]}, work)
    count, images, conversations = (sum(shard[column] for shard in shards) for column in (2, 3, 4))
    return Built(folder, images, count - images, conversations)
