"""Tasks, a service in memory, and runs of `reverie` in processes of their own that can be killed."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from reverie_jax.hosted import providers
from reverie_jax.hosted.identity import RequestIdentity, request_digest
from reverie_jax.hosted.interface import Reply, Request, RequestImage, RequestSettings, RetryableError, UnusableError
from reverie_jax.hosted.runner import Outcome, RequestTask
from reverie_jax.hosted.session import RequestConfig, Session
from tests.data.fakes import png
from tests.hosted import wires
from tests.hosted.faults import TRANSPORT, Fault
from tests.hosted.server import Server
from tests.hosted.wires import Call

SECRETS = {"OPENAI_API_KEY": "sk-proj-S3cretOfOpenAI-0123456789", "GEMINI_API_KEY": "AIzaSecretOfGoogle9876543210"}
MODELS = {"openai": "openai:tiny", "gemini": "gemini:tiny"}
JOURNAL = "journal.sqlite"


def spec_of(server: Server | Memory, provider: str = "openai", model: str = "tiny") -> str:
    """Return a model at the server's address."""
    return f"{provider}:{model}@{server.url}" + ("/v1" if provider == "openai" else "")


def addresses(server: Server) -> dict[str, str]:
    """Return the environment by which both providers' models without an address are the server's."""
    return {"OPENAI_BASE_URL": f"{server.url}/v1", "GOOGLE_GEMINI_BASE_URL": server.url}


def secret_of(provider: str) -> str:
    return SECRETS[f"{provider.upper()}_API_KEY"]


def reply_to(call: Call) -> str:
    """Return a reply that names its request, with line separators that JSON may hold as they are."""
    return f"{call.model} says: {call.text} \u2028\x85 naïve 看"


def parse_reply(text: str) -> str:
    if " says: " not in text:
        raise UnusableError("not an answer")
    return text


def make_task(number: int, spec: str, *, stage: Any = "questions", version: str = "v") -> RequestTask:
    """Return a task with an image of its own."""
    provider, model, _ = providers.parse_model_spec(spec)
    image = RequestImage(f"{number}.png", png((number % 251, number // 251, 7)))
    request = Request(stage, image, {"n": str(number)}, f"Question {number}?", schema={"type": "object"})
    identity = RequestIdentity(stage, request_digest(request), provider, model, version)
    return RequestTask(identity, image.key, lambda: request, parse_reply)


def send(
    out: Path, tasks: Iterable[RequestTask], specs: Iterable[str], limits: Any, **settings: Any
) -> tuple[Outcome, dict[str, str | None]]:
    """Run tasks in a session; return the outcome and the replies by task name."""
    tasks = list(tasks)
    with Session(out, RequestConfig(RequestSettings(**settings), limits), os.environ) as session:
        outcome = session.run("step", tasks, specs)
        return outcome, {task.name: session.get_reply(task) for task in tasks}


def rows_of(journal: Path, columns: str = "*", where: str = "1", table: str = "attempts") -> list[Any]:
    """Return rows of a journal that nobody has open."""
    with contextlib.closing(sqlite3.connect(journal)) as db:
        return db.execute(f"SELECT {columns} FROM {table} WHERE {where} ORDER BY rowid").fetchall()


def states(journal: Path) -> dict[str, int]:
    """Return the number of attempts by state."""
    return dict(rows_of(journal, "state, COUNT(*)", "1 GROUP BY state"))


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.002)


class Memory:
    """A service in memory in place of OpenAI's, with the interface of `Server`: no socket, no time lost.

    Args:
        answer, faults: As of `Server`; a fault is raised as the provider would raise it.
        latency: Seconds from a request to its reply.
        tokens: (input, output) tokens of a call; the server's count if None.
    """

    def __init__(
        self,
        answer: Callable[[Call], str],
        faults: Callable[[Call], Any] = lambda call: None,
        latency: Callable[[Call], float] = lambda call: 0.0,
        *,
        retry_after: float = 1.0,
        tokens: tuple[int, int] | None = None,
    ):
        self.answer, self.faults, self.latency = answer, faults, latency
        self.retry_after, self.tokens = retry_after, tokens
        self.url = "http://memory"
        self.calls: list[Call] = []
        self.opened: list[_Client] = []
        self.closed = self.in_flight = self.peak = 0
        self._attempts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Memory:
        self._before = providers._BUILT_IN["openai"]
        providers._BUILT_IN["openai"] = lambda model, url, settings, environment: _Client(self, model, settings)
        return self

    def __exit__(self, *_: object) -> None:
        providers._BUILT_IN["openai"] = self._before

    async def reply(self, model: str, request: Request, structured: bool) -> Reply:
        images = [request.image.encoded] if request.send_image else []
        text = "\n".join(request.turns or (request.prompt,))
        digest = wires.content_digest("openai", model, text, images, structured)
        self._attempts[digest] += 1
        attempt, arrived = self._attempts[digest], asyncio.get_running_loop().time()
        call = Call("openai", model, text, images, structured, "", {}, digest, attempt, arrived)
        self.calls.append(call)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await asyncio.sleep(self.latency(call))
        finally:
            self.in_flight -= 1
        fault = self.faults(call)
        if isinstance(fault, Exception):
            raise fault
        if fault in TRANSPORT:
            raise RetryableError(fault.value, self.retry_after if fault is Fault.RATE_LIMIT_AFTER else None)
        text = "" if fault else self.answer(call)
        reply = Reply(text, *(self.tokens or wires.usage(call, text)), f"{model}-2026-01-01")
        if fault is not None:
            raise UnusableError(fault.value, reply)
        return reply


class _Client:
    name = "openai"

    def __init__(self, memory: Memory, model: str, settings: RequestSettings):
        self.model, self._memory, self._structured = model, memory, settings.structured
        memory.opened.append(self)

    async def ask(self, request: Request) -> Reply:
        return await self._memory.reply(self.model, request, self._structured and request.schema is not None)

    async def close(self) -> None:
        self._memory.closed += 1


ZYGOTE = """
import json, os, sys, traceback
import reverie_jax.cli, reverie_jax.cli.annotate
print(json.dumps([name for name in ("openai", "google.genai", "google.generativeai") if name in sys.modules]), flush=True)
import reverie_jax.hosted.providers.openai, reverie_jax.hosted.providers.gemini
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            os.chdir(order["folder"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(order["environment"])
            sys.argv = ["reverie", *order["words"]]
            try:
                reverie_jax.cli.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclasses.dataclass
class Child:
    """A run of `reverie` in a process of its own, in `folder`."""

    pid: int
    folder: Path
    _zygote: Zygote
    _code: int | None = None

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return (self.folder / "stderr.txt").read_text("utf-8")

    def wait(self, seconds: float = 120.0) -> int | None:
        """Return its exit code, minus the signal that killed it; None if it still runs after so long."""
        if self._code is None and select.select([self._zygote.process.stdout], [], [], seconds)[0]:
            self._code = int(self._zygote.read_line())
        return self._code

    def signal(self, number: int) -> None:
        """Send a signal to a child that is not reaped yet."""
        if self.wait(0) is None:
            os.kill(self.pid, number)


class Zygote:
    """A process that has imported everything and forks runs of `reverie`, one at a time; in an ASCII locale.

    Starting Python anew for each run would take longer than the run.
    """

    def __init__(self) -> None:
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNINGS": "ignore"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        command = [sys.executable, "-c", ZYGOTE]
        self.process = subprocess.Popen(command, **pipes, env=os.environ | plain, start_new_session=True)
        self._last: Child | None = None
        self.imported: list[str] = json.loads(self.read_line())
        """SDKs that were imported before any of them was needed."""

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def start(self, words: Iterable[Any], environment: Mapping[str, str], folder: Path) -> Child:
        """Start `reverie` with these arguments; its output goes into files in the folder."""
        self._end()
        order = {"words": [str(word) for word in words], "environment": dict(environment), "folder": str(folder)}
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(order) + "\n").encode())
        self._last = Child(int(self.read_line()), folder, self)
        return self._last

    def _end(self) -> None:
        """Kill a child that a failed test left running."""
        if self._last is not None:
            self._last.signal(signal.SIGKILL)
            self._last.wait()

    def close(self) -> None:
        self._end()
        self.process.communicate(timeout=60)
