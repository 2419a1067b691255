"""What the tests of the annotation pipeline share."""

from __future__ import annotations

import functools
import selectors
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.annotate import helpers


class Hasty(sqlite3.Connection):
    """Does not wait for the disk; those that are killed (in processes of their own) do."""

    def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
        return super().execute("PRAGMA synchronous = OFF" if sql.startswith("PRAGMA synchronous") else sql, *more)


@pytest.fixture
def keys(monkeypatch) -> dict[str, str]:
    """Keys in the environment, no proxy before the loopback, no other address; tables are as wide as they like."""
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Hasty))
    for name in ("OPENAI_BASE_URL", "GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL", "GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    # Nobody speaks TLS to the loopback, and every client would read all authorities first.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **kwargs: None)
    found = helpers.SECRETS | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "COLUMNS": "1000"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def reverie(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns (exit code, stdout, stderr)."""
    from reverie_jax import cli

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reverie", *map(str, words)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def zygote() -> Iterator[helpers.Zygote]:
    pytest.importorskip("openai")
    pytest.importorskip("google.genai")
    made = helpers.Zygote()
    yield made
    made.close()


class Clock:
    """Seconds that pass only when everybody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Time in which an event loop's minutes take no time: whatever would be waited for is there at once."""
    made, real = Clock(), selectors.DefaultSelector.select

    def wait(self: Any, timeout: float | None = None) -> Any:
        events = real(self, 0 if timeout is not None else None)
        if not events and timeout is not None and timeout > 0:
            made.now += timeout
        return events

    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(selectors.DefaultSelector, "select", wait)
    return made
