"""SEED-Bench: multiple choice on images and video clips (Li et al., arXiv 2307.16125; asked and scored as LLaVA does).

Files: `SEED-Bench.json`, images in `SEED-Bench-image`, and LLaVA's middle frames of the clips in `SEED-Bench-video-image`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import choice_parsing, inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    LETTER,
    LMMS_EVAL,
    OFFICIAL,
    VLMEVALKIT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    HubDataset,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored

IMAGES, FRAMES = "SEED-Bench-image", "SEED-Bench-video-image"
"""LLaVA's folders."""

_TYPES = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instance Counting"),
    *("Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Recognition", "Action Recognition"),
    *("Action Prediction", "Procedure Understanding"),
)
"""Types of questions in the order of their numbers from 1, which the hub's dataset has without the names."""
_LETTERS = "ABCD"
_KINDS = ("image", "video")


def official(answer: str) -> str:
    """Parse as LLaVA: the whole answer is a capital letter."""
    return answer if len(answer) == 1 and answer in _LETTERS else ""


def lmms_eval(answer: str) -> str:
    """Parse as lmms-eval: the first character, in either case, whatever follows it."""
    first = answer.strip()[:1].upper()
    return first if first and first in _LETTERS else ""


_PARSERS: dict[str, Callable[[str, choice_parsing.Options], str]] = {
    OFFICIAL: lambda answer, options: official(answer),
    LMMS_EVAL: lambda answer, options: lmms_eval(answer),
    VLMEVALKIT: choice_parsing.vlmevalkit,
}


class Seed(Benchmark):
    """SEED-Bench, see the module's docstring. Clusters are images and clips: most have several questions.

    A clip is asked about only if LLaVA's frame of it is there; the protocol counts the others. VLMEvalKit has only images.
    """

    name = "seed"
    folder_names = ("seed_bench",)
    scale = "percent"
    published_items = 19242
    expected_new_tokens = 8
    rules = (OFFICIAL, LMMS_EVAL, VLMEVALKIT)
    required_files = (
        f"SEED-Bench.json of AILab-CVC/SEED-Bench, its images in {IMAGES}, and for clips LLaVA's middle frames "
        f"in {FRAMES}"
    )
    metric = "accuracy; of images and of clips"
    hub = HubDataset("lmms-lab-encoder/SEED-Bench", ("data/test-*.parquet",), 0)

    def load(self, data: Path) -> BenchmarkData:
        """Read `SEED-Bench.json`; see `Benchmark.load`."""
        if table := parquet.find_table(data, *self.hub.files):
            numbers: dict[str, int] = {}
            names = dict(enumerate(_TYPES, 1))

            def parse(number: int, row: Mapping[str, Any]) -> Question:
                question = _parse(row, names)
                numbers.setdefault(str(question.image), number)
                return question

            questions = table.parse("SEED-Bench question", parse)
            # The hub has several frames of a clip, and not LLaVA's.
            clips = frozenset(str(q.id) for q in questions if q.metadata["kind"] != "image")
            return self._data(table.paths[0], questions, table.reader(numbers), _TYPES, clips)
        path = inputs.find_file(data, "SEED-Bench.json", "*/SEED-Bench.json", "SEED*Bench*.json", benchmark=self)
        content = inputs.read_json(path)
        types = content.get("question_type") if isinstance(content, dict) else None
        if not isinstance(types, dict) or not all(isinstance(number, int | str) for number in types.values()):
            raise BenchmarkError(
                f"{path}: question_type, an object of numbers by name, is missing; {self.name} needs {self.required_files}"
            )
        names = {number: name for name, number in types.items()}
        rows = content.get("questions")
        questions = inputs.parse_list(path, "SEED-Bench question", lambda row: _parse(row, names), rows, "questions")
        folders = list(dict.fromkeys((data if data.is_dir() else path.parent, path.parent)))
        unavailable = frozenset(
            str(q.id)
            for q in questions
            if q.metadata["kind"] != "image" and not any((folder / str(q.image)).is_file() for folder in folders)
        )
        return self._data(path, questions, inputs.image_reader(*folders), list(types), unavailable)

    def _data(
        self,
        path: Path,
        questions: Sequence[Question],
        read_image: Callable[[str], bytes],
        types: Sequence[str],
        unavailable: frozenset[str],
    ) -> BenchmarkData:
        repeated = _repeated_ids(path, questions)
        kinds = [question.metadata["kind"] for question in questions]
        protocol: dict[str, Any] = {f"questions/{kind}": kinds.count(kind) for kind in _KINDS}
        protocol["clips without a frame"] = len(unavailable)
        if repeated:
            protocol["ids of several questions"] = ", ".join(repeated)
        return BenchmarkData(questions, read_image, protocol, {"types": list(types)}, unavailable)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score letters; a missing answer is wrong."""
        scored = [
            question for question in loaded.questions if rule != VLMEVALKIT or question.metadata["kind"] == "image"
        ]
        present = {question.metadata[key] for question in scored for key in ("kind", "type")}
        groups = ["", *(f"{name}/" for name in (*_KINDS, *loaded.tables["types"]) if name in present)]
        clusters = list(dict.fromkeys(question.cluster for question in scored))
        table = CountTable([f"{group}{cell}" for group in groups for cell in ("right", "all")], clusters)
        parsed_answers = []
        for question in loaded.questions:
            metadata, text = question.metadata, answers.get(str(question.id), "")
            parsed = _PARSERS[rule](text, metadata["options"])
            right = float(parsed == metadata["answer"])
            if rule == VLMEVALKIT and metadata["kind"] != "image":
                parsed_answers.append(ParsedAnswer(question.id, parsed, None, False, metadata["type"]))
                continue
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, not parsed, metadata["type"]))
            for group in ("", f"{metadata['kind']}/", f"{metadata['type']}/"):
                table.add(question.cluster, {f"{group}right": right, f"{group}all": 1.0})
        metrics = {f"{group}accuracy": table.ratio(f"{group}right", f"{group}all", 100) for group in groups}
        return table.result(parsed_answers, metrics, {"parser": rule})

    def part(self, question: Question) -> str:
        """Return whether the question is about an image or a video."""
        return str(question.metadata["kind"])

    def same_prompt(self, prompt: str, question: Question) -> bool:
        """Compare the question, and the order of the options: letters depend on it."""
        return super().same_prompt(prompt, question) and choice_parsing.same_options(
            prompt, question.metadata["options"]
        )

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the leaderboard's file: `question_id` as in the question file, and `prediction`."""
        rows = [{"question_id": q.metadata["question_id"], "prediction": text} for q, text in loaded.answered(answers)]
        return [inputs.write_lines(out / f"{self.name}_upload.jsonl", rows)]


def _repeated_ids(path: Path, questions: Sequence[Question]) -> list[str]:
    """Return ids that several questions have, as 49914 in the official file: LLaVA's last answer to it counts for both.

    Raises:
        BenchmarkError: A question is there twice.
    """
    seen: dict[str, list[Question]] = {}
    for question in questions:
        same = seen.setdefault(str(question.id), [])
        require(question not in same, f"{path}: duplicate question {question.id}")
        same.append(question)
    return [id for id, same in seen.items() if len(same) > 1]


def _parse(row: Mapping[str, Any], names: Mapping[Any, str]) -> Question:
    """Return a question as LLaVA asks it. Raises KeyError, TypeError or ValueError for an invalid row."""
    written, kind, number = row["question_id"], row["data_type"], row["question_type_id"]
    options = {letter: str(row[f"choice_{letter.lower()}"]) for letter in _LETTERS}
    if kind not in _KINDS:
        raise ValueError(f"data_type is {kind!r}")
    if row["answer"] not in options:
        raise ValueError(f"answer is {row['answer']!r}")
    # LLaVA's ids of questions about images are numbers; those about clips begin with a letter.
    id = int(written) if str(written).isdecimal() else str(written)
    image = f"{IMAGES}/{row['data_id']}" if kind == "image" else f"{FRAMES}/{number}_{written}.png"
    metadata = {
        "question_id": written,
        "question": str(row["question"]),
        "options": options,
        "answer": row["answer"],
        "kind": kind,
        "type": names[number],
    }
    text = f"{row['question']}\n{choice_parsing.format_options(options)}\n{LETTER}"
    return Question(id, image, text, f"{kind}/{row['data_id']}", metadata)
