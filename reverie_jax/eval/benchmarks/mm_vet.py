"""MM-Vet: open questions that need several abilities at once, graded by a judge from 0 to 1 (Yu et al., arXiv 2308.02490).

File: `mm-vet.json`, an object of `v1_0`, `v1_1`, …, each with `imagename`, `question`, `answer`, `capability` (a list).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import OFFICIAL, BenchmarkData, BenchmarkError, JudgeRequest, Question, Texts
from reverie_jax.eval.benchmarks.judged import JudgedBenchmark, fill, require_replies
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic

ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
"""Recognition, reading, knowledge, generation, spatial awareness, arithmetic; in the paper's order."""
MAX_RUNS = 5
"""Runs of the judge in the paper; the official script's default is one."""


def grade(reply: str) -> float | None:
    """Return the number of 0 to 1 before the first space, as officially; None for anything else."""
    try:
        number = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return number if 0.0 <= number <= 1.0 else None


def joined(abilities: Sequence[str]) -> str:
    """Return the name of a combination of abilities, as "rec_know_gen"."""
    return "_".join(sorted(set(abilities), key=_order))


def _order(ability: str) -> tuple[int, str]:
    return (ABILITIES.index(ability) if ability in ABILITIES else len(ABILITIES), ability)


class MmVet(JudgedBenchmark):
    """MM-Vet, see the module's docstring. LLaVA's answer files number the questions without `v1_`.

    Args:
        runs: number of times that the judge grades each answer; the ids of the replies are `v1_0#0`, `v1_0#1`, ….
    """

    name = "mm-vet"
    metric = "mean grade"
    scale = "percent"
    published_items = 218
    max_new_tokens = 1024
    list_metrics = frozenset({"capability", "integration"})
    required_files = "mm-vet.json of the MM-Vet release, and with --images its images"

    def __init__(self, runs: int = 1):
        if not 1 <= runs <= MAX_RUNS:
            raise ValueError(f"runs must be 1 to {MAX_RUNS}, not {runs}")
        self.runs = runs

    def with_repeats(self, repeats: int) -> MmVet:
        """Return the benchmark with each answer judged several times.

        Raises:
            BenchmarkError: The number is out of range.
        """
        try:
            return MmVet(repeats)
        except ValueError as error:
            raise BenchmarkError(f"--repeats {repeats}: {error}") from None

    def load(self, data: Path) -> BenchmarkData:
        """Read `mm-vet.json`; see `Benchmark.load`."""
        path = inputs.find_file(data, "mm-vet.json", "mm*vet*.json", benchmark=self)

        def parse(row: Mapping[str, Any]) -> Question:
            abilities = row["capability"].split(",") if isinstance(row["capability"], str) else list(row["capability"])
            if not abilities or not all(isinstance(row[k], str) for k in ("pid", "imagename", "question", "answer")):
                raise TypeError("imagename, question, answer or capability")
            metadata = {"reference": row["answer"], "capability": abilities}
            return Question(row["pid"], row["imagename"], row["question"], row["imagename"], metadata)

        questions = inputs.parse_rows(path, "MM-Vet question", parse)
        inputs.check_unique(path, [question.id for question in questions])
        read_image = inputs.image_reader(path.parent, path.parent / "images")
        return BenchmarkData(questions, read_image, {"questions": len(questions)})

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by MM-Vet's ids, or by LLaVA's numbers."""
        id = row.get("question_id", row.get("id"))
        if id is None:
            return None
        return f"v1_{id}" if str(id).isdigit() else str(id)

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield the same request once for each run."""
        id = str(question.id)
        # The file writes "a<AND>b"; the judge officially gets spaces around the words.
        reference = question.metadata["reference"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        prompt = fill(prompts, "mm_vet", question=question.text, answer=reference, prediction=answers[id])
        for run in range(self.runs):
            yield JudgeRequest(f"{id}#{run}", prompt.rstrip("\n"))  # the judge completes the last line of a table

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by the grades; a missing answer, or a reply without a grade, is 0, as officially after five tries."""
        if replies is not None:  # a reply without a run's number is that of run 0
            replies = {f"{id}#0": reply for id, reply in replies.items() if "#" not in id} | dict(replies)
        answered = [str(question.id) for question, _ in loaded.answered(answers)]
        runs = [n for n in range(MAX_RUNS) if replies and any(f"{id}#{n}" in replies for id in answered)] or [0]
        replies = require_replies(self, replies, (f"{id}#{run}" for id in answered for run in runs))

        mixes = list(dict.fromkeys(joined(q.metadata["capability"]) for q in loaded.questions))
        cells = [f"{mix}/{cell}" for mix in mixes for cell in ("questions", *map(str, runs))]
        table = CountTable(cells, loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            id, mix = str(question.id), joined(question.metadata["capability"])
            grades = [grade(replies[f"{id}#{run}"]) if id in answers else None for run in runs]
            values = [value or 0.0 for value in grades]
            table.add(question.cluster, {f"{mix}/questions": 1})
            table.add(question.cluster, {f"{mix}/{run}": value for run, value in zip(runs, values, strict=True)})
            parsed = " ".join("?" if value is None else f"{value:g}" for value in grades)
            parsed_answers.append(ParsedAnswer(question.id, parsed, sum(values) / len(values), None in grades, mix))

        def average(names: Sequence[str], of_runs: Sequence[int] = runs) -> Statistic:
            columns = [f"{name}/{run}" for name in names for run in of_runs]
            return table.ratio(columns, [f"{name}/questions" for name in names], 100 / len(of_runs))

        def deviation(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
            return np.asarray(np.std([average(mixes, [run])(sums) for run in runs], axis=0))

        metrics: dict[str, Statistic] = {"total": average(mixes)}
        if len(runs) > 1:
            metrics["std"] = deviation
            metrics |= {f"run {run}/total": average(mixes, [run]) for run in runs}
        abilities = sorted({name for mix in mixes for name in mix.split("_")}, key=_order)
        metrics |= {f"capability/{name}": average([m for m in mixes if name in m.split("_")]) for name in abilities}
        metrics |= {f"integration/{mix}": average([mix]) for mix in mixes}
        protocol = {"parser": rule, "runs of the judge": len(runs), "unread replies": "graded 0"}
        return table.result(parsed_answers, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the official answer file, `{"v1_0": text, …}`."""
        texts = {str(question.id): text for question, text in loaded.answered(answers)}
        return [inputs.write_json(out / "mm-vet_results.json", texts, indent=2)]
