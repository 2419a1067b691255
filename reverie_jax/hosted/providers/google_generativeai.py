"""Gemini through google-generativeai, the deprecated SDK, for stacks that are pinned to it."""

from __future__ import annotations

import asyncio
from typing import Any

import google.generativeai as genai
from google.api_core import exceptions
from google.protobuf.json_format import ParseError

from reverie_jax.files import well_formed
from reverie_jax.hosted.images import encode_image
from reverie_jax.hosted.interface import Reply, Request, RequestSettings, RetryableError
from reverie_jax.hosted.providers.common import UNEXPECTED, broken_off, redact, timed_out
from reverie_jax.hosted.providers.failures import decode_body, read_reply
from reverie_jax.hosted.providers.google_replies import ROLES, error_from_body, parse_response


class GoogleGenerativeAI:
    """Gemini models through a blocking SDK; each request runs in a thread."""

    name = "google-generativeai"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        options = {"api_endpoint": url} if url else None
        genai.configure(api_key=key, transport="rest", client_options=options)
        self._model = genai.GenerativeModel(model)

    async def close(self) -> None:
        """Do nothing: the SDK has no connections to close."""

    async def ask(self, request: Request) -> Reply:
        """Send one request; see `Provider.ask`."""
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: Request) -> Reply:
        parts: list[list[Any]] = [[well_formed(text)] for text in request.turns or (request.prompt,)]
        if request.send_image:
            kind, encoded = encode_image(request.image, self._settings.max_image_size)
            parts[0].insert(0, {"mime_type": kind, "data": encoded})
        contents = [{"role": ROLES[n % 2], "parts": turn} for n, turn in enumerate(parts)]
        config: dict[str, Any] = {}
        if self._settings.temperature is not None:
            config["temperature"] = self._settings.temperature
        if self._settings.max_new_tokens is not None:
            config["max_output_tokens"] = self._settings.max_new_tokens
        if request.schema and self._settings.structured:
            config["response_mime_type"] = "application/json"
        source = f"{self.name}:{self.model}"
        try:
            response = self._model.generate_content(
                contents, generation_config=config, request_options={"timeout": self._settings.timeout, "retry": None}
            )
        except exceptions.GoogleAPICallError as error:
            headers = getattr(error.response, "headers", None) or {}
            body = decode_body(getattr(error.response, "text", None) or error.message or "")
            header, sent = headers.get("retry-after"), " ".join(config)
            raise error_from_body(error.code, body, source, self._key, header, sent=sent) from None
        except exceptions.RetryError:
            raise timed_out(self._settings.timeout, b"", self._key, asked=True) from None
        except OSError as error:  # the base class of requests' errors, of which one is a ValueError, too
            name = type(error).__name__
            if "imeout" in name and "Connect" not in name:
                raise timed_out(self._settings.timeout, b"", self._key, asked=True) from None
            if name in ("ChunkedEncodingError", "ContentDecodingError", "JSONDecodeError"):
                raise broken_off(error, b"", self._key) from None
            raise RetryableError(redact(f"connection failed ({name})", self._key), reached=False) from None
        except (ParseError, ValueError) as error:
            raise RetryableError(redact(f"{UNEXPECTED} ({error})", self._key), charged=True) from None
        message = response._result
        raw = type(message).to_json(message, use_integers_for_enums=False, including_default_value_fields=False)
        return read_reply(raw, lambda body: parse_response(body, source, self._key, self._settings), self._key)
