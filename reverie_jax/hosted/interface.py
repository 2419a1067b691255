"""Requests, replies and providers: one interface for hosted models and for annotators in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Stage = Literal[
    "questions",
    "positive",
    "negative",
    "judge",
    "lrv_positive",
    "lrv_nonexistent",
    "lrv_existent",
    "lrv_knowledge",
    "evaluate",
    "predict",
    "explain",
]


@dataclasses.dataclass(frozen=True)
class RequestImage:
    """An image of a request: `key` is its name, `encoded` the file's bytes (PNG, JPEG, ...)."""

    key: str
    encoded: bytes


@dataclasses.dataclass(frozen=True)
class Request:
    """One request to a model.

    Attributes:
        fields: Values of the prompt's template. `questions`: {"count", "confusing"}; `positive`: {"question", "answer"};
            `negative`: {"question", "answer"} with a confusing answer;
            `judge`: {"question", "answer", "positive", "wrong", "negative"}; `lrv_...`: {"captions", "count", "each"};
            `evaluate` (`eval.judge`): {"benchmark", "id", "prompt"}, the last a digest of the prompt; `predict`, `explain`
            (`eval.predict_hosted`): {"turns"}, a digest.
        prompt: The filled template, for a hosted model.
        turns: A conversation in place of the prompt: texts, the user's first and last. It begins with the image.
        send_image: Whether the model sees the image.
        schema: JSON schema of the reply; None if the reply is text.
    """

    stage: Stage
    image: RequestImage
    fields: Mapping[str, str]
    prompt: str = ""
    send_image: bool = True
    schema: Mapping[str, Any] | None = None
    turns: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Reply:
    """A raw reply, its tokens as the provider counts them, and the model version that the provider names.

    Attributes:
        counted: Whether the provider counted the tokens; they are 0 if it did not.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    version: str = ""
    counted: bool = True


@runtime_checkable
class Annotator(Protocol):
    """A model in memory that replies at once."""

    name: str

    def reply(self, request: Request) -> str:
        """Return the raw reply.

        Raises:
            AnnotationError: There is no reply.
        """
        ...


@runtime_checkable
class Provider(Protocol):
    """A model behind an API.

    Attributes:
        name: Kind of provider.
        model: The provider's name of the model.
    """

    name: str
    model: str

    async def ask(self, request: Request) -> Reply:
        """Send one request once and return its reply.

        Raises:
            RetryableError: No reply came; a later attempt may succeed.
            UnusableError: The request cannot be sent, or its reply cannot be used.
            RefusedError: It would fail again.
            AccessError: Every request will fail (key, credit, quota of the day, model, URL, parameter).
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


@dataclasses.dataclass(frozen=True)
class BatchStatus:
    """State of a batch at its provider.

    Attributes:
        ended: Whether all results are available.
        reason: Why it ended without all results; empty if it did not.
        result_files: The provider's names of the files of results.
        full: Whether it was not started because too much is enqueued at the provider.
        lines: Results that the status itself holds, as the lines of a file.
        denied: Whether another batch would end likewise (key, credit, model).
    """

    ended: bool
    reason: str = ""
    result_files: tuple[str, ...] = ()
    full: bool = False
    lines: bytes = b""
    denied: bool = False


@runtime_checkable
class BatchProvider(Provider, Protocol):
    """A provider that also takes many requests as one file: results within a day, at half the price.

    All methods raise `RetryableError` and `AccessError` as `ask` does; `submit` also `UnusableError` and `QueueFullError`.

    Attributes:
        max_requests: Most requests of a batch.
        max_bytes: Largest size of its file.
    """

    max_requests: int
    max_bytes: int

    def encode_request(self, key: str, request: Request) -> str:
        """Return a request as a line of the file; `key` identifies its result."""
        ...

    async def submit(self, file: Path, label: str) -> str:
        """Upload a file, create its batch and return the provider's name of it; `find_batch` finds it by `label`."""
        ...

    async def find_batch(self, label: str) -> str | None:
        """Return the provider's name of the batch with our label, or None."""
        ...

    async def get_status(self, name: str) -> BatchStatus:
        """Return the state of a batch."""
        ...

    async def fetch_results(self, status: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        """Return (key, reply or error) of each request that has a result."""
        ...


class AnnotationError(Exception):
    """A request without a usable reply; the message says why.

    Attributes:
        reply: What the service sent, or None.
    """

    def __init__(self, reason: str, reply: Reply | None = None):
        super().__init__(reason)
        self.reply = reply


class RetryableError(AnnotationError):
    """The connection or the service failed, or a rate limit was hit.

    Attributes:
        retry_after: Seconds to wait, if the service says so.
        reached: Whether a server answered.
        charged: Whether the request may have been paid for (nothing came in time, or half a reply): tried as seldom as one
            with an unusable reply.
    """

    def __init__(
        self,
        reason: str,
        retry_after: float | None = None,
        *,
        reached: bool = True,
        charged: bool = False,
        reply: Reply | None = None,
    ):
        super().__init__(reason, reply)
        self.retry_after, self.reached, self.charged = retry_after, reached, charged


class QueueFullError(RetryableError):
    """Too much is enqueued at the provider, or a file is too large: a smaller batch may be accepted, or a later one."""


class UnusableError(AnnotationError):
    """The request cannot be sent (its image is broken) or its reply cannot be used (blocked, empty, malformed)."""


class RefusedError(UnusableError):
    """The same request would fail again (moderated, too large, cut off at a limit): it is sent once.

    Attributes:
        systematic: Whether other requests may well fail alike, for all that is known (an unknown 400): if the first ones all
            do, the run ends.
    """

    def __init__(self, reason: str, reply: Reply | None = None, *, systematic: bool = False):
        super().__init__(reason, reply)
        self.systematic = systematic


class AccessError(AnnotationError):
    """No request of the run can succeed: wrong key, no credit, a used-up quota of the day, unknown model, wrong URL."""


def digest(*parts: object) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of the parts as JSON."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class RequestSettings:
    """Settings of every request.

    Attributes:
        timeout: Seconds to wait for one reply.
        structured: Request JSON by schema, if the provider supports it.
        temperature: Sampling temperature; the provider's default if None.
        max_new_tokens: Most tokens of a reply; the provider's default if None.
        max_image_size: Longest side of an image, in pixels: larger ones are scaled down; none is if None.
        keep_cut_off: Whether the words of a reply that was cut off at its maximum length are a reply.
    """

    timeout: float = 120.0
    structured: bool = True
    temperature: float | None = None
    max_new_tokens: int | None = None
    max_image_size: int | None = None
    keep_cut_off: bool = False

    @property
    def version(self) -> str:
        """The settings that change replies, as part of a request's identity; existing journals hold this spelling."""
        size = "" if self.max_image_size is None else f" image={self.max_image_size}"
        return f"structured={self.structured} temperature={self.temperature} longest={self.max_new_tokens}{size}"
