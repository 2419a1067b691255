"""Model providers: hosted APIs, recorded replies, and those that other packages register."""

from __future__ import annotations

import dataclasses
import email.utils
import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import AnnotationError, Provider, Reply, TryAgain


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


TRANSFER = 600.0
"""Seconds that a file of requests or results may take."""
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


def key(environment: Mapping[str, str], *names: str, needed: bool = True) -> str:
    """The first of the variables that is set.

    Raises:
        UserError: none is, and one is needed.
    """
    for name in names:
        if found := environment.get(name, "").strip():
            return found
    if needed:
        raise UserError(f"no key: set {' or '.join(names)} in the environment")
    return ""


def hide(text: str, secret: str) -> str:
    """A message in one line, without the key; services quote keys, whole or in part."""
    line = " ".join(text.split())
    if len(secret) >= 4:
        line = line.replace(secret, "***")
    if len(secret) >= 8 and "key" in line.lower():
        line = line.replace(secret[:8], "***").replace(secret[-4:], "***")
    return line[:500]


def seconds(header: str | None) -> float | None:
    """What a Retry-After header says, in seconds or as a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def read_lines(
    content: bytes, read: Callable[[bytes], tuple[str, Reply | AnnotationError] | None]
) -> list[tuple[str, Reply | AnnotationError]]:
    """A batch's results, line by line; lines that make no sense are passed over.

    Raises:
        TryAgain: not one does: it is no file of results.
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    found = [one for line in lines if (one := read(line)) is not None]
    if lines and not found:
        raise TryAgain("the service's results make no sense")
    return found


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
