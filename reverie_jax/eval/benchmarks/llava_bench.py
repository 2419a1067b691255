"""LLaVA-Bench: free answers, rated by a judge beside a reference answer (Liu et al., arXiv 2304.08485 and 2310.03744).

In the wild: `questions.jsonl` (`question_id`, `image`, `text`, `category`), `context.jsonl` (`image`, `caption`) and
`answers_gpt4.jsonl` (`question_id`, `text`). COCO: `qa90_questions.jsonl`, `caps_boxes_coco2014_val_80.jsonl` (`image`,
`captions`, `instances` of `category` and `bbox`) and `qa90_gpt4_answer.jsonl`, rated as RLHF-V does. The judge sees the
context and no picture; a reply's first line is two numbers of 1 to 10, of the reference and of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    JudgeRequest,
    ParsedAnswer,
    Question,
    Scored,
    Table,
)
from reverie_jax.eval.benchmarks.judged import fill, needed
from reverie_jax.eval.statistics import Statistic

CATEGORIES = ("conv", "detail", "complex")
FAILED = (-1.0, -1.0)
"""What a reply without two numbers is read as."""


def scores(reply: str) -> tuple[float, float]:
    """The official reading: the first line, commas as spaces, is exactly two numbers with one space between; else `FAILED`.

    "8,7" is (8, 7); "8, 7" and "8 7 " are three pieces, so they fail.
    """
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, pieces)
    except ValueError:
        return FAILED
    return (first, second) if math.isfinite(first + second) else FAILED


def first_two(reply: str) -> tuple[float, float]:
    """lmms-eval's: the first two numbers of the first line that is not empty ("Assistant 1: 8" is (1, 8))."""
    lines = reply.strip().split("\n")
    found = re.findall(r"-?\d+(?:\.\d+)?", lines[0].replace(",", " ").replace(";", " "))
    return (float(found[0]), float(found[1])) if len(found) >= 2 else FAILED


_READERS = {OFFICIAL: scores, "lmms-eval": first_two}
_CELLS = ("rated", "reference", "model")
_rounded = np.vectorize(lambda value: round(float(value), 3), otypes=[float])
"""To three decimals as Python does; NumPy's own differs at ties."""


class _Rated(Benchmark):
    """What both have in common.

    Attributes:
        sources: names of the files of questions, of contexts, of reference answers.
        skips: replies that cannot be read are left out of the means; else their -1 is averaged in.
    """

    max_new_tokens = 1024
    judged: ClassVar[frozenset[str]]
    sources: ClassVar[tuple[str, str, str]]
    skips: ClassVar[bool]

    def context(self, row: Mapping[str, Any]) -> str:
        """A picture in words."""
        raise NotImplementedError

    def prompt(self, category: str) -> str:
        """The name of the template for a category."""
        raise NotImplementedError

    def titles(self, rule: str) -> dict[str, str]:
        """The official names of all questions together ("") and of the categories."""
        return {"": "all", **{category: category for category in CATEGORIES}}

    def pictures(self, folder: Path) -> Any:
        return files.image_reader(folder, folder / "images")

    def load(self, data: Path) -> BenchmarkData:
        folder = data.parent if data.is_file() else data
        asked, described, answered = (files.find(folder, name, benchmark=self) for name in self.sources)
        contexts = dict(files.parse_rows(described, "context", lambda row: (row["image"], self.context(row))))
        references = files.parse_rows(answered, "reference answer", lambda row: (str(row["question_id"]), _text(row)))
        files.check_unique(answered, [id for id, _ in references])
        reference = dict(references)

        def make(row: Mapping[str, Any]) -> Question:
            id, image, category = row["question_id"], row["image"], row["category"]
            if category not in CATEGORIES:
                raise ValueError(f"category {category!r}")
            if image not in contexts:
                raise BenchmarkError(f"{described}: no context for picture {image} of question {id}")
            if str(id) not in reference:
                raise BenchmarkError(f"{answered}: no reference answer to question {id}")
            known = {"category": category, "context": contexts[image], "reference": reference[str(id)]}
            return Question(id, image, _text(row), image, known)

        questions = files.parse_rows(asked, f"{self.name} question", make)
        files.check_unique(asked, [question.id for question in questions])
        return BenchmarkData(questions, self.pictures(folder), {"questions": len(questions)})

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        found = []
        for question in loaded.questions:
            id, known = str(question.id), question.known
            if id in answers:
                prompt = fill(
                    prompts,
                    self.prompt(known["category"]),
                    context=known["context"],
                    question=question.text,
                    reference=known["reference"],
                    answer=answers[id],
                )
                found.append(JudgeRequest(id, prompt))
        return found

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A missing answer counts as a reply that cannot be read."""
        said = needed(self, replies, (str(q.id) for q in loaded.questions if str(q.id) in answers))
        kinds = [kind for kind in CATEGORIES if any(q.known["category"] == kind for q in loaded.questions)]
        table = Table(
            [f"{kind}/{cell}" for kind in kinds for cell in _CELLS],
            loaded.units,
        )
        parsed_answers = []
        for question in loaded.questions:
            id, kind = str(question.id), question.known["category"]
            reference, model = _READERS[rule](said[id]) if id in answers else FAILED
            unparsed = (reference, model) == FAILED
            if not (self.skips and reference == -1):
                table.add(
                    question.unit,
                    {f"{kind}/rated": 1, f"{kind}/reference": reference, f"{kind}/model": model},
                )
            parsed = "" if unparsed else f"{reference:g} {model:g}"
            parsed_answers.append(ParsedAnswer(question.id, parsed, None, unparsed, kind))

        metrics: dict[str, Statistic] = {}
        for kind, title in self.titles(rule).items():
            if kind and kind not in kinds:
                continue
            names = [kind] if kind else kinds
            columns = [[table[f"{name}/{cell}"] for name in names] for cell in _CELLS]
            metrics[title] = _relative(columns)
            metrics[f"{title}/reference"] = _ten(columns[0], columns[1])
            metrics[f"{title}/model"] = _ten(columns[0], columns[2])
        protocol = {"parser": rule, "unread replies": "left out" if self.skips else "-1 for both, averaged in"}
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """LLaVA's answer file. Its script zips the files, so all questions are there; and it wants an `answer_id`."""
        rows: list[dict[str, Any]] = [
            {
                "question_id": question.id,
                "prompt": question.text,
                "text": answers.get(str(question.id), ""),
                "answer_id": str(question.id),
                "model_id": "",
                "metadata": {},
            }
            for question in loaded.questions
        ]
        return [files.write_lines(out / f"{self.name}_answers.jsonl", rows)]


class LlavaBench(_Rated):
    """In the wild: 60 questions about 24 pictures."""

    name = "llava-bench"
    judge_temperature = 0.2
    rules = (OFFICIAL, "lmms-eval")
    judged = frozenset(rules)
    needs = "questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/ of liuhaotian/llava-bench-in-the-wild"
    sources = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
    skips = False

    def context(self, row: Mapping[str, Any]) -> str:
        caption = row["caption"]
        return caption if isinstance(caption, str) else "\n".join(caption)

    def prompt(self, category: str) -> str:
        return f"llava_bench_{category}"

    def titles(self, rule: str) -> dict[str, str]:
        if rule == OFFICIAL:
            return {"": "all", **{category: f"llava_bench_{category}" for category in CATEGORIES}}
        return {"": "gpt_eval_llava_all", **{category: f"gpt_eval_llava_{category}" for category in CATEGORIES}}


class LlavaBenchCoco(_Rated):
    """90 questions about 30 pictures of COCO val2014, by RLHF-V's rule: a first number of -1 is left out of the means."""

    name = "llava-bench-coco"
    judged = frozenset({OFFICIAL})
    needs = (
        "qa90_questions.jsonl, qa90_gpt4_answer.jsonl and caps_boxes_coco2014_val_80.jsonl of the LLaVA repository in one "
        "folder, and with --images COCO's val2014 pictures"
    )
    sources = ("qa90_questions.jsonl", "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl")
    skips = True

    def context(self, row: Mapping[str, Any]) -> str:
        boxes = [f"{instance['category']}: {list(instance['bbox'])}" for instance in row["instances"]]
        return "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)

    def prompt(self, category: str) -> str:
        return "llava_bench_coco"  # officially the same words for all three

    def pictures(self, folder: Path) -> Any:
        """The questions name `000000441147.jpg`; COCO's file is `COCO_val2014_000000441147.jpg`."""
        found = files.image_reader(folder, folder / "images", folder / "val2014")

        def picture(name: str) -> bytes:
            try:
                return found(name)
            except BenchmarkError:
                return found(f"COCO_val2014_{name}")

        return picture


def _text(row: Mapping[str, Any]) -> str:
    if not isinstance(row["text"], str):
        raise TypeError("text")
    return row["text"]


def _mean(over: ArrayLike, under: ArrayLike) -> Float[np.ndarray, "..."]:
    """To three decimals, as the official summary rounds before it divides; 0 of nothing."""
    over, under = np.asarray(over), np.asarray(under)
    return _rounded(np.where(under > 0, over / np.where(under > 0, under, 1.0), 0.0))


def _relative(columns: Sequence[Sequence[int]]) -> Statistic:
    """Mean of the model over the mean of the reference, in percent."""
    rated, reference, model = map(list, columns)

    def statistic(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        count = sums[..., rated].sum(-1)
        above, below = _mean(sums[..., model].sum(-1), count), _mean(sums[..., reference].sum(-1), count)
        return np.where(below != 0, 100 * above / np.where(below != 0, below, 1.0), 0.0)

    return statistic


def _ten(rated: Sequence[int], cells: Sequence[int]) -> Statistic:
    """A mean rating times ten, as LLaVA's summary shows it."""
    counts, values = list(rated), list(cells)
    return lambda sums: 10 * _mean(sums[..., values].sum(-1), sums[..., counts].sum(-1))
