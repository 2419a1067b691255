"""MM-Vet: open questions that need several abilities at once, graded by a judge from 0 to 1 (Yu et al., arXiv 2308.02490).

File: `mm-vet.json`, an object of `v1_0`, `v1_1`, …, each with `imagename`, `question`, `answer`, `capability` (a list).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

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

ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
"""Recognition, reading, knowledge, generation, spatial awareness, arithmetic; in the paper's order."""
MOST_RUNS = 5
"""Of the judge, as in the paper; the official script's default is one."""


def grade(reply: str) -> float | None:
    """The official reading: what stands before the first space, as a number of 0 to 1; None if it is not one."""
    try:
        found = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return found if 0.0 <= found <= 1.0 else None


def together(abilities: Sequence[str]) -> str:
    """The name of what a question needs together, as "rec_know_gen"."""
    return "_".join(sorted(set(abilities), key=_place))


def _place(ability: str) -> tuple[int, str]:
    return (ABILITIES.index(ability) if ability in ABILITIES else len(ABILITIES), ability)


class MmVet(Benchmark):
    """See the module's docstring. LLaVA's answers number the questions without the `v1_`.

    Args:
        runs: times that the judge is asked about each answer; replies are known as `v1_0#0`, `v1_0#1`, ….
    """

    name = "mm-vet"
    max_new_tokens = 1024
    judged: ClassVar[frozenset[str]] = frozenset({OFFICIAL})
    needs = "mm-vet.json of the MM-Vet release, and with --images its pictures"

    def __init__(self, runs: int = 1):
        if not 1 <= runs <= MOST_RUNS:
            raise ValueError(f"the judge is asked 1 to {MOST_RUNS} times about an answer, not {runs}")
        self.runs = runs

    def repeated(self, repeats: int) -> MmVet:
        """Return the benchmark with each answer judged several times.

        Raises:
            BenchmarkError: the number is out of range.
        """
        try:
            return MmVet(repeats)
        except ValueError as error:
            raise BenchmarkError(f"--repeats {repeats}: {error}") from None

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "mm-vet.json", "mm*vet*.json", benchmark=self)

        def make(row: Mapping[str, Any]) -> Question:
            needs = row["capability"].split(",") if isinstance(row["capability"], str) else list(row["capability"])
            if not needs or not all(isinstance(row[k], str) for k in ("pid", "imagename", "question", "answer")):
                raise TypeError("imagename, question, answer or capability")
            known = {"reference": row["answer"], "capability": needs}
            return Question(row["pid"], row["imagename"], row["question"], row["imagename"], known)

        questions = files.parse_rows(path, "MM-Vet question", make)
        files.check_unique(path, [question.id for question in questions])
        folder = path.parent
        return BenchmarkData(questions, files.image_reader(folder, folder / "images"), {"questions": len(questions)})

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        id = row.get("question_id", row.get("id"))
        if id is None:
            return None
        return f"v1_{id}" if str(id).isdigit() else str(id)

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        found = []
        for question in loaded.questions:
            id = str(question.id)
            if id not in answers:
                continue
            # The file writes "a<AND>b"; the judge gets spaces around the words, as officially.
            reference = question.known["reference"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
            prompt = fill(prompts, "mm_vet", question=question.text, answer=reference, prediction=answers[id])
            prompt = prompt.rstrip("\n")  # the judge goes on in the table's last line
            found += [JudgeRequest(f"{id}#{run}", prompt) for run in range(self.runs)]
        return found

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A grade that cannot be read is 0, as officially after five tries; a missing answer's too."""
        said = dict(replies) if replies is not None else None
        for id in [id for id in said or () if "#" not in id]:
            assert said is not None
            said.setdefault(f"{id}#0", said[id])
        asked = [str(q.id) for q in loaded.questions if str(q.id) in answers]
        runs = [n for n in range(MOST_RUNS) if said and any(f"{id}#{n}" in said for id in asked)] or [0]
        found = needed(self, said, (f"{id}#{run}" for id in asked for run in runs))

        mixes = list(dict.fromkeys(together(q.known["capability"]) for q in loaded.questions))
        cells = [f"{mix}/{cell}" for mix in mixes for cell in ("questions", *map(str, runs))]
        table = Table(cells, loaded.units)
        parsed_answers = []
        for question in loaded.questions:
            id, mix = str(question.id), together(question.known["capability"])
            grades = [grade(found[f"{id}#{run}"]) if id in answers else None for run in runs]
            values = [value or 0.0 for value in grades]
            table.add(
                question.unit,
                {f"{mix}/questions": 1, **{f"{mix}/{run}": v for run, v in zip(runs, values, strict=True)}},
            )
            unparsed = None in grades
            parsed = " ".join("?" if value is None else f"{value:g}" for value in grades)
            parsed_answers.append(ParsedAnswer(question.id, parsed, sum(values) / len(values), unparsed, mix))

        def of(names: Sequence[str], which: Sequence[int] = runs) -> Statistic:
            over = [table[f"{name}/{run}"] for name in names for run in which]
            return share(over, [table[f"{name}/questions"] for name in names], scale=100 / len(which))

        def deviation(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
            return np.asarray(np.std([of(mixes, [run])(sums) for run in runs], axis=0))

        metrics: dict[str, Statistic] = {"total": of(mixes)}
        if len(runs) > 1:
            metrics["std"] = deviation
            metrics |= {f"run {run}/total": of(mixes, [run]) for run in runs}
        abilities = sorted({name for mix in mixes for name in mix.split("_")}, key=_place)
        metrics |= {f"capability/{name}": of([m for m in mixes if name in m.split("_")]) for name in abilities}
        metrics |= {f"integration/{mix}": of([mix]) for mix in mixes}
        protocol = {"parser": rule, "runs of the judge": len(runs), "unread replies": "graded 0"}
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """The official answer file, `{"v1_0": text, …}`."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / "mm-vet_results.json"
        rows = {str(q.id): answers[str(q.id)] for q in loaded.questions if str(q.id) in answers}
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", "utf-8")
        return [path]
