"""Ask judges about a benchmark's answers and write their replies to `replies.jsonl`, which scoring reads.

Hosted models are asked through `hosted`, as for annotation: the same names, keys, limits and budget, and a journal in the
output folder that keeps each paid reply, so that no run asks for it again. A request is identified by the benchmark, the
question, a digest of its text, and the model. A local model can judge too, as `local:CHECKPOINT`; the caller runs it, and
only its replies are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.answer_files import for_rule
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, JudgeRequest
from reverie_jax.eval.judge_replies import REPLIES, JudgeReply, answers_digest, write_replies
from reverie_jax.hosted.identity import RequestIdentity, content_digest, digest_bytes
from reverie_jax.hosted.interface import Request, RequestImage, Stage, UnusableError, digest
from reverie_jax.hosted.journal import Journal, Spent
from reverie_jax.hosted.providers import parse_model_spec
from reverie_jax.hosted.runner import Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, ProgressCallback, RequestConfig, Session

STAGE: Stage = "evaluate"
LOCAL = "local:"

Generate = Callable[[Sequence[JudgeRequest]], list[str]]
"""Runs a local model: one reply for each request, in order."""


@dataclasses.dataclass(frozen=True)
class JudgeOutcome:
    """Result of asking.

    Attributes:
        outcome: Counts, and reasons by request id of those without a reply.
        files: The reply file of each judge, by its name.
        spent: Over all attempts in the journal, earlier runs included.
        notes: Messages for the user.
    """

    outcome: Outcome
    files: Mapping[str, Path]
    spent: Spent = dataclasses.field(default_factory=lambda: Spent(0, 0, 0, 0.0))
    notes: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether each request has its reply."""
        return not (self.outcome.failed or self.outcome.stopped)


class _RecordingTemplates(dict[str, str]):
    """Templates that record which of them were used."""

    def __init__(self, templates: Mapping[str, str]):
        super().__init__(templates)
        self.used: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        self.used[name] = super().__getitem__(name)
        return self.used[name]


def load_prompts(folder: Path | None = None) -> dict[str, str]:
    """Return templates by file name without suffix: those of a folder, and the built-in ones that it lacks.

    Raises:
        UserError: The folder holds no template, or one cannot be read.
    """
    builtin = importlib.resources.files("reverie_jax.eval") / "prompts"
    names = sorted(Path(file.name).stem for file in builtin.iterdir() if file.name.endswith(".txt"))
    if folder is not None and not any((folder / f"{name}.txt").is_file() for name in names):
        raise UserError(f"{folder}: no prompt found; name the files {', '.join(f'{name}.txt' for name in names)}")
    templates = {}
    for name in names:
        own = None if folder is None else folder / f"{name}.txt"
        try:
            templates[name] = (own if own and own.is_file() else builtin / f"{name}.txt").read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{own or name}: cannot be read ({error})") from None
    return templates


def _label(judge: str) -> str:
    """Return a judge's name in reply files: without the address, which may hold a password."""
    return judge if judge.startswith(LOCAL) else ":".join(parse_model_spec(judge)[:2])


def _check_reply(reply: str) -> str:
    """Accept any text: the benchmark's rule parses it, and reports what cannot be parsed."""
    if not reply.strip():
        raise UnusableError("an empty reply")
    return reply


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRun:
    """Answers to a benchmark, the judges to ask about them, and how.

    Attributes:
        benchmark: The benchmark.
        data: Its questions.
        answers: Texts by question id.
        rule: Scoring rule that needs the replies.
        judges: "openai:MODEL", "gemini:MODEL", "local:CHECKPOINT", …; each gets a file of its own.
        out: Folder of the journal and of `replies.jsonl`.
        environment: Holds the API keys.
        config: Settings and limits of hosted models.
        prompts: Folder with templates of the user's own.
        show_image: Show the image to the judge, if the benchmark does.
    """

    benchmark: Benchmark
    data: BenchmarkData
    answers: Mapping[str, str]
    rule: str
    judges: Sequence[str] = dataclasses.field(repr=False)  # an address may have a password
    out: Path
    environment: Mapping[str, str] = dataclasses.field(repr=False)  # has the keys
    config: RequestConfig = dataclasses.field(default_factory=RequestConfig)
    prompts: Path | None = None
    show_image: bool = True

    def run(self, on_progress: ProgressCallback | None = None, generate: Generate | None = None) -> JudgeOutcome:
        """Ask for missing replies, and write all replies so far, also where some are missing.

        Args:
            on_progress: Called after each reply of a hosted judge.
            generate: Runs the local judge.

        Raises:
            UserError: Access was denied, a key is missing, a template or an image is broken, or the rule has no judge.
        """
        files, hosted = self._files(), self._hosted()
        if len(self.judges) - len(hosted) > 1 or (len(self.judges) > len(hosted) and generate is None):
            raise UserError(f"{', '.join(files)}: at most one local judge in a run")
        requests, _ = self._requests
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror})") from None
        total, spent, notes = Outcome(), Spent(0, 0, 0, 0.0), list[str]()
        if hosted:
            with contextlib.closing(Session(self.out, self.config, self.environment, on_progress)) as session:
                total = self._ask(session, hosted, files)
                spent, notes = session.journal.spent(), session.notes
        for judge in self.judges:
            if judge.startswith(LOCAL):
                assert generate is not None
                texts = generate(requests) if requests else []
                today = datetime.datetime.now(datetime.UTC).date().isoformat()
                replies = {r.id: JudgeReply(text, judge, today) for r, text in zip(requests, texts, strict=True)}
                self._write(files[judge], judge, replies, 0.0)  # greedy, whatever the temperature of hosted judges
                total.requested, total.usable = total.requested + len(replies), total.usable + len(replies)
        return JudgeOutcome(total, files, spent, notes)

    def estimate(self) -> list[CostEstimate]:
        """Return the cost of `run` for each hosted judge; nothing is asked.

        Raises:
            UserError: as `run` does.
        """
        self._files()
        _ = self._requests  # fails early on a rule without a judge or a broken template
        with contextlib.closing(Session(self.out, self.config, self.environment)) as session:
            return [
                session.estimate(STAGE, self._tasks(judge))._replace(stage=_label(judge)) for judge in self._hosted()
            ]

    def _hosted(self) -> list[str]:
        return [judge for judge in self.judges if not judge.startswith(LOCAL)]

    def _files(self) -> dict[str, Path]:
        """Return the reply file of each judge, by its label."""
        labels = [_label(judge) for judge in self.judges]
        if not labels:
            raise UserError("no judge; name one as openai:MODEL, gemini:MODEL or local:CHECKPOINT")
        if len(labels) == 1:
            return {labels[0]: self.out / REPLIES}
        files = {label: self.out / f"replies-{re.sub(r'[^A-Za-z0-9._]+', '-', label)}.jsonl" for label in labels}
        if len(set(files.values())) != len(labels):
            raise UserError(f"{', '.join(labels)}: two judges would write to one file; ask them in separate runs")
        return files

    @functools.cached_property
    def _requests(self) -> tuple[list[JudgeRequest], str]:
        """What to ask, and a short digest of the templates in use."""
        benchmark = self.benchmark
        if self.rule not in benchmark.judged_rules:
            judged = ", ".join(sorted(benchmark.judged_rules)) or "none"
            raise UserError(f"{benchmark.name}: the rule {self.rule} needs no judge; rules that do: {judged}")
        templates = _RecordingTemplates(load_prompts(self.prompts))
        answers = for_rule(benchmark, self.answers, self.rule)
        requests = benchmark.judge_requests(self.data, answers, self.rule, templates)
        ids = [request.id for request in requests]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{benchmark.name}: two requests have the same id: their replies could not be told apart")
        if not self.show_image:
            requests = [dataclasses.replace(request, image=None) for request in requests]
        return requests, digest("templates", templates.used)[:12]

    def _tasks(self, judge: str) -> list[RequestTask]:
        return [self._task(request, judge) for request in self._requests[0]]

    def _task(self, request: JudgeRequest, judge: str) -> RequestTask:
        def encoded() -> bytes:
            return b"" if request.image is None else self.data.read_image(request.image)

        shown, settings = request.image is not None, self.config.settings
        fields = {"benchmark": self.benchmark.name, "id": request.id, "prompt": digest(request.prompt)}
        content = content_digest(STAGE, digest_bytes(encoded()), fields)
        provider, model, _ = parse_model_spec(judge)
        version = f"temperature={settings.temperature} longest={settings.max_new_tokens} shown={shown}"

        def build() -> Request:
            return Request(STAGE, RequestImage(request.image or request.id, encoded()), fields, request.prompt, shown)

        identity = RequestIdentity(STAGE, content, provider, model, version)
        return RequestTask(identity, request.id, build, _check_reply)

    def _ask(self, session: Session, hosted: Sequence[str], files: Mapping[str, Path]) -> Outcome:
        """Ask hosted judges, and write the replies that the journal has, also after an error."""
        tasks = {judge: self._tasks(judge) for judge in hosted}
        completed = False
        try:
            outcome = session.run("judge", (task for some in tasks.values() for task in some), hosted)
            completed = True
        finally:
            for judge, some in tasks.items():
                replies = dict(_journaled(session.journal, some))
                if replies or completed:  # an error without any reply does not replace a file
                    self._write(files[_label(judge)], judge, replies, self.config.settings.temperature)
        return outcome

    def _write(self, path: Path, judge: str, replies: Mapping[str, JudgeReply], temperature: float | None) -> None:
        requests, prompt = self._requests
        answers = answers_digest(self.answers)
        rows = [
            replies[request.id].row(request.id, _label(judge), prompt, answers, temperature)
            for request in requests
            if request.id in replies
        ]
        write_replies(path, rows)


def _journaled(journal: Journal, tasks: Sequence[RequestTask]) -> Iterator[tuple[str, JudgeReply]]:
    """Yield the journal's replies by request id."""
    for task in tasks:
        reply = journal.get_reply(task.identity)
        if reply is not None:
            text, version, started = reply
            day = datetime.datetime.fromtimestamp(started, datetime.UTC).date()
            yield task.name, JudgeReply(text, version, day.isoformat())
