"""LLaVA-Bench: free answers, rated by a judge beside a reference answer (Liu et al., arXiv 2304.08485 and 2310.03744).

In the wild: `questions.jsonl` (`question_id`, `image`, `text`, `category`), `context.jsonl` (`image`, `caption`) and
`answers_gpt4.jsonl` (`question_id`, `text`). COCO: `qa90_questions.jsonl`, `caps_boxes_coco2014_val_80.jsonl` (`image`,
`captions`, `instances` of `category` and `bbox`) and `qa90_gpt4_answer.jsonl`, rated as RLHF-V does. The judge sees the
context and no image; a reply's first line is two numbers of 1 to 10, of the reference and of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import (
    LMMS_EVAL,
    OFFICIAL,
    BenchmarkData,
    HubDataset,
    JudgeRequest,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.judged import JudgedBenchmark, fill
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic

CATEGORIES = ("conv", "detail", "complex")
FAILED = (-1.0, -1.0)
"""Scores of a reply without two numbers."""


def scores(reply: str) -> tuple[float, float]:
    """Return the two numbers of the first line, commas as spaces and one space between, as officially; else `FAILED`.

    "8,7" is (8, 7); "8, 7" and "8 7 " have three pieces, so they fail.
    """
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, pieces)
    except ValueError:
        return FAILED
    return (first, second) if math.isfinite(first + second) else FAILED


def first_two(reply: str) -> tuple[float, float]:
    """Return the first two numbers of the first line that is not empty, as lmms-eval ("Assistant 1: 8" is (1, 8))."""
    lines = reply.strip().split("\n")
    numbers = re.findall(r"-?\d+(?:\.\d+)?", lines[0].replace(",", " ").replace(";", " "))
    return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else FAILED


_PARSERS = {OFFICIAL: scores, LMMS_EVAL: first_two}
_CELLS = ("rated", "reference", "model")
_rounded = np.vectorize(lambda value: round(float(value), 3), otypes=[float])
"""To three decimals as Python rounds; NumPy's own differs at ties."""


class _RatedBenchmark(JudgedBenchmark):
    """Base of the two benchmarks.

    Attributes:
        sources: names of the files of questions, of contexts, of reference answers.
        skips: leaves replies without two numbers out of the means; otherwise their -1 is averaged in.
    """

    max_new_tokens = 1024
    unique_ids = False  # both benchmarks count from 0
    scale = "percent"
    sources: ClassVar[tuple[str, str, str]]
    skips: ClassVar[bool]

    def context(self, row: Mapping[str, Any]) -> str:
        """Return an image in words."""
        raise NotImplementedError

    def template(self, category: str) -> str:
        """Return the name of the judge's template for a category."""
        raise NotImplementedError

    def titles(self, rule: str) -> dict[str, str]:
        """Return the official names of the metrics by category, "" for all questions together."""
        return {"": "all", **{category: category for category in CATEGORIES}}

    def image_reader(self, folder: Path) -> Callable[[str], bytes]:
        """Return a reader of images; see `inputs.image_reader`."""
        return inputs.image_reader(folder, folder / "images")

    def load(self, data: Path) -> BenchmarkData:
        """Read questions, contexts and reference answers; see `Benchmark.load`."""
        folder = data.parent if data.is_file() else data
        asked, described, answered = (inputs.find_file(folder, name, benchmark=self) for name in self.sources)
        contexts = dict(inputs.parse_rows(described, "context", lambda row: (_text(row, "image"), self.context(row))))
        rows = inputs.parse_rows(answered, "reference answer", lambda row: (str(row["question_id"]), _text(row)))
        inputs.check_unique(answered, [id for id, _ in rows])
        references = dict(rows)

        def parse(row: Mapping[str, Any]) -> Question:
            id, image, category = row["question_id"], row["image"], row["category"]
            if category not in CATEGORIES:
                raise ValueError(f"category is {category!r}")
            require(image in contexts, f"{described}: context of image {image} (question {id}) is missing")
            require(str(id) in references, f"{answered}: reference answer to question {id} is missing")
            metadata = {"category": category, "context": contexts[image], "reference": references[str(id)]}
            return Question(id, image, _text(row), image, metadata)

        questions = inputs.parse_rows(asked, f"{self.name} question", parse)
        inputs.check_unique(asked, [question.id for question in questions])
        return BenchmarkData(questions, self.image_reader(folder), {"questions": len(questions)})

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield one request, with the context of the image and the reference answer."""
        metadata = question.metadata
        fields = {
            "context": metadata["context"],
            "reference": metadata["reference"],
            "answer": answers[str(question.id)],
        }
        prompt = fill(prompts, self.template(metadata["category"]), question=question.text, **fields)
        yield JudgeRequest(str(question.id), prompt)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by the judge's numbers; a missing answer counts as a reply without numbers."""
        replies = self.replies_to(loaded, answers, replies)
        kinds = [kind for kind in CATEGORIES if any(q.metadata["category"] == kind for q in loaded.questions)]
        table = CountTable([f"{kind}/{cell}" for kind in kinds for cell in _CELLS], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            id, kind = str(question.id), question.metadata["category"]
            reference, model = _PARSERS[rule](replies[id]) if id in answers else FAILED
            unparsed = (reference, model) == FAILED
            if not (self.skips and reference == -1):
                amounts = {f"{kind}/rated": 1, f"{kind}/reference": reference, f"{kind}/model": model}
                table.add(question.cluster, amounts)
            parsed = "" if unparsed else f"{reference:g} {model:g}"
            parsed_answers.append(ParsedAnswer(question.id, parsed, None, unparsed, kind))

        metrics: dict[str, Statistic] = {}
        for kind, title in self.titles(rule).items():
            if kind and kind not in kinds:
                continue
            names = [kind] if kind else kinds
            columns = [[table[f"{name}/{cell}"] for name in names] for cell in _CELLS]
            metrics[title] = _relative(columns)
            metrics[f"{title}/reference"] = _mean_times_ten(columns[0], columns[1])
            metrics[f"{title}/model"] = _mean_times_ten(columns[0], columns[2])
        protocol = {"parser": rule, "unread replies": "left out" if self.skips else "-1 for both, averaged in"}
        return table.result(parsed_answers, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write LLaVA's answer file. Its script zips files and reads `answer_id`, so all questions have a row."""
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
        return [inputs.write_lines(out / f"{self.name}_answers.jsonl", rows)]


class LlavaBench(_RatedBenchmark):
    """LLaVA-Bench in the wild: 60 questions about 24 images."""

    name = "llava-bench"
    folder_names = ("llava-bench-in-the-wild",)
    published_items = 60
    judge_temperature = 0.2
    rules = (OFFICIAL, LMMS_EVAL)
    judged_rules = frozenset(rules)
    required_files = (
        "questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/ of liuhaotian/llava-bench-in-the-wild"
    )
    metric = "relative score: the model's ratings over the reference's"
    hub = HubDataset(
        "liuhaotian/llava-bench-in-the-wild",
        ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images/*"),
        *(10, "9773b6fd2be88d4ced480dcd9bfd4ce76e47f79b", "apache-2.0"),
    )
    sources = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
    skips = False

    def context(self, row: Mapping[str, Any]) -> str:
        """Return the caption."""
        caption = row["caption"]
        return caption if isinstance(caption, str) else "\n".join(caption)

    def template(self, category: str) -> str:
        """Return the template of the category."""
        return f"llava_bench_{category}"

    def titles(self, rule: str) -> dict[str, str]:
        """Return the names that LLaVA and lmms-eval give the metrics."""
        if rule == OFFICIAL:
            return {"": "all", **{category: f"llava_bench_{category}" for category in CATEGORIES}}
        return {"": "gpt_eval_llava_all", **{category: f"gpt_eval_llava_{category}" for category in CATEGORIES}}


class LlavaBenchCoco(_RatedBenchmark):
    """LLaVA-Bench COCO: 90 questions about 30 images of val2014, by RLHF-V's rule, which skips a first number of -1."""

    name = "llava-bench-coco"
    metric = "relative score: the model's ratings over the reference's"
    required_files = (
        "qa90_questions.jsonl, qa90_gpt4_answer.jsonl and caps_boxes_coco2014_val_80.jsonl of the LLaVA repository in one "
        "folder, and with --images COCO's val2014 images"
    )
    sources = ("qa90_questions.jsonl", "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl")
    skips = True

    def context(self, row: Mapping[str, Any]) -> str:
        """Return captions and boxes."""
        boxes = [f"{instance['category']}: {list(instance['bbox'])}" for instance in row["instances"]]
        return "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)

    def template(self, category: str) -> str:
        """Return the template, which is officially the same for all three categories."""
        return "llava_bench_coco"

    def image_reader(self, folder: Path) -> Callable[[str], bytes]:
        """Return a reader of `000000441147.jpg`, as questions name it, or COCO's `COCO_val2014_000000441147.jpg`."""
        read = inputs.image_reader(folder, folder / "images", folder / "val2014")
        return inputs.either(read, lambda name: read(f"COCO_val2014_{name}"))


def _text(row: Mapping[str, Any], name: str = "text") -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is {row[name]!r}")
    return row[name]


def _mean(over: ArrayLike, under: ArrayLike) -> Float[np.ndarray, "..."]:
    """Divide, to three decimals as the official summary rounds before it divides the means; 0 where `under` is 0."""
    over, under = np.asarray(over), np.asarray(under)
    return _rounded(np.where(under > 0, over / np.where(under > 0, under, 1.0), 0.0))


def _relative(columns: Sequence[Sequence[int]]) -> Statistic:
    """Return the mean of the model over the mean of the reference, in percent."""
    rated, reference, model = map(list, columns)

    def statistic(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        count = sums[..., rated].sum(-1)
        above, below = _mean(sums[..., model].sum(-1), count), _mean(sums[..., reference].sum(-1), count)
        return np.where(below != 0, 100 * above / np.where(below != 0, below, 1.0), 0.0)

    return statistic


def _mean_times_ten(rated: Sequence[int], cells: Sequence[int]) -> Statistic:
    """Return a mean rating times ten, as LLaVA's summary shows it."""
    counts, values = list(rated), list(cells)
    return lambda sums: 10 * _mean(sums[..., values].sum(-1), sums[..., counts].sum(-1))
