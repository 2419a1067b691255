"""SEED-Bench: multiple choice on pictures and video clips (Li et al., arXiv 2307.16125; asked and scored as LLaVA does).

Files: `SEED-Bench.json`, pictures in `SEED-Bench-image`, and LLaVA's middle frames of the clips in `SEED-Bench-video-image`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import choice_parsing, files
from reverie_jax.eval.benchmarks.interface import (
    LETTER,
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    ParsedAnswer,
    Question,
    Scored,
    Table,
    share,
)
from reverie_jax.eval.statistics import Statistic

LMMS, KIT = "lmms-eval", "vlmevalkit"
IMAGES, FRAMES = "SEED-Bench-image", "SEED-Bench-video-image"
"""LLaVA's folders."""

_LETTERS = "ABCD"
_KINDS = ("image", "video")


def official(answer: str) -> str:
    """LLaVA: nothing but the bare capital letter."""
    return answer if len(answer) == 1 and answer in _LETTERS else ""


def lmms(answer: str) -> str:
    """lmms-eval: the first character, whatever follows it; small letters too."""
    first = answer.strip()[:1].upper()
    return first if first and first in _LETTERS else ""


class Seed(Benchmark):
    """See the module's docstring. Units are pictures and clips: most have several questions.

    Clips are asked only where LLaVA's frame of them is there; the protocol says how many are left out. VLMEvalKit has the
    pictures alone.
    """

    name = "seed"
    expected_new_tokens = 8
    rules = (OFFICIAL, LMMS, KIT)
    needs = (
        f"SEED-Bench.json of AILab-CVC/SEED-Bench, its pictures in {IMAGES}, and for clips LLaVA's middle frames "
        f"in {FRAMES}"
    )

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "SEED-Bench.json", "*/SEED-Bench.json", "SEED*Bench*.json", benchmark=self)
        content = files.read_json(path)
        rows = content.get("questions") if isinstance(content, dict) else None
        types = content.get("question_type") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows or not isinstance(types, dict):
            raise BenchmarkError(f"{path}: no lists questions and question_type there; {self.name} needs {self.needs}")
        names = {number: name for name, number in types.items()}
        folders = list(dict.fromkeys((data if data.is_dir() else path.parent, path.parent)))
        asked: list[Question] = []
        left_out: set[str] = set()
        for number, row in enumerate(rows):
            try:
                question = _question(row, names)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise BenchmarkError(
                    f"{path}: row {number} of questions is no SEED-Bench question ({error!r})"
                ) from None
            asked.append(question)
            frame = question.image or ""
            if question.known["kind"] != "image" and not any((folder / frame).is_file() for folder in folders):
                left_out.add(str(question.id))
        files.check_unique(path, [question.id for question in asked])
        kinds = [question.known["kind"] for question in asked]
        protocol = {f"questions/{kind}": kinds.count(kind) for kind in _KINDS}
        protocol["clips without a frame"] = len(left_out)
        return BenchmarkData(asked, files.image_reader(*folders), protocol, {"types": list(types)}, frozenset(left_out))

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A missing answer is wrong."""
        counted = [question for question in loaded.questions if rule != KIT or question.known["kind"] == "image"]
        there = {question.known["type"] for question in counted}
        types = [name for name in loaded.known["types"] if name in there]
        kinds = [kind for kind in _KINDS if any(question.known["kind"] == kind for question in counted)]
        groups = ["", *(f"{kind}/" for kind in kinds), *(f"{name}/" for name in types)]
        table = Table([f"{group}{what}" for group in groups for what in ("right", "all")], [q.unit for q in counted])
        parsed_answers = []
        for question in loaded.questions:
            known, text = question.known, answers.get(str(question.id), "")
            said = (
                official(text)
                if rule == OFFICIAL
                else lmms(text)
                if rule == LMMS
                else choice_parsing.vlmevalkit(text, known["options"])
            )
            right = float(said == known["answer"])
            if rule == KIT and known["kind"] != "image":
                parsed_answers.append(ParsedAnswer(question.id, said, None, False, known["type"]))
                continue
            parsed_answers.append(ParsedAnswer(question.id, said, right, not said, known["type"]))
            for group in ("", f"{known['kind']}/", f"{known['type']}/"):
                table.add(question.unit, {f"{group}right": right, f"{group}all": 1.0})
        metrics: dict[str, Statistic] = {
            f"{group}accuracy": share(table[f"{group}right"], table[f"{group}all"], scale=100.0) for group in groups
        }
        return Scored(parsed_answers, table.units, table.counts, metrics, {"parser": rule})

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """What the leaderboard takes: `question_id` as in the question file, and `prediction`."""
        rows = [
            {"question_id": question.known["question_id"], "prediction": answers[str(question.id)]}
            for question in loaded.questions
            if str(question.id) in answers
        ]
        return [files.write_lines(out / f"{self.name}_upload.jsonl", rows)]


def _question(row: Mapping[str, Any], names: Mapping[Any, str]) -> Question:
    """A question as LLaVA asks it. Raises KeyError, TypeError or ValueError: it is broken."""
    written, kind, number = row["question_id"], row["data_type"], row["question_type_id"]
    options = {letter: str(row[f"choice_{letter.lower()}"]) for letter in _LETTERS}
    if kind not in _KINDS:
        raise ValueError(f"data_type is {kind!r}")
    if row["answer"] not in options:
        raise ValueError(f"answer is {row['answer']!r}")
    # LLaVA's ids of pictures' questions are numbers; those of clips begin with a letter.
    id = int(written) if str(written).isdecimal() else str(written)
    image = f"{IMAGES}/{row['data_id']}" if kind == "image" else f"{FRAMES}/{number}_{written}.png"
    known = {
        "question_id": written,
        "options": options,
        "answer": row["answer"],
        "kind": kind,
        "type": names[number],
    }
    text = f"{row['question']}\n{choice_parsing.lines(options)}\n{LETTER}"
    return Question(id, image, text, f"{kind}/{row['data_id']}", known)
