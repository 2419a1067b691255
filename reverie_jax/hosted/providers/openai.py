"""Any server with OpenAI's chat completions API: GPT, vLLM, SGLang and others."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from reverie_jax.hosted.images import encode_image
from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    BatchStatus,
    Reply,
    Request,
    RequestSettings,
    RetryableError,
    UnusableError,
)
from reverie_jax.hosted.providers.common import (
    TRANSFER_TIMEOUT,
    UNEXPECTED,
    parse_result_lines,
    parse_retry_after,
    redact,
)


class OpenAI:
    """OpenAI-compatible models; does not retry, the runner does."""

    name = "openai"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # local servers need no key, but the client does
            base_url=url,
            max_retries=0,
            timeout=settings.timeout,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _body(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        if request.send_image:
            kind, encoded = encode_image(request.image)
            data = base64.b64encode(encoded).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        if self._settings.max_new_tokens is not None:
            body["max_completion_tokens"] = self._settings.max_new_tokens
        if request.schema and self._settings.structured:
            schema = {"name": request.stage, "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def ask(self, request: Request) -> Reply:
        """Send one request; see `Provider.ask`."""
        async with self._translate_errors(self._settings.timeout):
            completion = await self._client.chat.completions.create(**self._body(request))
        return self._parse(completion)

    @contextlib.asynccontextmanager
    async def _translate_errors(self, timeout: float) -> AsyncIterator[None]:
        """Raise the SDK's errors as ours."""
        try:
            async with asyncio.timeout(timeout):  # the SDK's timeout is for each read
                yield
        except (TimeoutError, openai.APITimeoutError):
            raise RetryableError(f"no reply within {timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise RetryableError(
                redact(f"connection failed ({error.__cause__ or error})", self._key), reached=False
            ) from None
        except openai.APIStatusError as error:
            after = parse_retry_after(error.response.headers.get("retry-after"))
            raise self._error_from_status(error.status_code, error.message, error.code, after) from None
        except (
            openai.OpenAIError,
            ValueError,
            AttributeError,
        ) as error:  # another kind of response, such as a web page
            raise RetryableError(redact(f"{UNEXPECTED} ({error})", self._key)) from None

    # Batches.

    max_requests, max_bytes = 50_000, 190_000_000

    def encode_request(self, key: str, request: Request) -> str:
        """Return a request as a line of a batch file."""
        row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": self._body(request)}
        return json.dumps(row)

    async def submit(self, file: Path, label: str) -> str:
        """Upload a file and create its batch; return its name."""
        async with self._translate_errors(TRANSFER_TIMEOUT):
            uploaded = await self._client.files.create(file=file, purpose="batch", timeout=TRANSFER_TIMEOUT)
            batch = await self._client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"label": label},
            )
            return batch.id

    async def find_batch(self, label: str) -> str | None:
        """Return the name of the batch with our label, or None."""
        async with self._translate_errors(self._settings.timeout):
            async for batch in self._client.batches.list(limit=100):
                if (batch.metadata or {}).get("label") == label:
                    return batch.id
        return None

    async def get_status(self, name: str) -> BatchStatus:
        """Return the state of a batch."""
        async with self._translate_errors(self._settings.timeout):
            batch = await self._client.batches.retrieve(name)
            errors = (batch.errors.data or []) if batch.errors else []
            reason = "" if batch.status == "completed" else f"the batch is {batch.status}"
            if errors and errors[0].message:
                reason = redact(f"{reason}: {errors[0].message}", self._key)
            files = tuple(file for file in (batch.output_file_id, batch.error_file_id) if file)
            return BatchStatus(batch.status in ("completed", "failed", "expired", "cancelled"), reason, files)

    async def fetch_results(self, status: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        """Return (key, reply or error) of each request that has a result."""
        results: list[tuple[str, Reply | AnnotationError]] = []
        for file in status.result_files:
            async with self._translate_errors(TRANSFER_TIMEOUT):
                content = await self._client.files.content(file, timeout=TRANSFER_TIMEOUT)
            results += parse_result_lines(content.content, self._parse_result)
        return results

    def _parse_result(self, line: bytes) -> tuple[str, Reply | AnnotationError] | None:
        try:
            row = json.loads(line)
            key, response, error = row["custom_id"], row.get("response") or {}, row.get("error") or {}
            if not isinstance(key, str):
                return None
            code, body = response.get("status_code"), response.get("body") or {}
            if code == 200:
                return key, self._parse(ChatCompletion.construct(**body))
            if not response:  # the batch expired before this request was processed
                return key, RetryableError(redact(f"{error.get('code')}: {error.get('message')}", self._key))
            error = body.get("error") or error
            return key, self._error_from_status(code or 500, str(error.get("message")), error.get("code"), None)
        except AnnotationError as problem:
            return key, problem
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _error_from_status(
        self, code: int, message: str, kind: str | None, retry_after: float | None
    ) -> AnnotationError:
        text = redact(f"{code}: {message}", self._key)
        if code in (408, 409, 429) or code >= 500:
            if code == 429 and kind == "insufficient_quota":
                return AccessError(text)
            return RetryableError(f"the API returned status {code}", retry_after)
        if code in (401, 403, 404):
            return AccessError(f"openai:{self.model}: {text}")
        return UnusableError(text)  # 400, 413, 422: concerns this request only

    def _parse(self, completion: Any) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
            raise RetryableError(f"{UNEXPECTED} (no choices)")
        choice, usage = choices[0], completion.usage
        reply = Reply(
            choice.message.content or "",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            completion.model or "",
        )
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            raise UnusableError(f"blocked ({choice.message.refusal or choice.finish_reason})", reply)
        if choice.finish_reason == "length":
            raise UnusableError("cut off at the maximum length", reply)
        if not reply.text.strip():
            raise UnusableError("an empty reply", reply)
        return reply
