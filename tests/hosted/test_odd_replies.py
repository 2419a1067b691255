"""What services send that is odd: what is usable is used, and no paid reply is lost; every reply and failure in one run."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    RefusedError,
    Reply,
    RequestSettings,
    RetryableError,
    UnusableError,
)
from reverie_jax.hosted.providers import open_provider
from reverie_jax.hosted.providers.common import parse_result_lines
from reverie_jax.hosted.providers.failures import find_words, read_reply, sort_failure
from reverie_jax.hosted.throttle import Limits
from tests.hosted import helpers
from tests.hosted.helpers import Memory, make_task, reply_to, send
from tests.hosted.server import Server
from tests.hosted.test_failures import FAILURES, RUN, tries_of
from tests.hosted.test_providers import ANSWER, ask

pytestmark = pytest.mark.usefixtures("keys", "sdks")


def completion(message: Any, usage: Any = None, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop"} | choice], "usage": usage, "model": "m-1"}


def candidate(parts: Any, usage: Any = None, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"} | more], "usageMetadata": usage}


COUNTED = {"prompt_tokens": 3, "completion_tokens": 2}
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Let me look."}]}
ODD: list[tuple[str, Any, tuple[int, int, bool]]] = [
    ("openai", completion({"content": "yes"}), (0, 0, False)),
    ("openai", completion({"content": "yes"}, {}), (0, 0, False)),
    ("openai", completion({"content": "yes"}, []), (0, 0, False)),
    ("openai", completion({"content": "yes"}, {"prompt_tokens": 3, "completion_tokens": None}), (3, 0, False)),
    ("openai", completion({"content": "yes"}, {"input_tokens": "3", "output_tokens": 2.0}), (3, 2, True)),
    ("openai", completion({"content": "yes"}, {"prompt_tokens": -1, "completion_tokens": True}), (0, 0, False)),
    ("openai", completion({"content": [THOUGHT, {"type": "text", "text": "yes"}]}, COUNTED), (3, 2, True)),
    ("openai", completion({"content": ["y", {"type": "output_text", "text": "es"}, None]}, COUNTED), (3, 2, True)),
    ("openai", completion({"content": "yes", "reasoning_content": "Hm."}, COUNTED), (3, 2, True)),
    ("openai", completion(None, COUNTED, text="yes"), (3, 2, True)),
    ("openai", completion({"content": [{"type": "text", "text": {"value": "yes"}}]}, COUNTED), (3, 2, True)),
    (
        "openai",
        completion({"content": [{"text": "Hm.", "thought": True}, {"text": "yes"}]}, COUNTED),
        (3, 2, True),
    ),
    ("openai", {"choices": [{"message": {"content": None}}, {"message": {"content": "yes"}}]}, (0, 0, False)),
    ("openai", {"message": {"role": "assistant", "content": "yes"}, "done": True}, (0, 0, False)),
    ("gemini", {"candidates": [{"content": {}}, {"content": {"parts": [{"text": "yes"}]}}]}, (0, 0, False)),
    ("openai", completion({"content": "yes"}, COUNTED, finish_reason=None), (3, 2, True)),
    ("openai", {**completion({"content": "yes"}, COUNTED), "error": None, "model": None, "id": 7}, (3, 2, True)),
    ("gemini", candidate([{"text": "yes"}]), (0, 0, False)),
    ("gemini", candidate([{"text": "yes"}], {"promptTokenCount": 3}), (3, 0, False)),
    (
        "gemini",
        candidate(
            [{"text": "Hm.", "thought": True}, {"text": "y"}, {"inlineData": {}}, None, {"text": "es"}],
            {"promptTokenCount": 3, "candidatesTokenCount": 2, "thoughtsTokenCount": 5},
        ),
        (3, 7, True),
    ),
    ("gemini", candidate([{"text": "yes"}], COUNTED, finishReason=None, safetyRatings="none"), (0, 0, False)),
]


@pytest.mark.parametrize(("provider", "body", "counts"), ODD)
def test_odd_replies_are_read(provider, body, counts, tmp_path):
    """Directly, and as a batch's line; counts that are missing are 0, and said to be missing."""
    with Server(lambda call: ANSWER, lambda call: (200, body)) as server:
        reply = ask(server, provider)
    assert (reply.text, reply.tokens_in, reply.tokens_out, reply.counted) == ("yes", *counts)
    row = {"custom_id": "k", "response": {"status_code": 200, "body": body}}
    if provider == "gemini":
        row = {"key": "k", "response": body}
    opened = open_provider(f"{provider}:m", RequestSettings(), helpers.SECRETS)
    assert parse_result_lines(json.dumps(row).encode(), next(iter(row)), opened._parse_result, "secret") == [
        ("k", reply)
    ]


UNUSABLE: list[tuple[str, Any, type[AnnotationError], str]] = [
    ("openai", completion({"content": ""}, COUNTED, finish_reason="length"), RefusedError, "--max-new-tokens"),
    ("openai", completion({"content": None}, COUNTED, finish_reason="content_filter"), UnusableError, "blocked"),
    ("openai", completion({"content": None, "refusal": "No."}, COUNTED), UnusableError, "No."),
    ("openai", completion({"content": None}, COUNTED), UnusableError, "empty"),
    ("openai", completion(None, COUNTED), UnusableError, "empty"),
    ("openai", completion({"content": {"a": 1}}, COUNTED), UnusableError, "empty"),
    ("openai", completion({"content": None}, COUNTED, finish_reason="tool_calls"), UnusableError, "tool_calls"),
    ("openai", completion({"content": None, "reasoning_content": "Hm."}, COUNTED), UnusableError, "^thoughts without"),
    ("openai", completion({"content": [THOUGHT]}, COUNTED), UnusableError, "^thoughts without"),
    ("openai", completion({"content": "ye"}, COUNTED, finish_reason="abort"), RetryableError, "broke off"),
    ("openai", completion({"content": "ye"}, COUNTED, finish_reason="model_length"), RefusedError, "cut off"),
    ("openai", completion({"content": "ye"}, COUNTED, finish_reason="sensitive"), UnusableError, "blocked"),
    ("gemini", candidate([{"text": "Hm.", "thought": True}]), UnusableError, "^thoughts without"),
    ("gemini", candidate([], finishReason="SAFETY", finishMessage="Violence."), UnusableError, "SAFETY: Violence"),
    ("openai", completion({"content": "ye"}, COUNTED, error={"code": 502, "message": "Gone."}), RetryableError, "Gone"),
    ("gemini", candidate([], finishReason="MAX_TOKENS"), RefusedError, "--max-new-tokens"),
    ("gemini", candidate(None, finishReason="SAFETY"), UnusableError, "SAFETY"),
    ("gemini", candidate([{"text": "y"}], finishReason="NEW_REASON"), UnusableError, "NEW_REASON"),
    ("gemini", {"promptFeedback": {"blockReason": "OTHER"}}, RefusedError, "OTHER"),
    ("gemini", {"candidates": [None]}, UnusableError, "empty"),
    ("gemini", {}, UnusableError, "empty"),
]


@pytest.mark.parametrize(("provider", "body", "kind", "words"), UNUSABLE)
def test_unusable_replies_are_kept(provider, body, kind, words):
    """And their tokens; a length that thoughts used up names the option."""
    with Server(lambda call: ANSWER, lambda call: (200, body)) as server, pytest.raises(kind, match=words) as caught:
        ask(server, provider, max_new_tokens=7)
    assert type(caught.value) is kind
    assert caught.value.reply is not None
    assert caught.value.reply.text.strip()
    if provider == "openai":
        assert caught.value.reply.tokens_in == 3


def test_a_byte_order_mark_before_a_reply_and_a_wait_for_ever():
    odd = b"\xef\xbb\xbf" + json.dumps({**ODD[0][1], "id": "#"}).replace("#", "a\nb\tc").encode()  # and raw line breaks
    with Server(lambda call: ANSWER, lambda call: (200, odd)) as server:
        assert ask(server, "openai").text == "yes"
    with pytest.raises(AccessError, match=r"busy; .*for ever"):
        raise sort_failure(503, {"error": "busy"}, "source", "", float("inf"))


def test_what_a_parser_cannot_read_is_kept():
    """Without the key."""
    with pytest.raises(RefusedError, match="ZeroDivisionError") as caught:
        read_reply('{"key": "SECRET-KEY-123"}', lambda body: 1 / 0, "SECRET-KEY-123")
    assert caught.value.reply == Reply('{"key": "***"}', counted=False)


# All of them in one run.


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_a_run_survives_every_reply(provider, tmp_path):
    """Hopeless requests are sent once, and whatever came with status 200 is in the journal."""
    cases = [(200, body, 1) for name, body, _ in ODD if name == provider]
    cases += [(200, body, tries_of(kind, words)) for name, body, kind, words in UNUSABLE if name == provider]
    cases += [
        (code, body, tries_of(kind, words))
        for name, code, body, kind, words in FAILURES
        if name == provider and kind is not RUN
    ]
    number = lambda call: int(call.text.split()[1].rstrip("?"))  # noqa: E731
    limits = Limits(max_retries=2, max_unusable=2, backoff=0.001, max_backoff=0.001)
    with Server(lambda call: ANSWER, lambda call: cases[number(call)][:2]) as server:
        spec = helpers.spec_of(server, provider)
        tasks = [dataclasses.replace(make_task(n, spec), parse_reply=str) for n in range(len(cases))]
        outcome, replies = send(tmp_path, tasks, [spec], limits)
        assert Counter(map(number, server.calls)) == {n: tries for n, (_, _, tries) in enumerate(cases)}
    assert (outcome.stopped, outcome.requested) == ("", len(cases))
    assert outcome.uncounted > 0
    assert list(replies.values()).count("yes") == outcome.usable == sum(name == provider for name, *_ in ODD)
    kept = [body for code, body, tries in cases for _ in range(tries) if code == 200]
    assert len(helpers.rows_of(tmp_path / helpers.JOURNAL, "id", "reply NOT NULL")) == len(kept)


# Any reply.

KEYS = [
    "error",
    "errors",
    "message",
    "detail",
    "code",
    "status",
    "type",
    "choices",
    "content",
    "text",
    "parts",
    "usage",
]
KEYS += ["response", "body", "status_code", "custom_id", "key", "candidates", "finishReason", "usageMetadata"]
TEXTS = ["", "yes", "\ud83d", "length", "402", "quota per day", "flagged", "<html>", "MAX_TOKENS", "SECRET-KEY-123"]
leaves = st.none() | st.booleans() | st.sampled_from([0, 200, 429, -1, 0.5, float("inf"), *TEXTS])
bodies = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@given(st.sampled_from(["openai", "gemini"]), st.sampled_from([None, 200, 301, 400, 403, 429, 500]), bodies)
def test_any_body_is_a_reply_or_a_sorted_failure(provider, status, body):
    """No other exception; what a 200 holds is kept; no message holds the key."""
    opened = open_provider(f"{provider}:m", RequestSettings(), helpers.SECRETS | {"OPENAI_API_KEY": "SECRET-KEY-123"})
    raw = json.dumps(body)
    try:
        kept: Reply | None = read_reply(raw, opened._parse, "SECRET-KEY-123")
    except AnnotationError as error:
        kept = error.reply
    assert isinstance(kept, Reply)
    failure = sort_failure(status, body, "source", "SECRET-KEY-123", sent="temperature response_format")
    assert "SECRET-KEY-123" not in str(failure)
    assert "\n" not in find_words(body)
    rows = [{"custom_id": "k", "response": body}, {"key": "k", "response": body}, {"key": "k", "custom_id": "k"}]
    name = "custom_id" if provider == "openai" else "key"
    content = "\n".join(map(json.dumps, [*rows, body])).encode()
    results = parse_result_lines(content, name, opened._parse_result, "SECRET-KEY-123")
    assert [key for key, _ in results][:2] == ["k", "k"]
    assert all(isinstance(result, Reply) or result.reply is not None for _, result in results)


@given(st.integers(0, 10**6))
def test_hopeless_requests_are_sent_once(seed):
    """Whatever comes before or between: a usable or a hopeless reply is the last one, an access error ends the run."""
    rng = random.Random(seed)
    ends = {"usable": None, "item": RefusedError("flagged"), "run": AccessError("no credit")}
    again = {"minute": RetryableError("503"), "unusable": UnusableError("empty", Reply(""))}
    again["half"] = RetryableError("broke off", charged=True)
    plan = {n: [rng.choice([*ends, *again, *again]) for _ in range(12)] for n in range(4)}

    def fault(call: Any) -> Any:
        return (ends | again)[plan[int(call.text.split()[1].rstrip("?"))][call.attempt - 1]]

    limits = Limits(concurrency=2, max_unusable=3, max_retries=3, backoff=0.0, max_backoff=0.0)
    with tempfile.TemporaryDirectory() as folder, Memory(reply_to, fault) as server:
        tasks = [make_task(number, "openai:tiny") for number in range(4)]
        try:
            outcome, _ = send(Path(folder), tasks, ["openai:tiny"], limits)
        except UserError:  # no credit
            outcome = None
        sent = Counter(int(call.text.split()[1].rstrip("?")) for call in server.calls)
    for number, count in sent.items():
        done = plan[number][:count]
        assert not set(done[:-1]) & set(ends)
        assert done.count("unusable") + done.count("half") <= 3
        assert done.count("minute") <= 4
    if outcome is not None and not outcome.stopped:
        assert outcome.usable == sum(plan[number][count - 1] == "usable" for number, count in sent.items())
        assert len(outcome.failed) == 4 - outcome.usable
