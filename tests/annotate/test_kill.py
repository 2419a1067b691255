"""SIGKILL at any moment, with faults: nothing is lost, no answered request is repeated, and the files are the same.

The client is the command in a process of its own, in an ASCII locale. What happened is read from the server and from copies
of the journal made at each kill; marks in the answers tell which reply belongs to which request.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.annotate import helpers
from tests.annotate.helpers import FILES, JOURNAL, answer, marks, rows_of, stage_of
from tests.hosted.faults import Fault, share
from tests.hosted.helpers import addresses
from tests.hosted.server import Server
from tests.hosted.wires import Call

pytestmark = pytest.mark.usefixtures("keys", "sdks")
CONCURRENCY = 16


def hopeless(call: Call) -> bool:
    """Return whether a call never gets a usable reply: about one in forty."""
    return int(call.digest[:4], 16) % 41 == 0


class Snapshot(NamedTuple):
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
    try:
        rows = rows_of(spare / JOURNAL, "id, state, reply")
    except sqlite3.OperationalError:  # killed before the table was there
        return Snapshot(calls, set(), set())
    answered = set().union(*(marks(reply) for _, state, reply in rows if state == "usable"))
    return Snapshot(calls, answered, {number for number, state, _ in rows if state == "sent"})


@pytest.mark.parametrize("provider", ["openai", "gemini"])
@pytest.mark.parametrize(("count", "kills"), [(24, 3), pytest.param(520, 10, marks=pytest.mark.slow)])
def test_killed_again_and_again(zygote, tmp_path, keys, reverie, monkeypatch, provider, count, kills):
    helpers.write_images(tmp_path / "images", count)
    helpers.write_prompts(tmp_path / "prompts")
    monkeypatch.chdir(tmp_path)
    out, rng = tmp_path / "out", random.Random(f"{provider} {count}")
    words = ["annotate", "run", "--images", "images", "--prompts", "prompts", "--questions", "1"]
    words += ["--writer", helpers.MODELS[provider], "--concurrency", CONCURRENCY, "--out"]
    # The same job without a kill, and without faults but the hopeless ones.
    with Server(answer, lambda call: Fault.EMPTY if hopeless(call) else None) as server:
        for name, address in addresses(server).items():
            monkeypatch.setenv(name, address)
        reverie(*words, "calm")
        assert set(server.served.values()) == {1}
    often = share(0.2, 7)
    plan = lambda call: Fault.EMPTY if hopeless(call) else often(call)  # noqa: E731
    shots: list[Snapshot] = []
    notes: list[str] = []
    judges = lambda call: stage_of(call) == "judge"  # noqa: E731
    with Server(answer, plan, latency=0.01, retry_after=0.05, is_judge=judges) as server:
        for moment in sorted(rng.sample(range(1, int(count * 4 * 1.15)), kills)):
            child = zygote.start([*words, "out"], keys | addresses(server), tmp_path)
            helpers.until(lambda at=moment, it=child: len(server.calls) >= at or it.wait(0) is not None, 300)
            time.sleep(rng.random() * 0.02)
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.log
            notes.append(child.log)
            shots.append(snapshot(out, len(server.calls), tmp_path / "spare"))
        child = zygote.start([*words, "out"], keys | addresses(server), tmp_path)
        code = child.wait(600)
        notes.append(child.log)
        helpers.until(lambda: server.in_flight == 0)
        calls, served = server.calls, server.served

    # Every request has one usable reply, or is reported.
    rows = rows_of(out / JOURNAL, "id, state, reply")
    found = [marks(reply) for _, state, reply in rows if state == "usable"]
    assert {len(each) for each in found} == {1}
    answered = Counter(mark for each in found for mark in each)
    assert set(answered.values()) == {1}
    lost_cause = {call.digest[:16] for call in calls if hopeless(call)}
    assert set(answered) == {call.digest[:16] for call in calls} - lost_cause
    calm = rows_of(tmp_path / "calm" / JOURNAL, "reply", "state = 'usable'")
    assert set(answered) == set().union(*(marks(reply) for (reply,) in calm))
    assert code == (1 if lost_cause else 0), notes[-1]
    failed = re.findall(r"[│|] (?:questions|rationales|judge) +[│|] (\d+) +[│|] an empty reply", notes[-1])
    assert sum(map(int, failed)) == len(lost_cause)

    # What had a usable reply in the journal is never requested again.
    for shot in shots:
        assert not {call.digest[:16] for call in calls[shot.calls :]} & shot.answered
    assert all(before.answered <= later.answered for before, later in itertools.pairwise(shots))

    # What is paid for twice was in flight at a kill, and is counted.
    # One that was killed before it opened the journal left what the one before had left.
    lost = set[int]().union(*(shot.sent for shot in shots))
    assert {number for number, state, _ in rows if state == "lost"} == lost
    assert not [state for _, state, _ in rows if state == "sent"]
    assert all(len(shot.sent) <= CONCURRENCY for shot in shots)
    assert sum(count - 1 for count in served.values()) <= len(lost)
    assert len(rows) - len(lost) <= len(calls) <= len(rows)
    said = [re.findall(r"(\d+) requests? w", note) for note in notes[1:]]
    told = [[str(len(shot.sent))] if shot.sent else [] for shot in shots]
    assert said[-1] == told[-1]
    assert all(numbers in ([], right) for numbers, right in zip(said, told, strict=True))
    assert not any("Traceback" in note for note in notes)

    # And the files are those of a run without kills.
    for name in FILES:
        assert (out / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name
