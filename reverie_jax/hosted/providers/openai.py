"""Any service that speaks OpenAI's chat completions: GPT, vLLM, SGLang and others."""

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

from reverie_jax.hosted.images import as_sent
from reverie_jax.hosted.interface import (
    AnnotationError,
    BatchStatus,
    NoAccess,
    Refused,
    Reply,
    Request,
    RequestSettings,
    TryAgain,
)
from reverie_jax.hosted.providers.common import TRANSFER, hide, read_lines, seconds


class OpenAI:
    """One request, one completion, or many in a batch; retries are the runner's."""

    name = "openai"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # local servers want none, and the client wants one
            base_url=url,
            max_retries=0,
            timeout=settings.timeout,
        )

    async def close(self) -> None:
        await self._client.close()

    def _body(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        if request.shown:
            kind, encoded = as_sent(request.picture)
            data = base64.b64encode(encoded).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        if self._settings.longest is not None:
            body["max_completion_tokens"] = self._settings.longest
        if request.schema and self._settings.structured:
            schema = {"name": request.stage, "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def ask(self, request: Request) -> Reply:
        async with self._faults(self._settings.timeout):
            found = await self._client.chat.completions.create(**self._body(request))
        return self._reply(found)

    @contextlib.asynccontextmanager
    async def _faults(self, timeout: float) -> AsyncIterator[None]:
        """The SDK's errors as ours."""
        try:
            async with asyncio.timeout(timeout):  # the SDK's own is for each read
                yield
        except (TimeoutError, openai.APITimeoutError):
            raise TryAgain(f"no reply within {timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise TryAgain(hide(f"connection failed ({error.__cause__ or error})", self._key), reached=False) from None
        except openai.APIStatusError as error:
            after = seconds(error.response.headers.get("retry-after"))
            raise self._status(error.status_code, error.message, error.code, after) from None
        except (openai.OpenAIError, ValueError, AttributeError) as error:  # a reply of another kind, as a web page
            raise TryAgain(hide(f"the service's reply makes no sense ({error})", self._key)) from None

    # Batches.

    most, room = 50_000, 190_000_000

    def line(self, key: str, request: Request) -> str:
        row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": self._body(request)}
        return json.dumps(row)

    async def submit(self, file: Path, label: str) -> str:
        async with self._faults(TRANSFER):
            uploaded = await self._client.files.create(file=file, purpose="batch", timeout=TRANSFER)
            made = await self._client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"label": label},
            )
            return made.id

    async def find(self, label: str) -> str | None:
        async with self._faults(self._settings.timeout):
            async for batch in self._client.batches.list(limit=100):
                if (batch.metadata or {}).get("label") == label:
                    return batch.id
        return None

    async def look(self, name: str) -> BatchStatus:
        async with self._faults(self._settings.timeout):
            found = await self._client.batches.retrieve(name)
            errors = (found.errors.data or []) if found.errors else []
            reason = "" if found.status == "completed" else f"the batch is {found.status}"
            if errors and errors[0].message:
                reason = hide(f"{reason}: {errors[0].message}", self._key)
            files = tuple(file for file in (found.output_file_id, found.error_file_id) if file)
            return BatchStatus(found.status in ("completed", "failed", "expired", "cancelled"), reason, files)

    async def results(self, batch: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        found: list[tuple[str, Reply | AnnotationError]] = []
        for file in batch.results:
            async with self._faults(TRANSFER):
                content = await self._client.files.content(file, timeout=TRANSFER)
            found += read_lines(content.content, self._result)
        return found

    def _result(self, line: bytes) -> tuple[str, Reply | AnnotationError] | None:
        try:
            row = json.loads(line)
            key, answer, error = row["custom_id"], row.get("response") or {}, row.get("error") or {}
            if not isinstance(key, str):
                return None
            code, body = answer.get("status_code"), answer.get("body") or {}
            if code == 200:
                return key, self._reply(ChatCompletion.construct(**body))
            if not answer:  # the batch expired before its turn came
                return key, TryAgain(hide(f"{error.get('code')}: {error.get('message')}", self._key))
            said = body.get("error") or error
            return key, self._status(code or 500, str(said.get("message")), said.get("code"), None)
        except AnnotationError as problem:
            return key, problem
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _status(self, code: int, message: str, kind: str | None, after: float | None) -> AnnotationError:
        said = hide(f"{code}: {message}", self._key)
        if code in (408, 409, 429) or code >= 500:
            if code == 429 and kind == "insufficient_quota":
                return NoAccess(said)
            return TryAgain(f"the service said {code}", after)
        if code in (401, 403, 404):
            return NoAccess(f"openai:{self.model}: {said}")
        return Refused(said)  # 400, 413, 422: this request will never pass, others may

    def _reply(self, found: Any) -> Reply:
        choices = getattr(found, "choices", None)
        if not choices:
            raise TryAgain("the service's reply makes no sense (no choices)")
        choice, usage = choices[0], found.usage
        reply = Reply(
            choice.message.content or "",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            found.model or "",
        )
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            raise Refused(f"blocked ({choice.message.refusal or choice.finish_reason})", reply)
        if choice.finish_reason == "length":
            raise Refused("cut off at the longest reply", reply)
        if not reply.text.strip():
            raise Refused("an empty reply", reply)
        return reply
