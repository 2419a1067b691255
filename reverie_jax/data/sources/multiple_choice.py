"""Multiple choice with human rationales: ScienceQA and A-OKVQA.

Each rationale becomes a positive conversation. The datasets do not explain their wrong options: `annotation_rows` prepares
these for the annotation pipeline, as REVERIE's authors did.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from reverie_jax.data.conversation import IMAGE, Turn
from reverie_jax.data.reflection import WHY
from reverie_jax.data.row_files import Rows, as_integer
from reverie_jax.data.sources.common import (
    Example,
    InvalidRow,
    ReadLog,
    answer_text,
    content_digest,
    image_conversation,
    image_question,
    parse_image,
    parse_rows,
)

LETTERS = "ABCDEFGHIJ"
SUFFIX = "Answer with the option's letter from the given choices directly."
_KNOWN = {
    *("question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category", "skill"),
    *("lecture", "solution", "split", "image_id", "question_id", "correct_choice_idx", "direct_answers"),
    *("difficult_direct_answer", "rationales"),
}


class ChoiceQuestion(NamedTuple):
    """A multiple-choice question.

    Attributes:
        image: name of the image; empty if there is none.
        encoded: the image itself, if the file contains it.
        question: the question, after its context.
        options: texts of the options.
        answer: index of the right option.
        rationales: why the answer is right; none, one or several.
        dataset: `scienceqa` or `aokvqa`.
        where: file and row, for errors.
    """

    image: str
    encoded: bytes
    question: str
    options: tuple[str, ...]
    answer: int
    rationales: tuple[str, ...]
    where: str
    dataset: str

    def prompt(self) -> str:
        """Return the question with lettered options and LLaVA's instruction to answer with a letter."""
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{self.question}\n{options}\n{SUFFIX}"


def detect_dataset(row: dict[str, Any]) -> Literal["scienceqa", "aokvqa"] | None:
    """Return the dataset of a row, or None."""
    if "choices" not in row:
        return None
    return "aokvqa" if {"correct_choice_idx", "rationales"} & row.keys() else "scienceqa" if "answer" in row else None


def _parse_questions(
    rows: Rows, log: ReadLog, splits: Sequence[str], parse: Callable[[ChoiceQuestion], Iterable[Example]]
) -> Iterator[Example]:
    """Yield the examples that `parse` returns for each question. Rows of other splits are skipped, and counted in a note."""
    skipped = collections.Counter[str]()

    def parse_row(row: dict[str, Any], where: str) -> Iterable[Example]:
        split = row.get("split")
        if split is not None and split not in splits:
            skipped[str(split)] += 1
            return []
        return parse((_aokvqa if detect_dataset(row) == "aokvqa" else _scienceqa)(row, where))

    yield from parse_rows(rows, log, _KNOWN, parse_row)
    for split, count in skipped.items():
        log.notes.append(f"{rows.path}: skipped {count} rows of the split {split!r}")


def read_examples(rows: Rows, log: ReadLog, *, splits: Sequence[str]) -> Iterator[Example]:
    """Yield a conversation for each rationale; a question without one is asked and answered.

    Args:
        rows: The file.
        log: Gets problems and notes.
        splits: Splits to read, of rows that name theirs.
    """

    def parse(question: ChoiceQuestion) -> Iterator[Example]:
        prompt = question.prompt()
        if not question.image and IMAGE in prompt:
            raise InvalidRow(f"{IMAGE} in a row without an image")
        turns = [image_question(prompt) if question.image else Turn("user", prompt)]
        turns.append(Turn("assistant", LETTERS[question.answer]))
        for rationale in question.rationales or ("",):
            explained = [Turn("user", WHY), Turn("assistant", rationale)] if rationale else []
            kind = "positive" if rationale else ""
            conversation = image_conversation([*turns, *explained], dataset=question.dataset, kind=kind)
            yield Example(question.image, conversation, question.where, question.encoded)

    return _parse_questions(rows, log, splits, parse)


def annotation_rows(rows: Rows, log: ReadLog, *, splits: Sequence[str], max_wrong: int) -> list[dict[str, str]]:
    """Return rows as REVERIE's first stage writes them, one for each wrong option, with the human rationale if there is one.

    Args:
        rows: The file.
        log: Gets problems and notes.
        splits: Splits to read, of rows that name theirs.
        max_wrong: Maximum number of wrong options of a question; the first ones are used.
    """
    result: list[dict[str, str]] = []

    def parse(question: ChoiceQuestion) -> list[Example]:
        if not question.image or question.encoded:
            raise InvalidRow("no image file of its own")
        for number in [n for n in range(len(question.options)) if n != question.answer][:max_wrong]:
            row = {
                "image": question.image,
                "question": question.prompt(),
                "correct_answer": f"{LETTERS[question.answer]}. {question.options[question.answer]}",
                "confusing_answer": f"{LETTERS[number]}. {question.options[number]}",
                "question_type": "choice",
            }
            result.append(row | ({"correct_rationale": question.rationales[0]} if question.rationales else {}))
        return []

    for _ in _parse_questions(rows, log, splits, parse):
        pass
    return result


def _options(row: dict[str, Any], answer: Any) -> tuple[tuple[str, ...], int]:
    options = row.get("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise InvalidRow(f"'choices' must be a list of 2 to {len(LETTERS)} options")
    texts = [(answer_text(option) or "").strip() for option in options]
    if not all(texts):
        raise InvalidRow("an option of 'choices' is empty, or neither a text nor a number")
    index = as_integer(answer)
    if index is None or not 0 <= index < len(options):
        raise InvalidRow(f"the answer {answer!r} must be the index of one of {len(options)} options")
    return tuple(texts), index


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = default if row.get(key) is None else row[key]
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise InvalidRow(f"{key!r} must be a text")
    return value.strip()


def _scienceqa(row: dict[str, Any], where: str) -> ChoiceQuestion:
    """Parse a row of `problems.json` (an object by id; the image is `<split>/<id>/image.png`) or of the Parquet file."""
    options, answer = _options(row, row.get("answer"))
    image, encoded = _image(row)
    if image and not encoded and "pid" in row and "/" not in image:
        image = f"{row.get('split', 'train')}/{row['pid']}/{image}"
    hint, question, solution = _text(row, "hint", ""), _text(row, "question"), _text(row, "solution", "")
    prompt = f"Context: {hint}\n{question}" if hint else question
    return ChoiceQuestion(image, encoded, prompt, options, answer, (solution,) if solution else (), where, "scienceqa")


def _aokvqa(row: dict[str, Any], where: str) -> ChoiceQuestion:
    """Parse a row of the published JSON (images are COCO's, by number) or of the Parquet file."""
    options, answer = _options(row, row.get("correct_choice_idx"))
    image, encoded = _image(row)
    if not image:
        number = as_integer(row.get("image_id"))
        if number is None or number < 0:
            raise InvalidRow("'image_id' must be a COCO image number")
        image = f"{number:012d}.jpg"
    texts = row.get("rationales") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRow("'rationales' must be a list of texts")
    rationales = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    return ChoiceQuestion(image, encoded, _text(row, "question"), options, answer, rationales, where, "aokvqa")


def _image(row: dict[str, Any]) -> tuple[str, bytes]:
    """Return the name and content of a row's image. The Parquet files name all images alike: the content is added."""
    image, encoded = parse_image(row.get("image"), None)
    digest = content_digest(encoded)
    return (f"{digest[:12]}/{image}" if encoded and image != digest else image), encoded
