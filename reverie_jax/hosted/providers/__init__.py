"""Model providers: hosted APIs, recorded replies, and those that other packages register."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Provider, RequestSettings
from reverie_jax.hosted.providers.common import find_api_key

GROUP = "reverie_jax.providers"
"""Entry-point group of further providers; each is a function (model, url, settings, environment) -> Provider."""


_ADDRESS = re.compile(r"@(?:https?:|localhost\b|[\w.-]+:\d+(?:/|$)|[\w-]+(?:\.[\w-]+)+(?:/|$))", re.IGNORECASE)
"""An address that lacks its scheme, or has it in capitals; a model's own name may hold an @."""


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all providers: built in, then registered under `GROUP` by installed packages."""
    return (*_BUILT_IN, *importlib.metadata.entry_points(group=GROUP).names)


def parse_model_spec(model_spec: str) -> tuple[str, str, str | None]:
    """Return (provider, model, URL) of "gemini:MODEL", "openai:MODEL@http://host/v1", "scenes:FOLDER" or "replay:JOURNAL".

    Raises:
        UserError: It has another form.
    """
    name, _, model = model_spec.partition(":")
    model, at, url = model.partition("@http")
    if not at and _ADDRESS.search(model):  # it would be sent to another service than the one that is meant
        raise UserError(
            f"{redact_password(model_spec)}: an address begins with http:// or https://, as MODEL@http://host/v1"
        )
    if name not in (known := names()) or not model:
        raise UserError(
            f"{redact_password(model_spec)!r}: must be PROVIDER:MODEL; choose a provider from {', '.join(known)}"
        )
    return name, model, f"http{url}" if at else None


def redact_password(model_spec: str) -> str:
    """Return a model's name without the password that its URL may hold."""
    return re.sub(r"(@(?:https?://)?)[^/@]*@", r"\1", model_spec, flags=re.IGNORECASE)


def open_provider(model_spec: str, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    """Open a provider, with the API key of the environment.

    Raises:
        UserError: The name is unknown, its package is not installed, or its key is not set.
    """
    name, model, url = parse_model_spec(model_spec)
    try:
        if name in _BUILT_IN:
            return _BUILT_IN[name](model, url, settings, environment)
        entry_point = next(iter(importlib.metadata.entry_points(group=GROUP, name=name)))
        provider: Provider = entry_point.load()(model, url, settings, environment)
        return provider
    except ImportError as error:
        fix = f": pip install -e '.[{name}]' in the checkout" if name in _BUILT_IN else ""
        raise UserError(f"{name} needs a package that is not installed ({error}){fix}") from None


def _gemini(model: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    from reverie_jax.hosted.providers.gemini import Gemini

    return Gemini(model, url, settings, find_api_key(environment, "GEMINI_API_KEY", "GOOGLE_API_KEY"))


def _openai(model: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    from reverie_jax.hosted.providers.openai import OpenAI

    own_server = url is not None or "OPENAI_BASE_URL" in environment  # such servers often need no key
    return OpenAI(model, url, settings, find_api_key(environment, "OPENAI_API_KEY", required=not own_server))


def _google_generativeai(
    model: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]
) -> Provider:
    from reverie_jax.hosted.providers.google_generativeai import GoogleGenerativeAI

    return GoogleGenerativeAI(model, url, settings, find_api_key(environment, "GEMINI_API_KEY", "GOOGLE_API_KEY"))


def _replay(journal: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    from reverie_jax.hosted.providers.local import Replay

    return Replay(Path(journal))


_BUILT_IN = {"gemini": _gemini, "openai": _openai, "google-generativeai": _google_generativeai, "replay": _replay}
