"""Run pipelines of Apache Beam: their options, and what comes back from the workers."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, GoogleCloudOptions, PipelineOptions, StandardOptions

from reverie_jax.errors import DataError, UserError

_HERE = "FnApiRunner"
"""Runs on this machine. DirectRunner would first try to download a runner's binary."""


def parse_options(settings: Sequence[str]) -> PipelineOptions:
    """Return the options of a pipeline.

    Args:
        settings: OPTION=VALUE of each; OPTION alone for a switch.

    Raises:
        UserError: One is unknown, or has an invalid value; or the runner is unknown.
    """
    flags = [f"--{setting}" for setting in settings]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as usage:
            options = PipelineOptions(flags)
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        reason = usage.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"--beam {' '.join(settings)}: {reason}") from None
    standard, direct = options.view_as(StandardOptions), options.view_as(DirectOptions)
    if not standard.runner or standard.runner.lower() == _HERE.lower():
        standard.runner = _HERE
    if standard.runner == _HERE:
        # Other runners take options that their job servers know.
        if unknown := sorted(given.keys() - PipelineOptions([]).get_all_options().keys()):
            raise UserError(f"--beam {unknown[0]}: {_HERE} has no such option; see Apache Beam's PipelineOptions")
        if direct.direct_num_workers < 0:
            raise UserError(f"--beam direct_num_workers={direct.direct_num_workers}: must be at least 0, all cores")
        if direct.direct_num_workers != 1 and direct.direct_running_mode == "in_memory":
            direct.direct_running_mode = "multi_processing"
    try:
        beam.Pipeline(options=options)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--beam runner={standard.runner}: {' '.join(str(error).split())}") from None
    return options


@contextlib.contextmanager
def scratch_folder(options: PipelineOptions) -> Iterator[Path]:
    """Yield a folder for what workers hand over, which is deleted at the end.

    Raises:
        UserError: The runner's workers may be on other machines, and no folder that they share was named.
    """
    shared = options.view_as(GoogleCloudOptions).temp_location
    if shared is None and options.view_as(StandardOptions).runner not in StandardOptions.LOCAL_RUNNERS:
        raise UserError("--beam temp_location=FOLDER is missing: name a folder that all workers can write to")
    try:
        folder = tempfile.TemporaryDirectory(prefix="reverie-", dir=shared)
    except OSError as error:
        raise UserError(f"--beam temp_location={shared}: cannot be written ({error.strerror})") from None
    with folder as name:
        yield Path(name)


def run(
    options: PipelineOptions, work: Path, build: Callable[[beam.Pipeline], dict[str, beam.PCollection]]
) -> dict[str, list[Any]]:
    """Run a pipeline; return what it gives, as JSON has it.

    Args:
        options: Of the pipeline.
        work: Folder that all workers can write to.
        build: Adds the steps to a pipeline and returns its results, which must be few enough to be held in memory.

    Raises:
        UserError: The pipeline failed.
    """
    runner, pipeline, files = options.view_as(StandardOptions).runner, beam.Pipeline(options=options), {}
    for name, values in build(pipeline).items():
        files[name] = work / f"{uuid.uuid4().hex}.json"
        _ = (
            values
            | f"Gather {name}" >> beam.combiners.ToList()
            | f"Hand over {name}" >> beam.Map(_write_json, files[name])
        )
    try:
        with _quiet(runner):
            pipeline.run().wait_until_finish()
        return {name: json.loads(file.read_bytes()) for name, file in files.items()}
    except UserError:
        raise
    except Exception as error:  # runners raise what they like, most of them with the worker's traceback in it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise DataError(f"the pipeline failed on {runner}: {lines[-1][:300]}; run the same command again") from error


@contextlib.contextmanager
def _quiet(runner: str) -> Iterator[None]:
    """Log nothing of a run on this machine, whose failure is an exception with all that the log says."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL if runner == _HERE else before)
    try:
        yield
    finally:
        logging.disable(before)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others may write at the same time with the same content: it is whole or not there."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_json(values: list[Any], path: Path) -> None:
    write_whole(path, json.dumps(values).encode())


class Attempt(beam.DoFn):
    """A step that may find that data cannot be used: it says so in its output `errors`, as retries would find the same.

    Elements begin with their place in the order of all.
    """

    def process(self, element: Any, failed: Any = ()) -> Iterator[Any]:
        """Yield what `attempt` does; nothing if an earlier step has failed."""
        try:
            yield from () if failed else self.attempt(element)
        except UserError as error:
            yield beam.pvalue.TaggedOutput("errors", (element[0], str(error)))

    def attempt(self, element: Any) -> Iterator[Any]:
        """Yield the outputs of an element.

        Raises:
            UserError: Data cannot be used.
        """
        raise NotImplementedError

    def apply(self, values: beam.PCollection, label: str, *sides: Any) -> Any:
        """Return the outputs `errors` and `found` of the step."""
        return values | label >> beam.ParDo(self, *sides).with_outputs("errors", main="found")


def raise_first(errors: Sequence[Any]) -> None:
    """Raise the first of the (place, message) that steps found.

    Raises:
        DataError: There is one.
    """
    if errors:
        raise DataError(min(errors)[1])
