"""POPE: is there such a thing in the image? (Li et al., arXiv 2305.10355; scored as LLaVA does.)

Files: `*pope*{random,popular,adversarial}.json`, JSON lines or a list of `question_id`, `image`, `text`, `label`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    SHORT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    ParsedAnswer,
    Question,
    Scored,
    Table,
)
from reverie_jax.eval.benchmarks.yes_no import neither, vlmevalkit_yes_no
from reverie_jax.eval.statistics import Statistic

SPLITS = ("random", "popular", "adversarial")
NEW_TOKENS = 8


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

    def make(row: Mapping[str, Any]) -> PopeQuestion:
        label = {"yes": True, "no": False}[row["label"].lower()]
        return PopeQuestion(int(row["question_id"]), row["image"], row["text"], label)

    questions = files.parse_rows(path, "POPE question", make)
    files.check_unique(path, [question.question_id for question in questions])
    return questions


def conversation(question: PopeQuestion) -> Conversation:
    """The question as the model gets it."""
    return Conversation((Turn("user", f"{IMAGE}\n{question.text}"),), dataset="pope")


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


_OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""LLaVA's file of all three splits numbers their questions so."""
_CELLS = ("tp", "fp", "tn", "fn", "unread_yes", "unread_no")
"""Of each split: the confusion matrix, and answers that a rule reads as neither, by label."""


def _lmms(answer: str) -> str:
    """lmms-eval: the bare word alone."""
    word = answer.strip().lower()
    return word if word in ("yes", "no") else ""


_READERS = {
    OFFICIAL: lambda answer: "yes" if says_yes(answer) else "no",
    "lmms-eval": _lmms,
    "vlmevalkit": vlmevalkit_yes_no,
}


class Pope(Benchmark):
    """See the module's docstring. Ids are LLaVA's: adversarial from 1, random from 10,000,001, popular from 20,000,001."""

    name = "pope"
    expected_new_tokens = 8
    yes_no = True
    rules = (OFFICIAL, "lmms-eval", "vlmevalkit")
    needs = (
        "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of the POPE repository "
        "(LLaVA uses those of August 2023), and with --images COCO's val2014 pictures"
    )

    def load(self, data: Path) -> BenchmarkData:
        questions: list[Question] = []
        protocol: dict[str, Any] = {}
        for split in SPLITS:
            found = sorted(data.glob(f"*pope*{split}*.json"))
            if len(found) > 1:
                raise BenchmarkError(f"{data}: {', '.join(path.name for path in found)} are all POPE's {split} split")
            for path in found:
                rows = read_questions(path)
                protocol[f"questions/{split}"] = len(rows)
                protocol["imange"] = protocol.get("imange", 0) + sum("imange" in row.text for row in rows)
                for row in rows:
                    text = row.text if row.text.endswith(SHORT) else f"{row.text}\n{SHORT}"
                    known = {"label": row.label, "split": split, "plain": row.text}
                    id = _OFFSETS[split] + row.question_id
                    questions.append(Question(id, row.image, text, row.image, known))
        if not questions:
            raise BenchmarkError(f"{data}: no *pope*{SPLITS[0]}*.json there; pope needs {self.needs}")
        files.check_unique(data, [question.id for question in questions])
        old = protocol.get("questions/random") == 2910 and protocol["imange"] > 0
        protocol["labels"] = "August 2023, as LLaVA's" if old else "as in the files"
        return BenchmarkData(questions, files.image_reader(data, data / "val2014", data / "images"), protocol)

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        splits = [split for split in SPLITS if any(q.known["split"] == split for q in loaded.questions)]
        table = Table(
            [f"{split}/{cell}" for split in splits for cell in _CELLS],
            loaded.units,
        )
        parsed_answers = []
        for question in loaded.questions:
            text, label, split = answers.get(str(question.id)), question.known["label"], question.known["split"]
            if text is None:  # wrong; an empty answer would be a yes
                table.add(question.unit, {f"{split}/{'fn' if label else 'fp'}": 1})
                parsed_answers.append(ParsedAnswer(question.id, "", 0.0, True, split))
                continue
            said = _READERS[rule](text)
            if said:
                cell = {(True, "yes"): "tp", (False, "yes"): "fp", (False, "no"): "tn", (True, "no"): "fn"}[label, said]
            else:
                cell = "unread_yes" if label else "unread_no"
            table.add(question.unit, {f"{split}/{cell}": 1})
            right = float(said == ("yes" if label else "no"))
            parsed_answers.append(
                ParsedAnswer(question.id, said, right, neither(text) if rule == OFFICIAL else not said, split)
            )
        metrics = {OFFICIAL: _official, "lmms-eval": _lmms_metrics, "vlmevalkit": _vlmevalkit_metrics}[rule](splits)
        return Scored(parsed_answers, table.units, table.counts, metrics, {"parser": rule})

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """POPE's own answer files: question and answer, in the order of the question files."""
        made = []
        for split in SPLITS:
            rows = [
                {"question": question.known["plain"], "answer": answers[str(question.id)]}
                for question in loaded.questions
                if question.known["split"] == split
            ]
            if rows:
                made.append(files.write_lines(out / f"pope_{split}_answers.json", rows))
        return made


def _of(number: int, metric: Statistic) -> Statistic:
    """A metric of the four cells, of one split."""
    at = number * len(_CELLS)
    return lambda sums: metric(sums[..., at : at + 4])


def _pooled(
    splits: Sequence[str], columns: Sequence[Sequence[str]], metric: Statistic, scale: float = 1.0
) -> Statistic:
    """A metric of cells that each add up several columns of all splits."""
    places = [[n * len(_CELLS) + _CELLS.index(c) for n in range(len(splits)) for c in names] for names in columns]
    return lambda sums: scale * metric(np.stack([sums[..., place].sum(-1) for place in places], axis=-1))


def _official(splits: Sequence[str]) -> dict[str, Statistic]:
    def mean(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        return np.asarray(np.mean([_of(number, f1)(sums) for number in range(len(splits))], axis=0))

    found: dict[str, Statistic] = {"f1": mean}
    for number, split in enumerate(splits):
        found |= {f"{split}/{name}": _of(number, metric) for name, metric in METRICS.items()}
    return found


_PLAIN = (("tp",), ("fp",), ("tn",), ("fn",))


def _lmms_metrics(splits: Sequence[str]) -> dict[str, Statistic]:
    """Pooled over splits. What is neither bare word is wrong, and in neither precision nor recall; `pope_yes_ratio` counts
    the labels.
    """
    every = _pooled(splits, [_CELLS], lambda sums: sums[..., 0])
    right = _pooled(splits, [("tp", "tn")], lambda sums: sums[..., 0])
    yes = _pooled(splits, [("tp", "fn", "unread_yes")], lambda sums: sums[..., 0])
    return {
        "pope_f1_score": _pooled(splits, _PLAIN, f1),
        "pope_accuracy": lambda sums: _safe(right(sums), every(sums)),
        "pope_precision": _pooled(splits, _PLAIN, precision),
        "pope_recall": _pooled(splits, _PLAIN, recall),
        "pope_yes_ratio": lambda sums: _safe(yes(sums), every(sums)),
    }


def _vlmevalkit_metrics(splits: Sequence[str]) -> dict[str, Statistic]:
    """In percent, pooled, then by split. What is unknown is not yes in F1, and wrong in accuracy."""

    def four(names: Sequence[str], prefix: str, offset: int) -> dict[str, Statistic]:
        def of(columns: Sequence[Sequence[str]], metric: Statistic) -> Statistic:
            pooled = _pooled(names, columns, metric, 100.0)
            return lambda sums: pooled(sums[..., offset * len(_CELLS) :])

        cells = (("tp",), ("fp",), ("tn", "unread_no"), ("fn", "unread_yes"))
        right = (("tp", "tn"), ("fp", "fn", "unread_yes", "unread_no"))
        return {
            f"{prefix}Overall": of(cells, f1),
            f"{prefix}acc": of(right, lambda sums: _safe(sums[..., 0], sums.sum(-1))),
            f"{prefix}precision": of(cells, precision),
            f"{prefix}recall": of(cells, recall),
        }

    found = four(splits, "", 0)
    for number, split in enumerate(splits):
        found |= four([split], f"{split}/", number)
    return found
