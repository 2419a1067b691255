"""What providers share: keys and their hiding, Retry-After, files of batch results."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Mapping

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import AnnotationError, Reply, TryAgain

TRANSFER = 600.0
"""Seconds that a file of requests or results may take."""


def key(environment: Mapping[str, str], *names: str, needed: bool = True) -> str:
    """The first of the variables that is set.

    Raises:
        UserError: none is, and one is needed.
    """
    for name in names:
        if found := environment.get(name, "").strip():
            return found
    if needed:
        raise UserError(f"no key: set {' or '.join(names)} in the environment")
    return ""


def hide(text: str, secret: str) -> str:
    """A message in one line, without the key; services quote keys, whole or in part."""
    line = " ".join(text.split())
    if len(secret) >= 4:
        line = line.replace(secret, "***")
    if len(secret) >= 8 and "key" in line.lower():
        line = line.replace(secret[:8], "***").replace(secret[-4:], "***")
    return line[:500]


def seconds(header: str | None) -> float | None:
    """What a Retry-After header says, in seconds or as a date."""
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


def read_lines(
    content: bytes, read: Callable[[bytes], tuple[str, Reply | AnnotationError] | None]
) -> list[tuple[str, Reply | AnnotationError]]:
    """A batch's results, line by line; lines that make no sense are passed over.

    Raises:
        TryAgain: not one does: it is no file of results.
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    found = [one for line in lines if (one := read(line)) is not None]
    if lines and not found:
        raise TryAgain("the service's results make no sense")
    return found
