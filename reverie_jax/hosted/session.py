"""Shared state of one run: journal, providers, prompt versions, limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from reverie_jax.errors import UserError
from reverie_jax.hosted import batches, runner
from reverie_jax.hosted.identity import RequestIdentity
from reverie_jax.hosted.interface import RequestSettings, Stage
from reverie_jax.hosted.journal import Journal
from reverie_jax.hosted.providers import open_provider, parse_model_spec
from reverie_jax.hosted.runner import Outcome, RequestTask, find_problem
from reverie_jax.hosted.throttle import DEFAULT_IMAGE_TOKENS, DEFAULT_TOKENS, Limits, Throttle

JOURNAL = "journal.sqlite"


class CostEstimate(NamedTuple):
    """Estimate of a stage: requests with a reply, requests to send, their tokens and price."""

    stage: str
    cached: int
    to_request: int
    tokens_in: float
    tokens_out: float
    price: float


@dataclasses.dataclass(frozen=True)
class RequestConfig:
    """Settings of each request and limits of the run."""

    settings: RequestSettings = dataclasses.field(default_factory=RequestSettings)
    limits: Limits = dataclasses.field(default_factory=Limits)


ProgressCallback = Callable[[str, int, Outcome, Throttle], None]
"""Called after each task as `on_progress(step, total, outcome, throttle)`."""


class Session:
    """Run tasks over the journal of a folder. Close it, or use it as a context manager.

    Args:
        environment: Holds the API keys.
        versions: Version of each stage's prompt, a part of a request's identity.

    Attributes:
        notes: Lines to show to the user.

    Raises:
        UserError: The folder's journal is in use or broken.
    """

    def __init__(
        self,
        folder: Path,
        config: RequestConfig,
        environment: Mapping[str, str],
        on_progress: ProgressCallback | None = None,
        versions: Mapping[str, str] | None = None,
    ):
        self.config, self._environment = config, environment
        self._on_progress = on_progress or (lambda step, total, outcome, throttle: None)
        self._versions = versions or {}
        self.journal = Journal(folder / JOURNAL)
        self.notes: list[str] = []
        if self.journal.lost:
            self.notes.append(
                f"{self.journal.lost} requests were in flight when the last run ended; sending them again"
            )

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def identify(self, stage: Stage, model_spec: str, content: str, send_image: bool = True) -> RequestIdentity:
        """Return the identity of a request to a model; existing journals hold this spelling of the prompt's version."""
        name, model, _ = parse_model_spec(model_spec)
        prompt = f"{self._versions[stage]} {self.config.settings.version} shown={send_image}"
        return RequestIdentity(stage, content, name, model, prompt)

    def get_reply(self, task: RequestTask | None) -> str | None:
        """Return the words of the recorded reply, or None; one that can no longer be parsed does not count."""
        if task is None or (recorded := self.journal.get_reply(task.identity)) is None:
            return None
        return None if find_problem(task, recorded.text) else recorded.text

    def run(
        self,
        step: str,
        tasks: Iterable[RequestTask],
        model_specs: Iterable[str],
        settings: RequestSettings | None = None,
    ) -> Outcome:
        """Send the requests that have no reply yet.

        Args:
            step: Name for the progress callback.
            tasks: Requests; duplicates are sent once.
            model_specs: The models of the tasks.
            settings: Of these requests; the session's if None.

        Raises:
            UserError: No request can succeed (key, credit, quota of the day, model, URL, parameter).
        """
        unique = {task.identity.key: task for task in tasks}
        missing = [task for task in unique.values() if self.get_reply(task) is None]
        cached = len(unique) - len(missing)
        if not missing:
            return Outcome(cached=cached)
        limits, settings = self.config.limits, settings or self.config.settings
        if not limits.batch and (pending := self.journal.pending_keys() & {task.identity.key for task in missing}):
            count = len(pending)
            raise UserError(
                f"{self.journal.path}: {count} requests are pending in a batch; add --batch to collect them"
            )
        run = batches.run if limits.batch else runner.run
        outcome = run(
            missing,
            lambda: {
                parse_model_spec(spec)[:2]: open_provider(spec, settings, self._environment) for spec in model_specs
            },
            self.journal,
            limits,
            lambda current, throttle: self._on_progress(step, len(missing), current, throttle),
        )
        return dataclasses.replace(outcome, cached=cached)

    def estimate(
        self, stage: str, tasks: Iterable[RequestTask | None], extra: int = 0, image_tokens: float = 0.0
    ) -> CostEstimate:
        """Estimate a stage from the mean tokens in the journal, or from `DEFAULT_TOKENS`.

        Args:
            stage: Stage of all tasks.
            tasks: Requests; None is skipped.
            extra: Number of tasks that are not known yet.
            image_tokens: Input tokens of a request's image, in place of those that `DEFAULT_TOKENS` has for one.
        """
        unique = {task.identity.key: task for task in tasks if task is not None}
        cached = sum(self.get_reply(task) is not None for task in unique.values())
        to_request = len(unique) - cached + extra
        default_in, default_out = DEFAULT_TOKENS[stage]
        if image_tokens:
            default_in += image_tokens - DEFAULT_IMAGE_TOKENS.get(stage, 0.0)
        mean_in, mean_out = self.journal.mean_tokens().get(stage, (default_in, default_out))
        tokens_in, tokens_out = to_request * mean_in, to_request * mean_out
        price = self.config.limits.price(tokens_in, tokens_out)
        return CostEstimate(stage, cached, to_request, tokens_in, tokens_out, price)
