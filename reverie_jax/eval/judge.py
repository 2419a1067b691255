"""Asks a judge about a benchmark's answers, and writes down what it says: `replies.jsonl`, which scoring reads.

Hosted models are asked by the annotation pipeline's own means: the same names and keys, limits and budget, and a journal in
the output's folder that keeps each paid reply as it comes, so that no run asks for it again. A request is known by the
benchmark, the question, the digest of its words, and the model. A model of our own can judge too, as `local:CHECKPOINT`;
whoever calls brings the means to run it, and nothing of it is kept but the replies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.resources
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, JudgeRequest
from reverie_jax.eval.judge_replies import REPLIES, JudgeReply, of_answers, read_replies, write
from reverie_jax.hosted.interface import Refused, Request, RequestImage, digest
from reverie_jax.hosted.journal import Item, Spent
from reverie_jax.hosted.providers import parse
from reverie_jax.hosted.request_key import content_of
from reverie_jax.hosted.runner import Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, ProgressCallback, RequestConfig, Session

__all__ = ["Generate", "JudgeOutcome", "estimate", "judge", "of_answers", "prompts", "read_replies"]

STAGE = "evaluate"
LOCAL = "local:"

Generate = Callable[[Sequence[JudgeRequest]], list[str]]
"""Runs a model of our own: one reply a request, in their order."""


@dataclasses.dataclass(frozen=True)
class JudgeOutcome:
    """How asking ended.

    Attributes:
        outcome: counts, and reasons by request's id of those without a reply.
        files: the replies of each judge, by its name.
        spent: over all attempts in the journal, earlier runs included.
        notes: what a user should know, line by line.
    """

    outcome: Outcome
    files: Mapping[str, Path]
    spent: Spent = dataclasses.field(default_factory=lambda: Spent(0, 0, 0, 0.0))
    notes: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether each request has its reply."""
        return not (self.outcome.failed or self.outcome.stopped)


class _Noting(Mapping[str, str]):
    """Templates that remember which of them were used."""

    def __init__(self, templates: Mapping[str, str]):
        self._templates, self.used = templates, dict[str, str]()

    def __getitem__(self, name: str) -> str:
        self.used[name] = self._templates[name]
        return self.used[name]

    def __contains__(self, name: object) -> bool:
        return name in self._templates

    def __iter__(self) -> Iterator[str]:
        return iter(self._templates)

    def __len__(self) -> int:
        return len(self._templates)


def prompts(folder: Path | None = None) -> dict[str, str]:
    """Templates by file name without its suffix: ours, and instead of them those of the same name in a folder.

    Raises:
        UserError: the folder holds none, or one cannot be read.
    """
    ours = importlib.resources.files("reverie_jax.eval") / "prompts"
    names = sorted(Path(file.name).stem for file in ours.iterdir() if file.name.endswith(".txt"))
    if folder is not None and not any((folder / f"{name}.txt").is_file() for name in names):
        raise UserError(f"{folder}: no prompt here; name the files {', '.join(f'{name}.txt' for name in names)}")
    found = {}
    for name in names:
        theirs = None if folder is None else folder / f"{name}.txt"
        try:
            found[name] = (theirs if theirs and theirs.is_file() else ours / f"{name}.txt").read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{theirs or name}: cannot be read ({error})") from None
    return found


class _JudgePlan(NamedTuple):
    """What to ask, and short digests of the templates it was made with and of the answers."""

    requests: list[JudgeRequest]
    prompt: str
    answers: str


def _judge_plan(
    benchmark: Benchmark,
    loaded: BenchmarkData,
    answers: Mapping[str, str],
    rule: str,
    folder: Path | None,
    images: bool,
) -> _JudgePlan:
    if rule not in benchmark.judged:
        named = (
            f"of its rules, {', '.join(sorted(benchmark.judged))} does"
            if benchmark.judged
            else "none of its rules does"
        )
        raise UserError(f"{benchmark.name}: the rule {rule} needs no judge; {named}")
    templates = _Noting(prompts(folder))
    requests = benchmark.requests(loaded, answers, rule, templates)
    ids = [request.id for request in requests]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{benchmark.name}: two requests carry the same id; replies could not be told apart")
    if not images:
        requests = [dataclasses.replace(request, image=None) for request in requests]
    return _JudgePlan(requests, digest("templates", templates.used)[:12], of_answers(answers))


def _label(who: str) -> str:
    """A judge as the replies name it: without the address, which may hold a password."""
    return who if who.startswith(LOCAL) else ":".join(parse(who)[:2])


def _places(who: Sequence[str], out: Path) -> dict[str, Path]:
    """Where each judge's replies go."""
    labels = [_label(one) for one in who]
    if not labels:
        raise UserError("name a judge, as openai:MODEL, gemini:MODEL or local:CHECKPOINT")
    if len(labels) == 1:
        return {labels[0]: out / REPLIES}
    places = {label: out / f"replies-{re.sub(r'[^A-Za-z0-9._]+', '-', label)}.jsonl" for label in labels}
    if len(set(places.values())) != len(labels):
        raise UserError(f"{', '.join(labels)}: replies of two judges would go to one file; ask one after the other")
    return places


def _task(
    benchmark: Benchmark, loaded: BenchmarkData, request: JudgeRequest, who: str, how: RequestConfig
) -> RequestTask:
    shown = request.image is not None

    def encoded() -> bytes:
        return loaded.read_image(request.image) if request.image is not None else b""

    fields = {"benchmark": benchmark.name, "id": request.id, "prompt": digest(request.prompt)}
    content = content_of(STAGE, hashlib.sha256(encoded()).hexdigest()[:32], fields)
    kind, model, _ = parse(who)
    settings = how.settings
    item = Item(STAGE, content, kind, model, f"temperature={settings.temperature} longest={settings.longest} {shown=}")

    def ask() -> Request:
        return Request("evaluate", RequestImage(request.image or request.id, encoded()), fields, request.prompt, shown)

    return RequestTask(item, request.id, ask, _there)


def _there(reply: str) -> str:
    """Whatever a judge says is kept: the benchmark's rule reads it, once, and says what cannot be read."""
    if not reply.strip():
        raise Refused("an empty reply")
    return reply


def judge(
    benchmark: Benchmark,
    loaded: BenchmarkData,
    answers: Mapping[str, str],
    rule: str,
    *,
    who: Sequence[str],
    out: Path,
    how: RequestConfig,
    environment: Mapping[str, str],
    prompts: Path | None,
    on_progress: ProgressCallback | None = None,
    images: bool = True,
    generate: Generate | None = None,
) -> JudgeOutcome:
    """Asks what has no reply yet, and writes the replies that are there, also where some are missing.

    Args:
        who: judges, as "openai:MODEL", "gemini:MODEL", "local:CHECKPOINT", …; one file each.
        out: folder of the journal and of `replies.jsonl`.
        environment: where keys are.
        prompts: folder with templates of the user's own.
        images: shows the picture to the judge where the benchmark does.
        generate: runs the local judge.

    Raises:
        UserError: a service will not have us, a key is missing, a template or a picture is broken, the rule has no judge.
    """
    places = _places(who, out)
    hosted = [one for one in who if not one.startswith(LOCAL)]
    if len(who) - len(hosted) > 1 or (len(who) > len(hosted) and generate is None):
        raise UserError("one local judge at a time, and something to run it with")
    plan = _judge_plan(benchmark, loaded, answers, rule, prompts, images)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    total, spent, notes = Outcome(), Spent(0, 0, 0, 0.0), list[str]()

    def keep(one: str, said: Mapping[str, JudgeReply], temperature: float | None) -> None:
        rows = [
            said[request.id].row(request.id, _label(one), plan.prompt, plan.answers, temperature)
            for request in plan.requests
            if request.id in said
        ]
        write(places[_label(one)], rows)

    if hosted:
        tasks = {one: [_task(benchmark, loaded, r, one, how) for r in plan.requests] for one in hosted}
        with contextlib.closing(Session(out, how, environment, on_progress)) as session:
            ended = False
            try:
                total = session.ask("judge", (task for some in tasks.values() for task in some), hosted)
                ended = True
            finally:
                for one, some in tasks.items():
                    said = _had(session.journal.path, some)
                    if said or ended:  # what came before an error is paid for; nothing is no reason to replace a file
                        keep(one, said, how.settings.temperature)
            spent, notes = session.journal.spent(), session.notes
    for one in who:
        if one.startswith(LOCAL):
            assert generate is not None
            texts = generate(plan.requests) if plan.requests else []
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            said = {r.id: JudgeReply(text, one, today) for r, text in zip(plan.requests, texts, strict=True)}
            keep(one, said, 0.0)  # greedy, whatever the hosted ones are asked with
            total.asked, total.usable = total.asked + len(said), total.usable + len(said)
    return JudgeOutcome(total, places, spent, notes)


def estimate(
    benchmark: Benchmark,
    loaded: BenchmarkData,
    answers: Mapping[str, str],
    rule: str,
    *,
    who: Sequence[str],
    out: Path,
    how: RequestConfig,
    environment: Mapping[str, str],
    prompts: Path | None,
    images: bool = True,
) -> list[CostEstimate]:
    """What `judge` would take, a row a hosted judge; nothing is asked.

    Raises:
        UserError: as `judge` does.
    """
    _places(who, out)
    plan, found = _judge_plan(benchmark, loaded, answers, rule, prompts, images), []
    with contextlib.closing(Session(out, how, environment)) as session:
        for one in who:
            if not one.startswith(LOCAL):
                row = session.estimate(STAGE, [_task(benchmark, loaded, r, one, how) for r in plan.requests])
                found.append(row._replace(stage=_label(one)))
    return found


def _had(journal: Path, tasks: Sequence[RequestTask]) -> dict[str, JudgeReply]:
    """The journal's replies by request's id."""
    found = {}
    with contextlib.closing(sqlite3.connect(f"{journal.resolve().as_uri()}?mode=ro", uri=True)) as db:
        for task in tasks:
            row = db.execute(
                "SELECT reply, version, started FROM attempts WHERE state = 'usable' AND item = ? ORDER BY id LIMIT 1",
                (task.item.key,),
            ).fetchone()
            if row is not None:
                day = datetime.datetime.fromtimestamp(row[2], datetime.UTC).date()
                found[task.name] = JudgeReply(row[0], row[1], day.isoformat())
    return found
