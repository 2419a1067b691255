"""The loopback server with the batches of OpenAI and Gemini: files go up, batches are made, looked after, and come down.

It counts what it was handed, and misbehaves on plan at any step and in any line of its results. A content counts as handed
over when a batch with it was made, whether or not the client heard of it: a file that was only uploaded costs nothing.
"""

from __future__ import annotations

import email
import functools
import json
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.hosted import server as loopback
from tests.hosted.server import PAGE, STATUS, WIRES, Call, End, Fault, Server, _ended

GEMINI = r"/v1\w*/"
"""The SDKs differ in the version that they ask for."""


class Step(Enum):
    """What a client asks for."""

    UPLOAD = "a file; at Gemini, leave to send one"
    CHUNK = "the bytes of a file that there is leave for; Gemini alone"
    CREATE = "a batch"
    LIST = "a page of the batches"
    LOOK = "how a batch stands"
    DOWNLOAD = "a file of results"


class Trouble(Enum):
    """What can go wrong with a step, besides the transport's faults, a status with words, and WEB_PAGE."""

    LOST = "the work is done, and the connection reset before a byte of the reply came"
    HANG = "nothing is done, and nothing said until the client has gone"
    HANG_DONE = "the same with the work done"


class Line(Enum):
    """What can go wrong with a line of results, besides the faults that a reply can have."""

    MISSING = "there is none"
    DOUBLED = "it is there twice"
    BROKEN = "it is cut off in the middle"
    STRANGER = "before it there is one of a key that nobody has heard of"
    ODD = "before it there are some that are no objects, or have no key, or one that is no text"
    BAD = "the request is said to be none (400)"
    DENIED = "the key is said to be wrong (401)"
    EXPIRED = "the day was over before its turn came"


LINES = (Line.MISSING, Line.DOUBLED, Line.BROKEN, Line.STRANGER, Line.BAD)
"""Those after which a client can go on."""
UNHAPPY = {Line.MISSING, Line.BROKEN, Line.BAD, Line.EXPIRED}
"""Those after which a client has no reply."""


class Fate(Enum):
    """How a batch ends, as OpenAI and as Gemini call it."""

    COMPLETED = ("completed", "SUCCEEDED")
    FAILED = ("failed", "FAILED")
    EXPIRED = ("expired", "EXPIRED")
    CANCELLED = ("cancelled", "CANCELLED")


@dataclass
class Batch:
    """A batch that was made.

    Attributes:
        label: the client's, wherever its API has a place for one.
        share: of its requests that get done.
        looks: how often it was looked after.
        downloads: how often its results were fetched.
        replies, errors: names of the files of results.
    """

    name: str
    provider: str
    model: str
    label: str | None
    source: str
    keys: list[str]
    calls: list[Call]
    fate: Fate
    share: float
    made: float
    looks: int = 0
    downloads: int = 0
    replies: str | None = None
    errors: str | None = None


class BatchServer(Server):
    """`Server`, with batches.

    Args:
        lines: What goes wrong with a request's line of results; a `Fault` of transport is an error in the line.
        trouble: What goes wrong with a step, called with the step and how often it has come up, 1 at first: a `Fault`
            of transport, `Fault.WEB_PAGE`, a `Trouble`, or a status and the words of an error.
        fate: How the nth batch ends, 0 at first, and the share of its requests that get done.
        polls: Looks at a batch that find it still under way.
        seconds: How long a batch is under way at least.
        page: The most batches on a page of the list.
        dress: Called with a line of results as an object before it is written; may return another.
        ascii: Whether results spell other characters as escapes.

    Attributes:
        batches: All that were made, in order.
        steps: How often each step has come up.
        direct: Requests that came without a batch.
        hanging: Set while a client hangs in a `Trouble`.
        uploads: Sizes of the files that came, whole.
    """

    def __init__(
        self,
        answer: Callable[[Call], str],
        lines: Callable[[Call], Fault | Line | None] | None = None,
        *,
        trouble: Callable[[Step, int], Fault | Trouble | tuple[int, str] | None] | None = None,
        fate: Callable[[int], tuple[Fate, float]] | None = None,
        polls: int = 1,
        seconds: float = 0.0,
        page: int = 20,
        dress: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        ascii: bool = False,
        hold: float = 5.0,
        retry_after: float = 1.0,
        is_judge: Callable[[Call], bool] | None = None,
    ) -> None:
        super().__init__(answer, hold=hold, retry_after=retry_after, is_judge=is_judge)
        self.lines, self.trouble, self.fate, self.dress = lines, trouble, fate, dress
        self.polls, self.seconds, self.page, self.ascii = polls, seconds, page, ascii
        self.batches: list[Batch] = []
        self.steps: Counter[Step] = Counter()
        self.direct = 0
        self.hanging = threading.Event()
        self.uploads: list[int] = []
        self.files: dict[str, bytes] = {}
        self.met: Counter[Fault | Line] = Counter()
        self._parts: dict[str, bytearray] = {}

    def __enter__(self) -> BatchServer:
        super().__enter__()
        self._listener.RequestHandlerClass = _Handler
        return self

    @property
    def handed(self) -> Counter[str]:
        """How often each content was handed over in a batch that was made."""
        with self._lock:
            return Counter(call.digest for batch in self.batches for call in batch.calls)

    @property
    def unhappy(self) -> Counter[str]:
        """How often each content got no usable reply from a batch."""
        with self._lock:
            found: Counter[str] = Counter()
            for batch in self.batches:
                done = int(len(batch.calls) * batch.share)
                for place, call in enumerate(batch.calls):
                    fault = self._fault(call)
                    harm = fault in UNHAPPY or fault is Line.DENIED or isinstance(fault, Fault)
                    if place >= done or (harm and fault not in loopback.HARMLESS):
                        found[call.digest] += 1
            return found

    def forget(self) -> None:
        """The service has thrown everything away."""
        with self._lock:
            self.batches.clear()
            self.files.clear()

    def strangers(self, provider: str, count: int) -> None:
        """Batches of other people's, older than any that comes after."""
        for number in range(count):
            made = Batch(
                f"batch_{uuid.uuid4().hex}" if provider == "openai" else f"batches/{uuid.uuid4().hex[:12]}",
                provider,
                "other",
                None if number % 2 else f"other-{number}",
                "file-other",
                [],
                [],
                Fate.COMPLETED,
                1.0,
                0.0,
            )
            self.batches.append(made)

    # What the handlers do.

    def _store(self, content: bytes, prefix: str) -> str:
        name = prefix + uuid.uuid4().hex[:20]
        with self._lock:
            self.files[name] = content
        return name

    def _make(self, provider: str, model: str, label: str | None, source: str, headers: Any, connection: Any) -> Batch:
        """A batch of an uploaded file; raises ValueError or LookupError where it is none."""
        rows = [json.loads(line) for line in self.files[source].decode().split("\n") if line]
        wire = WIRES[0] if provider == "openai" else WIRES[1]
        keys, calls = [], []
        for row in rows:
            if provider == "openai":
                if (row["method"], row["url"]) != ("POST", "/v1/chat/completions"):
                    raise ValueError("a line for another address")
                keys.append(row["custom_id"])
                request = wire.read("", {}, headers, row["body"])
            else:
                keys.append(row["key"])
                request = wire.read(f"/v1beta/models/{model}:generateContent", {}, headers, row["request"])
            calls.append(self._arrives(request, headers, connection))
        self._leaves(connection)
        if not keys or len(set(keys)) < len(keys):
            raise ValueError("no requests, or two of one key")
        with self._lock:
            real = sum(bool(batch.calls) for batch in self.batches)
        fate, share = self.fate(real) if self.fate else (Fate.COMPLETED, 1.0)
        name = f"batch_{uuid.uuid4().hex}" if provider == "openai" else f"batches/{uuid.uuid4().hex[:12]}"
        made = Batch(name, provider, model, label, source, keys, calls, fate, share, time.monotonic())
        self._results(made)
        with self._lock:
            self.batches.append(made)
        return made

    def _fault(self, call: Call) -> Fault | Line | None:
        fault = self.lines(call) if self.lines else None
        if fault is Fault.UNSURE and not (self.is_judge and self.is_judge(call)):
            return None
        return fault

    def _results(self, batch: Batch) -> None:
        replies, errors = [], []
        done = int(len(batch.calls) * batch.share)
        for place, (key, call) in enumerate(zip(batch.keys, batch.calls, strict=True)):
            fault = self._fault(call)
            if place >= done:
                if batch.fate is not Fate.EXPIRED or batch.provider != "openai":
                    continue
                fault = Line.EXPIRED
            elif fault is not None:
                self.met[fault] += 1
            for good, line in self._written(batch, key, call, fault):
                (replies if good or batch.provider == "gemini" else errors).append(line)
        if batch.fate is Fate.FAILED:
            return
        prefix = "file-" if batch.provider == "openai" else "files/batch-"
        for name, lines in (("replies", replies), ("errors", errors)):
            if lines:
                setattr(batch, name, self._store(("\n".join(lines) + "\n").encode(), prefix))

    def _written(self, batch: Batch, key: str, call: Call, fault: Fault | Line | None) -> Iterator[tuple[bool, str]]:
        """The lines of a request: whether there is a reply in it, and its text."""
        wire = WIRES[0] if batch.provider == "openai" else WIRES[1]
        status = {Line.BAD: 400, Line.DENIED: 401}.get(fault) or STATUS.get(fault)  # type: ignore[call-overload]
        if fault is Fault.RESET or fault is Fault.TIMEOUT or fault is Fault.WEB_PAGE:
            status = 500
        if fault is Line.MISSING:
            return
        if fault is Line.EXPIRED:
            words = "This request could not be executed before the completion window expired."
            yield False, self._line(key, None, {"code": "batch_expired", "message": words})
            return
        if status is not None:
            words = fault.words if isinstance(fault, Fault) else fault.value  # type: ignore[union-attr]
            if batch.provider == "openai":
                yield False, self._line(key, (status, wire.error(status, words, None)), None)
            else:
                code = {400: 3, 401: 16, 429: 8, 500: 13, 503: 14}[status]
                yield False, self._dumped({"key": key, "error": {"code": code, "message": words}})
            return
        text, end = _ended(self.answer(call), fault if isinstance(fault, Fault) else None)
        good = self._good(batch, wire, key, call, text, end)
        if fault is Line.STRANGER:
            yield True, self._good(batch, wire, "0" * 32, call, text, end)
        if fault is Line.ODD:
            name = "custom_id" if batch.provider == "openai" else "key"
            for row in ({name: [key]}, {name: None}, {name: 7}, {}, [], None, key):
                whole = {**json.loads(good), **row} if isinstance(row, dict) and row else row
                yield True, json.dumps(whole)
        yield True, good[: len(good) // 2] if fault is Line.BROKEN else good
        if fault is Line.DOUBLED:
            yield True, good

    def _good(self, batch: Batch, wire: Any, key: str, call: Call, text: str, end: End) -> str:
        reply = wire.reply(call, text, end)
        if batch.provider == "openai":
            return self._line(key, (200, reply), None)
        return self._dumped({"response": reply, "key": key})

    def _dumped(self, row: dict[str, Any]) -> str:
        return json.dumps(self.dress(row) if self.dress else row, ensure_ascii=self.ascii)

    def _line(self, key: str, response: tuple[int, Any] | None, error: dict[str, str] | None) -> str:
        whole = response and {"status_code": response[0], "request_id": uuid.uuid4().hex, "body": response[1]}
        number = f"batch_req_{uuid.uuid4().hex}"
        return self._dumped({"id": number, "custom_id": key, "response": whole, "error": error})

    def _find(self, name: str) -> Batch | None:
        return next((batch for batch in self.batches if batch.name == name), None)

    def _ended(self, batch: Batch) -> bool:
        return batch.looks > self.polls and time.monotonic() - batch.made >= self.seconds

    def _told(self, batch: Batch) -> dict[str, Any]:
        """A batch as its API shows it."""
        ended = self._ended(batch)
        if batch.provider == "openai":
            status = "validating" if not batch.looks else batch.fate.value[0] if ended else "in_progress"
            words = f"Line 1 is of no use to key {batch.calls[0].key if batch.calls else ''}."
            errors = {"object": "list", "data": [{"code": "invalid", "message": words, "param": None, "line": 1}]}
            return {
                "id": batch.name,
                "object": "batch",
                "endpoint": "/v1/chat/completions",
                "errors": errors if status == "failed" else None,
                "input_file_id": batch.source,
                "completion_window": "24h",
                "status": status,
                "output_file_id": batch.replies if ended else None,
                "error_file_id": batch.errors if ended else None,
                "created_at": int(time.time()),
                "request_counts": {"total": len(batch.calls), "completed": 0, "failed": 0},
                "metadata": None if batch.label is None else {"label": batch.label},
            }
        state = batch.fate.value[1] if ended else "RUNNING" if batch.looks else "PENDING"
        metadata: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": f"models/{batch.model}",
            "createTime": "2026-01-01T00:00:00.000000001Z",
            "updateTime": "2026-01-01T00:00:00.000000001Z",
            "batchStats": {"requestCount": str(len(batch.calls))},
            "state": f"BATCH_STATE_{state}",
            "name": batch.name,
        }
        if batch.label is not None:
            metadata["displayName"] = batch.label
        told: dict[str, Any] = {"name": batch.name, "metadata": metadata}
        if ended:
            told["done"] = True
            if batch.replies:
                metadata["output"] = {"responsesFile": batch.replies}
                told["response"] = {"responsesFile": batch.replies}
            if batch.fate is Fate.FAILED:
                told["error"] = {"code": 3, "message": "Line 1 is of no use."}
        return told

    def _page(self, provider: str, size: int, after: str) -> tuple[list[Batch], bool]:
        """The newest first, from after a batch on, and whether there are more."""
        with self._lock:
            found = [batch for batch in reversed(self.batches) if batch.provider == provider]
        start = next((place + 1 for place, batch in enumerate(found) if batch.name == after), 0)
        size = min(size, self.page)
        return found[start : start + size], len(found) > start + size


class _Handler(loopback._Handler, BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        if any(wire.path.fullmatch(path) for wire in WIRES):
            self.owner.direct += 1
            super().do_POST()
            return
        size = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(size)
        if len(raw) < size:
            self.close_connection = True
            return
        command = self.headers.get("X-Goog-Upload-Command")
        self.route(
            (WIRES[0], r"/v1/files", Step.UPLOAD, lambda: self.openai_upload(raw)),
            (WIRES[0], r"/v1/batches", Step.CREATE, lambda: self.openai_create(json.loads(raw))),
            (
                WIRES[1],
                GEMINI + "models/([^/:]+):batchGenerateContent",
                Step.CREATE,
                lambda m: self.gemini_create(m, raw),
            ),
            (WIRES[1], "/upload" + GEMINI + "files", *self.part(command, raw)),
        )

    def part(self, command: str | None, raw: bytes) -> tuple[Step, Callable[..., Any]]:
        if command == "start":
            return Step.UPLOAD, lambda: self.gemini_start()
        return Step.CHUNK, lambda: self.gemini_chunk(raw)

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.route(
            (WIRES[0], r"/v1/batches", Step.LIST, lambda: self.openai_list(query)),
            (WIRES[0], r"/v1/batches/(batch_\w+)", Step.LOOK, self.look),
            (WIRES[0], r"/v1/files/(file-\w+)/content", Step.DOWNLOAD, self.download),
            (WIRES[1], GEMINI + "batches", Step.LIST, lambda: self.gemini_list(query)),
            (WIRES[1], GEMINI + r"(batches/\w+)", Step.LOOK, self.look),
            (WIRES[1], GEMINI + r"(files/[\w-]+):download", Step.DOWNLOAD, self.download),
        )

    def route(self, *known: tuple[Any, str, Step, Callable[..., Any]]) -> None:
        path = urlsplit(self.path).path
        for wire, pattern, step, work in known:
            if wire is self.wire and (found := re.fullmatch(pattern, path)):
                self.step(step, functools.partial(work, *found.groups()))
                return
        self.owner._failed(AssertionError(f"nobody has {self.command} {self.path}"))
        self.error(404, f"no {path} here")

    @property
    def owner(self) -> BatchServer:
        found = self.server.owner
        assert isinstance(found, BatchServer)
        return found

    @property
    def wire(self) -> Any:
        return WIRES[1] if "x-goog-api-key" in self.headers or "X-Goog-Upload-Command" in self.headers else WIRES[0]

    def error(self, status: int, words: str, after: float | None = None) -> None:
        headers = {} if after is None else {"Retry-After": f"{after:g}"}
        if self.wire is WIRES[0]:
            body = self.wire.error(status, words, after)
        else:
            body = {"error": {"code": status, "message": words, "status": self.wire.statuses.get(status, "UNKNOWN")}}
        self.send_json(status, body, headers)

    def step(self, step: Step, work: Callable[[], Callable[[], None]]) -> None:
        """Does a step's work and replies, or what the plan says."""
        owner = self.owner
        with owner._lock:
            owner.steps[step] += 1
            count = owner.steps[step]
        trouble = owner.trouble(step, count) if owner.trouble else None
        try:
            if trouble is None:
                work()()
            elif trouble is Trouble.LOST:
                work()
                self.reset()
            elif isinstance(trouble, Trouble):
                if trouble is Trouble.HANG_DONE:
                    work()
                owner.hanging.set()
                self.stays(60.0)
                owner.hanging.clear()
                self.close_connection = True
            elif isinstance(trouble, tuple):
                self.error(*trouble)
            elif trouble is Fault.TIMEOUT:
                self.stays(owner.hold)
                self.close_connection = True
            elif trouble is Fault.RESET:
                self.reset()
            elif trouble is Fault.WEB_PAGE:
                self.send(200, PAGE.encode(), "text/html; charset=utf-8")
            else:
                after = owner.retry_after if trouble is Fault.RATE_LIMIT_AFTER else None
                self.error(STATUS[trouble], trouble.words, after)
        except OSError:
            self.close_connection = True

    # The steps: each returns what sends its reply.

    def json(self, body: Any, headers: dict[str, str] | None = None) -> Callable[[], None]:
        return lambda: self.send_json(200, body, headers)

    def openai_upload(self, raw: bytes) -> Callable[[], None]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in email.message_from_bytes(head + raw).walk()
            if not part.is_multipart()
        }
        if parts["purpose"] != b"batch":
            return lambda: self.error(400, "files are for batches here")
        name = self.owner._store(parts["file"], "file-")
        self.owner.uploads.append(len(parts["file"]))
        body = {
            "id": name,
            "object": "file",
            "bytes": len(parts["file"]),
            "created_at": 1,
            "filename": "requests.jsonl",
        }
        return self.json(body | {"purpose": "batch", "status": "processed"})

    def openai_create(self, body: dict[str, Any]) -> Callable[[], None]:
        if (body["endpoint"], body["completion_window"]) != ("/v1/chat/completions", "24h"):
            return lambda: self.error(400, "no such endpoint or window")
        file, label = body["input_file_id"], (body.get("metadata") or {}).get("label")
        return self.make("openai", "", label, file)

    def make(self, provider: str, model: str, label: str | None, file: str) -> Callable[[], None]:
        try:
            made = self.owner._make(provider, model, label, file, self.headers, self.connection)
        except (ValueError, LookupError, TypeError) as error:
            self.owner._failed(error)
            words = repr(error)
            return lambda: self.error(400, words)
        return self.json(self.owner._told(made))

    def openai_list(self, query: dict[str, str]) -> Callable[[], None]:
        found, more = self.owner._page("openai", int(query.get("limit", 20)), query.get("after", ""))
        ends = {"first_id": found[0].name, "last_id": found[-1].name} if found else {}
        return self.json({"object": "list", "data": [*map(self.owner._told, found)], "has_more": more} | ends)

    def look(self, name: str) -> Callable[[], None]:
        batch = self.owner._find(name)
        if batch is None:
            return lambda: self.error(404, f"No batch found with id '{name}'.")
        batch.looks += 1
        return self.json(self.owner._told(batch))

    def download(self, name: str) -> Callable[[], None]:
        content = self.owner.files.get(name)
        if content is None:
            return lambda: self.error(404, f"No such File object: {name}")
        for batch in self.owner.batches:
            batch.downloads += name in (batch.replies, batch.errors)
        return lambda: self.send(200, content, "application/octet-stream")

    def gemini_start(self) -> Callable[[], None]:
        assert self.headers["X-Goog-Upload-Protocol"] == "resumable"
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
        name = self.owner._store(bytes(part), "files/")
        self.owner.uploads.append(len(part))
        body = {"name": name, "mimeType": "application/jsonl", "sizeBytes": str(len(part)), "state": "ACTIVE"}
        return self.json({"file": body}, {"X-Goog-Upload-Status": "final"})

    def gemini_create(self, model: str, raw: bytes) -> Callable[[], None]:
        batch = json.loads(raw)["batch"]
        return self.make("gemini", model, batch.get("displayName"), batch["inputConfig"]["fileName"])

    def gemini_list(self, query: dict[str, str]) -> Callable[[], None]:
        found, more = self.owner._page("gemini", int(query.get("pageSize", 20)), query.get("pageToken", ""))
        body: dict[str, Any] = {"operations": [*map(self.owner._told, found)]} if found else {}
        return self.json(body | ({"nextPageToken": found[-1].name if found else "next"} if more else {}))
