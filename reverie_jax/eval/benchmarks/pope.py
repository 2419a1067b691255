"""POPE: is an object in the image? (Li et al., arXiv 2305.10355; scored as LLaVA does.)

Files: `*pope*{random,popular,adversarial}.json`, JSON lines or a list of `question_id`, `image`, `text`, `label`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from reverie_jax.eval.benchmarks import inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    LMMS_EVAL,
    OFFICIAL,
    SHORT,
    VLMEVALKIT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    HubDataset,
    Question,
    Row,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.pope_files import OFFSETS, SPLITS, Settler
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic, mean
from reverie_jax.eval.benchmarks.yes_no import has_no_verdict, vlmevalkit_yes_no

NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class PopeQuestion:
    """One line of a question file; a label of True is yes."""

    question_id: int
    image: str
    text: str
    label: bool


def _parse(row: Mapping[str, Any]) -> PopeQuestion:
    label = {"yes": True, "no": False}[row["label"].lower()]
    if not all(isinstance(row[name], str) for name in ("image", "text")):
        raise TypeError("image or text")
    return PopeQuestion(int(row["question_id"]), row["image"], row["text"], label)


def _read_table(table: parquet.Table) -> tuple[dict[str, list[PopeQuestion]], Callable[[str], bytes]]:
    """Return the questions of each split of the hub's dataset, and a reader of their images."""
    splits: dict[str, list[PopeQuestion]] = {split: [] for split in SPLITS}
    images: dict[str, int] = {}

    def add(number: int, row: Mapping[str, Any]) -> None:
        image = f"{row['image_source']}.jpg"
        official = {**row, "image": image, "text": row["question"], "label": row["answer"].strip()}
        splits[row["category"]].append(_parse(official))
        images.setdefault(image, number)

    table.parse("POPE question", add)
    return {split: rows for split, rows in splits.items() if rows}, table.reader(images)


def read_questions(path: Path) -> list[PopeQuestion]:
    """Read the questions of one split.

    Raises:
        BenchmarkError: The file is missing, a line is invalid, or an id is a duplicate.
    """
    questions = inputs.parse_rows(path, "POPE question", _parse)
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


def cell(label: bool, answer: str) -> int:
    """Return the column that an answer counts in ("yes" is positive); a label of True is yes."""
    if says_yes(answer):
        return TP if label else FP
    return FN if label else TN


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


def _split_files(folder: Path, pattern: str) -> dict[str, Path]:
    """Return the only file of each split, in a folder or in `coco` below it as LLaVA has them; `folder` itself if it is one.

    Raises:
        BenchmarkError: Several files are of one split, or the name of a file tells no split.
    """
    if folder.is_file():
        named = [split for split in SPLITS if split in folder.name.lower()]
        require(len(named) == 1, f"{folder}: its name must have one of {', '.join(SPLITS)}")
        return {named[0]: folder}
    found: dict[str, Path] = {}
    for split in SPLITS:
        for place in (folder, folder / "coco"):
            if split not in found and (path := inputs.find_only(place, f"{pattern}{split}*.json*")):
                found[split] = path
    return found


def _without_typo(question: Question) -> Question:
    plain = str(question.metadata["plain"]).replace("imange", "image")
    return dataclasses.replace(question, metadata={**question.metadata, "question": plain.removesuffix(SHORT)})


class Pope(Benchmark):
    """POPE, see the module's docstring.

    Ids are LLaVA's: adversarial from 1, random from 10,000,001, popular from 20,000,001.
    """

    name = "pope"
    published_items = 8910
    expected_new_tokens = 8
    yes_no = True
    unique_ids = False
    rules = (OFFICIAL, LMMS_EVAL, VLMEVALKIT)
    required_files = (
        "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of the POPE repository "
        "(LLaVA uses those of August 2023), and with --images COCO's val2014 images"
    )
    metric = "mean F1 of the three splits"
    hub = HubDataset(
        *("lmms-lab-encoder/POPE", ("data/test-*.parquet",), 255, "4db1276663dfa5eb8ad16a52d24c31a09e470896")
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the splits that are there, or the one in a file; see `Benchmark.load`."""
        questions: list[Question] = []
        protocol: dict[str, Any] = {}
        folder = data if data.is_dir() else data.parent
        if table := parquet.find_table(data, *self.hub.files):
            splits, read_image = _read_table(table)
        else:
            splits = {split: read_questions(path) for split, path in _split_files(data, "*pope*").items()}
            folders = [place / name for place in (folder, folder.parent) for name in ("", "val2014", "images")]
            read_image = inputs.image_reader(*folders)
        for split, rows in splits.items():
            protocol[f"questions/{split}"] = len(rows)
            # A typo of the official files of August 2023, which later versions do not have: it tells the versions apart.
            protocol["imange"] = protocol.get("imange", 0) + sum("imange" in row.text for row in rows)
            for row in rows:
                text = row.text if row.text.endswith(SHORT) else f"{row.text}\n{SHORT}"
                metadata = {"label": row.label, "split": split, "plain": row.text}
                questions.append(Question(OFFSETS[split] + row.question_id, row.image, text, row.image, metadata))
        if not questions:
            raise BenchmarkError(f"{data}: *pope*{SPLITS[0]}*.json is missing; pope needs {self.required_files}")
        inputs.check_unique(data, [question.id for question in questions])
        old = protocol.get("questions/random") == 2910 and protocol["imange"] > 0
        protocol["labels"] = "August 2023, as LLaVA's" if old else "as in the files"
        return BenchmarkData(questions, read_image, protocol)

    def scale_of(self, rule: str) -> str:
        """Return the scale of a rule's metrics."""
        return "percent" if rule == VLMEVALKIT else "from 0 to 1"

    def part(self, question: Question) -> str:
        """Return the split."""
        return str(question.metadata["split"])

    def same_prompt(self, prompt: str, question: Question) -> bool:
        """Compare the questions; the typo of one version is not another question."""
        return super().same_prompt(prompt.replace("imange", "image"), _without_typo(question))

    def own_rows(self, path: Path) -> Iterable[Row] | None:
        """Return the rows of a folder with an answer file for each split, as POPE's script takes them."""
        if not path.is_dir():
            return None
        files = _split_files(path, "*")
        rows: list[Row] = []
        for split, file in files.items():
            rows += [{**row, "split": split} for row in inputs.parse_rows(file, "answer", dict)]
        return rows if files else None

    def settle_rows(
        self, rows: Sequence[tuple[str, Any]], path: Path, loaded: BenchmarkData
    ) -> tuple[Sequence[tuple[str, Any]], str]:
        """Find the split of rows that POPE numbers from 1 in every split, or does not number at all; see `Benchmark`."""
        splits: dict[str, list[Question]] = {}
        for question in loaded.questions:
            splits.setdefault(self.part(question), []).append(question)
        return Settler(path, splits, self.same_prompt).settle(rows)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score yes and no; a missing answer is wrong, unless all of its split are (officially an empty one is a yes)."""
        # A split without any answer was not run: it is left out, not scored as wrong.
        asked = {self.part(question) for question, _ in loaded.answered(answers)} or set(
            map(self.part, loaded.questions)
        )
        splits = [split for split in SPLITS if split in asked]
        table = CountTable([f"{split}/{cell}" for split in splits for cell in _CELLS], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            text, label = answers.get(str(question.id)), question.metadata["label"]
            split = self.part(question)
            if split not in splits:
                parsed_answers.append(ParsedAnswer(question.id, "", None, False, split))
                continue
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
