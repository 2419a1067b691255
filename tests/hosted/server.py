"""A loopback server with the APIs of OpenAI and Gemini (chat, files, batches), so that the real SDKs run against it.

It misbehaves on request and counts what arrived and what it answered: tests ask the server, never the client they test.
"""

from __future__ import annotations

import base64
import contextlib
import email
import functools
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
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NOT_SURE = "Not sure, the analyses differ."
PAGE = "<!DOCTYPE html>\n<html><head><title>Error</title></head><body><h1>Something went wrong</h1></body></html>\n"


class Kind(Enum):
    """How a client must react to a fault."""

    TRANSPORT = "no reply: retry"
    REPLY = "a reply that may be unusable"
    HARMLESS = "the whole answer in an odd form"


class Fault(Enum):
    """What goes wrong with a request."""

    RATE_LIMIT_AFTER = ("429 with Retry-After", Kind.TRANSPORT)
    RATE_LIMIT = ("429", Kind.TRANSPORT)
    SERVER_ERROR = ("500", Kind.TRANSPORT)
    UNAVAILABLE = ("503", Kind.TRANSPORT)
    TIMEOUT = ("never answered", Kind.TRANSPORT)
    RESET = ("connection reset", Kind.TRANSPORT)
    BLOCKED = ("filtered; Gemini sends no candidate", Kind.REPLY)
    REFUSED = ("OpenAI sends a refusal, Gemini finish reason SAFETY", Kind.REPLY)
    EMPTY = ("no text", Kind.REPLY)
    TRUNCATED = ("the first 60 %, at the token limit", Kind.REPLY)
    UNSURE = ("an undecided judge; only for calls that `is_judge`", Kind.REPLY)
    WEB_PAGE = ("an HTML page with status 200", Kind.REPLY)
    FENCED = ("JSON in a Markdown fence", Kind.HARMLESS)
    PYTHON_LITERAL = ("JSON as a Python literal", Kind.HARMLESS)
    WRONG_KEYS = ("JSON with misspelled keys", Kind.HARMLESS)

    def __init__(self, words: str, kind: Kind) -> None:
        self.words, self.kind = words, kind


TRANSPORT, REPLY, HARMLESS = (tuple(f for f in Fault if f.kind is kind) for kind in Kind)
STATUS = {Fault.RATE_LIMIT_AFTER: 429, Fault.RATE_LIMIT: 429, Fault.SERVER_ERROR: 500, Fault.UNAVAILABLE: 503}


class Step(Enum):
    """A request of the batch API; CHUNK is Gemini's second request of an upload."""

    UPLOAD, CHUNK, CREATE, LIST, STATUS, DOWNLOAD = range(6)


class Trouble(Enum):
    """What goes wrong with a step, besides transport faults, WEB_PAGE, and a status with a message."""

    LOST = "done, but the response is lost"
    HANG = "not done; no response until the client is gone"
    HANG_DONE = "done; no response until the client is gone"


class Line(Enum):
    """What goes wrong with a line of batch results, besides faults of a reply."""

    MISSING = "no line"
    DOUBLED = "two lines"
    BROKEN = "half a line"
    STRANGER = "a line with an unknown key before it"
    ODD = "lines without a valid key before it"
    BAD = "400"
    DENIED = "401"
    EXPIRED = "not processed within a day"


LINES = (Line.MISSING, Line.DOUBLED, Line.BROKEN, Line.STRANGER, Line.BAD)
UNANSWERED = {Line.MISSING, Line.BROKEN, Line.BAD, Line.DENIED, Line.EXPIRED}


@dataclass(frozen=True)
class Call:
    """A request as it arrived.

    Attributes:
        digest: Identifies the content: provider, model, text, images, structured.
        attempt: Which time this content arrived, from 1.
        arrived: By `time.monotonic`.
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


@dataclass
class Batch:
    """A batch that was created; `state` is its end as OpenAI spells it, `share` the part of its requests that is done."""

    name: str
    provider: str
    model: str
    label: str | None
    keys: list[str]
    calls: list[Call]
    state: str
    share: float
    created: float
    looks: int = 0
    downloads: int = 0
    replies: str | None = None
    errors: str | None = None


def share(fraction: float, seed: int, faults: Sequence[Any] = tuple(Fault), at_most: int = 2) -> Callable[[Call], Any]:
    """Return a plan by which a share of requests goes wrong, but no content more than `at_most` times.

    It is a function of seed, content and attempt alone: neither the order of requests nor a restart changes it.
    """

    def draw(digest: str, attempt: int) -> Any:
        rng = random.Random(f"{seed} {digest} {attempt}")
        return faults[int(rng.random() * len(faults))] if rng.random() < fraction else None

    def plan(call: Call) -> Any:
        before = sum(draw(call.digest, attempt) is not None for attempt in range(1, call.attempt))
        return draw(call.digest, call.attempt) if before < at_most else None

    return plan


def usage(call: Any, text: str) -> tuple[int, int]:
    """Return (input, output) tokens: a word is one, an image a hundred."""
    return len(call.text.split()) + 100 * len(call.images), len(text.split())


def content_digest(provider: str, model: str, text: str, images: Sequence[bytes], structured: bool) -> str:
    """Return the digest of a call's content."""
    content = [provider, model, text, [hashlib.sha256(image).hexdigest() for image in images], structured]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class OpenAI:
    """OpenAI's wire format."""

    name = "openai"
    path = re.compile(r"/v1/chat/completions")

    def read(self, path: str, query: dict[str, Any], headers: Message, body: dict[str, Any]) -> dict[str, Any]:
        (message,) = body["messages"]
        texts, images = [], []
        for part in message["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                images.append(_decode(part["image_url"]["url"].partition(";base64,")[2]))
        structured = body.get("response_format", {}).get("type") == "json_schema"
        key = headers.get("Authorization", "").removeprefix("Bearer ")
        content = {"provider": self.name, "model": body["model"], "text": "\n".join(texts), "images": images}
        return content | {"structured": structured, "key": key, "body": body}

    def reply(self, call: Call, text: str, fault: Fault | None) -> dict[str, Any]:
        ends = {Fault.BLOCKED: "content_filter", Fault.TRUNCATED: "length"}
        refusal = "I cannot help with that." if fault is Fault.REFUSED else None
        content = None if fault in (Fault.BLOCKED, Fault.REFUSED) else text
        message = {"role": "assistant", "content": content, "refusal": refusal}
        tokens_in, tokens_out = usage(call, text)
        return {
            "id": f"chatcmpl-{call.digest[:20]}",
            "object": "chat.completion",
            "created": 1,
            "model": f"{call.model}-2026-01-01",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": ends.get(fault, "stop")}],
            "usage": {
                "prompt_tokens": tokens_in,
                "completion_tokens": tokens_out,
                "total_tokens": tokens_in + tokens_out,
            },
        }

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]:
        return {"error": {"message": message, "type": "error", "param": None, "code": None}}

    def show(self, batch: Batch, ended: bool) -> dict[str, Any]:
        state = batch.state if ended else "in_progress" if batch.looks else "validating"
        message = f"Line 1 is invalid for key {batch.calls[0].key if batch.calls else ''}."
        errors = {"object": "list", "data": [{"code": "invalid", "message": message, "param": None, "line": 1}]}
        return {
            "id": batch.name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": errors if state == "failed" else None,
            "input_file_id": "file-input",
            "completion_window": "24h",
            "status": state,
            "output_file_id": batch.replies if ended else None,
            "error_file_id": batch.errors if ended else None,
            "created_at": 1,
            "metadata": None if batch.label is None else {"label": batch.label},
        }


class Gemini:
    """Gemini's wire format."""

    name = "gemini"
    path = re.compile(r"/v\d\w*/models/([^/:]+):generateContent")

    def read(self, path: str, query: dict[str, Any], headers: Message, body: dict[str, Any]) -> dict[str, Any]:
        parts = [part for content in body["contents"] for part in content["parts"]]
        config = body.get("generationConfig", {})
        match = self.path.fullmatch(path)
        assert match
        return {
            "provider": self.name,
            "model": unquote(match[1]),
            "text": "\n".join(part["text"] for part in parts if "text" in part),
            "images": [_decode(part["inlineData"]["data"]) for part in parts if "inlineData" in part],
            "structured": "responseSchema" in config or "responseJsonSchema" in config,
            "key": headers.get("x-goog-api-key") or query.get("key", ""),
            "body": body,
        }

    def reply(self, call: Call, text: str, fault: Fault | None) -> dict[str, Any]:
        ends = {Fault.REFUSED: "SAFETY", Fault.TRUNCATED: "MAX_TOKENS"}
        candidate: dict[str, Any] = {"finishReason": ends.get(fault, "STOP"), "index": 0}
        if fault is not Fault.REFUSED:
            candidate["content"] = {"parts": [{"text": text}], "role": "model"}
        blocked = {"promptFeedback": {"blockReason": "SAFETY"}}
        tokens_in, tokens_out = usage(call, text)
        tokens = {"promptTokenCount": tokens_in, "candidatesTokenCount": tokens_out}
        return {
            **(blocked if fault is Fault.BLOCKED else {"candidates": [candidate]}),
            "usageMetadata": tokens | {"totalTokenCount": tokens_in + tokens_out},
            "modelVersion": f"{call.model}-2026-01-01",
        }

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]:
        error: dict[str, Any] = {"code": status, "message": message, "status": HTTPStatus(status).name}
        if retry_after is not None:
            delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{retry_after:g}s"}
            error["details"] = [delay]
        return {"error": error}

    def show(self, batch: Batch, ended: bool) -> dict[str, Any]:
        states = {"completed": "SUCCEEDED"}
        state = states.get(batch.state, batch.state.upper()) if ended else "RUNNING" if batch.looks else "PENDING"
        metadata: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": f"models/{batch.model}",
            "createTime": "2026-01-01T00:00:00.000000001Z",
            "updateTime": "2026-01-01T00:00:00.000000001Z",
            "state": f"BATCH_STATE_{state}",
            "name": batch.name,
        }
        if batch.label is not None:
            metadata["displayName"] = batch.label
        shown: dict[str, Any] = {"name": batch.name, "metadata": metadata}
        if ended:
            shown["done"] = True
            if batch.replies:
                metadata["output"] = shown["response"] = {"responsesFile": batch.replies}
            if batch.state == "failed":
                shown["error"] = {"code": 3, "message": "Line 1 is invalid."}
        return shown


OPENAI, GEMINI = WIRES = (OpenAI(), Gemini())


def _decode(data: str) -> bytes:
    """Decode base64 of either alphabet: google-genai writes the one for URLs."""
    return base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)


def dress(text: str, fault: Any) -> str:
    """Return an answer as a fault delivers it."""
    if fault in (Fault.BLOCKED, Fault.REFUSED, Fault.EMPTY):
        return ""
    if fault is Fault.TRUNCATED:
        return text[: len(text) * 6 // 10]
    if fault is Fault.UNSURE:
        return NOT_SURE
    if fault not in HARMLESS or not text.startswith(("{", "[")):
        return text
    if fault is Fault.FENCED:
        return f"Here is the answer you asked for:\n\n```json\n{text}\n```"
    if fault is Fault.PYTHON_LITERAL:
        return repr(json.loads(text))
    return text.replace('"question":', '"question1":').replace('"correct_answer":', '"correct answer1":')


def _gone(connection: socket.socket) -> bool:
    """Return whether the other side closed or reset the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Server:
    """The server, in threads of this process. An exception of a callback ends the block with that exception.

    Args:
        answer: Text of a good reply.
        faults: What goes wrong with a call: a `Fault`, or (status, message or whole body).
        latency: Seconds from a request to its reply.
        retry_after: Seconds of `Fault.RATE_LIMIT_AFTER`.
        is_judge: Which calls can meet `Fault.UNSURE`.
        lines: What goes wrong with a line of batch results: a `Fault` or a `Line`.
        trouble: What goes wrong with a batch step, called with the step and its count from 1.
        ends: (state, share of requests done) of the nth batch, from 0.
        polls: Status requests that find a batch still running.
        seconds: Least time that a batch takes.
        page: Most batches on a page of the list.
        edit: Changes a line of results.
        ascii: Whether results escape other characters.

    Attributes:
        served: How often each content got its whole answer from a client that was still there.
        steps: How often each batch step came up.
        direct: Number of requests without a batch.
        uploads: Sizes of the uploaded files.
        hanging: Set while a client hangs.
    """

    def __init__(
        self,
        answer: Callable[[Call], str],
        faults: Callable[[Call], Any] | None = None,
        latency: float = 0.0,
        *,
        retry_after: float = 1.0,
        is_judge: Callable[[Call], bool] = lambda call: False,
        lines: Callable[[Call], Any] = lambda call: None,
        trouble: Callable[[Step, int], Any] | None = None,
        ends: Callable[[int], tuple[str, float]] = lambda number: ("completed", 1.0),
        polls: int = 1,
        seconds: float = 0.0,
        page: int = 20,
        edit: Callable[[dict[str, Any]], None] = lambda row: None,
        ascii: bool = False,
    ) -> None:
        self.answer, self.latency, self.retry_after, self.is_judge = answer, latency, retry_after, is_judge
        self.faults = faults or (lambda call: None)
        self.lines, self.trouble, self.ends, self.polls, self.seconds = lines, trouble, ends, polls, seconds
        self.page, self.edit, self.ascii = page, edit, ascii
        self.url, self.direct = "", 0
        self.calls: list[Call] = []
        self.batches: list[Batch] = []
        self.files: dict[str, bytes] = {}
        self.uploads: list[int] = []
        self.served: Counter[str] = Counter()
        self.faulted: Counter[Any] = Counter()
        self.steps: Counter[Step] = Counter()
        self.hanging = threading.Event()
        self._lock = threading.Condition()
        self._attempts: Counter[str] = Counter()
        self._parts: dict[str, bytearray] = {}
        self._connections: set[socket.socket] = set()
        self._busy: set[socket.socket] = set()
        self._errors: list[Exception] = []

    @property
    def in_flight(self) -> int:
        """Requests that wait for a reply; one whose client is gone does not."""
        with self._lock:
            return sum(not _gone(connection) for connection in self._busy)

    @property
    def submitted(self) -> Counter[str]:
        """How often each content was submitted in a batch that was created."""
        with self._lock:
            return Counter(call.digest for batch in self.batches for call in batch.calls)

    @property
    def unanswered(self) -> Counter[str]:
        """How often each content got no usable reply from a batch."""
        with self._lock:
            found: Counter[str] = Counter()
            for batch in self.batches:
                done = int(len(batch.calls) * batch.share)
                for index, call in enumerate(batch.calls):
                    fault = self._fault(call, self.lines)
                    if index >= done or fault in UNANSWERED or (isinstance(fault, Fault) and fault not in HARMLESS):
                        found[call.digest] += 1
            return found

    def add_strangers(self, provider: str, count: int) -> None:
        """Add batches of other users."""
        for number in range(count):
            label = None if number % 2 else f"other-{number}"
            self.batches.append(Batch(_batch_name(provider), provider, "m", label, [], [], "completed", 1.0, 0.0))

    def __enter__(self) -> Server:
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.owner = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._lock.wait_for(lambda: not self._connections, timeout=5)
        if self._errors and error is None:
            raise self._errors[0]
        if self._errors and error is not None:
            error.add_note(f"In the server: {self._errors[0]!r}")

    def _arrive(self, request: dict[str, Any], headers: Message, connection: socket.socket) -> Call:
        content = (request[name] for name in ("provider", "model", "text", "images", "structured"))
        digest = content_digest(*content)
        with self._lock:
            self._attempts[digest] += 1
            attempt = self._attempts[digest]
            call = Call(**request, headers=headers, digest=digest, attempt=attempt, arrived=time.monotonic())
            self.calls.append(call)
            self._busy.add(connection)
        return call

    def _fault(self, call: Call, plan: Callable[[Call], Any]) -> Any:
        fault = plan(call)
        return None if fault is Fault.UNSURE and not self.is_judge(call) else fault

    def _count(self, call: Call, fault: Any, by: int = 1) -> None:
        with self._lock:
            if fault is not None:
                self.faulted[fault[0] if isinstance(fault, tuple) else fault] += by
            if fault is None or fault in HARMLESS:
                self.served[call.digest] += by

    def store(self, content: bytes, prefix: str) -> str:
        name = prefix + uuid.uuid4().hex[:20]
        self.files[name] = content
        return name

    def create(self, wire: Any, model: str, label: str | None, source: str, handler: _Handler) -> Batch:
        keys, calls = [], []
        for line in self.files[source].decode().split("\n"):
            if line:
                row = json.loads(line)
                keys.append(row["custom_id" if wire is OPENAI else "key"])
                body = row["body" if wire is OPENAI else "request"]
                request = wire.read(f"/v1beta/models/{model}:generateContent", {}, handler.headers, body)
                calls.append(self._arrive(request, handler.headers, handler.connection))
        self._busy.discard(handler.connection)
        assert keys
        assert len(set(keys)) == len(keys)
        state, done = self.ends(sum(bool(batch.calls) for batch in self.batches))
        name = _batch_name(wire.name)
        batch = Batch(name, wire.name, model, label, keys, calls, state, done, time.monotonic())
        self._write_results(wire, batch)
        with self._lock:
            self.batches.append(batch)
        return batch

    def _write_results(self, wire: Any, batch: Batch) -> None:
        replies, errors = [], []
        done = int(len(batch.calls) * batch.share)
        for index, (key, call) in enumerate(zip(batch.keys, batch.calls, strict=True)):
            fault = self._fault(call, self.lines)
            if index >= done:
                if batch.state != "expired" or wire is not OPENAI:
                    continue
                fault = Line.EXPIRED
            elif fault is not None:
                self.faulted[fault] += 1
            for good, line in self._result_lines(wire, key, call, fault):
                (replies if good or wire is GEMINI else errors).append(line)
        if batch.state != "failed":
            prefix = "file-" if wire is OPENAI else "files/batch-"
            batch.replies = self.store(("\n".join(replies) + "\n").encode(), prefix) if replies else None
            batch.errors = self.store(("\n".join(errors) + "\n").encode(), prefix) if errors else None

    def _result_lines(self, wire: Any, key: str, call: Call, fault: Any) -> Iterator[tuple[bool, str]]:
        """Yield (whether it has a reply, text) of a request's lines."""
        status = {Line.BAD: 400, Line.DENIED: 401, Fault.RESET: 500, Fault.TIMEOUT: 500, Fault.WEB_PAGE: 500}
        if fault is Line.MISSING:
            return
        if fault is Line.EXPIRED:
            error = {"code": "batch_expired", "message": "The completion window expired."}
            yield False, self._dump({"custom_id": key, "response": None, "error": error})
        elif (code := (status | STATUS).get(fault)) is not None:
            if wire is OPENAI:
                response = {"status_code": code, "body": wire.error(code, fault.name, None)}
                yield False, self._dump({"custom_id": key, "response": response, "error": None})
            else:
                rpc = {400: 3, 401: 16, 429: 8, 500: 13, 503: 14}[code]
                yield False, self._dump({"key": key, "error": {"code": rpc, "message": fault.name}})
        else:
            good = self._good_line(wire, key, call, fault)
            if fault is Line.STRANGER:
                yield True, self._good_line(wire, "0" * 32, call, None)
            if fault is Line.ODD:
                name = "custom_id" if wire is OPENAI else "key"
                for value in ([key], None, 7):
                    yield True, json.dumps(json.loads(good) | {name: value})
                yield from ((True, text) for text in ("{}", "[]", "null", f'"{key}"'))
            yield True, good[: len(good) // 2] if fault is Line.BROKEN else good
            if fault is Line.DOUBLED:
                yield True, good

    def _good_line(self, wire: Any, key: str, call: Call, fault: Any) -> str:
        fault = fault if isinstance(fault, Fault) else None
        reply = wire.reply(call, dress(self.answer(call), fault), fault)
        if wire is OPENAI:
            return self._dump({"custom_id": key, "response": {"status_code": 200, "body": reply}, "error": None})
        return self._dump({"response": reply, "key": key})

    def _dump(self, row: dict[str, Any]) -> str:
        self.edit(row)
        return json.dumps(row, ensure_ascii=self.ascii)

    def show(self, wire: Any, batch: Batch) -> dict[str, Any]:
        return wire.show(batch, batch.looks > self.polls and time.monotonic() - batch.created >= self.seconds)

    def list_page(self, provider: str, size: int, after: str) -> tuple[list[Batch], bool]:
        """Return the newest batches after one, and whether there are more."""
        with self._lock:
            found = [batch for batch in reversed(self.batches) if batch.provider == provider]
        start = next((index + 1 for index, batch in enumerate(found) if batch.name == after), 0)
        size = min(size, self.page)
        return found[start : start + size], len(found) > start + size


def _batch_name(provider: str) -> str:
    return f"batch_{uuid.uuid4().hex}" if provider == "openai" else f"batches/{uuid.uuid4().hex[:12]}"


class _Listener(ThreadingHTTPServer):
    owner: Server
    daemon_threads = True
    request_queue_size = 256

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for the host's name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.owner._errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one piece

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def owner(self) -> Server:
        return self.server.owner

    @property
    def wire(self) -> Any:
        return GEMINI if "x-goog-api-key" in self.headers or "X-Goog-Upload-Command" in self.headers else OPENAI

    def setup(self) -> None:
        super().setup()
        with self.owner._lock:
            self.owner._connections.add(self.connection)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            with self.owner._lock:
                self.owner._connections.discard(self.connection)
                self.owner._lock.notify_all()

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(size)
        if len(raw) < size:
            self.close_connection = True
            return
        address = urlsplit(self.path)
        wire = next((wire for wire in WIRES if wire.path.fullmatch(address.path)), None)
        if wire is not None:
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            request = wire.read(address.path, query, self.headers, json.loads(raw))
            call = self.owner._arrive(request, self.headers, self.connection)
            try:
                self.owner.direct += 1
                self.respond(wire, call)
            finally:
                self.leave()
            return
        starts = self.headers.get("X-Goog-Upload-Command") == "start"
        self.route(
            (OPENAI, r"/v1/files", Step.UPLOAD, lambda: self.openai_upload(raw)),
            (OPENAI, r"/v1/batches", Step.CREATE, lambda: self.openai_create(json.loads(raw))),
            (GEMINI, r"/v1\w*/models/([^/:]+):batchGenerateContent", Step.CREATE, lambda m: self.gemini_create(m, raw)),
            (
                GEMINI,
                r"/upload/v1\w*/files",
                Step.UPLOAD if starts else Step.CHUNK,
                self.gemini_start if starts else lambda: self.gemini_chunk(raw),
            ),
        )

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.route(
            (OPENAI, r"/v1/batches", Step.LIST, lambda: self.openai_list(query)),
            (OPENAI, r"/v1/batches/(batch_\w+)", Step.STATUS, self.status),
            (OPENAI, r"/v1/files/(file-\w+)/content", Step.DOWNLOAD, self.download),
            (GEMINI, r"/v1\w*/batches", Step.LIST, lambda: self.gemini_list(query)),
            (GEMINI, r"/v1\w*/(batches/\w+)", Step.STATUS, self.status),
            (GEMINI, r"/v1\w*/(files/[\w-]+):download", Step.DOWNLOAD, self.download),
        )

    def respond(self, wire: Any, call: Call) -> None:
        """Answer a chat request."""
        owner = self.owner
        try:
            fault = owner._fault(call, owner.faults)
            text = "" if fault in TRANSPORT or isinstance(fault, tuple) else owner.answer(call)
        except Exception as error:
            owner._errors.append(error)
            self.send_json(400, wire.error(400, f"the test's callback failed: {error!r}", None))
            return
        if fault is not Fault.TIMEOUT and not self.stays(owner.latency):
            self.close_connection = True
            return
        # Counted before the reply leaves: a client that has read it finds it counted. Taken back if not delivered.
        owner._count(call, fault)
        try:
            if isinstance(fault, tuple):
                status, content = fault
                self.send_json(status, wire.error(status, content, None) if isinstance(content, str) else content)
            elif fault in (*TRANSPORT, Fault.WEB_PAGE):
                self.misbehave(fault)
            else:
                self.send_json(200, wire.reply(call, dress(text, fault), fault))
        except OSError:
            owner._count(call, fault, by=-1)
            self.close_connection = True

    def misbehave(self, fault: Any) -> None:
        if fault is Fault.TIMEOUT:
            self.stays(60.0)
            self.close_connection = True
        elif fault is Fault.RESET:
            self.reset()
        elif fault is Fault.WEB_PAGE:
            self.send(200, PAGE.encode(), "text/html; charset=utf-8")
        else:
            after = self.owner.retry_after if fault is Fault.RATE_LIMIT_AFTER else None
            self.error(STATUS[fault], fault.words, after)

    def error(self, status: int, words: str, after: float | None = None) -> None:
        headers = {} if after is None else {"Retry-After": f"{after:g}"}
        self.send_json(status, self.wire.error(status, words, after), headers)

    def route(self, *known: tuple[Any, str, Step, Callable[..., Any]]) -> None:
        path = urlsplit(self.path).path
        for wire, pattern, step, work in known:
            if wire is self.wire and (match := re.fullmatch(pattern, path)):
                self.do_step(step, functools.partial(work, *match.groups()))
                return
        self.error(404, f"no {path} here")

    def do_step(self, step: Step, work: Callable[[], Callable[[], None]]) -> None:
        """Do a batch step and respond, or misbehave; `work` returns what sends the response."""
        owner = self.owner
        with owner._lock:
            owner.steps[step] += 1
            count = owner.steps[step]
        trouble = owner.trouble(step, count) if owner.trouble else None
        try:
            if trouble in (None, Trouble.LOST, Trouble.HANG_DONE):
                respond = work()
            if trouble is None:
                respond()
            elif trouble is Trouble.LOST:
                self.reset()
            elif isinstance(trouble, Trouble):
                owner.hanging.set()
                self.stays(60.0)
                owner.hanging.clear()
                self.close_connection = True
            elif isinstance(trouble, tuple):
                self.error(*trouble)
            else:
                self.misbehave(trouble)
        except OSError:
            self.close_connection = True

    def json(self, body: Any, headers: dict[str, str] | None = None) -> Callable[[], None]:
        return lambda: self.send_json(200, body, headers)

    def openai_upload(self, raw: bytes) -> Callable[[], None]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in email.message_from_bytes(head + raw).walk()
            if not part.is_multipart()
        }
        assert parts["purpose"] == b"batch"
        name, size = self.owner.store(parts["file"], "file-"), len(parts["file"])
        self.owner.uploads.append(size)
        body = {"id": name, "object": "file", "bytes": size, "created_at": 1, "filename": "requests.jsonl"}
        return self.json(body | {"purpose": "batch", "status": "processed"})

    def openai_create(self, body: dict[str, Any]) -> Callable[[], None]:
        assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
        label = (body.get("metadata") or {}).get("label")
        return self.created(self.owner.create(OPENAI, "", label, body["input_file_id"], self))

    def gemini_create(self, model: str, raw: bytes) -> Callable[[], None]:
        body = json.loads(raw)["batch"]
        file = body["inputConfig"]["fileName"]
        return self.created(self.owner.create(GEMINI, model, body.get("displayName"), file, self))

    def created(self, batch: Batch) -> Callable[[], None]:
        return self.json(self.owner.show(self.wire, batch))

    def openai_list(self, query: dict[str, str]) -> Callable[[], None]:
        found, more = self.owner.list_page("openai", int(query.get("limit", 20)), query.get("after", ""))
        data = [self.owner.show(OPENAI, batch) for batch in found]
        ends = {"first_id": found[0].name, "last_id": found[-1].name} if found else {}
        return self.json({"object": "list", "data": data, "has_more": more} | ends)

    def gemini_list(self, query: dict[str, str]) -> Callable[[], None]:
        found, more = self.owner.list_page("gemini", int(query.get("pageSize", 20)), query.get("pageToken", ""))
        body: dict[str, Any] = {"operations": [self.owner.show(GEMINI, batch) for batch in found]} if found else {}
        return self.json(body | ({"nextPageToken": found[-1].name if found else "next"} if more else {}))

    def status(self, name: str) -> Callable[[], None]:
        batch = next((batch for batch in self.owner.batches if batch.name == name), None)
        if batch is None:
            return lambda: self.error(404, f"No batch found with id '{name}'.")
        batch.looks += 1
        return self.json(self.owner.show(self.wire, batch))

    def download(self, name: str) -> Callable[[], None]:
        content = self.owner.files.get(name)
        if content is None:
            return lambda: self.error(404, f"No such File object: {name}")
        for batch in self.owner.batches:
            batch.downloads += name in (batch.replies, batch.errors)
        return lambda: self.send(200, content, "application/octet-stream")

    def gemini_start(self) -> Callable[[], None]:
        number = uuid.uuid4().hex
        self.owner._parts[number] = bytearray()
        address = f"{self.owner.url}/upload/v1beta/files?upload_id={number}&upload_protocol=resumable"
        return self.json({}, {"X-Goog-Upload-URL": address, "X-Goog-Upload-Status": "active"})

    def gemini_chunk(self, raw: bytes) -> Callable[[], None]:
        part = self.owner._parts[parse_qs(urlsplit(self.path).query)["upload_id"][0]]
        assert int(self.headers["X-Goog-Upload-Offset"]) == len(part)
        part += raw
        if "finalize" not in self.headers["X-Goog-Upload-Command"]:
            return self.json({}, {"X-Goog-Upload-Status": "active"})
        name = self.owner.store(bytes(part), "files/")
        self.owner.uploads.append(len(part))
        body = {"name": name, "mimeType": "application/jsonl", "sizeBytes": str(len(part)), "state": "ACTIVE"}
        return self.json({"file": body}, {"X-Goog-Upload-Status": "final"})

    def stays(self, seconds: float) -> bool:
        """Return whether the client is still there after some seconds; returns at once when it goes."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)  # a waiting client sends nothing: readable means closed
        return not poll.poll(seconds * 1000)

    def send_json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json; charset=utf-8", headers)

    def send(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.leave()  # before the reply is out: its reader may send the next request at once
        self.wfile.flush()

    def leave(self) -> None:
        with self.owner._lock:
            self.owner._busy.discard(self.connection)

    def reset(self) -> None:
        self.leave()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # By its number: `close` would wait for the files made of the socket, and the base class first says goodbye.
        socket.close(self.connection.detach())
