"""SIGKILL at any moment, faults all along: nothing is lost, nothing with an answer is asked again, and the end is the same.

The client is the command itself, in a process of its own and in an ASCII locale. What happened is read from the server and
from copies of the journal made at each kill; which reply belongs to which request is told by the marks that answers carry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from reverie_jax.annotate.pipeline import AnnotationJob, Pipeline, export
from reverie_jax.hosted.runner import Limits
from tests.annotate import helpers
from tests.annotate.helpers import FILES, JOURNAL, answer, marks, stage_of
from tests.hosted.server import HARMLESS, Call, Fault, Server, share

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])
AT_ONCE = 16
ADDRESS = {"openai": "OPENAI_BASE_URL", "gemini": "GOOGLE_GEMINI_BASE_URL"}


def hopeless(call: Call) -> bool:
    """About one in forty never gets a usable reply, whenever it is asked."""
    return int(call.digest[:4], 16) % 41 == 0


def is_judge(call: Call) -> bool:
    return stage_of(call) == "judge"


@dataclasses.dataclass
class Snapshot:
    """The journal as a kill left it.

    Attributes:
        calls: requests that had arrived at the server by then.
        answered: marks of all usable replies.
        sent: numbers of the attempts whose end is not known.
    """

    calls: int
    answered: set[str]
    sent: set[int]


def snapshot(out: Path, calls: int, spare: Path) -> Snapshot:
    """Read from a copy, so that the journal is left exactly as it was."""
    shutil.rmtree(spare, ignore_errors=True)
    spare.mkdir()
    for path in out.glob(f"{JOURNAL}*"):
        shutil.copy(path, spare / path.name)
    if not (spare / JOURNAL).exists():
        return Snapshot(calls, set(), set())
    with contextlib.closing(sqlite3.connect(spare / JOURNAL)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempts'").fetchone():
            return Snapshot(calls, set(), set())
        replies = db.execute("SELECT reply FROM attempts WHERE state = 'usable'").fetchall()
        sent = {number for (number,) in db.execute("SELECT id FROM attempts WHERE state = 'sent'")}
    return Snapshot(calls, set().union(*(marks(reply) for (reply,) in replies)), sent)


def undisturbed(folder: Path, pictures: tuple[str, ...], who: str, count: int, monkeypatch) -> None:
    """The same job without a fault but the hopeless ones, and without a kill."""
    provider = who.split(":")[0]
    with Server(answer, lambda call: Fault.EMPTY if hopeless(call) else None) as server:
        monkeypatch.setenv(ADDRESS[provider], f"{server.url}/v1" if provider == "openai" else server.url)
        job = AnnotationJob(
            folder / "calm",
            folder / "images",
            pictures,
            who,
            count=count,
            prompts=folder / "prompts",
            limits=Limits(concurrency=AT_ONCE),
        )
        with Pipeline(job, os.environ) as pipeline:
            for stage in ("questions", "rationales", "judge"):
                getattr(pipeline, stage)()
        export(job.folder)
        assert set(server.served.values()) == {1}


def disturb(zygote, folder: Path, provider: str, pictures: int, kills: int, timeout: float, keys, monkeypatch) -> str:
    """Runs the job to its end through kills, and checks all that can be counted; returns the figures."""
    names = tuple(helpers.write_pictures(folder / "images", pictures))
    helpers.write_prompts(folder / "prompts")
    who, out, draw = helpers.MODELS[provider], folder / "out", random.Random(f"{provider} {pictures}")
    undisturbed(folder, names, who, 1, monkeypatch)
    often = share(0.2, seed=7)

    def plan(call: Call) -> Fault | None:
        return Fault.EMPTY if hopeless(call) else often(call)

    words = ["annotate", "run", "--images", "images", "--out", "out", "--prompts", "prompts", "--questions", "1"]
    words += ["--writer", who, "--timeout", timeout, "--concurrency", AT_ONCE]
    moments = sorted(draw.sample(range(1, int(pictures * 4 * 1.15)), kills))
    taken: list[Snapshot] = []
    notes: list[str] = []
    start = time.monotonic()
    with Server(answer, plan, latency=0.01, hold=3 * timeout, retry_after=0.05, is_judge=is_judge) as server:
        environment = keys | {ADDRESS[provider]: f"{server.url}/v1" if provider == "openai" else server.url}
        for moment in moments:
            child = zygote.start(words, environment, folder)
            helpers.until(lambda at=moment, it=child: len(server.calls) >= at or it.poll() is not None, 300)
            time.sleep(draw.random() * 0.02)
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.stderr.read_text("utf-8")
            notes.append(child.stderr.read_text("utf-8"))
            taken.append(snapshot(out, len(server.calls), folder / "spare"))
        child = zygote.start(words, environment, folder)
        code = child.wait(600)
        notes.append(child.stderr.read_text("utf-8"))
        helpers.until(lambda: server.in_flight == 0)
        calls, served, faulted = server.calls, server.served, server.faulted
    seconds = time.monotonic() - start

    # Every item has one usable reply, or is reported.
    rows = helpers.rows_of(out / JOURNAL, "id, state, reply")
    replies = [reply for _, state, reply in rows if state == "usable"]
    answered = Counter(mark for reply in replies for mark in marks(reply))
    assert all(len(marks(reply)) == 1 for reply in replies)
    assert set(answered.values()) == {1}
    arrived = {call.digest[:16] for call in calls}
    lost_cause = {call.digest[:16] for call in calls if hopeless(call)}
    assert set(answered) == arrived - lost_cause
    calm = helpers.rows_of(folder / "calm" / JOURNAL, "reply", "state = 'usable'")
    assert set(answered) == set().union(*(marks(reply) for (reply,) in calm))
    assert code == (1 if lost_cause else 0), notes[-1]
    failed = re.findall(r"[│|] (?:questions|rationales|judge) +[│|] (\d+) +[│|] an empty reply", notes[-1])
    assert sum(map(int, failed)) == len(lost_cause)

    # What had a usable reply in the journal is never asked again.
    for taken_then in taken:
        after = {call.digest[:16] for call in calls[taken_then.calls :]}
        assert not after & taken_then.answered
    for before, later in itertools.pairwise(taken):
        assert before.answered <= later.answered

    # What is paid for twice was in flight at a kill, and is counted.
    # One that was killed before it opened the journal left what the one before had left.
    lost = set[int]().union(*(taken_then.sent for taken_then in taken))
    assert {number for number, state, _ in rows if state == "lost"} == lost
    assert not [state for _, state, _ in rows if state == "sent"]
    assert all(len(taken_then.sent) <= AT_ONCE for taken_then in taken)
    repeated = sum(count - 1 for count in served.values())
    assert repeated <= len(lost)
    assert len(rows) - len(lost) <= len(calls) <= len(rows)
    said = [re.findall(r"(\d+) requests? w", note) for note in notes[1:]]
    told = [[str(len(taken_then.sent))] if taken_then.sent else [] for taken_then in taken]
    assert said[-1] == told[-1]
    assert all(numbers in ([], right) for numbers, right in zip(said, told, strict=True))
    assert not any("Traceback" in note for note in notes)

    # And the end is that of a run in peace.
    for name in FILES:
        assert (out / name).read_bytes() == (folder / "calm" / name).read_bytes(), name
    met = sum(faulted[fault] for fault in faulted if fault not in HARMLESS)
    return (
        f"{provider}: {len(answered)} items answered, {len(lost_cause)} reported, {len(calls)} requests,"
        f" {sum(faulted.values())} faults ({met} of them harmful), {len(moments)} kills, {len(lost)} lost,"
        f" {repeated} answered twice, {seconds:.0f} s"
    )


@PROVIDERS
def test_killed_three_times(zygote, tmp_path, keys, monkeypatch, provider):
    print(disturb(zygote, tmp_path, provider, 50, 3, 2.0, keys, monkeypatch))


@pytest.mark.slow
@PROVIDERS
def test_two_thousand_items_and_ten_kills(zygote, tmp_path, keys, monkeypatch, provider):
    print(disturb(zygote, tmp_path, provider, 520, 10, 4.0, keys, monkeypatch))
