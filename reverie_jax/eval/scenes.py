"""Everything that is measured on a folder of held-out scenes: inference writes files, scoring reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.data.annotate.interface import AnnotatedQuestion
from reverie_jax.data.annotate.stages import WHY, WHY_WRONG
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.pipeline import Picture
from reverie_jax.data.scenes.annotator import DESCRIBE, SceneAnnotator
from reverie_jax.data.scenes.dataset import PICTURES, POPE_FILES, read_graphs
from reverie_jax.data.scenes.graph import Scene
from reverie_jax.errors import UserError
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import pope
from reverie_jax.eval.benchmarks import scenes as free
from reverie_jax.eval.engine import Engine

QUESTIONS = 3
"""Questions a picture whose rationales are asked for."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One thing that is asked of a model, and what its answer counts for.

    Attributes:
        benchmark: "pope/random", …, "description" or "rationale".
        id: the benchmark's own id of the question.
    """

    benchmark: str
    id: int
    image: str
    talk: Conversation
    tokens: int


def _rationale_questions(scene: Scene) -> list[AnnotatedQuestion]:
    rng = np.random.default_rng([scene.seed, 11])
    asked = SceneAnnotator({}).questions(scene, rng, 2 * QUESTIONS)
    return [question for question in asked if question.type != "open"][:QUESTIONS]


def questions(folder: Path) -> list[Asked]:
    """All that is asked of a model about a folder of scenes.

    A rationale is asked for behind the right answer, of every model alike: what is measured is whether the model's reasons
    are true, not whether its answer was.
    """
    graphs = read_graphs(folder)
    asked = []
    for split, file in POPE_FILES.items():
        for question in pope.read_questions(folder / file):
            if question.image not in graphs:
                raise UserError(f"{folder / file}: question {question.question_id} is about unknown {question.image}")
            talk = pope.conversation(question)
            asked.append(Asked(f"pope/{split}", question.question_id, question.image, talk, pope.NEW_TOKENS))
    for number, (image, scene) in enumerate(graphs.items()):
        talk = Conversation((Turn("user", f"{IMAGE}\n{DESCRIBE}"),))
        asked.append(Asked("description", number, image, talk, free.DESCRIPTION_TOKENS))
        for place, known in enumerate(_rationale_questions(scene)):
            opening = (Turn("user", f"{IMAGE}\n{known.question}"), Turn("assistant", known.correct_answer))
            for side, prompt in enumerate((WHY, WHY_WRONG.format(answer=known.confusing_answers[0]))):
                talk = Conversation((*opening, Turn("user", prompt)))
                id = (number * QUESTIONS + place) * 2 + side
                asked.append(Asked("rationale", id, image, talk, free.RATIONALE_TOKENS))
    return asked


def predict(
    engine: Engine, folder: Path, out: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Asks a model everything, and writes `out`/<benchmark>.jsonl with `question_id`, `image`, `text` lines."""
    asked = questions(folder)
    encoded = {image: (folder / PICTURES / image).read_bytes() for image in {a.image for a in asked}}
    done, texts = 0, {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, len(asked)), len(asked))

    for tokens in sorted({a.tokens for a in asked}):
        by_image: dict[str, list[tuple[int, Conversation]]] = {}
        for number, a in enumerate(asked):
            if a.tokens == tokens:
                by_image.setdefault(a.image, []).append((number, a.talk))
        pictures = [Picture(image, encoded[image], talks) for image, talks in by_image.items()]
        texts.update(engine.answer(pictures, new_tokens=tokens, progress=advance))
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, a in enumerate(asked):
        rows.setdefault(a.benchmark, []).append({"question_id": a.id, "image": a.image, "text": texts[number]})
    for benchmark, lines in rows.items():
        path = out / f"{benchmark.replace('/', '_')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def read_predictions(path: Path) -> dict[int, str]:
    """Answers by question id, from a predictions file.

    Raises:
        BenchmarkError: the file is missing, a line is broken, or an id stands there twice.
    """
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        answers = {int(line["question_id"]): line["text"] for line in lines}
        if not all(isinstance(text, str) for text in answers.values()):
            raise TypeError("'text' must be a string")
    except OSError as error:
        raise pope.BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise pope.BenchmarkError(f"{path}: not a predictions file ({error!r})") from None
    if len(answers) != len(lines):
        raise pope.BenchmarkError(f"{path}: a question_id stands there twice")
    return answers


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


def score(folder: Path, predictions: Path) -> SceneCounts:
    """Scores prediction files against a folder of scenes; touches no model."""
    graphs = read_graphs(folder)
    images = list(graphs)
    tables = {
        split: pope.counts(
            pope.read_questions(folder / file), read_predictions(predictions / f"pope_{split}.jsonl"), images
        )
        for split, file in POPE_FILES.items()
    }
    described = read_predictions(predictions / "description.jsonl")
    reasons = read_predictions(predictions / "rationale.jsonl")
    scenes = list(graphs.values())
    for name, found in (("description", described), ("rationale", reasons)):
        missing = {a.id for a in questions(folder) if a.benchmark == name} - found.keys()
        if missing:
            raise pope.BenchmarkError(f"{predictions}: {len(missing)} {name}(s) missing, the first is {min(missing)}")
    checked = [
        [free.check(scene, reasons[id]) for id in range(n * QUESTIONS * 2, (n + 1) * QUESTIONS * 2) if id in reasons]
        for n, scene in enumerate(scenes)
    ]
    return SceneCounts(
        tables,
        free.description_counts(scenes, [described[n] for n in range(len(scenes))]),
        np.stack([free.rationale_counts(rationales) for rationales in checked]),
    )


RATES: dict[str, tuple[str, statistics.Statistic]] = {
    "chair_i": ("description", statistics.ratio(free.HALLUCINATED, free.MENTIONS)),
    "chair_s": ("description", statistics.ratio(free.HALLUCINATING, free.CAPTIONS)),
    "coverage": ("description", statistics.ratio(free.COVERED, free.PRESENT)),
    "rationale_correct": ("rationale", statistics.ratio(free.CORRECT, free.RATIONALES)),
    "claims_true": ("rationale", statistics.ratio(free.TRUE_CLAIMS, free.CLAIMS)),
    "rationale_empty": ("rationale", statistics.ratio(free.EMPTY, free.RATIONALES)),
}


def estimates(counts: SceneCounts) -> dict[str, Any]:
    """Every metric with its 95 % interval, as report.json has it."""
    weights = statistics.resamples(len(counts.description))
    by_split: dict[str, Any] = {}
    for split, table in counts.pope.items():
        by_split[split] = statistics.bootstrap(table, pope.f1, weights).json("f1")
        sums = table.sum(0)
        by_split[split] |= {n: round(float(m(sums)), 4) for n, m in pope.METRICS.items() if n != "f1"}
    by_split["mean"] = statistics.bootstrap(counts.all_pope, pope.mean_f1, weights).json("f1")
    rates = {
        name: statistics.bootstrap(getattr(counts, table), statistic, weights).json("value")
        for name, (table, statistic) in RATES.items()
    }
    return {
        "pope": by_split,
        "chair": {"i": rates["chair_i"], "s": rates["chair_s"], "coverage": rates["coverage"]},
        "rationale_correct": rates["rationale_correct"],
        "rationale": {"claims_true": rates["claims_true"], "without_claim": rates["rationale_empty"]},
    }


def differences(ours: SceneCounts, theirs: SceneCounts) -> dict[str, Any]:
    """Headline metrics of `ours` minus those of `theirs`, paired by picture."""
    weights = statistics.resamples(len(ours.description))
    found = {
        "pope_mean_f1": statistics.difference(ours.all_pope, theirs.all_pope, pope.mean_f1, weights),
        "pope_adversarial_f1": statistics.difference(
            ours.pope["adversarial"], theirs.pope["adversarial"], pope.f1, weights
        ),
    }
    for name in ("chair_i", "chair_s", "rationale_correct"):
        table, statistic = RATES[name]
        found[name] = statistics.difference(getattr(ours, table), getattr(theirs, table), statistic, weights)
    return {name: estimate.json("value") for name, estimate in found.items()}
