"""`reverie annotate`: what a user sees of the pipeline."""

from __future__ import annotations

import os
from typing import Any, get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from reverie_jax.annotate import audit, lrv
from reverie_jax.annotate.pipeline import RELEASED, AnnotationJob, Pipeline, Step, Votes, export
from reverie_jax.cli.annotate_options import Annotate, ProviderOptions
from reverie_jax.errors import UserError
from reverie_jax.hosted import images
from reverie_jax.hosted.providers import RequestSettings
from reverie_jax.hosted.runner import Limits, Outcome
from reverie_jax.hosted.session import CostEstimate, ProgressCallback, Session

INCOMPLETE = 1
"""Exit code where some items have no usable reply: the rest is written, and a further run asks for them again."""


SHOWN = 8
"""Names a reason."""

WRITER = "name who writes, as gemini:MODEL or openai:MODEL"


def limits(options: ProviderOptions) -> Limits:
    """The limits that a command line sets.

    Raises:
        UserError: one makes no sense.
    """
    if options.max_cost is not None and not any(options.price):
        raise UserError("--max-cost needs --price IN OUT: what a million tokens cost")
    positive = {
        "--concurrency": options.concurrency,
        "--timeout": options.timeout,
        "--requests-per-minute": options.requests_per_minute,
        "--tokens-per-minute": options.tokens_per_minute,
        "--poll": options.poll,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{name} {value}: must be more than 0")
    return Limits(
        concurrency=options.concurrency,
        requests=options.requests_per_minute,
        tokens=options.tokens_per_minute,
        price_in=options.price[0],
        price_out=options.price[1],
        budget=options.max_cost,
        token_budget=options.max_tokens,
        batch=options.batch,
        poll=options.poll,
    )


def settings(options: ProviderOptions) -> RequestSettings:
    """How a command line wants models asked."""
    return RequestSettings(options.timeout, options.structured, options.temperature)


def needed(value: Any, name: str, what: str) -> Any:
    """An option's value.

    Raises:
        UserError: it was not given.
    """
    if not value:
        raise UserError(f"{name}: {what}")
    return value


def job(options: Annotate) -> AnnotationJob:
    """The job that a command line describes.

    Raises:
        UserError: an option makes no sense.
    """
    if options.votes not in get_args(Votes):
        raise UserError(f"--votes {options.votes}: must be {', '.join(get_args(Votes))}")
    folder, listed = needed(options.pictures, "--pictures", "name the folder of pictures"), options.list
    if listed is None and (options.out / "image_list.json").exists():
        listed = options.out / "image_list.json"  # where the original scripts have it
    return AnnotationJob(
        folder=options.out,
        pictures=folder,
        images=tuple(images.listed(folder, listed)),
        model=needed(options.model, "--model", WRITER),
        judges=options.judge,
        count=options.questions,
        confusing=options.confusing,
        votes=options.votes,  # type: ignore[arg-type]
        shown=options.judge_sees_picture,
        prompts=options.prompts,
        settings=settings(options.hosted),
        limits=limits(options.hosted),
    )


def annotate(options: Annotate) -> int:
    """Runs the steps that the command line names; returns the exit code.

    Raises:
        UserError: something that the user must mend.
    """
    steps: tuple[Step, ...] = get_args(Step)
    if options.step not in (*steps, "run", "audit", "lrv"):
        raise UserError(f"{options.step}: must be run, {', '.join(steps)}, audit or lrv")
    if options.step == "audit":
        if options.sample < 0:
            raise UserError(f"--sample {options.sample}: must not be negative")
        folder = needed(options.pictures, "--pictures", "name the folder of pictures")
        print(audit.write(options.out, folder, options.sample))
        return 0
    if options.step == "export":
        if options.dry_run:
            raise UserError("--dry-run: export asks nothing and costs nothing; run it without")
        return _export(options)
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        if options.step == "lrv":
            return _lrv(options, console, progress_callback(progress))
        return _reflective(
            options, console, progress_callback(progress), steps if options.step == "run" else (options.step,)
        )  # type: ignore[arg-type]


def _reflective(options: Annotate, console: Console, on_progress: ProgressCallback, steps: tuple[Step, ...]) -> int:
    failed: dict[str, Outcome] = {}
    with Pipeline(job(options), os.environ, on_progress) as pipeline:
        note(console, pipeline.session)
        if options.dry_run:
            Console().print(estimates_table(pipeline.estimate(steps)))
            return 0
        for step in steps:
            if step == "export":
                _export(options)
                continue
            failed[step] = outcome = getattr(pipeline, step)()
            console.print(f"reverie: {step}: {told(outcome)}", highlight=False, markup=False)
            if outcome.stopped:
                break
        tell_sum(console, pipeline.session)
    return exit_code(console, failed)


def _lrv(options: Annotate, console: Console, on_progress: ProgressCallback) -> int:
    wanted = lrv.LrvJob(
        folder=options.out,
        captions=needed(options.captions, "--captions", "name the file of captions"),
        model=needed(options.model, "--model", WRITER),
        counts=options.counts,
        balance=options.balance,
        prompts=options.prompts,
        settings=settings(options.hosted),
        limits=limits(options.hosted),
    )
    with lrv.Generation(wanted, os.environ, on_progress) as generation:
        note(console, generation.session)
        if options.dry_run:
            Console().print(estimates_table(generation.estimate()))
            return 0
        outcome = generation.generate()
        console.print(f"reverie: lrv: {told(outcome)}", highlight=False, markup=False)
        tell_sum(console, generation.session)
    print(options.out / lrv.INSTRUCTIONS)
    return exit_code(console, {"lrv": outcome})


def note(console: Console, session: Session) -> None:
    for note in session.notes:
        console.print(f"reverie: {note}", highlight=False, markup=False)


def tell_sum(console: Console, session: Session) -> None:
    spent = session.journal.spent()
    price = f", price {spent.price:.4f}" if session.how.limits.price(1, 1) else ""
    console.print(
        f"reverie: in all {spent.requests:,} requests, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} out{price}",
        highlight=False,
        markup=False,
    )


def exit_code(console: Console, outcomes: dict[str, Outcome]) -> int:
    """The exit code, with a table of reasons where something has no reply."""
    failed = {step: outcome for step, outcome in outcomes.items() if outcome.failed or outcome.stopped}
    if not failed:
        return 0
    table = Table("step", "items", "reason", title="without a usable reply; run again to ask for them again")
    for step, outcome in failed.items():
        for reason, count in outcome.reasons():
            table.add_row(step, str(count), Text(reason))
        if outcome.stopped:
            table.add_row(step, "", Text(f"ended early: {outcome.stopped}"))
    console.print(table)
    for step, outcome in failed.items():
        for reason, _ in outcome.reasons():
            names = [name for name, why in outcome.failed.items() if why == reason]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            console.print(f"{step}: {reason}: {', '.join(names[:SHOWN])}{more}", highlight=False, markup=False)
    return INCOMPLETE


def _export(options: Annotate) -> int:
    print(f"{export(options.out)} conversations: {options.out / RELEASED}")
    return 0


def told(outcome: Outcome) -> str:
    return f"{outcome.usable:,} new, {outcome.had:,} there already, {len(outcome.failed):,} failed"


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def progress_callback(progress: Progress) -> Any:
    bars: dict[str, TaskID] = {}

    def on_progress(step: str, total: int, outcome: Outcome, gate: Any) -> None:
        if step not in bars:
            bars[step] = progress.add_task(step, total=total, rate="")
        speed = progress.tasks[-1].speed or 0.0
        cost = f", {gate.price:.3f} spent" if gate.price else ""
        rate = f"{60 * speed:.0f}/min{cost}, {len(outcome.failed)} failed"
        progress.update(bars[step], completed=outcome.asked, rate=rate)

    return on_progress


def estimates_table(rows: list[CostEstimate]) -> Table:
    table = Table("stage", "had", "to ask", "tokens in", "tokens out", "price", title="nothing was asked")
    for row in rows:
        numbers = (
            f"{row.had:,}",
            f"{row.to_ask:,}",
            f"{row.tokens_in:,.0f}",
            f"{row.tokens_out:,.0f}",
            f"{row.price:.2f}",
        )
        table.add_row(row.stage, *numbers)
    table.add_section()
    requests, price = sum(row.to_ask for row in rows), sum(row.price for row in rows)
    tokens_in, tokens_out = sum(row.tokens_in for row in rows), sum(row.tokens_out for row in rows)
    table.add_row("in all", "", f"{requests:,}", f"{tokens_in:,.0f}", f"{tokens_out:,.0f}", f"{price:.2f}")
    return table
