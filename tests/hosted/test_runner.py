"""How fast, for how much, and how it ends: rates, waits that a service asks for, budgets, keys that are wrong, Ctrl-C."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import itertools
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from reverie_jax.annotate.pipeline import AnnotationJob, Pipeline
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import NoAccess
from reverie_jax.hosted.providers.common import seconds
from reverie_jax.hosted.runner import Limits, Outcome
from tests.annotate import helpers
from tests.annotate.helpers import JOURNAL, QUESTIONS, Memory, answer, load, rows_of
from tests.hosted import server as loopback
from tests.hosted.server import Fault, Server

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])


@pytest.fixture
def ask(tmp_path):
    """Runs the stage `questions` over so many pictures, one question each."""
    prompts = helpers.write_prompts(tmp_path / "prompts")

    def run(count: int, limits: Limits, model: str = "openai:tiny", out: str = "out") -> Outcome:
        names = tuple(helpers.write_pictures(tmp_path / "images", count))
        job = AnnotationJob(tmp_path / out, tmp_path / "images", names, model, count=1, prompts=prompts, limits=limits)
        with Pipeline(job, os.environ) as pipeline:
            return pipeline.questions()

    return run


def name_of(server: Server, provider: str) -> str:
    return f"{provider}:tiny@{server.url}" + ("/v1" if provider == "openai" else "")


def most_within(arrivals: list[tuple[float, float]], seconds: float) -> float:
    """The largest sum of weights that arrived within so many seconds."""
    return max(sum(w for t, w in arrivals if start <= t < start + seconds) for start, _ in arrivals)


# Rates. Minutes pass on a clock of the test's own.


@pytest.mark.parametrize("at_once", [1, 16])
def test_requests_a_minute(ask, clock, at_once):
    """In no minute more than allowed, and not much fewer either."""
    with Memory(answer, latency=lambda call: 1.0) as server:
        outcome = ask(40, Limits(concurrency=at_once, requests=15))
        arrivals = [(call.arrived, 1) for call in server.calls]
    assert outcome.usable == len(arrivals) == 40
    assert most_within(arrivals, 60) <= 15
    assert arrivals[-1][0] - arrivals[0][0] <= 40 / 15 * 60 + 5


@pytest.mark.parametrize("at_once", [1, 16])
def test_tokens_a_minute(ask, clock, at_once):
    """The same for tokens, up to the requests that left before the first reply told how large they are."""
    with Memory(answer, latency=lambda call: 1.0, tokens=(1000, 200)) as server:
        ask(60, Limits(concurrency=at_once, tokens=24_000))
        arrivals = [(call.arrived, 1200) for call in server.calls]
    assert len(arrivals) == 60
    first = at_once * 100  # the guess is 1,100
    assert most_within(arrivals, 60) <= 24_000 + 1200 + first
    assert arrivals[-1][0] - arrivals[0][0] <= 60 * 1200 / 24_000 * 60 + 60


def test_both_limits_at_once(ask, clock):
    with Memory(answer, tokens=(5000, 1000)) as server:
        ask(60, Limits(concurrency=8, requests=60, tokens=60_000))
        times = [call.arrived for call in server.calls]
    # 10 requests a minute by tokens; a full minute's tokens may go first.
    assert times[-1] - times[0] >= (60 - 10 - 8) / 10 * 60
    assert most_within([(t, 1) for t in times], 1) <= 1


def test_a_request_larger_than_a_minutes_tokens_still_goes(ask, clock):
    with Memory(answer, tokens=(5000, 1000)) as server:
        assert ask(5, Limits(concurrency=2, tokens=1000)).usable == 5
        assert len(server.calls) == 5


@PROVIDERS
def test_requests_a_minute_as_they_arrive(ask, provider):
    """The same on a real clock, at the server."""
    with Server(answer) as server:
        start = time.monotonic()
        ask(15, Limits(concurrency=8, requests=1200), name_of(server, provider))
        times = [call.arrived - start for call in server.calls]
    assert len(times) == 15
    assert all(late >= 0.05 * n for n, late in enumerate(sorted(times)))


# What a service asks for.


@PROVIDERS
@pytest.mark.parametrize("told", ["in the header", "in the body"])
def test_retry_after(ask, provider, told, monkeypatch):
    """Nobody asks anything until then."""
    if told == "in the body" and provider == "openai":
        pytest.skip("OpenAI says it in the header alone")
    usual = loopback._Handler.send_json

    def send_json(self, status, body, headers=None):
        if status == 429 and told == "in the body":
            headers = None
        if status == 429 and told == "in the header":
            body["error"].pop("details", None)
        usual(self, status, body, headers)

    monkeypatch.setattr(loopback._Handler, "send_json", send_json)
    met: list[float] = []

    def plan(call):
        if call.attempt == 1 and not met:
            met.append(call.arrived)
            return Fault.RATE_LIMIT_AFTER
        return None

    with Server(answer, plan, latency=0.1, retry_after=1.0) as server:
        outcome = ask(12, Limits(concurrency=3, backoff=0.01, longest=0.05), name_of(server, provider))
        times = [call.arrived - met[0] for call in server.calls]
    assert outcome.usable == 12
    assert len(times) == 13
    # Three in flight at that moment, and three that were on their way before the client could know.
    assert len([late for late in times if late < 1.0]) <= 3 + 3


def test_retry_after_holds_for_those_who_wait_for_their_turn(ask, clock):
    """A limit of rate lets nobody out in a pause that the service asked for."""
    faults = iter([Fault.RATE_LIMIT_AFTER])

    with Memory(answer, lambda call: next(faults, None), retry_after=30.0) as server:
        ask(20, Limits(concurrency=8, requests=60))
        times = [call.arrived - server.calls[0].arrived for call in server.calls]
    assert [t for t in times if 0.5 < t < 30.0] == []
    assert len(times) == 21


def test_the_rate_holds_after_a_pause(ask, clock):
    """Those whose turn came during the pause do not all go at its end."""
    with Memory(
        answer, lambda call: Fault.RATE_LIMIT_AFTER if len(server.calls) == 5 else None, retry_after=30.0
    ) as server:
        ask(100, Limits(concurrency=8, requests=60))
        arrivals = [(call.arrived, 1) for call in server.calls]
    assert len(arrivals) == 101
    assert most_within(arrivals, 60) <= 60
    assert most_within(arrivals, 5) <= 6


def test_waits_double_with_jitter(ask, clock):
    """A service that never answers is asked nine times, further and further apart, and given up."""
    gaps = []
    for out in range(8):
        with Memory(answer, lambda call: Fault.UNAVAILABLE) as server:
            outcome = ask(1, Limits(retries=8, backoff=1.0, longest=20.0), out=f"out{out}")
            times = [call.arrived for call in server.calls]
        assert len(times) == 9
        assert list(outcome.failed.values()) == ["503"]
        gaps.append([later - before for before, later in itertools.pairwise(times)])
    for row in gaps:
        assert all(0 <= gap <= min(20.0, 2.0**n) + 0.01 for n, gap in enumerate(row))
    means = [sum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    assert means[0] < 1
    assert means[4] > 2 * means[1]
    assert max(map(max, gaps)) > 10
    assert len({round(row[3], 6) for row in gaps}) > 4


def test_tries_and_retries_are_counted_apart(ask):
    """Failures of the service do not use up the tries of an item, nor the other way about."""
    plan = [Fault.SERVER_ERROR, Fault.EMPTY, Fault.UNAVAILABLE, Fault.EMPTY, Fault.SERVER_ERROR]
    quick = Limits(backoff=0.001, longest=0.001, tries=3, retries=3)
    with Memory(answer, lambda call: plan[call.attempt - 1] if call.attempt <= 5 else None) as server:
        assert ask(1, quick).usable == 1
        assert len(server.calls) == 6
    with Memory(answer, lambda call: [*plan, Fault.EMPTY][call.attempt - 1]) as server:
        assert ask(1, quick, out="spent").usable == 0
        assert len(server.calls) == 6
    with Memory(answer, lambda call: Fault.SERVER_ERROR) as server:
        ask(1, quick, out="down")
        assert len(server.calls) == 4


# Budgets.


MONEY = Limits(price_in=5.0, price_out=14.0, backoff=0.001, longest=0.001)
USUAL = (600, 500)
"""What a request for questions is thought to take before the first reply; with these prices, a cent."""


@pytest.mark.parametrize("at_once", [1, 4, 16])
@pytest.mark.parametrize("kind", ["money", "tokens"])
def test_a_budget_stops_and_a_larger_one_goes_on(ask, at_once, kind):
    """Never exceeded by more than was in flight; what was paid for is kept; a later run asks for the rest alone."""

    def limits(requests: float) -> Limits:
        change = {"budget": 0.01 * requests} if kind == "money" else {"token_budget": int(1100 * requests)}
        return dataclasses.replace(MONEY, concurrency=at_once, **change)

    with Memory(answer, latency=lambda call: 0.001, tokens=USUAL) as server:
        first = ask(30, limits(12.5))
        asked = len(server.calls)
        assert 12 <= asked <= 12 + at_once
        assert "budget" in first.stopped
        assert first.failed == {}
        assert first.usable == asked
        second = ask(30, limits(12.5))
        assert second.usable == 0
        assert len(server.calls) == asked
        third = ask(30, limits(31))
        assert third.stopped == ""
        assert asked + third.usable == 30
        assert set(Counter(call.digest for call in server.calls).values()) == {1}


@pytest.mark.parametrize("at_once", [1, 4, 16])
def test_a_budget_is_used_before_it_is_said_to_be_used_up(ask, at_once):
    """Guesses of what the first requests take, far too high here, are no reason to stop with the money unspent."""
    with Memory(answer, latency=lambda call: 0.001, tokens=(50, 5)) as server:
        outcome = ask(50, Limits(concurrency=at_once, token_budget=1650))
        assert "budget" in outcome.stopped
        assert 30 - at_once <= len(server.calls) <= 30 + at_once


def test_replies_of_no_use_are_paid_for_too(ask):
    with Memory(answer, lambda call: Fault.EMPTY, tokens=USUAL) as server:
        outcome = ask(40, dataclasses.replace(MONEY, concurrency=2, budget=0.205))
        assert "budget" in outcome.stopped
        assert len(server.calls) <= 22


def test_no_budget_at_all_asks_nothing(ask):
    with Memory(answer) as server:
        outcome = ask(4, dataclasses.replace(MONEY, budget=0.0))
        assert server.calls == []
        assert "budget" in outcome.stopped
        assert "budget" in ask(4, Limits(token_budget=0)).stopped


# Keys that are wrong.

WRONG = {
    "401": (401, "Incorrect API key provided: {}. You can find your API key at https://example.invalid."),
    "403": (403, "The caller with key {} does not have permission."),
    "404": (404, "The model `tiny` does not exist or you ({}) do not have access to it."),
}


@PROVIDERS
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_one_line_and_the_end(ask, provider, case, monkeypatch, tmp_path):
    secret = helpers.SECRETS[f"{provider.upper()}_API_KEY"]
    status, message = WRONG[case]
    mended: list[bool] = []
    helpers.unhappy(monkeypatch, lambda call: None if mended else (status, message.format(secret)))
    with Server(answer, latency=0.05) as server:
        with pytest.raises(UserError) as caught:
            ask(12, Limits(concurrency=4, backoff=0.01), name_of(server, provider))
        assert len(server.calls) <= 4
        said = str(caught.value)
        assert "\n" not in said
        assert str(status) in said
        assert "tiny" in said
        assert secret not in said
        assert not (tmp_path / "out" / QUESTIONS).exists()
        mended.append(True)
        server.latency = 0.0
        assert ask(12, Limits(concurrency=4), name_of(server, provider)).usable == 12


def test_geminis_wrong_key_is_a_400(ask, monkeypatch):
    secret = helpers.SECRETS["GEMINI_API_KEY"]
    helpers.unhappy(monkeypatch, lambda call: (400, f"API key not valid: {secret}. Please pass a valid API key."))
    with Server(answer) as server:
        with pytest.raises(UserError, match="API key not valid") as caught:
            ask(30, Limits(concurrency=4), name_of(server, "gemini"))
        assert len(server.calls) <= 4
    assert secret not in str(caught.value)


def test_an_account_without_money_is_no_rate_limit(ask, monkeypatch):
    """OpenAI's 429 of code `insufficient_quota` does not pass by waiting."""
    said = "You exceeded your current quota, please check your plan and billing details."
    body = {"error": {"message": said, "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}}
    helpers.unhappy(monkeypatch, lambda call: (429, body))
    with Server(answer) as server:
        with pytest.raises(UserError, match="quota"):
            ask(30, Limits(concurrency=4), name_of(server, "openai"))
        assert len(server.calls) <= 4


@PROVIDERS
def test_one_bad_request_is_not_the_end(ask, provider, monkeypatch):
    """A 400 about one picture fails that picture, with the service's words, and no other."""
    said = "Unable to process input image. [/v1/x] [bold]Please[/bold] retry"
    helpers.unhappy(monkeypatch, lambda call: (400, said) if call.images[0] == bad else None)
    with Server(answer) as server:
        bad = helpers.png((0, 0, 77))
        outcome = ask(6, Limits(concurrency=2, backoff=0.001, longest=0.001), name_of(server, provider))
    assert outcome.usable == 5
    assert len(outcome.failed) == 1
    assert said in next(iter(outcome.failed.values()))


def no_access(call):
    raise NoAccess("openai:tiny: 401: wrong")


def test_a_wrong_key_ends_it_though_others_wait_for_their_turn(ask, clock):
    """Six requests a minute, sixteen at once: whoever waits for the next place need not wait to hear that it is over."""
    with Memory(no_access) as server:
        start = clock.now
        with pytest.raises(UserError, match="401"):
            ask(40, Limits(concurrency=16, requests=6))
        assert len(server.calls) == 1
    assert clock.now - start < 5


def test_a_wrong_key_ends_it_though_others_were_told_to_wait(ask, clock):
    """The key is revoked while three are in a pause of an hour."""

    def plan(call):
        return Fault.RATE_LIMIT_AFTER if len(server.calls) < 4 else None

    with Memory(no_access, plan, lambda call: 1.0 * (len(server.calls) == 4), retry_after=3600.0) as server:
        start = clock.now
        with pytest.raises(UserError, match="401"):
            ask(40, Limits(concurrency=4))
        assert len(server.calls) == 4
    assert clock.now - start < 5


# Ctrl-C, in a process of its own.


@pytest.fixture
def begin(zygote, tmp_path, keys):
    """Starts `reverie annotate questions` over forty pictures."""
    helpers.write_pictures(tmp_path / "images", 40)
    prompts = helpers.write_prompts(tmp_path / "prompts")

    def start(server: Server, *more, provider: str = "openai") -> helpers.Child:
        words = ["annotate", "questions", "--images", tmp_path / "images", "--out", tmp_path / "out"]
        words += ["--prompts", prompts, "--questions", 1, "--concurrency", 4, "--writer", name_of(server, provider)]
        return zygote.start([*words, *more], keys, tmp_path)

    return start


@pytest.mark.parametrize(("provider", "number"), [("openai", signal.SIGINT), ("gemini", signal.SIGTERM)])
def test_first_signal_lets_requests_in_flight_finish(begin, provider, number, tmp_path):
    """They are paid for: each is answered, written down and in the file; nothing new is asked."""
    with Server(answer, latency=0.3) as server:
        child = begin(server, provider=provider)
        helpers.until(lambda: len(server.calls) >= 6 and server.in_flight == 4)
        child.signal(number)
        before = len(server.calls)
        assert child.wait(20) == 1
        assert len(server.calls) <= before + 4  # who had just been answered may have asked again
        assert sum(server.served.values()) == len(server.calls)
        asked = len(server.calls)
        log = child.stderr.read_text("utf-8")
        assert "interrupted" in log
        assert "Traceback" not in log
        assert helpers.states(tmp_path / "out" / JOURNAL) == {"usable": asked}
        assert len(load(tmp_path / "out", QUESTIONS)) == asked
        server.latency = 0.0
        assert begin(server, provider=provider).wait(60) == 0
        assert len(server.calls) == 40
        assert len(server.served) == 40


def test_second_signal_does_not_wait(begin, tmp_path):
    """Those in flight are lost, and the next run says how many."""
    with Server(answer, latency=20.0) as server:
        child = begin(server)
        helpers.until(lambda: server.in_flight == 4)
        start = time.monotonic()
        child.signal(signal.SIGINT)
        time.sleep(0.3)
        assert child.poll() is None
        child.signal(signal.SIGINT)
        assert child.wait(10) in (1, 130)
        assert time.monotonic() - start < 5
        assert "Traceback" not in child.stderr.read_text("utf-8")
        server.latency = 0.0
        child = begin(server)
        assert child.wait(60) == 0
        assert "4 requests were in flight" in child.stderr.read_text("utf-8")
        assert len(server.calls) == 44
        assert sum(server.served.values()) == 40
    assert helpers.states(tmp_path / "out" / JOURNAL) == {"lost": 4, "usable": 40}


def test_signal_ends_a_wait_that_the_service_asked_for(begin):
    """Nothing is in flight, so there is nothing to wait for."""
    with Server(answer, lambda call: Fault.RATE_LIMIT_AFTER, retry_after=60.0) as server:
        child = begin(server)
        helpers.until(lambda: len(server.calls) >= 4 and server.in_flight == 0)
        time.sleep(0.3)
        child.signal(signal.SIGINT)
        assert child.wait(5) == 1, "still waiting"
        assert "interrupted" in child.stderr.read_text("utf-8")


def test_signal_ends_a_wait_for_the_next_place(begin):
    """At six requests a minute, four workers would sit there for forty seconds."""
    with Server(answer) as server:
        child = begin(server, "--requests-per-minute", 6)
        helpers.until(lambda: len(server.served) == 1)
        time.sleep(0.3)
        child.signal(signal.SIGINT)
        assert child.wait(5) == 1, "still waiting"
        assert len(server.calls) == 1


def test_two_runs_in_one_folder(begin, reverie, tmp_path):
    """The second is told in one line, and asks nothing."""
    with Server(answer, latency=0.2) as server:
        child = begin(server)
        helpers.until(lambda: len(server.calls) >= 4)
        with Server(answer) as other:
            words = ("--images", tmp_path / "images", "--out", tmp_path / "out", "--questions", 1)
            code, out, err = reverie("annotate", "run", *words, "--writer", name_of(other, "openai"))
            assert other.calls == []
        assert (code, out) == (2, "")
        assert "another run" in err
        assert err.count("\n") == 1
        server.latency = 0.0
        assert child.wait(60) == 0
        assert len(server.calls) == 40


def test_the_journal_adds_up(ask, tmp_path):
    """What the budget counts is what the server told."""
    with Server(answer) as server:
        ask(10, Limits(price_in=1.0, price_out=4.0), name_of(server, "openai"))
        told = [loopback.usage(call, answer(call)) for call in server.calls]
    rows = rows_of(Path(tmp_path / "out" / JOURNAL), "tokens_in, tokens_out, price")
    assert sorted(row[:2] for row in rows) == sorted(told)
    assert sum(row[2] for row in rows) == pytest.approx(sum(i + 4 * o for i, o in told) / 1e6)
    assert json.dumps(rows)


def test_retry_after_may_be_a_date():
    later = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90))
    assert 80 < (seconds(later) or 0) <= 90
    assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (seconds("7"), seconds("soon"), seconds(None)) == (7, None, None)
