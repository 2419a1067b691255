"""Any server with OpenAI's chat completions API: GPT, vLLM, SGLang, Mistral, OpenRouter, Ollama and others."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import openai

from reverie_jax.files import well_formed
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
    broken_off,
    check_cut_off,
    is_transport_error,
    parse_result_lines,
    parse_retry_after,
    redact,
    timed_out,
)
from reverie_jax.hosted.providers.failures import (
    decode_body,
    find_words,
    is_queue_full,
    read_counts,
    read_reply,
    refuses_length,
    sort_failure,
    sort_submission,
)

_LENGTHS = ("max_completion_tokens", "max_tokens", "")
"""Names of the limit of a reply's length, tried in this order; not every server knows the first, and some know none."""
_CUT_OFF = ("length", "max_tokens", "model_length", "max_output_tokens")
_BLOCKED = ("content_filter", "sensitive", "safety", "recitation", "prohibited_content", "blocklist", "spii")
_BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource", "network_error", "timeout")
"""Reasons for the end of a reply that is not whole."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
"""Where servers put thoughts."""
_ENDED = {"completed", "failed", "expired", "cancelled", "canceled", "succeeded", "success", "timeout_exceeded"}
_ENDED_AT = ("completed_at", "failed_at", "expired_at", "cancelled_at")
"""States and times of a batch that has ended, with a file of results or without; any other state is waited for."""


class OpenAI:
    """OpenAI-compatible models; does not retry, the runner does."""

    name = "openai"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        self._length = 0  # index of the name in use
        self._hint = "" if url is None or url.rstrip("/").endswith("/v1") else "; does the address lack /v1?"
        if url is not None and url.rstrip("/").endswith("/completions"):
            self._hint = "; the address must end before /chat/completions"
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # local servers need no key, but the client does
            base_url=url,
            max_retries=0,
            # Shorter for connections, so that an address out of reach is not taken for a slow model.
            timeout=openai.Timeout(settings.timeout, connect=min(settings.timeout, 20.0)),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _body(self, request: Request) -> dict[str, Any]:
        first, *more = map(well_formed, request.turns or (request.prompt,))
        content: list[dict[str, Any]] = [{"type": "text", "text": first}]
        if request.send_image:
            kind, encoded = encode_image(request.image, self._settings.max_image_size)
            data = base64.b64encode(encoded).decode()
            # A prompt has its image behind it, as ever: replies in existing journals are to such requests.
            content.insert(
                0 if request.turns else 1, {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
            )
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        messages += [{"role": ("assistant", "user")[n % 2], "content": text} for n, text in enumerate(more)]
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        if self._settings.max_new_tokens is not None and (name := _LENGTHS[self._length]):
            body[name] = self._settings.max_new_tokens
        if request.schema and self._settings.structured:
            schema = {"name": request.stage, "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def ask(self, request: Request) -> Reply:
        """Send one request; see `Provider.ask`. One whose name of the length is refused is sent again with the next."""
        while True:
            tried, received = self._length, bytearray()
            async with self._translate_errors(self._settings.timeout, request, received):
                try:
                    body = self._body(request)
                    async with self._client.chat.completions.with_streaming_response.create(**body) as response:
                        async for chunk in response.iter_bytes():  # if the connection breaks, what came is kept
                            received += chunk
                    return read_reply(received.decode("utf-8", "replace"), self._parse, self._key)
                except openai.APIStatusError as error:
                    name = _LENGTHS[tried]
                    if not name or not refuses_length(error.status_code, decode_body(error.response.text), name):
                        raise
            self._length = max(self._length, tried + 1)

    @contextlib.asynccontextmanager
    async def _translate_errors(
        self, timeout: float, request: Request | None = None, received: bytes | bytearray = b""
    ) -> AsyncIterator[None]:
        """Raise the SDK's errors as ours; `received` grows by what comes of a reply to the request."""
        try:
            async with asyncio.timeout(timeout):  # the SDK's timeout is for each read
                yield
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(error, openai.APITimeoutError) and "Connect" not in type(cause).__name__:
                raise timed_out(timeout, received, self._key, asked=request is not None) from None
            raise RetryableError(
                redact(f"connection failed ({cause or type(cause).__name__})", self._key), reached=False
            ) from None
        except TimeoutError:
            raise timed_out(timeout, received, self._key, asked=request is not None) from None
        except openai.APIStatusError as error:
            after = parse_retry_after(error.response.headers.get("retry-after"))
            raise self._fail(error.status_code, decode_body(error.response.text), after, request) from None
        except (
            openai.OpenAIError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # another kind of response, such as a web page
            raise RetryableError(redact(f"{UNEXPECTED} ({error})", self._key)) from None
        except Exception as error:
            if not is_transport_error(error):
                raise
            if "Timeout" in type(error).__name__:
                raise timed_out(timeout, received, self._key, asked=request is not None) from None
            raise broken_off(error, received, self._key) from None

    def _fail(
        self, status: int | None, body: Any, retry_after: float | None = None, request: Request | None = None
    ) -> AnnotationError:
        """Return the error for a status and a body."""
        sent = " ".join(key for key in self._body(request) if key != "messages") if request else ""
        error = sort_failure(status, body, f"openai:{self.model}", self._key, retry_after, sent=sent)
        lacks = self._hint and isinstance(error, AccessError) and (status in (404, 405) or "endpoint" in str(error))
        return AccessError(f"{error}{self._hint}") if lacks else error

    def _parse(self, body: Any) -> Reply:
        """Return the reply of a completion of any shape that servers are known to send."""
        if isinstance(body, str) and body.lstrip().startswith("data:"):
            raise AccessError(f"openai:{self.model}: the server streams replies, unasked; switch that off")
        if not isinstance(body, Mapping):
            raise RetryableError(f"{UNEXPECTED} (no JSON object)")
        usage = read_counts(
            body.get("usage"), ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")
        )
        tokens_in, tokens_out, counted = usage
        choices = [choice for choice in _list(body.get("choices")) if isinstance(choice, Mapping)]
        if not choices and isinstance(body.get("message"), Mapping) and "content" in body["message"]:
            choices = [body]  # Ollama's own form
        if not choices:
            if (error := body.get("error") or body.get("errors")) or find_words(body):
                raise self._fail(_status(error or body), body)
            raise RetryableError(f"{UNEXPECTED} (no choices)")
        choice = next((choice for choice in choices if _has_words(choice)), choices[0])
        message = choice.get("message")
        message = message if isinstance(message, Mapping) else {"content": message or choice.get("text")}
        text, version = _text(message.get("content")), body.get("model")
        reply = Reply(text, tokens_in, tokens_out, version if isinstance(version, str) else "", counted)
        finish, refusal = str(choice.get("finish_reason") or "").lower(), message.get("refusal")
        if error := choice.get("error") or (body.get("error") if not text.strip() else None):
            failure = self._fail(_status(error), {"error": error})
            failure.reply = reply
            raise failure
        if finish in _BROKEN_OFF:
            raise RetryableError(f"the service broke off its reply ({finish})", charged=True, reply=reply)
        if finish in _BLOCKED or refusal:
            raise UnusableError(redact(f"blocked ({refusal or finish})", self._key), reply)
        if finish in _CUT_OFF:
            check_cut_off(self._settings, reply)
        if not text.strip():
            if any(message.get(name) for name in _THOUGHTS) or _list(message.get("content")):
                raise UnusableError("thoughts without an answer", reply)
            raise UnusableError("an empty reply" + (f" ({finish})" if finish not in ("", "stop") else ""), reply)
        return reply

    # Batches.

    max_requests, max_bytes = 50_000, 190_000_000

    def encode_request(self, key: str, request: Request) -> str:
        """Return a request as a line of a batch file."""
        row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": self._body(request)}
        return json.dumps(row)

    async def submit(self, file: Path, label: str) -> str:
        """Upload a file and create its batch; return its name."""
        try:
            async with self._translate_errors(TRANSFER_TIMEOUT):
                uploaded = await self._client.files.create(file=file, purpose="batch", timeout=TRANSFER_TIMEOUT)
                batch = await self._client.batches.create(
                    input_file_id=uploaded.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"label": label},
                )
                return batch.id
        except AnnotationError as error:
            raise sort_submission(error) from None

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
            response = await self._client.batches.with_raw_response.retrieve(name)
            batch = json.loads(response.text)
            state = str(batch["status"]).lower()
            files = tuple(file for name in ("output_file_id", "error_file_id") if (file := batch.get(name)))
            errors = batch.get("errors")
        if state not in _ENDED and not files and not any(batch.get(name) for name in _ENDED_AT):
            return BatchStatus(False)
        errors = errors.get("data") if isinstance(errors, Mapping) else errors
        words = redact(find_words(errors), self._key)
        reason = "" if state == "completed" else f"the batch is {state}" + (f": {words}" if words else "")
        denied = bool(errors) and isinstance(self._fail(None, {"errors": errors}), AccessError)
        return BatchStatus(True, reason, files, is_queue_full(f"{words} {errors}"), denied=denied)

    async def fetch_results(self, status: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        """Return (key, reply or error) of each request that has a result."""
        results: list[tuple[str, Reply | AnnotationError]] = []
        for file in status.result_files:
            async with self._translate_errors(TRANSFER_TIMEOUT):
                content = await self._client.files.content(file, timeout=TRANSFER_TIMEOUT)
            results += parse_result_lines(content.content, "custom_id", self._parse_result, self._key)
        return results

    def _parse_result(self, row: Mapping[str, Any]) -> Reply:
        response, error = row.get("response"), row.get("error")
        response = response if isinstance(response, Mapping) else {}
        code, body = response.get("status_code"), response.get("body")
        if error or not response:  # it expired before this request was processed, say
            raise self._fail(None, {"error": error})
        if code in (200, None):
            return self._parse(body)
        raise self._fail(code if isinstance(code, int) else 500, body)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _status(error: Any) -> int | None:
    """Return the HTTP status that an error holds as its code, or None."""
    code = error.get("code") or error.get("status") if isinstance(error, Mapping) else None
    text = str(code)
    return int(text) if text.isdecimal() and 400 <= int(text) < 600 else None


def _has_words(choice: Mapping[str, Any]) -> bool:
    message = choice.get("message")
    return bool(
        _text(message.get("content") if isinstance(message, Mapping) else message or choice.get("text")).strip()
    )


def _text(content: Any) -> str:
    """Return the words of a message's content: a text, or a list of parts, of which some are thoughts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        kind, text = content.get("type", "text"), content.get("text")
        text = text.get("value") if isinstance(text, Mapping) else text
        if content.get("thought") is True:
            return ""
        return text if kind in ("text", "output_text") and isinstance(text, str) else ""
    return "".join(map(_text, _list(content)))
