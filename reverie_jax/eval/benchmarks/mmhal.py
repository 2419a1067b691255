"""MMHal-Bench: is a free answer informative, and does it hallucinate? (Sun et al., LLaVA-RLHF, arXiv 2309.14525.)

File: `response_template.json`, a list of 96 objects whose order matters: `question_type`, `question_topic`, `image_id`,
`image_src`, `image_content`, `question`, `gt_answer`, `model_answer`. A judge rates each answer from 0 to 6, without the
picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import urlsplit

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
    share,
)
from reverie_jax.eval.benchmarks.judged import fill, needed
from reverie_jax.eval.statistics import Statistic

TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
"""By place in the file, modulo 8."""
_CELLS = ("questions", "score", "hallucinated", "informative")


def rating(reply: str) -> int | None:
    """The official reading: the one number s of 0 to 6 for which "rating: s" is in the lower-cased reply; None if not one.

    "Rating:5" and "Score: 5" are none; "Rating: 10" is 1 and "Rating: 4.5" is 4, for only one digit is looked at.
    """
    found = [score for score in range(7) if f"rating: {score}" in reply.lower()]
    return found[0] if len(found) == 1 else None


class MmHal(Benchmark):
    """See the module's docstring. Ids are places in the file, from 0."""

    name = "mmhal"
    max_new_tokens = 1024
    judged: ClassVar[frozenset[str]] = frozenset({OFFICIAL})
    needs = (
        "response_template.json of Shengcao1006/MMHal-Bench (or RLHF-V's mmhal-bench_answer_template.json), and with "
        "--images its pictures"
    )

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "response_template.json", "mmhal*template*.json", "mmhal*.json", benchmark=self)
        questions: list[Question] = []
        by_id: dict[str, str] = {}

        def make(row: Mapping[str, Any]) -> None:
            number = len(questions)
            kind = TYPES[number % len(TYPES)]
            if row["question_type"] != kind:
                raise BenchmarkError(
                    f"{path}: row {number} is of type {row['question_type']!r} where the official file has {kind!r}; the "
                    "order matters, so take that file as it is"
                )
            content = row["image_content"]
            if not isinstance(content, list) or not all(isinstance(row[k], str) for k in ("question", "gt_answer")):
                raise TypeError("question, gt_answer or image_content")
            source = PurePosixPath(urlsplit(row["image_src"]).path).name if row.get("image_src") else ""
            image = source or f"{row['image_id']}.jpg"
            by_id[image] = f"{row['image_id']}.jpg"
            known = {"category": kind, "content": ", ".join(content), "reference": row["gt_answer"], "row": dict(row)}
            questions.append(Question(number, image, row["question"], image, known))

        files.parse_rows(path, "MMHal-Bench question", make)
        folder = path.parent
        found = files.image_reader(folder, folder / "images")

        def picture(name: str) -> bytes:
            try:
                return found(name)
            except BenchmarkError:
                if name not in by_id or by_id[name] == name:
                    raise
            return found(by_id[name])

        return BenchmarkData(questions, picture, {"questions": len(questions)})

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Rows of the official list have no id of their own: they are known by picture and question, wherever they stand."""
        if row.get("question_id") is not None:
            return str(row["question_id"])
        if "image_id" not in row or "question" not in row:
            return None
        for question in loaded.questions:
            ours = question.known["row"]
            if ours["image_id"] == row["image_id"] and ours["question"] == row["question"]:
                return str(question.id)
        raise BenchmarkError(
            f"{self.name}: an answer is to {row['question']!r} about picture {row['image_id']}, which is none of the "
            f"{len(loaded.questions)} questions; the answers belong to another version of them"
        )

    def text(self, row: Mapping[str, Any]) -> Any:
        return row["model_answer"] if "model_answer" in row else super().text(row)

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        found = []
        for question in loaded.questions:
            id = str(question.id)
            if id in answers:
                prompt = fill(
                    prompts,
                    "mmhal",
                    image_content=question.known["content"],
                    question=question.text,
                    gt_answer=question.known["reference"],
                    model_answer=answers[id],
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
        said = needed(self, replies, (str(q.id) for q in loaded.questions if str(q.id) in answers))
        kinds = [kind for kind in TYPES if any(q.known["category"] == kind for q in loaded.questions)]
        table = Table([f"{kind}/{cell}" for kind in kinds for cell in _CELLS], [q.unit for q in loaded.questions])
        parsed_answers = []
        for question in loaded.questions:
            id, kind = str(question.id), question.known["category"]
            read = rating(said[id]) if id in answers else None
            score = read or 0  # officially, a reply without one rating is the worst there is
            table.add(
                question.unit,
                {
                    f"{kind}/questions": 1,
                    f"{kind}/score": score,
                    f"{kind}/hallucinated": score < 3,
                    f"{kind}/informative": score - 3 if score >= 3 else score,
                },
            )
            parsed_answers.append(
                ParsedAnswer(question.id, "" if read is None else str(read), score / 6, read is None, kind)
            )

        def metric(cell: str, names: list[str], scale: float = 1.0) -> Statistic:
            over, under = [table[f"{name}/{cell}"] for name in names], [table[f"{name}/questions"] for name in names]
            return share(over, under, scale=scale)

        metrics = {
            "score": metric("score", kinds),
            "hallucination_rate": metric("hallucinated", kinds),
            "informativeness": metric("informative", kinds, 100 / 3),  # RLHF-V's: of 3, in percent
        }
        for kind in kinds:
            metrics[f"{kind}/score"] = metric("score", [kind])
            metrics[f"{kind}/hallucination_rate"] = metric("hallucinated", [kind])
        return Scored(parsed_answers, table.units, table.counts, metrics, {"parser": rule, "unread replies": "rated 0"})

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """The official list with its `model_answer` filled in."""
        rows = [q.known["row"] | {"model_answer": answers.get(str(q.id), "")} for q in loaded.questions]
        out.mkdir(parents=True, exist_ok=True)
        path = out / "mmhal_responses.json"
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", "utf-8")
        return [path]
