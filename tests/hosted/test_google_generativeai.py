"""Google's deprecated SDK against the loopback server: `make test-old-sdk` runs it, in an environment of its own."""

import pytest

from reverie_jax.hosted.throttle import Limits
from tests.hosted.faults import Fault, share
from tests.hosted.helpers import JOURNAL, SECRETS, make_task, reply_to, rows_of, send
from tests.hosted.server import Server

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]


@pytest.fixture(autouse=True)
def _sdk():
    pytest.importorskip("google.generativeai", reason="google-generativeai needs an environment of its own")


def ask(server, out, limits=Limits(backoff=0.01, max_backoff=0.1), **settings):  # noqa: B008
    spec = f"google-generativeai:m@{server.url}"
    return send(out, [make_task(number, spec) for number in range(24)], [spec], limits, **settings)


def test_every_fault_is_survived(tmp_path):
    """Every request gets its reply, a further run sends nothing, and the key is in no file."""
    with Server(reply_to, share(0.4, 5), retry_after=0.01, is_judge=lambda call: True) as server:
        outcome, replies = ask(server, tmp_path / "out")
        assert (outcome.usable, outcome.failed) == (24, {})
        assert all(reply and " says: " in reply for reply in replies.values())
        assert len(server.faulted) > 8
        count = len(server.calls)
        assert ask(server, tmp_path / "out")[0].cached == 24
        assert len(server.calls) == count
    assert min(tokens for (tokens,) in rows_of(tmp_path / "out" / JOURNAL, "tokens_in", "state = 'usable'")) > 0
    for file in (tmp_path / "out").iterdir():
        assert SECRETS["GEMINI_API_KEY"].encode() not in file.read_bytes(), file


def test_a_request_without_a_reply_times_out(tmp_path):
    with Server(reply_to, lambda call: Fault.TIMEOUT) as server:
        outcome, _ = ask(server, tmp_path / "out", Limits(max_retries=0, concurrency=24), timeout=0.2)
    assert {"0.2 s" in reason for reason in outcome.failed.values()} == {True}
