"""Batches in processes of their own: Ctrl-C and SIGKILL at every moment; nothing is submitted twice."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.hosted import helpers
from tests.hosted.faults import LINES, Fault, Step, Trouble, share
from tests.hosted.fixtures import IMAGES
from tests.hosted.helpers import JOURNAL, rows_of, states
from tests.hosted.server import Server
from tests.hosted.test_batches import PROVIDERS, check_once
from tests.hosted.wires import Call

pytestmark = pytest.mark.usefixtures("keys", "sdks")
MOMENTS = [  # in which a run is stopped: it hangs in a step, whose work is done or not
    (Step.UPLOAD, Trouble.HANG),
    (Step.CREATE, Trouble.HANG),
    (Step.CREATE, Trouble.HANG_DONE),
    (Step.LIST, Trouble.HANG),
    (Step.STATUS, Trouble.HANG),
    (Step.DOWNLOAD, Trouble.HANG),
]


def answer(call: Call) -> str:
    return f'{{"question": "{call.digest[:16]}?", "correct_answer": "a", "confusing_answer": "b"}}'


@pytest.fixture
def submit(begin) -> Callable[..., helpers.Child]:
    """Return a function that starts a run by batches, and waits until it hangs in a step, if one is given."""

    def start(server: Server, provider: str, moment: tuple[Step, Trouble] | None = None) -> helpers.Child:
        server.hanging.clear()
        server.trouble = moment and (lambda step, count: moment[1] if step is moment[0] else None)
        child = begin(server, provider, "--batch", "--poll", 0.05)
        assert moment is None or server.hanging.wait(120)
        return child

    return start


@pytest.mark.parametrize(("provider", "number"), [("openai", signal.SIGINT), ("gemini", signal.SIGTERM)])
def test_a_signal_leaves_the_batch_and_the_next_run_collects_it(submit, tmp_path, provider, number):
    with Server(answer, polls=10**6) as server:
        child = submit(server, provider)
        helpers.until(lambda: server.steps[Step.STATUS] >= 2)
        child.signal(number)
        assert child.wait() == 1
        assert f"{IMAGES} requests" in " ".join(child.log.split())
        assert "Traceback" not in child.log
        assert states(tmp_path / "out" / JOURNAL) == {"sent": IMAGES}
        server.polls = 1
        assert submit(server, provider).wait() == 0
        check_once(server)
        assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[2], MOMENTS[4]])
def test_a_second_signal_does_not_wait_for_a_service_that_hangs(submit, moment):
    """And the next run finds what was submitted."""
    with Server(answer) as server:
        child = submit(server, "openai", moment)
        child.signal(signal.SIGINT)
        assert child.wait(0.3) is None
        child.signal(signal.SIGINT)
        assert child.wait(60) in (1, 130)
        assert submit(server, "openai").wait() == 0
        assert set(server.submitted.values()) == {1}


@PROVIDERS
def test_killed_at_every_moment(submit, tmp_path, provider):
    """The next run continues with whatever was created; no copy of the requests stays behind."""
    lines = share(0.3, 2, (*LINES, Fault.REFUSED, Fault.SERVER_ERROR))
    with Server(answer, lines=lines, page=2) as server:
        server.add_strangers(provider, 3)
        for moment in MOMENTS:
            child = submit(server, provider, moment)
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            helpers.until(lambda: server.in_flight == 0)
        child = submit(server, provider)
        assert child.wait() == 0, child.log
        check_once(server)
    assert states(tmp_path / "out" / JOURNAL)["usable"] == IMAGES
    assert not rows_of(tmp_path / "out" / JOURNAL, "id", "state IN ('sent', 'lost')")
    assert not list(tmp_path.rglob("*.jsonl"))
