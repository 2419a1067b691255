"""GQA: compositional questions about scenes (Hudson and Manning, arXiv 1902.09506; answers converted as LLaVA does).

File: `testdev_balanced_questions.json`, an object of questions by id: `question`, `imageId`, `answer`, and `types` with
`structural` and `semantic`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    SHORT,
    Benchmark,
    BenchmarkData,
    HubDataset,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored

_KINDS = ("structural", "semantic")


def _image_reader(data: Path, pattern: str) -> Callable[[str], bytes]:
    """Return a reader of the images in the hub's dataset, which are files of their own."""
    table = parquet.find_table(data, pattern)
    require(table is not None, f"{data}: {pattern}, GQA's images, are missing")
    assert table is not None
    ids = table.parse("image of GQA", lambda number, row: str(row["id"]))
    return table.reader({f"{id}.jpg": number for number, id in enumerate(ids)})


def normalize(answer: str) -> str:
    """Return an answer as LLaVA passes it to GQA's script: without full stops at the end, in lower case; spaces stay."""
    return answer.rstrip(".").lower()


class Gqa(Benchmark):
    """GQA, see the module's docstring. Ids are GQA's, which are text."""

    name = "gqa"
    scale = "percent"
    published_items = 12578
    expected_new_tokens = 16
    required_files = "testdev_balanced_questions.json of GQA's questions1.2, and with --images its images"
    metric = "exact match"
    hub = HubDataset(
        "lmms-lab-encoder/GQA",
        ("testdev_balanced_instructions/testdev-*.parquet", "testdev_balanced_images/testdev-*.parquet"),
        *(68, "388eadb3fad5cc6818bf6e2ac7a64d809c6e59e7", "mit"),
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the balanced questions; see `Benchmark.load`."""
        name = "testdev_balanced_questions.json"
        table = parquet.find_table(data, self.hub.files[0])
        if table is None:
            path = inputs.find_file(data, name, f"*/{name}", "*_balanced_questions.json", benchmark=self)
        else:
            path = table.paths[0]

        def parse(row: Mapping[str, Any]) -> Question | None:
            metadata = {"answer": row["answer"], **{kind: row["types"][kind] for kind in _KINDS}}
            if not all(isinstance(value, str) for value in metadata.values()):
                raise TypeError(f"answer and types are {metadata}")
            image = str(row["imageId"])
            question = Question(str(row["pid"]), f"{image}.jpg", f"{row['question']}\n{SHORT}", image, metadata)
            # The official script counts only balanced questions.
            return question if row.get("isBalanced", True) else None

        if table is None:
            rows = inputs.parse_rows(path, "GQA question", parse)
            read_image = inputs.image_reader(path.parent, path.parent / "images", data, data / "images")
        else:
            rows = table.parse("GQA question", lambda number, row: parse({**row, "pid": row["id"]}))
            read_image = _image_reader(data, self.hub.files[1])
        questions = [question for question in rows if question is not None]
        require(bool(questions), f"{path}: none of its {len(rows)} questions is balanced")
        inputs.check_unique(path, [question.id for question in questions])
        protocol: dict[str, Any] = {"file": path.name, "questions": len(questions)}
        if len(rows) > len(questions):
            protocol["not balanced, left out"] = len(rows) - len(questions)
        return BenchmarkData(questions, read_image, protocol)

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by LLaVA's `question_id`, or by `questionId` of GQA's predictions."""
        id = row.get("question_id", row.get("questionId"))
        return None if id is None else str(id)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by exact match; a missing answer is wrong."""
        types = {kind: sorted({question.metadata[kind] for question in loaded.questions}) for kind in _KINDS}
        groups = ["accuracy", "binary", "open"] + [f"{kind}/{type}" for kind in _KINDS for type in types[kind]]
        table = CountTable([f"{group} {cell}" for group in groups for cell in ("right", "questions")], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            text, metadata = answers.get(str(question.id)), question.metadata
            parsed = normalize(text or "")
            right = float(text is not None and parsed == metadata["answer"])
            form = "open" if metadata["structural"] == "query" else "binary"
            for group in ("accuracy", form, *(f"{kind}/{metadata[kind]}" for kind in _KINDS)):
                table.add(question.cluster, {f"{group} right": right, f"{group} questions": 1})
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, not parsed.strip(), metadata["structural"]))
        metrics = {
            f"{group}/accuracy" if "/" in group else group: table.ratio(f"{group} right", f"{group} questions", 100)
            for group in groups
        }
        protocol = {"parser": "exact match; full stops at the end dropped, in lower case"}
        return table.result(parsed_answers, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write GQA's predictions, which its script and server take."""
        rows = [{"questionId": q.id, "prediction": normalize(text)} for q, text in loaded.answered(answers)]
        return [inputs.write_json(out / "testdev_balanced_predictions.json", rows)]
