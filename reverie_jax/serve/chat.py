"""OpenAI's chat completions: from the JSON of a request to what is decoded, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import secrets
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import BrokenImage
from reverie_jax.data.processor import Processor
from reverie_jax.data.tree import unsupervised
from reverie_jax.errors import UserError
from reverie_jax.files import well_formed
from reverie_jax.serve.answers import Delta, ScoredToken
from reverie_jax.serve.errors import ApiError
from reverie_jax.serve.images import read_image
from reverie_jax.serve.scheduler import Request

MAX_ANSWERS = 32
LEAST_TEMPERATURE = 1e-4
"""A lower one decodes greedily: scores that are divided by it may overflow."""


class _Strict(BaseModel):
    # An option that would be passed over in silence is refused, and so is "3" for 3.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


_Parts = list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | _Parts | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        """Return the text parts, a line each."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, _TextPart))

    def images(self) -> list[str]:
        """Return the URLs of the images."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, _ImagePart)]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _TextFormat(_Strict):
    type: Literal["text"]


_WITHOUT_EFFECT = (
    *("frequency_penalty", "presence_penalty", "logit_bias"),
    *("tools", "functions", "modalities", "response_format"),
)
"""Options that are accepted at the value that changes nothing."""
_Zero = Annotated[float, Field(ge=0, le=0)] | None
_Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)] | None
_StopText = Annotated[str, Field(min_length=1)]


class ChatRequest(_Strict):
    """The body of a chat completions request; options that the model cannot honor are errors."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=4)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # `_WITHOUT_EFFECT`
    frequency_penalty: _Zero = None
    presence_penalty: _Zero = None
    logit_bias: _Nothing = None
    tools: _Nothing = None
    functions: _Nothing = None
    modalities: list[Literal["text"]] | None = None
    response_format: _TextFormat | None = None
    # Of no meaning here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def top(self) -> int | None:
        """Number of alternatives to each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(body: bytes) -> ChatRequest:
    """Return the request of a body.

    Raises:
        ApiError: It is not one; the field is named.
    """
    try:
        request = ChatRequest.model_validate(well_formed(json.loads(body)))
    except ValidationError as error:
        raise _refusal(error) from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON; it must be an object in UTF-8") from None
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: needs stream to be true", param="stream_options")
    return request


def _refusal(error: ValidationError) -> ApiError:
    # Of a text or a list of parts, what is wrong with the part says more than that it is not a text.
    deepest = max(reversed(error.errors(include_url=False)), key=lambda one: len(one["loc"]))
    names = [part for part in deepest["loc"] if isinstance(part, int) or part.isidentifier()]
    if not names:
        return ApiError(400, "the body must be a JSON object")
    field = ".".join(str(name) for name, _ in itertools.groupby(names) if name not in ("str", "list"))
    without = deepest["type"] == "extra_forbidden" or names[0] in _WITHOUT_EFFECT
    return ApiError(400, f"{field}: {'not supported; leave it out' if without else deepest['msg']}", param=field)


def prepare(
    chat: ChatRequest, processor: Processor, *, context: int, max_new_tokens: int, hosts: Collection[str] = ()
) -> Request:
    """Return what a request asks the model for; its image is decoded here, so that a broken one harms nobody else.

    Args:
        chat: The request.
        processor: The model's.
        context: Maximum number of tokens of prompt and answer.
        max_new_tokens: The same of an answer, where the request names none.
        hosts: See `read_image`.

    Raises:
        ApiError: It cannot be answered.
    """
    processor, messages = _with_system(processor, chat.messages)
    conversation, urls = _conversation(messages)
    encoded = read_image(urls[0], hosts) if urls else b""
    try:
        image = processor.preprocess(encoded, "image_url")
        tokens = processor.encoder(conversation)
    except BrokenImage as error:
        raise ApiError(400, str(error), param="messages", code="invalid_image_url") from None
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    return Request(
        tokens=unsupervised(tokens),
        digest=hashlib.sha256(encoded).hexdigest() if encoded else "",
        image=image,
        n=chat.n or 1,
        longest=_longest(chat, len(tokens), context, max_new_tokens),
        temperature=1.0 if chat.temperature is None else chat.temperature * (chat.temperature >= LEAST_TEMPERATURE),
        top_p=1.0 if chat.top_p is None else chat.top_p,
        seed=(secrets.randbits(32) if chat.seed is None else chat.seed) & 0xFFFFFFFF,
        stops=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
        top=chat.top,
    )


def _with_system(processor: Processor, messages: Sequence[_Message]) -> tuple[Processor, Sequence[_Message]]:
    """Return the processor that writes the messages' system text in place of its template's, and the other messages."""
    template, first = processor.encoder.template, messages[0]
    if first.role not in ("system", "developer") or first.images():
        return processor, messages
    if (text := first.text().strip()) not in ("", template.sentence):
        if not template.sentence:
            raise ApiError(
                400,
                f"messages.0: the chat template {template.name} has no system text; put yours in the user's message",
                param="messages.0",
            )
        system = template.system.replace(template.sentence, text)
        processor = processor.override(dataclasses.replace(template, system=system, sentence=text))
    return processor, messages[1:]


def _conversation(messages: Sequence[_Message]) -> tuple[Conversation, list[str]]:
    """Return the open conversation of messages, and the URLs of its images, which come before their message's text."""
    turns, urls = list[Turn](), list[str]()
    for number, message in enumerate(messages):
        text, shown, param = message.text(), message.images(), f"messages.{number}"
        if message.role in ("system", "developer"):
            raise ApiError(400, f"{param}: a system text comes first, once, and without images", param=param)
        if shown and message.role == "assistant":
            raise ApiError(400, f"{param}: an answer with an image; only user messages may have images", param=param)
        if message.role == "user":
            if text.count(IMAGE) not in (0, len(shown)):
                raise ApiError(400, f"{param}: {IMAGE} stands for an image, of which there is none", param=param)
            text = text if IMAGE in text else f"{IMAGE}\n" * len(shown) + text
            urls += shown
        turns.append(Turn("user" if message.role == "user" else "assistant", text))
    if len(urls) > 1:
        raise ApiError(400, f"messages: {len(urls)} images; the model takes one in a conversation", param="messages")
    try:
        conversation = Conversation(tuple(turns), (0,) * len(urls))
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    if not turns or not conversation.is_open:
        raise ApiError(400, "messages: the last one must be the user's", param="messages")
    return conversation, urls


def _longest(chat: ChatRequest, prompt: int, context: int, usual: int) -> int:
    name = "max_completion_tokens" if chat.max_completion_tokens is not None else "max_tokens"
    wanted, room = getattr(chat, name), context - prompt
    if room < (wanted or 1):
        raise ApiError(
            400,
            f"{prompt} tokens of the messages and {wanted or 1} of the answer exceed the context of {context}",
            param="messages" if room < 1 else name,
            code="context_length_exceeded",
        )
    return min(usual, room) if wanted is None else int(wanted)


class Response:
    """Makes the JSON of a request's response, whole or in chunks."""

    def __init__(self, chat: ChatRequest, request: Request):
        self._chat, self._prompt = chat, len(request.tokens)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        self._counts: dict[int, int] = {}

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """Return the completion of all deltas."""
        answers: dict[int, list[Delta]] = {}
        for delta in deltas:
            answers.setdefault(delta.index, []).append(delta)
            self._counts[delta.index] = delta.count
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(part.text for part in parts), "refusal": None},
                "logprobs": self._logprobs(token for part in parts for token in part.tokens),
                "finish_reason": parts[-1].finish,
            }
            for index, parts in sorted(answers.items())
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def opening(self, n: int) -> list[dict[str, Any]]:
        """Return the chunks that begin `n` answers."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None) for index in range(n)]

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Return a delta as a chunk; None if it holds nothing new."""
        self._counts[delta.index] = delta.count
        if not (delta.text or delta.tokens or delta.finish):
            return None
        content = {"content": delta.text} if delta.text or delta.tokens else {}
        return self._chunk(delta.index, content, self._logprobs(delta.tokens), delta.finish)

    def closing(self) -> dict[str, Any] | None:
        """Return the chunk of the token counts, if the request asks for it."""
        if self._chat.stream_options is None or not self._chat.stream_options.include_usage:
            return None
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Iterable[ScoredToken]) -> dict[str, Any] | None:
        if self._chat.top is None:
            return None
        return {
            "content": [
                {
                    **_token(token.text, token.logprob),
                    "top_logprobs": [_token(text, logprob) for text, logprob in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _usage(self) -> dict[str, int]:
        completion = sum(self._counts.values())
        counts = {"prompt_tokens": self._prompt, "completion_tokens": completion}
        return {**counts, "total_tokens": self._prompt + completion}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # JSON has no infinity; OpenAI's API says -9999 for what is impossible.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}
