"""Model providers: hosted APIs, recorded replies, and those that other packages register."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Provider, RequestSettings
from reverie_jax.hosted.providers.common import key

GROUP = "reverie_jax.providers"
"""Entry-point group of further providers; each is a function (model, url, settings, environment) -> Provider."""


def names() -> tuple[str, ...]:
    """Return the names of all providers: built in, then registered under `GROUP` by installed packages."""
    return (*_BUILT_IN, *importlib.metadata.entry_points(group=GROUP).names)


def parse(model_spec: str) -> tuple[str, str, str | None]:
    """(kind, model, address) of "gemini:MODEL", "openai:MODEL@http://host/v1", "scenes:FOLDER" or "replay:JOURNAL".

    Raises:
        UserError: it is none of these.
    """
    kind, colon, model = model_spec.partition(":")
    model, at, url = model.partition("@http")
    if kind not in (known := names()) or not colon or not model:
        raise UserError(f"{model_spec!r}: name a model as PROVIDER:MODEL; providers are {', '.join(known)}")
    return kind, model, f"http{url}" if at else None


def shown(model_spec: str) -> str:
    """A name that can be written down: without the password that its address may hold."""
    return re.sub(r"(@https?://)[^/@]*@", r"\1", model_spec)


def provider(model_spec: str, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    """Opens a provider. Keys come from the environment.

    Raises:
        UserError: an unknown name, a package that is not installed, a key that is not set.
    """
    kind, model, url = parse(model_spec)
    try:
        if kind in _BUILT_IN:
            return _BUILT_IN[kind](model, url, settings, environment)
        (found,) = importlib.metadata.entry_points(group=GROUP, name=kind)
        return found.load()(model, url, settings, environment)
    except ImportError as error:
        raise UserError(
            f"{kind} needs a package that is not installed ({error}): pip install 'reverie-jax[{kind}]'"
        ) from None


def _gemini(model: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    from reverie_jax.hosted.providers.gemini import Gemini

    return Gemini(model, url, settings, key(environment, "GEMINI_API_KEY", "GOOGLE_API_KEY"))


def _openai(model: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    from reverie_jax.hosted.providers.openai import OpenAI

    elsewhere = url is not None or "OPENAI_BASE_URL" in environment  # local servers want no key
    return OpenAI(model, url, settings, key(environment, "OPENAI_API_KEY", needed=not elsewhere))


def _google_generativeai(
    model: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]
) -> Provider:
    from reverie_jax.hosted.providers.google_generativeai import GoogleGenerativeAI

    return GoogleGenerativeAI(model, url, settings, key(environment, "GEMINI_API_KEY", "GOOGLE_API_KEY"))


def _replay(journal: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    from reverie_jax.hosted.providers.local import Replay

    return Replay(Path(journal))


_BUILT_IN = {
    "gemini": _gemini,
    "openai": _openai,
    "google-generativeai": _google_generativeai,
    "replay": _replay,
}
