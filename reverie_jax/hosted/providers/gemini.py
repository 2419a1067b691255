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

from reverie_jax.hosted.images import encode_image
from reverie_jax.hosted.interface import AnnotationError, BatchStatus, Reply, Request, RequestSettings, RetryableError
from reverie_jax.hosted.providers.common import (
    TRANSFER_TIMEOUT,
    UNEXPECTED,
    parse_result_lines,
    parse_retry_after,
    redact,
)
from reverie_jax.hosted.providers.google_replies import error_from_status, parse_response

_TRANSPORTS = {"httpx", "httpx2", "httpcore", "aiohttp", "anyio", "ssl"}
"""Packages whose errors are connection errors; which of them the SDK uses depends on what is installed."""
_HTTP = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 13: 500, 14: 503, 16: 401}
"""HTTP status by google.rpc.Code, which batch results use."""


class Gemini:
    """Gemini models; does not retry, the runner does."""

    name = "gemini"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        no_retry = types.HttpRetryOptions(attempts=1)  # by default the SDK may retry by itself
        options = types.HttpOptions(base_url=url, timeout=int(settings.timeout * 1000), retry_options=no_retry)
        self._client = genai.Client(api_key=key, http_options=options, vertexai=False).aio

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _content(self, request: Request) -> tuple[types.Content, types.GenerateContentConfig]:
        parts: list[Any] = [types.Part.from_text(text=request.prompt)]
        if request.send_image:
            kind, encoded = encode_image(request.image)
            parts.insert(0, types.Part.from_bytes(data=encoded, mime_type=kind))
        config = types.GenerateContentConfig(
            temperature=self._settings.temperature, max_output_tokens=self._settings.max_new_tokens
        )
        if request.schema and self._settings.structured:
            config.response_mime_type = "application/json"
            config.response_json_schema = dict(request.schema)
        return types.Content(role="user", parts=parts), config

    async def ask(self, request: Request) -> Reply:
        """Send one request; see `Provider.ask`."""
        content, config = self._content(request)
        async with self._translate_errors(self._settings.timeout):
            response = await self._client.models.generate_content(model=self.model, contents=content, config=config)
        return parse_response(response)

    @contextlib.asynccontextmanager
    async def _translate_errors(self, timeout: float) -> AsyncIterator[None]:
        """Raise the SDK's errors as ours."""
        try:
            async with asyncio.timeout(timeout):  # the SDK's timeout is for each read
                yield
        except errors.APIError as error:
            raise error_from_status(
                error.code, error.message or "", retry_after(error), f"gemini:{self.model}", self._key
            ) from None
        except (TimeoutError, OSError, ValueError, KeyError) as error:  # the response is not JSON, or incomplete
            raise _connection_error(error, timeout, self._key) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in _TRANSPORTS:
                raise
            raise _connection_error(error, timeout, self._key) from None

    # Batches.

    max_requests, max_bytes = 100_000, 1_900_000_000

    def encode_request(self, key: str, request: Request) -> str:
        """Return a request as a line of a batch file."""
        content, config = self._content(request)
        body = {"contents": [_plain(content)], "generationConfig": _plain(config)}
        return json.dumps({"key": key, "request": body})

    async def submit(self, file: Path, label: str) -> str:
        """Upload a file and create its batch; return its name."""
        slow = types.HttpOptions(timeout=int(TRANSFER_TIMEOUT * 1000))
        async with self._translate_errors(TRANSFER_TIMEOUT):
            uploaded = await self._client.files.upload(
                file=file,
                config=types.UploadFileConfig(mime_type="application/jsonl", display_name=label, http_options=slow),
            )
            batch = await self._client.batches.create(
                model=self.model, src=uploaded.name or "", config=types.CreateBatchJobConfig(display_name=label)
            )
        if not batch.name:
            raise RetryableError(f"{UNEXPECTED} (a batch without a name)")
        return batch.name

    async def find_batch(self, label: str) -> str | None:
        """Return the name of the batch with our label, or None."""
        async with self._translate_errors(self._settings.timeout):
            pages = await self._client.batches.list(config=types.ListBatchJobsConfig(page_size=100))
            while True:  # the SDK's own iteration fails after two empty pages
                for batch in pages.page:
                    if batch.display_name == label:
                        return batch.name
                try:
                    await pages.next_page()
                except IndexError:
                    return None

    async def get_status(self, name: str) -> BatchStatus:
        """Return the state of a batch."""
        async with self._translate_errors(self._settings.timeout):
            batch = await self._client.batches.get(name=name)
        state = batch.state.name if batch.state else ""
        word = state.removeprefix("JOB_STATE_").lower().replace("_", " ")
        error = redact(f": {batch.error.message}", self._key) if batch.error and batch.error.message else ""
        file = batch.dest.file_name if batch.dest else None
        reason = "" if state == "JOB_STATE_SUCCEEDED" else f"the batch is {word}{error}"
        return BatchStatus(bool(batch.done), reason, (file,) if file else ())

    async def fetch_results(self, status: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        """Return (key, reply or error) of each request that has a result."""
        results: list[tuple[str, Reply | AnnotationError]] = []
        for file in status.result_files:
            async with self._translate_errors(TRANSFER_TIMEOUT):
                content = await self._client.files.download(file=file)
            results += parse_result_lines(content, self._parse_result)
        return results

    def _parse_result(self, line: bytes) -> tuple[str, Reply | AnnotationError] | None:
        try:
            row = json.loads(line)
            key = row["key"]
            if not isinstance(key, str):
                return None
            if "response" in row:
                response = types.GenerateContentResponse._from_response(response=row["response"], kwargs={})
                return key, parse_response(response)
            error = row.get("error") or row.get("status") or {}
            code = _HTTP.get(int(error["code"]), int(error["code"])) if "code" in error else None
            return key, error_from_status(code, str(error.get("message")), None, f"gemini:{self.model}", self._key)
        except AnnotationError as problem:
            return key, problem
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _plain(model: Any) -> Any:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _connection_error(error: Exception, timeout: float, key: str) -> RetryableError:
    if "timeout" in type(error).__name__.lower():
        return RetryableError(f"no reply within {timeout:g} s")
    if isinstance(error, ValueError):
        return RetryableError(UNEXPECTED)
    return RetryableError(redact(f"connection failed ({type(error).__name__})", key), reached=False)


def retry_after(error: errors.APIError) -> float | None:
    """Return the seconds to wait, of the Retry-After header or of google.rpc.RetryInfo in the body."""
    headers = getattr(error.response, "headers", None) or {}
    if (wait := parse_retry_after(headers.get("retry-after") or headers.get("Retry-After"))) is not None:
        return wait
    delay = re.search(r"'retryDelay': '([\d.]+)s'", str(error.details))
    return float(delay[1]) if delay else None
