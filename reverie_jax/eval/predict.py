"""Questions of a benchmark to a file of answers: batch by batch, and where it was left after any interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.reflection import WHY
from reverie_jax.data.tokenization import Encoder
from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.files import PREDICTIONS, RUN
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, Question
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Answer, Engine
from reverie_jax.files import atomic_path, write_json

STAGES = ("first", "rationales", "answers")
"""Each has a file of its own while a run is under way."""

REVISE = "With this in mind, answer the question once more. {question}"
"""What the model is asked behind its rationale (`Ask.reflect`)."""
RATIONALE_TOKENS = 256

_TOGETHER = 16
"""Questions about nothing shown that share a row: they have the template's opening in common."""


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """How a benchmark is put to a model.

    Attributes:
        decoding: its `new_tokens` are taken where they are less than the benchmark's.
        reflect: after its answer the model writes why, and may then revise; both answers are kept.
        limit: ask so many questions only, the first.
    """

    decoding: Decoding
    reflect: bool = False
    limit: int | None = None

    def questions(self, loaded: BenchmarkData) -> Sequence[Question]:
        return loaded.asked if self.limit is None else loaded.asked[: self.limit]


def conversation(question: Question) -> Conversation:
    """The question as a model gets it, the picture first."""
    said = [text for pair in question.before for text in pair] + [question.text]
    shown = question.image is not None
    if shown:
        said[0] = f"{IMAGE}\n{said[0]}"
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(said))
    return Conversation(turns, (0,) if shown else ())


def dump_prompts(encoder: Encoder, questions: Sequence[Question], path: Path) -> None:
    """JSON lines: each question's id, picture, text, and the whole prompt in the template's words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            prompt = encoder.text(conversation(question))[0]
            row = {"question_id": question.id, "image": question.image, "text": question.text, "prompt": prompt}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def predict(
    engine: Engine,
    benchmark: Benchmark,
    loaded: BenchmarkData,
    out: Path,
    ask: PredictOptions,
    *,
    model: str,
    base_checksums: Mapping[str, Any],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Path:
    """Asks everything, and writes `out`/predictions.jsonl in the questions' order, in LLaVA's form.

    Answers are written as batches end; a run that was killed goes on behind the last whole batch, and writes the file that
    an undisturbed one would have written. Several processes call it alike; the first one writes.

    Args:
        model: name to record.
        identity: of the weights (`models.checkpoints.identity`).
        progress: called as (stage, answers so far, answers wanted).

    Raises:
        UserError: the folder holds another run's answers, or the disk is full.
        DataError: a question is too long for a row.
        BrokenImage, BenchmarkError: a picture cannot be read.
    """
    questions = ask.questions(loaded)
    if ask.reflect and any(question.before for question in questions):
        raise UserError(
            f"{benchmark.name}: its questions are conversations; there is no reflecting on one turn of them"
        )
    how = ask.decoding
    if benchmark.yes_no and questions:
        opening = conversation(questions[0])
        yes, no = (engine.first_token(opening, word) for word in ("Yes", "No"))
        # A tokenizer may begin both with the same token, which then says nothing.
        how = dataclasses.replace(how, track=(yes, no) if yes != no else ())
    record = _record(benchmark, loaded, questions, engine, ask, model, base_checksums)
    _first(lambda: _begin(out, record))
    talks = [conversation(question) for question in questions]
    usual = benchmark.expected_new_tokens
    caps = [min(how.max_new_tokens, question.max_new_tokens or benchmark.max_new_tokens) for question in questions]
    if not ask.reflect:
        stage = _Stage(engine, loaded, questions, talks, caps, how, usual, "answers", progress)
        answers = stage.run(out)
        _first(lambda: _finish(out, questions, answers, None, model))
        return out / PREDICTIONS
    first = _Stage(engine, loaded, questions, talks, caps, how, usual, "first", progress).run(out)
    texts = [answer.text for answer in first]
    plain = dataclasses.replace(how, track=())
    talks = [_on(talk, text, WHY) for talk, text in zip(talks, texts, strict=True)]
    long = [RATIONALE_TOKENS] * len(questions)
    why = _Stage(engine, loaded, questions, talks, long, plain, None, "rationales", progress).run(out)
    talks = [
        _on(talk, reason.text, REVISE.format(question=question.text))
        for talk, reason, question in zip(talks, why, questions, strict=True)
    ]
    last = _Stage(engine, loaded, questions, talks, caps, how, usual, "answers", progress).run(out)
    _first(lambda: _finish(out, questions, last, (first, why), model))
    return out / PREDICTIONS


def _on(talk: Conversation, answer: str, prompt: str) -> Conversation:
    """The conversation with its answer, and a further question."""
    # What the model wrote is words, never a picture's marker.
    said = answer.replace(IMAGE, "").strip()
    return dataclasses.replace(talk, turns=(*talk.turns, Turn("assistant", said), Turn("user", prompt)))


def _record(
    benchmark: Benchmark,
    loaded: BenchmarkData,
    questions: Sequence[Question],
    engine: Engine,
    ask: PredictOptions,
    model: str,
    base_checksums: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run's answers depend on."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((str(question.id), question.image, question.text, question.before)).encode())
    encoder, processor = engine.encoder, engine.processor
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "content": digest.hexdigest()[:16],
        "protocol": dict(loaded.protocol),
        "model": model,
        "identity": dict(base_checksums),
        "dtype": engine.dtype,
        "template": encoder.template.name,
        "tokens": encoder.tokenization,
        "aspect": processor.image_aspect_ratio,
        "decoding": {k: v for k, v in dataclasses.asdict(ask.decoding).items() if k != "track"},
        "new_tokens": min(ask.decoding.max_new_tokens, benchmark.max_new_tokens),
        "reflect": ask.reflect,
    }


def _first(do: Callable[[], None]) -> None:
    """What the first process does for all. Where it fails, all end: none must wait for one that has left.

    Raises:
        UserError: what `do` raised; in the other processes, that it did.
    """
    error = None
    if jax.process_index() == 0:
        try:
            do()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None, np.int32))
        if failed and error is None:
            raise UserError("the first process could not go on; it says why")
    if error is not None:
        raise error


def _begin(out: Path, record: Mapping[str, Any]) -> None:
    """Marks the folder as this run's.

    Raises:
        UserError: it is another's.
    """
    path = out / RUN
    wanted = json.loads(json.dumps(record))
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            if "benchmark" not in found and "recipe" in found:
                raise UserError(f"{out}: is the folder of another command's run; choose another")
            differs = [key for key in wanted if found.get(key) != wanted[key]]
            if differs:
                raise UserError(
                    f"{out}: holds answers of another run ({', '.join(differs)} differ); choose another folder, or delete it"
                )
            return
        if (out / PREDICTIONS).exists():
            raise UserError(
                f"{out}: holds a {PREDICTIONS} that no run here wrote; choose another folder, or move it away"
            )
        for stage in STAGES:
            (out / f".{stage}.jsonl").unlink(missing_ok=True)  # whose they are, nothing says
        write_json(path, record)
    except UserError:  # which is a ValueError
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: is broken; delete it and the answers beside it") from None


class _Stage:
    """One answer to each of some questions, in a file of its own, which stays: a further run finds all of them there."""

    def __init__(
        self,
        engine: Engine,
        loaded: BenchmarkData,
        questions: Sequence[Question],
        talks: Sequence[Conversation],
        caps: Sequence[int],
        how: Decoding,
        usual: int | None,
        name: str,
        progress: Callable[[str, int, int], None],
    ):
        self.engine, self.loaded, self.questions, self.talks, self.caps = engine, loaded, questions, talks, caps
        self.how, self.usual, self.name, self.progress = how, usual, name, progress

    def run(self, out: Path) -> list[Answer]:
        """Answers in the questions' order, from the file and from the model."""
        path = out / f".{self.name}.jsonl"
        work = [
            (self.prepared(cap), dataclasses.replace(self.how, max_new_tokens=cap)) for cap in sorted(set(self.caps))
        ]
        answers: list[Answer | None] = [None] * len(self.questions)
        done = 0
        with _Lines(path) as lines:
            skip = lines.resume([numbers for prepared, _ in work for numbers in prepared.numbers()])
            for number, answer in lines.found:
                answers[number], done = answer, done + 1
            self.progress(self.name, done, len(answers))
            for prepared, how in work:
                batches = sum(group.batches for group in prepared.groups)
                here, skip = min(skip, batches), max(0, skip - batches)
                for found in self.engine.stream(prepared, how, usual=self.usual, skip=here):
                    lines.add(found)
                    for number, answer in found.items():
                        answers[number] = answer
                    done += len(found)
                    self.progress(self.name, done, len(answers))
        return [answer for answer in answers if answer is not None]

    def prepared(self, cap: int) -> Any:
        how = dataclasses.replace(self.how, max_new_tokens=cap)
        return self.engine.prepare(self.pictures(cap), how, usual=self.usual)

    def pictures(self, cap: int) -> list[ImageQuestions]:
        """Questions by what they show, in the order in which each picture comes first."""
        by_image: dict[str, list[int]] = {}
        unseen: list[int] = []
        for number, question in enumerate(self.questions):
            if self.caps[number] == cap:
                (unseen if question.image is None else by_image.setdefault(question.image, [])).append(number)

        def asked(numbers: Sequence[int]) -> list[tuple[int, Conversation]]:
            return [(number, self.talks[number]) for number in numbers]

        found = [ImageQuestions(name, _Reader(self.loaded, name), asked(numbers)) for name, numbers in by_image.items()]
        for start in range(0, len(unseen), _TOGETHER):
            part = unseen[start : start + _TOGETHER]
            found.append(ImageQuestions(f"question {self.questions[part[0]].id}", b"", asked(part)))
        return found


class _Reader:
    """Reads a picture when its turn comes: a hundred thousand of them are never in memory."""

    def __init__(self, loaded: BenchmarkData, name: str):
        self.loaded, self.name = loaded, name

    def __call__(self) -> bytes:
        return self.loaded.read_image(self.name)


class _Lines:
    """The answers so far, a line each, in the order of the batches. The first process's file; the others write none."""

    def __init__(self, path: Path):
        self.path = path
        self.found: list[tuple[int, Answer]] = []
        self._file: Any = None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk left in the buffer, tried once more
                self._file.close()

    def resume(self, batches: Sequence[list[int]]) -> int:
        """Cuts the file behind the last whole batch.

        Returns:
            How many batches are in it.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        rows, at, whole = list(_readable(lines)), 0, 0
        for numbers in batches:
            part = rows[at : at + len(numbers)]
            if [row["number"] for row in part] != list(numbers):
                break
            self.found += [(row["number"], Answer(row["text"], tuple(row["tracked"]))) for row in part]
            at, whole = at + len(numbers), whole + 1
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.asarray(whole, np.int32))
            if np.ptp(counts):
                raise UserError(f"{self.path}: processes see different answers; the folder must be shared by all hosts")
        _first(lambda: self._open(sum(len(line) + 1 for line in lines[:at])))
        return whole

    def _open(self, kept: int) -> None:
        try:
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
            self._file.truncate(kept)
            self._file.seek(kept)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); run again to go on") from None

    def add(self, found: Mapping[int, Answer]) -> None:
        """Writes a batch's answers."""
        _first(lambda: self._write(found))

    def _write(self, found: Mapping[int, Answer]) -> None:
        rows = [{"number": number, "text": a.text, "tracked": list(a.tracked)} for number, a in found.items()]
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); run again to go on") from None


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Rows up to the first that is none: what a kill left."""
    for line in lines:
        try:
            row = json.loads(line)
            yield {"number": int(row["number"]), "text": str(row["text"]), "tracked": list(row["tracked"])}
        except (ValueError, KeyError, TypeError):
            return


def _finish(
    out: Path,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    reflected: tuple[Sequence[Answer], Sequence[Answer]] | None,
    model: str,
) -> None:
    """The whole file, in one move."""
    with atomic_path(out / PREDICTIONS) as part, part.open("w", encoding="utf-8") as file:
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
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
            if reflected is not None:
                first, why = reflected
                row |= {"first_text": first[number].text, "rationale": why[number].text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
