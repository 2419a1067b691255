"""Answer a benchmark's questions into a file, batch by batch, resuming after any interruption."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.reflection import WHY
from reverie_jax.data.tokenization import Encoder
from reverie_jax.errors import UserError
from reverie_jax.eval.answer_log import AnswerLog, on_first_process
from reverie_jax.eval.benchmarks.answer_files import PREDICTIONS, RUN
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, Question
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Answer, Engine
from reverie_jax.eval.schedule import Schedule
from reverie_jax.files import atomic_path, write_json

STAGES = ("first", "rationales", "answers")
"""Each writes a file of its own, `.STAGE.jsonl`; without `reflect` there is the last one only."""

REVISE = "With this in mind, answer the question once more. {question}"
"""Prompt for the model's rationale (`PredictOptions.reflect`)."""
RATIONALE_TOKENS = 256

_TEXT_ONLY_BATCH = 16
"""Questions without an image that share a sequence: they have the template's opening in common."""

Reflection = tuple[Sequence[Answer], Sequence[Answer]]
"""First answers and rationales."""
ProgressCallback = Callable[[str, int, int], None]
"""Called with the stage, the number of answers so far and the number of questions."""


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """How a benchmark's questions are answered.

    Attributes:
        decoding: Its `max_new_tokens` applies where it is less than the benchmark's, or with a protocol.
        reflect: The model answers, explains its answer and answers again; all three texts are kept.
        limit: Number of questions to answer, from the first on; None for all.
        protocol: Name of the decoding protocol (`protocols.PROTOCOLS`); empty for none.
    """

    decoding: Decoding
    reflect: bool = False
    limit: int | None = None
    protocol: str = ""

    def questions(self, data: BenchmarkData) -> Sequence[Question]:
        """Return the questions to answer."""
        return data.available[: self.limit]

    def longest(self, limit: int) -> int:
        """Return the maximum length of an answer for which the benchmark has this limit."""
        return self.decoding.max_new_tokens if self.protocol else min(self.decoding.max_new_tokens, limit)


def build_conversation(question: Question) -> Conversation:
    """Return the open conversation that asks a question; the image comes first."""
    texts = [text for pair in question.history for text in pair] + [question.text]
    if question.image is not None:
        texts[0] = f"{IMAGE}\n{texts[0]}"
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))
    return Conversation(turns, () if question.image is None else (0,))


def dump_prompts(encoder: Encoder, questions: Sequence[Question], path: Path) -> None:
    """Write JSON lines: each question's id, image, text, and the complete prompt in the template's words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            prompt = encoder.render(build_conversation(question))[0]
            row = {"question_id": question.id, "image": question.image, "text": question.text, "prompt": prompt}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def predict(
    engine: Engine,
    benchmark: Benchmark,
    data: BenchmarkData,
    out: Path,
    options: PredictOptions,
    *,
    model: str,
    checksums: Mapping[str, Any],
    on_progress: ProgressCallback = lambda stage, done, total: None,
) -> Path:
    """Answer all questions and write `out`/predictions.jsonl in the questions' order, in LLaVA's form.

    Answers are written as batches end; an interrupted run resumes after the last complete batch and writes the file that an
    uninterrupted one would have written. Several processes call it alike; the first one writes.

    Args:
        engine: Decodes the answers.
        benchmark: The benchmark.
        data: Its questions.
        out: Output folder.
        options: How to answer.
        model: Name of the model, for the record.
        checksums: Of the weights (`models.checkpoints.base_checksums`).
        on_progress: Called after each batch.

    Returns:
        The path of predictions.jsonl.

    Raises:
        UserError: The folder holds another run's answers, or cannot be written.
        DataError: A question is too long for a sequence.
        BrokenImage, BenchmarkError: An image cannot be read.
    """
    questions = options.questions(data)
    decoding = options.decoding
    if benchmark.yes_no and questions:
        opening = build_conversation(questions[0])
        yes, no = (engine.first_token(opening, word) for word in ("Yes", "No"))
        # A tokenizer may begin both with the same token, which then tells nothing.
        decoding = dataclasses.replace(decoding, track=(yes, no) if yes != no else ())
    asked = describe_questions(benchmark, data, questions, reflect=options.reflect)
    record = asked | _describe_engine(benchmark, engine, options) | {"model": model, "checksums": dict(checksums)}
    on_first_process(lambda: claim_folder(out, record))
    run = _Predictor(engine, decoding, data, questions, out, on_progress).run
    limits = [options.longest(question.max_new_tokens or benchmark.max_new_tokens) for question in questions]
    answers, reflection = answer_questions(benchmark, questions, limits, run, reflect=options.reflect)
    on_first_process(lambda: write_predictions(out, questions, answers, reflection, model))
    return out / PREDICTIONS


def answer_questions(
    benchmark: Benchmark,
    questions: Sequence[Question],
    limits: Sequence[int],
    run: Callable[[PredictStage], list[Answer]],
    *,
    reflect: bool,
) -> tuple[list[Answer], Reflection | None]:
    """Return the answers, in the questions' order; with `reflect`, first answers and rationales too.

    Args:
        benchmark: The benchmark.
        questions: Its questions.
        limits: Maximum length of each answer, in tokens.
        run: Returns an answer to each conversation of a stage.
        reflect: Answer, explain, then answer again.
    """
    conversations = [build_conversation(question) for question in questions]
    answering = PredictStage("answers", conversations, limits, benchmark.expected_new_tokens)
    if not reflect:
        return run(answering), None
    first = run(dataclasses.replace(answering, name="first"))
    conversations = _continued(conversations, first, [WHY] * len(questions))
    reasons = run(PredictStage("rationales", conversations, [RATIONALE_TOKENS] * len(questions), None))
    again = [REVISE.format(question=question.text) for question in questions]
    answers = run(dataclasses.replace(answering, conversations=_continued(conversations, reasons, again)))
    return answers, (first, reasons)


def _continued(
    conversations: Sequence[Conversation], answers: Sequence[Answer], prompts: Sequence[str]
) -> list[Conversation]:
    """Return the conversations with their answers and a further prompt."""
    return [
        dataclasses.replace(
            # What the model wrote is text, never an image marker.
            conversation,
            turns=(
                *conversation.turns,
                Turn("assistant", answer.text.replace(IMAGE, "").strip()),
                Turn("user", prompt),
            ),
        )
        for conversation, answer, prompt in zip(conversations, answers, prompts, strict=True)
    ]


def describe_questions(
    benchmark: Benchmark, data: BenchmarkData, questions: Sequence[Question], *, reflect: bool
) -> dict[str, Any]:
    """Return what is asked, for the record of a run.

    Raises:
        UserError: Questions that are conversations allow no reflection.
    """
    if reflect and any(question.history for question in questions):
        raise UserError(f"--reflect: the questions of {benchmark.name} are conversations; leave --reflect out")
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "content": questions_digest(questions),
        "protocol": dict(data.protocol),
        "reflect": reflect,
    }


def _describe_engine(benchmark: Benchmark, engine: Engine, options: PredictOptions) -> dict[str, Any]:
    encoder, processor = engine.encoder, engine.processor
    return {
        "dtype": engine.dtype,
        "template": encoder.template.name,
        "tokenization": encoder.tokenization,
        "image_aspect_ratio": processor.image_aspect_ratio,
        "decoding_protocol": options.protocol or None,
        "decoding": _recorded(options.decoding),
        "max_new_tokens": options.longest(benchmark.max_new_tokens),
    }


def questions_digest(questions: Sequence[Question]) -> str:
    """Return a digest of what is asked: ids, names of images, texts."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((str(question.id), question.image, question.text, question.history)).encode())
    return digest.hexdigest()[:16]


def _recorded(decoding: Decoding) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(decoding).items() if name != "track"}


def claim_folder(out: Path, record: Mapping[str, Any]) -> None:
    """Mark the folder as this run's.

    Raises:
        UserError: The folder belongs to another run.
    """
    path = out / RUN
    expected = json.loads(json.dumps(record))
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            existing = json.loads(path.read_text("utf-8"))
            # Options that the run's release did not have were at their defaults.
            existing["decoding"] = _recorded(Decoding(1)) | existing.get("decoding", {})
            if "benchmark" not in existing and "recipe" in existing:
                raise UserError(f"{out}: belongs to a run of another command; choose another folder")
            differs = [key for key in expected if existing.get(key) != expected[key]]
            if differs:
                raise UserError(
                    f"{out}: holds answers of another run ({', '.join(differs)} differ); choose another folder, or delete it"
                )
            return
        if (out / PREDICTIONS).exists():
            raise UserError(f"{out}: holds a {PREDICTIONS} without {RUN}; choose another folder, or move the file away")
        for stage in STAGES:
            (out / f".{stage}.jsonl").unlink(missing_ok=True)  # of an unknown run
        write_json(path, record)
    except UserError:  # a subclass of ValueError
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a record of a run; delete it and the answers beside it") from None


@dataclasses.dataclass(frozen=True)
class PredictStage:
    """One pass over the questions: an answer to each conversation.

    Attributes:
        limits: Maximum length of each answer, in tokens.
    """

    name: str
    conversations: Sequence[Conversation]
    limits: Sequence[int]
    expected_new_tokens: int | None


@dataclasses.dataclass(frozen=True)
class _Predictor:
    """Runs stages; the answers of each are kept in a file in `out`, which a further run reads."""

    engine: Engine
    decoding: Decoding
    data: BenchmarkData
    questions: Sequence[Question]
    out: Path
    on_progress: ProgressCallback

    def run(self, stage: PredictStage) -> list[Answer]:
        """Return answers in the questions' order, from the file and from the model."""
        parts = [self._part(stage, limit) for limit in sorted(set(stage.limits))]
        answers: list[Answer | None] = [None] * len(self.questions)
        done = 0
        with AnswerLog(self.out / f".{stage.name}.jsonl") as log:
            skip = log.resume([numbers for schedule, _ in parts for numbers in schedule.numbers()])
            for number, answer in log.answers:
                answers[number], done = answer, done + 1
            self.on_progress(stage.name, done, len(answers))
            for schedule, decoding in parts:
                batches = sum(group.batches for group in schedule.groups)
                skipped, skip = min(skip, batches), max(0, skip - batches)
                expected = stage.expected_new_tokens
                for batch in self.engine.stream(schedule, decoding, expected_new_tokens=expected, skip=skipped):
                    log.add(batch)
                    for number, answer in batch.items():
                        answers[number] = answer
                    done += len(batch)
                    self.on_progress(stage.name, done, len(answers))
        return [answer for answer in answers if answer is not None]

    def _part(self, stage: PredictStage, limit: int) -> tuple[Schedule, Decoding]:
        """Return the questions whose answers have the same maximum length, and how to decode them."""
        track = () if stage.name == "rationales" else self.decoding.track
        decoding = dataclasses.replace(self.decoding, max_new_tokens=limit, track=track)
        images = self._images(stage, limit)
        return self.engine.schedule(images, decoding, expected_new_tokens=stage.expected_new_tokens), decoding

    def _images(self, stage: PredictStage, limit: int) -> list[ImageQuestions]:
        """Return questions by image, in the order in which each image comes first; images are read when they are needed."""
        by_image: dict[str, list[int]] = {}
        text_only: list[int] = []
        for number, question in enumerate(self.questions):
            if stage.limits[number] == limit:
                (text_only if question.image is None else by_image.setdefault(question.image, [])).append(number)

        def questions(numbers: Sequence[int]) -> list[tuple[int, Conversation]]:
            return [(number, stage.conversations[number]) for number in numbers]

        images = [
            ImageQuestions(name, functools.partial(self.data.read_image, name), questions(numbers))
            for name, numbers in by_image.items()
        ]
        for start in range(0, len(text_only), _TEXT_ONLY_BATCH):
            part = text_only[start : start + _TEXT_ONLY_BATCH]
            images.append(ImageQuestions(f"question {self.questions[part[0]].id}", b"", questions(part)))
        return images


def write_predictions(
    out: Path,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    reflection: Reflection | None,
    model: str,
    missing: Collection[int] = (),
) -> None:
    """Write the file atomically, without the questions whose numbers are `missing`."""
    with atomic_path(out / PREDICTIONS) as part, part.open("w", encoding="utf-8") as file:
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            if number in missing:
                continue
            row: dict[str, Any] = {
                "question_id": question.id,
                "image": question.image,
                "prompt": question.text,
                "text": answer.text,
                "answer_id": f"{number}",
                "model_id": model,
                "metadata": {},
            }
            if answer.tracked:
                yes, no = answer.tracked
                row["metadata"] = {"yes": round(float(1 / (1 + np.exp(min(no - yes, 700.0)))), 6)}
            if reflection is not None:
                first, reasons = reflection
                row |= {"first_text": first[number].text, "rationale": reasons[number].text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
