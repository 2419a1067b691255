"""Send requests as batches: one file of requests, results within a day, half the price.

A batch is recorded under a label of our own before it is submitted. A run that is killed at any moment finds it again by
that label, and submits nothing twice.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import uuid
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import tenacity

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    BatchProvider,
    BatchStatus,
    QueueFullError,
    Reply,
    RetryableError,
    UnusableError,
)
from reverie_jax.hosted.journal import Journal, OpenBatch
from reverie_jax.hosted.runner import (
    FirstFailures,
    Outcome,
    ProgressFunction,
    Providers,
    RequestTask,
    handle_signals,
    is_given_up,
    record,
)
from reverie_jax.hosted.throttle import Limits, Throttle


@dataclasses.dataclass
class _Batch:
    """A submitted batch.

    Attributes:
        name: The provider's.
        key: (name, model) of its provider.
        pending: (attempt, stage) by identity key of its requests without a result.
    """

    label: str
    key: tuple[str, str]
    provider: BatchProvider
    name: str
    pending: dict[str, tuple[int, str]]


class _BatchRun:
    """Submit, poll and collect batches until every task is done or given up."""

    def __init__(
        self,
        tasks: Iterable[RequestTask],
        providers: Providers,
        journal: Journal,
        limits: Limits,
        on_progress: ProgressFunction,
    ):
        self.journal, self.limits, self.on_progress = journal, limits, on_progress
        self.stop = asyncio.Event()
        self.throttle, self.outcome = Throttle(limits, journal, self.stop), Outcome()
        self.tasks = {task.identity.key: task for task in tasks}
        self.waiting = collections.deque(self.tasks.values())
        self.first_failures = FirstFailures(journal, limits)
        self.denied: AccessError | None = None  # raised when all results of a batch are recorded
        self.errors: dict[str, collections.Counter[type]] = collections.defaultdict(collections.Counter)
        self.batches: list[_Batch] = []
        self.failed_submits = self.alone = 0
        self.sizes: dict[tuple[str, str], int] = {}  # most requests of a batch, after one was too large
        self.full: set[tuple[str, str]] = set()  # providers that take no batch until one ends
        self.providers: dict[tuple[str, str], BatchProvider] = {}
        for key, provider in providers.items():
            if not isinstance(provider, BatchProvider):
                raise UserError(f"--batch: {key[0]} has no batch API; use gemini or openai, or omit --batch")
            self.providers[key] = provider

    async def retry(self, call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Call a provider again while the connection or the service fails.

        Raises:
            RetryableError: The last attempt failed, too.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(RetryableError),
            wait=self.limits.retry_wait(),
            stop=lambda state: state.attempt_number > self.limits.max_retries or self.stop.is_set(),
            sleep=self.throttle.sleep,
            reraise=True,
        )
        return await retrying(call, *args)

    async def resume(self) -> None:
        """Continue with the batches that earlier runs left open; those of other steps and models only reserve budget."""
        for batch in self.journal.open_batches():
            provider = self.providers.get((batch.provider, batch.model))
            pending = self.journal.pending(batch.label)
            if provider is not None and pending.keys() & self.tasks.keys():
                name = batch.name or await self._find(provider, batch)
                if name is None:
                    continue
                self.batches.append(_Batch(batch.label, (batch.provider, batch.model), provider, name, pending))
            for _, stage in pending.values():
                self.throttle.reserve(stage, force=True)
        pending_keys = {key for batch in self.batches for key in batch.pending}
        self.waiting = collections.deque(task for task in self.waiting if task.identity.key not in pending_keys)

    async def _find(self, provider: BatchProvider, batch: OpenBatch) -> str | None:
        """Return the name of a batch whose run was killed while submitting it; None if it was never submitted."""
        name: str | None = await self.retry(provider.find_batch, batch.label)
        if name is None:
            self.journal.end_batch(batch.label, "the batch was never submitted")
        else:
            self.journal.name_batch(batch.label, name)
        return name

    async def submit(self) -> None:
        """Submit the waiting tasks in as few batches as the providers' limits and the budget allow."""
        file = self.journal.path.with_name(f".{self.journal.path.name}.requests.jsonl")
        for key, provider in self.providers.items():
            while not self.stop.is_set() and key not in self.full:
                try:
                    with file.open("w", encoding="utf-8") as lines:
                        chosen = self._write(lines, provider, key)
                    if not chosen:
                        break
                    await self._submit(file, provider, key, chosen)
                except OSError as error:
                    raise UserError(f"{file}: cannot be written ({error.strerror})") from None
                finally:
                    file.unlink(missing_ok=True)

    def _write(self, lines: TextIO, provider: BatchProvider, key: tuple[str, str]) -> list[RequestTask]:
        """Write the requests of one batch and return their tasks."""
        chosen: list[RequestTask] = []
        later: list[RequestTask] = []
        size = 0
        most = self.sizes.get(key, provider.max_requests)
        while self.waiting and len(chosen) < most:
            task = self.waiting.popleft()
            if (task.identity.provider, task.identity.model) != key:
                later.append(task)
                continue
            try:
                line = provider.encode_request(task.identity.key, task.build_request()) + "\n"
            except UnusableError as error:
                self._retry_or_give_up(task, error)
                continue
            if (chosen and size + len(line) > provider.max_bytes) or not self.throttle.reserve(task.identity.stage):
                later.append(task)
                break
            lines.write(line)
            size += len(line.encode())
            chosen.append(task)
        self.waiting.extendleft(reversed(later))
        return chosen

    async def _submit(
        self, file: Path, provider: BatchProvider, key: tuple[str, str], chosen: list[RequestTask]
    ) -> None:
        label = f"reverie-{uuid.uuid4().hex}"
        self.journal.record_batch(label, *key, (task.identity for task in chosen))
        try:
            # Not retried: if only the response was lost, a second attempt would create a second batch.
            name = await provider.submit(file, label)
        except QueueFullError as error:
            self.journal.end_batch(label, str(error))
            for task in chosen:
                self.throttle.release(task.identity.stage, None)
            self._make_smaller(key, chosen, error)
            await self.throttle.sleep(self._wait(error))
            return
        except RetryableError as error:
            # If this fails, too, the batch stays open under its label: the next run looks for it.
            created = await self.retry(provider.find_batch, label)
            if created is None:
                self._end(label, chosen, error)
                await self.throttle.sleep(self._wait(error))
                return
            name = created
        except AnnotationError as error:
            self._end(label, chosen, error)
            if isinstance(error, AccessError):
                raise
            return
        self.failed_submits = 0
        self.journal.name_batch(label, name)
        self.batches.append(_Batch(label, key, provider, name, self.journal.pending(label)))

    def _wait(self, error: RetryableError) -> float:
        """Return the seconds before the next submission."""
        self.failed_submits += 1
        wait = min(self.limits.max_backoff, self.limits.backoff * 2**self.failed_submits)
        return max(wait, error.retry_after or 0.0)

    def _make_smaller(self, key: tuple[str, str], tasks: list[RequestTask], error: RetryableError) -> None:
        """Put the requests of a batch back that was too much for the queue, to be submitted in smaller ones.

        While others of the provider are under way, nothing more is submitted.

        Raises:
            RetryableError: One request alone is too much, again and again.
        """
        if any(batch.key == key for batch in self.batches):
            self.full.add(key)
        elif len(tasks) == 1:
            self.alone += 1
            if self.alone > self.limits.max_retries:
                raise error
        self.sizes[key] = max(1, len(tasks) // 2)
        self.waiting.extendleft(reversed(tasks))

    def _end(self, label: str, chosen: list[RequestTask], error: AnnotationError) -> None:
        """Record that a batch was not submitted."""
        self.journal.end_batch(label, str(error))
        for task in chosen:
            self.throttle.release(task.identity.stage, None)
            self._retry_or_give_up(task, error)

    async def _fetch(self, batch: _Batch) -> tuple[BatchStatus, list[tuple[str, Reply | AnnotationError]]]:
        """Return a batch's status, and its results if it ended."""
        results: list[tuple[str, Reply | AnnotationError]] = []
        try:
            status = await self.retry(batch.provider.get_status, batch.name)
        except AccessError as error:
            return _deleted(error, BatchStatus(True)), results
        for part in _split(status):  # each file apart: where one was deleted, what the others hold is paid for
            try:
                results += await self.retry(batch.provider.fetch_results, part)
            except AccessError as error:
                status = _deleted(error, status)
        return status, results

    async def collect(self) -> None:
        """Record the results of the batches that ended."""
        for batch in list(self.batches):
            status, results = await self._fetch(batch)
            if not status.ended:
                continue
            for key, result in results:
                if key in batch.pending and key in self.tasks:  # a duplicate line counts once
                    attempt, _ = batch.pending.pop(key)
                    self._record(self.tasks[key], attempt, result)
                    self.denied = result if isinstance(result, AccessError) else self.denied
            for _, stage in batch.pending.values():
                self.throttle.release(stage, None)
            # Results of tasks that are not part of this run stay at the provider for a later run.
            if not {key for key, _ in results} & batch.pending.keys():
                reason = status.reason or "the batch has no result for it"
                self.journal.end_batch(batch.label, reason)
                self.batches.remove(batch)
                self.full.discard(batch.key)
                undone = [self.tasks[key] for key in batch.pending if key in self.tasks]
                if status.full and undone:
                    self._make_smaller(batch.key, undone, RetryableError(reason))
                else:
                    self.alone = 0
                    if status.denied:
                        self.denied = self.denied or AccessError(f"{':'.join(batch.key)}: {reason}")
                    for task in undone:
                        self._retry_or_give_up(task, RetryableError(reason))
            else:
                self.batches.remove(batch)
            self.on_progress(self.outcome, self.throttle)
            if self.denied is not None:
                raise self.denied

    def _record(self, task: RequestTask, attempt: int, result: Reply | AnnotationError) -> None:
        if error := record(self.journal, self.throttle, task, attempt, result):
            self._retry_or_give_up(task, error)
        else:
            self.outcome.usable += 1
            self._end_task(task, None)

    def _retry_or_give_up(self, task: RequestTask, error: AnnotationError) -> None:
        if not is_given_up(error, self.errors[task.identity.key], self.limits):
            self.waiting.append(task)
            return
        self.outcome.add_failure(task, error)
        self._end_task(task, error)

    def _end_task(self, task: RequestTask, error: AnnotationError | None) -> None:
        self.outcome.requested += 1
        try:
            self.first_failures.add(task.identity, error)
        except AccessError as denied:
            self.denied = self.denied or denied

    async def run(self) -> Outcome:
        """Submit and collect until nothing is waiting or pending."""
        try:
            await self.resume()
            resumed = bool(self.batches)  # these may have ended long ago
            while not self.stop.is_set():
                await self.submit()
                self.on_progress(self.outcome, self.throttle)
                if not self.batches:
                    break
                if not resumed:
                    await self.throttle.sleep(self.limits.poll_seconds)
                resumed = False
                if not self.stop.is_set():
                    await self.collect()
        except AccessError as error:
            if not self.outcome.usable:
                raise UserError(str(error)) from None
            self.outcome.stopped = str(error)
        except (RetryableError, UnusableError) as error:
            self.outcome.stopped = f"{error}; open batches are kept, run the command again to collect them"
        except asyncio.CancelledError:
            self.stop.set()
        finally:
            for provider in self.providers.values():
                await provider.close()
        self.outcome.uncounted = self.throttle.uncounted
        if self.stop.is_set():
            count = sum(len(batch.pending) for batch in self.batches)
            self.outcome.stopped = f"interrupted; {count} requests are pending, run the command again to collect them"
        elif self.waiting and not self.outcome.stopped:
            self.outcome.stopped = self.throttle.stop_reason or "the budget is reserved for pending batches"
        return self.outcome


def _split(status: BatchStatus) -> list[BatchStatus]:
    """Return a status for each file of results, and for those that it holds itself; none if the batch did not end."""
    files = [dataclasses.replace(status, result_files=(file,), lines=b"") for file in status.result_files]
    return [*files, dataclasses.replace(status, result_files=())] if status.ended else []


def _deleted(error: AccessError, status: BatchStatus) -> BatchStatus:
    """Return a status with the reason that the provider knows a batch or its results no more.

    Raises:
        AccessError: The error is another one.
    """
    if " 404" not in str(error):
        raise error
    return dataclasses.replace(status, reason="the provider deleted the batch or its results")


def run(
    tasks: Iterable[RequestTask],
    open_providers: Callable[[], Providers],
    journal: Journal,
    limits: Limits,
    on_progress: ProgressFunction = lambda outcome, throttle: None,
) -> Outcome:
    """Send every request as `runner.run` does, but in batches.

    Ctrl-C (or SIGTERM) leaves the open batches at the provider; the next run collects them.

    Raises:
        UserError: A provider has no batch API, or no request can succeed (key, credit, quota of the day, model, URL).
    """

    async def main() -> Outcome:
        batch_run = _BatchRun(tasks, open_providers(), journal, limits, on_progress)
        task = asyncio.ensure_future(batch_run.run())

        def interrupt() -> None:
            if batch_run.stop.is_set():  # the second signal cancels requests in flight
                task.cancel()
            batch_run.stop.set()

        with handle_signals(interrupt):
            return await task

    return asyncio.run(main())
