"""Raw replies to what was asked for. Models write around JSON, spell keys freely, and answer yes or no at length."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any, Literal

import pydantic

from reverie_jax.annotate.schemas import Instruction
from reverie_jax.data.reflection import AnnotatedQuestion, QuestionType, classify_question
from reverie_jax.hosted.interface import Refused

_FENCE = re.compile(r"```[a-zA-Z]*\s*(.*?)```", re.DOTALL)
_KEYS = {
    "question": "question",
    "type": "type",
    "question_type": "type",
    "correct_answer": "correct_answer",
    "right_answer": "correct_answer",
    "answer": "correct_answer",
    "confusing_answer": "confusing_answers",
    "confusing_answers": "confusing_answers",
    "wrong_answer": "confusing_answers",
    "wrong_answers": "confusing_answers",
    "incorrect_answer": "confusing_answers",
    "incorrect_answers": "confusing_answers",
    "misleading_answer": "confusing_answers",
    "misleading_answers": "confusing_answers",
}
_TYPES: dict[str, QuestionType] = {
    "yes/no": "yes/no",
    "yes-no": "yes/no",
    "yes_no": "yes/no",
    "boolean": "yes/no",
    "choice": "choice",
    "multiple-choice": "choice",
    "multiple choice": "choice",
    "multiple_choice": "choice",
    "short": "short",
    "short-answer": "short",
    "short answer": "short",
    "short_answer": "short",
    "open": "open",
    "open-ended": "open",
    "open ended": "open",
    "open_ended": "open",
}


def _literal(text: str) -> Any:
    """JSON, or a Python literal; raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a backslash that escapes nothing
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("neither JSON nor a Python literal") from None


def _object(text: str) -> Any:
    """The object, or the list with objects in it, that a text is; None where it is neither."""
    try:
        found = _literal(text.strip())
    except ValueError:
        return None
    if isinstance(found, list):
        return found if any(isinstance(one, dict) for one in found) else None
    return found if isinstance(found, dict) else None


def data(text: str) -> Any:
    """The object or list that a reply holds: bare, in a fence, or with words around it.

    Raises:
        Refused: there is none.
    """
    text = text.strip().lstrip("\ufeff")
    fenced = [found for found in map(_object, _FENCE.findall(text)) if found is not None]
    if len(fenced) > 1:  # each in a fence of its own
        return [one for found in fenced for one in (found if isinstance(found, list) else [found])]
    candidates = [text]
    for first, last in ("[]", "{}"):
        if first in text and last in text:
            candidates.append(text[text.index(first) : text.rindex(last) + 1])
    for found in [*fenced, *map(_object, candidates)]:
        if found is not None:
            return found
    raise Refused("neither JSON nor a Python literal, or cut off")


_ESCAPES = {"\f": "\\f", "\b": "\\b", "\t": "\\t", "\r": "\\r", "\n": "\\n"}
_LATEX = re.compile(
    r"\f(?=(?:rac|orall)\b)|\x08(?=(?:eta|ar|egin|oxed|inom)\b)|\t(?=(?:imes|ext|heta|au|an|riangle)\b)"
    r"|\r(?=(?:ho|ight|ightarrow)\b)|\n(?=(?:eq|abla|otin)\b)"
)
"""What JSON makes of LaTeX's commands where a model does not double the backslash."""


def _words(value: Any) -> str:
    """An answer as text: yes/no answers come as booleans, counts as numbers."""
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if not isinstance(value, str | int | float):
        return ""
    return clean(_LATEX.sub(lambda found: _ESCAPES[found[0]], str(value)))


def clean(text: str) -> str:
    """Words that can be stored and taught: half characters and the marker of a picture have no place in them."""
    return text.encode("utf-8", "ignore").decode("utf-8").replace("<image>", "image").strip()


def _groups(found: Any) -> list[dict[str, Any]]:
    """Question by question, keys brought to ours: {question1, correct answer1, …} counts as {question, correct_answer}."""
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1:
            found = lists[0]
        elif found and all(isinstance(value, dict) for value in found.values()):
            found = list(found.values())
        else:
            found = [found]
    groups: list[dict[str, Any]] = []
    for one in found:
        if not isinstance(one, dict):
            continue
        numbered: dict[str, dict[str, Any]] = {}
        for key, value in one.items():
            name, number = re.fullmatch(r"(.*?)[\s_-]*(\d*)", str(key).strip().lower(), re.DOTALL).groups()  # type: ignore[union-attr]
            name = _KEYS.get(re.sub(r"[\s-]+", "_", name), "")
            if name == "confusing_answers":
                found_here = value if isinstance(value, list | tuple) else [value]
                numbered.setdefault(number, {}).setdefault(name, []).extend(found_here)
            elif name:
                numbered.setdefault(number, {})[name] = value
        if sum("question" in group for group in numbered.values()) == 1:
            # One question, whatever the numbers: confusing_answer1 and confusing_answer2 are two answers to it.
            whole: dict[str, Any] = {"confusing_answers": []}
            for group in numbered.values():
                whole["confusing_answers"] += group.pop("confusing_answers", [])
                whole |= group
            numbered = {"": whole}
        groups += numbered.values()
    return groups


def questions(text: str, *, confusing: int = 1) -> list[AnnotatedQuestion]:
    """The usable questions of a reply; each has its right answer and at least one wrong one that differs from it.

    Args:
        confusing: more wrong answers than these are left off.

    Raises:
        Refused: not one question can be used; the reason says what the first lacks.
    """
    kept: dict[str, AnnotatedQuestion] = {}
    problem = "no question in it"
    for group in _groups(data(text)):
        asked, right = _words(group.get("question")), _words(group.get("correct_answer"))
        wrong = [answer for answer in map(_words, group.get("confusing_answers", [])) if answer]
        wrong = [answer for answer in dict.fromkeys(wrong) if answer.lower().strip(" .") != right.lower().strip(" .")]
        if not (asked and right and wrong):
            missing = [
                name for name, there in (("question", asked), ("correct answer", right), ("wrong answer", wrong))
            ]
            empty = next(n for n, v in zip(missing, (asked, right, wrong), strict=True) if not v)
            problem = f"a question without {empty}"
            continue
        said = _TYPES.get(_words(group.get("type")).lower())
        try:
            made = AnnotatedQuestion(
                question=asked,
                type=said or classify_question(asked, right),
                correct_answer=right,
                confusing_answers=wrong[:confusing],
            )
        except pydantic.ValidationError as error:
            problem = error.errors()[0]["msg"]
            continue
        kept.setdefault(asked, made)
    if not kept:
        raise Refused(problem)
    return list(kept.values())


def rationale(text: str) -> str:
    """A rationale, trimmed.

    Raises:
        Refused: it is empty.
    """
    if not (found := clean(text)):
        raise Refused("an empty reply")
    return found


_VERDICT = re.compile(r"[\W_]*(?:(?:answer|verdict|judgement|judgment)[\W_]+)?(yes|no)(?![^\W_])", re.IGNORECASE)
_AFTER_NO = re.compile(
    r"[*_\"')\]]*\s*($|[.,;:!?(\n]|[-\u2013\u2014]\W|"
    r"(contradictions?|conflicts?|inconsistenc|they|the|these|those|there|both|it|because|neither|not)\b)",
    re.IGNORECASE,
)
"""What may follow a No that is an answer, and not the beginning of `no one` or `no idea`."""


def verdict(text: str) -> Literal["yes", "no"]:
    """Whether the two rationales contradict each other: `no` keeps, `yes` drops. Whole words only, and first.

    Raises:
        Refused: it says neither, or both.
    """
    found = _VERDICT.match(text)
    if found is None:
        raise Refused("neither yes nor no")
    said = found[1].lower()
    other = "no" if said == "yes" else "yes"
    # Behind a full stop a reason may have the other word in it, and only a sentence that begins with it takes it back.
    ended = re.match(r"[*_\"')\]]*(\s*[.!]|[ \t]*\n)", text[found.end() :])
    again = rf"(?:[.!?:;\n]|\bwait\b|\bactually\b)[\W_]*{other}\b" if ended else rf"\b{other}\b"
    if re.search(again, text[found.end() :], re.IGNORECASE):
        raise Refused("both yes and no")
    if said == "no" and _AFTER_NO.match(text[found.end() :]) is None:
        raise Refused("neither yes nor no")
    return "yes" if said == "yes" else "no"


def instructions(text: str, *, task: str | None = None) -> list[Instruction]:
    """The usable instructions of a reply, in LRV's sense.

    Args:
        task: of all of them; each says its own by default.

    Raises:
        Refused: not one can be used.
    """
    found = data(text)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else [found]
    kept: dict[str, Instruction] = {}
    for one in found:
        if not isinstance(one, dict):
            continue
        keys = {re.sub(r"[\s_-]*\d*$", "", str(key).strip().lower()): _words(value) for key, value in one.items()}
        said = keys.get("instruction") or keys.get("question") or ""
        answer = keys.get("answer") or keys.get("reason") or ""
        if said and answer:
            kept.setdefault(
                said, Instruction(instruction=said, answer=answer, task=keys.get("task", "") if task is None else task)
            )
    if not kept:
        raise Refused("no instruction with an answer in it")
    return list(kept.values())
