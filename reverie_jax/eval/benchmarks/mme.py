"""MME: yes or no, two questions about each image (Fu et al., arXiv 2306.13394; scored as its `eval_tool` does).

Files: `MME_Benchmark_release_version`, a folder for each task. A text file for each image holds two lines, each a question,
a tab, and Yes or No; it lies beside its image, or in `questions_answers_YN` beside `images`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    SHORT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    ParsedAnswer,
    Question,
    Scored,
    Table,
    need,
    share,
)
from reverie_jax.eval.benchmarks.yes_no import vlmevalkit_yes_no
from reverie_jax.eval.statistics import Statistic

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION

_FOLDER = "MME_Benchmark_release_version"
_ASK = "Please answer yes or no."
_CELLS = ("right", "questions", "both right", "images")


def official(answer: str) -> str:
    """Yes or no among the first four characters as they stand, spaces included; "" for what the tool calls other."""
    head = clean(answer).lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else ""


def clean(answer: str) -> str:
    """An answer on one line without tabs, as a result file can hold it; no longer and no shorter."""
    return answer.translate({ord(mark): " " for mark in "\n\r\t"})


def _lmms(answer: str) -> str:
    """lmms-eval: without full stops and spaces around it; a lone y or n counts, else the first four characters."""
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text, "") if len(text) == 1 else official(text)


_READERS: Mapping[str, Callable[[str], str]] = {OFFICIAL: official, "lmms-eval": _lmms, "vlmevalkit": vlmevalkit_yes_no}
_SUMS = {
    OFFICIAL: ("perception", "cognition"),
    "lmms-eval": ("mme_perception_score", "mme_cognition_score"),
    "vlmevalkit": ("perception", "reasoning"),
}
"""What each rule calls the sums over perception's and cognition's tasks."""


class Mme(Benchmark):
    """See the module's docstring. Ids are LLaVA's, which name the image, with #1 or #2 for the line of the text file."""

    name = "mme"
    expected_new_tokens = 8
    yes_no = True
    rules = (OFFICIAL, "lmms-eval", "vlmevalkit")
    needs = f"{_FOLDER}, the folder that MME's authors send out, with a folder for each task"

    def load(self, data: Path) -> BenchmarkData:
        root = next((f for f in (data, data / _FOLDER) if any((f / task).is_dir() for task in TASKS)), None)
        if root is None:
            raise BenchmarkError(
                f"{data}: no folder {TASKS[0]}, {TASKS[1]} or of another task there; mme needs {self.needs}"
            )
        questions: list[Question] = []
        images: dict[str, list[Question]] = {}
        for task in TASKS:
            folder = root / task
            texts = sorted(folder.glob("questions_answers_YN/*.txt")) or sorted(folder.glob("*.txt"))
            need(bool(texts) or not folder.is_dir(), f"{folder}: no questions there; mme needs {self.needs}")
            pictures = _pictures(folder)
            for path in texts:
                # Scoring needs no pictures: without them the name is LLaVA's, as far as it can be known.
                place = pictures.get(path.stem, f"{path.stem}.{'jpg' if task in PERCEPTION else 'png'}")
                unit = f"{task}/{PurePosixPath(place).name}"
                pair = [
                    Question(
                        f"{unit}#{number}",
                        f"{task}/{place}",
                        f"{plain.replace(_ASK, '').strip()}\n{SHORT}",
                        unit,
                        {"task": task, "label": label, "plain": plain},
                    )
                    for number, (plain, label) in enumerate(_lines(path), 1)
                ]
                questions += pair
                images[f"{task}/{path.stem}"] = pair
        absent = [task for task in TASKS if not (root / task).is_dir()]
        protocol: dict[str, Any] = {"questions": len(questions), "images": len(images)}
        if absent:
            protocol["tasks that are not there"] = ", ".join(absent)
        return BenchmarkData(questions, files.image_reader(root), protocol, {"images": images})

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """LLaVA's answers name the image alone, twice; the prompt tells its two questions apart."""
        said = super().key(row, loaded)
        if said is None:
            return None
        image, _, number = said.partition("#")
        pair = loaded.known["images"].get(f"{image.split('/')[0]}/{PurePosixPath(image).stem}")
        if pair is None:
            return said
        prompt = _bare(str(row.get("prompt", "")))
        for place, question in enumerate(pair, 1):
            if number == str(place) or (not number and prompt == _bare(question.text)):
                return str(question.id)
        if number:
            return said
        raise ValueError(f"{image} has two questions, and the row's prompt is neither: {row.get('prompt')!r}")

    def same(self, said: str, question: Question) -> bool:
        """With or without the sentence that asks for yes or no: LLaVA takes it out."""
        return _bare(said) == _bare(question.text)

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        there = {question.known["task"] for question in loaded.questions}
        tasks = [task for task in TASKS if task in there]
        rights: dict[str, list[bool]] = {question.unit: [] for question in loaded.questions}
        parsed_answers = []
        for question in loaded.questions:
            known = question.known
            said = _READERS[rule](answers.get(str(question.id), ""))
            right = said == known["label"]
            rights[question.unit].append(right)
            parsed_answers.append(ParsedAnswer(question.id, said, float(right), not said, known["task"]))
        table = Table([f"{task}/{cell}" for task in tasks for cell in _CELLS], list(rights))
        for unit, pair in rights.items():
            amounts = (sum(pair), len(pair), all(pair), 1)
            task = unit.split("/")[0]
            table.add(unit, {f"{task}/{cell}": float(n) for cell, n in zip(_CELLS, amounts, strict=True)})
        return Scored(parsed_answers, table.units, table.counts, _metrics(table, tasks, rule), {"parser": rule})

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """MME's result folder: a text file for each task, lines of image, question, label and answer."""
        out.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[str]] = {}
        for question in loaded.questions:
            known, image = question.known, question.unit.partition("/")[2]
            answer = clean(answers.get(str(question.id), ""))
            line = "\t".join((image, known["plain"], known["label"].capitalize(), answer))
            rows.setdefault(known["task"], []).append(line + "\n")
        for task, lines in rows.items():
            (out / f"{task}.txt").write_text("".join(lines), "utf-8")
        return [out / f"{task}.txt" for task in rows]


def _lines(path: Path) -> list[tuple[str, str]]:
    """The two questions of a text file, and their labels as yes or no."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            question, _, label = line.rstrip().rpartition("\t")
            need(
                bool(question.strip()) and label.strip().lower() in ("yes", "no"),
                f"{path}: line {number} is not a question, a tab, and Yes or No",
            )
            found.append((question, label.strip().lower()))
    need(len(found) == 2, f"{path}: {len(found)} questions where MME has two for each image; unpack the archive again")
    return found


def _pictures(folder: Path) -> dict[str, str]:
    """Where pictures lie below a task's folder, by their names without suffix."""
    found: dict[str, str] = {}
    for place in (folder / "images", folder):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                found.setdefault(path.stem, path.relative_to(folder).as_posix())
    return found


def _bare(prompt: str) -> str:
    """The question alone, to be compared."""
    for part in ("<image>", SHORT, _ASK):
        prompt = prompt.replace(part, " ")
    return " ".join(prompt.split())


def _metrics(table: Table, tasks: Sequence[str], rule: str) -> dict[str, Statistic]:
    """Sums first, then each task's score, from 0 to 200: accuracy over questions plus accuracy over images, in percent."""
    scores: dict[str, Statistic] = {}
    parts: dict[str, Statistic] = {}
    for task in tasks:
        right, questions, both, images = (table[f"{task}/{cell}"] for cell in _CELLS)
        parts[f"{task}/acc"] = share(right, questions, scale=100.0)
        parts[f"{task}/acc+"] = share(both, images, scale=100.0)
        scores[task] = _sum([parts[f"{task}/acc"], parts[f"{task}/acc+"]])
    sums = {
        name: _sum([scores[task] for task in group if task in scores])
        for name, group in zip(_SUMS[rule], (PERCEPTION, COGNITION), strict=True)
        if any(task in scores for task in group)
    }
    return sums | scores | parts


def _sum(statistics: Sequence[Statistic]) -> Statistic:
    def statistic(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        return np.asarray(np.sum([part(sums) for part in statistics], axis=0))

    return statistic
