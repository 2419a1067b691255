"""Gemini through google-generativeai, the older SDK: end of life, kept for those whose stack is pinned to it."""

from __future__ import annotations

import asyncio
from typing import Any

import google.generativeai as genai
from google.api_core import exceptions
from google.protobuf.json_format import ParseError

from reverie_jax.hosted.images import as_sent
from reverie_jax.hosted.interface import Reply, Request, RequestSettings, TryAgain
from reverie_jax.hosted.providers.common import hide, seconds
from reverie_jax.hosted.providers.google_replies import reply, status


class GoogleGenerativeAI:
    """One request, one reply. The SDK blocks, so each request has a thread."""

    name = "google-generativeai"

    def __init__(self, model: str, url: str | None, settings: RequestSettings, key: str):
        self.model, self._settings, self._key = model, settings, key
        options = {"api_endpoint": url} if url else None
        genai.configure(api_key=key, transport="rest", client_options=options)
        self._model = genai.GenerativeModel(model)

    async def close(self) -> None:
        pass

    async def ask(self, request: Request) -> Reply:
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: Request) -> Reply:
        parts: list[Any] = [request.prompt]
        if request.shown:
            kind, encoded = as_sent(request.picture)
            parts.insert(0, {"mime_type": kind, "data": encoded})
        config: dict[str, Any] = {}
        if self._settings.temperature is not None:
            config["temperature"] = self._settings.temperature
        if self._settings.longest is not None:
            config["max_output_tokens"] = self._settings.longest
        if request.schema and self._settings.structured:
            config["response_mime_type"] = "application/json"
        try:
            found = self._model.generate_content(
                parts, generation_config=config, request_options={"timeout": self._settings.timeout, "retry": None}
            )
        except exceptions.GoogleAPICallError as error:
            headers = getattr(error.response, "headers", None) or {}
            after, who = seconds(headers.get("retry-after")), f"{self.name}:{self.model}"
            raise status(error.code, error.message or "", after, who, self._key) from None
        except exceptions.RetryError:
            raise TryAgain(f"no reply within {self._settings.timeout:g} s") from None
        except (ParseError, ValueError):
            raise TryAgain("the service's reply makes no sense") from None
        except OSError as error:  # requests' errors are
            if "imeout" in type(error).__name__:
                raise TryAgain(f"no reply within {self._settings.timeout:g} s") from None
            raise TryAgain(hide(f"connection failed ({type(error).__name__})", self._key)) from None
        return reply(found)
