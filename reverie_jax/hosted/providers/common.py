"""Shared by providers: API keys and their redaction, Retry-After, files of batch results."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Mapping

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import AnnotationError, Reply, RetryableError

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


def redact(text: str, secret: str) -> str:
    """Return a message in one line without the API key; services quote keys, whole or in part."""
    line = " ".join(text.split())
    if len(secret) >= 4:
        line = line.replace(secret, "***")
    if len(secret) >= 8 and "key" in line.lower():
        line = line.replace(secret[:8], "***").replace(secret[-4:], "***")
    return line[:500]


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


def parse_result_lines(
    content: bytes, parse: Callable[[bytes], tuple[str, Reply | AnnotationError] | None]
) -> list[tuple[str, Reply | AnnotationError]]:
    """Parse a file of batch results; lines that `parse` returns None for are skipped.

    Raises:
        RetryableError: No line can be parsed: the file does not hold results.
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    results = [result for line in lines if (result := parse(line)) is not None]
    if lines and not results:
        raise RetryableError(f"{UNEXPECTED} (no batch results)")
    return results
