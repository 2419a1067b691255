"""Answer files: ours, LLaVA's, or the benchmark's own form, joined with the questions by id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks.inputs import parse_rows, read_json
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError

PREDICTIONS, RUN, SCORES = "predictions.jsonl", "run.json", "scores.json"
"""Files that `reverie eval` writes into a folder."""

_VERSION = "the answers belong to another version of the questions"


def read_answers(path: Path, benchmark: Benchmark, loaded: BenchmarkData, *, partial: bool = False) -> dict[str, str]:
    """Return answers by `str(question.id)`. Rows are joined by id, never by position.

    Args:
        path: of the answer file.
        benchmark: whose forms of rows are read.
        loaded: the questions.
        partial: allows questions without an answer; they count as the rule defines.

    Raises:
        BenchmarkError: The file cannot be read; an id is a duplicate, unknown or (unless `partial`) missing; the prompt of a
            row is not the question of its id.
    """
    questions = {str(question.id): question for question in loaded.questions}
    answers: dict[str, str] = {}

    def add_row(row: Any) -> None:
        if not isinstance(row, Mapping):
            raise TypeError("not an object")
        for part in benchmark.split_row(row):
            add_answer(part)

    def add_answer(row: Mapping[str, Any]) -> None:
        key, text = benchmark.match_question(row, loaded), benchmark.answer_text(row)
        if key is None:
            raise KeyError("question_id")
        if not isinstance(text, str):
            raise TypeError(f"question {key}: text is {text!r}")
        if key not in questions:
            raise BenchmarkError(
                f"{path}: unknown question {key}; {benchmark.name} has {len(questions)} questions, so {_VERSION}"
            )
        if key in answers:
            key = next((other for other in benchmark.duplicates(key, row, loaded) if other not in answers), key)
        if key in answers:
            raise BenchmarkError(f"{path}: duplicate answer to question {key}")
        prompt, question = row.get("prompt"), questions[key]
        if isinstance(prompt, str) and not benchmark.same_prompt(prompt, question):
            raise BenchmarkError(
                f"{path}: question {key} has prompt {prompt!r} instead of {question.text!r}; {_VERSION}"
            )
        answers[key] = text

    texts = read_text_mapping(path)
    if texts is None:
        parse_rows(path, "answer", add_row)
    else:
        for id, text in texts.items():
            add_row({"question_id": id, "text": text})
    # Unavailable questions are expected all together or not at all.
    answered_all = any(key in answers for key in loaded.unavailable)
    expected = loaded.questions if answered_all else loaded.available
    missing = [str(question.id) for question in expected if str(question.id) not in answers]
    if missing and not partial:
        raise BenchmarkError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]}; "
            f"{_VERSION}, or pass --partial to count them as the rule defines"
        )
    return answers


def read_text_mapping(path: Path) -> dict[str, str] | None:
    """Return the content of a file that is one object of texts by id (MM-Vet's form); None for another file."""
    try:
        with path.open(encoding="utf-8") as file:
            if file.read(1) != "{" or path.suffix == ".jsonl":
                return None
        content = read_json(path)
    except (OSError, UnicodeDecodeError, BenchmarkError):
        return None
    plain = isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    return content if plain and "question_id" not in content else None
