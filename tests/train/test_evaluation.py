"""Evaluation during training: scores are those of the checkpoint, interruptions change nothing, the best one is found."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from reverie_jax import evaluators as above
from reverie_jax.cli.train import Monitoring
from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.pope import Pope
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.predict import PredictOptions, predict
from reverie_jax.eval.score import score
from reverie_jax.evaluators import BenchmarkEvaluator, SampleEvaluator, subset
from reverie_jax.loading import is_run
from reverie_jax.models import lora
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import checkpoint
from reverie_jax.train.checkpoint import SCORE, VALIDATION, RunCheckpoints, find_run, load_run
from reverie_jax.train.evaluator import Evaluation
from reverie_jax.train.identity import ResumeError
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.preemption import Preempted
from reverie_jax.train.samples import read_samples
from tests.eval.benchmarks import makers
from tests.train import tiny

ROWS = [(f"{i}.png", f"Is there a {n}?", answer) for i in "abcdef" for n, answer in (("cup", "yes"), ("dog", "no"))]
CLOCKED = ("time", "tokens_per_second", "supervised_per_second", "input_wait", "tflops_per_device", "hbm_peak_gib")


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    return makers.pope(tmp_path_factory.mktemp("pope"), random=ROWS, popular=ROWS[:6], adversarial=ROWS[4:8])


@pytest.fixture(scope="module")
def evaluated(pope, tmp_path_factory):
    """An uninterrupted run that is evaluated."""
    return tiny.run(tmp_path_factory.mktemp("evaluated") / "run", evaluators=tiny.evaluators(pope))


def content(folder):
    """All that a run logged and answered, without what clocks say."""
    metrics = [{k: v for k, v in row.items() if k not in CLOCKED} for row in read_metrics(folder)]
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("evaluations", "samples")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }
    return metrics, read_samples(folder), files


def texts(predictions):
    return [json.loads(line)["text"] for line in predictions.splitlines()]


def test_scores_are_in_the_metrics_and_samples_beside_them(evaluated, finished):
    metrics, samples, files = content(evaluated.folder)
    steps = [row["step"] for row in metrics if "eval/pope/random/accuracy" in row]
    assert ([row["step"] for row in metrics], steps) == ([*range(9)], [0, 3, 6, 8])
    assert [row["loss"] for row in metrics[1:]] == finished.losses
    assert [(row["step"], row["id"]) for row in samples] == [(s, f"r{i}") for s in (0, 4, 8) for i in (0, 6)]
    assert [row["before"] for row in samples] == [row["now"] for row in samples[:2]] * 3
    assert [row["now"] for row in samples[4:]] != [row["now"] for row in samples[:2]]
    assert {"samples/0.png", "samples/1.png", "evaluations/8/pope/scores.json"} <= files.keys()
    assert {"evaluations", "samples", "samples.jsonl", "trackers.json"}.isdisjoint(os.listdir(finished.folder))


@pytest.mark.parametrize("step", [6, 8])
def test_scores_are_those_of_the_checkpoint(evaluated, pope, tmp_path, step):
    """As `reverie eval --adapter run@STEP` computes them: loaded again, merged."""
    model, data = tiny.model(), Pope().load(pope)
    load_run(model, f"{evaluated.folder}@{step}")
    lora.merge(model)
    options = PredictOptions(Decoding(Pope.max_new_tokens))
    names = {"model": "x", "checksums": {}}
    file = predict(Engine(model, tiny.processor()), Pope(), data, tmp_path, options, **names)
    during = evaluated.folder / "evaluations" / str(step) / "pope" / "predictions.jsonl"
    assert texts(file.read_bytes()) == texts(during.read_bytes())
    row = next(row for row in read_metrics(evaluated.folder) if row["step"] == step)
    expected = {f"eval/pope/{name}": value for name, value in score(Pope(), data, file).metrics.items()}
    assert {name: value for name, value in row.items() if name.startswith("eval/")} == expected


def test_a_killed_run_ends_as_an_uninterrupted_one(evaluated, pope, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tests.train.tiny", str(folder), "--hang-after", "7", "--pope", str(pope)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tiny.wait_for(lambda: len(read_metrics(folder)) == 8 and (folder / "checkpoints" / "6").exists(), child)
    child.kill()
    child.wait()
    shutil.rmtree(folder / "checkpoints" / "6")  # as if it had been killed in that evaluation
    assert [row["step"] for row in read_metrics(folder) if "eval/pope/random/accuracy" in row] == [0, 3, 6]
    resumed = tiny.run(folder, evaluators=tiny.evaluators(pope))
    assert resumed.result.steps == 5
    assert content(folder) == content(evaluated.folder)


def test_a_run_that_stops_leaves_the_evaluation_to_the_next(evaluated, pope, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        tiny.after_step(patch, 3, functools.partial(os.kill, os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted, match="step 3"):
            tiny.run(folder, evaluators=tiny.evaluators(pope))
    assert [row["step"] for row in read_metrics(folder) if "eval/pope/random/accuracy" in row] == [0]
    tiny.run(folder, evaluators=tiny.evaluators(pope))
    assert content(folder) == content(evaluated.folder)
    with_score = [RunCheckpoints(one, tiny.recipe()) for one in (folder, evaluated.folder)]
    assert with_score[0].best == with_score[1].best
    for checkpoints in with_score:
        checkpoints.close()


def test_four_devices_give_the_answers_of_one(evaluated, pope, tmp_path):
    """Before the first step: later, losses differ by rounding, and so may answers."""
    mesh = tiny.run(tmp_path, mesh=make_mesh(1, 2, 2), evaluators=tiny.evaluators(pope))
    (metrics, samples, files), single = content(mesh.folder), content(evaluated.folder)
    assert (metrics[0], samples[:2]) == (single[0][0], single[1][:2])
    name = "evaluations/0/pope/predictions.jsonl"
    ours = texts(files[name])
    assert ours == texts(single[2][name])
    assert len(files["evaluations/8/pope/predictions.jsonl"].splitlines()) == len(ours) == 22
    assert metrics[8]["eval/pope/random/accuracy"] >= 0


class Planned:
    """An evaluator whose scores are planned."""

    every, at_start = 3, False

    def __init__(self, *scores):
        self.scores = iter(scores)

    def __call__(self, snapshot):
        value = next(self.scores)
        return Evaluation({"eval/x": value}, None if np.isnan(value) else value)


# Scores and losses of the checkpoints 1, 2 and 3, and the best of them.
BESTS = [
    ((0.9, 0.1, 0.5), (None, None, None), 1),
    ((0.2, 0.2, 0.2), (None, None, None), 1),
    ((None, 0.2, None), (1.0, 3.0, 0.1), 2),
    ((None, None, None), (1.0, 3.0, 0.1), 3),
    ((None, None, None), (None, None, None), None),
]


@pytest.mark.parametrize(("scores", "losses", "expected"), BESTS)
def test_the_best_checkpoint_has_the_best_score_or_else_the_lowest_loss(scores, losses, expected):
    checkpoints = [
        SimpleNamespace(
            step=step, metrics={k: v for k, v in {SCORE: s, VALIDATION: x}.items() if v is not None} or None
        )
        for step, s, x in zip((1, 2, 3), scores, losses, strict=True)
    ]
    assert checkpoint._best(checkpoints) == expected


def test_the_best_checkpoint_is_kept_and_found_by_name(tmp_path):
    folder = tmp_path / "run"
    run = tiny.run(folder, evaluators=[Planned(np.nan, 0.2, np.nan)], keep_checkpoints=1)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6", "8"]
    assert [row["step"] for row in read_metrics(folder) if "eval/x" in row] == [6]
    loaded = {}
    for which in ("", "@best", "@latest", "@6"):
        assert is_run(f"{folder}{which}")
        load_run(model := tiny.model(), f"{folder}{which}")
        loaded[which] = tiny.trained(model)[0]
    tiny.assert_equal(loaded["@latest"], tiny.trained(run.model)[0])
    for same in ("", "@best"):
        tiny.assert_equal(loaded[same], loaded["@6"])
    assert not all(map(np.array_equal, loaded["@6"], loaded["@latest"]))
    with pytest.raises(ResumeError, match=r"run@7.*there are 6, 8"):
        load_run(tiny.model(), f"{folder}@7")


def test_names_of_checkpoints_are_of_run_folders_alone(finished, tmp_path):
    with pytest.raises(ResumeError, match=r"@best.*--eval.*6, 8"):
        load_run(tiny.model(), f"{finished.folder}@best")
    assert find_run("owner/name@best") == (tmp_path.__class__("owner/name@best"), "")
    named = shutil.copytree(finished.folder, tmp_path / "run@best")
    assert find_run(named) == (named, "")
    assert find_run(f"{named}@6") == (named, "6")


def test_a_failed_evaluation_stops_no_training(pope, finished, tmp_path, monkeypatch, caplog):
    def fail(*args, **options):
        raise UserError("planned")

    monkeypatch.setattr(above, "predict", fail)
    evaluator = BenchmarkEvaluator([(Pope(), Pope().load(pope))], 3)
    with pytest.raises(UserError, match="planned"):
        tiny.run(tmp_path / "at start", evaluators=[evaluator])
    monkeypatch.setattr(BenchmarkEvaluator, "at_start", False)
    assert tiny.run(tmp_path / "later", evaluators=[evaluator]).losses == finished.losses
    assert caplog.text.count("not evaluated: planned") == 3


class Less(Pope):
    """POPE, were it about hallucinations."""

    lower_is_better = frozenset({"accuracy"})


def test_less_may_be_better(pope):
    data = Less().load(pope)
    named = {name: BenchmarkEvaluator([(Less(), data)], 1, f"pope/random/{name}") for name in ("accuracy", "f1")}
    assert [one.metrics[one.metric] for one in named.values()] == [True, False]
    assert BenchmarkEvaluator([(Pope(), data)], 1).metric == f"pope/{next(iter(Pope().score(data, {}).metrics))}"
    with pytest.raises(UserError, match=r"--eval-metric pope/none: must be one of .*pope/random/f1"):
        BenchmarkEvaluator([(Pope(), data)], 1, "pope/none")
    with pytest.raises(UserError, match="--eval mm-vet"):
        BenchmarkEvaluator([(find_benchmark("mm-vet"), data)], 1)


# A limit, and the images whose questions are asked; a, b and c have 4, 4 and 6, d 4, e and f 2.
SUBSETS = {None: "abcdef", 22: "abcdef", 21: "abcde", 8: "ad", 7: "a", 1: "a"}


@pytest.mark.parametrize("limit", SUBSETS)
def test_a_subset_has_all_questions_of_some_images(pope, limit):
    data = Pope().load(pope)
    part = subset(data, limit)
    assert "".join(dict.fromkeys(question.cluster[0] for question in part.questions)) == SUBSETS[limit]
    assert [q for q in data.questions if q.cluster in part.clusters] == list(part.questions)


def test_samples_ask_the_first_question_of_some_records():
    records = [dataclasses.replace(tiny.record(seed), id=f"{seed}") for seed in range(5)]
    assert [record.id for record in SampleEvaluator(records, 1, 3).records] == ["0", "1", "3"]
    assert len(SampleEvaluator(records, 1, 9).records) == 5


def test_options_make_evaluators(pope):
    named = {"eval": (("pope",),), "eval_data": pope, "eval_limit": 8, "eval_metric": "pope/random/f1", "eval_every": 7}
    options = Monitoring(**named, sample_every=5, sample_count=3)
    benchmark, samples = options.evaluators(tiny.records(), 4)
    assert (benchmark.every, benchmark.metric, len(benchmark.benchmarks[0][1].questions)) == (7, "pope/random/f1", 8)
    assert (samples.every, [record.id for record in samples.records]) == (5, ["r8", "r9", "r10"])
    assert Monitoring().evaluators(tiny.records(), 0) == []
    assert Monitoring().check() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval": (("pope",),)}, "--eval-data"),
        ({"eval_every": 0}, "--eval-every 0"),
        ({"eval_limit": 0}, "--eval-limit 0"),
        ({"sample_every": 0}, "--sample-every 0"),
        ({"tracker": (("nothing",),)}, "--tracker nothing"),
    ],
)
def test_invalid_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        Monitoring(**options).check()
