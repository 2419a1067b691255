"""What `reverie annotate` and `reverie judge` share: options for hosted models, progress, outcomes and costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from reverie_jax.hosted.interface import RequestSettings
    from reverie_jax.hosted.runner import Outcome
    from reverie_jax.hosted.session import CostEstimate, ProgressCallback, RequestConfig, Session
    from reverie_jax.hosted.throttle import Limits, Throttle
    from reverie_jax.progress import ProgressBars

INCOMPLETE = 1
"""Exit code if some items have no usable reply: the rest is written, and a further run requests them again."""
_NAMES, _REASONS = 8, 12
"""Names listed for each reason, and reasons listed for each step."""


@dataclasses.dataclass(frozen=True)
class LimitOptions:
    """Limits for hosted models."""

    timeout: Annotated[float, common.option("SECONDS")] = 120.0
    """Seconds to wait for one reply."""
    concurrency: Annotated[int, common.N] = 16
    """Requests in flight at once."""
    requests_per_minute: Annotated[float | None, common.N] = None
    """Rate limit, in requests."""
    tokens_per_minute: Annotated[float | None, common.N] = None
    """Rate limit, in tokens."""
    price: Annotated[tuple[float, float], common.option("IN OUT")] = (0.0, 0.0)
    """Price of a million input tokens and of a million output tokens, in your currency."""
    max_cost: Annotated[float | None, common.NUMBER] = None
    """Stop before the total cost, earlier runs in the same journal included, exceeds this. Needs --price."""
    max_tokens: Annotated[int | None, common.N] = None
    """Stop before the total number of tokens, earlier runs in the same journal included, exceeds this."""
    batch: Annotated[bool, common.FLAG] = False
    """Use the provider's batch API: half the price, within a day. Run the command again to collect the results."""
    poll: Annotated[float, common.option("SECONDS")] = 30.0
    """Seconds between status checks of submitted batches."""

    def limits(self) -> Limits:
        """Return the limits.

        Raises:
            UserError: an option is out of range.
        """
        from reverie_jax.hosted.throttle import Limits

        if self.max_cost is not None and not any(self.price):
            raise UserError("--max-cost needs --price IN OUT: the price of a million tokens")
        common.check_positive(
            concurrency=self.concurrency,
            timeout=self.timeout,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            poll=self.poll,
        )
        return Limits(
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            price_in=self.price[0],
            price_out=self.price[1],
            max_cost=self.max_cost,
            max_tokens=self.max_tokens,
            batch=self.batch,
            poll_seconds=self.poll,
        )


@dataclasses.dataclass(frozen=True)
class ProviderOptions(LimitOptions):
    """Options for hosted models."""

    structured: Annotated[bool, common.FLAG] = True
    """Do not request JSON by schema, for servers without support for it."""
    temperature: Annotated[str, common.option("NUMBER|none")] = ""
    """Sampling temperature; `none` sends none. If omitted, that of the benchmark (judge), or none (annotate)."""

    def settings(self, default_temperature: float | None = None) -> RequestSettings:
        """Return the settings of each request.

        Raises:
            UserError: The temperature is not a number of at least 0.
        """
        from reverie_jax.hosted.interface import RequestSettings

        return RequestSettings(self.timeout, self.structured, parse_temperature(self.temperature, default_temperature))

    def config(self) -> RequestConfig:
        """Return the settings and the limits."""
        from reverie_jax.hosted.session import RequestConfig

        return RequestConfig(self.settings(), self.limits())


def parse_temperature(text: str, default: float | None) -> float | None:
    """Return the value of --temperature: the default if omitted, None for `none`.

    Raises:
        UserError: It is not a number of at least 0.
    """
    word = text.strip().lower()
    if not word:
        return default
    try:
        temperature = None if word == "none" else float(word)
    except ValueError:
        temperature = -1.0
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {text}: must be a number of at least 0, or none")
    return temperature


def summary(outcome: Outcome) -> str:
    """Return an outcome in a line."""
    counts = f"{outcome.usable:,} new, {outcome.cached:,} already answered, {len(outcome.failed):,} failed"
    if outcome.uncounted:
        counts += f"; the service did not count the tokens of {outcome.uncounted:,} replies, they count as 0"
    return counts


def totals(session: Session) -> str:
    """Return what the journal's requests took so far, in a line."""
    spent = session.journal.spent()
    price = f", cost {spent.price:.4f}" if session.config.limits.price(1, 1) else ""
    return f"total: {spent.requests:,} requests, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} tokens out{price}"


def progress_callback(bars: ProgressBars) -> ProgressCallback:
    """Return a callback that shows a session's progress: items a minute, cost, failures."""
    from reverie_jax.progress import format_rate

    def on_progress(step: str, total: int, outcome: Outcome, throttle: Throttle) -> None:
        cost = f", cost {throttle.price:.3f}" if throttle.price else ""
        bars.update(
            step,
            outcome.requested,
            total,
            f"{format_rate(60 * bars.speed(step))}/min{cost}, {len(outcome.failed)} failed",
        )

    return on_progress


def exit_code(outcomes: dict[str, Outcome]) -> int:
    """Return the exit code, after a table on stderr of the reasons of missing replies."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    failed = {step: outcome for step, outcome in outcomes.items() if outcome.failed or outcome.stopped}
    if not failed:
        return 0
    console = Console(stderr=True)
    table = Table("step", "items", "reason", title="no usable reply; run the command again to retry")
    for step, outcome in failed.items():
        reasons = outcome.reasons()
        for reason, count in reasons[:_REASONS]:
            table.add_row(step, str(count), Text(reason))
        if len(reasons) > _REASONS:
            rest = sum(count for _, count in reasons[_REASONS:])
            table.add_row(step, str(rest), Text(f"{len(reasons) - _REASONS} other reasons, in the journal"))
        if outcome.stopped:
            table.add_row(step, "", Text(f"stopped early: {outcome.stopped}"))
    console.print(table)
    for step, outcome in failed.items():
        for reason, _ in outcome.reasons()[:_REASONS]:
            names = [name for name, why in outcome.failed.items() if why == reason]
            more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
            console.print(f"{step}: {reason}: {', '.join(names[:_NAMES])}{more}", highlight=False, markup=False)
    return INCOMPLETE


def estimates_table(rows: list[CostEstimate]) -> Table:
    """Return what each step would take as a table for a terminal."""
    from rich.table import Table

    priced = any(row.price for row in rows)
    title = "estimate; nothing was sent" + ("" if priced else "; add --price IN OUT for the cost")
    table = Table("step", "answered", "to request", "tokens in", "tokens out", "cost", title=title)
    for row in rows:
        numbers = (
            f"{row.cached:,}",
            f"{row.to_request:,}",
            f"{row.tokens_in:,.0f}",
            f"{row.tokens_out:,.0f}",
            f"{row.price:.4f}" if priced else "",
        )
        table.add_row(row.stage, *numbers)
    table.add_section()
    requests, price = sum(row.to_request for row in rows), sum(row.price for row in rows)
    tokens_in, tokens_out = sum(row.tokens_in for row in rows), sum(row.tokens_out for row in rows)
    cost = f"{price:.4f}" if priced else ""
    table.add_row("total", "", f"{requests:,}", f"{tokens_in:,.0f}", f"{tokens_out:,.0f}", cost)
    return table
