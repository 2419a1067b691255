"""A loopback server with the APIs of OpenAI and Gemini (chat, files, batches), so that the real SDKs run against it.

It misbehaves on request and counts what arrived and what it answered: tests ask the server, never the client they test.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

from tests.hosted.faults import HARMLESS, STATUS, UNANSWERED, Fault, Line, Step, dress
from tests.hosted.handler import Handler, Listener
from tests.hosted.wires import GEMINI, OPENAI, Batch, Call, content_digest

_LINE_STATUS: dict[Any, int] = dict.fromkeys((Fault.RESET, Fault.TIMEOUT, Fault.CLOSED, Fault.WEB_PAGE), 500) | STATUS
_LINE_STATUS |= {Line.BAD: 400, Line.DENIED: 401}


def _gone(connection: socket.socket) -> bool:
    """Return whether the other side closed or reset the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@dataclass(eq=False)
class Server:
    """The server, in threads of this process. An exception of a callback ends the block with that exception.

    Attributes:
        answer: Text of a good reply.
        faults: What goes wrong with a call: a `Fault`, or (status, message, or whole body as JSON or bytes).
        latency: Seconds from a request to its reply.
        retry_after: Seconds of `Fault.RATE_LIMIT_AFTER`.
        is_judge: Which calls can meet `Fault.UNSURE`.
        lines: What goes wrong with a line of batch results: a `Fault` or a `Line`.
        trouble: What goes wrong with a batch step, called with the step and its count from 1.
        ends: (state, share of requests done) of the nth batch, from 0.
        polls: Status requests that find a batch still running.
        page: Most batches on a page of the list.
        edit: Changes a line of results.
        ascii: Whether results escape other characters.
        served: How often each content got its whole answer from a client that was still there.
        steps: How often each batch step came up.
        direct: Number of requests without a batch.
        uploads: Sizes of the uploaded files.
        hanging: Set while a client hangs.
    """

    answer: Callable[[Call], str]
    faults: Callable[[Call], Any] = lambda call: None
    latency: float = 0.0
    _: KW_ONLY
    retry_after: float = 1.0
    is_judge: Callable[[Call], bool] = lambda call: False
    lines: Callable[[Call], Any] = lambda call: None
    trouble: Callable[[Step, int], Any] | None = None
    ends: Callable[[int], tuple[str, float]] = lambda number: ("completed", 1.0)
    polls: int = 1
    page: int = 20
    edit: Callable[[dict[str, Any]], None] = lambda row: None
    ascii: bool = False

    def __post_init__(self) -> None:
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
            self.batches.append(Batch(_batch_name(provider), provider, "m", label, [], [], "completed", 1.0))

    def __enter__(self) -> Server:
        self._listener = Listener(("127.0.0.1", 0), Handler)
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

    def arrive(self, request: dict[str, Any], connection: socket.socket) -> Call:
        digest = content_digest(*(request[name] for name in ("provider", "model", "text", "images", "structured")))
        with self._lock:
            self._attempts[digest] += 1
            attempt = self._attempts[digest]
            call = Call(**request, digest=digest, attempt=attempt, arrived=time.monotonic())
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

    def create(self, wire: Any, model: str, label: str | None, source: str, handler: Handler) -> Batch:
        rows = [json.loads(line) for line in self.files[source].decode().split("\n") if line]
        keys = [row[wire.key] for row in rows]
        assert keys
        assert len(set(keys)) == len(keys)
        path = f"/v1beta/models/{model}:generateContent"
        requests = [wire.read(path, {}, handler.headers, row[wire.request]) for row in rows]
        calls = [self.arrive(request, handler.connection) for request in requests]
        self._busy.discard(handler.connection)
        state, done = self.ends(sum(bool(batch.calls) for batch in self.batches))
        name = _batch_name(wire.name)
        batch = Batch(name, wire.name, model, label, keys, calls, state, done)
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
        if fault is Line.MISSING:
            return
        if fault is Line.EXPIRED:
            error = {"code": "batch_expired", "message": "The completion window expired."}
            yield False, self._dump({"custom_id": key, "response": None, "error": error})
        elif fault in _LINE_STATUS:
            yield False, self._dump(wire.error_line(key, _LINE_STATUS[fault], fault.name))
        else:
            shown = fault if isinstance(fault, Fault) else None
            row = wire.reply_line(key, wire.reply(call, dress(self.answer(call), shown), shown))
            good = self._dump(row)
            if fault is Line.STRANGER:
                yield True, json.dumps(row | {wire.key: "0" * 32})
            if fault is Line.ODD:
                yield from ((True, json.dumps(row | {wire.key: value})) for value in ([key], None, 7))
                yield from ((True, text) for text in ("{}", "[]", "null", f'"{key}"'))
            yield True, good[: len(good) // 2] if fault is Line.BROKEN else good
            if fault is Line.DOUBLED:
                yield True, good

    def _dump(self, row: dict[str, Any]) -> str:
        self.edit(row)
        return json.dumps(row, ensure_ascii=self.ascii)

    def show(self, wire: Any, batch: Batch) -> dict[str, Any]:
        return wire.show(batch, batch.looks > self.polls)

    def list_page(self, provider: str, size: int, after: str) -> tuple[list[Batch], bool]:
        """Return the newest batches after one, and whether there are more."""
        with self._lock:
            found = [batch for batch in reversed(self.batches) if batch.provider == provider]
        start = next((index + 1 for index, batch in enumerate(found) if batch.name == after), 0)
        size = min(size, self.page)
        return found[start : start + size], len(found) > start + size


def _batch_name(provider: str) -> str:
    return f"batch_{uuid.uuid4().hex}" if provider == "openai" else f"batches/{uuid.uuid4().hex[:12]}"
