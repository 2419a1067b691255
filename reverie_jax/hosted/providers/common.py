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
from reverie_jax.hosted.interface import AnnotationError, RefusedError, Reply, RequestSettings, RetryableError
from reverie_jax.hosted.thoughts import split_thoughts

TRANSFER_TIMEOUT = 600.0
"""Seconds to wait for the upload or download of a batch file."""
UNEXPECTED = "unexpected response from the API"
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "anyio", "ssl", "urllib3"}
"""Packages whose errors are connection errors; which of them an SDK uses depends on what is installed."""


def find_api_key(environment: Mapping[str, str], *names: str, required: bool = True) -> str:
    """Return the first of the variables that is set; empty if none is.

    Raises:
        UserError: None is set, and a key is required; or it cannot be sent.
    """
    for name in names:
        if value := environment.get(name, "").strip():
            if not (value.isascii() and value.isprintable()):
                raise UserError(
                    f"{name}: holds a character that no key has (a line break, a typographic quote); set it again"
                )
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


def is_transport_error(error: BaseException) -> bool:
    """Return whether an exception is a failure of the connection, of whichever package."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _TRANSPORTS


def timed_out(timeout: float, received: bytes | bytearray, secret: str, *, asked: bool) -> RetryableError:
    """Return the error for a service that did not answer in time.

    Args:
        timeout: Seconds that it had.
        received: What came of its reply.
        secret: The API key.
        asked: Whether a model was asked: it may go on, and be paid for.
    """
    hint = "; set a longer --timeout" if asked else ""
    return RetryableError(f"no reply within {timeout:g} s{hint}", charged=asked, reply=_half(received, secret))


def broken_off(error: BaseException, received: bytes | bytearray, secret: str) -> RetryableError:
    """Return the error for a connection that closed within a reply."""
    reason = redact(f"the connection closed within the reply ({error or type(error).__name__})", secret)
    return RetryableError(reason, charged=True, reply=_half(received, secret))


def _half(received: bytes | bytearray, secret: str) -> Reply | None:
    return Reply(hide(received.decode("utf-8", "replace"), secret), counted=False) if received else None


def keep_raw(error: AnnotationError, raw: str, secret: str) -> AnnotationError:
    """Return a failure with the raw text of its reply, unless it has words: it may be paid for."""
    if error.reply is None:
        error.reply = Reply(hide(raw, secret), counted=False)
    elif not error.reply.text.strip():
        error.reply = dataclasses.replace(error.reply, text=hide(raw, secret))
    return error


def check_cut_off(settings: RequestSettings, reply: Reply) -> None:
    """Accept a reply that ended at its maximum length if its words are to be kept, and it has any.

    Raises:
        RefusedError: It cannot be used.
    """
    if settings.keep_cut_off and split_thoughts(reply.text)[1].strip():
        return
    limit = settings.max_new_tokens
    if limit is None:
        raise RefusedError("cut off at the service's maximum length", reply)
    reason = f"cut off at {limit:,} tokens, thoughts included; raise --max-new-tokens"
    raise RefusedError(reason, reply, systematic=True)


def parse_result_lines(
    content: bytes, key_name: str, parse: Callable[[Mapping[str, Any]], Reply], secret: str
) -> list[tuple[str, Reply | AnnotationError]]:
    """Return (key, reply or error) of a file of batch results; lines without a key are skipped, one that breaks off is kept.

    Raises:
        RetryableError: No line has a key: the file does not hold results.
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    results: list[tuple[str, Reply | AnnotationError]] = []
    for line in lines:
        try:
            row = json.loads(line, strict=False)
        except (ValueError, RecursionError):
            if found := re.search(rb'"%b"\s*:\s*"([^"\\]+)"' % key_name.encode(), line):
                error = RetryableError("the line of its result broke off", charged=True)
                raw = line.decode("utf-8", "replace")
                results.append((found[1].decode("utf-8", "replace"), keep_raw(error, raw, secret)))
            continue
        if not isinstance(row, Mapping) or not isinstance(key := row.get(key_name), str):
            continue
        try:
            results.append((key, parse(row)))
        except Exception as problem:
            unread = RefusedError(f"the reply cannot be read ({type(problem).__name__})")
            failure = problem if isinstance(problem, AnnotationError) else unread
            results.append((key, keep_raw(failure, line.decode("utf-8", "replace"), secret)))
    if lines and not results:
        raise RetryableError(f"{UNEXPECTED} (no batch results)")
    return results
