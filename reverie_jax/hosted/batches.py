"""Asks many things as batches: one file of requests, results within a day, half the price.

A batch is written down before it leaves, under a label of ours: a run that is killed at any moment finds it again, and asks
nothing twice.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import tenacity

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import (
    AnnotationError,
    BatchProvider,
    BatchStatus,
    NoAccess,
    Provider,
    Refused,
    Reply,
    TryAgain,
)
from reverie_jax.hosted.journal import Journal
from reverie_jax.hosted.runner import Gate, Limits, Outcome, RequestTask


@dataclasses.dataclass
class _Open:
    """A batch under way.

    Attributes:
        items: (attempt, stage) of its requests by key.
    """

    label: str
    provider: BatchProvider
    name: str
    items: dict[str, tuple[int, str]]


class _Run:
    """One stage's items until none is left to ask or to wait for."""

    def __init__(
        self,
        tasks: Iterable[RequestTask],
        providers: dict[tuple[str, str], Provider],
        journal: Journal,
        limits: Limits,
        on_progress: Callable[[Outcome, Gate], None],
    ):
        self.journal, self.limits, self.on_progress = journal, limits, on_progress
        self.stop = asyncio.Event()
        self.gate, self.outcome = Gate(limits, journal, self.stop), Outcome()
        self.tasks = {task.item.key: task for task in tasks}
        self.waiting = collections.deque(self.tasks.values())
        self.unhappy: dict[str, collections.Counter[type]] = collections.defaultdict(collections.Counter)
        self.open: list[_Open] = []
        self._failures = 0
        self.providers: dict[tuple[str, str], BatchProvider] = {}
        for key, provider in providers.items():
            if not isinstance(provider, BatchProvider):
                raise UserError(f"--batch: {key[0]} takes no batches; gemini and openai do")
            self.providers[key] = provider

    async def patiently(self, what: Callable[..., Awaitable[Any]], *given: Any) -> Any:
        """Tries again where the wire or the service fails.

        Raises:
            TryAgain, NoAccess, Refused: in the end.
        """
        limits = self.limits
        build_tree = tenacity.wait_random_exponential(multiplier=limits.backoff, max=limits.longest)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(build_tree(state), getattr(error, "after", None) or 0.0)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TryAgain),
            wait=wait,
            stop=lambda state: state.attempt_number > limits.retries or self.stop.is_set(),
            sleep=self.gate.sleep,
            reraise=True,
        )
        return await retrying(what, *given)

    async def adopt(self) -> None:
        """Goes on with the batches that an earlier run left under way."""
        for label, kind, model, name in self.journal.batches():
            provider, items = self.providers.get((kind, model)), self.journal.in_batch(label)
            if provider is None or not items.keys() & self.tasks.keys():
                for _, stage in items.values():
                    self.gate.reserve(stage, always=True)
                continue  # another step's, which will collect it
            if name is None:  # killed while it was handed over
                name = await self.patiently(provider.find, label)
                if name is None:
                    self.journal.batch_ended(label, "the batch never left")
                    continue
                self.journal.batch_named(label, name)
            for _, stage in items.values():
                self.gate.reserve(stage, always=True)
            self.open.append(_Open(label, provider, name, items))
        under_way = {key for batch in self.open for key in batch.items}
        self.waiting = collections.deque(a for a in self.waiting if a.item.key not in under_way)

    async def submit(self) -> None:
        """Hands over what waits, as few batches as the providers' limits and the budget allow."""
        for key, provider in self.providers.items():
            while not self.stop.is_set():
                chosen: list[RequestTask] = []
                file = self.journal.path.with_name(f".{self.journal.path.name}.requests.jsonl")
                try:
                    with file.open("w", encoding="utf-8") as lines:
                        self._write(lines, provider, key, chosen)
                    if not chosen:
                        break
                    await self._hand_over(file, provider, key, chosen)
                except OSError as error:
                    raise UserError(f"{file}: cannot be written ({error.strerror})") from None
                finally:
                    file.unlink(missing_ok=True)

    def _write(self, lines: Any, provider: BatchProvider, key: tuple[str, str], chosen: list[RequestTask]) -> None:
        later: list[RequestTask] = []
        size = 0
        while self.waiting and len(chosen) < provider.most:
            task = self.waiting.popleft()
            item = task.item
            if (item.provider, item.model) != key:
                later.append(task)
                continue
            try:
                line = provider.line(item.key, task.request())
            except Refused as error:  # its picture cannot be read
                self._unhappy(task, error)
                continue
            if chosen and size + len(line) + 1 > provider.room:
                later.append(task)
                break
            if not self.gate.reserve(item.stage):
                later.append(task)
                break
            lines.write(line + "\n")
            size += len(line.encode()) + 1
            chosen.append(task)
        self.waiting.extendleft(reversed(later))

    async def _hand_over(
        self, file: Path, provider: BatchProvider, key: tuple[str, str], chosen: list[RequestTask]
    ) -> None:
        label = f"reverie-{uuid.uuid4().hex}"
        self.journal.batch_begins(label, *key, (task.item for task in chosen))
        try:
            # Not patiently: a second try could make a second batch, where the first one's answer was lost on the way.
            name = await provider.submit(file, label)
        except TryAgain as error:
            # Where not even this can be had, the batch stays open under its label: the next run looks for it.
            found = await self.patiently(provider.find, label)
            if found is None:
                self._not_handed_over(label, chosen, error)
                self._failures += 1
                longest, wait = self.limits.longest, self.limits.backoff * 2**self._failures
                await self.gate.sleep(max(min(longest, wait), error.after or 0.0))
                return
            name = found
        except AnnotationError as error:
            self._not_handed_over(label, chosen, error)
            if isinstance(error, NoAccess):
                raise
            return
        self._failures = 0
        self.journal.batch_named(label, name)
        self.open.append(_Open(label, provider, name, self.journal.in_batch(label)))

    def _not_handed_over(self, label: str, chosen: list[RequestTask], error: AnnotationError) -> None:
        self.journal.batch_ended(label, str(error))
        for task in chosen:
            self.gate.leave(task.item.stage, None)
            self._unhappy(task, error)

    async def _results(self, batch: _Open) -> tuple[BatchStatus, list[tuple[str, Reply | AnnotationError]]]:
        """How a batch stands, and its results where it has ended."""
        try:
            found = await self.patiently(batch.provider.look, batch.name)
            return found, await self.patiently(batch.provider.results, found) if found.ended else []
        except NoAccess as error:
            if " 404" not in str(error):
                raise
            return BatchStatus(True, "the provider has the batch no more"), []

    async def collect(self) -> None:
        """Takes in the results of the batches that have ended."""
        for batch in list(self.open):
            found, results = await self._results(batch)
            if not found.ended:
                continue
            refused: NoAccess | None = None
            for key, result in results:
                if key in batch.items and key in self.tasks:  # a line that is there twice counts once
                    attempt, stage = batch.items.pop(key)
                    self._take(key, attempt, stage, result)
                    refused = result if isinstance(result, NoAccess) else refused
            for _, stage in batch.items.values():
                self.gate.leave(stage, None)
            # What this run does not want, another may: it is left where it is.
            if not {key for key, _ in results} & batch.items.keys():
                reason = found.reason or "the batch has no result for it"
                self.journal.batch_ended(batch.label, reason)
                for key in batch.items.keys() & self.tasks.keys():
                    self._unhappy(self.tasks[key], TryAgain(reason))
            self.open.remove(batch)
            self.on_progress(self.outcome, self.gate)
            if refused is not None:
                raise refused

    def _take(self, key: str, attempt: int, stage: str, result: Reply | AnnotationError) -> None:
        task, journal = self.tasks[key], self.journal
        reply = result if isinstance(result, Reply) else getattr(result, "reply", None)
        error = result if isinstance(result, AnnotationError) else None
        if reply is not None:
            reply = dataclasses.replace(reply, text=reply.text.encode("utf-8", "replace").decode("utf-8"))
            try:
                if error is None:
                    task.read(reply.text)
            except Refused as problem:
                error = problem
        price = self.gate.leave(stage, reply)
        if error is None:
            journal.done(attempt, "usable", reply, price=price)
            self.outcome.usable += 1
            self.outcome.asked += 1
            return
        state = "unusable" if isinstance(error, Refused) else "failed"
        journal.done(attempt, state, reply, price=price, reason=str(error))
        self._unhappy(task, error)

    def _unhappy(self, task: RequestTask, error: AnnotationError) -> None:
        """Puts an item back, or gives it up."""
        seen = self.unhappy[task.item.key]
        seen[type(error)] += 1
        if seen[Refused] < self.limits.tries and seen[TryAgain] <= self.limits.retries and not seen[NoAccess]:
            self.waiting.append(task)
            return
        name = task.name if task.name not in self.outcome.failed else f"{task.name} ({task.item.key})"
        self.outcome.failed[name] = str(error)
        self.outcome.asked += 1

    async def all(self) -> Outcome:
        try:
            await self.adopt()
            adopted = bool(self.open)  # those may have ended long ago
            while not self.stop.is_set():
                await self.submit()
                self.on_progress(self.outcome, self.gate)
                if not self.open:
                    break
                if not adopted:
                    await self.gate.sleep(self.limits.poll)
                adopted = False
                if not self.stop.is_set():
                    await self.collect()
        except NoAccess as error:
            raise UserError(str(error)) from None
        except (TryAgain, Refused) as error:
            self.outcome.stopped = f"{error}; the batches under way are kept, run again to collect them"
        except asyncio.CancelledError:
            self.stop.set()
        finally:
            for provider in self.providers.values():
                await provider.close()
        if self.stop.is_set():
            count = sum(len(batch.items) for batch in self.open)
            self.outcome.stopped = f"interrupted; {count} requests are under way, run again to collect them"
        elif self.waiting and not self.outcome.stopped:
            self.outcome.stopped = self.gate.stopped or "the budget has no room beside what is under way"
        return self.outcome


def run(
    tasks: Iterable[RequestTask],
    providers: Callable[[], dict[tuple[str, str], Provider]],
    journal: Journal,
    limits: Limits,
    on_progress: Callable[[Outcome, Any], None] = lambda outcome, gate: None,
) -> Outcome:
    """Asks every item, as `runner.run` does, but by batches.

    Ctrl-C (or SIGTERM) leaves the batches under way at the provider; the next run collects them.

    Raises:
        UserError: a provider takes no batches, or will not have us at all (key, model, address).
    """

    async def main() -> Outcome:
        one = _Run(tasks, providers(), journal, limits, on_progress)
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(one.all())

        def interrupt() -> None:
            if one.stop.is_set():  # twice: whoever waits, waits no longer
                task.cancel()
            one.stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(number, interrupt)
        return await task

    return asyncio.run(main())
