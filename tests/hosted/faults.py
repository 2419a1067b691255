"""What goes wrong at the loopback server: with a request, a batch step, or a line of batch results."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any


class Fault(Enum):
    """What goes wrong with a request."""

    RATE_LIMIT_AFTER = "429 with Retry-After"
    RATE_LIMIT = "429"
    SERVER_ERROR = "500"
    UNAVAILABLE = "503"
    TIMEOUT = "never answered"
    RESET = "connection reset"
    CLOSED = "half a reply, then the connection closes"
    BLOCKED = "filtered; Gemini sends no candidate"
    REFUSED = "OpenAI sends a refusal, Gemini finish reason SAFETY"
    EMPTY = "no text"
    TRUNCATED = "the first 60 %, at the token limit"
    UNSURE = "an undecided judge; only for calls that `is_judge`"
    WEB_PAGE = "an HTML page with status 200"
    FENCED = "JSON in a Markdown fence"
    PYTHON_LITERAL = "JSON as a Python literal"
    WRONG_KEYS = "JSON with misspelled keys"


FAULTS = tuple(Fault)
TRANSPORT, REPLY, HARMLESS = FAULTS[:7], FAULTS[7:13], FAULTS[13:]
"""No whole reply: retry. A reply that may be unusable. The whole answer in an odd form."""
STATUS = {Fault.RATE_LIMIT_AFTER: 429, Fault.RATE_LIMIT: 429, Fault.SERVER_ERROR: 500, Fault.UNAVAILABLE: 503}
NOT_SURE = "Not sure, the analyses differ."


class Step(Enum):
    """A request of the batch API; CHUNK is Gemini's second request of an upload."""

    UPLOAD, CHUNK, CREATE, LIST, STATUS, DOWNLOAD = range(6)


class Trouble(Enum):
    """What goes wrong with a step, besides transport faults, WEB_PAGE, and a status with a message."""

    LOST = "done, but the response is lost"
    HANG = "not done; no response until the client is gone"
    HANG_DONE = "done; no response until the client is gone"


class Line(Enum):
    """What goes wrong with a line of batch results, besides faults of a reply."""

    MISSING = "no line"
    DOUBLED = "two lines"
    BROKEN = "half a line"
    STRANGER = "a line with an unknown key before it"
    ODD = "lines without a valid key before it"
    BAD = "400"
    DENIED = "401"
    EXPIRED = "not processed within a day"


LINES = (Line.MISSING, Line.DOUBLED, Line.BROKEN, Line.STRANGER)
HOPELESS = (Fault.BLOCKED, Fault.TRUNCATED, Line.BAD)
"""What would go wrong again: a prompt that Gemini blocks, a reply that is cut off, an invalid request."""
RECOVERABLE = tuple(fault for fault in Fault if fault not in (Fault.TIMEOUT, *HOPELESS))
UNANSWERED = {Line.MISSING, Line.BROKEN, Line.BAD, Line.DENIED, Line.EXPIRED}


def share(fraction: float, seed: int, faults: Sequence[Any] = RECOVERABLE, at_most: int = 2) -> Callable[[Any], Any]:
    """Return a plan by which a share of requests goes wrong, but no content more than `at_most` times.

    It is a function of seed, content and attempt alone: neither the order of requests nor a restart changes it.
    """

    def draw(digest: str, attempt: int) -> Any:
        rng = random.Random(f"{seed} {digest} {attempt}")
        return faults[int(rng.random() * len(faults))] if rng.random() < fraction else None

    def plan(call: Any) -> Any:
        before = sum(draw(call.digest, attempt) is not None for attempt in range(1, call.attempt))
        return draw(call.digest, call.attempt) if before < at_most else None

    return plan


def dress(text: str, fault: Any) -> str:
    """Return an answer as a fault delivers it."""
    if fault in (Fault.BLOCKED, Fault.REFUSED, Fault.EMPTY):
        return ""
    if fault is Fault.TRUNCATED:
        return text[: len(text) * 6 // 10]
    if fault is Fault.UNSURE:
        return NOT_SURE
    if fault not in HARMLESS or not text.startswith(("{", "[")):
        return text
    if fault is Fault.FENCED:
        return f"Here is the answer you asked for:\n\n```json\n{text}\n```"
    if fault is Fault.PYTHON_LITERAL:
        return repr(json.loads(text))
    return text.replace('"question":', '"question1":').replace('"correct_answer":', '"correct answer1":')
