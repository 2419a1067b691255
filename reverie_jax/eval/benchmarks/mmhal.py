"""MMHal-Bench: is a free answer informative, and does it hallucinate? (Sun et al., LLaVA-RLHF, arXiv 2309.14525.)

File: `response_template.json`, a list of 96 objects whose order matters: `question_type`, `question_topic`, `image_id`,
`image_src`, `image_content`, `question`, `gt_answer`, `model_answer`. A judge rates each answer from 0 to 6, without the
image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import (
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

TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
"""Question types; the type of a row is its position in the file, modulo 8."""
_CELLS = ("questions", "score", "hallucinated", "informative")


def rating(reply: str) -> int | None:
    """Return the only score s of 0 to 6 for which "rating: s" is in the lower-cased reply, as officially; else None.

    "Rating:5" and "Score: 5" have no rating; "Rating: 10" is 1 and "Rating: 4.5" is 4, for only one digit is read.
    """
    scores = [score for score in range(7) if f"rating: {score}" in reply.lower()]
    return scores[0] if len(scores) == 1 else None


class MmHal(JudgedBenchmark):
    """MMHal-Bench, see the module's docstring. Ids are positions in the file, from 0."""

    name = "mmhal"
    unique_ids = False  # they are positions
    published_items = 96
    max_new_tokens = 1024
    lower_is_better = frozenset({"hallucination_rate"})
    scale = "score from 0 to 6, rates from 0 to 1, informativeness in percent"
    required_files = (
        "response_template.json of Shengcao1006/MMHal-Bench (or RLHF-V's mmhal-bench_answer_template.json), and with "
        "--images its images"
    )
    metric = "mean rating; rate of hallucinations"
    hub = HubDataset(
        *("Shengcao1006/MMHal-Bench", ("response_template.json", "images/*"), 0),
        *("3824aafbe4e668879c9b671014746f06afd953ea", "apache-2.0"),
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read `response_template.json`; see `Benchmark.load`."""
        path = inputs.find_file(data, "response_template.json", "mmhal*template*.json", "mmhal*.json", benchmark=self)
        questions: list[Question] = []
        named_by_id: dict[str, str] = {}

        def add(row: Mapping[str, Any]) -> None:
            number = len(questions)
            kind = TYPES[number % len(TYPES)]
            require(
                row["question_type"] == kind,
                f"{path}: row {number} has type {row['question_type']!r} where the official file has {kind!r}; the order "
                "of rows matters, so use the official file unchanged",
            )
            content = row["image_content"]
            if not isinstance(content, list) or not all(isinstance(row[k], str) for k in ("question", "gt_answer")):
                raise TypeError("question, gt_answer or image_content")
            source = PurePosixPath(urlsplit(row["image_src"]).path).name if row.get("image_src") else ""
            image = source or f"{row['image_id']}.jpg"
            named_by_id[image] = f"{row['image_id']}.jpg"
            metadata = {
                "category": kind,
                "content": ", ".join(content),
                "reference": row["gt_answer"],
                "row": dict(row),
            }
            questions.append(Question(number, image, row["question"], image, metadata))

        inputs.parse_rows(path, "MMHal-Bench question", add)
        read = inputs.image_reader(path.parent, path.parent / "images")
        read_image = inputs.either(read, lambda name: read(named_by_id.get(name, name)))
        return BenchmarkData(questions, read_image, {"questions": len(questions)})

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows of the official list, which have no id of their own, by image and question."""
        if row.get("question_id") is not None:
            return str(row["question_id"])
        if "image_id" not in row or "question" not in row:
            return None
        for question in loaded.questions:
            ours = question.metadata["row"]
            if ours["image_id"] == row["image_id"] and ours["question"] == row["question"]:
                return str(question.id)
        raise LookupError(
            f"unknown question {row['question']!r} about image {row['image_id']}: another version of the file?"
        )

    def answer_text(self, row: Mapping[str, Any]) -> Any:
        """Return `model_answer` of the official list, or the answer of another form."""
        return row["model_answer"] if "model_answer" in row else super().answer_text(row)

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield one request, with the content of the image in words."""
        metadata, answer = question.metadata, answers[str(question.id)]
        fields = {"image_content": metadata["content"], "gt_answer": metadata["reference"], "model_answer": answer}
        yield JudgeRequest(str(question.id), fill(prompts, "mmhal", question=question.text, **fields))

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by the ratings; a missing answer, or a reply without a rating, is rated 0."""
        replies = self.replies_to(loaded, answers, replies)
        kinds = [kind for kind in TYPES if any(q.metadata["category"] == kind for q in loaded.questions)]
        table = CountTable([f"{kind}/{cell}" for kind in kinds for cell in _CELLS], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            id, kind = str(question.id), question.metadata["category"]
            parsed = rating(replies[id]) if id in answers else None
            score = parsed or 0
            amounts = (1, score, score < 3, score - 3 if score >= 3 else score)
            table.add(question.cluster, {f"{kind}/{cell}": n for cell, n in zip(_CELLS, amounts, strict=True)})
            text = "" if parsed is None else str(parsed)
            parsed_answers.append(ParsedAnswer(question.id, text, score / 6, parsed is None, kind))

        def metric(cell: str, names: list[str], scale: float = 1.0) -> Statistic:
            return table.ratio([f"{n}/{cell}" for n in names], [f"{n}/questions" for n in names], scale)

        metrics = {
            "score": metric("score", kinds),
            "hallucination_rate": metric("hallucinated", kinds),
            "informativeness": metric("informative", kinds, 100 / 3),  # RLHF-V's: of 3, in percent
        }
        for kind in kinds:
            metrics[f"{kind}/score"] = metric("score", [kind])
            metrics[f"{kind}/hallucination_rate"] = metric("hallucinated", [kind])
        return table.result(parsed_answers, metrics, {"parser": rule, "unread replies": "rated 0"})

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`."""
        low = not parsed.unparsed and parsed.right is not None and parsed.right < 0.5
        return [f"rated {parsed.parsed}"] if low else ()

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the official list with `model_answer` filled in."""
        rows = [q.metadata["row"] | {"model_answer": answers.get(str(q.id), "")} for q in loaded.questions]
        return [inputs.write_json(out / "mmhal_responses.json", rows, indent=2)]
