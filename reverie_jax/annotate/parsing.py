"""Parse raw replies. Models write text around JSON, spell keys freely, and answer yes or no at length."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any, Literal

import pydantic

from reverie_jax.annotate.schemas import Instruction
from reverie_jax.data.reflection import AnnotatedQuestion, QuestionType, classify_question
from reverie_jax.files import well_formed
from reverie_jax.hosted.interface import UnusableError

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


def _parse_literal(text: str) -> Any:
    """Parse JSON or a Python literal; raise ValueError if the text is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # an invalid escape
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("neither JSON nor a Python literal") from None


def _parse_object(text: str) -> Any:
    """Parse a text that is an object or a list of objects; return None if it is neither."""
    try:
        value = _parse_literal(text.strip())
    except ValueError:
        return None
    if isinstance(value, list):
        return value if any(isinstance(item, dict) for item in value) else None
    return value if isinstance(value, dict) else None


def extract_json(text: str) -> Any:
    """Return the object or list in a reply: bare, in a fence, or with text around it.

    Raises:
        UnusableError: The reply has none.
    """
    text = text.strip().lstrip("\ufeff")
    fenced = [value for value in map(_parse_object, _FENCE.findall(text)) if value is not None]
    if len(fenced) > 1:  # one fence for each question
        return [item for value in fenced for item in (value if isinstance(value, list) else [value])]
    candidates = [text]
    for first, last in ("[]", "{}"):
        if first in text and last in text:
            candidates.append(text[text.index(first) : text.rindex(last) + 1])
    for value in [*fenced, *map(_parse_object, candidates)]:
        if value is not None:
            return value
    raise UnusableError("neither JSON nor a Python literal, or cut off")


_ESCAPES = {"\f": "\\f", "\b": "\\b", "\t": "\\t", "\r": "\\r", "\n": "\\n"}
_LATEX = re.compile(
    r"\f(?=(?:rac|orall)\b)|\x08(?=(?:eta|ar|egin|oxed|inom)\b)|\t(?=(?:imes|ext|heta|au|an|riangle)\b)"
    r"|\r(?=(?:ho|ight|ightarrow)\b)|\n(?=(?:eq|abla|otin)\b)"
)
"""Characters that JSON makes of LaTeX commands if a model does not double the backslash."""


def _to_text(value: Any) -> str:
    """Return an answer as text; models write yes/no answers as booleans, and counts as numbers."""
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if not isinstance(value, str | int | float):
        return ""
    return clean(_LATEX.sub(lambda match: _ESCAPES[match[0]], str(value)))


def clean(text: str) -> str:
    """Return a text without unpaired surrogates and image markers, which cannot be stored or trained on."""
    text = well_formed(text)
    return text.replace("<image>", "image").strip()


def _question_groups(value: Any) -> list[dict[str, Any]]:
    """Return one object for each question with our keys: {question1, correct answer1, ...} is read as one question."""
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) == 1:
            value = lists[0]
        elif value and all(isinstance(item, dict) for item in value.values()):
            value = list(value.values())
        else:
            value = [value]
    groups: list[dict[str, Any]] = []
    for row in value:
        if not isinstance(row, dict):
            continue
        numbered: dict[str, dict[str, Any]] = {}
        for key, answer in row.items():
            text = str(key).strip().lower()
            name = re.sub(r"[\s_-]*\d*$", "", text)
            number = re.sub(r"\D", "", text[len(name) :])
            name = _KEYS.get(re.sub(r"[\s-]+", "_", name), "")
            if name == "confusing_answers":
                answers = answer if isinstance(answer, list | tuple) else [answer]
                numbered.setdefault(number, {}).setdefault(name, []).extend(answers)
            elif name:
                numbered.setdefault(number, {})[name] = answer
        if sum("question" in group for group in numbered.values()) == 1:
            # One question: confusing_answer1 and confusing_answer2 are two answers to it.
            question: dict[str, Any] = {"confusing_answers": []}
            for group in numbered.values():
                question["confusing_answers"] += group.pop("confusing_answers", [])
                question |= group
            numbered = {"": question}
        groups += numbered.values()
    return groups


def parse_questions(text: str, *, max_confusing: int | None = None) -> list[AnnotatedQuestion]:
    """Return the usable questions of a reply; each has a right answer and at least one wrong answer that differs from it.

    Args:
        text: The raw reply.
        max_confusing: Most wrong answers for each question; all if None.

    Raises:
        UnusableError: No question can be used; the reason names what is missing.
    """
    kept: dict[str, AnnotatedQuestion] = {}
    problem = "the reply has no question"
    for group in _question_groups(extract_json(text)):
        question, right = _to_text(group.get("question")), _to_text(group.get("correct_answer"))
        wrong = [answer for answer in map(_to_text, group.get("confusing_answers", [])) if answer]
        wrong = [answer for answer in dict.fromkeys(wrong) if answer.lower().strip(" .") != right.lower().strip(" .")]
        parts = {"text": question, "a correct answer": right, "a wrong answer": wrong}
        if missing := [name for name, value in parts.items() if not value]:
            problem = f"a question without {missing[0]}"
            continue
        kind = _TYPES.get(_to_text(group.get("type")).lower())
        try:
            annotated = AnnotatedQuestion(
                question=question,
                type=kind or classify_question(question, right),
                correct_answer=right,
                confusing_answers=wrong[:max_confusing],
            )
        except pydantic.ValidationError as error:
            problem = error.errors()[0]["msg"]
            continue
        kept.setdefault(question, annotated)
    if not kept:
        raise UnusableError(problem)
    return list(kept.values())


_BOX = re.compile(
    r"\s*(?:<(?:answer|response)>|<\|begin_of_box\|>|```[a-z]*\s)"
    r"((?:(?!```).)*)(?:</(?:answer|response)>|<\|end_of_box\|>|```)\s*",
    re.DOTALL | re.IGNORECASE,
)
"""Marks that some models put around their answer, and a fence around all of it."""


def _unbox(text: str) -> str:
    box = _BOX.fullmatch(text)
    return box[1] if box else text


def parse_rationale(text: str) -> str:
    """Return a rationale without surrounding white space and marks.

    Raises:
        UnusableError: It is empty.
    """
    if not (rationale := clean(_unbox(text))):
        raise UnusableError("an empty reply")
    return rationale


_VERDICT = re.compile(r"[\W_]*(?:(?:answer|verdict|judgement|judgment)[\W_]+)?(yes|no)(?![^\W_])", re.IGNORECASE)
_AFTER_NO = re.compile(
    r"[*_\"')\]]*\s*($|[.,;:!?(\n]|[-\u2013\u2014]\W|"
    r"(contradictions?|conflicts?|inconsistenc|they|the|these|those|there|both|it|because|neither|not)\b)",
    re.IGNORECASE,
)
"""Text after a No that is an answer, and not the beginning of `no one` or `no idea`."""


def parse_verdict(text: str) -> Literal["yes", "no"]:
    """Return whether the two rationales contradict each other: `no` keeps, `yes` drops. Whole words only, at the beginning.

    Raises:
        UnusableError: The reply says neither, or both.
    """
    text = _unbox(text)
    match = _VERDICT.match(text)
    if match is None:
        raise UnusableError("neither yes nor no")
    verdict, rest = match[1].lower(), text[match.end() :]
    other = "no" if verdict == "yes" else "yes"
    # After a full stop a reason may contain the other word; only a sentence that begins with it revokes the verdict.
    ended = re.match(r"[*_\"')\]]*(\s*[.!]|[ \t]*\n)", rest)
    revoked = rf"(?:[.!?:;\n]|\bwait\b|\bactually\b)[\W_]*{other}\b" if ended else rf"\b{other}\b"
    if re.search(revoked, rest, re.IGNORECASE):
        raise UnusableError("both yes and no")
    if verdict == "no" and _AFTER_NO.match(rest) is None:
        raise UnusableError("neither yes nor no")
    return "yes" if verdict == "yes" else "no"


def parse_instructions(text: str, *, task: str | None = None) -> list[Instruction]:
    """Return the usable LRV instructions of a reply.

    Args:
        text: The raw reply.
        task: Task of all instructions; each names its own if None.

    Raises:
        UnusableError: No instruction can be used.
    """
    rows = extract_json(text)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    kept: dict[str, Instruction] = {}
    for row in rows:
        if not isinstance(row, dict):
            continue
        values = {re.sub(r"[\s_-]*\d*$", "", str(key).strip().lower()): _to_text(value) for key, value in row.items()}
        text = values.get("instruction") or values.get("question") or ""
        answer = values.get("answer") or values.get("reason") or ""
        if text and answer:
            name = values.get("task", "") if task is None else task
            kept.setdefault(text, Instruction(instruction=text, answer=answer, task=name))
    if not kept:
        raise UnusableError("the reply has no instruction with an answer")
    return list(kept.values())
