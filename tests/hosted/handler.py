"""HTTP side of the loopback server: reads requests of the chat, file and batch APIs, and responds or misbehaves."""

from __future__ import annotations

import email
import functools
import json
import re
import select
import socket
import struct
import sys
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.hosted.faults import STATUS, TRANSPORT, Fault, Step, Trouble, dress
from tests.hosted.wires import GEMINI, OPENAI, WIRES, Call

if TYPE_CHECKING:
    from tests.hosted.server import Server

PAGE = "<!DOCTYPE html>\n<html><head><title>Error</title></head><body><h1>Something went wrong</h1></body></html>\n"


class Listener(ThreadingHTTPServer):
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


class Handler(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one piece

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.owner = self.server.owner
        with self.owner._lock:
            self.owner._connections.add(self.connection)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            with self.owner._lock:
                self.owner._connections.discard(self.connection)
                self.owner._lock.notify_all()

    @property
    def wire(self) -> Any:
        return GEMINI if "x-goog-api-key" in self.headers or "X-Goog-Upload-Command" in self.headers else OPENAI

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(size)
        if len(raw) < size:
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        wire = next((wire for wire in WIRES if wire.path.fullmatch(path)), None)
        if wire is not None:
            request = wire.read(path, self.query, self.headers, json.loads(raw))
            call = self.owner.arrive(request, self.connection)
            try:
                self.owner.direct += 1
                self.respond(wire, call)
            finally:
                self.leave()
            return
        gemini_upload = (Step.CHUNK, lambda: self.gemini_chunk(raw))
        if self.headers.get("X-Goog-Upload-Command") == "start":
            gemini_upload = (Step.UPLOAD, self.gemini_start)
        self.route(
            (OPENAI, r"/v1/files", Step.UPLOAD, lambda: self.openai_upload(raw)),
            (OPENAI, r"/v1/batches", Step.CREATE, lambda: self.openai_create(json.loads(raw))),
            (GEMINI, r"/v1\w*/models/([^/:]+):batchGenerateContent", Step.CREATE, lambda m: self.gemini_create(m, raw)),
            (GEMINI, r"/upload/v1\w*/files", *gemini_upload),
        )

    def do_GET(self) -> None:
        self.route(
            (OPENAI, r"/v1/batches", Step.LIST, self.openai_list),
            (OPENAI, r"/v1/batches/(batch_\w+)", Step.STATUS, self.status),
            (OPENAI, r"/v1/files/(file-\w+)/content", Step.DOWNLOAD, self.download),
            (GEMINI, r"/v1\w*/batches", Step.LIST, self.gemini_list),
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
                if isinstance(content, bytes):
                    self.send(status, content, "text/html")
                else:
                    self.send_json(status, wire.error(status, content, None) if isinstance(content, str) else content)
            elif fault is Fault.CLOSED:
                self.send_half(wire.reply(call, owner.answer(call), None))
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
            self.error(STATUS[fault], fault.value, after)

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
        self.owner.uploads.append(len(parts["file"]))
        return self.json({"id": self.owner.store(parts["file"], "file-"), "object": "file", "purpose": "batch"})

    def openai_create(self, body: dict[str, Any]) -> Callable[[], None]:
        assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
        label = (body.get("metadata") or {}).get("label")
        return self.json(self.owner.show(OPENAI, self.owner.create(OPENAI, "", label, body["input_file_id"], self)))

    def gemini_create(self, model: str, raw: bytes) -> Callable[[], None]:
        body = json.loads(raw)["batch"]
        batch = self.owner.create(GEMINI, model, body.get("displayName"), body["inputConfig"]["fileName"], self)
        return self.json(self.owner.show(GEMINI, batch))

    def openai_list(self) -> Callable[[], None]:
        query = self.query
        found, more = self.owner.list_page("openai", int(query.get("limit", 20)), query.get("after", ""))
        data = [self.owner.show(OPENAI, batch) for batch in found]
        return self.json({"object": "list", "data": data, "has_more": more})

    def gemini_list(self) -> Callable[[], None]:
        query = self.query
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
        part = self.owner._parts[self.query["upload_id"]]
        assert int(self.headers["X-Goog-Upload-Offset"]) == len(part)
        part += raw
        if "finalize" not in self.headers["X-Goog-Upload-Command"]:
            return self.json({}, {"X-Goog-Upload-Status": "active"})
        self.owner.uploads.append(len(part))
        body = {"name": self.owner.store(bytes(part), "files/"), "mimeType": "application/jsonl", "state": "ACTIVE"}
        return self.json({"file": body}, {"X-Goog-Upload-Status": "final"})

    def stays(self, seconds: float) -> bool:
        """Return whether the client is still there after some seconds; returns at once when it goes."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)  # a waiting client sends nothing: readable means closed
        return not poll.poll(seconds * 1000)

    def send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json; charset=utf-8", headers)

    def send(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.leave()  # before the reply is out: its reader may send the next request at once
        self.wfile.flush()

    def send_half(self, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2])
        self.leave()
        self.wfile.flush()
        self.close_connection = True

    def leave(self) -> None:
        with self.owner._lock:
            self.owner._busy.discard(self.connection)

    def reset(self) -> None:
        self.leave()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # By its number: `close` would wait for the files made of the socket, and the base class first says goodbye.
        socket.close(self.connection.detach())
