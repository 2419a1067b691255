"""Shared by providers: API keys and their redaction, Retry-After, files of batch results."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import AnnotationError, RefusedError, Reply, RetryableError

TRANSFER_TIMEOUT = 600.0
"""Seconds to wait for the upload or download of a batch file."""
UNEXPECTED = "unexpected response from the API"


def find_api_key(environment: Mapping[str, str], *names: str, required: bool = True) -> str:
    """Return the first of the variables that is set; empty if none is.

    Raises:
        UserError: None is set, and a key is required.
    """
    for name in names:
        if value := environment.get(name, "").strip():
            return value
    if required:
        raise UserError(f"no API key: set {' or '.join(names)} in the environment")
    return ""


def hide(text: str, secret: str) -> str:
    """Return a text without the API key; services quote keys, whole or in part."""
    if len(secret) >= 4:
        text = text.replace(secret, "***")
    if len(secret) >= 8 and "key" in text.lower():
        text = text.replace(secret[:8], "***").replace(secret[-4:], "***")
    return text


def redact(text: str, secret: str) -> str:
    """Return a message in one line, shortened, without the API key."""
    return hide(" ".join(text.split()), secret)[:400]


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date; None if it holds neither."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def cut_off(limit: int | None) -> str:
    """Return the reason of a reply that ended at its maximum length."""
    if limit is None:
        return "cut off at the service's maximum length"
    return f"cut off at {limit:,} tokens, thoughts included; raise --max-new-tokens"


def parse_result_lines(
    content: bytes, key_name: str, parse: Callable[[Mapping[str, Any]], Reply], secret: str
) -> list[tuple[str, Reply | AnnotationError]]:
    """Return (key, reply or error) of a file of batch results; lines without a key are skipped.

    Raises:
        RetryableError: No line has a key: the file does not hold results.
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    results: list[tuple[str, Reply | AnnotationError]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, Mapping) or not isinstance(key := row.get(key_name), str):
            continue
        try:
            results.append((key, parse(row)))
        except Exception as problem:
            unread = RefusedError(f"the reply cannot be read ({type(problem).__name__})")
            error = problem if isinstance(problem, AnnotationError) else unread
            if error.reply is None:  # it may be paid for: what cannot be read is kept
                error.reply = Reply(hide(line.decode("utf-8", "replace"), secret), counted=False)
            results.append((key, error))
    if lines and not results:
        raise RetryableError(f"{UNEXPECTED} (no batch results)")
    return results
