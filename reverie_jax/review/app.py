"""The HTTP side of a review: routes, key, headers."""

from __future__ import annotations

import base64
import hmac
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reverie_jax.data.images import small_jpeg
from reverie_jax.errors import UserError
from reverie_jax.review.index import Filters, Sample
from reverie_jax.review.pages import Change, Review

IMAGE_SIDE = 1024
"""Longest side of images, in pixels."""
MAX_BODY_BYTES = 1 << 20
_FILES = {"review.css": "text/css", "review.js": "text/javascript"}
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}


class _Guard:
    """Asks for the key, if there is one, and forbids pages to load or run anything from elsewhere."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS.items()]
            await send(message)

        if scope["type"] == "http" and self.key and not self._is_shown(Request(scope)):
            asks = {"WWW-Authenticate": 'Basic realm="review: any name, and the key as password", charset="UTF-8"'}
            await PlainTextResponse("missing or wrong key", 401, asks)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _is_shown(self, request: Request) -> bool:
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(shown.encode(), self.key.encode())


async def _read_change(request: Request) -> Change:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Other pages in the browser may send other types here without asking.
        raise HTTPException(415, "the body must be JSON")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise HTTPException(413, f"more than {MAX_BODY_BYTES >> 20} MiB")
    try:
        return Change.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None


def _filters(query: Mapping[str, str]) -> tuple[Filters, int, int | None]:
    """Return the filters of an address, and which samples the page comes after and before."""
    try:
        after, before = (int(query[name]) if query.get(name) else None for name in ("after", "before"))
        if not all(0 <= (number or 0) < 2**63 for number in (after, before)):  # as the database counts
            raise ValueError("out of range")
        return Filters.model_validate(dict(query)), after or 0, before
    except ValueError as error:  # which pydantic's are too
        raise HTTPException(400, f"a filter must be a number: {' '.join(str(error).split())[:200]}") from None


def make_app(review: Review, key: str = "", hosts: Sequence[str] = ()) -> Starlette:
    """Return the ASGI application.

    Args:
        review: The samples and marks.
        key: The key that requests must show; empty for none.
        hosts: Without a key, names by which a browser may call this server: pages elsewhere could otherwise read it by a
            name of their own that leads here.
    """

    def find(request: Request) -> Sample:
        sample = review.index.find(request.path_params["number"])
        if sample is None or sample.digest != request.path_params["digest"]:
            # A tab may be older than the server, which numbers other files anew.
            raise HTTPException(409, "the files have changed since this page was loaded; load it again")
        return sample

    def page(request: Request) -> Response:
        filters, after, before = _filters(request.query_params)
        return HTMLResponse(review.page(filters, after=after, before=before), headers={"Cache-Control": "no-store"})

    def image(request: Request) -> Response:
        sample = find(request)
        try:
            content = small_jpeg(review.index.image(sample), sample.image, IMAGE_SIDE)
        except UserError as error:
            raise HTTPException(404, str(error)) from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    async def mark(request: Request) -> Response:
        sample, change = await run_in_threadpool(find, request), await _read_change(request)
        return HTMLResponse(await run_in_threadpool(review.record, sample, change))

    def agreement(request: Request) -> Response:
        return HTMLResponse(review.agreement())

    def marks(request: Request) -> Response:
        return FileResponse(review.marks.path, media_type="application/jsonl", filename=review.marks.path.name)

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            raise HTTPException(404, f"no file {name}")
        content = (importlib.resources.files("reverie_jax.review") / name).read_bytes()
        return Response(content, media_type=_FILES[name])

    def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        return JSONResponse({"error": error.detail if isinstance(error, HTTPException) else str(error)}, status)

    routes = [
        Route("/", page),
        Route("/image/{number:int}/{digest}", image),
        Route("/marks/{number:int}/{digest}", mark, methods=["POST"]),
        Route("/agreement", agreement),
        Route("/marks.jsonl", marks),
        Route("/{name}", file),
    ]
    middleware = [Middleware(_Guard, key=key)]
    if not key:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", *hosts]))
    handlers: Any = {HTTPException: failed, UserError: failed}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
