"""POPE: is there such a thing in the image? (Li et al., arXiv 2305.10355; scored as LLaVA does.)

Files: `*_pope_{random,popular,adversarial}.json`, one JSON object a line: `question_id`, `image`, `text`, `label`.
Predictions: one JSON object a line: `question_id`, `text`. They are joined by id, never by position.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.errors import UserError

SPLITS = ("random", "popular", "adversarial")
NEW_TOKENS = 8


class BenchmarkError(UserError):
    """Benchmark files that cannot be used; the message names the file, the line and the remedy."""


@dataclasses.dataclass(frozen=True)
class PopeQuestion:
    """One line of a question file."""

    question_id: int
    image: str
    text: str
    label: bool


def read_questions(path: Path) -> list[PopeQuestion]:
    """The questions of one split.

    Raises:
        BenchmarkError: the file is missing, a line is broken, or an id stands there twice.
    """
    questions: list[PopeQuestion] = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path}: is not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label = {"yes": True, "no": False}[row["label"]]
            questions.append(PopeQuestion(int(row["question_id"]), row["image"], row["text"], label))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path}: line {number} is no POPE question ({error!r})") from None
    ids = [question.question_id for question in questions]
    if not ids:
        raise BenchmarkError(f"{path}: no questions")
    if len(set(ids)) != len(ids):
        raise BenchmarkError(f"{path}: a question_id stands there twice")
    return questions


def conversation(question: PopeQuestion) -> Conversation:
    """The question as the model gets it."""
    return Conversation((Turn("user", f"{IMAGE}\n{question.text}"),), source="pope")


def says_yes(answer: str) -> bool:
    """The official reading: first sentence, commas dropped, split on spaces; no iff "No", "not" or "no" is a word of it."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not ({"No", "not", "no"} & set(words))


# Columns of the per-image counts.
TP, FP, TN, FN = range(4)


def counts(
    questions: Sequence[PopeQuestion], answers: Mapping[int, str], images: Sequence[str]
) -> Float[np.ndarray, "N 4"]:
    """True/false positives/negatives of each image ("yes" is positive).

    Raises:
        BenchmarkError: a question has no answer.
    """
    missing = [q.question_id for q in questions if q.question_id not in answers]
    if missing:
        raise BenchmarkError(f"{len(missing)} question(s) have no prediction, the first is {missing[0]}")
    row = {image: index for index, image in enumerate(images)}
    table = np.zeros((len(images), 4))
    for question in questions:
        yes = says_yes(answers[question.question_id])
        cell = (TP if yes else FN) if question.label else (FP if yes else TN)
        table[row[question.image], cell] += 1
    return table


def _safe(over: ArrayLike, under: ArrayLike) -> np.ndarray:
    over, under = np.asarray(over), np.asarray(under)
    return np.where(under > 0, over / np.maximum(under, 1e-12), 0.0)


def accuracy(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    return _safe(sums[..., TP] + sums[..., TN], sums.sum(-1))


def precision(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    return _safe(sums[..., TP], sums[..., TP] + sums[..., FP])


def recall(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    return _safe(sums[..., TP], sums[..., TP] + sums[..., FN])


def f1(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    return _safe(2 * sums[..., TP], 2 * sums[..., TP] + sums[..., FP] + sums[..., FN])


def yes_ratio(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    return _safe(sums[..., TP] + sums[..., FP], sums.sum(-1))


METRICS = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio}


def mean_f1(sums: Float[np.ndarray, "... 12"]) -> Float[np.ndarray, "..."]:
    """POPE's headline: the mean of the splits' F1; counts of the splits side by side."""
    return f1(sums.reshape(*sums.shape[:-1], -1, 4)).mean(-1, keepdims=True)[..., 0]
