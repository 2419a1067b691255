"""A scheduler's answers without HTTP, a server on loopback in a thread, and requests to it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from reverie_jax.data.conversation import Conversation
from reverie_jax.data.processor import Processor
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import unsupervised
from reverie_jax.serve.answers import Delta
from reverie_jax.serve.app import Service, make_app
from reverie_jax.serve.scheduler import Request, Scheduler

SECONDS = 120
"""Until a test gives up; nothing depends on it."""


def request(processor: Processor, encoded: bytes, conversation: Conversation, **options: Any) -> Request:
    tokens = unsupervised(processor.encoder(conversation))
    return Request(tokens, str(hash(encoded)) if encoded else "", processor.preprocess(encoded, "x"), **options)


def longer(asked: Request, ids: Sequence[int], **changes: Any) -> Request:
    """Return the request with further tokens behind its prompt."""
    more = {"ids": ids, "weights": [0.0] * len(ids), "image_slots": [-1] * len(ids)}
    parts = {
        name: np.append(old := getattr(asked.tokens, name), np.asarray(new, old.dtype)) for name, new in more.items()
    }
    return dataclasses.replace(asked, tokens=Tokens(**parts), **changes)


class Answers:
    """What came of a request: deltas by answer, and the error if there was one."""

    def __init__(self, n: int = 1):
        self.deltas: dict[int, list[Delta]] = {index: [] for index in range(n)}
        self.error: Exception | None = None
        self._events: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()

    def __call__(self, event: Delta | Exception) -> None:
        self._events.put(event)

    def wait(self) -> Answers:
        while self.error is None and not all(parts and parts[-1].finish for parts in self.deltas.values()):
            event = self._events.get(timeout=SECONDS)
            if isinstance(event, Delta):
                self.deltas[event.index].append(event)
            else:
                self.error = event
        return self

    def texts(self) -> list[str]:
        assert self.error is None
        return ["".join(part.text for part in parts) for parts in self.deltas.values()]

    def finishes(self) -> list[str | None]:
        return [parts[-1].finish for parts in self.deltas.values()]


def answers(scheduler: Scheduler, requests: Sequence[Request]) -> list[Answers]:
    """Submit all requests at once and wait for them."""
    found = [Answers(one.n) for one in requests]
    for one, sink in zip(requests, found, strict=True):
        scheduler.submit(one, sink)
    return [sink.wait() for sink in found]


def png(seed: int, size: int = 128) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(encoded: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def ask(text: str, encoded: bytes = b"") -> list[dict[str, Any]]:
    """Return messages as a client writes them."""
    if not encoded:
        return [{"role": "user", "content": text}]
    image = {"type": "image_url", "image_url": {"url": data_url(encoded)}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


class Running:
    """A server in a thread of this process."""

    def __init__(self, service: Service, **options: Any):
        config = uvicorn.Config(make_app(service), port=0, log_config=None, ws="none", **options)
        self.service, self.server = service, uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> Running:
        self.thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.should_exit = True
        self.thread.join()

    def send(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and body (JSON where it is) of a raw request."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, content, {"Content-Type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            found = response.read()
            kind = response.headers.get_content_type()
            return (
                response.status,
                {name.lower(): value for name, value in response.headers.items()},
                json.loads(found) if kind == "application/json" else found.decode(),
            )

    def chat(self, body: dict[str, Any], **options: Any) -> tuple[int, dict[str, str], Any]:
        return self.send("POST", "/v1/chat/completions", {"model": self.service.name} | body, **options)


def until(condition: Any) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def closing(scheduler: Scheduler) -> Iterator[Scheduler]:
    try:
        yield scheduler
    finally:
        scheduler.close()


NAME = "scenes-base"
IMAGE = png(0)
QUESTIONS = ["Describe the image.", "Is there a cup in the image?", "How many cups are there?", "What color is it?"]
