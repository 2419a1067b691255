"""The runner: rates, waits, budgets, retries, signals. Minutes pass on a virtual clock."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections import Counter

import pytest

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import AccessError, RefusedError, Reply, RetryableError
from reverie_jax.hosted.journal import Journal
from reverie_jax.hosted.runner import Outcome
from reverie_jax.hosted.throttle import Limits
from tests.hosted import helpers
from tests.hosted.faults import Fault
from tests.hosted.fixtures import IMAGES
from tests.hosted.helpers import JOURNAL, Memory, make_task, reply_to, rows_of, send, states
from tests.hosted.server import Server

pytestmark = pytest.mark.usefixtures("keys", "sdks")
QUICK = Limits(concurrency=4, backoff=0.001, max_backoff=0.001)


@pytest.fixture
def ask(tmp_path):
    """Return a function that runs so many tasks."""

    def run(count: int, limits: Limits = QUICK, spec: str = "openai:tiny", out: str = "out", **more) -> Outcome:
        tasks = [make_task(number, spec, **more) for number in range(count)]
        return send(tmp_path / out, tasks, [spec], limits)[0]

    return run


def most_within(arrivals: list[float], seconds: float) -> int:
    """Return the largest number of arrivals within so many seconds."""
    return max(sum(start <= time < start + seconds for time in arrivals) for start in arrivals)


# Rates and waits.


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize(
    ("limits", "tokens", "per_minute"),
    [
        ({"requests_per_minute": 15}, (10, 10), 15),
        ({"tokens_per_minute": 24_000}, (1000, 200), 20),
        ({"requests_per_minute": 60, "tokens_per_minute": 60_000}, (5000, 1000), 10),
        ({"requests_per_minute": 60, "tokens_per_minute": 1e9}, (5000, 1000), 60),
    ],
)
def test_rate_limits_hold_and_are_used(ask, clock, concurrency, limits, tokens, per_minute):
    """In no minute more than allowed, evenly, and not much less; but for requests that left before the first reply."""
    with Memory(reply_to, latency=lambda call: 1.0, tokens=tokens) as server:
        assert ask(60, Limits(concurrency=concurrency, **limits)).usable == 60
        times = [call.arrived for call in server.calls]
    early = concurrency if "tokens_per_minute" in limits and per_minute < 60 else 0
    settled = times[early:]
    assert most_within(settled, 60) <= per_minute + (1 if early else 0)
    assert most_within(settled, 60 / per_minute * 2 - 0.1) <= 2 + (1 if early else 0)
    assert times[-1] - times[0] <= 60 / per_minute * 60 + 60


def test_a_request_larger_than_a_minutes_tokens_still_goes(ask, clock):
    with Memory(reply_to, tokens=(5000, 1000)):
        assert ask(5, Limits(concurrency=2, tokens_per_minute=1000)).usable == 5


@pytest.mark.parametrize("rate", [None, 60])
def test_a_pause_holds_for_everybody_and_the_rate_holds_after_it(ask, clock, rate):
    """Those whose turn came during the pause do not all leave at its end."""
    faults = iter([None] * 4 + [Fault.RATE_LIMIT_AFTER])
    with Memory(reply_to, lambda call: next(faults, None), lambda call: 0.01, retry_after=30.0) as server:
        assert ask(100, Limits(concurrency=8, requests_per_minute=rate)).usable == 100
        times = [call.arrived - server.calls[4].arrived for call in server.calls]
    assert len(times) == 101
    assert not [time for time in times if 0.5 < time < 29.9]
    if rate:
        assert most_within(times, 60) <= 60
        assert most_within(times, 5) <= 6


def test_waits_double_with_jitter(ask, clock):
    """A service that never answers is asked nine times, at growing intervals, and given up."""
    gaps = []
    for run in range(8):
        with Memory(reply_to, lambda call: Fault.UNAVAILABLE) as server:
            outcome = ask(1, Limits(backoff=1.0, max_backoff=20.0), out=f"out{run}")
            times = [call.arrived for call in server.calls]
        assert len(times) == 9
        assert list(outcome.failed) == ["0.png"]
        gaps.append([later - before for before, later in itertools.pairwise(times)])
    assert all(0 <= gap <= min(20.0, 2.0**n) + 0.01 for row in gaps for n, gap in enumerate(row))
    means = [sum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    assert means[0] < 1
    assert means[4] > 2 * means[1]
    assert max(map(max, gaps)) > 10
    assert len({round(row[3], 6) for row in gaps}) > 4


def test_unusable_replies_and_failures_are_counted_apart(ask, tmp_path):
    plan = [Fault.SERVER_ERROR, Fault.EMPTY, Fault.UNAVAILABLE, Fault.EMPTY, Fault.SERVER_ERROR]
    limits = dataclasses.replace(QUICK, max_unusable=3, max_retries=3)
    with Memory(reply_to, lambda call: plan[call.attempt - 1] if call.attempt <= 5 else None) as server:
        assert ask(1, limits).usable == 1
        assert len(server.calls) == 6
    assert states(tmp_path / "out" / JOURNAL) == {"failed": 3, "unusable": 2, "usable": 1}
    with Memory(reply_to, lambda call: [*plan, Fault.EMPTY][call.attempt - 1]) as server:
        assert ask(1, limits, out="unusable").reasons() == [(Fault.EMPTY.value, 1)]
        assert len(server.calls) == 6
    with Memory(reply_to, lambda call: Fault.SERVER_ERROR) as server:
        ask(1, limits, out="failing")
        assert len(server.calls) == 4


def test_what_may_be_paid_for_is_sent_three_times(ask, clock, tmp_path):
    """A model that is slower than --timeout goes on, and half a reply is paid for as a whole one: not nine times."""
    slow = RetryableError("no reply within 120 s; set a longer --timeout", charged=True)
    half = RetryableError("broke off", charged=True, reply=Reply("It is r"))
    plan = [half, Fault.UNAVAILABLE, slow, Fault.UNAVAILABLE]
    for number, (faults, tries) in enumerate([([slow] * 9, 3), ([half] * 9, 3), ([*plan, *plan], 5)]):
        with Memory(reply_to, lambda call, faults=faults: faults[call.attempt - 1]) as server:
            (reason,) = ask(1, Limits(), out=f"out{number}").failed.values()
            assert len(server.calls) == tries
            assert len({call.arrived for call in server.calls}) == tries  # after a wait
    assert reason == "broke off"
    assert rows_of(tmp_path / "out1" / JOURNAL, "state, reply") == [("failed", "It is r")] * 3


UNKNOWN = "400: Request r-{number} has an unknown field."
ALIKE = [  # (what each request ends with, how many are sent of forty, whether the run is stopped)
    (lambda call: RefusedError(UNKNOWN.format(number=len(call.digest)), systematic=True), 8, True),
    (lambda call: RefusedError(f"{call.text} was flagged"), 40, False),
    (lambda call: RefusedError(f"400: {call.text.encode().hex().translate(LETTERS)}", systematic=True), 40, False),
    (lambda call: RetryableError("no reply within 9 s; set a longer --timeout", charged=True), 24, True),
    (lambda call: Fault.SERVER_ERROR, 8 * 3, True),
    (lambda call: RetryableError(f"busy with {call.text.encode().hex().translate(LETTERS)}"), 40 * 3, False),
    (lambda call: Fault.EMPTY, 40 * 3, False),
]
LETTERS = str.maketrans("0123456789", "ghijklmnop")


@pytest.mark.parametrize(("fault", "count", "stopped"), ALIKE)
def test_a_run_whose_first_requests_all_fail_alike_is_stopped(ask, clock, fault, count, stopped):
    """In the service's words, if they may mean every request; not once a request of this kind has succeeded."""
    limits = dataclasses.replace(QUICK, concurrency=1, max_retries=2)
    with Memory(reply_to, fault) as server:
        if stopped:
            with pytest.raises(UserError, match=r"openai:tiny: (400|no reply|500).* first 8 requests"):
                ask(40, limits)
        else:
            assert len(ask(40, limits).failed) == 40
        assert len(server.calls) == count
        assert len(ask(7, limits, out="few").failed) == 7
        server.faults = lambda call: None if call.text == "Question 3?" else fault(call)
        assert (outcome := ask(40, limits, out="one")).usable == 1
        assert (len(outcome.failed), outcome.stopped) == (39, "")
        assert len(ask(40, limits, out="one").failed) == 39  # again, without the one that succeeded


def test_replies_that_the_task_cannot_parse_are_unusable(ask, tmp_path):
    """They are recorded, and a later run tries again. Unpaired surrogates do not stop the journal."""
    with Memory(lambda call: "Sorry. \ud83c") as server:
        assert ask(2).reasons() == [("not an answer", 2)]
        server.answer = lambda call: f"{reply_to(call)} \ud83c"
        assert ask(2).usable == 2
    assert rows_of(tmp_path / "out" / JOURNAL, "reply", "state = 'unusable'") == [("Sorry. ?",)] * 6


def test_a_bug_loses_no_reply(tmp_path):
    """Of a parser, or of somebody's provider; with a budget too, nobody waits for ever."""
    tasks = [dataclasses.replace(make_task(n, "openai:tiny"), parse_reply=lambda text: 1 / 0) for n in range(3)]
    with Memory(reply_to) as server:
        outcome, _ = send(tmp_path, tasks, ["openai:tiny"], dataclasses.replace(QUICK, max_tokens=10**9))
        assert outcome.reasons() == [("the reply cannot be read (ZeroDivisionError)", 3)]
        assert len(rows_of(tmp_path / JOURNAL, "id", "reply NOT NULL")) == len(server.calls) == 9
        server.faults = lambda call: KeyError("x")
        outcome, _ = send(tmp_path, tasks, ["openai:tiny"], dataclasses.replace(QUICK, max_tokens=10**9))
        assert len(server.calls) == 12
    ((reason, count),) = outcome.reasons()
    assert ("KeyError" in reason, count) == (True, 3)


@pytest.mark.parametrize("method", ["record_request", "record_result"])
def test_a_full_disk_stops_the_run(ask, clock, monkeypatch, method, tmp_path):
    """In one line; nothing is sent that cannot be recorded, and what was recorded stays."""
    usual, count = Journal._execute, []

    def execute(self, sql, values=()):
        count.append(
            sql.startswith({"record_request": "INSERT INTO attempts", "record_result": "UPDATE attempts"}[method])
        )
        if sum(count) > 8 and count[-1]:
            sql = "INSERT INTO full_disk VALUES (1)"
        return usual(self, sql, values)

    monkeypatch.setattr(Journal, "_execute", execute)
    with Memory(reply_to, latency=lambda call: 1.0) as server, pytest.raises(UserError, match=JOURNAL):
        ask(40)
    assert len(server.calls) <= 8 + 4
    assert states(tmp_path / "out" / JOURNAL)["usable"] == 8
    monkeypatch.undo()
    with Memory(reply_to):
        assert ask(40).usable == 32


@pytest.mark.parametrize("concurrency", [1, 7])
def test_concurrency(ask, clock, concurrency):
    """One provider for a run, as many requests in flight as allowed; a cached reply is not requested again."""
    limits = dataclasses.replace(QUICK, concurrency=concurrency)
    with Memory(reply_to, latency=lambda call: 0.01) as server:
        assert ask(14, limits).usable == 14
        assert (server.peak, len(server.calls), len(server.opened), server.closed) == (concurrency, 14, 1, 1)
        again = ask(15, limits)
        assert (again.cached, again.usable, again.requested, len(server.calls)) == (14, 1, 1, 15)


# Budgets.

MONEY = dataclasses.replace(QUICK, price_in=5.0, price_out=14.0)
USUAL = (600, 500)
"""Default tokens of a request for questions; with these prices, a cent."""


def budget(kind: str, requests: float, **changes) -> Limits:
    limit = {"max_cost": 0.01 * requests} if kind == "money" else {"max_tokens": int(1100 * requests)}
    return dataclasses.replace(MONEY, **limit, **changes)


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("kind", ["money", "tokens"])
def test_a_budget_stops_and_a_larger_one_continues(ask, clock, concurrency, kind):
    """It is exceeded by no more than was in flight; what was paid for is kept; a later run sends the rest alone."""
    with Memory(reply_to, latency=lambda call: 0.001, tokens=USUAL) as server:
        first = ask(30, budget(kind, 12.5, concurrency=concurrency))
        count = len(server.calls)
        assert 12 <= count <= 12 + concurrency
        assert "budget" in first.stopped
        assert (first.failed, first.usable) == ({}, count)
        assert ask(30, budget(kind, 12.5, concurrency=concurrency)).usable == 0
        assert len(server.calls) == count
        third = ask(30, budget(kind, 31, concurrency=concurrency))
        assert (third.stopped, count + third.usable) == ("", 30)
        assert set(Counter(call.digest for call in server.calls).values()) == {1}


def test_the_first_request_cannot_exceed_a_budget_sixteen_times(ask, clock):
    """Nobody knows what one takes before it is answered."""
    with Memory(reply_to, latency=lambda call: 1.0, tokens=(9000, 1000)) as server:
        outcome = ask(30, Limits(concurrency=16, max_tokens=5000))
        assert len(server.calls) == 1
        assert "exceeded" in outcome.stopped


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_a_budget_is_used_up_before_it_stops(ask, clock, concurrency):
    """The default for the first request, far too high here, does not stop a run with money left."""
    with Memory(reply_to, latency=lambda call: 0.001, tokens=(50, 5)) as server:
        outcome = ask(50, Limits(concurrency=concurrency, max_tokens=1650))
        assert "budget" in outcome.stopped
        assert 30 - concurrency <= len(server.calls) <= 30 + concurrency


def test_unusable_replies_count_and_a_budget_of_zero_sends_nothing(ask):
    with Memory(reply_to, lambda call: Fault.EMPTY, tokens=USUAL) as server:
        assert "budget" in ask(40, dataclasses.replace(MONEY, concurrency=2, max_cost=0.205)).stopped
        assert len(server.calls) <= 22
    with Memory(reply_to) as server:
        for limits in ({"max_cost": 0.0}, {"max_tokens": 0}):
            assert "budget" in ask(4, dataclasses.replace(MONEY, **limits), out="none").stopped
        assert server.calls == []


# Access.


def test_access_errors_end_a_run_although_others_wait(ask, clock, tmp_path):
    """For their turn, or for the end of a pause of an hour. The right key continues."""
    denied = AccessError("openai:tiny: 401: wrong key")
    with Memory(reply_to, lambda call: denied) as server, pytest.raises(UserError, match="401"):
        ask(40, Limits(concurrency=16, requests_per_minute=6))
    assert len(server.calls) == 1

    def plan(call):
        return Fault.RATE_LIMIT_AFTER if len(server.calls) < 4 else denied

    latency = lambda call: 1.0 * (len(server.calls) == 4)  # noqa: E731
    with Memory(reply_to, plan, latency, retry_after=3600.0) as server:
        with pytest.raises(UserError, match="401"):
            ask(40, Limits(concurrency=4))
        assert len(server.calls) == 4
        assert clock.now < 1010
        server.faults = lambda call: None
        assert ask(40, Limits(concurrency=4)).usable == 40
    assert states(tmp_path / "out" / JOURNAL) == {"failed": 5, "usable": 40}


def test_replies_before_a_used_up_quota_are_kept(ask):
    """The run stops in the service's words, and its caller writes what there is."""
    used_up = AccessError("openai:tiny: 429: requests per day")
    with Memory(reply_to, lambda call: used_up if len(server.calls) > 5 else None) as server:
        outcome = ask(40, dataclasses.replace(QUICK, concurrency=1))
        assert (outcome.usable, outcome.failed, outcome.stopped) == (5, {}, str(used_up))
        assert len(server.calls) == 6


def test_a_server_that_is_never_reached_ends_the_run(ask):
    """And not every task after all its retries; one that was reached once is retried."""
    down = RetryableError("connection failed", reached=False)
    with Memory(reply_to, lambda call: down) as server:
        with pytest.raises(UserError, match="openai:tiny"):
            ask(40, dataclasses.replace(QUICK, max_retries=2))
        assert len(server.calls) <= 2 + 4 + 4
        server.faults = lambda call: down if len(server.calls) > 20 else None
        outcome = ask(40, dataclasses.replace(QUICK, max_retries=2))
    assert outcome.failed
    assert not outcome.stopped


# Signals, in processes of their own.

QUESTION = '{"question": "What?", "correct_answer": "a cup", "confusing_answer": "a jug"}'


@pytest.mark.parametrize(("provider", "number"), [("openai", signal.SIGINT), ("gemini", signal.SIGTERM)])
def test_first_signal_lets_requests_in_flight_finish(begin, provider, number, tmp_path):
    """They are paid for: each is answered and recorded; nothing new is sent. The next run sends the rest."""
    with Server(lambda call: QUESTION, latency=0.3) as server:
        child = begin(server, provider, "--concurrency", 4)
        helpers.until(lambda: len(server.calls) >= 5 and server.in_flight == 4)
        child.signal(number)
        before = len(server.calls)
        assert child.wait() == 1
        count = len(server.calls)
        assert sum(server.served.values()) == count <= before + 4  # one just answered may send another
        assert "interrupted" in child.log
        assert "Traceback" not in child.log
        assert states(tmp_path / "out" / JOURNAL) == {"usable": count}
        server.latency = 0.0
        assert begin(server, provider).wait() == 0
        assert (len(server.calls), len(server.served)) == (IMAGES, IMAGES)


def test_second_signal_cancels_requests_and_other_runs_are_refused(begin, reverie, tmp_path):
    """Those in flight are lost, and the next run says how many. Meanwhile nobody else can use the folder."""
    with Server(lambda call: QUESTION, latency=600.0) as server:
        child = begin(server, "openai", "--concurrency", 4)
        helpers.until(lambda: server.in_flight == 4)
        words = ("--images", tmp_path / "images", "--out", tmp_path / "out", "--writer", "openai:m")
        code, out, err = reverie("annotate", "run", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert JOURNAL in err
        child.signal(signal.SIGINT)
        assert child.wait(0.5) is None
        child.signal(signal.SIGINT)
        assert child.wait() in (1, 130)
        assert "Traceback" not in child.log
        server.latency = 0.0
        child = begin(server, "openai")
        assert child.wait() == 0
        assert "4 requests" in child.log
        assert (len(server.calls), sum(server.served.values())) == (IMAGES + 4, IMAGES)
    assert states(tmp_path / "out" / JOURNAL) == {"lost": 4, "usable": IMAGES}


@pytest.mark.parametrize(("fault", "more"), [(Fault.RATE_LIMIT_AFTER, ()), (None, ("--requests-per-minute", 0.01))])
def test_a_signal_ends_waits(begin, fault, more):
    """For the end of a pause, or for the next turn."""
    with Server(lambda call: QUESTION, lambda call: fault, retry_after=6000.0) as server:
        child = begin(server, "openai", "--concurrency", 4, *more)
        helpers.until(lambda: (len(server.served) == 1 or sum(server.faulted.values()) >= 4) and server.in_flight == 0)
        child.signal(signal.SIGINT)
        assert child.wait() == 1
        assert "interrupted" in child.log
