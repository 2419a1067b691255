"""Answer files: ours, LLaVA's, or the benchmark's own form, joined with the questions by id."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax import files
from reverie_jax.data.sources.common import answer_text
from reverie_jax.eval.benchmarks import lmms_eval_files
from reverie_jax.eval.benchmarks.inputs import parse_rows, read_json, read_table
from reverie_jax.eval.benchmarks.interface import (
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    Question,
    Row,
    Texts,
    holds_question,
    normalize_prompt,
)
from reverie_jax.hosted.thoughts import split_thoughts

PREDICTIONS, RUN, SCORES = "predictions.jsonl", "run.json", "scores.json"
"""Files that `reverie eval` writes into a folder."""

_IDS = ("question_id", "questionId", "index", "id", "image_id", "round_id")
"""Columns of ids; pandas writes 7 as 7.0 where another row has none."""


@dataclasses.dataclass(frozen=True)
class AnswerFile:
    """The answers of a file.

    Attributes:
        texts: by `str(question.id)`.
        rows: rows of the file, by `str(question.id)`.
        notes: for the user: what was accepted although it looks odd.
    """

    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def read_answers(path: Path, benchmark: Benchmark, loaded: BenchmarkData, *, partial: bool = False) -> dict[str, str]:
    """Return answers by `str(question.id)`; see `read_answer_file`."""
    return read_answer_file(path, benchmark, loaded, partial=partial).texts


def read_answer_file(path: Path, benchmark: Benchmark, loaded: BenchmarkData, *, partial: bool = False) -> AnswerFile:
    """Return the answers of a file. Rows are joined by id; by position only in forms without ids, checked by their texts.

    Args:
        path: of the answer file, or a folder of them.
        benchmark: whose forms of rows are read.
        loaded: the questions.
        partial: allows questions without an answer; they count as the rule defines.

    Raises:
        BenchmarkError: The file cannot be read; an id is a duplicate, unknown or (unless `partial`) missing; ids do not tell
            which questions are answered, and prompts contradict.
    """
    joined = _Join(path, benchmark, loaded)
    plain = [_with_plain_ids(_as_row(row)) for row in _read_rows(path, benchmark)]
    rows, part = benchmark.settle_rows(lmms_eval_files.join_by_position(plain, path, benchmark, loaded), path, loaded)
    for where, row in _without_labels(rows):
        joined.add(where, row)
    joined.check_answers()
    joined.check_prompts()
    joined.check_missing(part, partial=partial)
    return joined.found


def for_rule(benchmark: Benchmark, answers: Texts, rule: str) -> Texts:
    """Return the answers as a rule gets them: without a model's thoughts where the rule's own harness takes them out."""
    if rule not in benchmark.thoughtless_rules:
        return answers
    return {id: split_thoughts(text)[1] for id, text in answers.items()}


def count_thoughts(answers: Texts) -> int:
    """Return the number of answers that hold a model's thoughts."""
    return sum(bool(split_thoughts(text)[0]) for text in answers.values())


def thoughts_note(path: Path, benchmark: Benchmark, answers: Texts, rule: str) -> list[str]:
    """Return a note for the user if a rule takes thoughts for words."""
    count = count_thoughts(answers)
    if not count or rule in benchmark.thoughtless_rules:
        return []
    rules = " or ".join(name for name in benchmark.rules if name in benchmark.thoughtless_rules)
    return [
        f"{path}: {count} answers hold a model's thoughts (<think>...</think>), which {rule} takes for words; "
        + (f"score with --rule {rules}, which takes them out, or " if rules else "")
        + "take them out of the file"
    ]


Located = tuple[str, Any]
"""A row, and its file and place for messages."""


class _Join:
    """Joins rows with questions."""

    def __init__(self, path: Path, benchmark: Benchmark, loaded: BenchmarkData):
        self.path, self.benchmark, self.loaded = path, benchmark, loaded
        self.questions: dict[str, list[Question]] = {}
        for question in loaded.questions:
            self.questions.setdefault(str(question.id), []).append(question)
        self.by_number: dict[int, list[str]] = {}
        for id in self.questions:
            if id.isdecimal():
                self.by_number.setdefault(int(id), []).append(id)
        self.found = AnswerFile()
        self.times: Counter[str] = Counter()
        self.contradictions: list[str] = []

    def add(self, where: str, row: Any) -> None:
        """Add the answers of a row.

        Raises:
            BenchmarkError: The row is invalid, or its id is unknown or a duplicate.
        """
        try:
            if not isinstance(row, Mapping):
                raise TypeError("not an object")
            for part in self.benchmark.split_row(row):
                self._add(where, part)
        except BenchmarkError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BenchmarkError(f"{where}: invalid answer ({error!r})") from None

    def _add(self, where: str, row: Row) -> None:
        benchmark = self.benchmark
        key, text = benchmark.match_question(row, self.loaded), benchmark.answer_text(row)
        if key is None:
            raise BenchmarkError(f"{where}: no question_id (columns: {', '.join(map(str, row))})")
        if text is None:
            columns = ", ".join(map(str, row))
            label = ": answer is the label here" if row.get("answer") is not None else ""
            raise BenchmarkError(f"{where}: question {key} lacks a text or prediction{label} (columns: {columns})")
        given, text = text, answer_text(text)
        if text is None:
            raise BenchmarkError(f"{where}: the answer to question {key} is {given!r:.80}, neither a text nor a number")
        if key not in self.questions and key.isdecimal():  # zeros before a number that another writer adds or drops
            same = self.by_number.get(int(key), [])
            key = same[0] if len(same) == 1 else key
        if key not in self.questions:
            raise BenchmarkError(
                f"{self.path}: unknown question {key}; {benchmark.name} has {len(self.loaded.questions)} questions, the "
                f"first is {self.loaded.questions[0].id}: the answers belong to another version of the questions, or to "
                "another benchmark"
            )
        if self.times[key] >= len(self.questions[key]):
            key = next((other for other in benchmark.duplicates(key, row, self.loaded) if not self.times[other]), key)
        if self.times[key] >= len(self.questions[key]):
            raise BenchmarkError(f"{self.path}: duplicate answer to question {key}")
        self.times[key] += 1
        prompt, asked = row.get("prompt", row.get("question")), self.questions[key]
        told = isinstance(prompt, str) and prompt.strip()
        if told and not any(benchmark.same_prompt(str(prompt), question) for question in asked):
            self.contradictions.append(
                f"question {key} has prompt {str(prompt)[:200]!r} instead of {asked[0].text[:200]!r}"
            )
        self.found.texts[key], self.found.rows[key] = text, row

    def check_answers(self) -> None:
        """Check that the texts are answers: a question file has ids and texts, too.

        Raises:
            BenchmarkError: All texts are the questions themselves.
        """
        texts = self.found.texts
        if texts and all(self._is_question(text, self.questions[key]) for key, text in texts.items()):
            raise BenchmarkError(
                f"{self.path}: every text is the question itself: these are questions of {self.benchmark.name}, not "
                "answers; name the file of answers"
            )

    def _is_question(self, text: str, asked: Sequence[Question]) -> bool:
        words = normalize_prompt(text)
        return any(words == normalize_prompt(t) for q in asked for t in (q.text, self.benchmark.question_text(q)) if t)

    def check_prompts(self) -> None:
        """Note prompts that are not the questions of their ids.

        Raises:
            BenchmarkError: Ids do not tell the questions apart: other files of questions have the same.
        """
        if not self.contradictions:
            return
        first = self.contradictions[0]
        if not self.benchmark.unique_ids:
            raise BenchmarkError(
                f"{self.path}: {first}; the answers belong to another version of the questions, or to another benchmark; "
                "if the questions are the same in other words, leave the prompts out of the file"
            )
        self.found.notes.append(
            f"{self.path}: {len(self.contradictions)} of {len(self.found.texts)} answers have a prompt that is not their "
            f"question's, the first: {first}; they were joined by id"
        )

    def check_missing(self, part: str, *, partial: bool) -> None:
        """Check that all questions have an answer.

        Args:
            part: what the file is about by its form, the name of a part of the questions; "" for all of them.
            partial: note missing answers instead of raising.

        Raises:
            BenchmarkError: Answers are missing, unless `partial`.
        """
        answered, loaded = self.found.texts, self.loaded
        # Unavailable questions are expected all together or not at all.
        expected = loaded.questions if any(key in answered for key in loaded.unavailable) else loaded.available
        if part:
            expected = [question for question in expected if self.benchmark.part(question) == part]
            self.found.notes.append(f"{self.path}: answers to {part} alone; the other questions are left out")
        missing = [question for question in expected if str(question.id) not in answered]
        if not missing:
            return
        reason = (
            f"{self.path}: {len(missing)} of {len(expected)} questions have no answer, the first is {missing[0].id}; "
            + self._reason(expected, missing)
        )
        if not partial:
            raise BenchmarkError(f"{reason}; pass --partial to count them as the rule defines")
        self.found.notes.append(reason)

    def _reason(self, expected: Sequence[Question], missing: list[Question]) -> str:
        """Return the likely cause of missing answers."""
        absent = {str(question.id) for question in missing}
        parts: dict[str, set[bool]] = {}
        for question in expected:
            parts.setdefault(self.benchmark.part(question), set()).add(str(question.id) in absent)
        whole = [name for name, states in parts.items() if states == {True}]
        if whole and all(len(states) == 1 for states in parts.values()):
            given = ", ".join(sorted(set(parts) - set(whole)))
            return f"those of {', '.join(whole)} and no others: the file is about {given} alone"
        if all(str(question.id) in absent for question in expected[len(expected) - len(missing) :]):
            return f"the first {len(expected) - len(missing)} are answered: a run with --limit, or one that was stopped"
        return "the answers are incomplete, or belong to another version of the questions"


def _without_labels(rows: Sequence[Located]) -> Sequence[Located]:
    """Return the rows without `answer` if some have an answer by another name: then it is the label in all of them."""
    if not any(isinstance(row, Mapping) and not {"text", "prediction"}.isdisjoint(row) for _, row in rows):
        return rows
    return [
        (where, {name: value for name, value in row.items() if name != "answer"} if isinstance(row, Mapping) else row)
        for where, row in rows
    ]


def _as_row(located: Located) -> Located:
    """Return a sample of lmms-eval's as a row of ours; others as they are."""
    where, row = located
    try:
        return (where, lmms_eval_files.read_sample(row)) if lmms_eval_files.is_sample(row) else located
    except ValueError as error:
        raise BenchmarkError(f"{where}: {error}") from None


def _with_plain_ids(located: Located) -> Located:
    """Return the row with ids such as 7.0, "7.0" and " 7" as 7 and "7"."""
    where, row = located
    if not isinstance(row, Mapping):
        return located
    plain = dict(row)
    for name in _IDS:
        id = row.get(name)
        if isinstance(id, float) and id.is_integer():
            plain[name] = int(id)
        elif isinstance(id, str):
            plain[name] = id.strip().partition(".")[0] if re.fullmatch(r"\s*\d+\.0+\s*", id) else id.strip()
    return where, plain


def _read_rows(path: Path, benchmark: Benchmark) -> Iterator[Located]:
    """Yield the rows of an answer file of any form."""
    if path.is_dir() and (path / PREDICTIONS).is_file():
        path /= PREDICTIONS
    own = benchmark.own_rows(path)
    if own is not None:
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(own))
    elif path.is_dir():
        raise BenchmarkError(f"{path}: a folder without {PREDICTIONS}; name the answer file in it")
    elif path.suffix.lower() in (".xlsx", ".xls", ".csv", ".tsv"):
        yield from _table_rows(path)
    elif (texts := _read_text_mapping(path)) is not None:
        yield from ((f"{path}: row {id}", row) for id, row in texts)
    else:
        rows: list[Any] = parse_rows(path, "answer", lambda row: row)
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))


def _table_rows(path: Path) -> Iterator[Located]:
    """Yield the rows of a table that have an answer; an upload has the label as `answer` beside the prediction."""
    rows = read_table(path)
    names = ("text", "prediction") if rows and holds_question(rows[0]) else ("text", "prediction", "answer")
    column = next((name for name in names if rows and name in rows[0]), "")
    for number, row in enumerate(rows):
        cells = {
            name: cell for name, cell in row.items() if cell != "" and name not in ("text", "prediction", "answer")
        }
        if row.get(column) != "":
            yield f"{path}: row {number}", {**cells, **({"text": row[column]} if column else {})}


def _read_text_mapping(path: Path) -> list[tuple[object, Row]] | None:
    """Return (id, row) of a file that is one object: texts by id (MM-Vet) or a log of lmms-eval's; None for others."""
    try:
        if path.suffix.lower() == ".jsonl" or not _begins_with_brace(path):
            return None
        content = read_json(path)
    except (OSError, BenchmarkError):
        return None
    if (samples := lmms_eval_files.rows_in(content)) is not None:
        return list(enumerate(samples))
    plain = isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    if not plain or set(_IDS) & set(content):
        return None
    return [(id, {"question_id": id, "text": text}) for id, text in content.items()]


def _begins_with_brace(path: Path) -> bool:
    """Return whether the text of a file begins with an object, behind a byte order mark."""
    with path.open("rb") as file:
        return files.decode_text(file.read(64), errors="ignore")[:1] == "{"
