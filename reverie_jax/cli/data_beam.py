"""`--engine beam` of the data commands: its options, and what it cannot keep."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

    from reverie_jax.data.sources import ReadLog

Engine = Annotated[
    str, common.option("NAME", "What does the work: local (this machine's cores) or beam (Apache Beam; extra `beam`).")
]
Beam = Annotated[
    common.Several[str],
    arg(
        metavar="OPTION=VALUE ...",
        help="Options of Apache Beam's pipeline, for --engine beam, as `runner=FlinkRunner temp_location=FOLDER`; a switch"
        " is its name alone. Without a runner it is FnApiRunner, on this machine; `direct_num_workers=4` makes that 4"
        " processes.",
        help_behavior_hint="",
    ),
]


def pipeline_options(engine: str, settings: Sequence[Sequence[str]], **refused: Any) -> PipelineOptions | None:
    """Return the options of the pipeline; None for the local engine.

    Args:
        engine: `--engine`.
        settings: `--beam`.
        refused: options of the command that a pipeline cannot keep.

    Raises:
        UserError: An option cannot be used, or Apache Beam is not installed.
    """
    common.check_choice(("local", "beam"), engine=engine)
    if engine == "local":
        if settings:
            raise UserError("--beam is for --engine beam; add it")
        return None
    for name, value in refused.items():
        if value:
            raise UserError(
                f"{common.flag(name)}: cannot be kept by --engine beam; leave it out, or use --engine local"
            )
    logging.disable(logging.WARNING)  # it warns about clients of clouds that are not installed
    try:
        from reverie_jax.beam import pipeline
    except ImportError as error:
        raise UserError(f"--engine beam: needs Apache Beam ({error}); pip install 'reverie-jax[beam]'") from None
    finally:
        logging.disable(logging.NOTSET)
    return pipeline.parse_options(common.joined(settings))


@contextlib.contextmanager
def noted(log: ReadLog) -> Iterator[ReadLog]:
    """Print the notes of a log at the end of the block, also if files were read and something failed after that."""
    try:
        yield log
    finally:
        common.note(log.notes)
