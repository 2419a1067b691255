"""lmms-eval's samples (`--log_samples`) as answer rows: `*_samples_<task>.jsonl`, or `<task>.json` of its first versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, Row

_ANSWERS = ("resps", "filtered_resps")
"""Keys of the answer as the model gave it, which newer versions omit if a filter changed nothing, and as filtered."""
_IDS = ("question_id", "questionId", "index", "id", "image_id")
_DETAILS = ("category", "subcategory", "set_id", "figure_id", "visual_input", "image_source")
"""Fields of a document that tell its question, as far as benchmarks here have them."""
_POSITION = "doc_id"


def rows_in(content: Any) -> list[Any] | None:
    """Return the samples in the JSON of lmms-eval's first versions, `{"args", "logs": [sample, …], …}`; None for others."""
    logs = content.get("logs") if isinstance(content, Mapping) else None
    return logs if isinstance(logs, list) and logs and all(map(is_sample, logs)) else None


def is_sample(row: Any) -> bool:
    """Return whether a row is a sample of lmms-eval's."""
    return isinstance(row, Mapping) and _POSITION in row and any(key in row for key in _ANSWERS)


def read_sample(row: Row) -> Row:
    """Return a sample as an answer row, with what its document or its metrics say of the question.

    Raises:
        ValueError: It has no generated text, or several.
    """
    document = row["doc"] if isinstance(row.get("doc"), Mapping) else {}
    # Without documents, as newer versions write them, metrics name the question where they need it.
    metrics = [value for value in row.values() if isinstance(value, Mapping)]
    facts = {
        key: source[key] for source in (*metrics, document) for key in (*_IDS, *_DETAILS) if source.get(key) is not None
    }
    prompt = next((text for text in _texts(row.get("input"), row.get("arguments"))), document.get("question"))
    told = {"prompt": prompt} if isinstance(prompt, str) else {}
    return {**facts, **told, _POSITION: row[_POSITION], "text": _answer(row)}


def _texts(*values: Any) -> Iterator[str]:
    """Yield the prompt: it is a text, or the first item of (nested) arguments."""
    for value in values:
        while isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[0]
        if isinstance(value, str):
            yield value


def _answer(row: Row) -> str:
    given = next(row[key] for key in _ANSWERS if row.get(key) is not None)
    while isinstance(given, list) and len(given) == 1:
        given = given[0]
    if isinstance(given, str):
        return given
    what = f"{len(given)} answers" if isinstance(given, list) and given else "no generated text"
    raise ValueError(f"sample {row[_POSITION]} of lmms-eval has {what} in {' or '.join(_ANSWERS)}; one is needed")


def join_by_position(
    rows: Sequence[tuple[str, Any]], path: Path, benchmark: Benchmark, loaded: BenchmarkData
) -> Sequence[tuple[str, Any]]:
    """Return samples without ids, with the ids of the questions at their positions, if all prompts agree.

    Its datasets are in the order of the official files, all questions or those with an image.

    Raises:
        BenchmarkError: The prompts are not those of the questions, in this order.
    """
    nameless = [row for _, row in rows if isinstance(row, Mapping) and row.keys().isdisjoint(_IDS)]
    if not nameless or len(nameless) < len(rows) or not all(isinstance(row.get(_POSITION), int) for row in nameless):
        return rows
    for questions in (loaded.questions, [question for question in loaded.questions if question.image is not None]):
        if all(
            0 <= row[_POSITION] < len(questions)
            and "prompt" in row
            and benchmark.same_prompt(row["prompt"], questions[row[_POSITION]])
            for row in nameless
        ):
            return [(where, {**row, "question_id": questions[row[_POSITION]].id}) for where, row in rows]
    raise BenchmarkError(
        f"{path}: lmms-eval samples without question ids, whose prompts differ from those of {benchmark.name} in its "
        "order; add each question's id to its row, as question_id"
    )
