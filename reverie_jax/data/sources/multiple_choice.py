"""Multiple choice with a human's rationale: ScienceQA and A-OKVQA.

Each becomes a positive conversation. Why a wrong option is wrong, nobody has written down there: `questions` hands the wrong
options to the annotation pipeline, as REVERIE's authors did.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from reverie_jax.data.conversation import IMAGE, Turn
from reverie_jax.data.reflection import WHY
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources.common import BadRow, Example, ReadLog, content_name, conversation, each, embedded, shown

LETTERS = "ABCDEFGHIJ"
SUFFIX = "Answer with the option's letter from the given choices directly."


class Choice(NamedTuple):
    """A question with options.

    Attributes:
        image: the picture's name; empty where there is none.
        rationales: why the answer is right; none, one or several.
    """

    image: str
    encoded: bytes
    question: str
    options: tuple[str, ...]
    answer: int
    rationales: tuple[str, ...]
    where: str

    def asked(self) -> str:
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{self.question}\n{options}\n{SUFFIX}"


def is_one(row: dict[str, Any]) -> str:
    """`scienceqa`, `aokvqa`, or nothing."""
    if "choices" not in row:
        return ""
    return "aokvqa" if {"correct_choice_idx", "rationales"} & row.keys() else "scienceqa" if "answer" in row else ""


def _read(
    rows: Rows,
    log: ReadLog,
    splits: Sequence[str],
    make: Callable[[Choice], Iterable[Example]],
) -> Iterator[Example]:
    """What `make` finds in the rows' questions.

    Args:
        splits: rows that say that they belong to another split are left out, and counted in `reading.notes`.
    """
    left = collections.Counter[str]()

    def one(row: dict[str, Any], where: str) -> Iterable[Example]:
        split = row.get("split")
        if split is not None and split not in splits:
            left[str(split)] += 1
            return []
        return make((_aokvqa if is_one(row) == "aokvqa" else _scienceqa)(row, where))

    yield from each(rows, log, _KNOWN, one)
    for split, count in left.items():
        log.notes.append(f"{rows.path}: {count} rows of the split {split!r} are left out")


def talks(rows: Rows, log: ReadLog, *, dataset: str, splits: Sequence[str]) -> Iterator[Example]:
    """A conversation for each rationale; a question without one is asked and answered."""

    def make(found: Choice) -> Iterator[Example]:
        if not found.image and IMAGE in found.asked():
            raise BadRow(f"{IMAGE} in a row without a picture")
        said = [shown(found.asked()) if found.image else Turn("user", found.asked())]
        said.append(Turn("assistant", LETTERS[found.answer]))
        for why in found.rationales or ("",):
            more = [Turn("user", WHY), Turn("assistant", why)] if why else []
            talk = conversation([*said, *more], dataset=dataset, kind="positive" if why else "")
            yield Example(found.image, talk, found.where, found.encoded)

    return _read(rows, log, splits, make)


def questions(rows: Rows, log: ReadLog, *, splits: Sequence[str], most: int) -> list[dict[str, str]]:
    """Rows as REVERIE's first stage writes them, one a wrong option, with the human's rationale where there is one.

    Args:
        most: wrong options of a question, in the order in which they stand.
    """
    made: list[dict[str, str]] = []

    def make(found: Choice) -> list[Example]:
        if not found.image or found.encoded:
            raise BadRow("has no picture file of its own to ask about")
        for number in [n for n in range(len(found.options)) if n != found.answer][:most]:
            row = {
                "image": found.image,
                "question": found.asked(),
                "correct_answer": f"{LETTERS[found.answer]}. {found.options[found.answer]}",
                "confusing_answer": f"{LETTERS[number]}. {found.options[number]}",
                "question_type": "choice",
            }
            made.append(row | ({"correct_rationale": found.rationales[0]} if found.rationales else {}))
        return []

    for _ in _read(rows, log, splits, make):
        pass
    return made


def _options(row: dict[str, Any], answer: Any) -> tuple[tuple[str, ...], int]:
    options = row.get("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise BadRow(f"'choices' must be a list of 2 to {len(LETTERS)} options")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise BadRow("an option is empty or no text")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise BadRow(f"the answer {answer!r} is none of {len(options)} options")
    return tuple(option.strip() for option in options), answer


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = default if row.get(key) is None else row[key]
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise BadRow(f"needs {key!r}, a text")
    return value.strip()


def _scienceqa(row: dict[str, Any], where: str) -> Choice:
    """Of `problems.json` (an object by id; the picture is `<split>/<id>/image.png`) or of the Parquet file."""
    options, answer = _options(row, row.get("answer"))
    image, encoded = _picture(row)
    if image and not encoded and "pid" in row and "/" not in image:
        image = f"{row.get('split', 'train')}/{row['pid']}/{image}"
    hint, question, why = _text(row, "hint", ""), _text(row, "question"), _text(row, "solution", "")
    asked = f"Context: {hint}\n{question}" if hint else question
    return Choice(image, encoded, asked, options, answer, (why,) if why else (), where)


def _aokvqa(row: dict[str, Any], where: str) -> Choice:
    """Of the published JSON (the picture is COCO's, by number) or of the Parquet file."""
    options, answer = _options(row, row.get("correct_choice_idx"))
    image, encoded = _picture(row)
    if not image:
        if isinstance(row.get("image_id"), bool) or not isinstance(row.get("image_id"), int):
            raise BadRow("needs 'image_id', COCO's number")
        image = f"{row['image_id']:012d}.jpg"
    said = row.get("rationales") or []
    if not isinstance(said, list) or not all(isinstance(why, str) for why in said):
        raise BadRow("'rationales' must be a list of texts")
    rationales = tuple(dict.fromkeys(why.strip() for why in said if why.strip()))
    return Choice(image, encoded, _text(row, "question"), options, answer, rationales, where)


def _picture(row: dict[str, Any]) -> tuple[str, bytes]:
    """One within the file is called by its content: the file calls them all alike."""
    image, encoded = embedded(row.get("image"), None)
    within = content_name(encoded)[:12]
    return (f"{within}/{image}" if encoded and image != content_name(encoded) else image), encoded


_KNOWN = {
    *("question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category", "skill"),
    *("lecture", "solution", "split", "image_id", "question_id", "correct_choice_idx", "direct_answers"),
    *("difficult_direct_answer", "rationales"),
}
