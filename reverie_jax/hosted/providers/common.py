"""Shared by providers: API keys and their redaction, Retry-After, files of batch results."""

from __future__ import annotations

import dataclasses
import email.utils
import json
import re
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
    """Return a text without the API key; services quote keys, whole or in part: the beginning, or the last characters."""
    if len(secret) >= 4:
        text = text.replace(secret, "***")
    for start in range(len(secret) - 7):
        end = start + 8
        while secret[start:end] in text:  # as much of it as the service quotes
            end += 1
            if end > len(secret) or secret[start:end] not in text:
                text = text.replace(secret[start : end - 1], "***")
                end = start + 8
    if len(secret) >= 8:
        if "key" in text.lower():
            text = text.replace(secret[-4:], "***")
        text = re.sub(rf"([*•.…xX]{{2,}}){re.escape(secret[-4:])}", r"\1***", text)
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


def keep_raw(error: AnnotationError, raw: str, secret: str) -> AnnotationError:
    """Return a failure with the raw text of its reply, unless it has words: it may be paid for."""
    if error.reply is None:
        error.reply = Reply(hide(raw, secret), counted=False)
    elif not error.reply.text.strip():
        error.reply = dataclasses.replace(error.reply, text=hide(raw, secret))
    return error


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
            results.append((key, keep_raw(error, line.decode("utf-8", "replace"), secret)))
    if lines and not results:
        raise RetryableError(f"{UNEXPECTED} (no batch results)")
    return results
