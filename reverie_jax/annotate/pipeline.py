"""The stages at scale: questions, rationales, judge, export. Every reply is in the journal; every stage's output is a file.

Files have the names and keys of REVERIE's scripts (`zjr2000/REVERIE`), so that either can go on where the other stopped.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from reverie_jax.annotate import parsing
from reverie_jax.annotate.prompts import Prompts
from reverie_jax.annotate.schemas import QUESTIONS_SCHEMA, QuestionSet
from reverie_jax.data import reflection
from reverie_jax.data.reflection import AnnotatedQuestion, Reflection, reflection_conversations
from reverie_jax.data.row_files import read_rows, write_rows
from reverie_jax.data.sources import annotated, reverie
from reverie_jax.errors import UserError
from reverie_jax.hosted import images as pictures
from reverie_jax.hosted.interface import AnnotationError, Refused, Request, RequestSettings, Stage
from reverie_jax.hosted.providers import parse, shown
from reverie_jax.hosted.request_key import content_of
from reverie_jax.hosted.runner import Limits, Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, ProgressCallback, RequestConfig, Session

QUESTIONS = "reasoning_instruct_data.json"
RATIONALES = "rationale_instruct_data.json"
JUDGED = "rationale_instruct_data_with_judge.json"
DROPPED = "dropped.json"
RELEASED = "reverie.json"
ADOPTED = "original_rows.json"
"""What was found of the original scripts' output."""

Step = Literal["questions", "rationales", "judge", "export"]
Votes = Literal["majority", "any", "all"]
Row = dict[str, Any]
KEYS, REASONED, VERDICT = annotated.QUESTION_KEYS, annotated.RATIONALE_KEYS, annotated.VERDICT


@dataclasses.dataclass(frozen=True)
class AnnotationJob:
    """What to annotate, how, and by whom.

    Attributes:
        folder: outputs and journal.
        pictures: folder that the rows' image names are relative to.
        images: names of the pictures, in the order of the output.
        model: who writes, as "provider:model".
        judges: who judges; the writer by default.
        count: questions a picture.
        confusing: wrong answers a question.
        votes: a row is dropped if most judges find a contradiction (a tie drops), if any does, or if all do.
        shown: judges see the picture.
    """

    folder: Path
    pictures: Path
    images: tuple[str, ...]
    model: str
    judges: tuple[str, ...] = ()
    count: int = 3
    confusing: int = 1
    votes: Votes = "majority"
    shown: bool = False
    prompts: Path | None = None
    settings: RequestSettings = dataclasses.field(default_factory=RequestSettings)
    limits: Limits = dataclasses.field(default_factory=Limits)


class Pipeline:
    """A job's stages over its journal. Close it, or use it as a context.

    Args:
        environment: where keys are.
        tell: called after each item as `tell(step, total, outcome, gate)`.

    Raises:
        UserError: the job cannot be right; nothing has been asked.
    """

    def __init__(self, job: AnnotationJob, environment: Mapping[str, str], on_progress: ProgressCallback | None = None):
        if job.count < 1 or job.confusing < 1:
            raise UserError("--questions and --confusing must be at least 1")
        self.job, self.judges = job, tuple(dict.fromkeys(job.judges or (job.model,)))
        parse(job.model)
        if len({parse(who)[:2] for who in self.judges}) < len(self.judges):
            raise UserError(
                "--judge: two judges have one name; servers at two addresses must call their models differently"
            )
        self.prompts = Prompts(job.prompts)
        how = RequestConfig(job.settings, job.limits)
        self.session = Session(job.folder, how, environment, on_progress, self.prompts.versions)
        self.journal, self.notes = self.session.journal, self.session.notes
        self._digests: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        try:
            self._adopt()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is asked.

    def _digest(self, name: str) -> str | None:
        """A picture's content; None where there is no file."""
        if name not in self._digests and name not in self._unreadable:
            try:
                path = pictures.place(self.job.pictures, name)
                self._digests[name] = self.journal.picture(path, pictures.hashed)
            except OSError as error:
                self._unreadable[name] = f"picture cannot be read ({error.strerror})"
            except UserError as error:
                self._unreadable[name] = str(error)
        return self._digests.get(name)

    def _task(
        self,
        stage: Stage,
        who: str,
        name: str,
        fields: Mapping[str, str],
        read: Callable[[str], Any],
        shown: bool = True,
    ) -> RequestTask | None:
        digest = self._digest(name)
        if digest is None:
            return None

        def request() -> Request:
            picture = pictures.read(self.job.pictures, name)
            schema = QUESTIONS_SCHEMA if stage == "questions" else None
            prompt = self.prompts(stage, fields, shown=shown)
            return Request(stage, picture, fields, prompt, shown, schema)

        content = content_of(stage, digest, dict(fields))
        return RequestTask(self.session.item(stage, who, content, shown), name, request, read)

    def _fields(self) -> dict[str, str]:
        return {"count": str(self.job.count), "confusing": str(self.job.confusing)}

    def _read_questions(self, text: str) -> list[AnnotatedQuestion]:
        return parsing.questions(text, confusing=self.job.confusing)

    def _question_tasks(self) -> Iterator[tuple[str, RequestTask | None]]:
        for name in self.job.images:
            yield name, self._task("questions", self.job.model, name, self._fields(), self._read_questions)

    def _rationale_task(self, row: Row, stage: Stage) -> RequestTask | None:
        answer = row["correct_answer" if stage == "positive" else "confusing_answer"]
        fields = {"question": row["question"], "answer": answer}
        return self._task(stage, self.job.model, row["image"], fields, parsing.rationale)

    def _judge_task(self, row: Row, who: str) -> RequestTask | None:
        fields = {
            "question": row["question"],
            "answer": row["correct_answer"],
            "positive": row["correct_rationale"],
            "wrong": row["confusing_answer"],
            "negative": row["incorrect_rationale"],
        }
        return self._task("judge", who, row["image"], fields, parsing.verdict, self.job.shown)

    # The stages.

    def questions(self) -> Outcome:
        """Asks for questions; writes one row a question and wrong answer."""
        outcome = self._run("questions", self._question_tasks())
        rows: list[Row] = []
        for name, task in self._question_tasks():
            text = self.session.had(task)
            if task is not None and self.journal.original(task.item):
                made_here = [] if text is None else parsing.questions(text, confusing=99)
            else:
                made_here = [] if text is None else self._read_questions(text)[: self.job.count]
            for made in made_here:
                for wrong in made.confusing_answers:
                    values = (name, made.question, made.correct_answer, wrong)
                    rows.append({**dict(zip(KEYS, values, strict=True)), "question_type": made.type})
        write_rows(self.job.folder / QUESTIONS, rows)
        return outcome

    def rationales(self) -> Outcome:
        """Asks why the right answers are right and the wrong ones wrong."""
        rows = read_stage_rows(self.job.folder / QUESTIONS, KEYS)
        wanted: tuple[Stage, ...] = ("positive", "negative")
        outcome = self._run("rationales", ((r["image"], self._rationale_task(r, s)) for r in rows for s in wanted))
        made = []
        for row in rows:
            texts = [self.session.had(self._rationale_task(row, stage)) for stage in wanted]
            if None not in texts:
                made.append(
                    row | {key: parsing.rationale(text or "") for key, text in zip(REASONED, texts, strict=True)}
                )
        write_rows(self.job.folder / RATIONALES, made)
        return outcome

    def judge(self) -> Outcome:
        """Asks each judge of each row; rows with a verdict, and those that it drops in a file of their own."""
        rows = read_stage_rows(self.job.folder / RATIONALES, (*KEYS, *REASONED))
        outcome = self._run("judge", ((r["image"], self._judge_task(r, who)) for r in rows for who in self.judges))
        verdicts, dropped = [], []
        for row in rows:
            said = {shown(who): self.session.had(self._judge_task(row, who)) for who in self.judges}
            votes = {who: parsing.verdict(text) for who, text in said.items() if text is not None}
            decision = decide(list(votes.values()), len(self.judges), self.job.votes)
            if decision is None:
                continue
            verdicts.append(row | {VERDICT: decision, "judges": votes})
            if decision == "yes":
                dropped.append(row | {"reason": "judged to contradict each other", "judges": said})
        write_rows(self.job.folder / JUDGED, verdicts)
        write_rows(self.job.folder / DROPPED, dropped)
        return outcome

    def _run(self, step: str, asked: Iterable[tuple[str, RequestTask | None]]) -> Outcome:
        with self.journal.together():  # pictures' digests are written on the way
            found = list(asked)
        names = self.judges if step == "judge" else (self.job.model,)
        outcome = self.session.ask(step, (task for _, task in found if task is not None), names)
        outcome.failed.update({name: self._unreadable[name] for name, task in found if task is None})
        return outcome

    # Before the first call.

    def estimate(self, steps: Iterable[Step]) -> list[CostEstimate]:
        """What each stage would take, by the journal's means or plain guesses."""
        asked: dict[str, list[RequestTask | None]] = {"questions": [task for _, task in self._question_tasks()]}
        unknown = sum(task is not None and self.session.had(task) is None for task in asked["questions"])
        steps = list(steps)
        rows = read_stage_rows(self.job.folder / QUESTIONS, KEYS) if (self.job.folder / QUESTIONS).exists() else []
        asked["positive"] = [self._rationale_task(row, "positive") for row in rows]
        asked["negative"] = [self._rationale_task(row, "negative") for row in rows]
        file = self.job.folder / RATIONALES
        reasoned = read_stage_rows(file, (*KEYS, *REASONED)) if file.exists() else []
        asked["judge"] = [self._judge_task(row, who) for row in reasoned for who in self.judges]
        more = unknown * self.job.count if "questions" in steps else 0
        beyond = {
            "questions": 0,
            "positive": more,
            "negative": more * self.job.confusing,
            "judge": (len(rows) - len(reasoned) + more * self.job.confusing) * len(self.judges),
        }
        stages = {"questions": ["questions"], "rationales": ["positive", "negative"], "judge": ["judge"], "export": []}
        return [self.session.estimate(stage, asked[stage], beyond[stage]) for step in steps for stage in stages[step]]

    # The original scripts' folders.

    def _adopt(self) -> None:
        """Takes over what REVERIE's scripts left in the folder, once: combined files first, raw ones for what those lack.

        Their rows are kept in a file of their own before any output is written, for our outputs have the same names.

        Raises:
            UserError: a combined file is broken, or no picture of theirs is in the folder of pictures.
        """
        kept = self.job.folder / ADOPTED
        if not kept.exists():
            if not self.journal.empty():
                return
            found = [row for row in self._original_rows() if row]
            if not found:
                return
            if not any(self._digest(row["image"]) for row in found):
                raise UserError(
                    f"{self.job.folder}: holds rows of REVERIE's scripts, and {self.job.pictures} none of their pictures,"
                    f" as {found[0]['image']}; name their folder"
                )
            write_rows(kept, found)
        rows = read_rows(kept, min_rows=0)
        taken: collections.Counter[str] = collections.Counter()
        with self.journal.together():
            for name, text in self._their_questions(rows).items():
                if (digest := self._digest(name)) is not None:
                    content = content_of("questions", digest, self._fields())
                    item = self.session.item("questions", self.job.model, content)
                    taken["questions"] += self.journal.adopt(item, text)
            for row in rows:
                asked: list[tuple[str, RequestTask | None]] = []
                stages: tuple[Stage, ...] = ("positive", "negative")
                for key, stage in zip(REASONED, stages, strict=True):
                    if row.get(key):
                        asked.append((row[key], self._rationale_task(row, stage)))
                if len(asked) == 2 and row.get(VERDICT):
                    asked.append((row[VERDICT], self._judge_task(row, self.judges[0])))
                for text, task in asked:
                    if task is not None:
                        with contextlib.suppress(Refused):  # a verdict that is none is asked for again
                            task.read(text)
                            taken[task.item.stage] += self.journal.adopt(task.item, text)
        if taken.total():
            counts = ", ".join(f"{count} {stage}" for stage, count in taken.items())
            self.notes.append(f"taken over from the original scripts: {len(rows)} rows ({counts})")

    def _original_rows(self) -> list[Row]:
        """Their usable rows, each with as much as any stage gave it; names as they are in our folder of pictures."""
        folder, broken, found = self.job.folder, 0, dict[tuple[str, ...], Row]()
        for file, raw, keys in (
            (QUESTIONS, "reasoning_instruct_raw_data", KEYS),
            (RATIONALES, "rationale_raw_data", (*KEYS, *REASONED)),
            (JUDGED, "check_results", (*KEYS, *REASONED, VERDICT)),
        ):
            rows = list(read_rows(folder / file, min_rows=0)) if (folder / file).exists() else []
            for path in sorted((folder / raw).glob("*.json"), key=lambda path: (len(path.name), path.name)):
                try:
                    content = json.loads(path.read_text("utf-8"))
                    rows += self._raw_rows(content) if file == QUESTIONS else [content]
                except (OSError, ValueError, KeyError, TypeError, AnnotationError, RecursionError):
                    broken += 1  # cut off by a kill, or never usable: asked again
            for row in rows:
                if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
                    broken += 1
                    continue
                given = [
                    key for key in REASONED if isinstance(row.get(key), str)
                ]  # a human's may come with the question
                made = {key: parsing.clean(row[key]) for key in dict.fromkeys([*keys, *given])}
                if not all(made[key] for key in KEYS) or made[KEYS[2]].lower() == made[KEYS[3]].lower():
                    broken += 1
                    continue
                made["image"] = pictures.local(self.job.pictures, made["image"])
                about = tuple(made[key] for key in KEYS)
                found.setdefault(about, {}).update({key: value for key, value in made.items() if value})
        if broken:
            self.notes.append(f"{broken} broken rows or files of the original scripts are passed over")
        return list(found.values())

    def _their_questions(self, rows: list[Row]) -> dict[str, str]:
        """Replies, as a model would have given them, by picture."""
        by_image: dict[str, dict[tuple[str, str], list[str]]] = {}
        for row in rows:
            about = (row["question"], row["correct_answer"])
            by_image.setdefault(row["image"], {}).setdefault(about, []).append(row["confusing_answer"])
        return {
            name: QuestionSet(
                questions=[
                    AnnotatedQuestion(
                        question=question,
                        type=reflection.classify_question(question, answer),
                        correct_answer=answer,
                        confusing_answers=wrong,
                    )
                    for (question, answer), wrong in asked.items()
                ]
            ).model_dump_json()
            for name, asked in by_image.items()
        }

    def _raw_rows(self, content: Row) -> list[Row]:
        made = parsing.questions(json.dumps(content["content"]), confusing=99)
        return [
            dict(zip(KEYS, (content["image"], q.question, q.correct_answer, wrong), strict=True))
            for q in made
            for wrong in q.confusing_answers
        ]


def export(folder: Path) -> int:
    """Writes what the judge keeps in the released form, four turns a row; returns how many conversations.

    Raises:
        UserError: nothing has been judged yet.
    """
    rows = read_stage_rows(folder / JUDGED, (*KEYS, *REASONED, VERDICT))
    talks: dict[str, dict[tuple[str, str], Reflection]] = {}
    for row in rows:
        if row[VERDICT] != "no":
            continue
        about = (row["question"], row["correct_answer"])
        of_image = talks.setdefault(row["image"], {})
        if about not in of_image:
            kind = row.get("question_type") or reflection.classify_question(*about)
            asked = AnnotatedQuestion(question=about[0], type=kind, correct_answer=about[1], confusing_answers=[])
            of_image[about] = Reflection(asked, row["correct_rationale"], ())
        old = of_image[about]
        new = (row["confusing_answer"], row["incorrect_rationale"])
        of_image[about] = dataclasses.replace(old, negatives=(*old.negatives, new))
    released = (
        (name, name, [talk for reflection in found.values() for talk in reflection_conversations(reflection)])
        for name, found in talks.items()
    )
    return reverie.write_annotations(folder / RELEASED, released)


def decide(votes: list[Literal["yes", "no"]], judges: int, rule: Votes) -> Literal["yes", "no"] | None:
    """The judges' common verdict; None while those who have not said a word could still change it."""
    yes, no = votes.count("yes"), votes.count("no")
    if rule == "any":
        return "yes" if yes else "no" if no == judges else None
    if rule == "all":
        return "no" if no else "yes" if yes == judges else None
    return "yes" if 2 * yes >= judges else "no" if 2 * no > judges else None


def read_stage_rows(path: Path, keys: Iterable[str], *, strict: bool = True) -> list[Row]:
    """A stage's file: a list of objects with at least these keys, all strings.

    Args:
        strict: rows that lack a key are an error, and not passed over.

    Raises:
        UserError: the file is not there or broken; the row is named.
    """
    if not path.exists():
        raise UserError(f"{path}: not there; run the stage before first")
    rows = read_rows(path, min_rows=0)
    kept = []
    for number, row in enumerate(rows):
        lacking = [key for key in keys if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if not lacking:
            kept.append(row)
        elif strict:
            raise UserError(f"{path}: row {number} lacks {', '.join(lacking)}")
    return kept
