"""Answer a benchmark's questions with a model that others serve, through the runner, journal, limits and budget of `hosted`.

Conversations, stages and predictions.jsonl are those of `eval.predict`. A request is identified by its image, its texts, the
model and what changes a reply, so that a question is sent once: also one that a benchmark asks twice, unless answers are
sampled.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie_jax.data.conversation import IMAGE
from reverie_jax.eval.benchmarks.answer_files import PREDICTIONS, RUN
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, Question
from reverie_jax.eval.engine import Answer
from reverie_jax.eval.predict import (
    PredictStage,
    answer_questions,
    claim_folder,
    describe_questions,
    write_predictions,
)
from reverie_jax.files import write_json
from reverie_jax.hosted.identity import RequestIdentity, content_digest, digest_bytes
from reverie_jax.hosted.interface import Request, RequestImage, RequestSettings, Stage, UnusableError, digest
from reverie_jax.hosted.providers import parse_model_spec
from reverie_jax.hosted.runner import Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, Session

_CONVERSATION = "the image, then LLaVA-1.5's prompt; the server's own chat template"


@dataclasses.dataclass(frozen=True)
class HostedPredictions:
    """Result of asking.

    Attributes:
        path: predictions.jsonl with the questions that have an answer; None if none has.
        outcomes: By stage.
        missing: Number of questions without an answer.
    """

    path: Path | None
    outcomes: Mapping[str, Outcome]
    missing: int

    @property
    def stopped(self) -> str:
        """Why the run ended early; empty if it did not."""
        return next((outcome.stopped for outcome in self.outcomes.values() if outcome.stopped), "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostedRun:
    """A benchmark's questions, and the model to ask.

    Attributes:
        session: Journal, settings and limits. Its `max_new_tokens` holds for each answer; the benchmark's if None.
        model: "openai:MODEL@URL", "gemini:MODEL", …
        out: Folder of predictions.jsonl and run.json.
        reflect: The model answers, explains its answer and answers again; all three texts are kept.
        limit: Number of questions to answer, from the first on; None for all.
    """

    session: Session
    model: str = dataclasses.field(repr=False)  # an address may have a password
    benchmark: Benchmark
    data: BenchmarkData
    out: Path
    reflect: bool = False
    limit: int | None = None

    def run(self) -> HostedPredictions:
        """Ask what the journal has no reply to, and write all answers so far, also where some are missing.

        Raises:
            UserError: The folder holds another run's answers, access was denied, or a key is missing.
            BenchmarkError: An image cannot be read; nothing was sent.
        """
        record = self._record()
        claim_folder(self.out, record)
        asker = _Asker(self, send=True)
        answers, reflection = asker.answer()
        if len(asker.missing) == len(self.questions):
            return HostedPredictions(None, asker.outcomes, len(asker.missing))
        write_predictions(self.out, self.questions, answers, reflection, record["model"], asker.missing)
        origin = {"versions": sorted(asker.versions), "dates": sorted(asker.dates)}
        write_json(self.out / RUN, record | origin)
        return HostedPredictions(self.out / PREDICTIONS, asker.outcomes, len(asker.missing))

    def estimate(self) -> list[CostEstimate]:
        """Return the cost of `run` by stage; nothing is sent or written.

        Raises:
            UserError, BenchmarkError: As `run`.
        """
        self._record()
        asker = _Asker(self, send=False)
        asker.answer()
        return asker.estimates

    @functools.cached_property
    def questions(self) -> list[Question]:
        """The questions to answer."""
        return list(self.data.available[: self.limit])

    @functools.cached_property
    def limits(self) -> list[int]:
        """Maximum length of each answer, in tokens."""
        own = self.session.config.settings.max_new_tokens
        return [own or question.max_new_tokens or self.benchmark.max_new_tokens for question in self.questions]

    def _record(self) -> dict[str, Any]:
        settings = self.session.config.settings
        return {
            **describe_questions(self.benchmark, self.data, self.questions, reflect=self.reflect),
            "model": ":".join(parse_model_spec(self.model)[:2]),
            "request": {"conversation": _CONVERSATION, "temperature": settings.temperature},
            "max_new_tokens": settings.max_new_tokens or self.benchmark.max_new_tokens,
        }


class _Asker:
    """Asks stage after stage.

    Attributes:
        missing: Numbers of questions without an answer in a stage, which later stages leave out.
        outcomes, estimates: Of the stages; estimates where nothing is sent.
        versions: Names of the model for itself.
        dates: Days of the replies (YYYY-MM-DD, UTC).
    """

    def __init__(self, job: HostedRun, *, send: bool):
        self._job, self._send = job, send
        self.missing: set[int] = set()
        self.outcomes: dict[str, Outcome] = {}
        self.estimates: list[CostEstimate] = []
        self.versions: set[str] = set()
        self.dates: set[str] = set()
        self._digests: dict[str, str] = {}

    def answer(self) -> tuple[list[Answer], Any]:
        """See `answer_questions`; a missing answer is empty."""
        job = self._job
        return answer_questions(job.benchmark, job.questions, job.limits, self._ask, reflect=job.reflect)

    def _ask(self, stage: PredictStage) -> list[Answer]:
        numbers = [number for number in range(len(self._job.questions)) if number not in self.missing]
        tasks = {number: self._task(stage, number) for number in numbers}
        if self._send:
            stopped = next((outcome.stopped for outcome in self.outcomes.values() if outcome.stopped), "")
            self.outcomes[stage.name] = Outcome(stopped=stopped) if stopped else self._request(stage, tasks)
        else:
            extra, kind = len(self.missing), _kind(stage)
            found = self._job.session.estimate(kind, tasks.values(), extra)
            self.estimates.append(found._replace(stage=stage.name))
        answers = [Answer("", ())] * len(self._job.questions)
        for number, task in tasks.items():
            reply = self._job.session.journal.get_reply(task.identity)
            if reply is None:
                self.missing.add(number)
                continue
            answers[number] = Answer(reply.text.strip(), ())
            self.versions.add(reply.version)
            self.dates.add(datetime.datetime.fromtimestamp(reply.started, datetime.UTC).date().isoformat())
        return answers

    def _request(self, stage: PredictStage, tasks: Mapping[int, RequestTask]) -> Outcome:
        """Send a stage's requests, those with the same maximum length together."""
        total, job = Outcome(), self._job
        limits = {number: self._limit(stage, number) for number in tasks}
        for limit in sorted(set(limits.values())):
            some = [task for number, task in tasks.items() if limits[number] == limit]
            settings = dataclasses.replace(job.session.config.settings, max_new_tokens=limit)
            outcome = job.session.run(stage.name, some, [job.model], settings)
            for name in ("requested", "cached", "usable", "uncounted"):
                setattr(total, name, getattr(total, name) + getattr(outcome, name))
            total.failed |= outcome.failed
            total.stopped = outcome.stopped
            if total.stopped:
                break
        return total

    def _limit(self, stage: PredictStage, number: int) -> int:
        """Return the maximum length of a reply; the user's, if it is longer, as it has to hold a model's thoughts too."""
        return max(stage.limits[number], self._job.session.config.settings.max_new_tokens or 0)

    def _task(self, stage: PredictStage, number: int) -> RequestTask:
        job, question, settings = self._job, self._job.questions[number], self._job.session.config.settings
        conversation, image, kind = stage.conversations[number], question.image, _kind(stage)
        first, *more = (turn.text for turn in conversation.turns)
        turns = (first.removeprefix(f"{IMAGE}\n") if image is not None else first, *more)
        fields = {"turns": digest(*turns)}
        if settings.temperature != 0:  # two samples are two answers
            fields |= {"benchmark": job.benchmark.name, "id": str(question.id)}

        def encoded() -> bytes:
            return b"" if image is None else job.data.read_image(image)

        def build() -> Request:
            shown = RequestImage(image or str(question.id), encoded())
            return Request(kind, shown, fields, send_image=image is not None, turns=turns)

        if (image or "") not in self._digests:
            self._digests[image or ""] = digest_bytes(encoded())
        content = content_digest(kind, self._digests[image or ""], fields)
        provider, model, _ = parse_model_spec(job.model)
        version = f"temperature={settings.temperature} longest={self._limit(stage, number)}"
        return RequestTask(RequestIdentity(kind, content, provider, model, version), str(question.id), build, _check)


def _kind(stage: PredictStage) -> Stage:
    """Return the journal's name of a stage: rationales are longer than answers, which estimates go by."""
    return "explain" if stage.name == "rationales" else "predict"


def _check(reply: str) -> str:
    """Accept any text: the benchmark's rule parses it."""
    if not reply.strip():
        raise UnusableError("an empty reply")
    return reply


def prediction_settings(settings: RequestSettings, max_new_tokens: int | None) -> RequestSettings:
    """Return the settings by which questions are asked: plain text, and a long answer is cut as our own model's is."""
    return dataclasses.replace(settings, structured=False, max_new_tokens=max_new_tokens, keep_cut_off=True)
