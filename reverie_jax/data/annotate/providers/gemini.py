"""Gemini through google-genai, the maintained SDK."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from google import genai
from google.genai import errors, types

from reverie_jax.data.annotate.interface import Reply, Request, TryAgain
from reverie_jax.data.annotate.pictures import as_sent
from reverie_jax.data.annotate.providers import Settings, hide, seconds
from reverie_jax.data.annotate.providers.google_replies import reply, status

_WIRES = {"httpx", "httpx2", "httpcore", "aiohttp", "anyio", "ssl"}
"""Packages whose errors are the wire's: which of them the SDK uses depends on what is installed."""


class Gemini:
    """One request, one reply; retries are the runner's."""

    name = "gemini"

    def __init__(self, model: str, url: str | None, settings: Settings, key: str):
        self.model, self._settings, self._key = model, settings, key
        once = types.HttpRetryOptions(attempts=1)  # left to itself, the SDK may retry behind our back
        options = types.HttpOptions(base_url=url, timeout=int(settings.timeout * 1000), retry_options=once)
        self._client = genai.Client(api_key=key, http_options=options, vertexai=False).aio

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, request: Request) -> Reply:
        parts: list[Any] = [types.Part.from_text(text=request.prompt)]
        if request.shown:
            kind, encoded = as_sent(request.picture)
            parts.insert(0, types.Part.from_bytes(data=encoded, mime_type=kind))
        config = types.GenerateContentConfig(
            temperature=self._settings.temperature, max_output_tokens=self._settings.longest
        )
        if request.schema and self._settings.structured:
            config.response_mime_type = "application/json"
            config.response_json_schema = dict(request.schema)
        content = types.Content(role="user", parts=parts)
        try:
            async with asyncio.timeout(self._settings.timeout):  # the SDK's own is for each read
                found = await self._client.models.generate_content(model=self.model, contents=content, config=config)
        except errors.APIError as error:
            raise status(
                error.code, error.message or "", retry_after(error), f"gemini:{self.model}", self._key
            ) from None
        except (TimeoutError, OSError, ValueError) as error:  # ValueError: what came back is no JSON
            raise _wire(error, self._settings.timeout, self._key) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in _WIRES:
                raise
            raise _wire(error, self._settings.timeout, self._key) from None
        return reply(found)


def _wire(error: Exception, timeout: float, key: str) -> TryAgain:
    if "timeout" in type(error).__name__.lower():
        return TryAgain(f"no reply within {timeout:g} s")
    if isinstance(error, ValueError):
        return TryAgain("the service's reply makes no sense")
    return TryAgain(hide(f"connection failed ({type(error).__name__})", key))


def retry_after(error: errors.APIError) -> float | None:
    """Seconds that the service asks for: in the header, or in the body's google.rpc.RetryInfo."""
    headers = getattr(error.response, "headers", None) or {}
    if (found := seconds(headers.get("retry-after") or headers.get("Retry-After"))) is not None:
        return found
    delay = re.search(r"'retryDelay': '([\d.]+)s'", str(error.details))
    return float(delay[1]) if delay else None
