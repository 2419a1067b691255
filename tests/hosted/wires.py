"""Wire formats of OpenAI's and Gemini's APIs, as the loopback server reads and writes them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from tests.hosted.faults import Fault


@dataclass(frozen=True)
class Call:
    """A request as it arrived.

    Attributes:
        digest: Identifies the content: provider, model, text, images, structured.
        attempt: Which time this content arrived, from 1.
        arrived: By `time.monotonic`.
    """

    provider: str
    model: str
    text: str
    images: list[bytes]
    structured: bool
    key: str
    body: dict[str, Any]
    digest: str
    attempt: int
    arrived: float


@dataclass
class Batch:
    """A batch that was created; `state` is its end as OpenAI spells it, `share` the part of its requests that is done."""

    name: str
    provider: str
    model: str
    label: str | None
    keys: list[str]
    calls: list[Call]
    state: str
    share: float
    looks: int = 0
    downloads: int = 0
    replies: str | None = None
    errors: str | None = None


def usage(call: Any, text: str) -> tuple[int, int]:
    """Return (input, output) tokens: a word is one, an image a hundred."""
    return len(call.text.split()) + 100 * len(call.images), len(text.split())


def content_digest(provider: str, model: str, text: str, images: Sequence[bytes], structured: bool) -> str:
    """Return the digest of a call's content."""
    content = [provider, model, text, [hashlib.sha256(image).hexdigest() for image in images], structured]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


FAILED = dict.fromkeys(("full", "failed late", "denied"), "failed")
"""Ends of batches that services call failed: the queue is full, only some requests are done, credit is used up."""
DENIED = "Your credit balance is too low."


class OpenAI:
    """OpenAI's wire format."""

    name, key, request = "openai", "custom_id", "body"
    path = re.compile(r"/v1/chat/completions")

    def read(self, path: str, query: dict[str, Any], headers: Message, body: dict[str, Any]) -> dict[str, Any]:
        messages = body["messages"]
        assert [message["role"] for message in messages] == ["user", *["assistant", "user"] * (len(messages) // 2)]
        contents = [message["content"] for message in messages]
        parts = [p for c in contents for p in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]
        images = [part["image_url"]["url"].partition(";base64,")[2] for part in parts if "image_url" in part]
        return {
            "provider": self.name,
            "model": body["model"],
            "text": "\n".join(part["text"] for part in parts if "text" in part),
            "images": [_decode(image) for image in images],
            "structured": body.get("response_format", {}).get("type") == "json_schema",
            "key": headers.get("Authorization", "").removeprefix("Bearer "),
            "body": body,
        }

    def reply(self, call: Call, text: str, fault: Fault | None) -> dict[str, Any]:
        ends = {Fault.BLOCKED: "content_filter", Fault.TRUNCATED: "length"}
        refusal = "I cannot help with that." if fault is Fault.REFUSED else None
        content = None if fault in (Fault.BLOCKED, Fault.REFUSED) else text
        message = {"role": "assistant", "content": content, "refusal": refusal}
        tokens_in, tokens_out = usage(call, text)
        return {
            "id": f"chatcmpl-{call.digest[:20]}",
            "object": "chat.completion",
            "created": 1,
            "model": f"{call.model}-2026-01-01",
            "choices": [{"index": 0, "message": message, "finish_reason": ends.get(fault, "stop")}],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out},
        }

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]:
        return {"error": {"message": message, "type": "error", "param": None, "code": None}}

    def error_line(self, key: str, status: int, message: str) -> dict[str, Any]:
        response = {"status_code": status, "body": self.error(status, message, None)}
        return {"custom_id": key, "response": response, "error": None}

    def reply_line(self, key: str, reply: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": key, "response": {"status_code": 200, "body": reply}, "error": None}

    def show(self, batch: Batch, ended: bool) -> dict[str, Any]:
        state = FAILED.get(batch.state, batch.state) if ended else "in_progress" if batch.looks else "validating"
        message = f"Line 1 is invalid for key {batch.calls[0].key if batch.calls else ''}."
        if batch.state == "full":
            message = (
                "Enqueued token limit reached. Please try again once some in_progress batches have been completed."
            )
        if batch.state == "denied":
            message = DENIED
        return {
            "id": batch.name,
            "object": "batch",
            "errors": {"data": [{"code": "invalid", "message": message, "line": 1}]} if state == "failed" else None,
            "status": state,
            "output_file_id": batch.replies if ended else None,
            "error_file_id": batch.errors if ended else None,
            "metadata": None if batch.label is None else {"label": batch.label},
        }


class Gemini:
    """Gemini's wire format."""

    name, key, request = "gemini", "key", "request"
    path = re.compile(r"/v\d\w*/models/([^/:]+):generateContent")

    def read(self, path: str, query: dict[str, Any], headers: Message, body: dict[str, Any]) -> dict[str, Any]:
        parts = [part for content in body["contents"] for part in content["parts"]]
        config = body.get("generationConfig", {})
        match = self.path.fullmatch(path)
        assert match
        return {
            "provider": self.name,
            "model": unquote(match[1]),
            "text": "\n".join(part["text"] for part in parts if "text" in part),
            "images": [_decode(part["inlineData"]["data"]) for part in parts if "inlineData" in part],
            "structured": "responseSchema" in config or "responseJsonSchema" in config,
            "key": headers.get("x-goog-api-key") or query.get("key", ""),
            "body": body,
        }

    def reply(self, call: Call, text: str, fault: Fault | None) -> dict[str, Any]:
        ends = {Fault.REFUSED: "SAFETY", Fault.TRUNCATED: "MAX_TOKENS"}
        candidate: dict[str, Any] = {"finishReason": ends.get(fault, "STOP"), "index": 0}
        if fault is not Fault.REFUSED:
            candidate["content"] = {"parts": [{"text": text}], "role": "model"}
        blocked = {"promptFeedback": {"blockReason": "SAFETY"}}
        tokens_in, tokens_out = usage(call, text)
        return {
            **(blocked if fault is Fault.BLOCKED else {"candidates": [candidate]}),
            "usageMetadata": {"promptTokenCount": tokens_in, "candidatesTokenCount": tokens_out},
            "modelVersion": f"{call.model}-2026-01-01",
        }

    def error(self, status: int, message: str, retry_after: float | None) -> dict[str, Any]:
        error: dict[str, Any] = {"code": status, "message": message, "status": HTTPStatus(status).name}
        if retry_after is not None:
            delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{retry_after:g}s"}
            error["details"] = [delay]
        return {"error": error}

    def error_line(self, key: str, status: int, message: str) -> dict[str, Any]:
        code = {400: 3, 401: 16, 429: 8, 500: 13, 503: 14}[status]  # of google.rpc.Code
        return {"key": key, "error": {"code": code, "message": message}}

    def reply_line(self, key: str, reply: dict[str, Any]) -> dict[str, Any]:
        return {"response": reply, "key": key}

    def show(self, batch: Batch, ended: bool) -> dict[str, Any]:
        states = {"completed": "SUCCEEDED"} | dict.fromkeys(FAILED, "FAILED")
        state = states.get(batch.state, batch.state.upper()) if ended else "RUNNING" if batch.looks else "PENDING"
        prefix = "JOB" if state == "PARTIALLY_SUCCEEDED" else "BATCH"  # as the service does
        metadata: dict[str, Any] = {"state": f"{prefix}_STATE_{state}", "name": batch.name}
        if batch.label is not None:
            metadata["displayName"] = batch.label
        shown: dict[str, Any] = {"name": batch.name, "metadata": metadata}
        if ended:
            shown["done"] = True
            if state == "FAILED":
                shown["error"] = {"code": 3, "message": DENIED if batch.state == "denied" else "Line 1 is invalid."}
            if batch.replies:
                place = (
                    metadata if state == "FAILED" else shown
                )  # a response excludes an error; the SDK reads no response
                place["output" if state == "FAILED" else "response"] = {"responsesFile": batch.replies}
        return shown


OPENAI, GEMINI = WIRES = (OpenAI(), Gemini())


def _decode(data: str) -> bytes:
    """Decode base64 of either alphabet: google-genai writes the one for URLs."""
    return base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)
