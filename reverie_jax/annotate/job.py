"""Shared by the jobs: output folder, writer model, prompts, settings, and the session that runs over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from reverie_jax.annotate.prompts import Prompts
from reverie_jax.hosted.providers import parse_model_spec
from reverie_jax.hosted.session import ProgressCallback, RequestConfig, Session

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every job needs.

    Attributes:
        folder: Outputs and journal.
        writer: The model that writes, as "provider:model".
        prompts: Folder with prompts that replace the built-in ones.
        config: Settings of requests and limits of the run.
    """

    folder: Path
    writer: str
    prompts: Path | None = None
    config: RequestConfig = dataclasses.field(default_factory=RequestConfig)


class JobRunner:
    """A job over its journal. Close it, or use it as a context manager.

    Args:
        environment: Holds the API keys.

    Raises:
        UserError: The job is invalid; nothing was sent.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], on_progress: ProgressCallback | None = None):
        parse_model_spec(job.writer)
        self.prompts = Prompts(job.prompts)
        self.session = Session(job.folder, job.config, environment, on_progress, self.prompts.versions)

    def close(self) -> None:
        """Close the journal."""
        self.session.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
