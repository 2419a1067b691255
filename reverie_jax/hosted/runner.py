"""Asks many things at once, within limits and a budget, and writes everything down."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tenacity

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import NoAccess, Provider, Refused, Reply, Request, TryAgain
from reverie_jax.hosted.journal import Item, Journal

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may be asked how fast, and for how much.

    Attributes:
        concurrency: requests in flight.
        requests, tokens: at most so many a minute; None for no limit.
        tries: replies that an item may waste before it is given up.
        retries: times that the service may fail an item (busy, unreachable) before it is given up.
        backoff, longest: first and largest wait after such a failure, in seconds; waits double, with jitter.
        price_in, price_out: of a million tokens.
        budget: largest price of all attempts in the journal, earlier runs included.
        token_budget: the same in tokens.
        batch: requests go as batches, at half the price, and are looked after every `poll` seconds.
    """

    concurrency: int = 16
    requests: float | None = None
    tokens: float | None = None
    tries: int = 3
    retries: int = 8
    backoff: float = 1.0
    longest: float = 60.0
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float | None = None
    token_budget: int | None = None
    batch: bool = False
    poll: float = 30.0

    def price(self, tokens_in: float, tokens_out: float) -> float:
        whole = (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
        return whole / 2 if self.batch else whole


@dataclasses.dataclass(frozen=True)
class RequestTask:
    """One item to ask: how it is known, how its request is made, and what reads its reply.

    Attributes:
        name: for people: the picture's.
        request: called when the item's turn comes: a picture is in memory only while it is asked about. Raises
            `Refused` where it cannot be made.
        read: raises `Refused` where a reply cannot be used.
    """

    item: Item
    name: str
    request: Callable[[], Request]
    read: Callable[[str], Any]


@dataclasses.dataclass
class Outcome:
    """How a run over items ended.

    Attributes:
        asked: items that were sent at least once in this run.
        had: items whose reply was there already.
        failed: reasons by item, of those that have no usable reply.
        stopped: why the run ended early; empty where it did not.
    """

    asked: int = 0
    had: int = 0
    usable: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    stopped: str = ""

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, how many), the most frequent first."""
        return collections.Counter(self.failed.values()).most_common()


DEFAULT_TOKENS = {
    "questions": (600, 500),
    "positive": (450, 150),
    "negative": (450, 150),
    "judge": (600, 3),
    "lrv_positive": (1500, 1000),
    "lrv_nonexistent": (1500, 350),
    "lrv_existent": (1500, 350),
    "lrv_knowledge": (1500, 350),
    "evaluate": (1000, 200),
}
"""(in, out) of a request, before the first reply has told."""


class _Pace:
    """So much a minute, evenly: no burst, for services count by the minute, and not from where we do."""

    def __init__(self, per_minute: float):
        self._seconds, self._free = 60 / per_minute, 0.0

    def turn(self, amount: float = 1.0) -> float:
        """Takes the next turn, for a request of so much; returns the seconds until then."""
        now = time.monotonic()
        start = max(now, self._free)
        self._free = start + amount * self._seconds
        return start - now

    def correct(self, amount: float) -> None:
        """A request took so much more, or less, than was thought."""
        self._free += amount * self._seconds


class Gate:
    """Limits that all workers share: rates, a pause that the service asked for, and the budget."""

    def __init__(self, limits: Limits, journal: Journal, stop: asyncio.Event):
        self.limits, self.stop = limits, stop
        self._requests = _Pace(limits.requests) if limits.requests else None
        self._tokens = _Pace(limits.tokens) if limits.tokens else None
        self._until = 0.0
        spent = journal.spent()
        self.price, self.tokens = spent.price, spent.tokens_in + spent.tokens_out
        self._reserved = collections.Counter[str]()
        self.stopped = ""
        self.reached, self._missed = False, 0
        self._left = asyncio.Event()
        self._sums: dict[str, list[float]] = {}
        for stage in DEFAULT_TOKENS:
            if (mean := journal.mean_tokens(stage)) is not None:
                self._sums[stage] = [1.0, *mean]

    def estimate(self, stage: str) -> tuple[float, float]:
        """(in, out) that a request will likely take: the mean of those before."""
        if stage not in self._sums:
            return DEFAULT_TOKENS[stage]
        count, tokens_in, tokens_out = self._sums[stage]
        return tokens_in / count, tokens_out / count

    def _full(self, stage: str) -> str:
        """Why the budget has no room for a request; empty where it has. A first request goes, to tell how much one takes."""
        limits, known = self.limits, stage in self._sums or self._reserved.total()
        price = tokens = 0.0
        for name, count in [*self._reserved.items(), (stage, 1)]:
            one = self.estimate(name) if known else (0, 0)
            price, tokens = price + count * limits.price(*one), tokens + count * sum(one)
        if limits.budget is not None and (self.price + price > limits.budget or self.price >= limits.budget):
            return f"the budget of {limits.budget:g} is used up ({self.price:.4f} spent)"
        if limits.token_budget is not None and (
            self.tokens + tokens > limits.token_budget or self.tokens >= limits.token_budget
        ):
            return f"the budget of {limits.token_budget:,} tokens is used up ({self.tokens:,} spent)"
        return ""

    async def sleep(self, seconds: float) -> None:
        """Waits so long, or until the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)

    async def enter(self, stage: str) -> bool:
        """Waits for a request's turn; False where the budget has no room for it."""
        one = self.estimate(stage)
        while True:
            if self._requests:
                await self.sleep(self._requests.turn())
            if self._tokens:
                await self.sleep(self._tokens.turn(sum(one)))
            if (wait := self._until - time.monotonic()) <= 0 or self.stop.is_set():
                break
            await self.sleep(wait)  # and then another turn: those who waited do not all go at once
        while (full := self._full(stage)) and not self.stop.is_set():
            if not self._reserved.total():
                self.stopped = full
                return False
            self._left.clear()  # those in flight may take less than was thought
            waiting = [asyncio.ensure_future(event.wait()) for event in (self._left, self.stop)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one_of_two in waiting:
                one_of_two.cancel()
        self._reserved[stage] += 1
        return True

    def reserve(self, stage: str, *, always: bool = False) -> bool:
        """Counts a request as under way without waiting; False where the budget has no room for it.

        Args:
            always: it is under way already.
        """
        if not always and (full := self._full(stage)):
            self.stopped = "" if self._reserved.total() else full
            return False
        self._reserved[stage] += 1
        return True

    def leave(self, stage: str, reply: Reply | None) -> float:
        """Takes note of what a request took; returns its price."""
        self._reserved[stage] -= 1
        self._left.set()
        if reply is None or not (reply.tokens_in or reply.tokens_out):
            return 0.0
        if self._tokens:
            self._tokens.correct(reply.tokens_in + reply.tokens_out - sum(self.estimate(stage)))
        sums = self._sums.setdefault(stage, [0.0, 0.0, 0.0])
        for place, value in enumerate((1, reply.tokens_in, reply.tokens_out)):
            sums[place] += value
        price = self.limits.price(reply.tokens_in, reply.tokens_out)
        self.price += price
        self.tokens += reply.tokens_in + reply.tokens_out
        return price

    def missed(self) -> bool:
        """Counts a request that nothing answered; whether these are enough to say that nobody is there."""
        self._missed += 1
        return not self.reached and self._missed >= self.limits.retries + self.limits.concurrency

    def pause(self, seconds: float) -> None:
        """Nobody asks anything for so long: the service said so."""
        if seconds > 60:
            _log.info("the service wants to be left alone for %.0f s", seconds)
        self._until = max(self._until, time.monotonic() + seconds)


class _Worker:
    """One item after another, until there is none or the run is stopped."""

    def __init__(self, gate: Gate, journal: Journal, providers: dict[tuple[str, str], Provider], stop: asyncio.Event):
        self.gate, self.journal, self.providers, self.stop = gate, journal, providers, stop

    async def once(self, task: RequestTask) -> None:
        """One attempt.

        Raises:
            TryAgain, Refused, NoAccess: as the provider says; the reply, where there is one, is written down.
            asyncio.CancelledError: the run has been stopped before the request could leave.
        """
        item, journal = task.item, self.journal
        request = task.request()
        if self.stop.is_set() or not await self.gate.enter(item.stage) or self.stop.is_set():
            self.stop.set()
            raise _Stopped
        attempt, reply = journal.sent(item), None
        try:
            reply = await self.providers[item.provider, item.model].ask(request)
            reply = dataclasses.replace(reply, text=reply.text.encode("utf-8", "replace").decode("utf-8"))
            self.gate.reached = True
            task.read(reply.text)
        except TryAgain as error:
            self.gate.leave(item.stage, None)
            journal.done(attempt, "failed", reason=str(error))
            self.gate.reached |= error.reached
            if not error.reached and self.gate.missed():
                raise NoAccess(f"{item.provider}:{item.model}: {error}; nothing was ever reached there") from None
            if error.after:
                self.gate.pause(error.after)
            raise
        except Refused as error:
            reply = error.reply if reply is None else reply
            journal.done(attempt, "unusable", reply, price=self.gate.leave(item.stage, reply), reason=str(error))
            raise
        except NoAccess as error:
            self.gate.leave(item.stage, None)
            journal.done(attempt, "failed", reason=str(error))
            raise
        journal.done(attempt, "usable", reply, price=self.gate.leave(item.stage, reply))

    async def until_done(self, task: RequestTask) -> None:
        """As many attempts as the limits allow."""
        limits, seen = self.gate.limits, collections.Counter[type]()
        build_tree = tenacity.wait_random_exponential(multiplier=limits.backoff, max=limits.longest)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(build_tree(state), error.after or 0.0) if isinstance(error, TryAgain) else 0.0

        def enough(state: tenacity.RetryCallState) -> bool:
            seen[type(state.outcome.exception() if state.outcome else None)] += 1
            return seen[Refused] >= limits.tries or seen[TryAgain] > limits.retries

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((TryAgain, Refused)),
            wait=wait,
            stop=enough,
            sleep=self.gate.sleep,
            reraise=True,
        )
        await retrying(self.once, task)


class _Stopped(Exception):
    """The run is over; the item was not asked."""


async def _run(
    tasks: Iterator[RequestTask],
    providers: dict[tuple[str, str], Provider],
    journal: Journal,
    limits: Limits,
    on_progress: Callable[[Outcome, Gate], None],
) -> Outcome:
    outcome, stop = Outcome(), asyncio.Event()
    gate = Gate(limits, journal, stop)
    loop = asyncio.get_running_loop()
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:  # twice: whoever waits, waits no longer
            for worker in workers:
                worker.cancel()
        interrupted = True
        stop.set()

    fatal: list[NoAccess] = []

    async def work() -> None:
        worker = _Worker(gate, journal, providers, stop)
        for task in tasks:
            if stop.is_set():
                return
            if journal.usable(task.item) is not None:
                outcome.had += 1
                continue
            try:
                await worker.until_done(task)
                outcome.usable += 1
            except _Stopped:
                return
            except NoAccess as error:
                fatal.append(error)
                stop.set()
                return
            except (TryAgain, Refused) as error:
                name = task.name if task.name not in outcome.failed else f"{task.name} ({task.item.key})"
                outcome.failed[name] = str(error)
            outcome.asked += 1
            on_progress(outcome, gate)

    handled = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(
            NotImplementedError, ValueError, RuntimeError
        ):  # not in the main thread, or no signals
            loop.add_signal_handler(number, interrupt)
            handled.append(number)
    workers = [asyncio.create_task(work()) for _ in range(limits.concurrency)]
    try:
        results = await asyncio.gather(*workers, return_exceptions=True)
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        for provider in providers.values():
            await provider.close()
    for result in results:
        if isinstance(result, Exception):
            raise result
    if fatal:
        raise UserError(str(fatal[0]))
    if interrupted:
        outcome.stopped = "interrupted"
    elif gate.stopped:
        outcome.stopped = gate.stopped
    return outcome


def run(
    tasks: Iterable[RequestTask],
    providers: Callable[[], dict[tuple[str, str], Provider]],
    journal: Journal,
    limits: Limits,
    on_progress: Callable[[Outcome, Any], None] = lambda outcome, gate: None,
) -> Outcome:
    """Asks every item that has no usable reply yet.

    A first Ctrl-C (or SIGTERM) lets the requests in flight finish, for they are paid for; a second does not.

    Args:
        providers: makes them, by the items' provider and model, within the loop that they will run in.
        tell: called after each item.

    Raises:
        UserError: the service will not have us at all (key, model, address).
    """

    async def main() -> Outcome:
        return await _run(iter(tasks), providers(), journal, limits, on_progress)

    return asyncio.run(main())
