"""Limits that all requests of a run share: rates, pauses (Retry-After), budget."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable

import tenacity

from reverie_jax.hosted.interface import Reply, RetryableError
from reverie_jax.hosted.journal import Journal

_log = logging.getLogger(__name__)

DEFAULT_TOKENS = {
    "questions": (600.0, 500.0),
    "positive": (450.0, 150.0),
    "negative": (450.0, 150.0),
    "judge": (600.0, 3.0),
    "lrv_positive": (1500.0, 1000.0),
    "lrv_nonexistent": (1500.0, 350.0),
    "lrv_existent": (1500.0, 350.0),
    "lrv_knowledge": (1500.0, 350.0),
    "evaluate": (1000.0, 200.0),
    "predict": (850.0, 30.0),
    "explain": (900.0, 150.0),
}
"""(input, output) tokens of a request, before the journal has a reply of its stage."""
DEFAULT_IMAGE_TOKENS = dict.fromkeys(("questions", "positive", "negative"), 258.0)
"""Tokens of a small image that these inputs include."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a run.

    Attributes:
        concurrency: Requests in flight at once.
        requests_per_minute, tokens_per_minute: Rate limits; None for no limit.
        max_unusable: Tries after which a request is given up that may all have been paid for: unusable replies, time-outs,
            halves of replies.
        max_retries: Retries after other failures of the service before a request is given up.
        max_alike: Requests that must all fail alike, before any succeeds, to end the run.
        backoff, max_backoff: First and longest wait before a retry, in seconds; waits double, with jitter.
        price_in, price_out: Price of a million tokens.
        max_cost: Largest total price of all attempts in the journal, earlier runs included.
        max_tokens: Largest total number of tokens, likewise.
        batch: Submit requests as batches, at half the price.
        poll_seconds: Time between two status checks of a batch.
    """

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_unusable: int = 3
    max_retries: int = 8
    max_alike: int = 8
    backoff: float = 1.0
    max_backoff: float = 60.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_tokens: int | None = None
    batch: bool = False
    poll_seconds: float = 30.0

    def price(self, tokens_in: float, tokens_out: float) -> float:
        """Return the price of so many tokens."""
        price = (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
        return price / 2 if self.batch else price

    def retry_wait(self) -> Callable[[tenacity.RetryCallState], float]:
        """Return the wait before a retry, in seconds, for tenacity: none after an unusable reply."""
        exponential = tenacity.wait_random_exponential(multiplier=self.backoff, max=self.max_backoff)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(exponential(state), error.retry_after or 0.0) if isinstance(error, RetryableError) else 0.0

        return wait


class _Pacer:
    """Evenly spaced rate limiter (no bursts).

    Not aiolimiter: the size of a request is an estimate that is corrected later, and may exceed a whole minute's tokens.
    """

    def __init__(self, per_minute: float):
        self._seconds, self._next = 60 / per_minute, 0.0

    def reserve(self, now: float, amount: float = 1.0) -> float:
        """Reserve the next slot for a request of some amount and return the seconds until then."""
        start = max(now, self._next)
        self._next = start + amount * self._seconds
        return start - now

    def correct(self, amount: float) -> None:
        """Correct the amount of an earlier request by the difference."""
        self._next += amount * self._seconds


class Throttle:
    """Rates, pauses and budget shared by all workers of a run; create it inside the event loop.

    Attributes:
        price, tokens: Spent so far, earlier runs included.
        stop_reason: Why the budget stopped the run; empty if it did not.
        reached: Whether any request of this run was answered.
        uncounted: Replies of this run whose tokens the service did not count.
    """

    def __init__(self, limits: Limits, journal: Journal, stop: asyncio.Event):
        self.limits, self.stop = limits, stop
        self._time = asyncio.get_running_loop().time
        self._requests = _Pacer(limits.requests_per_minute) if limits.requests_per_minute else None
        self._tokens = _Pacer(limits.tokens_per_minute) if limits.tokens_per_minute else None
        self._paused_until = 0.0
        spent = journal.spent()
        self.price, self.tokens = spent.price, spent.tokens_in + spent.tokens_out
        self._reserved = collections.Counter[str]()
        self._open_stages = set[str]()
        self.stop_reason = ""
        self.reached, self._unanswered, self.uncounted = False, 0, 0
        self._released = asyncio.Event()
        self._sums = {stage: [1.0, *mean] for stage, mean in journal.mean_tokens().items()}
        self._measured = set(self._sums)

    def estimate(self, stage: str) -> tuple[float, float]:
        """Return the expected (input, output) tokens of a request.

        This is the mean of the stage's replies. Before the first one it is the default; for a batch that is under way
        already at least the mean of every other stage, so that it does not cost more than the budget allowed for.
        """
        if stage in self._sums:
            count, tokens_in, tokens_out = self._sums[stage]
            return tokens_in / count, tokens_out / count
        default_in, default_out = DEFAULT_TOKENS[stage]
        if stage not in self._open_stages:
            return default_in, default_out
        means = [(tokens_in / count, tokens_out / count) for count, tokens_in, tokens_out in self._sums.values()]
        return max([default_in, *(mean[0] for mean in means)]), max([default_out, *(mean[1] for mean in means)])

    def _over_budget(self, stage: str) -> str:
        """Return why the budget does not allow another request; empty if it does.

        The first request of all is always allowed, to measure what one takes.
        """
        limits, known = self.limits, stage in self._sums or self._reserved.total()
        price = tokens = 0.0
        for name, count in [*self._reserved.items(), (stage, 1)]:
            size = self.estimate(name) if known else (0, 0)
            price, tokens = price + count * limits.price(*size), tokens + count * sum(size)
        if limits.max_cost is not None and (self.price + price > limits.max_cost or self.price >= limits.max_cost):
            verb = "exceeded" if self.price > limits.max_cost else "used up"
            return f"the budget of {limits.max_cost:g} is {verb} ({self.price:.4f} spent)"
        if limits.max_tokens is not None and (
            self.tokens + tokens > limits.max_tokens or self.tokens >= limits.max_tokens
        ):
            verb = "exceeded" if self.tokens > limits.max_tokens else "used up"
            return f"the budget of {limits.max_tokens:,} tokens is {verb} ({self.tokens:,} spent)"
        return ""

    def _is_unmeasured(self, stage: str) -> bool:
        """Return whether the first request of a stage is in flight: a budget waits for what it takes."""
        limited = self.limits.max_cost is not None or self.limits.max_tokens is not None
        return limited and stage not in self._measured and self._reserved[stage] > 0

    async def sleep(self, seconds: float) -> None:
        """Wait, or return early if the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)

    async def acquire(self, stage: str) -> bool:
        """Wait until a request may be sent; return False if the budget does not allow it."""
        size = sum(self.estimate(stage))
        while True:
            if self._requests:
                await self.sleep(self._requests.reserve(self._time()))
            if self._tokens:
                await self.sleep(self._tokens.reserve(self._time(), size))
            if (wait := self._paused_until - self._time()) <= 0 or self.stop.is_set():
                break
            await self.sleep(wait)  # then reserve again, so that the waiting requests do not leave all at once
        while not self.stop.is_set():
            reason = self._over_budget(stage)
            if not reason and not self._is_unmeasured(stage):
                break
            if not self._reserved.total():
                self.stop_reason = reason
                return False
            self._released.clear()  # requests in flight may take less than estimated
            waits = [asyncio.ensure_future(event.wait()) for event in (self._released, self.stop)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait_task in waits:
                wait_task.cancel()
        self._reserved[stage] += 1
        return True

    def reserve(self, stage: str, *, force: bool = False) -> bool:
        """Reserve budget for a batched request without waiting; return False if the budget does not allow it.

        Args:
            stage: Stage of the request.
            force: The request is already under way.
        """
        if not force and (reason := self._over_budget(stage)):
            self.stop_reason = "" if self._reserved.total() else reason
            return False
        if force:
            self._open_stages.add(stage)
        self._reserved[stage] += 1
        return True

    def release(self, stage: str, reply: Reply | None) -> float:
        """Replace a reservation by what the reply really took; return its price."""
        self._reserved[stage] -= 1
        self._released.set()
        if reply is not None:
            self._measured.add(stage)
        if reply is None or not (reply.tokens_in or reply.tokens_out):
            return 0.0
        if self._tokens:
            self._tokens.correct(reply.tokens_in + reply.tokens_out - sum(self.estimate(stage)))
        sums = self._sums.setdefault(stage, [0.0, 0.0, 0.0])
        for index, value in enumerate((1, reply.tokens_in, reply.tokens_out)):
            sums[index] += value
        price = self.limits.price(reply.tokens_in, reply.tokens_out)
        self.price += price
        self.tokens += reply.tokens_in + reply.tokens_out
        return price

    def count_unanswered(self) -> bool:
        """Count a request that no server answered; return whether the endpoint counts as unreachable."""
        self._unanswered += 1
        return not self.reached and self._unanswered >= self.limits.max_retries + self.limits.concurrency

    def pause(self, seconds: float) -> None:
        """Send no request for some seconds (Retry-After)."""
        if seconds > 60:
            _log.info("rate limited: waiting %.0f s (Retry-After)", seconds)
        self._paused_until = max(self._paused_until, self._time() + seconds)
