"""Annotate many images in steps: questions, rationales, judge, export. Every reply is recorded in a journal.

Files have the names and keys of REVERIE's scripts (`zjr2000/REVERIE`), so that each can continue the other's folder.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from reverie_jax.annotate import parsing
from reverie_jax.annotate.adopt import ADOPTED, question_replies, read_original_rows
from reverie_jax.annotate.files import DROPPED, JUDGED, QUESTIONS, RATIONALES, RELEASED, Row, read_step_rows
from reverie_jax.annotate.job import Job, JobRunner
from reverie_jax.annotate.schemas import QUESTIONS_SCHEMA
from reverie_jax.data.reflection import AnnotatedQuestion, Reflection, classify_question, reflection_conversations
from reverie_jax.data.row_files import read_rows, write_rows
from reverie_jax.data.sources import reverie
from reverie_jax.data.sources.annotated import KEYS, QUESTION_KEYS, RATIONALE_KEYS, VERDICT
from reverie_jax.errors import UserError
from reverie_jax.hosted.identity import content_digest
from reverie_jax.hosted.images import mean_tokens, read_image, resolve_image
from reverie_jax.hosted.interface import Request, Stage, UnusableError
from reverie_jax.hosted.providers import parse_model_spec, redact_password
from reverie_jax.hosted.runner import Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, ProgressCallback

Step = Literal["questions", "rationales", "judge", "export"]
Votes = Literal["majority", "any", "all"]
_RATIONALE_STAGES: tuple[Stage, Stage] = ("positive", "negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotationJob(Job):
    """What to annotate, and by which models.

    Attributes:
        images_folder: Folder that image names are relative to.
        images: Names of the images, in the order of the output.
        judges: The judges, as "provider:model"; the writer if empty.
        questions: Questions for each image.
        confusing: Confusing answers for each question.
        votes: Drop a row if most judges find a contradiction (a tie drops), if any does, or if all do.
        judge_sees_image: Whether the judges see the image.
    """

    images_folder: Path
    images: tuple[str, ...]
    judges: tuple[str, ...] = ()
    questions: int = 3
    confusing: int = 1
    votes: Votes = "majority"
    judge_sees_image: bool = False


class Pipeline(JobRunner):
    """The steps of an annotation job. Close it, or use it as a context manager.

    Args:
        environment: Holds the API keys.
        on_progress: See `ProgressCallback`.

    Raises:
        UserError: The job is invalid; nothing was sent.
    """

    def __init__(self, job: AnnotationJob, environment: Mapping[str, str], on_progress: ProgressCallback | None = None):
        if job.questions < 1 or job.confusing < 1:
            raise UserError("--questions and --confusing must be at least 1")
        self.job, self.judges = job, tuple(dict.fromkeys(job.judges or (job.writer,)))
        if len({parse_model_spec(judge)[:2] for judge in self.judges}) < len(self.judges):
            raise UserError("--judge: two judges have the same name; give the models of two servers different names")
        super().__init__(job, environment, on_progress)
        self.journal, self.notes = self.session.journal, self.session.notes
        self._digests: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        try:
            self._adopt()
        except BaseException:
            self.close()
            raise

    def _adopt(self) -> None:
        """Record the rows of REVERIE's own scripts that are in the folder, once, so that nothing is paid for twice.

        Raises:
            UserError: A combined file is broken, or none of the rows' images is in the image folder.
        """
        file = self.job.folder / ADOPTED
        if not file.exists():
            if not self.journal.is_empty():
                return
            rows, num_broken = read_original_rows(self.job.folder, self.job.images_folder)
            if num_broken:
                self.notes.append(f"skipped {num_broken} broken rows or files of the original scripts")
            if not rows:
                return
            if not any(self.image_digest(row["image"]) for row in rows):
                raise UserError(
                    f"{self.job.images_folder}: has none of the images of the rows in {self.job.folder}, such as"
                    f" {rows[0]['image']}; set --images to their folder"
                )
            write_rows(file, rows)
        rows = read_rows(file, min_rows=0)
        adopted: collections.Counter[str] = collections.Counter()
        with self.journal.transaction():
            for image, text in question_replies(rows).items():
                if (task := self.question_task(image)) is not None:
                    adopted["questions"] += self.journal.adopt(task.identity, text)
            for row in rows:
                for text, task in self._original_replies(row):
                    with contextlib.suppress(UnusableError):  # an invalid verdict is requested again
                        task.parse_reply(text)
                        adopted[task.identity.stage] += self.journal.adopt(task.identity, text)
        if adopted.total():
            counts = ", ".join(f"{count} {stage}" for stage, count in adopted.items())
            self.notes.append(f"adopted {len(rows)} rows of the original scripts ({counts})")

    def _original_replies(self, row: Row) -> list[tuple[str, RequestTask]]:
        """Return (reply, task) of a row's rationales, and of its verdict if it has both."""
        pairs: list[tuple[str, RequestTask | None]] = []
        for key, stage in zip(RATIONALE_KEYS, _RATIONALE_STAGES, strict=True):
            if row.get(key):
                pairs.append((row[key], self.rationale_task(row, stage)))
        if len(pairs) == len(RATIONALE_KEYS) and row.get(VERDICT):
            pairs.append((row[VERDICT], self.judge_task(row, self.judges[0])))
        return [(text, task) for text, task in pairs if task is not None]

    # Requests.

    def image_digest(self, name: str) -> str | None:
        """Return the digest of an image's bytes; None if the file cannot be read."""
        if name not in self._digests and name not in self._unreadable:
            try:
                self._digests[name] = self.journal.image_digest(resolve_image(self.job.images_folder, name))
            except OSError as error:
                self._unreadable[name] = f"image cannot be read ({error.strerror})"
            except UserError as error:
                self._unreadable[name] = str(error)
        return self._digests.get(name)

    def _task(
        self,
        stage: Stage,
        model_spec: str,
        image: str,
        fields: Mapping[str, str],
        parse: Callable[[str], Any],
        send_image: bool = True,
    ) -> RequestTask | None:
        digest = self.image_digest(image)
        if digest is None:
            return None

        def build() -> Request:
            encoded = read_image(self.job.images_folder, image)
            schema = QUESTIONS_SCHEMA if stage == "questions" else None
            prompt = self.prompts(stage, fields, send_image=send_image)
            return Request(stage, encoded, fields, prompt, send_image, schema)

        identity = self.session.identify(stage, model_spec, content_digest(stage, digest, fields), send_image)
        return RequestTask(identity, image, build, parse)

    def question_task(self, image: str) -> RequestTask | None:
        """Return the task of an image's questions; None if the image cannot be read."""
        fields = {"count": str(self.job.questions), "confusing": str(self.job.confusing)}
        return self._task("questions", self.job.writer, image, fields, self._parse_questions)

    def _parse_questions(self, text: str) -> list[AnnotatedQuestion]:
        return parsing.parse_questions(text, max_confusing=self.job.confusing)

    def rationale_task(self, row: Row, stage: Stage) -> RequestTask | None:
        """Return the task of a row's positive or negative rationale; None if the image cannot be read."""
        answer = row["correct_answer" if stage == "positive" else "confusing_answer"]
        fields = {"question": row["question"], "answer": answer}
        return self._task(stage, self.job.writer, row["image"], fields, parsing.parse_rationale)

    def judge_task(self, row: Row, judge: str) -> RequestTask | None:
        """Return the task of a row's verdict; None if the image cannot be read."""
        fields = {
            "question": row["question"],
            "answer": row["correct_answer"],
            "positive": row["correct_rationale"],
            "wrong": row["confusing_answer"],
            "negative": row["incorrect_rationale"],
        }
        return self._task("judge", judge, row["image"], fields, parsing.parse_verdict, self.job.judge_sees_image)

    # Steps.

    def questions(self) -> Outcome:
        """Request the questions; write one row for each question and confusing answer."""
        with self.journal.transaction():  # building tasks records digests of images
            tasks = [(name, self.question_task(name)) for name in self.job.images]
        outcome = self._run("questions", iter(tasks), [self.job.writer])
        rows: list[Row] = []
        for name, task in tasks:
            for question in self._read_questions(task):
                for wrong in question.confusing_answers:
                    values = (name, question.question, question.correct_answer, wrong)
                    rows.append({**dict(zip(QUESTION_KEYS, values, strict=True)), "question_type": question.type})
        write_rows(self.job.folder / QUESTIONS, rows)
        return outcome

    def _read_questions(self, task: RequestTask | None) -> list[AnnotatedQuestion]:
        """Return the recorded questions; all of an adopted reply, else no more than requested."""
        if task is None or (text := self.session.get_reply(task)) is None:
            return []
        if self.journal.is_original(task.identity):
            return parsing.parse_questions(text)
        return self._parse_questions(text)[: self.job.questions]

    def rationales(self) -> Outcome:
        """Request why the right answers are right and the wrong ones wrong."""
        rows = read_step_rows(self.job.folder / QUESTIONS, QUESTION_KEYS)
        tasks = ((row["image"], self.rationale_task(row, stage)) for row in rows for stage in _RATIONALE_STAGES)
        outcome = self._run("rationales", tasks, [self.job.writer])
        complete = []
        for row in rows:
            texts = [self.session.get_reply(self.rationale_task(row, stage)) for stage in _RATIONALE_STAGES]
            rationales = [parsing.parse_rationale(text) for text in texts if text is not None]
            if len(rationales) == len(RATIONALE_KEYS):
                complete.append(row | dict(zip(RATIONALE_KEYS, rationales, strict=True)))
        write_rows(self.job.folder / RATIONALES, complete)
        return outcome

    def judge(self) -> Outcome:
        """Request every judge's verdict; write the rows with a verdict, and the dropped ones to a file of their own."""
        rows = read_step_rows(self.job.folder / RATIONALES, KEYS)
        tasks = ((row["image"], self.judge_task(row, judge)) for row in rows for judge in self.judges)
        outcome = self._run("judge", tasks, self.judges)
        judged, dropped = [], []
        for row in rows:
            texts = {judge: self.session.get_reply(self.judge_task(row, judge)) for judge in self.judges}
            replies = {redact_password(judge): text for judge, text in texts.items()}
            votes = {judge: parsing.parse_verdict(text) for judge, text in replies.items() if text is not None}
            verdict = decide(list(votes.values()), len(self.judges), self.job.votes)
            if verdict is None:
                continue
            judged.append(row | {VERDICT: verdict, "judges": votes})
            if verdict == "yes":
                dropped.append(row | {"reason": "judged to contradict each other", "judges": replies})
        write_rows(self.job.folder / JUDGED, judged)
        write_rows(self.job.folder / DROPPED, dropped)
        return outcome

    def _run(self, step: str, tasks: Iterator[tuple[str, RequestTask | None]], models: Iterable[str]) -> Outcome:
        """Run (image, task) pairs; images that cannot be read are failures."""
        with self.journal.transaction():  # building tasks records digests of images
            pairs = list(tasks)
        outcome = self.session.run(step, (task for _, task in pairs if task is not None), models)
        outcome.failed.update({name: self._unreadable[name] for name, task in pairs if task is None})
        return outcome

    def estimate(self, steps: Iterable[Step]) -> list[CostEstimate]:
        """Estimate the requests, tokens and price of each stage from the journal, or from defaults."""
        job, steps = self.job, list(steps)
        tasks = {"questions": [self.question_task(name) for name in job.images]}
        unknown = sum(task is not None and self.session.get_reply(task) is None for task in tasks["questions"])
        rows = read_step_rows(job.folder / QUESTIONS, QUESTION_KEYS) if (job.folder / QUESTIONS).exists() else []
        explained = read_step_rows(job.folder / RATIONALES, KEYS) if (job.folder / RATIONALES).exists() else []
        for stage in _RATIONALE_STAGES:
            tasks[stage] = [self.rationale_task(row, stage) for row in rows]
        tasks["judge"] = [self.judge_task(row, judge) for row in explained for judge in self.judges]
        new = unknown * job.questions if "questions" in steps else 0
        extra = {
            "questions": 0,
            "positive": new,
            "negative": new * job.confusing,
            "judge": (len(rows) - len(explained) + new * job.confusing) * len(self.judges),
        }
        stages = {"questions": ["questions"], "rationales": _RATIONALE_STAGES, "judge": ["judge"], "export": []}
        writer, judge = (parse_model_spec(spec)[0] for spec in (job.writer, self.judges[0]))
        size = job.config.settings.max_image_size
        shown = mean_tokens(writer, job.images_folder, job.images, size)
        image_tokens: dict[str, float] = dict.fromkeys(("questions", *_RATIONALE_STAGES), shown)
        image_tokens["judge"] = mean_tokens(judge, job.images_folder, job.images, size) if job.judge_sees_image else 0.0
        return [
            self.session.estimate(stage, tasks[stage], extra[stage], image_tokens[stage])
            for step in steps
            for stage in stages[step]
        ]


def export(folder: Path) -> int:
    """Write the rows that the judges keep in the released form, four turns each; return the number of conversations.

    Raises:
        UserError: The step `judge` did not run.
    """
    rows = read_step_rows(folder / JUDGED, (*KEYS, VERDICT))
    images: dict[str, dict[tuple[str, str], Reflection]] = {}
    for row in rows:
        if row[VERDICT] != "no":
            continue
        question, answer = row["question"], row["correct_answer"]
        reflections = images.setdefault(row["image"], {})
        if (question, answer) not in reflections:
            kind = row.get("question_type") or classify_question(question, answer)
            annotated = AnnotatedQuestion(question=question, type=kind, correct_answer=answer, confusing_answers=[])
            reflections[question, answer] = Reflection(annotated, row["correct_rationale"], ())
        old = reflections[question, answer]
        negative = (row["confusing_answer"], row["incorrect_rationale"])
        reflections[question, answer] = dataclasses.replace(old, negatives=(*old.negatives, negative))
    released = (
        (name, name, [c for reflection in reflections.values() for c in reflection_conversations(reflection)])
        for name, reflections in images.items()
    )
    return reverie.write_annotations(folder / RELEASED, released)


def decide(votes: list[Literal["yes", "no"]], num_judges: int, rule: Votes) -> Literal["yes", "no"] | None:
    """Return the judges' common verdict; None while the missing votes could still change it."""
    yes, no = votes.count("yes"), votes.count("no")
    if rule == "any":
        return "yes" if yes else "no" if no == num_judges else None
    if rule == "all":
        return "no" if no else "yes" if yes == num_judges else None
    return "yes" if 2 * yes >= num_judges else "no" if 2 * no > num_judges else None
