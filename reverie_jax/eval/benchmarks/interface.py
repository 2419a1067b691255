"""What a benchmark is: questions from its official files, a rule that reads answers, and metrics of sums over units.

Everything here works on files' content. No model, no network: judges' replies come as text by id (`eval.judge` writes them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from reverie_jax.errors import UserError
from reverie_jax.eval.statistics import Statistic, share

__all__ = [
    "LETTER",
    "OFFICIAL",
    "SHORT",
    "Benchmark",
    "BenchmarkError",
    "JudgeRequest",
    "Key",
    "Loaded",
    "NotScorable",
    "ParsedAnswer",
    "Question",
    "Scored",
    "Table",
    "need",
    "share",
]

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's suffixes, each on a line of its own behind the question."""

OFFICIAL = "official"

Key = int | str
"""A question's id as the benchmark's own answer files have it: a number stays a number. Compared as text."""


class BenchmarkError(UserError):
    """Benchmark files that cannot be used; the message names the file, the line and the remedy."""


class NotScorable(BenchmarkError):
    """Answers that cannot be scored here: a judge's replies or the labels are missing. They can be exported all the same."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing that is asked.

    Attributes:
        id: unique within the benchmark.
        image: the name that `BenchmarkData.read_image` takes; None for text alone.
        text: as LLaVA-1.5 is asked, suffix included, without the picture's marker.
        unit: what is resampled for intervals: questions of one unit stand or fall together. The picture, mostly.
        known: what scoring needs of the question: label, options, category.
        before: questions and answers that come first in the conversation; the picture is shown with the first.
        new_tokens: longest answer, where it is not the benchmark's.
    """

    id: Key
    image: str | None
    text: str
    unit: str
    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    before: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkData:
    """A benchmark's questions, in its own order.

    Attributes:
        picture: an image's encoded file, read when it is asked for. Raises BenchmarkError where there is none.
        protocol: which version of the questions and labels this is, for the score's record: plain values.
        known: what scoring needs beside the questions: tables of associations, ground truth by picture.
        left_out: ids of questions that cannot be asked here, with the reason in `protocol`. They count only where an answer
            file has answers to some of them.
    """

    questions: Sequence[Question]
    read_image: Callable[[str], bytes]
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    @property
    def asked(self) -> Sequence[Question]:
        """The questions that can be asked here."""
        return [q for q in self.questions if str(q.id) not in self.left_out] if self.left_out else self.questions

    @property
    def units(self) -> list[str]:
        """Names of the units, in the order in which they come first."""
        return list(dict.fromkeys(question.unit for question in self.questions))


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer as a rule reads it.

    Attributes:
        parsed: what it is taken for ("yes", "B", a score); "" for nothing.
        right: 1 where it is right, 0 where not, between them for partial marks; None where that is no question.
        unread: nothing in the answer says what the rule looks for, whatever it counts as then.
        category: of the question, for tables.
    """

    id: Key
    parsed: str
    right: float | None = None
    unparsed: bool = False
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a rule makes of answers.

    Attributes:
        readings: one a question, in the questions' order.
        units: names of the rows of `counts`.
        counts: what each unit adds to the K sums that every metric is a function of.
        metrics: official names to functions of the sums, in the order they are shown; the first is the headline.
        protocol: what the score depends on beside the questions: parser, judge, options.
    """

    parsed_answers: Sequence[ParsedAnswer]
    units: Sequence[str]
    counts: Float[np.ndarray, "N K"]
    metrics: Mapping[str, Statistic]
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Every metric of all units."""
        sums = self.counts.sum(0)
        return {name: float(metric(sums)) for name, metric in self.metrics.items()}


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One thing to ask a judge about.

    Attributes:
        id: of the reply; a question's id, or with a suffix behind "#" where a question needs several replies.
        prompt: whole, in words.
        image: the picture to show, where the judge sees it.
    """

    id: str
    prompt: str
    image: str | None = None


class Benchmark:
    """One benchmark. Subclasses say how it is loaded and scored.

    Attributes:
        name: on the command line.
        rules: the first is the benchmark's own.
        new_tokens: longest answer by LLaVA's protocol.
        beams: of beam search, by the benchmark's protocol; 1 for none.
        judge_temperature: that its judge is asked with, by its protocol.
        usual_tokens: what most answers need, where that is much less: longer ones are decoded twice.
        yes_no: answers are yes or no, as `known["label"]` (a bool, or the word) says; how likely the model held each is
            recorded too.
        judged: rules that need replies of a judge.
        needs: what `data` must hold, and where that comes from: one line.
    """

    name: ClassVar[str]
    rules: ClassVar[tuple[str, ...]] = (OFFICIAL,)
    max_new_tokens: ClassVar[int] = 128
    beams: ClassVar[int] = 1
    judge_temperature: ClassVar[float] = 0.0
    expected_new_tokens: ClassVar[int | None] = None
    yes_no: ClassVar[bool] = False
    judged: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[str]

    def repeated(self, repeats: int) -> Benchmark:
        """Return the benchmark with each answer judged several times.

        Raises:
            BenchmarkError: its judge is asked once about an answer.
        """
        raise BenchmarkError(f"{self.name}: judges each answer once; --repeats is for mm-vet")

    def load(self, data: Path) -> BenchmarkData:
        """The questions of the official files in a folder (or of one file).

        Raises:
            BenchmarkError: a file is missing or broken.
        """
        raise NotImplementedError

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """Scores answers.

        Args:
            answers: texts by `str(question.id)`. A question without one counts as the rule says (`counts_missing`).
            replies: a judge's, by `JudgeRequest.id`.

        Raises:
            BenchmarkError: replies that the rule needs are missing.
        """
        raise NotImplementedError

    def unfold(self, row: Mapping[str, Any]) -> Sequence[Any]:
        """The answer rows that a row of an answer file holds: itself, mostly."""
        return [row]

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """The question that a row of an answer file belongs to, LLaVA's files included; None where it names none."""
        return None if row.get("question_id") is None else str(row["question_id"])

    def duplicates(self, key: str, row: Mapping[str, Any], loaded: BenchmarkData) -> Sequence[str]:
        """Questions that a row of an answer file does not tell apart from this one: the n-th such row is the n-th one's."""
        return ()

    def text(self, row: Mapping[str, Any]) -> Any:
        """The answer in a row of an answer file."""
        # "answer" comes last: upload files have the right one under that name.
        return row.get("text", row.get("prediction", row.get("answer")))

    def same(self, said: str, question: Question) -> bool:
        """Whether a prompt in an answer file is this question, whatever stands around it: picture marker, suffix, spaces."""
        theirs, mine = (" ".join(text.replace("<image>", " ").split()) for text in (said, question.text))
        return theirs in mine or mine in theirs

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        """What a judge is asked before `rule` can score.

        Args:
            prompts: templates by file name without its suffix; ours, or the user's own.
        """
        return []

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """Writes the upload or answer files that the benchmark's server or own script takes; their paths."""
        return []


def need(condition: bool, message: str) -> None:
    """Raises BenchmarkError with the message where the condition does not hold."""
    if not condition:
        raise BenchmarkError(message)


class Table:
    """Counts of units, filled item by item.

    Args:
        columns: names of the K sums.
        units: in the order of the rows; those that come later are added behind.
    """

    def __init__(self, columns: Sequence[str], units: Sequence[str] = ()):
        self.columns = {name: number for number, name in enumerate(columns)}
        self.rows: dict[str, np.ndarray] = {unit: np.zeros(len(self.columns)) for unit in units}

    def add(self, unit: str, amounts: Mapping[str, float]) -> None:
        row = self.rows.setdefault(unit, np.zeros(len(self.columns)))
        for name, amount in amounts.items():
            row[self.columns[name]] += amount

    def __getitem__(self, name: str) -> int:
        """The column of that name."""
        return self.columns[name]

    @property
    def units(self) -> list[str]:
        return list(self.rows)

    @property
    def counts(self) -> Float[np.ndarray, "N K"]:
        return np.stack(list(self.rows.values())) if self.rows else np.zeros((0, len(self.columns)))
