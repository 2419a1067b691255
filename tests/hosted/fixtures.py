"""Fixtures of all tests that use hosted models: keys, virtual time, the command in this process, processes to kill."""

from __future__ import annotations

import asyncio
import functools
import selectors
import sqlite3
import ssl
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.data.fakes import png
from tests.hosted import helpers

IMAGES = 12


class _Hasty(sqlite3.Connection):
    """Does not wait for the disk; the processes that are killed do."""

    def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
        return super().execute("PRAGMA synchronous = OFF" if sql.startswith("PRAGMA synchronous") else sql, *more)


@pytest.fixture
def keys(monkeypatch) -> dict[str, str]:
    """Set API keys, no proxy for the loopback, no other address, and a wide terminal."""
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=_Hasty))
    for name in ("OPENAI_BASE_URL", "GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL", "GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    # Nobody speaks TLS to the loopback, and every client would read all authorities first.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **kwargs: None)
    environment = helpers.SECRETS | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "COLUMNS": "1000"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def reverie(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command in this process and returns (exit code, stdout, stderr)."""
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


def import_sdks() -> None:
    """Import both SDKs, or skip the test. Where aiohttp is installed, it warns about a class that google-genai derives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pytest.importorskip("openai")
        pytest.importorskip("google.genai")


@pytest.fixture(scope="session")
def sdks() -> None:
    import_sdks()


@pytest.fixture(scope="session")
def zygote() -> Iterator[helpers.Zygote]:
    import_sdks()
    process = helpers.Zygote()
    yield process
    process.close()


@pytest.fixture
def begin(zygote, tmp_path, keys) -> Callable[..., helpers.Child]:
    """Return a function that starts `reverie annotate questions` over twelve images in a process of its own."""
    for folder in ("images", "prompts", "spare"):
        (tmp_path / folder).mkdir()
    for number in range(IMAGES):
        (tmp_path / "images" / f"{number:02}.png").write_bytes(png((number, 3, 4)))
    (tmp_path / "prompts" / "questions.txt").write_text("{{ count }}")

    def start(server: helpers.Server, provider: str, *more: Any) -> helpers.Child:
        words = ["annotate", "questions", "--images", "images", "--out", "out", "--prompts", "prompts"]
        environment = keys | {"TMPDIR": str(tmp_path / "spare")} | helpers.addresses(server)
        return zygote.start([*words, "--writer", helpers.MODELS[provider], *more], environment, tmp_path)

    return start


class Clock:
    """Seconds that pass only when every coroutine sleeps."""

    now = 1000.0


class _VirtualSelector(selectors.DefaultSelector):
    """Returns at once, and moves the clock forward instead of waiting."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0 if timeout is not None else None)
        if not events and timeout is not None:
            self.clock.now += max(timeout, 0.0)
        return events


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Run event loops in virtual time."""
    clock = Clock()

    class Loop(asyncio.SelectorEventLoop):
        def __init__(self) -> None:
            super().__init__(_VirtualSelector(clock))

        def time(self) -> float:
            return clock.now

    monkeypatch.setattr(asyncio.events, "new_event_loop", Loop)
    return clock
