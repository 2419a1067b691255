"""Everything that is measured on a folder of held-out scenes, as one benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.data.reflection import WHY, WHY_WRONG, AnnotatedQuestion
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import answer_files, inputs, pope
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, OFFICIAL, Question
from reverie_jax.eval.benchmarks.scoring import ParsedAnswer, Scored
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.predict import PredictOptions
from reverie_jax.eval.predict import predict as run
from reverie_jax.scenes import scoring as free
from reverie_jax.scenes.annotator import DESCRIBE, SceneAnnotator
from reverie_jax.scenes.dataset import PICTURES, POPE_FILES, read_graphs
from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.language import mentioned

QUESTIONS = 3
"""Questions a picture whose rationales are asked for."""


def _rationale_questions(scene: Scene) -> list[AnnotatedQuestion]:
    rng = np.random.default_rng([scene.seed, 11])
    asked = SceneAnnotator({}).questions(scene, rng, 2 * QUESTIONS)
    return [question for question in asked if question.type != "open"][:QUESTIONS]


def questions(folder: Path) -> list[Question]:
    """All that is asked of a model about a folder of scenes; ids say what for: "pope/random/7", "description/0", ….

    A rationale is asked for behind the right answer, of every model alike: what is measured is whether the model's reasons
    are true, not whether its answer was.
    """
    graphs = read_graphs(folder)
    asked = []

    def add(
        kind: str, number: int, image: str, text: str, tokens: int, before: tuple[tuple[str, str], ...] = ()
    ) -> None:
        known = {"kind": kind, "number": number}
        asked.append(Question(f"{kind}/{number}", image, text, image, known, before, tokens))

    for split, file in POPE_FILES.items():
        for question in pope.read_questions(folder / file):
            if question.image not in graphs:
                raise BenchmarkError(
                    f"{folder / file}: question {question.question_id} is about unknown {question.image}"
                )
            add(f"pope/{split}", question.question_id, question.image, question.text, pope.NEW_TOKENS)
    for number, (image, scene) in enumerate(graphs.items()):
        add("description", number, image, DESCRIBE, free.DESCRIPTION_TOKENS)
        for place, known in enumerate(_rationale_questions(scene)):
            for side, prompt in enumerate((WHY, WHY_WRONG.format(answer=known.confusing_answers[0]))):
                id = (number * QUESTIONS + place) * 2 + side
                opening = ((known.question, known.correct_answer),)
                add("rationale", id, image, prompt, free.RATIONALE_TOKENS, opening)
    return asked


@dataclasses.dataclass(frozen=True)
class SceneCounts:
    """Per-picture counts, pictures in the folder's order: all that any score or interval is made of."""

    pope: Mapping[str, Float[np.ndarray, "N 4"]]
    description: Float[np.ndarray, "N 6"]
    rationale: Float[np.ndarray, "N 5"]

    def __add__(self, other: SceneCounts) -> SceneCounts:
        """Counts of several runs over the same pictures, added picture by picture."""
        return SceneCounts(
            {split: table + other.pope[split] for split, table in self.pope.items()},
            self.description + other.description,
            self.rationale + other.rationale,
        )

    @property
    def all_pope(self) -> Float[np.ndarray, "N 12"]:
        return np.concatenate([self.pope[split] for split in pope.SPLITS], axis=1)


class Scenes(Benchmark):
    """The embedded world: POPE on scenes that break the prior, descriptions, and rationales, all against exact truth."""

    name = "scenes"
    max_new_tokens = max(pope.NEW_TOKENS, free.DESCRIPTION_TOKENS, free.RATIONALE_TOKENS)
    required_files = "a folder that `reverie scenes render --split test` wrote"
    lower_is_better = frozenset({"chair_i", "chair_s", "rationale_empty"})

    def load(self, data: Path) -> BenchmarkData:
        return BenchmarkData(questions(data), inputs.image_reader(data / PICTURES), {}, {"folder": data, "graphs": read_graphs(data)})

    def hallucinated(
        self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer
    ) -> Sequence[str]:
        """See `Benchmark.hallucinated`: objects that a description mentions and the scene graph lacks."""
        if parsed.category != "description":
            return ()
        present = loaded.tables["graphs"][question.cluster].categories
        return [name for name in mentioned(text) if name not in present]

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        # What was not answered counts as an empty answer.
        answers = {str(question.id): answers.get(str(question.id), "") for question in loaded.questions}
        counts = count(loaded.tables["folder"], answers)
        tables = {"pope": counts.all_pope, "description": counts.description, "rationale": counts.rationale}
        columns, start = {}, 0
        for name, table in tables.items():
            columns[name] = slice(start, start + table.shape[1])
            start += table.shape[1]

        def of(table: str, metric: statistics.Statistic) -> statistics.Statistic:
            return lambda sums: metric(sums[..., columns[table]])

        metrics = {"pope/f1": of("pope", pope.mean_f1)}
        metrics |= {name: of(table, statistic) for name, (table, statistic) in RATES.items()}
        labels = {
            f"pope/{split}/{question.question_id}": question.label
            for split, file in POPE_FILES.items()
            for question in pope.read_questions(loaded.tables["folder"] / file)
        }
        parsed_answers = []
        for question in loaded.questions:
            id, text = str(question.id), answers[str(question.id)]
            yes = pope.says_yes(text)
            parsed = ("yes" if yes else "no") if id in labels else ""
            right = float(yes == labels[id]) if id in labels else None
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, category=question.metadata["kind"]))
        rows = np.concatenate(list(tables.values()), axis=1)
        return Scored(parsed_answers, list(read_graphs(loaded.tables["folder"])), rows, metrics)


def answer_file(folder: Path, predictions: Path) -> dict[str, str]:
    """Answers about a folder of scenes by question, from a folder that holds predictions.jsonl.

    Raises:
        BenchmarkError: see `answer_files.read_answers`.
    """
    benchmark = Scenes()
    return answer_files.read_answers(predictions / answer_files.PREDICTIONS, benchmark, benchmark.load(folder))


def score(folder: Path, predictions: Path) -> SceneCounts:
    """Scores a folder of predictions against a folder of scenes; touches no model."""
    return count(folder, answer_file(folder, predictions))


def count(folder: Path, answers: Mapping[str, str]) -> SceneCounts:
    """Counts of each picture, from answers by question."""
    graphs = read_graphs(folder)
    images, scenes = list(graphs), list(graphs.values())
    tables = {}
    for split, file in POPE_FILES.items():
        asked = pope.read_questions(folder / file)
        said = {q.question_id: answers[f"pope/{split}/{q.question_id}"] for q in asked}
        tables[split] = pope.counts(asked, said, images)
    checked = [
        [
            free.check(scene, answers[f"rationale/{id}"])
            for id in range(n * QUESTIONS * 2, (n + 1) * QUESTIONS * 2)
            if f"rationale/{id}" in answers
        ]
        for n, scene in enumerate(scenes)
    ]
    return SceneCounts(
        tables,
        free.description_counts(scenes, [answers[f"description/{n}"] for n in range(len(scenes))]),
        np.stack([free.rationale_counts(rationales) for rationales in checked]),
    )


def predict(engine: Engine, folder: Path, out: Path) -> Path:
    """Asks a model everything about a folder of scenes; see `eval.predict`."""
    benchmark = Scenes()
    options = PredictOptions(Decoding(benchmark.max_new_tokens))
    return run(engine, benchmark, benchmark.load(folder), out, options, model="", checksums={})


RATES: dict[str, tuple[str, statistics.Statistic]] = {
    "chair_i": ("description", statistics.ratio(free.HALLUCINATED, free.MENTIONS)),
    "chair_s": ("description", statistics.ratio(free.HALLUCINATING, free.CAPTIONS)),
    "coverage": ("description", statistics.ratio(free.COVERED, free.PRESENT)),
    "rationale_correct": ("rationale", statistics.ratio(free.CORRECT, free.RATIONALES)),
    "claims_true": ("rationale", statistics.ratio(free.TRUE_CLAIMS, free.CLAIMS)),
    "rationale_empty": ("rationale", statistics.ratio(free.EMPTY, free.RATIONALES)),
}


def estimates(counts: SceneCounts) -> dict[str, Any]:
    """Return every metric with its 95 % interval, as report.json has it."""
    by_split: dict[str, Any] = {}
    for split, table in counts.pope.items():
        by_split[split] = statistics.bootstrap(table, {"f1": pope.f1})["f1"].json("f1")
        sums = table.sum(0)
        by_split[split] |= {n: round(float(m(sums)), 4) for n, m in pope.METRICS.items() if n != "f1"}
    by_split["mean"] = statistics.bootstrap(counts.all_pope, {"f1": pope.mean_f1})["f1"].json("f1")
    rates = {
        name: statistics.bootstrap(getattr(counts, table), {name: statistic})[name].json("value")
        for name, (table, statistic) in RATES.items()
    }
    return {
        "pope": by_split,
        "chair": {"i": rates["chair_i"], "s": rates["chair_s"], "coverage": rates["coverage"]},
        "rationale_correct": rates["rationale_correct"],
        "rationale": {"claims_true": rates["claims_true"], "without_claim": rates["rationale_empty"]},
    }


def differences(ours: SceneCounts, theirs: SceneCounts) -> dict[str, Any]:
    """Return the headline metrics of `ours` minus those of `theirs`, paired by picture."""
    headlines = {
        "pope_mean_f1": (ours.all_pope, theirs.all_pope, pope.mean_f1),
        "pope_adversarial_f1": (ours.pope["adversarial"], theirs.pope["adversarial"], pope.f1),
    }
    for name in ("chair_i", "chair_s", "rationale_correct"):
        table, statistic = RATES[name]
        headlines[name] = (getattr(ours, table), getattr(theirs, table), statistic)
    return {
        name: statistics.differences(mine, yours, {name: statistic})[name].json("value")
        for name, (mine, yours, statistic) in headlines.items()
    }
