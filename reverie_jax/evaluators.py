"""Evaluation during training: benchmark scores and sampled answers, by the engine that `reverie eval` uses."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import shutil
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.errors import UserError
from reverie_jax.eval.answer_log import on_first_process
from reverie_jax.eval.benchmarks.answer_files import SCORES
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.predict import PredictOptions, predict
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.eval.score import score, write_score
from reverie_jax.train.evaluator import Evaluation, Sample, Snapshot

FOLDER = "evaluations"
"""Folder of a run folder: answers and scores, by step and benchmark."""
_SHAPE = EngineShape(sequence_length=4096)
_SAMPLE_TOKENS = 128
"""Maximum length of a sampled answer."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def subset(data: BenchmarkData, limit: int | None) -> BenchmarkData:
    """Return at most `limit` of a benchmark's questions: all of some clusters, spread evenly; at least one cluster's.

    Whole clusters (mostly the questions about an image), since metrics over pairs need both, and a picture is computed once.
    """
    questions = data.available
    if limit is None or len(questions) <= limit:
        return dataclasses.replace(data, questions=questions)
    sizes = collections.Counter(question.cluster for question in questions)
    names, count = list(sizes), max(1, limit * len(sizes) // len(questions))
    while count > 1 and sum(sizes[name] for name in _spread(names, count)) > limit:
        count -= 1
    chosen = set(_spread(names, count))
    return dataclasses.replace(data, questions=[question for question in questions if question.cluster in chosen])


def _spread(items: Sequence[_T], count: int) -> list[_T]:
    """Return `count` items at even distances."""
    return [items[number * len(items) // count] for number in range(count)]


class BenchmarkEvaluator:
    """Answers benchmarks and scores them by their own rule. The model's adapters are not merged, and it stays quantized.

    Args:
        benchmarks: With their questions.
        every: Steps between evaluations.
        metric: By which the best checkpoint is chosen, as "pope/adversarial/f1"; the first benchmark's headline if empty.

    Raises:
        UserError: A benchmark needs a judge or labels that are missing, or none has the metric.
    """

    at_start = True
    """What cannot be answered is an error before the first step; and there is a score to compare with."""

    def __init__(self, benchmarks: Sequence[tuple[Benchmark, BenchmarkData]], every: int, metric: str = ""):
        if judged := [item.name for item, _ in benchmarks if item.rules[0] in item.judged_rules]:
            raise UserError(
                f"--eval {', '.join(judged)}: a judge scores it; leave it out, and use `reverie eval` later"
            )
        self.every, self.benchmarks = every, benchmarks
        self.metrics: dict[str, bool] = {}  # whether less is better
        for item, data in benchmarks:
            blank = item.score(data, {str(question.id): "" for question in data.questions}, item.rules[0])
            for name in blank.metrics:
                self.metrics[f"{item.name}/{name}"] = name.rpartition("/")[2] in item.lower_is_better
        self.metric = metric or next(iter(self.metrics))
        if self.metric not in self.metrics:
            raise UserError(f"--eval-metric {metric}: must be one of {', '.join(self.metrics)}")

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        """Return all metrics, as `eval/pope/...`; none where answers cannot be written, as on a full disk."""
        if snapshot.step == 0:  # of a run that left no checkpoint
            on_first_process(lambda: shutil.rmtree(snapshot.folder / FOLDER, ignore_errors=True))
        engine = Engine(snapshot.model, snapshot.processor, _SHAPE, mesh=snapshot.mesh)
        values = np.full(len(self.metrics), np.nan)
        try:
            for item, data in self.benchmarks:
                self._evaluate(engine, item, data, snapshot, values)
        except UserError as error:
            if snapshot.step == 0:
                raise
            _log.error("step %d: not evaluated: %s", snapshot.step, error)
            return Evaluation()
        if jax.process_count() > 1:  # as bits: JAX would round the doubles
            values = np.asarray(multihost_utils.broadcast_one_to_all(values.view(np.uint32))).view(np.float64)
        found = dict(zip(self.metrics, values.tolist(), strict=True))
        best = found[self.metric]
        _log.info("step %d: %s is %.4f", snapshot.step, self.metric, best)
        metrics = {f"eval/{name}": value for name, value in found.items()}
        return Evaluation(metrics, (-best if self.metrics[self.metric] else best) if math.isfinite(best) else None)

    def _evaluate(
        self, engine: Engine, item: Benchmark, data: BenchmarkData, snapshot: Snapshot, values: np.ndarray
    ) -> None:
        """Answer a benchmark; on process 0, score the answers and put the metrics into `values`, in their order."""
        out = snapshot.folder / FOLDER / f"{snapshot.step}" / item.name
        # Answers that a run left there that was interrupted may be those of other devices, and differ by rounding.
        on_first_process(lambda: shutil.rmtree(out, ignore_errors=True))
        options = PredictOptions(Decoding(item.max_new_tokens, beams=item.beams))
        record: Any = {"model": f"{snapshot.folder.name}@{snapshot.step}", "checksums": {}}
        predictions = predict(engine, item, data, out, options, **record)

        def rate() -> None:
            result = score(item, data, predictions)
            write_score(result, out / SCORES)
            for number, name in enumerate(self.metrics):
                if name.startswith(f"{item.name}/"):
                    values[number] = result.metrics.get(name.removeprefix(f"{item.name}/"), np.nan)

        on_first_process(rate)


class SampleEvaluator:
    """Answers the first question about each of a few images.

    Args:
        records: To choose from, spread evenly.
        every: Steps between samples.
        count: Number of questions.
    """

    at_start = True
    """Answers before the training are what later ones are compared with."""

    def __init__(self, records: Sequence[ImageRecord], every: int, count: int = 4):
        self.every = every
        self.records = _spread(records, min(count, len(records)))

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        """Return the answers."""
        asked = [(record, _opening(record.conversations[0])) for record in self.records if record.conversations]
        images = [
            ImageQuestions(f"{record.id} ({number})", record.image, [(number, question)])
            for number, (record, question) in enumerate(asked)
        ]
        engine = Engine(snapshot.model, snapshot.processor, _SHAPE, mesh=snapshot.mesh)
        answers = engine.answer(images, max_new_tokens=_SAMPLE_TOKENS)
        samples = [
            Sample(record.id, record.image, question.turns[0].text.replace(IMAGE, "").strip(), answers[number])
            for number, (record, question) in enumerate(asked)
        ]
        return Evaluation(samples=samples)


def _opening(conversation: Conversation) -> Conversation:
    """Return a conversation's first question, without its answer."""
    first = conversation.turns[0]
    return Conversation((first,), conversation.images[: first.text.count(IMAGE)])
