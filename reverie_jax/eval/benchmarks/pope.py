"""POPE: is an object in the image? (Li et al., arXiv 2305.10355; scored as LLaVA does.)

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

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import (
    LMMS_EVAL,
    OFFICIAL,
    SHORT,
    VLMEVALKIT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic, mean
from reverie_jax.eval.benchmarks.yes_no import has_no_verdict, vlmevalkit_yes_no

SPLITS = ("random", "popular", "adversarial")
NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class PopeQuestion:
    """One line of a question file; a label of True is yes."""

    question_id: int
    image: str
    text: str
    label: bool


def read_questions(path: Path) -> list[PopeQuestion]:
    """Read the questions of one split.

    Raises:
        BenchmarkError: The file is missing, a line is invalid, or an id is a duplicate.
    """

    def parse(row: Mapping[str, Any]) -> PopeQuestion:
        label = {"yes": True, "no": False}[row["label"].lower()]
        return PopeQuestion(int(row["question_id"]), row["image"], row["text"], label)

    questions = inputs.parse_rows(path, "POPE question", parse)
    inputs.check_unique(path, [question.question_id for question in questions])
    return questions


def says_yes(answer: str) -> bool:
    """Return False iff "No", "not" or "no" is a word of the first sentence, as officially.

    Commas are dropped, and words are split at spaces alone.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not ({"No", "not", "no"} & set(words))


TP, FP, TN, FN = range(4)
"""Columns of the counts of an image."""


def counts(
    questions: Sequence[PopeQuestion], answers: Mapping[int, str], images: Sequence[str]
) -> Float[np.ndarray, "N 4"]:
    """Return true/false positives/negatives of each image ("yes" is positive).

    Raises:
        BenchmarkError: A question has no answer.
    """
    missing = [q.question_id for q in questions if q.question_id not in answers]
    require(not missing, f"{len(missing)} question(s) have no prediction, the first is {missing[:1]}")
    row = {image: index for index, image in enumerate(images)}
    table = np.zeros((len(images), 4))
    for question in questions:
        yes = says_yes(answers[question.question_id])
        cell = (TP if yes else FN) if question.label else (FP if yes else TN)
        table[row[question.image], cell] += 1
    return table


def _divide(over: ArrayLike, under: ArrayLike) -> np.ndarray:
    over, under = np.asarray(over), np.asarray(under)
    return np.where(under > 0, over / np.maximum(under, 1e-12), 0.0)


def accuracy(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    """Return the share of right answers."""
    return _divide(sums[..., TP] + sums[..., TN], sums.sum(-1))


def precision(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    """Return the share of right answers among those that say yes."""
    return _divide(sums[..., TP], sums[..., TP] + sums[..., FP])


def recall(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    """Return the share of answers that say yes where the label is yes."""
    return _divide(sums[..., TP], sums[..., TP] + sums[..., FN])


def f1(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    """Return the harmonic mean of precision and recall."""
    return _divide(2 * sums[..., TP], 2 * sums[..., TP] + sums[..., FP] + sums[..., FN])


def yes_ratio(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    """Return the share of answers that say yes."""
    return _divide(sums[..., TP] + sums[..., FP], sums.sum(-1))


METRICS = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio}


def mean_f1(sums: Float[np.ndarray, "... 12"]) -> Float[np.ndarray, "..."]:
    """Return POPE's headline, the mean F1 of the splits, whose counts are side by side."""
    return f1(sums.reshape(*sums.shape[:-1], -1, 4)).mean(-1, keepdims=True)[..., 0]


_OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Offsets of the ids in LLaVA's file of all three splits."""
_CELLS = ("tp", "fp", "tn", "fn", "unread_yes", "unread_no")
"""Counts of a split: the confusion matrix, and answers that a rule parses as neither, by label."""


def _lmms_eval(answer: str) -> str:
    """Parse as lmms-eval: the whole answer is the word."""
    word = answer.strip().lower()
    return word if word in ("yes", "no") else ""


_PARSERS = {
    OFFICIAL: lambda answer: "yes" if says_yes(answer) else "no",
    LMMS_EVAL: _lmms_eval,
    VLMEVALKIT: vlmevalkit_yes_no,
}


class Pope(Benchmark):
    """POPE, see the module's docstring.

    Ids are LLaVA's: adversarial from 1, random from 10,000,001, popular from 20,000,001.
    """

    name = "pope"
    published_items = 8910
    expected_new_tokens = 8
    yes_no = True
    rules = (OFFICIAL, LMMS_EVAL, VLMEVALKIT)
    required_files = (
        "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of the POPE repository "
        "(LLaVA uses those of August 2023), and with --images COCO's val2014 images"
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the splits that are there; see `Benchmark.load`."""
        questions: list[Question] = []
        protocol: dict[str, Any] = {}
        for split in SPLITS:
            path = inputs.find_only(data, f"*pope*{split}*.json")
            if path is None:
                continue
            rows = read_questions(path)
            protocol[f"questions/{split}"] = len(rows)
            # A typo of the official files of August 2023, which later versions do not have: it tells the versions apart.
            protocol["imange"] = protocol.get("imange", 0) + sum("imange" in row.text for row in rows)
            for row in rows:
                text = row.text if row.text.endswith(SHORT) else f"{row.text}\n{SHORT}"
                metadata = {"label": row.label, "split": split, "plain": row.text}
                questions.append(Question(_OFFSETS[split] + row.question_id, row.image, text, row.image, metadata))
        if not questions:
            raise BenchmarkError(f"{data}: *pope*{SPLITS[0]}*.json is missing; pope needs {self.required_files}")
        inputs.check_unique(data, [question.id for question in questions])
        old = protocol.get("questions/random") == 2910 and protocol["imange"] > 0
        protocol["labels"] = "August 2023, as LLaVA's" if old else "as in the files"
        return BenchmarkData(questions, inputs.image_reader(data, data / "val2014", data / "images"), protocol)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score yes and no; a missing answer is wrong (an empty answer is a yes by the official rule)."""
        splits = [split for split in SPLITS if any(q.metadata["split"] == split for q in loaded.questions)]
        table = CountTable([f"{split}/{cell}" for split in splits for cell in _CELLS], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            text, label = answers.get(str(question.id)), question.metadata["label"]
            split = question.metadata["split"]
            if text is None:
                table.add(question.cluster, {f"{split}/{'fn' if label else 'fp'}": 1})
                parsed_answers.append(ParsedAnswer(question.id, "", 0.0, True, split))
                continue
            parsed = _PARSERS[rule](text)
            cells = {"yes": ("fp", "tp"), "no": ("tn", "fn"), "": ("unread_no", "unread_yes")}
            table.add(question.cluster, {f"{split}/{cells[parsed][label]}": 1})
            right = float(parsed == ("yes" if label else "no"))
            unparsed = has_no_verdict(text) if rule == OFFICIAL else not parsed
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, unparsed, split))
        metrics = {OFFICIAL: _official_metrics, LMMS_EVAL: _lmms_eval_metrics, VLMEVALKIT: _vlmevalkit_metrics}[rule]
        return table.result(parsed_answers, metrics(table, splits), {"parser": rule})

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write POPE's answer files: question and answer, in the order of the question files."""
        rows: dict[str, list[dict[str, str]]] = {}
        for question in loaded.questions:
            # The official script joins by position.
            require(str(question.id) in answers, f"question {question.id} has no answer; POPE's files need all answers")
            row = {"question": question.metadata["plain"], "answer": answers[str(question.id)]}
            rows.setdefault(question.metadata["split"], []).append(row)
        return [
            inputs.write_lines(out / f"pope_{split}_answers.json", rows[split]) for split in SPLITS if split in rows
        ]


def _pooled(
    table: CountTable, splits: Sequence[str], metric: Statistic, cells: Sequence[Sequence[str]], scale: float = 1.0
) -> Statistic:
    """Return a metric of sums over splits; each of its columns adds up several cells."""
    columns = [[table[f"{split}/{cell}"] for split in splits for cell in names] for names in cells]
    return lambda sums: scale * metric(np.stack([sums[..., column].sum(-1) for column in columns], axis=-1))


_MATRIX = (("tp",), ("fp",), ("tn",), ("fn",))


def _official_metrics(table: CountTable, splits: Sequence[str]) -> dict[str, Statistic]:
    by_split = {
        f"{split}/{name}": _pooled(table, [split], metric, _MATRIX)
        for split in splits
        for name, metric in METRICS.items()
    }
    return {"f1": mean([by_split[f"{split}/f1"] for split in splits]), **by_split}


def _lmms_eval_metrics(table: CountTable, splits: Sequence[str]) -> dict[str, Statistic]:
    """Return metrics over all splits. An answer that is neither word is wrong, and in neither precision nor recall.

    `pope_yes_ratio` counts the labels.
    """

    def share(*cells: str) -> Statistic:
        return table.ratio(
            [f"{s}/{cell}" for s in splits for cell in cells], [f"{s}/{c}" for s in splits for c in _CELLS]
        )

    return {
        "pope_f1_score": _pooled(table, splits, f1, _MATRIX),
        "pope_accuracy": share("tp", "tn"),
        "pope_precision": _pooled(table, splits, precision, _MATRIX),
        "pope_recall": _pooled(table, splits, recall, _MATRIX),
        "pope_yes_ratio": share("tp", "fn", "unread_yes"),
    }


def _vlmevalkit_metrics(table: CountTable, splits: Sequence[str]) -> dict[str, Statistic]:
    """Return metrics in percent, over all splits and of each. An unknown answer is not yes in F1, and wrong in accuracy."""
    cells = (("tp",), ("fp",), ("tn", "unread_no"), ("fn", "unread_yes"))
    right = (("tp", "tn"), ("fp", "fn", "unread_yes", "unread_no"))
    metrics: dict[str, Statistic] = {}
    for prefix, names in [("", splits), *((f"{split}/", [split]) for split in splits)]:
        metrics |= {
            f"{prefix}Overall": _pooled(table, names, f1, cells, 100.0),
            f"{prefix}acc": _pooled(table, names, lambda sums: _divide(sums[..., 0], sums.sum(-1)), right, 100.0),
            f"{prefix}precision": _pooled(table, names, precision, cells, 100.0),
            f"{prefix}recall": _pooled(table, names, recall, cells, 100.0),
        }
    return metrics
