"""GQA: compositional questions about scenes (Hudson and Manning, arXiv 1902.09506; answers converted as LLaVA does).

File: `testdev_balanced_questions.json`, an object of questions by id: `question`, `imageId`, `answer`, and `types` with
`structural` and `semantic`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    SHORT,
    Benchmark,
    BenchmarkData,
    ParsedAnswer,
    Question,
    Scored,
    Table,
    need,
    share,
)
from reverie_jax.eval.statistics import Statistic

_KINDS = ("structural", "semantic")


def prediction(answer: str) -> str:
    """An answer as LLaVA hands it to GQA's script: full stops at the end dropped, in lower case; spaces stay."""
    return answer.rstrip(".").lower()


class Gqa(Benchmark):
    """See the module's docstring. Ids are GQA's, which are text."""

    name = "gqa"
    expected_new_tokens = 16
    needs = "testdev_balanced_questions.json of GQA's questions1.2, and with --images its pictures"

    def load(self, data: Path) -> BenchmarkData:
        names = ("testdev_balanced_questions.json", "*_balanced_questions.json")
        path = files.find(data, names[0], f"*/{names[0]}", names[1], benchmark=self)

        def make(row: Mapping[str, Any]) -> Question | None:
            known = {"answer": row["answer"], **{kind: row["types"][kind] for kind in _KINDS}}
            if not all(isinstance(value, str) for value in known.values()):
                raise TypeError(f"answer and types are {known}")
            image = str(row["imageId"])
            question = Question(str(row["pid"]), f"{image}.jpg", f"{row['question']}\n{SHORT}", image, known)
            # The official script counts balanced questions only, whatever else the file holds.
            return question if row.get("isBalanced", True) else None

        rows = files.parse_rows(path, "GQA question", make)
        questions = [question for question in rows if question is not None]
        need(bool(questions), f"{path}: none of its {len(rows)} questions is balanced")
        files.check_unique(path, [question.id for question in questions])
        folder = path.parent
        protocol: dict[str, Any] = {"file": path.name, "questions": len(questions)}
        if len(rows) > len(questions):
            protocol["not balanced, left out"] = len(rows) - len(questions)
        return BenchmarkData(questions, files.image_reader(folder, folder / "images", data, data / "images"), protocol)

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """LLaVA's answers have `question_id`, GQA's own predictions `questionId`."""
        said = row.get("question_id", row.get("questionId"))
        return None if said is None else str(said)

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        types = {kind: sorted({question.known[kind] for question in loaded.questions}) for kind in _KINDS}
        groups = ["accuracy", "binary", "open"] + [f"{kind}/{type}" for kind in _KINDS for type in types[kind]]
        table = Table(
            [f"{group} {cell}" for group in groups for cell in ("right", "questions")],
            loaded.units,
        )
        parsed_answers = []
        for question in loaded.questions:
            text, known = answers.get(str(question.id)), question.known
            said = prediction(text or "")
            right = float(text is not None and said == known["answer"])
            form = "open" if known["structural"] == "query" else "binary"
            for group in ("accuracy", form, *(f"{kind}/{known[kind]}" for kind in _KINDS)):
                table.add(question.unit, {f"{group} right": right, f"{group} questions": 1})
            parsed_answers.append(ParsedAnswer(question.id, said, right, not said.strip(), known["structural"]))

        metrics: dict[str, Statistic] = {}
        for group in groups:
            name = f"{group}/accuracy" if "/" in group else group
            metrics[name] = share(table[f"{group} right"], table[f"{group} questions"], scale=100.0)
        protocol = {"parser": "exact match; full stops at the end dropped, in lower case"}
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """GQA's predictions, as its script and server take them."""
        rows = [
            {"questionId": question.id, "prediction": prediction(answers[str(question.id)])}
            for question in loaded.questions
            if str(question.id) in answers
        ]
        out.mkdir(parents=True, exist_ok=True)
        path = out / "testdev_balanced_predictions.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        return [path]
