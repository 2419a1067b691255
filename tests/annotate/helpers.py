"""Pictures, prompts and answers whose outcome can be worked out by hand, and children that can be killed.

The prompts are of the tests' own, a line a field. An answer depends on what the server was sent and on nothing else, and
carries a mark of it: a reply in the journal can so be told to belong to a request that arrived, without the pipeline's help.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from email.message import Message
from pathlib import Path
from typing import Any

from reverie_jax.hosted import providers
from reverie_jax.hosted.interface import Refused, Reply, Request, RequestSettings, TryAgain
from tests.data.fakes import png
from tests.hosted import server as loopback
from tests.hosted.server import Call, Fault, Kind

SECRETS = {"OPENAI_API_KEY": "sk-proj-S3cretOfOpenAI-0123456789", "GEMINI_API_KEY": "AIzaSecretOfGoogle9876543210"}
MODELS = {"openai": "openai:tiny", "gemini": "gemini:tiny"}
QUESTIONS = "reasoning_instruct_data.json"
RATIONALES = "rationale_instruct_data.json"
JUDGED = "rationale_instruct_data_with_judge.json"
DROPPED = "dropped.json"
RELEASED = "reverie.json"
FILES = (QUESTIONS, RATIONALES, JUDGED, DROPPED, RELEASED)
JOURNAL = "journal.sqlite"

FIELDS = {
    "questions": ("count", "confusing"),
    "positive": ("question", "answer"),
    "negative": ("question", "answer"),
    "judge": ("question", "answer", "positive", "wrong", "negative"),
}


def write_prompts(folder: Path, **first: str) -> Path:
    """Prompts of the tests' own; `first` changes a stage's first line."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, fields in FIELDS.items():
        lines = [first.get(stage, stage), *(f"{{{{ {field} }}}}" for field in fields)]
        (folder / f"{stage}.txt").write_text("\n".join(lines), "utf-8")
    return folder


def write_pictures(folder: Path, count: int) -> dict[str, bytes]:
    """Pictures of a colour each; their bytes by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {f"{number:04d}.png": png((number % 251, number // 251, 77)) for number in range(count)}
    for name, encoded in made.items():
        (folder / name).write_bytes(encoded)
    return made


def mark(provider: str, model: str, text: str, images: Iterable[bytes], structured: bool) -> str:
    """The first 16 digits of the server's digest of a call."""
    pictures = [hashlib.sha256(image).hexdigest() for image in images]
    content = [provider, model, text, pictures, structured]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def stage_of(call: Call) -> str:
    """Of the tests' own prompts: the first word."""
    return call.text.split("\n")[0].split()[0]


def say(text: str, mark: str) -> str:
    """What the model replies to a prompt of the tests' own: each question, rationale and verdict holds its mark."""
    stage, *fields = text.split("\n")
    if stage.split()[0] == "questions":
        count, confusing = map(int, fields)
        rows = [
            {
                "question": f"Which sign ({n}) is at {mark}?",
                "type": "short",
                "correct_answer": f"right {n}",
                "confusing_answers": [f"wrong {n}.{k}" for k in range(confusing)],
            }
            for n in range(count)
        ]
        return json.dumps({"questions": rows})
    if stage.split()[0] == "judge":
        return f"{'Yes' if drops(mark) else 'No'} ({mark})"
    return f"It is {'seen' if stage.split()[0] == 'positive' else 'not seen'} at {mark}, naïvely. 看"


def drops(mark: str) -> bool:
    """Whether the judge finds a contradiction: in about a quarter of the rows."""
    return int(mark, 16) % 4 == 0


def answer(call: Call) -> str:
    """What `Server` replies in the tests."""
    return say(call.text, call.digest[:16])


def marks(text: str) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{16}\b", text))


def expected(
    pictures: Mapping[str, bytes],
    who: str,
    *,
    count: int = 1,
    confusing: int = 1,
    structured: bool = True,
    first: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The files' contents, worked out from what the server would answer. The writer is the judge, who sees no picture."""
    provider, model = who.split("@")[0].split(":")
    files: dict[str, list[Any]] = {name: [] for name in FILES}
    named = dict(first or {})

    def reply(stage: str, picture: bytes | None, *fields: str) -> str:
        text = "\n".join([named.get(stage, stage), *fields])
        images = [] if picture is None else [picture]
        return say(text, mark(provider, model, text, images, structured and stage == "questions"))

    for name, picture in pictures.items():
        made = json.loads(reply("questions", picture, str(count), str(confusing)))["questions"]
        talks: list[dict[str, Any]] = []
        for one in made:
            question, right = one["question"], one["correct_answer"]
            positive = reply("positive", picture, question, right)
            kept = []
            for wrong in one["confusing_answers"]:
                row = {
                    "image": name,
                    "question": question,
                    "correct_answer": right,
                    "confusing_answer": wrong,
                    "question_type": "short",
                }
                files[QUESTIONS].append(row)
                negative = reply("negative", picture, question, wrong)
                row = row | {"correct_rationale": positive, "incorrect_rationale": negative}
                files[RATIONALES].append(row)
                said = reply("judge", None, question, right, positive, wrong, negative)
                verdict = "yes" if said.startswith("Yes") else "no"
                files[JUDGED].append(row | {"gemini_pro_judge": verdict, "judges": {who: verdict}})
                if verdict == "yes":
                    files[DROPPED].append((row, said))
                else:
                    kept.append((wrong, negative))
            if kept:
                rationales = [("Explain why.", positive)]
                rationales += [(f"Explain why this answer is wrong: {wrong}", why) for wrong, why in kept]
                for asked, why in rationales:
                    turns = [("human", f"<image>\n{question}"), ("gpt", right), ("human", asked), ("gpt", why)]
                    talks.append(
                        {
                            "id": name,
                            "image": name,
                            "conversations": [{"from": role, "value": text} for role, text in turns],
                        }
                    )
        files[RELEASED] += talks
    return files


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def rows_of(journal: Path, columns: str = "*", where: str = "1") -> list[Any]:
    """Attempts of a journal that nobody has open."""
    with contextlib.closing(sqlite3.connect(journal)) as db:
        return db.execute(f"SELECT {columns} FROM attempts WHERE {where} ORDER BY id").fetchall()


def states(journal: Path) -> dict[str, int]:
    """How many attempts ended how."""
    return dict(rows_of(journal, "state, COUNT(*)", "1 GROUP BY state"))


class Memory:
    """A service in memory that stands for OpenAI's, with the face of `Server`: no socket, no time lost.

    Args:
        answer, faults: as `Server` takes them; what a fault means to the pipeline is what the providers make of it.
        latency: seconds from a request to its reply; called with the call.
        tokens: (in, out) of a call; by the server's count if None.
    """

    def __init__(
        self,
        answer: Callable[[Call], str],
        faults: Callable[[Call], Fault | None] | None = None,
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
        self.closed = self.at_once = self.peak = 0
        self._attempts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Memory:
        self._before = providers._openai
        providers._openai = lambda model, url, settings, environment: _Client(self, model, settings)  # type: ignore
        return self

    def __exit__(self, *_: object) -> None:
        providers._openai = self._before

    async def reply(self, model: str, request: Request, structured: bool) -> Reply:
        images = [request.picture.encoded] if request.shown else []
        digest = mark("openai", model, request.prompt, images, structured)
        self._attempts[digest] += 1
        call = Call(
            provider="openai",
            model=model,
            text=request.prompt,
            images=images,
            structured=structured,
            key="",
            headers=Message(),
            body={},
            digest=digest,
            attempt=self._attempts[digest],
            arrived=time.monotonic(),
        )
        self.calls.append(call)
        self.at_once += 1
        self.peak = max(self.peak, self.at_once)
        try:
            await asyncio.sleep(self.latency(call))
        finally:
            self.at_once -= 1
        fault = self.faults(call) if self.faults else None
        if fault is not None and fault.kind is Kind.TRANSPORT:
            raise TryAgain(fault.words, self.retry_after if fault is Fault.RATE_LIMIT_AFTER else None)
        text = "" if fault in (Fault.BLOCKED, Fault.REFUSED, Fault.EMPTY) else self.answer(call)
        made = Reply(text, *(self.tokens or loopback.usage(call, text)), loopback.version(model))
        if fault is not None:
            raise Refused(fault.words, made)
        return made


class _Client:
    name = "openai"

    def __init__(self, memory: Memory, model: str, settings: RequestSettings):
        self.model, self._memory, self._structured = model, memory, settings.structured
        memory.opened.append(self)

    async def ask(self, request: Request) -> Reply:
        return await self._memory.reply(self.model, request, self._structured and request.stage == "questions")

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
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number in (1, 2):
                os.dup2(os.open(order["log"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
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
    """A run of `reverie` in a process of its own."""

    pid: int
    stdout: Path
    stderr: Path
    _zygote: Zygote
    _code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the signal that killed it; None while it runs."""
        if self._code is None and select.select([self._zygote.process.stdout], [], [], 0)[0]:
            self._code = int(self._zygote.line())
        return self._code

    def wait(self, seconds: float = 120.0) -> int | None:
        """The same, at the end or after so long."""
        if self._code is None and select.select([self._zygote.process.stdout], [], [], seconds)[0]:
            self._code = int(self._zygote.line())
        return self._code

    def signal(self, number: int) -> None:
        """Sent only to a child that is not reaped yet."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Zygote:
    """A process that has imported everything and forks runs of `reverie`, one at a time; in an ASCII locale.

    Starting Python anew for each run would take longer than the run.
    """

    def __init__(self) -> None:
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | plain,
            start_new_session=True,
        )
        self._last: Child | None = None
        self.imported: list[str] = json.loads(self.line())
        """The providers' packages that came in before any of them was wanted."""

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def start(self, words: Iterable[Any], environment: Mapping[str, str], folder: Path) -> Child:
        """`reverie` with these words; what it prints goes into files in the folder."""
        self._end()
        log = folder / "stdout.txt", folder / "stderr.txt"
        order = {
            "words": [str(word) for word in words],
            "environment": dict(environment),
            "folder": str(folder),
            "log": [str(path) for path in log],
        }
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(order) + "\n").encode())
        self._last = Child(int(self.line()), *log, self)
        return self._last

    def _end(self) -> None:
        """Whoever was left running by a test that failed."""
        if self._last is not None:
            self._last.signal(signal.SIGKILL)
            self._last.wait()

    def close(self) -> None:
        self._end()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def until(what: Any, seconds: float = 60.0) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def unhappy(monkeypatch: Any, when: Any) -> None:
    """Lets servers answer some calls with a status and message of choice, or with any JSON as a reply.

    Args:
        when: called with a call, returns (status, message), (status, body as JSON), or None for the usual answer.
    """
    usual = loopback._Handler.respond
    codes = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 413: "INVALID_ARGUMENT", 502: "INTERNAL"}
    monkeypatch.setattr(loopback.Gemini, "statuses", loopback.Gemini.statuses | codes)

    def respond(self: Any, wire: Any, call: Call) -> None:
        found = when(call)
        if found is None:
            usual(self, wire, call)
            return
        status, said = found
        self.send_json(status, wire.error(status, said, None) if isinstance(said, str) else said)

    monkeypatch.setattr(loopback._Handler, "respond", respond)
