"""Sort the failures of services: this request alone, this minute, or every request of the run; in the service's words."""

from __future__ import annotations

import html
import http.client
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    QueueFullError,
    RefusedError,
    Reply,
    RetryableError,
)
from reverie_jax.hosted.providers.common import hide, keep_raw, redact

_WORD_KEYS = (
    *("error", "errors", "message", "detail", "details", "msg", "reason", "error_description", "title"),
    *("base_resp", "status_msg", "error_msg", "err_msg"),
)
"""Where services put their words, the first that holds some wins; `error` may be a text, an object or a list."""
_MORE_KEYS = ("metadata", "details", "reasons", "violations", "quotaId", "raw", "error", "message")
"""Where they say more."""
_KIND_KEYS = ("code", "type", "status", "param")
"""Their names of a failure, for sorting alone."""


def _texts(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_NO_CREDIT = _texts(
    r"insufficient[\s_-]*(quota|credit|balance|fund)",
    r"(not enough|out of|no|more|your|purchase|negative) (prepaid )?(credit|balance|funds)",
    r"credit balance|payment[\s_-]*(is[\s_-]*)?required|(unpaid|overdue|failed|missing|no|add a) payment"
    r"|billing[\s_-]*(hard[\s_-]*limit|not[\s_-]*active|is (not|disabled))",
    r"enable billing|arrear|good standing|余额|欠费|额度(不足|已用)",
    r"(spend|usage|budget)(ing)?[\s_-]*(limit|cap)",
    r"(account|organi[sz]ation|project).{0,40}(suspended|deactivated|disabled|blocked|restricted)",
)
_USED_UP = _texts(
    r"per[\s_-]*(day|month)", r"\b(daily|monthly)\b", r"\b(RPD|TPD)\b", r"\blimit: 0\b", r"(今日|当日|每日|本月|每月)"
)
_NO_ACCESS = _texts(
    r"api[\s_-]*key",
    r"location is not supported|unsupported_country|country.{0,40}not supported|not available in your",
    r"\b(invalid|unknown|unsupported|no such) model\b|\bmodel_not_found\b|not a valid model",
    r"\bmodel\b[^.]{0,80}\b(not (been )?(found|exist|available|supported|allowed)|does(n't| not) exist|no longer|"
    r"deprecated|decommissioned|retired|shut down)",
    r"unexpected endpoint|unknown (request )?(url|endpoint|route)",
    r"unauthori[sz]ed|(invalid|expired|missing|incorrect) (access |auth\w* )?token\b(?! in)",
    r"令牌|密钥|模型.{0,20}不存在|不存在.{0,4}模型",
    r"no models? (is |are )?loaded|\bmodel\b.{0,20}not loaded",
)
_NO_VISION = _texts(
    r"does(n't| not) support (image|vision|multimodal)s?( input)?\b(?! format)|not a multimodal model",
    r"image input is not supported|at most 0 image",
)
_MODERATED = _texts(
    r"moderat|flagged|content[\s_-]*(policy|filter|management|exists risk)|safety|prohibited|inappropriate|sensitive",
    r"data_?inspection|responsible ai|guardrail|usage polic|敏感|不安全",
)
_TOO_LONG = _texts(
    r"context[\s_-]*(length|window)|(prompt|input|messages?).{0,30}too (long|large)|too many (input |prompt )?tokens|"
    r"reduce the length|maximum number of tokens|request too large"
)
_TOO_LARGE = "the picture is too large for this server; send smaller ones (annotate: --max-image-size)"
_PICTURE = _texts(r"\b(image|picture|photo|png|jpe?g|webp|gif)s?\b")
"""What is wrong with one picture says nothing about the others."""
_THIS_MINUTE = _texts(r"rate[\s_-]*limit", r"too many requests", r"overloaded")
_PER_MINUTE = _texts(r"per[\s_-]*(min|sec)", r"\b(RPM|TPM|RPS)\b", r"try again in [\d.]+ ?m?s\b")
"""Limits that pass, although their messages advertise credit."""
_LONGEST_WAIT = 2 * 3600.0
"""Seconds; a service that asks to wait longer has a quota of the day that is used up."""
_QUEUE_FULL = _texts(r"enqueued|too many.{0,20}batch|concurrent batch|batch.{0,20}(queue|limit)|token_limit_exceeded")
_LENGTH = _texts(r"max_(completion_|output_|new_)?tokens|maxOutputTokens")
_HINTS = (
    (_texts(r"temperature"), "leave it out with --temperature none"),
    (
        _texts(
            r"response_?(format|schema|mime_?type|json_?schema)|json_schema|json mode|structured|additionalProperties"
        ),
        "add --no-structured",
    ),
    (_LENGTH, "set --max-new-tokens"),
)
"""Parameters that a service may refuse, and what to do about it."""
_NAME_REFUSED = _texts(
    r"not (permitted|supported|allowed)|unsupported|unknown|un(recognized|expected)|extra|no such|invalid p"
)


def _walk(body: Any, keys: tuple[str, ...], depth: int = 0) -> Iterator[str]:
    """Yield the texts at some keys of a body, however deep."""
    if isinstance(body, str):
        if body.lstrip().startswith(("{", "[")) and depth < 8:  # OpenRouter quotes the error of the service behind it
            try:
                yield from _walk(json.loads(body), keys, depth + 1)
                return
            except (ValueError, RecursionError):
                pass
        yield body
    elif isinstance(body, list) and depth < 8:
        for item in body[:5]:
            yield from _walk(item, keys, depth + 1)
    elif isinstance(body, Mapping) and depth < 8:
        for key in keys:
            if key in body:
                yield from _walk(body[key], keys, depth + 1)
    elif isinstance(body, int) and not isinstance(body, bool):
        yield str(body)


def _messages(body: Any, depth: int = 0) -> Iterator[str]:
    """Yield the service's sentences; an error of a field has the field before it."""
    if isinstance(body, list) and depth < 8:
        for item in body[:5]:
            yield from _messages(item, depth + 1)
    elif isinstance(body, Mapping) and depth < 8:
        place = body.get("loc")
        where = ".".join(map(str, place)) + ": " if isinstance(place, list) else ""
        for key in _WORD_KEYS:
            found = [text for text in _messages(body[key], depth + 1) if text] if key in body else []
            if found:
                yield from (f"{where}{text}" for text in found)
                break
        yield from _walk({key: body[key] for key in ("metadata", "details") if key in body}, _MORE_KEYS)
    elif isinstance(body, str):
        yield _strip_page(body)


def _strip_page(text: str) -> str:
    """Return the words of a web page: its title, its heading, or all of them; another text is left as it is."""
    if not re.match(r"\ufeff?\s*<[!?a-z][^>]*>", text, re.IGNORECASE) or not re.search(r"</|<[!?]|/>", text):
        return text
    text = re.sub(r"<!--.*?-->|<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    parts = [match[2] for match in re.finditer(r"<(title|h[1-3])\b[^>]*>(.*?)</\1>", text, re.DOTALL | re.IGNORECASE)]
    words = [" ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split()) for part in [*parts, text]]
    return next((part for part in words if re.search(r"[^\W\d]{2}", part)), words[-1])


def find_words(body: Any) -> str:
    """Return what a service says, of a decoded body of any shape: in one line, empty if it says nothing."""
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in _messages(body) if text.strip()))


def decode_body(text: str) -> Any:
    """Return a body as JSON, or unchanged where it is not JSON; raw line breaks within texts are accepted."""
    try:
        return json.loads(text.removeprefix("\ufeff"), strict=False)
    except (ValueError, RecursionError):
        return text


def refuses_length(status: int, body: Any, name: str) -> bool:
    """Return whether a service refuses the name of the parameter that limits a reply's length, whatever its value."""
    words = find_words(body)
    return status in (400, 422) and re.search(rf"\b{name}\b", words) is not None and bool(_NAME_REFUSED.search(words))


def _with_status(status: int | None, words: str) -> str:
    """Return the status once and then the service's words; without any, the status's standard phrase."""
    if status is None:
        return f"error: {words}" if words else "an error without a word"
    number = rf"(?:(?:http )?(?:error |status )?(?:code )?{status}\b[\s:.|\u2013\u2014-]*)+"
    words = re.sub(f"^{number}", "", words, flags=re.IGNORECASE)
    return f"{status}: {words or http.client.responses.get(status, 'no words')}"


def sort_failure(
    status: int | None, body: Any, source: str, secret: str, retry_after: float | None = None, *, sent: str = ""
) -> AnnotationError:
    """Return the error for a failed request.

    Args:
        status: HTTP status; None if the service gave none with its error.
        body: The decoded body, of any shape.
        source: "provider:model", for messages.
        secret: The API key, which the service may quote.
        retry_after: Seconds to wait, if the service says so.
        sent: Names of optional parameters that were sent; a refusal of one is a reason for every request.
    """
    words = redact(find_words(body), secret)
    text = _with_status(status, words)
    every = AccessError(f"{source}: {text}")
    kinds = " ".join([words, *_walk(body, (*_WORD_KEYS, *_MORE_KEYS, *_KIND_KEYS))])
    used_up = status in (None, 403, 429) and _USED_UP.search(kinds)
    passes = status == 429 and _PER_MINUTE.search(words) and "insufficient_quota" not in kinds
    if status == 402 or used_up or (_NO_CREDIT.search(kinds) and not passes):
        return every
    if _NO_VISION.search(kinds):
        return every
    if status in (403, 429, *range(500, 600)) and retry_after is not None and retry_after > _LONGEST_WAIT:
        hours = f"{retry_after / 3600:,.0f} hours" if retry_after < 1e9 else "for ever"
        return AccessError(f"{source}: {text.rstrip('.')}; it asks to wait {hours}")
    if status == 413:
        return RefusedError(f"{text.rstrip('.')}: {_TOO_LARGE}")
    if status == 429 and _TOO_LONG.search(words):
        return RefusedError(text)
    if (status is None or 400 <= status < 500) and status not in (401, 404, 408, 429) and _MODERATED.search(kinds):
        return RefusedError(text)
    if status is None:
        return every if _NO_ACCESS.search(kinds) else RetryableError(text, retry_after)
    if status == 403:
        return RetryableError(text, retry_after) if _THIS_MINUTE.search(words) else every
    if status in (408, 409, 425, 429, 498, 499) or (status >= 500 and status != 501):
        # A proxy gave up waiting; the model behind it goes on, and is paid for.
        return RetryableError(text, retry_after, charged=status in (504, 524))
    if status not in (401, 403, 404, 405, 407, 410, 501, *range(300, 400)):
        if _TOO_LONG.search(words):
            return RefusedError(text)
        for pattern, hint in _HINTS:
            if pattern.search(sent) and pattern.search(kinds):
                return AccessError(f"{source}: {text.rstrip('.')}; {hint}")
        if _NO_ACCESS.search(kinds):
            return every
        if _THIS_MINUTE.search(words):
            return RetryableError(text, retry_after)
        return RefusedError(text, systematic=not _PICTURE.search(kinds))
    return every


def sort_submission(failure: AnnotationError) -> AnnotationError:
    """Return the error for a batch that could not be submitted: a queue that is full takes a smaller one."""
    reason = str(failure)
    if isinstance(failure, AccessError) or not (_QUEUE_FULL.search(reason) or reason.startswith(("413", "429"))):
        return failure
    return QueueFullError(reason, getattr(failure, "retry_after", None))


def is_queue_full(words: str) -> bool:
    """Return whether a batch failed because too much is enqueued."""
    return _QUEUE_FULL.search(words) is not None


def read_reply(raw: str, parse: Callable[[Any], Reply], secret: str) -> Reply:
    """Parse a body; what cannot be read keeps its raw text, because it may be paid for."""
    body = decode_body(raw)
    try:
        if isinstance(body, str) and raw.lstrip("\ufeff \t\r\n")[:1] in ("{", "["):
            raise RetryableError(f"the reply broke off after {len(raw):,} characters", charged=True)
        return parse(body)
    except AnnotationError as error:
        keep_raw(error, raw, secret)
        raise
    except Exception as error:
        raw = hide(raw, secret)
        reason = f"the reply cannot be read ({type(error).__name__})"
        raise RefusedError(reason, Reply(raw, counted=False), systematic=True) from None


def read_counts(
    usage: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], thoughts: tuple[str, ...] = ()
) -> tuple[int, int, bool]:
    """Return (input tokens, output tokens, whether both were counted) of a usage object of any shape.

    Args:
        usage: As the service sent it.
        inputs: Names of the input count; the first that is there counts.
        outputs: Names of the output count, likewise.
        thoughts: Names of the count of thoughts, where the output count leaves them out.
    """

    def find(names: tuple[str, ...]) -> int | None:
        counts = (_count(usage.get(name)) for name in names) if isinstance(usage, Mapping) else ()
        return next((count for count in counts if count is not None), None)

    given, made, thought = find(inputs), find(outputs), find(thoughts)
    return given or 0, (made or 0) + (thought or 0), given is not None and made is not None


def _count(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12 else None
