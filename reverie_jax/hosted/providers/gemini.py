"""Gemini through google-genai, the maintained SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from google import genai
from google.genai import errors, types

from reverie_jax.files import well_formed
from reverie_jax.hosted.images import encode_image
from reverie_jax.hosted.interface import AnnotationError, BatchStatus, Reply, Request, RequestSettings, RetryableError
from reverie_jax.hosted.providers.common import (
    TRANSFER_TIMEOUT,
    UNEXPECTED,
    broken_off,
    is_transport_error,
    parse_result_lines,
    redact,
    timed_out,
)
from reverie_jax.hosted.providers.failures import read_reply, sort_submission
from reverie_jax.hosted.providers.google_replies import ROLES, error_from_body, parse_response, read_operation


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

    def _contents(self, request: Request) -> tuple[list[types.Content], types.GenerateContentConfig]:
        parts: list[list[types.Part]] = [
            [types.Part.from_text(text=well_formed(text))] for text in request.turns or (request.prompt,)
        ]
        if request.send_image:
            kind, encoded = encode_image(request.image, self._settings.max_image_size)
            parts[0].insert(0, types.Part.from_bytes(data=encoded, mime_type=kind))
        config = types.GenerateContentConfig(
            temperature=self._settings.temperature, max_output_tokens=self._settings.max_new_tokens
        )
        if request.schema and self._settings.structured:
            config.response_mime_type = "application/json"
            config.response_json_schema = dict(request.schema)
        return [types.Content(role=ROLES[n % 2], parts=turn) for n, turn in enumerate(parts)], config

    async def ask(self, request: Request) -> Reply:
        """Send one request; see `Provider.ask`."""
        contents, config = self._contents(request)
        sent = " ".join(_plain(config))
        config.should_return_http_response = True  # the raw text: the SDK's own reading loses what it does not know
        async with self._translate_errors(self._settings.timeout, sent, asked=True):
            response = await self._client.models.generate_content(model=self.model, contents=contents, config=config)
        http = response.sdk_http_response
        return read_reply((http.body if http else None) or "", self._parse, self._key)

    def _parse(self, body: Any) -> Reply:
        return parse_response(body, f"gemini:{self.model}", self._key, self._settings)

    @contextlib.asynccontextmanager
    async def _translate_errors(self, timeout: float, sent: str = "", *, asked: bool = False) -> AsyncIterator[None]:
        """Raise the SDK's errors as ours.

        Args:
            timeout: Seconds that the service has.
            sent: Names of the optional parameters of the request.
            asked: Whether a model is asked.
        """
        try:
            async with asyncio.timeout(timeout):  # the SDK's timeout is for each read
                yield
        except errors.APIError as error:
            headers = getattr(error.response, "headers", None) or {}
            header = headers.get("retry-after") or headers.get("Retry-After")
            source = f"gemini:{self.model}"
            raise error_from_body(error.code, error.details, source, self._key, header, sent=sent) from None
        except (ValueError, KeyError, AttributeError) as error:  # not JSON, or incomplete
            raise RetryableError(redact(f"{UNEXPECTED} ({error})", self._key)) from None
        except Exception as error:
            if not is_transport_error(error):
                raise
            raise _connection_error(error, timeout, self._key, asked=asked) from None

    # Batches.

    max_requests, max_bytes = 100_000, 1_900_000_000

    def encode_request(self, key: str, request: Request) -> str:
        """Return a request as a line of a batch file."""
        contents, config = self._contents(request)
        body = {"contents": list(map(_plain, contents)), "generationConfig": _plain(config)}
        return json.dumps({"key": key, "request": body})

    async def submit(self, file: Path, label: str) -> str:
        """Upload a file and create its batch; return its name."""
        slow = types.HttpOptions(timeout=int(TRANSFER_TIMEOUT * 1000))
        try:
            async with self._translate_errors(TRANSFER_TIMEOUT):
                uploaded = await self._client.files.upload(
                    file=file,
                    config=types.UploadFileConfig(mime_type="application/jsonl", display_name=label, http_options=slow),
                )
                batch = await self._client.batches.create(
                    model=self.model, src=uploaded.name or "", config=types.CreateBatchJobConfig(display_name=label)
                )
        except AnnotationError as error:
            raise sort_submission(error) from None
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
        # As the SDK's `batches.get`, but the raw operation: the SDK reads neither its error, nor whether it is done, nor a
        # file that only its response names.
        async with self._translate_errors(self._settings.timeout):
            response = await self._client._api_client.async_request("get", name, {})
            operation = json.loads(response.body or "")
            if not isinstance(operation, dict):
                raise ValueError("no JSON object")
        return read_operation(operation, f"gemini:{self.model}", self._key)

    async def fetch_results(self, status: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        """Return (key, reply or error) of each request that has a result."""
        results: list[tuple[str, Reply | AnnotationError]] = []
        for file in status.result_files:
            async with self._translate_errors(TRANSFER_TIMEOUT):
                content = await self._client.files.download(file=file)
            results += parse_result_lines(content, "key", self._parse_result, self._key)
        if status.lines:
            results += parse_result_lines(status.lines, "key", self._parse_result, self._key)
        return results

    def _parse_result(self, row: Mapping[str, Any]) -> Reply:
        if row.get("response") is not None:
            return self._parse(row["response"])
        raise error_from_body(None, row.get("error") or row.get("status"), f"gemini:{self.model}", self._key)


def _plain(model: Any) -> Any:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _connection_error(error: Exception, timeout: float, key: str, *, asked: bool) -> RetryableError:
    name = type(error).__name__
    if "timeout" in name.lower() and "connect" not in name.lower():
        return timed_out(timeout, b"", key, asked=asked)
    if "body" in str(error) or "payload" in name.lower():  # httpx: "without sending complete message body"
        return broken_off(error, b"", key)
    return RetryableError(redact(f"connection failed ({name})", key), reached=False)
