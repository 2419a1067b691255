"""Google's responses and errors; both SDKs use the same names."""

from __future__ import annotations

from typing import Any

from reverie_jax.hosted.interface import AccessError, AnnotationError, Reply, RetryableError, UnusableError
from reverie_jax.hosted.providers.common import redact


def error_from_status(
    code: int | None, message: str, retry_after: float | None, model_spec: str, key: str
) -> AnnotationError:
    """Return the error for an HTTP status."""
    text = redact(f"{code}: {message}", key)
    if code in (408, 409, 429, None) or code >= 500:
        return RetryableError(f"the API returned status {code}", retry_after)
    if code in (401, 403, 404) or "API key" in message or "API_KEY" in message:  # a wrong key is a 400 here
        return AccessError(f"{model_spec}: {text}")
    return UnusableError(text)


def parse_response(response: Any) -> Reply:
    """Return the reply of a response of either SDK.

    Raises:
        UnusableError: It was blocked, is empty, or was cut off.
    """
    usage = getattr(response, "usage_metadata", None)
    candidate = response.candidates[0] if response.candidates else None
    parts = (candidate.content.parts or []) if candidate is not None and candidate.content else []
    reply = Reply(
        "".join(part.text or "" for part in parts if not getattr(part, "thought", False)),
        (usage.prompt_token_count if usage else 0) or 0,
        ((usage.candidates_token_count if usage else 0) or 0) + (getattr(usage, "thoughts_token_count", 0) or 0),
        getattr(response, "model_version", "") or "",
    )
    feedback = getattr(response, "prompt_feedback", None)
    if candidate is None:
        reason = getattr(feedback, "block_reason", None)
        raise UnusableError(f"blocked ({_word(reason)})" if reason else "an empty reply", reply)
    finish = _word(candidate.finish_reason)
    if finish == "MAX_TOKENS":
        raise UnusableError("cut off at the maximum length", reply)
    if finish not in ("STOP", "FINISH_REASON_UNSPECIFIED", ""):
        raise UnusableError(f"blocked ({finish})", reply)
    if not reply.text.strip():
        raise UnusableError("an empty reply", reply)
    return reply


def _word(value: Any) -> str:
    """Return the name of an enumeration's member, in either SDK."""
    return str(getattr(value, "name", value) or "")
