"""SIGKILL at any moment, with faults: nothing is lost, no answered request is repeated, and the files are the same.

The client is the command in a process of its own, in an ASCII locale. What happened is read from the server and from copies
of the journal made at each kill; marks in the answers tell which reply belongs to which request.
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
from reverie_jax.hosted.session import RequestConfig
from reverie_jax.hosted.throttle import Limits
from tests.annotate import helpers
from tests.annotate.helpers import FILES, JOURNAL, answer, marks, stage_of
from tests.hosted.server import HARMLESS, Call, Fault, Server, share

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])
CONCURRENCY = 16
ADDRESS = {"openai": "OPENAI_BASE_URL", "gemini": "GOOGLE_GEMINI_BASE_URL"}


def hopeless(call: Call) -> bool:
    """Return whether a call never gets a usable reply: about one in forty."""
    return int(call.digest[:4], 16) % 41 == 0


def is_judge(call: Call) -> bool:
    return stage_of(call) == "judge"


@dataclasses.dataclass
class Snapshot:
    """The journal as a kill left it.

    Attributes:
        calls: Requests that had arrived at the server by then.
        answered: Marks of all usable replies.
        sent: Numbers of the attempts without a recorded end.
    """

    calls: int
    answered: set[str]
    sent: set[int]


def snapshot(out: Path, calls: int, spare: Path) -> Snapshot:
    """Read a copy, so that the journal stays exactly as it was."""
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


def run_calmly(folder: Path, images: tuple[str, ...], spec: str, monkeypatch) -> None:
    """Run the same job without a kill, and without faults but the hopeless ones."""
    provider = spec.split(":")[0]
    with Server(answer, lambda call: Fault.EMPTY if hopeless(call) else None) as server:
        monkeypatch.setenv(ADDRESS[provider], f"{server.url}/v1" if provider == "openai" else server.url)
        job = AnnotationJob(
            folder=folder / "calm",
            images_folder=folder / "images",
            images=images,
            writer=spec,
            questions=1,
            prompts=folder / "prompts",
            config=RequestConfig(limits=Limits(concurrency=CONCURRENCY)),
        )
        with Pipeline(job, os.environ) as pipeline:
            for stage in ("questions", "rationales", "judge"):
                getattr(pipeline, stage)()
        export(job.folder)
        assert set(server.served.values()) == {1}


def run_through_kills(zygote, folder: Path, provider: str, count: int, kills: int, keys, monkeypatch) -> str:
    """Run the job to its end through kills, check all that can be counted, and return the figures."""
    names = tuple(helpers.write_images(folder / "images", count))
    helpers.write_prompts(folder / "prompts")
    spec, out, rng = helpers.MODELS[provider], folder / "out", random.Random(f"{provider} {count}")
    run_calmly(folder, names, spec, monkeypatch)
    often = share(0.2, 7, [fault for fault in Fault if fault is not Fault.TIMEOUT])

    def plan(call: Call) -> Fault | None:
        return Fault.EMPTY if hopeless(call) else often(call)

    words = ["annotate", "run", "--images", "images", "--out", "out", "--prompts", "prompts", "--questions", "1"]
    words += ["--writer", spec, "--concurrency", CONCURRENCY]
    moments = sorted(rng.sample(range(1, int(count * 4 * 1.15)), kills))
    shots: list[Snapshot] = []
    notes: list[str] = []
    start = time.monotonic()
    with Server(answer, plan, latency=0.01, retry_after=0.05, is_judge=is_judge) as server:
        environment = keys | {ADDRESS[provider]: f"{server.url}/v1" if provider == "openai" else server.url}
        for moment in moments:
            child = zygote.start(words, environment, folder)
            helpers.until(lambda at=moment, it=child: len(server.calls) >= at or it.wait(0) is not None, 300)
            time.sleep(rng.random() * 0.02)
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.stderr.read_text("utf-8")
            notes.append(child.stderr.read_text("utf-8"))
            shots.append(snapshot(out, len(server.calls), folder / "spare"))
        child = zygote.start(words, environment, folder)
        code = child.wait(600)
        notes.append(child.stderr.read_text("utf-8"))
        helpers.until(lambda: server.in_flight == 0)
        calls, served, faulted = server.calls, server.served, server.faulted
    seconds = time.monotonic() - start

    # Every request has one usable reply, or is reported.
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

    # What had a usable reply in the journal is never requested again.
    for shot in shots:
        after = {call.digest[:16] for call in calls[shot.calls :]}
        assert not after & shot.answered
    for before, later in itertools.pairwise(shots):
        assert before.answered <= later.answered

    # What is paid for twice was in flight at a kill, and is counted.
    # One that was killed before it opened the journal left what the one before had left.
    lost = set[int]().union(*(shot.sent for shot in shots))
    assert {number for number, state, _ in rows if state == "lost"} == lost
    assert not [state for _, state, _ in rows if state == "sent"]
    assert all(len(shot.sent) <= CONCURRENCY for shot in shots)
    repeated = sum(count - 1 for count in served.values())
    assert repeated <= len(lost)
    assert len(rows) - len(lost) <= len(calls) <= len(rows)
    said = [re.findall(r"(\d+) requests? w", note) for note in notes[1:]]
    told = [[str(len(shot.sent))] if shot.sent else [] for shot in shots]
    assert said[-1] == told[-1]
    assert all(numbers in ([], right) for numbers, right in zip(said, told, strict=True))
    assert not any("Traceback" in note for note in notes)

    # And the files are those of a run without kills.
    for name in FILES:
        assert (out / name).read_bytes() == (folder / "calm" / name).read_bytes(), name
    met = sum(faulted[fault] for fault in faulted if fault not in HARMLESS)
    return (
        f"{provider}: {len(answered)} requests answered, {len(lost_cause)} reported, {len(calls)} requests,"
        f" {sum(faulted.values())} faults ({met} of them harmful), {len(moments)} kills, {len(lost)} lost,"
        f" {repeated} answered twice, {seconds:.0f} s"
    )


@PROVIDERS
def test_killed_three_times(zygote, tmp_path, keys, monkeypatch, provider):
    print(run_through_kills(zygote, tmp_path, provider, 50, 3, keys, monkeypatch))


@pytest.mark.slow
@PROVIDERS
def test_killed_ten_times_with_two_thousand_requests(zygote, tmp_path, keys, monkeypatch, provider):
    print(run_through_kills(zygote, tmp_path, provider, 520, 10, keys, monkeypatch))
