"""Gemini through google-genai, the maintained SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from google import genai
from google.genai import errors, types

from reverie_jax.hosted.images import as_sent
from reverie_jax.hosted.interface import AnnotationError, BatchStatus, Reply, Request, RequestSettings, TryAgain
from reverie_jax.hosted.providers.common import TRANSFER, hide, read_lines, seconds
from reverie_jax.hosted.providers.google_replies import reply, status

_WIRES = {"httpx", "httpx2", "httpcore", "aiohttp", "anyio", "ssl"}
"""Packages whose errors are the wire's: which of them the SDK uses depends on what is installed."""
_HTTP = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 13: 500, 14: 503, 16: 401}
"""A batch's lines may name an error by google.rpc.Code."""


class Gemini:
    """One request, one reply, or many in a batch; retries are the runner's."""

    name = "gemini"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        once = types.HttpRetryOptions(attempts=1)  # left to itself, the SDK may retry behind our back
        options = types.HttpOptions(base_url=url, timeout=int(settings.timeout * 1000), retry_options=once)
        self._client = genai.Client(api_key=key, http_options=options, vertexai=False).aio

    async def close(self) -> None:
        await self._client.aclose()

    def _content(self, request: Request) -> tuple[types.Content, types.GenerateContentConfig]:
        parts: list[Any] = [types.Part.from_text(text=request.prompt)]
        if request.shown:
            kind, encoded = as_sent(request.picture)
            parts.insert(0, types.Part.from_bytes(data=encoded, mime_type=kind))
        config = types.GenerateContentConfig(
            temperature=self._settings.temperature, max_output_tokens=self._settings.longest
        )
        if request.schema and self._settings.structured:
            config.response_mime_type = "application/json"
            config.response_json_schema = dict(request.schema)
        return types.Content(role="user", parts=parts), config

    async def ask(self, request: Request) -> Reply:
        content, config = self._content(request)
        async with self._faults(self._settings.timeout):
            found = await self._client.models.generate_content(model=self.model, contents=content, config=config)
        return reply(found)

    @contextlib.asynccontextmanager
    async def _faults(self, timeout: float) -> AsyncIterator[None]:
        """The SDK's errors as ours."""
        try:
            async with asyncio.timeout(timeout):  # the SDK's own is for each read
                yield
        except errors.APIError as error:
            raise status(
                error.code, error.message or "", retry_after(error), f"gemini:{self.model}", self._key
            ) from None
        except (TimeoutError, OSError, ValueError, KeyError) as error:  # what came back is no JSON, or lacks a part
            raise _wire(error, timeout, self._key) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in _WIRES:
                raise
            raise _wire(error, timeout, self._key) from None

    # Batches.

    most, room = 100_000, 1_900_000_000

    def line(self, key: str, request: Request) -> str:
        content, config = self._content(request)
        body = {"contents": [_plain(content)], "generationConfig": _plain(config)}
        return json.dumps({"key": key, "request": body})

    async def submit(self, file: Path, label: str) -> str:
        slow = types.HttpOptions(timeout=int(TRANSFER * 1000))
        async with self._faults(TRANSFER):
            uploaded = await self._client.files.upload(
                file=file,
                config=types.UploadFileConfig(mime_type="application/jsonl", display_name=label, http_options=slow),
            )
            made = await self._client.batches.create(
                model=self.model, src=uploaded.name or "", config=types.CreateBatchJobConfig(display_name=label)
            )
        if not made.name:
            raise TryAgain("the service's reply makes no sense (a batch without a name)")
        return made.name

    async def find(self, label: str) -> str | None:
        async with self._faults(self._settings.timeout):
            pages = await self._client.batches.list(config=types.ListBatchJobsConfig(page_size=100))
            while True:  # page by page: the SDK's own iteration ends with an error behind two empty ones
                for batch in pages.page:
                    if batch.display_name == label:
                        return batch.name
                try:
                    await pages.next_page()
                except IndexError:
                    return None

    async def look(self, name: str) -> BatchStatus:
        async with self._faults(self._settings.timeout):
            found = await self._client.batches.get(name=name)
        state = found.state.name if found.state else ""
        word = state.removeprefix("JOB_STATE_").lower().replace("_", " ")
        error = hide(f": {found.error.message}", self._key) if found.error and found.error.message else ""
        file = found.dest.file_name if found.dest else None
        reason = "" if state == "JOB_STATE_SUCCEEDED" else f"the batch is {word}{error}"
        return BatchStatus(bool(found.done), reason, (file,) if file else ())

    async def results(self, batch: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        found: list[tuple[str, Reply | AnnotationError]] = []
        for file in batch.results:
            async with self._faults(TRANSFER):
                content = await self._client.files.download(file=file)
            found += read_lines(content, self._result)
        return found

    def _result(self, line: bytes) -> tuple[str, Reply | AnnotationError] | None:
        try:
            row = json.loads(line)
            key = row["key"]
            if not isinstance(key, str):
                return None
            if "response" in row:
                made = types.GenerateContentResponse._from_response(response=row["response"], kwargs={})
                return key, reply(made)
            said = row.get("error") or row.get("status") or {}
            code = _HTTP.get(int(said["code"]), int(said["code"])) if "code" in said else None
            return key, status(code, str(said.get("message")), None, f"gemini:{self.model}", self._key)
        except AnnotationError as problem:
            return key, problem
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _plain(model: Any) -> Any:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _wire(error: Exception, timeout: float, key: str) -> TryAgain:
    if "timeout" in type(error).__name__.lower():
        return TryAgain(f"no reply within {timeout:g} s")
    if isinstance(error, ValueError):
        return TryAgain("the service's reply makes no sense")
    return TryAgain(hide(f"connection failed ({type(error).__name__})", key), reached=False)


def retry_after(error: errors.APIError) -> float | None:
    """Seconds that the service asks for: in the header, or in the body's google.rpc.RetryInfo."""
    headers = getattr(error.response, "headers", None) or {}
    if (found := seconds(headers.get("retry-after") or headers.get("Retry-After"))) is not None:
        return found
    delay = re.search(r"'retryDelay': '([\d.]+)s'", str(error.details))
    return float(delay[1]) if delay else None
