"""What an annotator is asked and what it must reply: the one interface for hosted models and for the embedded world."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
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
]


@dataclasses.dataclass(frozen=True)
class RequestImage:
    """An image as an annotator gets it: `key` is its name, `encoded` the file's bytes (PNG, JPEG, …)."""

    key: str
    encoded: bytes


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        fields: what the stage needs. `questions`: {"count"} and {"confusing"}; `positive`: {"question", "answer"};
            `negative`: {"question", "answer"} with a confusing answer;
            `judge`: {"question", "answer", "positive", "wrong", "negative"}; `lrv_…`: {"captions", "count", "each"};
            `evaluate` (`eval.judge`): {"benchmark", "id", "prompt"}, the last a digest of the words.
        prompt: the same in words, for a hosted model.
        schema: of the reply's JSON; None where the reply is text.
        shown: whether the model sees the picture.
    """

    stage: Stage
    picture: RequestImage
    fields: Mapping[str, str]
    prompt: str = ""
    shown: bool = True
    schema: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back: raw text, tokens as the provider counts them, and the model's own name for its version."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    version: str = ""


@runtime_checkable
class Annotator(Protocol):
    """Anything that can reply at once, in memory."""

    name: str

    def reply(self, request: Request) -> str:
        """Raw reply; raises `AnnotationError` where none can be had."""
        ...


@runtime_checkable
class Provider(Protocol):
    """Anything that can reply over a wire.

    Attributes:
        name: the kind of provider.
        model: what is asked there; with the name, part of an item's identity.
    """

    name: str
    model: str

    async def ask(self, request: Request) -> Reply:
        """One reply to one request, one try.

        Raises:
            TryAgain: the service did not reply, and may do so later.
            Refused: it replied, and there is nothing to use.
            NoAccess: no request of this kind will ever be answered (key, model, address).
        """
        ...

    async def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class BatchStatus:
    """How a batch stands at its provider.

    Attributes:
        ended: nothing more will come.
        reason: why it ended without all results; empty where it did not.
        results: what the provider needs to fetch results.
    """

    ended: bool
    reason: str = ""
    results: tuple[str, ...] = ()


@runtime_checkable
class BatchProvider(Provider, Protocol):
    """A provider that also takes many requests as one file, answers within a day, and asks half the price.

    All methods raise `TryAgain` and `NoAccess` as `ask` does; `submit` also `Refused`.

    Attributes:
        most: requests of a batch.
        room: bytes of its file.
    """

    most: int
    room: int

    def line(self, key: str, request: Request) -> str:
        """A request as a line of the file, known by its key."""
        ...

    async def submit(self, file: Path, label: str) -> str:
        """Hands a file over; returns the batch's name there. `label` is ours, to find it by."""
        ...

    async def find(self, label: str) -> str | None:
        """The name of the batch that has our label; None where the provider has none."""
        ...

    async def look(self, name: str) -> BatchStatus: ...

    async def results(self, batch: BatchStatus) -> list[tuple[str, Reply | AnnotationError]]:
        """(key, reply or why there is none) of each request that has a result."""
        ...


class AnnotationError(Exception):
    """A request that got no usable reply; the message says why."""


class TryAgain(AnnotationError):
    """The wire's fault, or a limit's: worth another try.

    Attributes:
        after: seconds that the service wants to be left alone, where it says so.
        reached: something answered there.
    """

    def __init__(self, reason: str, after: float | None = None, *, reached: bool = True):
        super().__init__(reason)
        self.after, self.reached = after, reached


class Refused(AnnotationError):
    """A reply that cannot be used: blocked, empty, cut off, not what was asked for.

    Attributes:
        reply: what came, for the record.
    """

    def __init__(self, reason: str, reply: Reply | None = None):
        super().__init__(reason)
        self.reply = reply or Reply("")


class NoAccess(AnnotationError):
    """The service will not have us: a wrong key, an unknown model, an address that is none."""


def digest(*parts: object) -> str:
    """A content's name: 32 hexadecimal digits of the SHA-256 of the parts as JSON."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class RequestSettings:
    """What a hosted model is asked with.

    Attributes:
        timeout: seconds that one reply may take.
        structured: asks for JSON by schema where the provider can do that.
        temperature: None leaves it to the provider.
        longest: tokens of a reply, None leaves it to the provider.
    """

    timeout: float = 120.0
    structured: bool = True
    temperature: float | None = None
    longest: int | None = None

    @property
    def version(self) -> str:
        """What of this changes replies."""
        return f"structured={self.structured} temperature={self.temperature} longest={self.longest}"
