"""Any service that speaks OpenAI's chat completions: GPT, vLLM, SGLang and others."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import openai

from reverie_jax.data.annotate.interface import NoAccess, Refused, Reply, Request, TryAgain
from reverie_jax.data.annotate.pictures import as_sent
from reverie_jax.data.annotate.providers import Settings, hide, seconds


class OpenAI:
    """One request, one completion; retries are the runner's."""

    name = "openai"

    def __init__(self, model: str, url: str | None, settings: Settings, key: str):
        self.model, self._settings, self._key = model, settings, key
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # local servers want none, and the client wants one
            base_url=url,
            max_retries=0,
            timeout=settings.timeout,
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request) -> Reply:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        if request.shown:
            kind, encoded = as_sent(request.picture)
            data = base64.b64encode(encoded).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
        options: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        if self._settings.temperature is not None:
            options["temperature"] = self._settings.temperature
        if self._settings.longest is not None:
            options["max_completion_tokens"] = self._settings.longest
        if request.schema and self._settings.structured:
            schema = {"name": request.stage, "strict": True, "schema": request.schema}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            async with asyncio.timeout(self._settings.timeout):  # the SDK's own is for each read
                found = await self._client.chat.completions.create(model=self.model, **options)
        except (TimeoutError, openai.APITimeoutError):
            raise TryAgain(f"no reply within {self._settings.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise TryAgain(hide(f"connection failed ({error.__cause__ or error})", self._key)) from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except (openai.OpenAIError, ValueError) as error:  # a reply that is no completion
            raise TryAgain(hide(f"the service's reply makes no sense ({error})", self._key)) from None
        return self._reply(found)

    def _status(self, error: openai.APIStatusError) -> TryAgain | Refused | NoAccess:
        code, said = error.status_code, hide(f"{error.status_code}: {error.message}", self._key)
        if code in (408, 409, 429) or code >= 500:
            if code == 429 and error.code == "insufficient_quota":
                return NoAccess(said)
            return TryAgain(f"the service said {code}", seconds(error.response.headers.get("retry-after")))
        if code in (401, 403, 404):
            return NoAccess(f"openai:{self.model}: {said}")
        return Refused(said)  # 400, 413, 422: this request will never pass, others may

    def _reply(self, found: Any) -> Reply:
        choices = getattr(found, "choices", None)
        if not choices:
            raise TryAgain("the service's reply makes no sense (no choices)")
        choice, usage = choices[0], found.usage
        reply = Reply(
            choice.message.content or "",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            found.model or "",
        )
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            raise Refused(f"blocked ({choice.message.refusal or choice.finish_reason})", reply)
        if choice.finish_reason == "length":
            raise Refused("cut off at the longest reply", reply)
        if not reply.text.strip():
            raise Refused("an empty reply", reply)
        return reply
