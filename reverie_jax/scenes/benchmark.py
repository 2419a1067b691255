"""The benchmark of held-out scenes: POPE, skills, descriptions and rationales, scored by the scene graphs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
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
from reverie_jax.eval.predict import PredictOptions, build_conversation
from reverie_jax.eval.predict import predict as predict_benchmark
from reverie_jax.scenes import annotator, scoring
from reverie_jax.scenes.annotator import SceneAnnotator
from reverie_jax.scenes.dataset import IMAGES, POPE_FILES, read_graphs
from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.language import parse_mentions
from reverie_jax.scenes.questions import DESCRIBE, SKILLS, Query

Counts = Float[np.ndarray, "N K"]
"""Counts per image, see `COLUMNS`; counts of runs on the same images add up."""
SHORT_TOKENS = 12
RATIONALES = 2
"""Questions for each image whose rationales are requested."""
_SKILLS = tuple(skill for skill in SKILLS if skill != "existence")
"""Skills that are asked for beside POPE's existence."""
_MAKERS_BY_SKILL: Mapping[str, tuple[Callable[[Scene, np.random.Generator], AnnotatedQuestion | None], ...]] = {
    "attribute": (annotator.ask_attribute, annotator.ask_color),
    "count": (annotator.ask_number, annotator.ask_count),
    "relation": (annotator.ask_relation, annotator.ask_identity, annotator.ask_place),
    "comparison": (annotator.ask_more, annotator.ask_larger),
    "two-step": (annotator.ask_two_steps,),
}
_TRIES = 100


def _focus(scene: Scene) -> frozenset[str]:
    """Return the categories of what is held out of training in a scene; all its categories if nothing is."""
    held_out = {category for pair in scene.held_out_pairs for category in pair}
    held_out |= {category for category, _, _ in scene.held_out_compositions}
    return frozenset(held_out or scene.categories)


def skill_questions(scene: Scene) -> list[tuple[str, AnnotatedQuestion]]:
    """Return questions about a scene with their skills: of each a pair with the answers Yes and No, and one with another.

    A skill whose questions the scene does not decide both ways has no pair. Where a scene shows what is held out of
    training, its questions are about that.
    """
    rng, focus = np.random.default_rng([scene.seed, 13]), _focus(scene)
    chosen = []
    for skill in _SKILLS:
        makers, found = _MAKERS_BY_SKILL[skill], dict[str, AnnotatedQuestion]()
        for attempt in range(_TRIES):
            question = makers[attempt % len(makers)](scene, rng)
            query = Query.parse(question.question) if question else None
            if question is not None and query is not None and query.subjects(scene) & focus:
                answer = question.correct_answer if question.type == "yes/no" else ""
                found.setdefault(answer, question)
            if len(found) == 3:
                break
        answers = ("Yes", "No") if {"Yes", "No"} <= found.keys() else ()
        chosen += [(skill, found[answer]) for answer in (*answers, "") if answer in found]
    return chosen


def rationale_questions(scene: Scene) -> list[AnnotatedQuestion]:
    """Return the questions about a scene whose rationales are requested, each of another skill."""
    rng, focus = np.random.default_rng([scene.seed, 11]), _focus(scene)
    by_skill: dict[str, AnnotatedQuestion] = {}
    for question in SceneAnnotator({}).questions(scene, rng, 6 * RATIONALES):
        query = Query.parse(question.question)
        if query is not None and query.skill and query.subjects(scene) & focus:
            by_skill.setdefault(query.skill, question)
    return list(by_skill.values())[:RATIONALES]


def build_questions(folder: Path) -> list[Question]:
    """Build all questions about a folder of scenes; ids name kind and number, as "pope/random/7" or "skill/count/2".

    A rationale is requested after the right answer, whatever the model would have answered: its reasons are measured, not
    its answer. Metadata have the right `answer` and the confusing one (`wrong`) of POPE's and the skills' questions, and the
    question that a rationale is `about`.

    Raises:
        BenchmarkError: a POPE file asks about an unknown image.
    """
    graphs = read_graphs(folder)
    questions = []

    def add(
        kind: str,
        number: int,
        image: str,
        text: str,
        tokens: int,
        history: tuple[tuple[str, str], ...] = (),
        **metadata: str,
    ) -> None:
        metadata |= {"kind": kind}
        questions.append(Question(f"{kind}/{number}", image, text, image, metadata, history, tokens))

    for split, file in POPE_FILES.items():
        for question in pope.read_questions(folder / file):
            if question.image not in graphs:
                raise BenchmarkError(
                    f"{folder / file}: question {question.question_id}: unknown image {question.image}"
                )
            right, wrong = ("Yes", "No") if question.label else ("No", "Yes")
            where = f"pope/{split}", question.question_id, question.image, question.text
            add(*where, pope.NEW_TOKENS, answer=right, wrong=wrong)
    for number, (image, scene) in enumerate(graphs.items()):
        for index, (skill, asked) in enumerate(skill_questions(scene)):
            where = f"skill/{skill}", number * 3 * len(_SKILLS) + index, image, asked.question
            add(*where, SHORT_TOKENS, answer=asked.correct_answer, wrong=asked.confusing_answers[0])
        add("description", number, image, DESCRIBE, scoring.DESCRIPTION_TOKENS)
        for index, asked in enumerate(rationale_questions(scene)):
            for side, prompt in enumerate((WHY, WHY_WRONG.format(answer=asked.confusing_answers[0]))):
                id = (number * RATIONALES + index) * 2 + side
                history = ((asked.question, asked.correct_answer),)
                add("rationale", id, image, prompt, scoring.RATIONALE_TOKENS, history, about=asked.question)
    return questions


_BINS = 10
_WIDTHS = {
    **{f"pope/{split}": 4 for split in pope_files.SPLITS},
    **{f"skill/{skill}": 3 for skill in _SKILLS},
    "short": 2,
    "calibration": 2 * _BINS,
    "description": 6,
    "rationale": 6,
}
_ENDS = np.cumsum(list(_WIDTHS.values()))
COLUMNS: dict[str, slice] = {
    name: slice(int(end) - width, int(end)) for (name, width), end in zip(_WIDTHS.items(), _ENDS, strict=True)
}
"""Columns of the counts of an image, by table.

POPE's confusion matrices; right, asked and answered with Yes, of each skill's questions with the answers Yes and No; right
and asked, of those with other answers; the sum of probability minus truth and the number of answers, of each of ten bins of
the probability of Yes; see `scoring` for the others.
"""
_RIGHT, _ASKED, _YES = range(3)


def count_answers(
    graphs: Mapping[str, Scene], questions: Sequence[Question], answers: Mapping[str, str], yes: Mapping[str, float]
) -> Counts:
    """Count per image what answers say about scenes.

    Args:
        graphs: the scenes by image.
        questions: about them, from `build_questions`.
        answers: by question.
        yes: probabilities of Yes, by question; calibration is counted over these.

    Returns:
        Counts, float [images, columns] (see `COLUMNS`), from which all scores and intervals are computed.
    """
    counts = np.zeros((len(graphs), _ENDS[-1]))
    rows = {image: counts[number] for number, image in enumerate(graphs)}
    for question in questions:
        id, row, scene = str(question.id), rows[question.cluster], graphs[question.cluster]
        kind, text, truth = question.metadata["kind"], answers[id], question.metadata.get("answer")
        if kind == "description":
            row[COLUMNS[kind]] += scoring.description_counts([scene], [text])[0]
        elif kind == "rationale":
            checked = scoring.check_rationale(scene, text, question.metadata["about"])
            row[COLUMNS[kind]] += scoring.rationale_counts([checked])
        elif truth not in ("Yes", "No"):
            row[COLUMNS["short"]] += (is_right(question, text), 1)
        elif kind.startswith("skill/"):
            row[COLUMNS[kind]] += (is_right(question, text), 1, pope.says_yes(text))
        else:
            said = pope.says_yes(text)
            cell = (pope.TP if said else pope.FN) if truth == "Yes" else (pope.FP if said else pope.TN)
            row[COLUMNS[kind]][cell] += 1
        if truth in ("Yes", "No") and id in yes:
            bin = min(int(yes[id] * _BINS), _BINS - 1)
            row[COLUMNS["calibration"]][2 * bin : 2 * bin + 2] += (yes[id] - (truth == "Yes"), 1)
    return counts


def is_right(question: Question, answer: str) -> bool:
    """Return whether an answer is right: by POPE's rule, or if it has the right answer's words and not the wrong one's.

    Args:
        question: with a right answer.
        answer: the model's.
    """
    right, wrong = question.metadata["answer"], question.metadata["wrong"]
    if right in ("Yes", "No"):
        return pope.says_yes(answer) == (right == "Yes")
    words = f" {re.sub(r'[^a-z]+', ' ', answer.lower())} "
    return f" {right.removeprefix('the ')} " in words and f" {wrong.removeprefix('the ')} " not in words


def is_good(scene: Scene, question: Question, text: str) -> bool:
    """Return whether an answer is right, a description names nothing that is not there, or a rationale is correct."""
    kind = question.metadata["kind"]
    if kind == "rationale":
        return scoring.check_rationale(scene, text, question.metadata["about"]).correct
    if kind == "description":
        return not scoring.description_counts([scene], [text])[0, scoring.HALLUCINATED]
    return is_right(question, text)


def _of(table: str, statistic: statistics.Statistic) -> statistics.Statistic:
    return lambda sums: statistic(sums[..., COLUMNS[table]])


def _mean(parts: Sequence[statistics.Statistic]) -> statistics.Statistic:
    return lambda sums: np.nanmean([part(sums) for part in parts], axis=0)


def _calibration_error(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
    bins = sums[..., COLUMNS["calibration"]].reshape(*sums.shape[:-1], _BINS, 2)
    return np.asarray(np.abs(bins[..., 0]).sum(-1) / np.maximum(bins[..., 1].sum(-1), 1.0))


def _object_f1(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
    precise, covered = 1 - METRICS["chair_i"](sums), METRICS["coverage"](sums)
    return np.asarray(2 * precise * covered / np.maximum(precise + covered, 1e-12))


def _over_splits(statistic: statistics.Statistic) -> statistics.Statistic:
    return _mean([_of(f"pope/{split}", statistic) for split in pope_files.SPLITS])


METRICS: dict[str, statistics.Statistic] = {
    "pope/f1": _over_splits(pope.f1),
    "pope/accuracy": _over_splits(pope.accuracy),
    "pope/yes_ratio": _over_splits(pope.yes_ratio),
    **{f"pope/{split}/f1": _of(f"pope/{split}", pope.f1) for split in pope_files.SPLITS},
    **{f"pope/{split}/accuracy": _of(f"pope/{split}", pope.accuracy) for split in pope_files.SPLITS},
    "skills": _mean([_of(f"skill/{skill}", statistics.ratio(_RIGHT, _ASKED, empty=np.nan)) for skill in _SKILLS]),
    "skills/yes_ratio": _mean(
        [_of(f"skill/{skill}", statistics.ratio(_YES, _ASKED, empty=np.nan)) for skill in _SKILLS]
    ),
    **{f"skill/{skill}": _of(f"skill/{skill}", statistics.ratio(_RIGHT, _ASKED)) for skill in _SKILLS},
    "short_answers": _of("short", statistics.ratio(_RIGHT, _ASKED)),
    "calibration_error": _calibration_error,
    "chair_i": _of("description", statistics.ratio(scoring.HALLUCINATED, scoring.MENTIONS)),
    "chair_s": _of("description", statistics.ratio(scoring.HALLUCINATING, scoring.CAPTIONS)),
    "coverage": _of("description", statistics.ratio(scoring.COVERED, scoring.PRESENT)),
    "object_f1": _object_f1,
    "rationale_correct": _of("rationale", statistics.ratio(scoring.CORRECT, scoring.RATIONALES)),
    "rationale_relevant": _of("rationale", statistics.ratio(scoring.RELEVANT, scoring.RATIONALES)),
    "rationale_empty": _of("rationale", statistics.ratio(scoring.EMPTY, scoring.RATIONALES)),
    "claims_true": _of("rationale", statistics.ratio(scoring.TRUE_CLAIMS, scoring.CLAIMS)),
}
"""All scores, as functions of summed counts.

`skills` is the mean over the skills' questions with the answers Yes and No, which are as many (0.5 by chance); `object_f1`
is the harmonic mean of 1 - CHAIRi and coverage: a description that says less does not gain by it.
"""


LABELS = {
    "pope/accuracy": "POPE accuracy",
    "pope/f1": "POPE F1",
    "pope/adversarial/accuracy": "adversarial accuracy",
    "pope/adversarial/f1": "adversarial F1",
    "pope/yes_ratio": "share of yes",
    "skills": "reasoning accuracy",
    "skill/attribute": "attributes",
    "skill/count": "counts",
    "skill/relation": "relations",
    "skill/comparison": "comparisons",
    "skill/two-step": "two steps",
    "short_answers": "short answers",
    "calibration_error": "calibration error",
    "chair_i": "CHAIRi",
    "chair_s": "CHAIRs",
    "coverage": "coverage",
    "object_f1": "objects F1",
    "rationale_correct": "correct rationales",
    "rationale_relevant": "relevant rationales",
}
"""Names of scores for readers."""
LOWER_IS_BETTER = frozenset({"chair_i", "chair_s", "rationale_empty", "calibration_error"})


class Scenes(Benchmark):
    """Held-out scenes that break the prior: POPE, skills, descriptions and rationales, scored by exact scene graphs."""

    name = "scenes"
    max_new_tokens = max(pope.NEW_TOKENS, scoring.DESCRIPTION_TOKENS, scoring.RATIONALE_TOKENS)
    required_files = "a folder that `reverie scenes render --split test` wrote"
    lower_is_better = LOWER_IS_BETTER
    scale = "from 0 to 1"

    def load(self, data: Path) -> BenchmarkData:
        """See `Benchmark.load`."""
        return BenchmarkData(
            build_questions(data), inputs.image_reader(data / IMAGES), {}, {"graphs": read_graphs(data)}
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
        graphs = data.tables["graphs"]
        parsed_answers = []
        for question in data.questions:
            text, truth = answers[str(question.id)], question.metadata.get("answer")
            said = ("yes" if pope.says_yes(text) else "no") if truth in ("Yes", "No") else ""
            right = None if truth is None else float(is_right(question, text))
            parsed_answers.append(ParsedAnswer(question.id, said, right, category=question.metadata["kind"]))
        metrics = {name: metric for name, metric in METRICS.items() if name != "calibration_error"}
        return Scored(parsed_answers, list(graphs), count_answers(graphs, data.questions, answers, {}), metrics)


def read_predictions(folder: Path, predictions: Path) -> dict[str, str]:
    """Read the answers about a folder of scenes, by question, from a folder with predictions.jsonl.

    Raises:
        BenchmarkError: see `answer_files.read_answers`.
    """
    benchmark = Scenes()
    return answer_files.read_answers(predictions / answer_files.PREDICTIONS, benchmark, benchmark.load(folder))


def _is_short(question: Question) -> bool:
    return str(question.metadata["kind"]).startswith(("pope/", "skill/"))


def count_predictions(folder: Path, predictions: Path, *, partial: bool = False) -> Counts:
    """Count what a folder of predictions says about a folder of scenes, see `count_answers` and `read_predictions`.

    Args:
        folder: of the scenes.
        predictions: folder with predictions.jsonl.
        partial: allow missing answers, which count as empty ones.
    """
    benchmark = Scenes()
    data = benchmark.load(folder)
    file = answer_files.read_answer_file(predictions / answer_files.PREDICTIONS, benchmark, data, partial=partial)
    texts = {str(question.id): file.texts.get(str(question.id), "") for question in data.questions}
    yes = {id: row["metadata"]["yes"] for id, row in file.rows.items() if "yes" in (row.get("metadata") or {})}
    return count_answers(data.tables["graphs"], data.questions, texts, yes)


def predict(
    engine: Engine, folder: Path, out: Path, decoding: Decoding | None = None, *, reflect: bool = False
) -> Path:
    """Answer all questions about a folder of scenes with a model; return the file of predictions, see `eval.predict`.

    Args:
        engine: decodes the answers.
        folder: of the scenes.
        out: output folder.
        decoding: how to decode; greedily if omitted.
        reflect: answer, explain and answer again; questions about descriptions and rationales are left out.
    """
    benchmark = Scenes()
    data = benchmark.load(folder)
    opening = build_conversation(data.questions[0])
    track = tuple(engine.first_token(opening, word) for word in ("Yes", "No"))
    decoding = dataclasses.replace(decoding or Decoding(benchmark.max_new_tokens), track=track)
    options = PredictOptions(decoding, reflect=reflect)
    if reflect:
        data = dataclasses.replace(data, questions=[question for question in data.questions if _is_short(question)])
    return predict_benchmark(engine, benchmark, data, out, options, model="", checksums={})


def estimates(counts: Counts) -> dict[str, Any]:
    """Return every score with its 95 % interval, as report.json has it."""
    found = statistics.bootstrap(counts, METRICS)
    return {name: estimate.json("value") for name, estimate in found.items()}


def differences(ours: Counts, theirs: Counts, metrics: Sequence[str] = tuple(METRICS)) -> dict[str, Any]:
    """Return scores of `ours` minus those of `theirs`, paired by image."""
    found = statistics.differences(ours, theirs, {name: METRICS[name] for name in metrics})
    return {name: estimate.json("value") for name, estimate in found.items()}
