"""One sitting over one journal: what every kind of annotation shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reverie_jax.errors import UserError
from reverie_jax.hosted import batches
from reverie_jax.hosted.interface import RequestSettings, Stage
from reverie_jax.hosted.journal import Item, Journal
from reverie_jax.hosted.providers import parse, provider
from reverie_jax.hosted.runner import DEFAULT_TOKENS, Limits, Outcome, RequestTask, run

JOURNAL = "journal.sqlite"


class CostEstimate(NamedTuple):
    """A stage before it runs."""

    stage: str
    had: int
    to_ask: int
    tokens_in: float
    tokens_out: float
    price: float


@dataclasses.dataclass(frozen=True)
class RequestConfig:
    """How hosted models are asked."""

    settings: RequestSettings = dataclasses.field(default_factory=RequestSettings)
    limits: Limits = dataclasses.field(default_factory=Limits)


ProgressCallback = Callable[[str, int, Outcome, Any], None]
"""Called after each item as `tell(step, total, outcome, gate)`."""


class Session:
    """The journal of a folder and the running of items. Close it, or use it as a context.

    Args:
        environment: where keys are.
        versions: the version of each stage's prompt, a part of a request's identity.

    Raises:
        UserError: the folder's journal is in use or broken.
    """

    def __init__(
        self,
        folder: Path,
        how: RequestConfig,
        environment: Mapping[str, str],
        on_progress: ProgressCallback | None = None,
        versions: Mapping[str, str] | None = None,
    ):
        self.how, self._environment, self._on_progress = (
            how,
            environment,
            on_progress or (lambda step, total, outcome, gate: None),
        )
        self._versions = versions or {}
        self.journal = Journal(folder / JOURNAL)
        self.notes: list[str] = []
        """What a user should know, line by line."""
        if self.journal.lost:
            self.notes.append(
                f"{self.journal.lost} requests were in flight when the last run ended; they are asked again"
            )

    def close(self) -> None:
        self.journal.close()

    def item(self, stage: Stage, who: str, content: str, shown: bool = True) -> Item:
        """How something is known that is asked of a model in a prompt's words."""
        kind, model, _ = parse(who)
        return Item(stage, content, kind, model, f"{self._versions[stage]} {self.how.settings.version} shown={shown}")

    def had(self, task: RequestTask | None) -> str | None:
        """The raw reply that is there already."""
        return None if task is None else self.journal.usable(task.item)

    def ask(self, step: str, tasks: Iterable[RequestTask], who: Iterable[str]) -> Outcome:
        """Asks what has no reply yet.

        Args:
            who: the models that the askings name.

        Raises:
            UserError: a service will not have us.
        """
        unique = {task.item.key: task for task in tasks}
        open_ones = [task for task in unique.values() if self.had(task) is None]
        had = len(unique) - len(open_ones)
        if not open_ones:
            return Outcome(had=had)
        if self.how.limits.batch:
            how = batches.run
        elif waiting := self.journal.under_way() & {task.item.key for task in open_ones}:
            raise UserError(
                f"{self.journal.path}: {len(waiting)} requests are under way in a batch; run with --batch to collect it"
            )
        else:
            how = run
        outcome = how(
            open_ones,
            lambda: {parse(name)[:2]: provider(name, self.how.settings, self._environment) for name in who},
            self.journal,
            self.how.limits,
            lambda now, gate: self._on_progress(step, len(open_ones), now, gate),
        )
        return dataclasses.replace(outcome, had=had + outcome.had)

    def estimate(self, stage: str, tasks: Iterable[RequestTask | None], more: int = 0) -> CostEstimate:
        """What a stage would take, by the journal's means or plain guesses.

        Args:
            more: items that are not known yet.
        """
        unique = {task.item.key: task for task in tasks if task is not None}
        had = sum(self.had(task) is not None for task in unique.values())
        to_ask = len(unique) - had + more
        mean = self.journal.mean_tokens(stage) or DEFAULT_TOKENS[stage]
        tokens_in, tokens_out = to_ask * mean[0], to_ask * mean[1]
        return CostEstimate(stage, had, to_ask, tokens_in, tokens_out, self.how.limits.price(tokens_in, tokens_out))
