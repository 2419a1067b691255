"""Google's responses, as JSON objects; both SDKs give the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    BatchStatus,
    RefusedError,
    Reply,
    RequestSettings,
    RetryableError,
    UnusableError,
)
from reverie_jax.hosted.providers.common import UNEXPECTED, check_cut_off, parse_retry_after, redact
from reverie_jax.hosted.providers.failures import find_words, is_queue_full, read_counts, sort_failure

ROLES = ("user", "model")
"""Google's names of a conversation's sides."""
_HTTP = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 13: 500, 14: 503, 16: 401}
"""HTTP status by google.rpc.Code, which batch results use."""
_ENDED = {"SUCCEEDED", "PARTIALLY_SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"}
"""States of a batch that has ended; any other one is waited for, unless the operation is done."""


def error_from_body(
    status: int | None, body: Any, model_spec: str, key: str, header: str | None = None, *, sent: str = ""
) -> AnnotationError:
    """Return the error for an HTTP status (or a google.rpc.Code) and a body; see `sort_failure`.

    Args:
        status: None if it is in the body alone.
        body: The decoded body.
        model_spec: "provider:model".
        key: The API key.
        header: The Retry-After header; without one, google.rpc.RetryInfo in the body counts.
        sent: Names of optional parameters that were sent.
    """
    if status is None and isinstance(body, Mapping):
        error = body.get("error", body)
        code = error.get("code") if isinstance(error, Mapping) else None
        status = _HTTP.get(code, code if 400 <= code < 600 else None) if isinstance(code, int) else None
    delay = re.search(r"'retryDelay': '([\d.]+)s'", str(body))
    wait = parse_retry_after(header)
    after = wait if wait is not None else float(delay[1]) if delay else None
    return sort_failure(status, body, model_spec, key, after, sent=sent)


def parse_response(body: Any, model_spec: str, key: str, settings: RequestSettings) -> Reply:
    """Return the reply of a response's JSON.

    Args:
        body: The decoded body.
        model_spec: "provider:model".
        key: The API key.
        settings: Of the request.

    Raises:
        AnnotationError: It was blocked, is empty, was cut off, or holds an error.
    """
    if not isinstance(body, Mapping):
        raise RetryableError(f"{UNEXPECTED} (no JSON object)")
    usage = body.get("usageMetadata")
    counts = read_counts(usage, ("promptTokenCount",), ("candidatesTokenCount",), ("thoughtsTokenCount",))
    candidates = body.get("candidates")
    candidates = candidates if isinstance(candidates, list) and candidates else [None]
    candidate = next((candidate for candidate in candidates if _words(candidate)), candidates[0])
    if candidate is None and body.get("error"):
        raise error_from_body(None, body, model_spec, key)
    version = body.get("modelVersion")
    tokens_in, tokens_out, counted = counts
    reply = Reply(_words(candidate), tokens_in, tokens_out, version if isinstance(version, str) else "", counted)
    if not isinstance(candidate, Mapping):
        feedback = body.get("promptFeedback")
        reason = _reason(feedback, "blockReason", "blockReasonMessage", key)
        # A blocked prompt is blocked again; an answer may be blocked by chance.
        raise RefusedError(f"blocked ({reason})", reply) if reason else UnusableError("an empty reply", reply)
    finish = str(candidate.get("finishReason") or "STOP")
    if finish == "MAX_TOKENS":
        check_cut_off(settings, reply)
    elif finish not in ("STOP", "FINISH_REASON_UNSPECIFIED"):
        raise UnusableError(f"blocked ({_reason(candidate, 'finishReason', 'finishMessage', key)})", reply)
    if not reply.text.strip():
        reason = "thoughts without an answer" if _words(candidate, thoughts=True) else "an empty reply"
        raise UnusableError(reason, reply)
    return reply


def read_operation(operation: Mapping[str, Any], model_spec: str, key: str) -> BatchStatus:
    """Return the state of a batch, from the operation that stands for it.

    One that ended without success may have replies all the same, which are paid for: in a file, or in the operation itself;
    at its `metadata`, or at its `response` alone.

    Args:
        operation: The decoded body.
        model_spec: "provider:model".
        key: The API key.
    """
    batch, response = _mapping(operation.get("metadata")), _mapping(operation.get("response"))
    state = str(batch.get("state") or operation.get("state") or "").upper()
    state = state.removeprefix("JOB_STATE_").removeprefix("BATCH_STATE_")
    outputs = [_mapping(batch.get("output")), response, _mapping(response.get("output"))]
    files = [output["responsesFile"] for output in outputs if isinstance(output.get("responsesFile"), str)]
    lines = [json.dumps(row) for output in outputs for row in _inlined(output.get("inlinedResponses"))]
    if not (operation.get("done") is True or state in _ENDED or files or lines or batch.get("endTime")):
        return BatchStatus(False)
    errors = [error for error in (operation.get("error"), batch.get("error"), response.get("error")) if error]
    words = redact(find_words(errors), key)
    word = state.lower().replace("_", " ") or "done"
    reason = "" if state == "SUCCEEDED" and not errors else f"the batch is {word}" + (f": {words}" if words else "")
    denied = any(isinstance(error_from_body(None, error, model_spec, key), AccessError) for error in errors)
    return BatchStatus(
        True, reason, tuple(dict.fromkeys(files)), is_queue_full(words), "\n".join(lines).encode(), denied
    )


def _inlined(responses: Any) -> Iterator[dict[str, Any]]:
    """Yield the results in an operation that have a key, each with its key as in a file."""
    rows = responses.get("inlinedResponses") if isinstance(responses, Mapping) else responses
    for row in rows if isinstance(rows, list) else []:
        key = _mapping(row).get("key") or _mapping(_mapping(row).get("metadata")).get("key")
        if isinstance(key, str):
            yield {**row, "key": key}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _words(candidate: Any, *, thoughts: bool = False) -> str:
    """Return the words, or the thoughts, of a candidate of any shape."""
    content = candidate.get("content") if isinstance(candidate, Mapping) else None
    parts = content.get("parts") if isinstance(content, Mapping) else None
    return "".join(
        part["text"]
        for part in (parts if isinstance(parts, list) else [])
        if isinstance(part, Mapping) and isinstance(part.get("text"), str) and bool(part.get("thought")) is thoughts
    )


def _reason(value: Any, name: str, message: str, key: str) -> str:
    """Return the name of a reason and the service's words about it; empty if it gives none."""
    if not isinstance(value, Mapping) or not value.get(name):
        return ""
    said = value.get(message)
    return f"{value[name]}: {redact(said, key)}" if isinstance(said, str) and said else str(value[name])
