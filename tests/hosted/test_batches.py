"""Batches against a server that counts: nothing is submitted twice, and everything is done or reported in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reverie_jax.errors import UserError
from reverie_jax.hosted import providers
from reverie_jax.hosted.interface import Reply, Request, UnusableError
from reverie_jax.hosted.providers import gemini, openai
from reverie_jax.hosted.runner import Outcome
from reverie_jax.hosted.throttle import Limits
from tests.data.fakes import png
from tests.hosted import helpers
from tests.hosted import server as loopback
from tests.hosted.helpers import JOURNAL, MODELS, make_task, reply_to, rows_of, secret_of, send, states
from tests.hosted.server import HARMLESS, LINES, REPLY, TRANSPORT, Call, Fault, Line, Server, Step, Trouble, share

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
KINDS = ("openai", "gemini")
PROVIDERS = pytest.mark.parametrize("provider", KINDS)
QUICK = Limits(batch=True, poll_seconds=0.01, backoff=0.001, max_backoff=0.005)
COUNT = 6


@pytest.fixture
def ask(tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """Return a function that runs tasks by batches; both providers' addresses are the server's."""

    def run(
        server: Server, provider: str = "openai", numbers: Any = None, limits: Limits = QUICK, **more: Any
    ) -> Outcome:
        for name, value in addresses(server).items():
            monkeypatch.setenv(name, value)
        specs = more.pop("specs", (MODELS[provider],))
        tasks = [make_task(number, spec, **more) for number in numbers or range(COUNT) for spec in specs]
        outcome, run.replies = send(tmp_path / "out", tasks, specs, limits)
        return outcome

    return run


def addresses(server: Server) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"{server.url}/v1", "GOOGLE_GEMINI_BASE_URL": server.url}


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


def open_batches(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT COUNT(*) FROM batches WHERE state != 'ended'").fetchone()[0]


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
    assert open_batches(tmp_path / "out" / JOURNAL) == 0


def test_models_of_two_providers_have_a_batch_each(ask):
    with Server(reply_to) as server:
        assert ask(server, specs=tuple(MODELS.values())).usable == 2 * COUNT
        check_once(server)
        assert {(batch.provider, len(batch.calls)) for batch in server.batches} == {("openai", 6), ("gemini", 6)}


KINDS_OF_LINES = (*LINES, *(f for f in (*TRANSPORT, *REPLY) if f is not Fault.WEB_PAGE), *HARMLESS)


@PROVIDERS
def test_whatever_lines_say_everything_is_done_in_the_end(ask, provider):
    with Server(reply_to, lines=share(0.5, 3, KINDS_OF_LINES), is_judge=lambda call: True) as server:
        outcome = ask(server, provider, range(24))
        check_once(server)
        assert len(server.faulted) >= 9
    assert (outcome.usable, outcome.failed, outcome.stopped) == (24, {}, "")
    assert all(f"Question {number}?" in ask.replies[f"{number}.png"] for number in range(24))


@PROVIDERS
def test_what_never_gets_a_usable_reply_is_reported(ask, provider, tmp_path):
    """Three unusable replies or nine failures; the reason is that of the last. Replies next to a wrong key are kept."""
    hopeless = dict(enumerate((Fault.BLOCKED, Fault.SERVER_ERROR, Line.MISSING, Fault.UNSURE)))
    number = lambda call: int(re.findall(r"\d+", call.text)[0])  # noqa: E731
    with Server(reply_to, lines=lambda call: hopeless.get(number(call)), is_judge=lambda call: True) as server:
        outcome = ask(server, provider)
        check_once(server, unanswered=4)
        assert Counter(map(number, server.calls)) == Counter({0: 3, 1: 9, 2: 9, 3: 3, 4: 1, 5: 1})
        assert (outcome.usable, outcome.requested, sorted(outcome.failed)) == (2, 6, [f"{n}.png" for n in range(4)])
        hopeless.clear()
        hopeless[0] = Line.DENIED
        with pytest.raises(UserError, match="401"):
            ask(server, provider)
        assert states(tmp_path / "out" / JOURNAL)["usable"] == 5


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


ENDS = [("failed", 0.0), ("expired", 0.0), ("expired", 0.5), ("cancelled", 0.0), ("cancelled", 0.5)]


@PROVIDERS
def test_what_batches_leave_undone_is_submitted_again(ask, provider, tmp_path):
    ends = iter(ENDS)
    with Server(reply_to, ends=lambda number: next(ends, ("completed", 1.0))) as server:
        assert ask(server, provider).usable == COUNT
        check_once(server)
        assert [len(batch.calls) for batch in server.batches] == [6, 6, 6, 3, 3, 2]
        server.ends = lambda number: ("failed", 0.0)
        outcome = ask(server, provider, [99])
        assert len(server.batches) == 6 + 9
    (reason,) = outcome.failed.values()
    assert "failed" in reason
    assert secret_of(provider) not in reason
    assert sum("cancelled" in row[0] for row in rows_of(tmp_path / "out" / JOURNAL, "reason")) == 5


@PROVIDERS
def test_files_keep_to_the_providers_limits(ask, provider, monkeypatch):
    """As few files as possible; a request that is too large alone goes alone."""
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


@pytest.mark.parametrize("kind", ["scenes", "replay", "google-generativeai"])
def test_providers_without_batches_say_so(ask, kind, monkeypatch):
    class Plain:
        name, model = kind, "tiny"

        async def ask(self, request: Request) -> Reply: ...

        async def close(self) -> None: ...

    monkeypatch.setitem(providers._BUILT_IN, kind, lambda *given: Plain())
    with Server(reply_to) as server, pytest.raises(UserError, match=kind):
        ask(server, specs=(f"{kind}:tiny",))
    assert server.steps == Counter()


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


@PROVIDERS
def test_a_batch_whose_name_was_lost_stays_open_if_the_list_cannot_be_read(ask, provider):
    """A run that cannot know whether there is a batch must not create another."""
    with Server(reply_to) as server:
        server.trouble = lambda step, count: {Step.CREATE: Trouble.LOST, Step.LIST: Fault.RESET}.get(step)
        assert ask(server, provider, limits=change(max_retries=2)).stopped
        server.trouble = None
        assert ask(server, provider).usable == COUNT
        assert set(server.submitted.values()) == {1}


STOPS = [
    (Step.STATUS, Fault.UNAVAILABLE, 9),
    (Step.DOWNLOAD, Fault.UNAVAILABLE, 9),
    (Step.LIST, Fault.UNAVAILABLE, 9),
    (Step.STATUS, (401, "Wrong key."), 1),
    (Step.DOWNLOAD, (401, "Wrong key."), 1),
    (Step.LIST, (401, "Wrong key."), 1),
    (Step.CREATE, (401, "Wrong key."), 1),
    (Step.STATUS, (400, "Wrong."), 1),
    (Step.DOWNLOAD, (400, "Wrong."), 1),
]


@pytest.mark.parametrize(("step", "fault", "times"), STOPS, ids=str)
@PROVIDERS
def test_a_fault_that_stays_stops_the_run_and_the_batch_is_kept(ask, provider, step, fault, times):
    """The next run collects it."""
    with Server(reply_to) as server:
        plan = {step: fault} | ({Step.CREATE: Trouble.LOST} if step is Step.LIST else {})
        server.trouble = lambda at, count: plan.get(at)
        if fault == (401, "Wrong key."):
            with pytest.raises(UserError, match="tiny"):
                ask(server, provider)
        else:
            outcome = ask(server, provider)
            assert str(503 if fault is Fault.UNAVAILABLE else 400) in outcome.stopped
            assert outcome.failed == {}
        assert server.steps[step] == times
        server.trouble = None
        assert ask(server, provider).usable == COUNT
        assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize(("provider", "step"), [("openai", Step.CREATE), ("gemini", Step.UPLOAD)])
def test_what_cannot_be_submitted_is_reported(ask, provider, step):
    """After nine attempts, or three of an invalid request."""
    with Server(reply_to) as server:
        for fault, times, word in ((Fault.UNAVAILABLE, 9, "503"), ((400, "This is [bold]wrong"), 3, "[bold]wrong")):
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


@PROVIDERS
def test_no_key_is_recorded(ask, provider, tmp_path):
    """In no file, name or message, although every error quotes it."""
    secret = secret_of(provider)
    words = f"Bad key {secret} of {secret[:8]}...{secret[-4:]}"

    def edit(row: dict[str, Any]) -> None:
        if error := row.get("error") or ((row.get("response") or {}).get("body") or {}).get("error"):
            error["message"] = words

    ends = iter([("failed", 0.0)])
    lines = share(0.5, 1, (Line.BAD, Fault.SERVER_ERROR, Fault.RATE_LIMIT), 9)
    with Server(reply_to, lines=lines, edit=edit, ends=lambda n: next(ends, ("completed", 1.0))) as server:
        server.trouble = lambda step, count: (503, words) if count == 1 and step is not Step.CHUNK else None
        outcomes = [ask(server, provider)]
        server.trouble = lambda step, count: (503, words)
        outcomes.append(ask(server, provider, [99]))
        assert server.faulted
    reasons = repr(outcomes) + repr(rows_of(tmp_path / "out" / JOURNAL, "reason"))
    files = b"\0".join(str(path).encode() + path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret.encode() not in files
    assert not any(part in reasons for part in (secret, secret[:8], secret[-4:]))


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
        assert (open_batches(tmp_path / "out" / JOURNAL), server.batches[0].looks) == (1, 0)
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
    monkeypatch.setattr(loopback, "usage", lambda call, text: USUAL)


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


# Ctrl-C and SIGKILL, in processes of their own.

IMAGES = 12


def answer(call: Call) -> str:
    return f'{{"question": "{call.digest[:16]}?", "correct_answer": "a", "confusing_answer": "b"}}'


@pytest.fixture
def begin(zygote, tmp_path, keys) -> Callable[..., helpers.Child]:
    """Return a function that starts `reverie annotate questions --batch` over twelve images."""
    for folder in ("images", "prompts", "spare"):
        (tmp_path / folder).mkdir()
    for number in range(IMAGES):
        (tmp_path / "images" / f"{number:02}.png").write_bytes(png((number, 3, 4)))
    (tmp_path / "prompts" / "questions.txt").write_text("{{ count }}")
    environment = keys | {"TMPDIR": str(tmp_path / "spare")}

    def start(server: Server, provider: str, *more: Any) -> helpers.Child:
        words = ["annotate", "questions", "--images", "images", "--out", "out", "--prompts", "prompts", "--batch"]
        words += ["--poll", 0.05, "--writer", MODELS[provider], *more]
        return zygote.start(words, environment | addresses(server), tmp_path)

    return start


class Moment(NamedTuple):
    """When a run is stopped: it hangs in a step, whose work is done or not."""

    step: Step
    done: bool = False


MOMENTS = [
    Moment(Step.UPLOAD),
    Moment(Step.CREATE),
    Moment(Step.CREATE, done=True),
    Moment(Step.LIST),
    Moment(Step.STATUS),
    Moment(Step.DOWNLOAD),
]


def hang(server: Server, moment: Moment) -> None:
    trouble = Trouble.HANG_DONE if moment.done else Trouble.HANG
    server.hanging.clear()
    server.trouble = lambda step, count: trouble if step is moment.step else None


@pytest.mark.parametrize(("provider", "number"), [("openai", signal.SIGINT), ("gemini", signal.SIGTERM)])
def test_a_signal_leaves_the_batch_and_the_next_run_collects_it(begin, tmp_path, provider, number):
    with Server(answer, polls=10**6) as server:
        child = begin(server, provider)
        helpers.until(lambda: server.steps[Step.STATUS] >= 2)
        child.signal(number)
        assert child.wait() == 1
        log = child.stderr.read_text("utf-8")
        assert f"{IMAGES} requests" in " ".join(log.split())
        assert "Traceback" not in log
        assert states(tmp_path / "out" / JOURNAL) == {"sent": IMAGES}
        server.polls = 1
        assert begin(server, provider).wait() == 0
        check_once(server)
        assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize("moment", [Moment(Step.UPLOAD), Moment(Step.CREATE, done=True), Moment(Step.STATUS)])
def test_a_second_signal_does_not_wait_for_a_service_that_hangs(begin, moment):
    """And the next run finds what was submitted."""
    with Server(answer) as server:
        hang(server, moment)
        child = begin(server, "openai")
        assert server.hanging.wait(120)
        child.signal(signal.SIGINT)
        assert child.wait(0.3) is None
        child.signal(signal.SIGINT)
        assert child.wait(60) in (1, 130)
        server.trouble = None
        assert begin(server, "openai").wait() == 0
        assert set(server.submitted.values()) == {1}


@PROVIDERS
def test_killed_at_every_moment(begin, tmp_path, provider):
    """The next run continues with whatever was created; no copy of the requests stays behind."""
    lines = share(0.3, 2, (*LINES, Fault.BLOCKED, Fault.SERVER_ERROR))
    with Server(answer, lines=lines, page=2) as server:
        server.add_strangers(provider, 3)
        for moment in MOMENTS:
            hang(server, moment)
            child = begin(server, provider)
            assert server.hanging.wait(120)
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            helpers.until(lambda: server.in_flight == 0)
        server.trouble = None
        child = begin(server, provider)
        assert child.wait() == 0, child.stderr.read_text("utf-8")
        check_once(server)
    assert states(tmp_path / "out" / JOURNAL)["usable"] == IMAGES
    assert not rows_of(tmp_path / "out" / JOURNAL, "id", "state IN ('sent', 'lost')")
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.slow
@PROVIDERS
def test_killed_forty_times_at_random(begin, tmp_path, provider):
    rng, kills = random.Random(provider), 0
    with Server(answer, lines=share(0.3, 4, (*LINES, Fault.BLOCKED, Fault.SERVER_ERROR)), seconds=0.2) as server:
        for _ in range(40):
            child = begin(server, provider)
            child.wait(rng.uniform(0.05, 1.2))
            child.signal(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
            helpers.until(lambda: server.in_flight == 0)
        assert begin(server, provider).wait() == 0
        check_once(server)
    assert states(tmp_path / "out" / JOURNAL)["usable"] == IMAGES
    assert kills >= 2
