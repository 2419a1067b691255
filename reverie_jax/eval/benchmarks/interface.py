"""Interface of a benchmark: questions from its official files, and rules that score answers.

Benchmarks work on the content of files, without a model or a network. Replies of judges are text by id (see `eval.judge`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.scoring import Key, ParsedAnswer, Scored

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's suffixes, each on a line of its own after the question."""

OFFICIAL = "official"
LMMS_EVAL = "lmms-eval"
VLMEVALKIT = "vlmevalkit"
"""Names of rules: the benchmark's own, and those of two toolkits."""

Row = Mapping[str, Any]
"""A row of an answer file."""

_QUESTION_COLUMNS = frozenset(("A", "choice_a", "choices", "options", "fullAnswer", "isBalanced", "l2-category"))
"""Columns of question files, of MMBench, SEED-Bench, ScienceQA and GQA."""

Texts = Mapping[str, str]
"""Answers by `str(question.id)`, replies of a judge by `JudgeRequest.id`, or prompt templates by name."""


class BenchmarkError(UserError):
    """Benchmark files that cannot be used; the message names the file, the line and the remedy."""


class NotScorable(BenchmarkError):
    """Answers that cannot be scored, because replies of a judge or labels are missing. They can still be exported."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: unique within the benchmark.
        image: the name that `BenchmarkData.read_image` takes; None for a question without an image.
        text: the prompt of LLaVA-1.5, with its suffix and without the image marker.
        cluster: questions of one cluster are resampled together for intervals; mostly the name of the image.
        metadata: what scoring needs of the question: label, options, category.
        history: earlier questions and answers of the conversation; the first of them shows the image.
        max_new_tokens: limit of the answer, where it differs from the benchmark's.
    """

    id: Key
    image: str | None
    text: str
    cluster: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check what comes from official files.

        Raises:
            TypeError: An id, an image, a text or a cluster is something else.
        """
        texts = (self.text, self.cluster, self.image or "")
        if (
            isinstance(self.id, bool)
            or not isinstance(self.id, int | str)
            or not all(isinstance(t, str) for t in texts)
        ):
            raise TypeError(
                f"question {self.id!r}: id, image, text and cluster must be texts (an id may be an integer)"
            )


@dataclasses.dataclass(frozen=True)
class BenchmarkData:
    """The questions of a benchmark, in its own order.

    Attributes:
        read_image: returns the encoded file of an image. Raises BenchmarkError where it is missing.
        protocol: the version of questions and labels, for the record of the score: plain values.
        tables: what scoring needs beside the questions: word lists, ground truth by image.
        unavailable: ids of questions that cannot be asked, with the reason in `protocol`. They count only where an answer
            file has answers to some of them.
    """

    questions: Sequence[Question]
    read_image: Callable[[str], bytes]
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unavailable: frozenset[str] = frozenset()

    @property
    def available(self) -> Sequence[Question]:
        """The questions that can be asked."""
        return [q for q in self.questions if str(q.id) not in self.unavailable] if self.unavailable else self.questions

    @property
    def clusters(self) -> list[str]:
        """Names of the clusters, by first appearance."""
        return list(dict.fromkeys(question.cluster for question in self.questions))

    def answered(self, answers: Texts) -> Iterator[tuple[Question, str]]:
        """Yield each question that has an answer, with the answer."""
        return ((q, answers[str(q.id)]) for q in self.questions if str(q.id) in answers)


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One request to a judge.

    Attributes:
        id: of the reply: a question's id, with a suffix after "#" where a question needs several replies.
        prompt: the complete text.
        image: the image to show, where the judge sees it.
    """

    id: str
    prompt: str
    image: str | None = None


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A benchmark's dataset on the Hugging Face hub.

    Attributes:
        repository: owner/name, of a dataset.
        files: patterns of the files that are read.
        megabytes: of these files, about; 0 where it is not known before the hub is asked.
        revision: the commit that is read; empty where none could be checked: then it is today's.
        licence: as its card states it; empty where it states none.
    """

    repository: str
    files: tuple[str, ...]
    megabytes: float
    revision: str = ""
    licence: str = ""


class Benchmark:
    """One benchmark; subclasses define how it is loaded and scored.

    Attributes:
        name: on the command line.
        rules: names of the scoring rules; the first is the benchmark's own.
        max_new_tokens: limit of an answer by LLaVA's protocol.
        beams: width of beam search by the benchmark's protocol; 1 for greedy decoding.
        judge_temperature: sampling temperature of the judge by the benchmark's protocol.
        expected_new_tokens: length of most answers, where it is far below the limit; longer answers are decoded twice.
        yes_no: answers are yes or no, and `metadata["label"]` is the truth (a bool or the word); the model's probability of
            "yes" is recorded too.
        judged_rules: rules that need replies of a judge.
        lower_is_better: metrics (the part of their name after "/") of which less is better.
        thoughtless_rules: rules whose own harness takes a reasoning model's thoughts out of its answers.
        unique_ids: no other questions have the same ids, so that ids decide where prompts differ in words.
        folder_names: names that others give the folder of the benchmark's files (LLaVA's in `playground/data/eval`).
        scale: of the metrics, as it is shown beside them.
        list_metrics: prefixes of metrics ("capability/ocr") that list parts of one total: a report makes no groups of them.
        published_items: number of questions that published scores are of; None if it is not known.
        required_files: the files that `load` expects, and their source, in one line.
        metric: the headline, in words.
        hub: where `--data hub` fetches questions and images; None for nowhere.
    """

    name: ClassVar[str]
    rules: ClassVar[tuple[str, ...]] = (OFFICIAL,)
    max_new_tokens: ClassVar[int] = 128
    beams: ClassVar[int] = 1
    judge_temperature: ClassVar[float] = 0.0
    expected_new_tokens: ClassVar[int | None] = None
    yes_no: ClassVar[bool] = False
    judged_rules: ClassVar[frozenset[str]] = frozenset()
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    thoughtless_rules: ClassVar[frozenset[str]] = frozenset({LMMS_EVAL})
    unique_ids: ClassVar[bool] = True
    folder_names: ClassVar[tuple[str, ...]] = ()
    scale: ClassVar[str] = ""
    list_metrics: ClassVar[frozenset[str]] = frozenset()
    published_items: ClassVar[int | None] = None
    required_files: ClassVar[str]
    metric: ClassVar[str] = ""
    hub: ClassVar[HubDataset | None] = None

    def with_repeats(self, repeats: int) -> Benchmark:
        """Return the benchmark with each answer judged several times.

        Raises:
            BenchmarkError: The benchmark's protocol judges an answer once.
        """
        raise BenchmarkError(f"--repeats {repeats}: {self.name} judges each answer once; the option applies to mm-vet")

    def load(self, data: Path) -> BenchmarkData:
        """Read the questions from the official files in a folder (or from one file).

        Raises:
            BenchmarkError: A file is missing or invalid.
        """
        raise NotImplementedError

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score answers by a rule.

        Args:
            loaded: the questions.
            answers: texts by `str(question.id)`. A question without one counts as the rule defines.
            rule: one of `rules`.
            replies: of a judge, by `JudgeRequest.id`.

        Raises:
            BenchmarkError: Replies that the rule needs are missing.
        """
        raise NotImplementedError

    def own_rows(self, path: Path) -> Iterable[Row] | None:
        """Return the rows of a file or folder in a form that only this benchmark has; None for any other."""
        return None

    def settle_rows(
        self, rows: Sequence[tuple[str, Any]], path: Path, loaded: BenchmarkData
    ) -> tuple[Sequence[tuple[str, Any]], str]:
        """Return the rows of a file with ids of this benchmark, where ids alone do not tell its questions apart.

        Args:
            rows: each with its place, for messages.
            path: of the file.
            loaded: the questions.

        Returns:
            The rows, and what the file is about by its form: the name of a part of the questions, "" for all of them.

        Raises:
            BenchmarkError: Nothing tells which questions are answered.
        """
        return rows, ""

    def part(self, question: Question) -> str:
        """Return the name of a part of the questions that answer files may be about alone, as a split; "" for none."""
        return ""

    def split_row(self, row: Row) -> Sequence[Any]:
        """Return the answer rows that one row of an answer file contains; mostly the row itself."""
        return [row]

    def match_question(self, row: Row, loaded: BenchmarkData) -> str | None:
        """Return the id of the question that a row of an answer file (ours or LLaVA's) belongs to; None for no id."""
        return None if row.get("question_id") is None else str(row["question_id"])

    def duplicates(self, key: str, row: Row, loaded: BenchmarkData) -> Sequence[str]:
        """Return questions that the row cannot tell apart from this one: the n-th such row answers the n-th of them."""
        return ()

    def answer_text(self, row: Row) -> Any:
        """Return the answer in a row of an answer file."""
        # "answer" comes last: upload files have the label under that name, and question files nothing else.
        return row.get("text", row.get("prediction", None if holds_question(row) else row.get("answer")))

    def question_text(self, question: Question) -> str:
        """Return the question alone: without what prompts add to it, as a suffix, options, a context."""
        asked = question.metadata.get("question")
        return asked if isinstance(asked, str) else question.text.removesuffix(SHORT).removesuffix(LETTER)

    def same_prompt(self, prompt: str, question: Question) -> bool:
        """Check that a prompt of an answer file holds this question, whatever is around it."""
        return normalize_prompt(self.question_text(question)) in normalize_prompt(prompt)

    def scale_of(self, rule: str) -> str:
        """Return the scale of a rule's metrics."""
        return self.scale

    def judge_requests(self, loaded: BenchmarkData, answers: Texts, rule: str, prompts: Texts) -> list[JudgeRequest]:
        """Return what a judge must be asked before `rule` can score.

        Args:
            loaded: the questions.
            answers: texts by `str(question.id)`.
            rule: one of `rules`.
            prompts: templates by file name without suffix; the package's or the user's.
        """
        return []

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """Return what an answer names that is not in the image, for the galleries of a report."""
        return ()

    def comparable(self, scores: Mapping[str, Any]) -> bool:
        """Return whether published scores may stand beside a scores.json: same rule, same questions, all answered."""
        whole = self.published_items in (None, scores["items"]) and not scores.get("missing")
        return bool(scores["rule"] == self.rules[0] and whole)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the files that the benchmark's server or own script takes, and return their paths."""
        return []


def holds_question(row: Row) -> bool:
    """Return whether a row brings options or other parts of a question file, whose `answer` is the label."""
    return not _QUESTION_COLUMNS.isdisjoint(row)


def normalize_prompt(text: str) -> str:
    """Return a prompt for comparison: without image marker, case, repeated spaces and marks at its ends."""
    return " ".join(text.replace("<image>", " ").split()).casefold().strip(" .?!")


def require(condition: bool, message: str) -> None:
    """Raise BenchmarkError with the message where the condition is false."""
    if not condition:
        raise BenchmarkError(message)
