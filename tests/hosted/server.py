"""A loopback server that speaks the wire formats of hosted models, so that the real SDKs run against it unchanged.

It answers as OpenAI's chat completions and Gemini's generateContent do, and misbehaves where a plan says so. It keeps count
of what arrived, what it answered and how many requests it held at once: a test asks the server, never the client it tests.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import Any, ClassVar, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

NOT_SURE = "Not sure, the analyses differ."
RENAMED = {"question": "question1", "correct_answer": "correct answer1"}
"""What the keys of a JSON answer become under `Fault.WRONG_KEYS`."""


class Kind(Enum):
    """What a fault asks of the one who meets it."""

    TRANSPORT = "no reply came: ask again after a pause"
    REPLY = "a reply came, and it may be of no use"
    HARMLESS = "the whole answer came, in an odd dress: a tolerant reader can use it"


class Fault(Enum):
    """What can go wrong with a request, in words, and of which kind it is."""

    RATE_LIMIT_AFTER = ("429 that says when to come back", Kind.TRANSPORT)
    RATE_LIMIT = ("429 that does not", Kind.TRANSPORT)
    SERVER_ERROR = ("500", Kind.TRANSPORT)
    UNAVAILABLE = ("503", Kind.TRANSPORT)
    TIMEOUT = ("the request is taken and never answered", Kind.TRANSPORT)
    RESET = ("the connection is reset before a byte came", Kind.TRANSPORT)
    BLOCKED = ("a filter withholds the answer; Gemini gives no candidate", Kind.REPLY)
    REFUSED = ("OpenAI gives a refusal, Gemini a candidate of finish reason SAFETY without content", Kind.REPLY)
    EMPTY = ("an answer of no text", Kind.REPLY)
    TRUNCATED = ("the first 60 % of the answer, at the token limit", Kind.REPLY)
    UNSURE = ("a judge who cannot tell; only where `is_judge` says so", Kind.REPLY)
    WEB_PAGE = ("an HTML error page of status 200", Kind.REPLY)
    FENCED = ("a JSON answer in a Markdown fence, after a sentence", Kind.HARMLESS)
    PYTHON_LITERAL = ("a JSON answer as a Python literal", Kind.HARMLESS)
    WRONG_KEYS = ("a JSON answer with misspelt keys", Kind.HARMLESS)

    def __init__(self, words: str, kind: Kind) -> None:
        self.words, self.kind = words, kind


ALL = tuple(Fault)
TRANSPORT, REPLY, HARMLESS = (tuple(f for f in Fault if f.kind is kind) for kind in Kind)


@dataclass(frozen=True)
class Call:
    """A request as it arrived.

    Attributes:
        provider: "openai" or "gemini".
        text: All text parts of the request, the system's first, joined with newlines.
        images: The pictures as they were sent, decoded from base64.
        structured: Whether the answer was asked for by a JSON schema.
        key: The API key of the header or the query.
        headers: Of the request; names are found whatever their case.
        body: The whole request, for what is not spelt out above.
        digest: Names the content: provider, model, text, images, structured. Temperature and seed are no part of it, so one
            who asks the same again in another mood is still seen to ask again.
        attempt: How often this content has arrived, this time included.
        arrived: When the last byte of the request was read, by `time.monotonic`.
    """

    provider: str
    model: str
    text: str
    images: list[bytes]
    structured: bool
    key: str
    headers: Message
    body: dict[str, Any]
    digest: str
    attempt: int
    arrived: float


Plan = Callable[[Call], Fault | None]


def share(fraction: float, seed: int, kinds: Sequence[Fault] = ALL, at_most: int = 2) -> Plan:
    """A plan by which that share of requests goes wrong, but no content more than `at_most` times.

    What happens depends on the seed, the content and the attempt alone: neither the order in which requests arrive nor a
    restart changes it.
    """
    if not 0 <= fraction <= 1 or not kinds:
        raise ValueError(f"a share lies in [0, 1] and has kinds of fault to choose from: {fraction}, {kinds}")

    def drawn(digest: str, attempt: int) -> Fault | None:
        lot = random.Random(f"{seed} {digest} {attempt}")
        return kinds[int(lot.random() * len(kinds))] if lot.random() < fraction else None

    def plan(call: Call) -> Fault | None:
        before = sum(drawn(call.digest, attempt) is not None for attempt in range(1, call.attempt))
        return drawn(call.digest, call.attempt) if before < at_most else None

    return plan


def version(model: str) -> str:
    """The dated name by which a reply says which model it came from."""
    return f"{model}-2026-01-01"


def usage(call: Call, text: str) -> tuple[int, int]:
    """Tokens of the request and of the reply: a word is one, a picture a hundred."""
    return len(call.text.split()) + 100 * len(call.images), len(text.split())


class Server:
    """The server, running in threads of this process from `with` to the end of the block.

    A call for which `answer`, `faults` or `is_judge` raises is answered with status 400, and the block ends with that error.

    Args:
        answer: The text of a good reply.
        faults: What goes wrong with a call; None is nothing, always or this time.
        latency: Seconds from a request to its reply.
        hold: Seconds until the server hangs up under `Fault.TIMEOUT`; longer than the client's patience.
        retry_after: Seconds that `Fault.RATE_LIMIT_AFTER` asks for.
        is_judge: Which calls can be answered with `Fault.UNSURE`; the others get the good answer.

    Attributes:
        url: Of the server, without a version: OpenAI's base URL is `url + "/v1"`, Gemini's is `url`.
        peak: The most requests ever in flight at once, never more than the clients had.
    """

    def __init__(
        self,
        answer: Callable[[Call], str],
        faults: Plan | None = None,
        latency: float = 0.0,
        *,
        hold: float = 5.0,
        retry_after: float = 1.0,
        is_judge: Callable[[Call], bool] | None = None,
    ) -> None:
        self.answer, self.faults, self.is_judge = answer, faults, is_judge
        self.latency, self.hold, self.retry_after = latency, hold, retry_after
        self.url, self.peak = "", 0
        self._lock = threading.Condition()
        self._calls: list[Call] = []
        self._attempts: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._faulted: Counter[Fault] = Counter()
        self._connections: set[socket.socket] = set()
        self._task: set[socket.socket] = set()
        self._failures: list[Exception] = []

    @property
    def calls(self) -> list[Call]:
        """Every request so far, in order of arrival."""
        with self._lock:
            return list(self._calls)

    @property
    def served(self) -> Counter[str]:
        """How often each content got its whole answer, harmless faults included, from a client that was still there."""
        with self._lock:
            return +self._served

    @property
    def faulted(self) -> Counter[Fault]:
        """How often each fault was really met."""
        with self._lock:
            return +self._faulted

    @property
    def in_flight(self) -> int:
        """Requests that wait for a reply now; one whose client has gone waits no more."""
        with self._lock:
            return sum(not _gone(connection) for connection in self._task)

    def __enter__(self) -> Server:
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.owner = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._lock.wait_for(lambda: not self._connections, timeout=5)
        if self._failures and error is None:
            raise self._failures[0]
        if self._failures and error is not None:
            error.add_note(f"In the server: {self._failures[0]!r}")

    def _connected(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def _disconnected(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)
            self._lock.notify_all()

    def _arrives(self, request: Request, headers: Message, connection: socket.socket) -> Call:
        pictures = [hashlib.sha256(image).hexdigest() for image in request.images]
        content = [request.provider, request.model, request.text, pictures, request.structured]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        with self._lock:
            self._attempts[digest] += 1
            call = Call(
                **vars(request),
                headers=headers,
                digest=digest,
                attempt=self._attempts[digest],
                arrived=time.monotonic(),
            )
            self._calls.append(call)
            self._task.add(connection)
            self.peak = max(self.peak, self.in_flight)
        return call

    def _leaves(self, connection: socket.socket) -> None:
        with self._lock:
            self._task.discard(connection)

    def _planned(self, call: Call) -> Fault | None:
        fault = self.faults(call) if self.faults else None
        if fault is Fault.UNSURE and not (self.is_judge and self.is_judge(call)):
            fault = None
        return fault

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._failures.append(error)

    def _count(self, call: Call, fault: Fault | None, by: int = 1) -> None:
        with self._lock:
            if fault is not None:
                self._faulted[fault] += by
            if fault is None or fault.kind is Kind.HARMLESS:
                self._served[call.digest] += by


@dataclass
class Request:
    """What a wire format says, before the server has numbered it."""

    provider: str
    model: str
    text: str
    images: list[bytes]
    structured: bool
    key: str
    body: dict[str, Any]


class End(Enum):
    """How a reply ends."""

    DONE = "done"
    LENGTH = "length"
    BLOCKED = "blocked"
    REFUSED = "refused"


class Wire(Protocol):
    """A hosted model's wire format: requests are read, replies and errors are written."""

    def read(self, path: str, query: dict[str, list[str]], headers: Message, body: dict[str, Any]) -> Request: ...

    def reply(self, call: Call, text: str, end: End) -> dict[str, Any]: ...

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]: ...


class OpenAI:
    """Chat completions, all in one piece."""

    path = re.compile(r"/v1/chat/completions")
    ends: ClassVar = {End.DONE: "stop", End.LENGTH: "length", End.BLOCKED: "content_filter", End.REFUSED: "stop"}

    def read(self, path: str, query: dict[str, list[str]], headers: Message, body: dict[str, Any]) -> Request:
        if body.get("stream"):
            raise ValueError("this server does not stream")
        texts, images = [], []
        for message in body["messages"]:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
                if part["type"] == "text":
                    texts.append(part["text"])
                elif part["type"] == "image_url":
                    head, _, data = part["image_url"]["url"].partition(";base64,")
                    if not head.startswith("data:image/"):
                        raise ValueError("a picture is a data URI here")
                    images.append(_bytes(data))
                else:
                    raise ValueError(f"a part of type {part['type']}")
        return Request(
            provider="openai",
            model=body["model"],
            text="\n".join(texts),
            images=images,
            structured=(body.get("response_format") or {}).get("type") == "json_schema",
            key=headers.get("Authorization", "").removeprefix("Bearer "),
            body=body,
        )

    def reply(self, call: Call, text: str, end: End) -> dict[str, Any]:
        asked, told = usage(call, text)
        return {
            "id": f"chatcmpl-{call.digest[:20]}-{call.attempt}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": version(call.model),
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": None if end in (End.BLOCKED, End.REFUSED) else text,
                        "refusal": "I cannot help with that." if end is End.REFUSED else None,
                    },
                    "logprobs": None,
                    "finish_reason": self.ends[end],
                }
            ],
            "usage": {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told},
        }

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]:
        kinds = {
            429: ("requests", "rate_limit_exceeded"),
            500: ("server_error", None),
            503: ("service_unavailable", None),
        }
        kind, code = kinds.get(status, ("invalid_request_error", None))
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Gemini:
    """generateContent, all in one piece, as google-genai and google-generativeai over REST ask for it."""

    path = re.compile(r"/v\d\w*/models/([^/:]+):generateContent")
    ends: ClassVar = {End.DONE: "STOP", End.LENGTH: "MAX_TOKENS", End.REFUSED: "SAFETY"}
    statuses: ClassVar = {
        400: "INVALID_ARGUMENT",
        404: "NOT_FOUND",
        429: "RESOURCE_EXHAUSTED",
        500: "INTERNAL",
        503: "UNAVAILABLE",
    }

    def read(self, path: str, query: dict[str, list[str]], headers: Message, body: dict[str, Any]) -> Request:
        said = [body["systemInstruction"]] if "systemInstruction" in body else []
        texts, images = [], []
        for content in [*said, *body["contents"]]:
            for part in content["parts"]:
                if "text" in part:
                    texts.append(part["text"])
                elif "inlineData" in part:
                    images.append(_bytes(part["inlineData"]["data"]))
                else:
                    raise ValueError(f"a part of {sorted(part)}")
        settings = body.get("generationConfig", {})
        structured = "responseSchema" in settings or "responseJsonSchema" in settings
        if structured and settings.get("responseMimeType") != "application/json":
            raise ValueError("a schema goes with responseMimeType application/json")
        found = self.path.fullmatch(path)
        assert found
        return Request(
            provider="gemini",
            model=unquote(found[1]),
            text="\n".join(texts),
            images=images,
            structured=structured,
            key=headers.get("x-goog-api-key") or query.get("key", [""])[0],
            body=body,
        )

    def reply(self, call: Call, text: str, end: End) -> dict[str, Any]:
        asked, told = usage(call, text)
        candidate = {"finishReason": self.ends[end], "index": 0} if end is not End.BLOCKED else {}
        if end in (End.DONE, End.LENGTH):
            candidate["content"] = {"parts": [{"text": text}], "role": "model"}
        return {
            **({"promptFeedback": {"blockReason": "SAFETY"}} if end is End.BLOCKED else {"candidates": [candidate]}),
            "usageMetadata": {"promptTokenCount": asked, "candidatesTokenCount": told, "totalTokenCount": asked + told},
            "modelVersion": version(call.model),
            "responseId": f"{call.digest[:20]}-{call.attempt}",
        }

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]:
        error: dict[str, Any] = {"code": status, "message": message, "status": self.statuses[status]}
        if retry_after is not None:
            delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{retry_after:g}s"}
            error["details"] = [delay]
        return {"error": error}


WIRES = (OpenAI(), Gemini())
STATUS = {Fault.RATE_LIMIT_AFTER: 429, Fault.RATE_LIMIT: 429, Fault.SERVER_ERROR: 500, Fault.UNAVAILABLE: 503}
PAGE = "<!DOCTYPE html>\n<html><head><title>Error</title></head><body><h1>Something went wrong</h1></body></html>\n"


def _bytes(data: str) -> bytes:
    """Base64 of either alphabet: google-genai writes the one for URLs, the others the common one."""
    return base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)


def _dressed(text: str, fault: Fault | None) -> str:
    """A JSON answer as the harmless faults deliver it; any other answer as it is."""
    if fault is None or fault.kind is not Kind.HARMLESS:
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    if fault is Fault.FENCED:
        return f"Here is the answer you asked for:\n\n```json\n{text}\n```"
    if fault is Fault.PYTHON_LITERAL:
        return repr(value)
    return json.dumps(_renamed(value))


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def _ended(text: str, fault: Fault | None) -> tuple[str, End]:
    """What a reply says under a fault, and how it ends."""
    if fault is Fault.BLOCKED:
        return "", End.BLOCKED
    if fault is Fault.REFUSED:
        return "", End.REFUSED
    if fault is Fault.EMPTY:
        return "", End.DONE
    if fault is Fault.TRUNCATED:
        return text[: len(text) * 6 // 10], End.LENGTH
    if fault is Fault.UNSURE:
        return NOT_SURE, End.DONE
    return _dressed(text, fault), End.DONE


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has closed or reset the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Listener(ThreadingHTTPServer):
    owner: Server
    daemon_threads = True
    request_queue_size = 256

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for the host's name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is the test's to see."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.owner._failed(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one piece

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.server.owner._connected(self.connection)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.owner._disconnected(self.connection)

    def do_POST(self) -> None:
        owner = self.server.owner
        size = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(size)
        if len(raw) < size:
            self.close_connection = True
            return
        address = urlsplit(self.path)
        wire = next((wire for wire in WIRES if wire.path.fullmatch(address.path)), None)
        if wire is None:
            wire = WIRES[1] if "/models/" in address.path else WIRES[0]
            self.send_json(404, wire.error(404, f"no {address.path} here", None))
            return
        try:
            request = wire.read(address.path, parse_qs(address.query), self.headers, json.loads(raw))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.send_json(400, wire.error(400, f"the request cannot be read: {error!r}", None))
            return
        call = owner._arrives(request, self.headers, self.connection)
        try:
            self.respond(wire, call)
        finally:
            owner._leaves(self.connection)

    def respond(self, wire: Wire, call: Call) -> None:
        owner = self.server.owner
        try:
            fault = owner._planned(call)
            text = "" if fault and fault.kind is Kind.TRANSPORT else owner.answer(call)
        except Exception as error:
            owner._failed(error)
            self.send_json(400, wire.error(400, f"the test's own callback failed: {error!r}", None))
            return
        if not self.stays(owner.hold if fault is Fault.TIMEOUT else owner.latency) and fault is not Fault.TIMEOUT:
            self.close_connection = True
            return
        # Counted before the reply leaves: one who has read it finds it counted. Taken back if it could not be delivered.
        owner._count(call, fault)
        try:
            if fault is Fault.TIMEOUT:
                self.close_connection = True
            elif fault is Fault.RESET:
                self.reset()
            elif fault in STATUS:
                after = owner.retry_after if fault is Fault.RATE_LIMIT_AFTER else None
                headers = {} if after is None else {"Retry-After": f"{after:g}"}
                self.send_json(STATUS[fault], wire.error(STATUS[fault], fault.words, after), headers)
            elif fault is Fault.WEB_PAGE:
                self.send(200, PAGE.encode(), "text/html; charset=utf-8")
            else:
                self.send_json(200, wire.reply(call, *_ended(text, fault)))
        except OSError:
            owner._count(call, fault, by=-1)
            self.close_connection = True

    def stays(self, seconds: float) -> bool:
        """Whether the client is still there after so long; ends at once when it goes.

        A client has nothing to say while it waits, so a connection that can be read from has been closed.
        """
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return not poll.poll(seconds * 1000)

    def send_json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json; charset=utf-8", headers)

    def send(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        # Before the reply is out: else its reader could send the next request while this one still counts as in flight.
        self.server.owner._leaves(self.connection)
        self.wfile.flush()

    def reset(self) -> None:
        self.server.owner._leaves(self.connection)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # By its number: `close` would wait for the files made of the socket, and the base class first says goodbye.
        socket.close(self.connection.detach())
