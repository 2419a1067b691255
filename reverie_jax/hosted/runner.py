"""Send many requests concurrently, within limits and a budget, and record each in the journal."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tenacity

from reverie_jax.errors import UserError
from reverie_jax.hosted.identity import RequestIdentity
from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    Provider,
    RefusedError,
    Reply,
    Request,
    RetryableError,
    UnusableError,
)
from reverie_jax.hosted.journal import Journal
from reverie_jax.hosted.thoughts import split_thoughts
from reverie_jax.hosted.throttle import Limits, Throttle

_log = logging.getLogger(__name__)

Providers = dict[tuple[str, str], Provider]
"""Providers by (name, model)."""


@dataclasses.dataclass(frozen=True)
class RequestTask:
    """A request to send, and the parser of its reply.

    Attributes:
        name: The image's name, for messages.
        build_request: Called just before sending, so that an image is in memory only while its request is in flight.
            Raises `UnusableError` if the request cannot be built.
        parse_reply: Raises `UnusableError` if a reply cannot be used.
    """

    identity: RequestIdentity
    name: str
    build_request: Callable[[], Request]
    parse_reply: Callable[[str], Any]


@dataclasses.dataclass
class Outcome:
    """Result of a run over tasks.

    Attributes:
        requested: Tasks that ended in this run: with a usable reply, or after their last attempt.
        cached: Tasks that already had a reply.
        usable: Tasks with a new usable reply.
        failed: Reasons by name, of the tasks without a usable reply.
        stopped: Why the run stopped early; empty if it did not.
        uncounted: Replies whose tokens the service did not count.
    """

    requested: int = 0
    cached: int = 0
    usable: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    stopped: str = ""
    uncounted: int = 0

    def reasons(self) -> list[tuple[str, int]]:
        """Return (reason, count), the most frequent first."""
        return collections.Counter(self.failed.values()).most_common()

    def add_failure(self, task: RequestTask, error: AnnotationError) -> None:
        """Add a task that was given up."""
        name = task.name if task.name not in self.failed else f"{task.name} ({task.identity.key})"
        self.failed[name] = str(error)


ProgressFunction = Callable[[Outcome, Throttle], None]


def find_problem(task: RequestTask, words: str) -> UnusableError | None:
    """Return why a reply's words cannot be used, or None."""
    try:
        task.parse_reply(words)
    except UnusableError as problem:
        return problem
    except Exception as problem:  # a fault of ours must not lose a reply that is paid for
        _log.debug("a parser failed", exc_info=True)
        return UnusableError(f"the reply cannot be read ({type(problem).__name__})")
    return None


def record(
    journal: Journal, throttle: Throttle, task: RequestTask, attempt: int, result: Reply | AnnotationError
) -> AnnotationError | None:
    """Parse a result's words, record it whole with its price, and return why it cannot be used, or None."""
    error = result if isinstance(result, AnnotationError) else None
    reply = result.reply if isinstance(result, AnnotationError) else result
    if reply is not None:
        reply = dataclasses.replace(reply, text=reply.text.encode("utf-8", "replace").decode("utf-8"))
    if reply is not None and error is None:
        thoughts, words = split_thoughts(reply.text)
        error = UnusableError("thoughts without an answer") if thoughts and not words else find_problem(task, words)
        if error is not None:
            error.reply = reply
    state = "usable" if error is None else "unusable" if isinstance(error, UnusableError) else "failed"
    price = throttle.release(task.identity.stage, reply)
    if state != "failed" and reply is not None and not reply.counted:
        throttle.uncounted += 1
    journal.record_result(attempt, state, reply, price=price, reason="" if error is None else str(error))
    return error


def is_given_up(error: BaseException | None, errors: collections.Counter[type], limits: Limits) -> bool:
    """Count a failure of a request, and return whether it is not worth another try."""
    charged = isinstance(error, UnusableError) or (isinstance(error, RetryableError) and error.charged)
    errors[UnusableError if charged else RetryableError] += 1
    hopeless = isinstance(error, RefusedError | AccessError)
    return hopeless or errors[UnusableError] >= limits.max_unusable or errors[RetryableError] > limits.max_retries


class FirstFailures:
    """Notice that the first requests of a kind all fail alike: every other one would be paid for, or refused, in vain.

    Requests are of one kind if they have the same stage, model and settings.
    """

    def __init__(self, journal: Journal, limits: Limits):
        self._journal, self._limits = journal, limits
        self._alike: dict[tuple[str, ...], collections.Counter[str]] = {}
        self._fine = set[tuple[str, ...]]()

    def add(self, identity: RequestIdentity, error: AnnotationError | None) -> None:
        """Add the end of a request; `error` says why it was given up, None that its reply is usable.

        Raises:
            AccessError: All of the first ones ended so.
        """
        kind = (identity.stage, identity.provider, identity.model, identity.prompt)
        alike = isinstance(error, RetryableError) or (isinstance(error, RefusedError) and error.systematic)
        if not alike and (error is None or (isinstance(error, UnusableError) and error.reply is not None)):
            self._fine.add(kind)  # the service accepts such requests
        if not alike or kind in self._fine:
            return
        words = self._alike.setdefault(kind, collections.Counter())
        words[re.sub(r"\S*\d\S*", "#", str(error))] += 1  # a request's number differs each time
        if len(words) > 1 or (words.total() >= self._limits.max_alike and self._journal.has_usable(identity)):
            self._fine.add(kind)
        elif words.total() >= self._limits.max_alike:
            source, reason = f"{identity.provider}:{identity.model}", str(error).rstrip(".")
            raise AccessError(
                f"{source}: {reason}; all of the first {words.total()} requests ended so, no more are sent"
            )


@contextlib.contextmanager
def handle_signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on SIGINT and SIGTERM; does nothing outside the main thread."""
    loop, installed = asyncio.get_running_loop(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, handler)
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


class _Stopped(Exception):
    """The run ended before the request was sent."""


class _Run:
    """The workers of one run."""

    def __init__(self, providers: Providers, journal: Journal, limits: Limits, on_progress: ProgressFunction):
        self.providers, self.journal, self.limits, self.on_progress = providers, journal, limits, on_progress
        self.stop, self.outcome = asyncio.Event(), Outcome()
        self.throttle = Throttle(limits, journal, self.stop)
        self.first_failures = FirstFailures(journal, limits)
        self.interrupted, self.access_error = False, ""
        self.workers: list[asyncio.Task[None]] = []

    async def attempt(self, task: RequestTask) -> None:
        """Send one request.

        Raises:
            RetryableError, UnusableError, AccessError: As the provider; the attempt is recorded.
            _Stopped: The run ended before the request was sent.
        """
        identity, throttle = task.identity, self.throttle
        request = task.build_request()
        if self.stop.is_set() or not await throttle.acquire(identity.stage) or self.stop.is_set():
            self.stop.set()
            raise _Stopped
        attempt = self.journal.record_request(identity)
        result: Reply | AnnotationError
        try:
            result = await self.providers[identity.provider, identity.model].ask(request)
        except AnnotationError as problem:
            result = problem
        except Exception as problem:
            _log.debug("a provider failed", exc_info=True)
            reason = f"the provider {identity.provider} failed ({type(problem).__name__}); report this bug"
            result = RefusedError(reason, systematic=True)
        if error := record(self.journal, throttle, task, attempt, result):
            throttle.reached |= not isinstance(error, RetryableError) or error.reached
            if isinstance(error, RetryableError) and not error.reached and throttle.count_unanswered():
                address = f"{identity.provider}:{identity.model}"
                raise AccessError(f"{address}: {error}; no whole answer ever came, check the URL")
            if isinstance(error, RetryableError) and error.retry_after:
                throttle.pause(error.retry_after)
            raise error
        throttle.reached = True

    async def complete(self, task: RequestTask) -> None:
        """Send a request until it has a usable reply, as often as the limits allow."""
        limits, errors = self.limits, collections.Counter[type]()

        def give_up(state: tenacity.RetryCallState) -> bool:
            return is_given_up(state.outcome.exception() if state.outcome else None, errors, limits)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((RetryableError, UnusableError)),
            wait=limits.retry_wait(),
            stop=give_up,
            sleep=self.throttle.sleep,
            reraise=True,
        )
        await retrying(self.attempt, task)

    async def work(self, tasks: Iterator[RequestTask]) -> None:
        """Complete one task after another until none is left or the run is stopped."""
        for task in tasks:
            if self.stop.is_set():
                return
            failure: RetryableError | UnusableError | None = None
            try:
                try:
                    await self.complete(task)
                    self.outcome.usable += 1
                except (RetryableError, UnusableError) as error:
                    failure = error
                    self.outcome.add_failure(task, error)
                self.first_failures.add(task.identity, failure)
            except _Stopped:
                return
            except AccessError as error:
                self.access_error = self.access_error or str(error)
                self.stop.set()
                return
            except Exception:  # the journal cannot be written, say: what is sent now would be paid for in vain
                self.stop.set()
                raise
            self.outcome.requested += 1
            self.on_progress(self.outcome, self.throttle)

    def interrupt(self) -> None:
        """Stop: at first new requests only, the second time also those in flight."""
        if self.interrupted:
            for worker in self.workers:
                worker.cancel()
        self.interrupted = True
        self.stop.set()

    async def run(self, tasks: Iterator[RequestTask]) -> Outcome:
        """Run all workers."""
        try:
            with handle_signals(self.interrupt):
                self.workers = [asyncio.create_task(self.work(tasks)) for _ in range(self.limits.concurrency)]
                results = await asyncio.gather(*self.workers, return_exceptions=True)
        finally:
            for provider in self.providers.values():
                await provider.close()
        for result in results:
            if isinstance(result, Exception):
                raise result
        if self.access_error and not self.outcome.usable:
            raise UserError(self.access_error)
        self.outcome.stopped = self.access_error or ("interrupted" if self.interrupted else self.throttle.stop_reason)
        self.outcome.uncounted = self.throttle.uncounted
        return self.outcome


def run(
    tasks: Iterable[RequestTask],
    open_providers: Callable[[], Providers],
    journal: Journal,
    limits: Limits,
    on_progress: ProgressFunction = lambda outcome, throttle: None,
) -> Outcome:
    """Send every request that has no usable reply yet.

    On the first Ctrl-C (or SIGTERM) the requests in flight finish, because they are paid for; the second one cancels them.

    Args:
        tasks: Requests; duplicates are sent twice.
        open_providers: Called inside the event loop that the providers run in.
        journal: Records every attempt.
        limits: Rates, retries and budget.
        on_progress: Called after each task.

    Raises:
        UserError: No request can succeed (key, credit, quota of the day, model, URL, parameter). If some have, the outcome
            says why the others cannot.
    """

    async def main() -> Outcome:
        return await _Run(open_providers(), journal, limits, on_progress).run(iter(tasks))

    return asyncio.run(main())
