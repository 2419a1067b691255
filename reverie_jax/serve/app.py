"""The HTTP side: routes, keys, limits, streams."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reverie_jax.serve import chat
from reverie_jax.serve.answers import Delta
from reverie_jax.serve.errors import ApiError
from reverie_jax.serve.metrics import CONTENT_TYPE, Metrics
from reverie_jax.serve.scheduler import Request, Scheduler, Stopped

MAX_BODY_BYTES = 32 << 20
"""Size of a request: an image of 20 MiB in base64, and its text."""
_OVERFLOW = 8
"""The body of a refused request is read to its end, up to this many times the limit."""
_PREPARED_AT_ONCE = 4
"""Images that are decoded at the same time: one of 80 million pixels takes 240 MB."""


@dataclasses.dataclass
class Service:
    """What the routes need.

    Attributes:
        scheduler: Answers.
        name: Name of the model.
        key: The key that requests must show; empty for none.
        max_new_tokens: Maximum length of an answer, where a request names none.
        max_requests: Requests at once, those that wait included; more are refused.
        hosts: Hosts that images may be downloaded from.
    """

    scheduler: Scheduler
    name: str
    key: str = ""
    max_new_tokens: int = 512
    max_requests: int = 256
    hosts: Collection[str] = ()

    def __post_init__(self) -> None:
        self.created, self.in_flight = int(time.time()), 0
        self._limiter = anyio.CapacityLimiter(_PREPARED_AT_ONCE)

    @property
    def metrics(self) -> Metrics:
        """Where requests are counted."""
        return self.scheduler.metrics

    def check_key(self, request: HttpRequest) -> None:
        """Check a request's key.

        Raises:
            ApiError: It is missing or wrong.
        """
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(shown.strip().encode(), self.key.encode())
        if self.key and not (right and scheme.lower() == "bearer"):
            raise ApiError(401, "missing or wrong key; send it as `Authorization: Bearer KEY`", code="invalid_api_key")

    def check_model(self, name: str) -> None:
        """Check that a request means the model that is served.

        Raises:
            ApiError: It means another one.
        """
        if name != self.name:
            raise ApiError(
                404, f"model {name!r} is not served here; use {self.name!r}", param="model", code="model_not_found"
            )

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it is handled.

        Raises:
            ApiError: There are too many.
        """
        if not self.scheduler.healthy:
            raise ApiError(503, "the server is shutting down")
        if self.in_flight >= self.max_requests:
            after = self.scheduler.retry_after()
            raise ApiError(
                429,
                f"{self.in_flight} requests are waiting or running, the limit; retry after {after} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(after)},
            )
        self.in_flight += 1
        try:
            self.metrics.in_flight.set(self.in_flight)
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    async def prepare(self, body: chat.ChatRequest) -> Request:
        """Decode the image and tokenize in a thread; see `chat.prepare`."""
        engine = self.scheduler.engine
        context = min(engine.processor.context, engine.shape.sequence_length)
        options: Any = {"context": context, "max_new_tokens": self.max_new_tokens, "hosts": self.hosts}
        work = functools.partial(chat.prepare, body, engine.processor, **options)
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    async def deltas(self, request: Request) -> AsyncGenerator[Delta]:
        """Yield what is new of the answers until all have ended; a caller that leaves gives the request up.

        Raises:
            ApiError: The server failed or stops.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Delta | Exception]()
        try:
            ticket = self.scheduler.submit(request, lambda event: _put(loop, events, event))
        except Stopped as error:
            raise ApiError(503, str(error)) from None
        try:
            remaining = request.n
            while remaining:
                event = await events.get()
                if not isinstance(event, Delta):
                    raise ApiError(503 if not self.scheduler.healthy else 500, str(event))
                remaining -= event.finish is not None
                yield event
        finally:
            ticket.cancel()


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Delta | Exception], event: Delta | Exception) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


def _check_type(request: HttpRequest) -> None:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Web pages may send other types to a server on loopback without asking.
        raise ApiError(415, "the body must be JSON: send `Content-Type: application/json`")


async def _read_body(request: HttpRequest, limit: int) -> bytes | None:
    """Return the body; None if it is larger than `limit`, the rest of which is read but not kept.

    A client that is still sending when its connection is closed would not see the error.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _OVERFLOW * MAX_BODY_BYTES:
            break
    return b"".join(parts) if size <= limit else None


class ChatCompletions:
    """The route /v1/chat/completions: an ASGI application, so that a request counts until its response is sent."""

    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        http, service = HttpRequest(scope, receive), self.service
        with contextlib.suppress(ClientDisconnect), contextlib.ExitStack() as stack:
            try:
                service.check_key(http)
                _check_type(http)
                stack.enter_context(service.admitted())
            except ApiError:
                await _read_body(http, 0)
                raise
            if (content := await _read_body(http, MAX_BODY_BYTES)) is None:
                raise ApiError(413, f"the request is larger than {MAX_BODY_BYTES >> 20} MiB; scale its image down")
            body = chat.parse(content)
            service.check_model(body.model)
            request = await service.prepare(body)
            response = chat.Response(body, request)
            if body.stream:
                async with contextlib.aclosing(self._events(request, response)) as events:
                    headers = {"Cache-Control": "no-cache"}
                    stream = StreamingResponse(events, media_type="text/event-stream", headers=headers)
                    await stream(scope, receive, send)
            elif (whole := await self._whole(request, response, receive)) is not None:
                await whole(scope, receive, send)

    async def _whole(self, request: Request, response: chat.Response, receive: Receive) -> HttpResponse | None:
        """Return the completion; None if the client left before."""

        async def collect() -> list[Delta]:
            async with contextlib.aclosing(self.service.deltas(request)) as deltas:
                return [delta async for delta in deltas]

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answers = asyncio.create_task(collect())
        tasks = answers, asyncio.create_task(left())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(response.whole(await answers)) if answers.done() else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _events(self, request: Request, response: chat.Response) -> AsyncGenerator[bytes]:
        """Yield server-sent events."""
        try:
            for chunk in response.opening(request.n):
                yield _event(chunk)
            async with contextlib.aclosing(self.service.deltas(request)) as deltas:
                async for delta in deltas:
                    if (found := response.chunk(delta)) is not None:
                        yield _event(found)
            if (last := response.closing()) is not None:
                yield _event(last)
        except ApiError as error:  # the status was sent long ago
            yield _event(error.body())
        yield b"data: [DONE]\n\n"


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _Counted:
    """Counts responses by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


def _failed(request: HttpRequest, error: Exception) -> HttpResponse:
    """Return an error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    elif not isinstance(error, ApiError):
        error = ApiError(500, f"{type(error).__name__}; see the server's log")
    return JSONResponse(error.body(), error.status, headers=error.headers)


def make_app(service: Service) -> Starlette:
    """Return the ASGI application; when it ends, it closes the scheduler."""

    def card() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "reverie-jax"}

    async def models(request: HttpRequest) -> HttpResponse:
        service.check_key(request)
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [card()]})
        service.check_model(name)
        return JSONResponse(card())

    async def health(request: HttpRequest) -> HttpResponse:
        healthy = service.scheduler.healthy
        return JSONResponse({"status": "ok" if healthy else "stopped"}, 200 if healthy else 503)

    async def metrics(request: HttpRequest) -> HttpResponse:
        service.check_key(request)
        return HttpResponse(service.metrics.text(), media_type=CONTENT_TYPE)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.scheduler.close)

    routes = [
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers: Any = dict.fromkeys((ApiError, HTTPException, Exception), _failed)
    paths = [route.path for route in routes]
    counted = Middleware(_Counted, metrics=service.metrics, paths=paths)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[counted], lifespan=lifespan)
