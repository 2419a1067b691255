"""What Google's replies and errors mean; both SDKs name their parts alike."""

from __future__ import annotations

from typing import Any

from reverie_jax.hosted.interface import AnnotationError, NoAccess, Refused, Reply, TryAgain
from reverie_jax.hosted.providers.common import hide


def status(code: int | None, message: str, after: float | None, who: str, key: str) -> AnnotationError:
    """What an HTTP status of Google's means for a request."""
    said = hide(f"{code}: {message}", key)
    if code in (408, 409, 429, None) or code >= 500:
        return TryAgain(f"the service said {code}", after)
    if code in (401, 403, 404) or "API key" in message or "API_KEY" in message:  # a wrong key is a 400 here
        return NoAccess(f"{who}: {said}")
    return Refused(said)


def reply(found: Any) -> Reply:
    """A response of either of Google's SDKs; both name its parts alike.

    Raises:
        Refused: it was blocked, is empty, or was cut off.
    """
    usage = getattr(found, "usage_metadata", None)
    candidate = found.candidates[0] if found.candidates else None
    parts = (candidate.content.parts or []) if candidate is not None and candidate.content else []
    made = Reply(
        "".join(part.text or "" for part in parts if not getattr(part, "thought", False)),
        (usage.prompt_token_count if usage else 0) or 0,
        ((usage.candidates_token_count if usage else 0) or 0) + (getattr(usage, "thoughts_token_count", 0) or 0),
        getattr(found, "model_version", "") or "",
    )
    feedback = getattr(found, "prompt_feedback", None)
    if candidate is None:
        why = getattr(feedback, "block_reason", None)
        raise Refused(f"blocked ({_word(why)})" if why else "an empty reply", made)
    finish = _word(candidate.finish_reason)
    if finish == "MAX_TOKENS":
        raise Refused("cut off at the longest reply", made)
    if finish not in ("STOP", "FINISH_REASON_UNSPECIFIED", ""):
        raise Refused(f"blocked ({finish})", made)
    if not made.text.strip():
        raise Refused("an empty reply", made)
    return made


def _word(value: Any) -> str:
    """An enumeration's member by its name, in either SDK."""
    return str(getattr(value, "name", value) or "")
