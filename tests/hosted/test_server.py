"""The loopback server against the SDKs it is made for: what is sent arrives, and each fault is met as the SDK reports it."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.data.fakes import png
from tests.hosted import server as s
from tests.hosted.server import Call, Fault, Server, share

openai = pytest.importorskip("openai")
genai = pytest.importorskip("google.genai")

# google-genai derives a class from aiohttp's session where aiohttp is installed, which aiohttp discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")

PICTURE = png()
SCHEMA = {
    "type": "object",
    "properties": {"question": {"type": "string"}, "correct_answer": {"type": "boolean"}},
    "required": ["question", "correct_answer"],
    "additionalProperties": False,
}
ANSWER = json.dumps({"question": "Is the cat's tail white?", "correct_answer": True})
PATIENCE = 0.3
"""Seconds a client waits where no reply will come; elsewhere it has time, however busy the machine."""


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy of the environment stands between the SDKs and the loopback."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


def _openai_request() -> dict[str, Any]:
    picture = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    parts = [{"type": "text", "text": "Ask one."}, {"type": "image_url", "image_url": {"url": picture}}]
    return {
        "model": "gpt-4o",
        "messages": [{"role": "system", "content": "You look."}, {"role": "user", "content": parts}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "asked", "strict": True, "schema": SCHEMA}},
    }


def _gemini_request() -> dict[str, Any]:
    return {
        "model": "gemini-2.5-flash",
        "contents": ["Ask one.", genai.types.Part.from_bytes(data=PICTURE, mime_type="image/png")],
        "config": {
            "system_instruction": "You look.",
            "response_mime_type": "application/json",
            "response_json_schema": SCHEMA,
        },
    }


def _openai_options(url: str, patience: float) -> dict[str, Any]:
    return {"api_key": "a key", "base_url": f"{url}/v1", "max_retries": 0, "timeout": patience}


def _gemini_options(url: str, patience: float) -> dict[str, Any]:
    # One attempt, said aloud: with aiohttp the async client else asks again by itself after a reset.
    options = {"base_url": url, "timeout": int(patience * 1000), "retry_options": {"attempts": 1}}
    return {"api_key": "a key", "http_options": options}


def _openai(url: str, patience: float = 30.0) -> Any:
    with openai.OpenAI(**_openai_options(url, patience)) as client:
        return client.chat.completions.create(**_openai_request())


def _openai_async(url: str, patience: float = 30.0) -> Any:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(**_openai_options(url, patience)) as client:
            return await client.chat.completions.create(**_openai_request())

    return asyncio.run(ask())


def _gemini(url: str, patience: float = 30.0) -> Any:
    with genai.Client(**_gemini_options(url, patience)) as client:
        return client.models.generate_content(**_gemini_request())


def _gemini_async(url: str, patience: float = 30.0) -> Any:
    async def ask() -> Any:
        async with genai.Client(**_gemini_options(url, patience)).aio as client:
            return await client.models.generate_content(**_gemini_request())

    return asyncio.run(ask())


Ask = Callable[..., Any]
CLIENTS = {"openai": (_openai, _openai_async), "gemini": (_gemini, _gemini_async)}
EACH = pytest.mark.parametrize(
    ("provider", "ask"),
    [pytest.param(provider, ask, id=ask.__name__[1:]) for provider, asks in CLIENTS.items() for ask in asks],
)


def text_of(provider: str, reply: Any) -> str | None:
    return reply.choices[0].message.content if provider == "openai" else reply.text


def end_of(provider: str, reply: Any) -> str:
    return reply.choices[0].finish_reason if provider == "openai" else reply.candidates[0].finish_reason.name


@EACH
def test_good_call_arrives_whole(provider: str, ask: Ask):
    with Server(lambda call: ANSWER) as server:
        before = time.monotonic()
        reply = ask(server.url)
        (call,) = server.calls
        assert server.served == {call.digest: 1}
        assert server.faulted == {}
    assert text_of(provider, reply) == ANSWER
    assert (call.provider, call.text, call.images) == (provider, "You look.\nAsk one.", [PICTURE])
    assert (call.structured, call.key, call.attempt) == (True, "a key", 1)
    assert call.headers["USER-AGENT"]
    assert before < call.arrived < time.monotonic()
    asked, told = s.usage(call, ANSWER)
    if provider == "openai":
        assert (call.model, reply.model) == ("gpt-4o", "gpt-4o-2026-01-01")
        used = reply.usage
        assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (asked, told, asked + told)
    else:
        assert (call.model, reply.model_version) == ("gemini-2.5-flash", "gemini-2.5-flash-2026-01-01")
        used = reply.usage_metadata
        assert (used.prompt_token_count, used.candidates_token_count, used.total_token_count) == (
            asked,
            told,
            asked + told,
        )
    assert end_of(provider, reply) == {"openai": "stop", "gemini": "STOP"}[provider]


@EACH
def test_transport_faults_as_the_sdks_report_them(provider: str, ask: Ask):
    """Names, where httpx2, httpx and aiohttp have a class each for the same thing."""
    expected: dict[Fault, set[str]]
    if provider == "openai":
        expected = {
            Fault.RATE_LIMIT_AFTER: {"RateLimitError"},
            Fault.RATE_LIMIT: {"RateLimitError"},
            Fault.SERVER_ERROR: {"InternalServerError"},
            Fault.UNAVAILABLE: {"InternalServerError"},
            Fault.TIMEOUT: {"APITimeoutError"},
            Fault.RESET: {"APIConnectionError"},
        }
    else:
        expected = {
            Fault.RATE_LIMIT_AFTER: {"ClientError"},
            Fault.RATE_LIMIT: {"ClientError"},
            Fault.SERVER_ERROR: {"ServerError"},
            Fault.UNAVAILABLE: {"ServerError"},
            Fault.TIMEOUT: {"ReadTimeout", "TimeoutError"},
            Fault.RESET: {"ReadError", "ClientOSError"},
        }
    assert set(expected) == set(s.TRANSPORT)
    statuses = {Fault.RATE_LIMIT_AFTER: 429, Fault.RATE_LIMIT: 429, Fault.SERVER_ERROR: 500, Fault.UNAVAILABLE: 503}
    with Server(lambda call: ANSWER, lambda call: s.TRANSPORT[call.attempt - 1]) as server:
        for fault in s.TRANSPORT:
            with pytest.raises(Exception) as caught:  # noqa: PT011
                ask(server.url, PATIENCE if fault is Fault.TIMEOUT else 30.0)
            error: Any = caught.value
            assert type(error).__name__ in expected[fault]
            if fault in statuses:
                assert (error.status_code if provider == "openai" else error.code) == statuses[fault]
                after = {Fault.RATE_LIMIT_AFTER: "1"}.get(fault)
                assert error.response.headers.get("Retry-After") == after
                if provider == "gemini":
                    details = error.details["error"].get("details", [])
                    assert [d["retryDelay"] for d in details] == [f"{after}s"] * (after is not None)
        assert server.faulted == dict.fromkeys(s.TRANSPORT, 1)
        assert server.served == {}
        assert [call.attempt for call in server.calls] == [1, 2, 3, 4, 5, 6]
        assert server.in_flight == 0


@EACH
def test_replies_that_may_be_of_no_use(provider: str, ask: Ask):
    plan = iter(s.REPLY)
    with Server(lambda call: ANSWER, lambda call: next(plan), is_judge=lambda call: True) as server:
        blocked = ask(server.url)
        refused = ask(server.url)
        if provider == "openai":
            assert (text_of(provider, blocked), end_of(provider, blocked)) == (None, "content_filter")
            assert (text_of(provider, refused), end_of(provider, refused)) == (None, "stop")
            assert refused.choices[0].message.refusal
        else:
            assert (blocked.candidates, blocked.prompt_feedback.block_reason.name) == (None, "SAFETY")
            assert (refused.text, end_of(provider, refused), refused.candidates[0].content) == (None, "SAFETY", None)

        empty = ask(server.url)
        assert (text_of(provider, empty), end_of(provider, empty).lower()) == ("", "stop")
        cut = ask(server.url)
        assert text_of(provider, cut) == ANSWER[: int(0.6 * len(ANSWER))]
        assert end_of(provider, cut) == {"openai": "length", "gemini": "MAX_TOKENS"}[provider]
        assert text_of(provider, ask(server.url)) == s.NOT_SURE

        if provider == "openai":
            assert ask(server.url) == s.PAGE
        else:
            # json's own error, which is a ValueError and no APIError.
            with pytest.raises(json.JSONDecodeError):
                ask(server.url)
        assert server.faulted == dict.fromkeys(s.REPLY, 1)
        assert server.served == {}


@EACH
def test_harmless_faults_keep_the_answer(provider: str, ask: Ask):
    value = json.loads(ANSWER)
    plan = iter(s.HARMLESS)
    with Server(lambda call: ANSWER, lambda call: next(plan)) as server:
        fenced, literal, renamed = (text_of(provider, ask(server.url)) or "" for _ in s.HARMLESS)
        assert list(server.served.values()) == [3]
        assert server.faulted == dict.fromkeys(s.HARMLESS, 1)
    before, fence, rest = fenced.partition("```json\n")
    assert before.strip()
    assert fence
    assert json.loads(rest.removesuffix("```")) == value
    assert ast.literal_eval(literal) == value
    with pytest.raises(json.JSONDecodeError):
        json.loads(literal)
    assert json.loads(renamed) == {"question1": value["question"], "correct answer1": True}


def test_harmless_faults_leave_what_is_no_json_and_doubt_is_the_judges():
    plan = iter((*s.HARMLESS, Fault.UNSURE))
    with Server(lambda call: "Yes, both agree.", lambda call: next(plan), is_judge=lambda call: False) as server:
        assert [_openai(server.url).choices[0].message.content for _ in range(4)] == ["Yes, both agree."] * 4
        assert list(server.served.values()) == [4]
        assert Fault.UNSURE not in server.faulted


def calls(contents: int, attempts: int) -> list[list[Call]]:
    """Calls that differ in what a plan looks at and nothing else."""

    def call(digest: int, attempt: int) -> Call:
        return Call("openai", "m", "", [], False, "", None, {}, str(digest), attempt, 0.0)  # type: ignore[arg-type]

    return [[call(digest, attempt) for attempt in range(1, attempts + 1)] for digest in range(contents)]


def test_share_depends_on_seed_content_and_attempt_alone():
    every = calls(300, 6)
    plan, again, other = share(0.4, 7), share(0.4, 7), share(0.4, 8)
    found = [[plan(call) for call in row] for row in every]
    backwards = [[again(call) for call in row[::-1]][::-1] for row in every[::-1]][::-1]
    assert backwards == found
    assert [[other(call) for call in row] for row in every] != found
    assert max(sum(fault is not None for fault in row) for row in found) == 2
    assert 0.3 < sum(row[0] is not None for row in found) / len(found) < 0.5
    assert {fault for row in found for fault in row} == {None, *Fault}


def test_share_of_all_ends_after_at_most_faults():
    plan = share(1.0, 0, s.HARMLESS, at_most=3)
    assert {tuple(fault is not None for fault in map(plan, row)) for row in calls(5, 5)} == {
        (True, True, True, False, False)
    }
    assert {fault for row in calls(20, 3) for fault in map(plan, row)} == set(s.HARMLESS)
    assert all(share(0.0, 0)(call) is None for row in calls(5, 5) for call in row)
    with pytest.raises(ValueError, match="share"):
        share(1.5, 0)


def test_kinds_part_the_faults():
    assert (*s.TRANSPORT, *s.REPLY, *s.HARMLESS) == s.ALL == tuple(Fault)


def say(url: str, words: str) -> HTTPConnection:
    """A question asked on a connection of its own, its reply not read yet."""
    connection = HTTPConnection(url.removeprefix("http://"))
    body = {"model": "m", "messages": [{"role": "user", "content": words}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    return connection


def test_in_flight_is_counted_and_never_too_high():
    """Three workers with no pause between requests: a server that counts its own sluggishness would see more than three."""
    with Server(lambda call: call.text, latency=0.005) as server, ThreadPoolExecutor(3) as pool:

        def ask(number: int) -> str:
            with closing(say(server.url, f"{number}")) as connection:
                return json.load(connection.getresponse())["choices"][0]["message"]["content"]

        assert list(pool.map(ask, range(200))) == [str(number) for number in range(200)]
        assert server.peak == 3
        assert server.in_flight == 0
        assert len(server.served) == 200
        assert [call.arrived for call in server.calls] == sorted(call.arrived for call in server.calls)


def test_client_that_has_gone_is_not_in_flight():
    """Though the server still thinks about its answer."""
    think = threading.Event()
    with Server(lambda call: "Yes." if think.wait(30) else "") as server:
        for number in (1, 2):
            with closing(say(server.url, "Are you there?")):
                while len(server.calls) < number:
                    time.sleep(0.01)
                assert server.in_flight == 1
            assert server.in_flight == 0
        assert server.peak == 1
        think.set()
    assert server.served == {}


def test_killed_client_leaves_no_trace(capfd):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Still there?"}]})
    script = (
        "import sys, urllib.request as r\n"
        "print(r.urlopen(r.Request(sys.argv[1], sys.argv[2].encode(), {'Authorization': 'Bearer k'})).status)"
    )
    with Server(lambda call: "Yes.", latency=30.0) as server:

        def start() -> subprocess.Popen[str]:
            command = [sys.executable, "-S", "-c", script, f"{server.url}/v1/chat/completions", body]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        with start() as child:
            while not server.calls and child.poll() is None:
                time.sleep(0.01)
            assert (server.in_flight, server.peak) == (1, 1)
            child.kill()
        server.latency = 0.0
        with start() as child:
            assert child.communicate()[0] == "200\n"
        assert [call.attempt for call in server.calls] == [1, 2]
        assert list(server.served.values()) == [1]
        assert (server.in_flight, server.peak) == (0, 1)
    assert capfd.readouterr().err == ""


def test_failing_callback_ends_the_block():
    def answer(call: Call) -> str:
        raise LookupError("no such question")

    def ask_in_vain() -> None:
        with Server(answer) as server, pytest.raises(openai.BadRequestError, match="no such question"):
            _openai(server.url)

    with pytest.raises(LookupError, match="no such question"):
        ask_in_vain()


def test_what_cannot_be_read_is_refused():
    with Server(lambda call: "") as server:
        with openai.OpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="stream"):
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], stream=True)
            with pytest.raises(openai.NotFoundError, match="responses"):
                client.responses.create(model="m", input="?")
        assert server.calls == []
