"""Check an annotation file with a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import TaggedOutput

from reverie_jax.beam import rows, stats
from reverie_jax.beam.pipeline import run, scratch_folder
from reverie_jax.data import check as checking
from reverie_jax.data import sources
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import Example, ImageFolder, ReadLog
from reverie_jax.data.sources.common import content_digest
from reverie_jax.errors import UserError


class _ReadExamples(beam.DoFn):
    """Reads an annotation file for a check: rows by image, and `logs` of what was noted."""

    def __init__(self, images: Path | None, work: Path):
        self._images, self._work = images, work

    def process(self, path: Path) -> Iterator[Any]:
        """Yield (key, (place, example, file of its picture)): equal texts without an image have one key."""
        log = ReadLog()
        checker = checking.Checker(None if self._images is None else ImageFolder(self._images), None)
        try:
            for number, example in enumerate(sources.read(path, log)):
                texts = repr([turn.message for turn in example.conversation.turns])
                key = checker.identify(example) or f"\0{content_digest(texts.encode())}"
                picture = rows.keep_picture(example.encoded, self._work) if example.encoded else ""
                yield key, (number, dataclasses.replace(example, encoded=b""), picture)
            count = sum(1 for _ in Rows(path))
        except UserError as error:
            yield TaggedOutput("logs", (0, [], [], str(error)))
            return
        yield TaggedOutput("logs", (0, log.notes, [log.problems, count], ""))


class _CheckImage(beam.DoFn):
    """Checks all examples about an image: (place, image name, conversation) of usable ones, and `problems`."""

    def __init__(self, images: Path | None):
        self._images = images

    def setup(self) -> None:
        """Open the folder of images; the names in it are listed once, if ever."""
        self._folder = None if self._images is None else ImageFolder(self._images)

    def process(self, element: tuple[str, Iterable[tuple[int, Example, str]]]) -> Iterator[Any]:
        """Yield the outputs."""
        checker, encoded = checking.Checker(self._folder, None), b""
        for number, example, picture in sorted(element[1], key=lambda value: value[0]):
            if picture:
                encoded = encoded or Path(picture).read_bytes()
                example = dataclasses.replace(example, encoded=encoded)
            problems = checker.check(example)
            for index, problem in enumerate(problems):
                yield TaggedOutput("problems", (number, index, dataclasses.asdict(problem)))
            if not any(problem.fatal for problem in problems):
                yield (number,), example.image, example.conversation


def check(path: Path, images: Path | None, options: PipelineOptions) -> checking.CheckReport:
    """Check an annotation file without a model, as `check.check` does.

    Raises:
        UserError: The file as a whole cannot be read, or the pipeline failed.
    """
    if images is not None:
        ImageFolder(images)
    with scratch_folder(options) as work:

        def steps(pipeline: beam.Pipeline) -> dict[str, beam.PCollection]:
            read = (
                pipeline
                | "File" >> beam.Create([path])
                | "Read" >> beam.ParDo(_ReadExamples(images, work)).with_outputs("logs", main="rows")
            )
            checked = (
                read.rows
                | "By image" >> beam.GroupByKey()
                | "Check" >> beam.ParDo(_CheckImage(images)).with_outputs("problems", main="usable")
            )
            return {"logs": read.logs, "problems": checked.problems, "counts": stats.count(checked.usable)}

        results = run(options, work, steps)
    log = ReadLog()
    rows.merge_logs(results["logs"], log)
    ((_, _, (invalid, count), _),) = results["logs"]
    log.problems = [(where, reason) for where, reason in invalid]
    numbers = stats.summarize(results["counts"])
    problems = [checking.Problem(**problem) for *_, problem in sorted(results["problems"], key=lambda one: one[:2])]
    return checking.CheckReport(count, numbers, checking.complete(path, problems, numbers, log), [], log.notes)
