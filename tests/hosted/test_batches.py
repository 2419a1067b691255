"""Batches against a server that counts: nothing is submitted twice, and everything is done or reported in the end."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Request, UnusableError
from reverie_jax.hosted.runner import Outcome
from reverie_jax.hosted.throttle import Limits
from tests.hosted import helpers, wires
from tests.hosted.faults import HARMLESS, HOPELESS, REPLY, TRANSPORT, Fault, Line, Step, Trouble, share
from tests.hosted.helpers import JOURNAL, MODELS, Memory, make_task, reply_to, rows_of, secret_of, send, states
from tests.hosted.server import Server

pytestmark = pytest.mark.usefixtures("keys", "sdks")
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])
QUICK = Limits(batch=True, poll_seconds=0.01, backoff=0.001, max_backoff=0.005)
COUNT = 6


@pytest.fixture
def ask(tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """Return a function that runs tasks by batches; both providers' addresses are the server's."""

    def run(
        server: Server, provider: str = "openai", numbers: Any = None, limits: Limits = QUICK, **more: Any
    ) -> Outcome:
        for name, value in helpers.addresses(server).items():
            monkeypatch.setenv(name, value)
        specs = more.pop("specs", (MODELS[provider],))
        tasks = [make_task(number, spec, **more) for number in numbers or range(COUNT) for spec in specs]
        outcome, run.replies = send(tmp_path / "out", tasks, specs, limits)
        return outcome

    return run


def change(limits: Limits = QUICK, **changes: Any) -> Limits:
    return dataclasses.replace(limits, **changes)


def check_once(server: Server, unanswered: int = 0) -> None:
    """Check that each content was submitted again only after it got no usable reply, and how many never got one."""
    assert server.direct == 0
    failures = server.unanswered
    never = 0
    for digest, count in server.submitted.items():
        assert count in (failures[digest], failures[digest] + 1)
        never += count == failures[digest]
    assert never == unanswered


def open_batches(folder: Path) -> int:
    return len(rows_of(folder / "out" / JOURNAL, where="state != 'ended'", table="batches"))


def leave(ask: Any, server: Server, *args: Any, **more: Any) -> None:
    """Run until a batch is submitted, and leave it there."""
    server.trouble = lambda step, count: Fault.UNAVAILABLE if step is Step.STATUS else None
    limits = change(more.pop("limits", QUICK), max_retries=1)
    assert ask(server, *args, limits=limits, **more).stopped
    server.trouble = None


# Runs.


@PROVIDERS
def test_batches_send_what_direct_requests_send(ask, provider, tmp_path):
    """The same requests and replies, recorded likewise, at half the price; a further run sends nothing."""
    prices, columns = {"price_in": 2.0, "price_out": 10.0}, "item, content, reply, tokens_in, tokens_out, version"
    with Server(reply_to) as server:
        assert ask(server, provider, limits=change(batch=False, **prices)).usable == COUNT
        direct = {call.digest: repr(call.body).replace("mime_type", "mimeType") for call in server.calls}
        before, rows = ask.replies, sorted(rows_of(tmp_path / "out" / JOURNAL, columns))
        (price,) = rows_of(tmp_path / "out" / JOURNAL, "TOTAL(price)")[0]
        (tmp_path / "out").rename(tmp_path / "direct")
    with Server(reply_to, page=1) as server:
        assert ask(server, provider, limits=change(**prices)).usable == COUNT
        assert ask(server, provider, limits=change(**prices)) == Outcome(cached=COUNT)
        assert {call.digest: repr(call.body).replace("mime_type", "mimeType") for call in server.calls} == direct
        assert ([batch.downloads for batch in server.batches], server.direct) == ([1], 0)
    assert ask.replies == before
    assert sorted(rows_of(tmp_path / "out" / JOURNAL, columns)) == rows
    assert rows_of(tmp_path / "out" / JOURNAL, "TOTAL(price)")[0][0] == pytest.approx(price / 2)
    assert open_batches(tmp_path) == 0


EVERY_LINE = (*Line, *(fault for fault in (*TRANSPORT, *REPLY) if fault is not Fault.WEB_PAGE), *HARMLESS)
SURVIVED = [fault for fault in EVERY_LINE if fault not in (Line.DENIED, Line.EXPIRED, *HOPELESS)]


@pytest.mark.parametrize("ascii", [True, False])
def test_whatever_lines_say_everything_is_done_in_the_end(ask, ascii):
    """Lines of strangers are skipped, and fields that a service added lately. Each model has its own batches."""

    def edit(row: dict[str, Any]) -> None:
        body = (row.get("response") or {}).get("body") or row.get("response") or {}
        if "choices" in body or "candidates" in body:
            body["lately"] = {"added": 1}
            body.get("usageMetadata", {})["moonTokenCount"] = 3
        elif ascii:
            (row.get("error") or body["error"])["message"] += " \ud83d"

    lines = share(0.5, 3, SURVIVED)
    with Server(reply_to, lines=lines, is_judge=lambda call: True, edit=edit, ascii=ascii) as server:
        outcome = ask(server, numbers=range(24), specs=tuple(MODELS.values()))
        check_once(server)
        assert len(server.faulted) >= 12
        assert {(batch.provider, len(batch.calls)) for batch in server.batches[:2]} == {("openai", 24), ("gemini", 24)}
    assert (outcome.usable, outcome.failed, outcome.stopped) == (48, {}, "")
    assert all(f"Question {number}?" in ask.replies[f"{number}.png"] for number in range(24))


TRIES: dict[Any, int] = {
    **dict.fromkeys((Line.BAD, Fault.TRUNCATED), 1),
    **dict.fromkeys((Fault.REFUSED, Fault.EMPTY, Fault.UNSURE), 3),
    **dict.fromkeys((Line.MISSING, Fault.RATE_LIMIT, Fault.SERVER_ERROR, Fault.UNAVAILABLE), 9),
    **dict.fromkeys((None, Line.DOUBLED, Line.STRANGER, Line.ODD, *HARMLESS), 0),
}
"""How often a request is sent that never gets a usable reply; 0 if it gets one."""


@PROVIDERS
def test_what_never_gets_a_usable_reply_is_reported(ask, provider, tmp_path):
    """Hopeless ones once; three unusable replies, or nine failures. Replies next to a wrong key are kept."""
    kinds = dict(enumerate(TRIES))
    number = lambda call: int(re.findall(r"\d+", call.text)[0])  # noqa: E731
    secret = secret_of(provider)

    def edit(row: dict[str, Any]) -> None:
        if error := row.get("error") or row.get("response", {}).get("body", {}).get("error"):
            error["message"] = f"Bad key {secret}"

    plan = lambda call: kinds.get(number(call))  # noqa: E731
    with Server(reply_to, lines=plan, is_judge=lambda call: True, edit=edit) as server:
        outcome = ask(server, provider, list(kinds))
        failed = [number for number, kind in kinds.items() if TRIES[kind]]
        check_once(server, unanswered=len(failed))
        assert Counter(map(number, server.calls)) == {number: TRIES[kind] or 1 for number, kind in kinds.items()}
        assert (outcome.usable, outcome.requested) == (len(kinds) - len(failed), len(kinds))
        assert sorted(outcome.failed) == sorted(f"{number}.png" for number in failed)
        assert secret not in repr(rows_of(tmp_path / "out" / JOURNAL))
        usable = states(tmp_path / "out" / JOURNAL)["usable"]
        kinds.clear()
        kinds[0] = Line.DENIED
        assert "401" in ask(server, provider, [0, 100, 101]).stopped
        assert states(tmp_path / "out" / JOURNAL)["usable"] == usable + 2


def test_lines_that_are_all_refused_alike_end_the_run(ask, tmp_path):
    """When all of them are recorded; and lines that broke off are kept, in part."""
    with Server(reply_to, lines=lambda call: Line.BAD) as server:
        with pytest.raises(UserError, match=r"openai:tiny: 400: BAD"):
            ask(server, numbers=range(12))
        assert (len(server.batches), states(tmp_path / "out" / JOURNAL)) == (1, {"unusable": 12})
        server.lines = lambda call: Line.BROKEN
        assert "broke off" in repr(ask(server, numbers=[20, 21]).failed)
        assert len(server.batches) == 1 + 3
    kept = rows_of(tmp_path / "out" / JOURNAL, "reply", "reason LIKE '%broke off%'")
    assert len(kept) == 6
    assert all(reply.startswith('{"custom_id"') for (reply,) in kept)


@pytest.mark.parametrize("batch", [True, False])
def test_a_request_that_cannot_be_built_stops_no_other(tmp_path, batch):
    """Its image is broken, say."""

    def fail() -> Request:
        raise UnusableError("the image is broken")

    tasks = [make_task(number, MODELS["openai"]) for number in range(3)]
    tasks[1] = dataclasses.replace(tasks[1], build_request=fail)
    with Server(reply_to) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        outcome, _ = send(tmp_path / "out", tasks, [MODELS["openai"]], change(batch=batch))
    assert (outcome.usable, outcome.requested) == (2, 3)
    assert outcome.failed == {"1.png": "the image is broken"}


ENDS = [("failed", 0.0), ("expired", 0.0), ("expired", 0.5), ("cancelled", 0.0), ("partially_succeeded", 0.5)]
ENDS += [("failed late", 0.5)]


@PROVIDERS
def test_what_batches_leave_undone_is_submitted_again(ask, provider, tmp_path):
    """And that alone: what a batch that failed in part has answered is paid for."""
    ends = iter(ENDS)
    with Server(reply_to, ends=lambda number: next(ends, ("completed", 1.0))) as server:
        assert ask(server, provider).usable == COUNT
        check_once(server)
        assert [len(batch.calls) for batch in server.batches] == [6, 6, 6, 3, 3, 2, 1]
        server.ends = lambda number: ("failed", 0.0)
        outcome = ask(server, provider, [99])
        assert len(server.batches) == 7 + 9
    (reason,) = outcome.failed.values()
    assert "failed: Line 1 is invalid" in reason
    assert secret_of(provider) not in reason
    assert sum("cancelled" in row[0] for row in rows_of(tmp_path / "out" / JOURNAL, "reason")) == 3


@PROVIDERS
def test_a_batch_that_is_denied_is_not_submitted_again(ask, provider):
    """What it answered is kept, and the run ends in the service's words."""
    with Server(reply_to, ends=lambda number: ("denied", 0.5)) as server:
        assert "credit balance" in ask(server, provider).stopped
        assert len(server.batches) == 1
        server.ends = lambda number: ("completed", 1.0)
        assert ask(server, provider).usable == COUNT // 2
        check_once(server)


FULL = "Enqueued token limit reached for tiny. Limit: 90,000 enqueued tokens."


@PROVIDERS
def test_too_much_enqueued_makes_smaller_batches(ask, provider):
    """OpenAI says so of a batch that it took, Gemini takes none. One request that is too much alone ends the run."""
    ends = iter([("full", 0.0)] * 2 if provider == "openai" else [])
    with Server(reply_to, ends=lambda number: next(ends, ("completed", 1.0))) as server:
        if provider == "gemini":
            server.trouble = lambda step, count: (429, FULL) if step is Step.CREATE and count <= 2 else None
        outcome = ask(server, provider)
        assert (outcome.usable, outcome.failed, outcome.stopped) == (COUNT, {}, "")
        check_once(server)
        sizes = {"openai": [6, 3, 3, 1, 1, 1], "gemini": [1] * 6}[provider]
        assert [len(batch.calls) for batch in server.batches] == sizes
        server.ends = lambda number: ("full", 0.0)
        server.trouble = lambda step, count: (429, FULL) if (provider, step) == ("gemini", Step.CREATE) else None
        outcome = ask(server, provider, [7, 8])
        assert "nqueued" in outcome.stopped
        assert outcome.failed == {}


@PROVIDERS
def test_files_keep_to_the_providers_limits(ask, provider, monkeypatch):
    """As few files as possible; a request that is too large alone goes alone."""
    from reverie_jax.hosted.providers import gemini, openai

    kind = {"openai": openai.OpenAI, "gemini": gemini.Gemini}[provider]
    with Server(reply_to) as server:
        ask(server, provider)
        size = server.uploads[0] // COUNT
    for limit, numbers, batches in (
        ({"max_requests": 5}, range(10, 16), [5, 1]),
        ({"max_bytes": 3 * size + 100}, range(20, 26), [3, 3]),
        ({"max_bytes": size // 2}, range(30, 33), [1, 1, 1]),
    ):
        with monkeypatch.context() as patch, Server(reply_to) as server:
            for name, value in limit.items():
                patch.setattr(kind, name, value)
            ask(server, provider, numbers)
            check_once(server)
            assert [len(batch.calls) for batch in server.batches] == batches


def test_providers_without_batches_say_so(ask):
    with Memory(reply_to) as server, pytest.raises(UserError, match="openai"):
        ask(server)
    assert server.calls == []


# Faults of steps.


@PROVIDERS
@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.RESET, Fault.WEB_PAGE, Trouble.LOST], ids=str)
def test_each_step_may_fail_once(ask, provider, fault, monkeypatch):
    """Nothing is submitted twice: a batch whose name was lost is found, also behind those of other users."""
    from google.genai import _api_client

    monkeypatch.setattr(_api_client, "INITIAL_RETRY_DELAY", 0.001)
    with Server(reply_to, page=2) as server:
        server.add_strangers(provider, 5)
        server.trouble = lambda step, count: fault if count == 1 else None
        outcome = ask(server, provider)
        assert (outcome.usable, outcome.failed, outcome.stopped) == (COUNT, {}, "")
        assert set(server.submitted.values()) == {1}


DENIED, INVALID = (401, "Wrong key {key}."), (400, "Wrong, says {key}.")
STOPS = [
    *((step, Fault.UNAVAILABLE, 9) for step in (Step.STATUS, Step.DOWNLOAD, Step.LIST)),
    *((step, DENIED, 1) for step in (Step.STATUS, Step.DOWNLOAD, Step.LIST, Step.CREATE)),
    *((step, INVALID, 1) for step in (Step.STATUS, Step.DOWNLOAD)),
]


@pytest.mark.parametrize(("step", "fault", "times"), STOPS, ids=str)
@PROVIDERS
def test_a_fault_that_stays_stops_the_run_and_the_batch_is_kept(ask, provider, step, fault, times):
    """The next run collects it: one that cannot know whether there is a batch must not create another."""
    secret = secret_of(provider)
    with Server(reply_to) as server:
        told = fault if isinstance(fault, Fault) else (fault[0], fault[1].format(key=secret))
        plan = {step: told} | ({Step.CREATE: Trouble.LOST} if step is Step.LIST else {})
        server.trouble = lambda at, count: plan.get(at)
        if fault is DENIED:
            with pytest.raises(UserError, match="tiny") as caught:
                ask(server, provider)
            assert secret not in str(caught.value)
        else:
            outcome = ask(server, provider)
            assert str(503 if fault is Fault.UNAVAILABLE else 400) in outcome.stopped
            assert secret not in outcome.stopped
            assert outcome.failed == {}
        assert server.steps[step] == times
        server.trouble = None
        assert ask(server, provider).usable == COUNT
        assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize(("provider", "step"), [("openai", Step.CREATE), ("gemini", Step.UPLOAD)])
def test_what_cannot_be_submitted_is_reported(ask, provider, step):
    """After nine attempts, or one of an invalid request."""
    with Server(reply_to) as server:
        for fault, times, word in ((Fault.UNAVAILABLE, 9, "503"), ((400, "This is [bold]wrong"), 1, "[bold]wrong")):
            server.steps.clear()
            server.trouble = lambda at, count, fault=fault: fault if at is step else None
            (reason,) = set(ask(server, provider).failed.values())
            assert word in reason
            assert server.steps[step] == times
        server.trouble = None
        assert ask(server, provider).usable == COUNT
        assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize(("provider", "gone"), [("openai", "batch"), ("gemini", "results")])
def test_deleted_results_are_requested_again(ask, provider, gone):
    with Server(reply_to) as server:
        leave(ask, server, provider)
        server.files.clear()
        if gone == "batch":
            server.batches.clear()
        assert ask(server, provider).usable == COUNT


# Open batches of earlier runs.


def test_an_open_batch_needs_the_batch_option(ask):
    with Server(reply_to) as server:
        leave(ask, server)
        steps = server.steps.copy()
        with pytest.raises(UserError, match=r"6 .*--batch"):
            ask(server, limits=change(batch=False))
        assert (server.direct, server.steps) == (0, steps)
        assert ask(server).usable == COUNT
        assert ask(server, limits=change(batch=False)).cached == COUNT
        assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("other", [{"stage": "judge"}, {"specs": ("openai:other",)}])
def test_other_open_batches_are_left_alone(ask, tmp_path, batch, other):
    """Those of another step or model; whoever asks for them again collects them."""
    with Server(reply_to) as server:
        leave(ask, server, **other)
        assert ask(server, numbers=range(3), version="w", limits=change(batch=batch)).usable == 3
        assert (open_batches(tmp_path), server.batches[0].looks) == (1, 0)
        assert ask(server, **other).usable == COUNT
        assert server.direct == (0 if batch else 3)


def test_a_run_over_a_part_of_an_open_batch_leaves_the_rest(ask):
    with Server(reply_to) as server:
        leave(ask, server)
        assert ask(server, numbers=range(3)).usable == 3
        assert ask(server).usable == 3
        assert set(server.submitted.values()) == {1}


# Budgets.

MONEY = change(price_in=5.0, price_out=14.0)
USUAL = (600, 500)
"""Default tokens of a request for questions; with these prices half a cent in a batch."""


@pytest.fixture
def usual(monkeypatch) -> None:
    monkeypatch.setattr(wires, "usage", lambda call, text: USUAL)


def budget(kind: str, requests: float, limits: Limits = MONEY) -> Limits:
    limit = {"max_cost": 0.005 * requests} if kind == "money" else {"max_tokens": int(1100 * requests)}
    return change(limits, **limit)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("kind", ["money", "tokens"])
def test_a_budget_counts_open_batches_and_a_larger_one_continues(ask, kind):
    """It is never exceeded: a request takes what was estimated."""
    with Server(reply_to) as server:
        leave(ask, server, numbers=range(30), limits=budget(kind, 12.5))
        leave(ask, server, numbers=range(30), limits=budget(kind, 12.5))
        assert len(server.calls) == 12
        leave(ask, server, numbers=range(30), limits=budget(kind, 20.5))
        assert [len(batch.calls) for batch in server.batches] == [12, 8]
        outcome = ask(server, numbers=range(30), limits=budget(kind, 20.5))
        assert (outcome.usable, outcome.failed, len(server.calls)) == (20, {}, 20)
        assert "budget" in outcome.stopped
        outcome = ask(server, numbers=range(30), limits=budget(kind, 31))
        assert (outcome.usable, outcome.stopped) == (10, "")


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("kind", ["money", "tokens"])
def test_a_budget_counts_open_batches_of_another_judge(ask, tmp_path, kind):
    """Before a stage's first reply, they count as the dearest stage so far: they must not exceed the budget later."""
    with Server(reply_to) as server:
        ask(server, limits=MONEY)
        leave(ask, server, stage="judge", specs=("openai:one",), limits=MONEY)
        limits = budget(kind, 2 * COUNT + 0.5)
        outcome = ask(server, stage="judge", specs=("openai:two",), limits=limits)
        assert "budget" in outcome.stopped
        ask(server, stage="judge", specs=("openai:one",), limits=limits)
    ((price, tokens),) = rows_of(tmp_path / "out" / JOURNAL, "TOTAL(price), TOTAL(tokens_in + tokens_out)")
    assert price <= limits.max_cost if kind == "money" else tokens <= limits.max_tokens


@pytest.mark.usefixtures("usual")
def test_unusable_replies_count_and_a_budget_of_zero_submits_nothing(ask):
    with Server(reply_to, lines=lambda call: Fault.EMPTY) as server:
        assert "budget" in ask(server, numbers=range(10), limits=budget("money", 14.5)).stopped
        assert [len(batch.calls) for batch in server.batches] == [10, 4]
        server.steps.clear()
        for limits in (change(MONEY, max_cost=0.0), change(MONEY, max_tokens=0)):
            assert "budget" in ask(server, numbers=[99], limits=limits).stopped
        assert server.steps == Counter()
