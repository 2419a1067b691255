"""The benchmark of held-out scenes: POPE, descriptions and rationales, scored by the scene graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.data.reflection import WHY, WHY_WRONG, AnnotatedQuestion
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import answer_files, inputs, pope, pope_files
from reverie_jax.eval.benchmarks.interface import OFFICIAL, Benchmark, BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.benchmarks.scoring import ParsedAnswer, Scored
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.predict import PredictOptions
from reverie_jax.eval.predict import predict as predict_benchmark
from reverie_jax.scenes import scoring
from reverie_jax.scenes.annotator import DESCRIBE, SceneAnnotator
from reverie_jax.scenes.dataset import IMAGES, POPE_FILES, read_graphs
from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.language import parse_mentions

QUESTIONS = 3
"""Questions for each image whose rationales are requested."""


def _rationale_questions(scene: Scene) -> list[AnnotatedQuestion]:
    rng = np.random.default_rng([scene.seed, 11])
    questions = SceneAnnotator({}).questions(scene, rng, 2 * QUESTIONS)
    return [question for question in questions if question.type != "open"][:QUESTIONS]


def build_questions(folder: Path) -> list[Question]:
    """Build all questions about a folder of scenes; ids name kind and number, as "pope/random/7" or "description/0".

    A rationale is requested after the right answer, whatever the model would have answered: its reasons are measured, not
    its answer.

    Raises:
        BenchmarkError: a POPE file asks about an unknown image.
    """
    graphs = read_graphs(folder)
    questions = []

    def add(
        kind: str, number: int, image: str, text: str, tokens: int, history: tuple[tuple[str, str], ...] = ()
    ) -> None:
        metadata = {"kind": kind, "number": number}
        questions.append(Question(f"{kind}/{number}", image, text, image, metadata, history, tokens))

    for split, file in POPE_FILES.items():
        for question in pope.read_questions(folder / file):
            if question.image not in graphs:
                raise BenchmarkError(
                    f"{folder / file}: question {question.question_id}: unknown image {question.image}"
                )
            add(f"pope/{split}", question.question_id, question.image, question.text, pope.NEW_TOKENS)
    for number, (image, scene) in enumerate(graphs.items()):
        add("description", number, image, DESCRIBE, scoring.DESCRIPTION_TOKENS)
        for index, annotated in enumerate(_rationale_questions(scene)):
            for side, prompt in enumerate((WHY, WHY_WRONG.format(answer=annotated.confusing_answers[0]))):
                id = (number * QUESTIONS + index) * 2 + side
                history = ((annotated.question, annotated.correct_answer),)
                add("rationale", id, image, prompt, scoring.RATIONALE_TOKENS, history)
    return questions


@dataclasses.dataclass(frozen=True)
class SceneCounts:
    """Counts per image, in the folder's order, from which all scores and intervals are computed.

    Attributes:
        pope: counts of each split, as `pope.counts` returns them.
        description: see `scoring.description_counts`.
        rationale: see `scoring.rationale_counts`.
    """

    pope: Mapping[str, Float[np.ndarray, "N 4"]]
    description: Float[np.ndarray, "N 6"]
    rationale: Float[np.ndarray, "N 5"]

    def __add__(self, other: SceneCounts) -> SceneCounts:
        """Add the counts of another run on the same images, image by image."""
        return SceneCounts(
            {split: table + other.pope[split] for split, table in self.pope.items()},
            self.description + other.description,
            self.rationale + other.rationale,
        )

    @property
    def all_pope(self) -> Float[np.ndarray, "N 12"]:
        """Counts of all POPE splits side by side."""
        return np.concatenate([self.pope[split] for split in pope_files.SPLITS], axis=1)


class Scenes(Benchmark):
    """Held-out scenes that break the prior: POPE, descriptions and rationales, scored by exact scene graphs."""

    name = "scenes"
    max_new_tokens = max(pope.NEW_TOKENS, scoring.DESCRIPTION_TOKENS, scoring.RATIONALE_TOKENS)
    required_files = "a folder that `reverie scenes render --split test` wrote"
    lower_is_better = frozenset({"chair_i", "chair_s", "rationale_empty"})
    scale = "from 0 to 1"

    def load(self, data: Path) -> BenchmarkData:
        """See `Benchmark.load`."""
        return BenchmarkData(
            build_questions(data), inputs.image_reader(data / IMAGES), {}, {"folder": data, "graphs": read_graphs(data)}
        )

    def hallucinated(self, data: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`: objects that a description mentions and the scene graph lacks."""
        if parsed.category != "description":
            return ()
        present = data.tables["graphs"][question.cluster].categories
        return [name for name in parse_mentions(text) if name not in present]

    def score(
        self,
        data: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """See `Benchmark.score`; a missing answer counts as an empty one."""
        answers = {str(question.id): answers.get(str(question.id), "") for question in data.questions}
        counts = count_answers(data.tables["folder"], answers)
        tables = {"pope": counts.all_pope, "description": counts.description, "rationale": counts.rationale}
        columns, start = {}, 0
        for name, table in tables.items():
            columns[name] = slice(start, start + table.shape[1])
            start += table.shape[1]

        def select(table: str, metric: statistics.Statistic) -> statistics.Statistic:
            return lambda sums: metric(sums[..., columns[table]])

        metrics = {"pope/f1": select("pope", pope.mean_f1)}
        metrics |= {name: select(table, statistic) for name, (table, statistic) in RATES.items()}
        labels = {
            f"pope/{split}/{question.question_id}": question.label
            for split, file in POPE_FILES.items()
            for question in pope.read_questions(data.tables["folder"] / file)
        }
        parsed_answers = []
        for question in data.questions:
            id, text = str(question.id), answers[str(question.id)]
            yes = pope.says_yes(text)
            parsed = ("yes" if yes else "no") if id in labels else ""
            right = float(yes == labels[id]) if id in labels else None
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, category=question.metadata["kind"]))
        rows = np.concatenate(list(tables.values()), axis=1)
        return Scored(parsed_answers, list(read_graphs(data.tables["folder"])), rows, metrics)


def read_predictions(folder: Path, predictions: Path) -> dict[str, str]:
    """Read the answers about a folder of scenes, by question, from a folder with predictions.jsonl.

    Raises:
        BenchmarkError: see `answer_files.read_answers`.
    """
    benchmark = Scenes()
    return answer_files.read_answers(predictions / answer_files.PREDICTIONS, benchmark, benchmark.load(folder))


def count_predictions(folder: Path, predictions: Path) -> SceneCounts:
    """Count what a folder of predictions says about a folder of scenes, see `read_predictions`."""
    return count_answers(folder, read_predictions(folder, predictions))


def count_answers(folder: Path, answers: Mapping[str, str]) -> SceneCounts:
    """Count per image what answers, by question, say about a folder of scenes."""
    graphs = read_graphs(folder)
    images, scenes = list(graphs), list(graphs.values())
    tables = {}
    for split, file in POPE_FILES.items():
        questions = pope.read_questions(folder / file)
        texts = {question.question_id: answers[f"pope/{split}/{question.question_id}"] for question in questions}
        tables[split] = pope.counts(questions, texts, images)
    checked = [
        [
            scoring.check_rationale(scene, answers[f"rationale/{id}"])
            for id in range(n * QUESTIONS * 2, (n + 1) * QUESTIONS * 2)
            if f"rationale/{id}" in answers
        ]
        for n, scene in enumerate(scenes)
    ]
    return SceneCounts(
        tables,
        scoring.description_counts(scenes, [answers[f"description/{n}"] for n in range(len(scenes))]),
        np.stack([scoring.rationale_counts(rationales) for rationales in checked]),
    )


def predict(engine: Engine, folder: Path, out: Path) -> Path:
    """Answer all questions about a folder of scenes with a model; return the file of predictions, see `eval.predict`."""
    benchmark = Scenes()
    options = PredictOptions(Decoding(benchmark.max_new_tokens))
    return predict_benchmark(engine, benchmark, benchmark.load(folder), out, options, model="", checksums={})


RATES: dict[str, tuple[str, statistics.Statistic]] = {
    "chair_i": ("description", statistics.ratio(scoring.HALLUCINATED, scoring.MENTIONS)),
    "chair_s": ("description", statistics.ratio(scoring.HALLUCINATING, scoring.CAPTIONS)),
    "coverage": ("description", statistics.ratio(scoring.COVERED, scoring.PRESENT)),
    "rationale_correct": ("rationale", statistics.ratio(scoring.CORRECT, scoring.RATIONALES)),
    "claims_true": ("rationale", statistics.ratio(scoring.TRUE_CLAIMS, scoring.CLAIMS)),
    "rationale_empty": ("rationale", statistics.ratio(scoring.EMPTY, scoring.RATIONALES)),
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
    """Return the headline metrics of `ours` minus those of `theirs`, paired by image."""
    headlines: dict[str, tuple[Any, Any, statistics.Statistic]] = {
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
