"""Trackers get what metrics.jsonl gets, also after kills and outages; with the real libraries where they are installed."""

import json
import logging
import struct
import time

import numpy as np
import pytest
from PIL import Image

from reverie_jax.errors import UserError
from reverie_jax.train import trackers
from reverie_jax.train.evaluator import Evaluation, Sample
from reverie_jax.train.metrics import MetricsLog, read_metrics
from reverie_jax.train.trackers import Tracker, Trackers, Tracking
from tests.train import tiny

CONFIG = {"dtype": "float32", "recipe": {"rank": 4, "sequence": {"length": 160}}}


class Recorder(Tracker):
    """A tracker that keeps everything, by run id. Calls whose numbers are in `failing` fail."""

    runs, calls, failing = {}, 0, ()

    def __init__(self, info):
        self.call()
        self.id = info.id or f"run{len(self.runs)}"
        kept = self.runs.setdefault(self.id, [])
        self.last_step = max((step for _, step, _ in kept), default=0)
        kept.append(("opened", self.last_step, (info.project, info.name)))

    def call(self):
        type(self).calls += 1
        if self.calls in self.failing:
            raise ConnectionError("no network")

    def log(self, step, values):
        self.call()
        self.runs[self.id].append(("log", step, values))

    def log_samples(self, step, samples):
        self.call()
        self.runs[self.id].append(("samples", step, [(s.id, s.picture.size, s.before, s.now) for s in samples]))

    def finish(self, succeeded):
        self.call()
        self.runs[self.id].append(("finished", 0, succeeded))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "runs", {})
    monkeypatch.setattr(Recorder, "calls", 0)
    monkeypatch.setitem(trackers.TRACKERS, "json", Recorder)  # a module that exists
    monkeypatch.setattr(trackers, "_FIRST_WAIT", 0.01)
    return Recorder


def sample(answer):
    return Sample("r0", tiny.record(0).image, "what?", answer)


def log_run(folder, steps, *, resumed=0, tracking=None):
    """Log steps, each with an evaluation and a sample."""
    tracked = Trackers(tracking or Tracking(("json",), run="mine"), folder, CONFIG, resumed)
    with MetricsLog(folder, 9, resumed=resumed, trackers=tracked) as log:
        for step in steps:
            log.write(step, {"loss": 1 / step, "loss/a:b": 2.0})
            log.write_evaluation(
                step, Evaluation({"eval/x": float(step), "eval/none": np.nan}, samples=[sample(f"{step}")])
            )


def logged(kept, kind="log"):
    return [(step, value) for name, step, value in kept if name == kind]


def expected(steps):
    return [
        (step, values) for step in steps for values in ({"loss": 1 / step, "loss/a:b": 2.0}, {"eval/x": float(step)})
    ]


def test_trackers_get_what_is_logged(recorder, tmp_path):
    log_run(tmp_path, [1, 2])
    [(name, kept)] = recorder.runs.items()
    assert logged(kept, "opened") == [(0, ("reverie-jax", "mine"))]
    assert logged(kept) == expected([1, 2])
    assert logged(kept, "samples") == [(1, [("r0", (24, 24), "1", "1")]), (2, [("r0", (24, 24), "1", "2")])]
    assert logged(kept, "finished") == [(0, True)]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"json": name}
    assert [row["eval/x"] for row in read_metrics(tmp_path)] == [1.0, 2.0]
    assert all("eval/none" not in row for row in read_metrics(tmp_path))


def test_a_resumed_run_continues_the_tracked_one(recorder, tmp_path):
    """Killed after step 3, of which the tracker has only a part; its newest checkpoint is that of step 1."""
    log_run(tmp_path, [1, 2, 3])
    [kept] = recorder.runs.values()
    kept[:] = [entry for entry in kept if entry[0] not in ("finished", "samples")][:-1]
    log_run(tmp_path, [2, 3, 4], resumed=1)
    assert len(recorder.runs) == 1
    assert logged(kept, "opened") == [(0, ("reverie-jax", "mine")), (3, ("reverie-jax", "mine"))]
    assert logged(kept) == expected([1, 2, 3])[:-1] + expected([3, 4])
    assert [step for step, _ in logged(kept, "samples")] == [3, 4]
    log_run(tmp_path, [1])  # the folder of a run that left no checkpoint
    assert [len(logged(kept, "log")) for kept in recorder.runs.values()] == [9, 2]


@pytest.mark.parametrize("failing", [{1}, {2, 3, 4}, {1, 3, 5, 7, 8}, {8}])
def test_an_outage_is_said_once_and_nothing_is_lost(recorder, tmp_path, monkeypatch, caplog, failing):
    monkeypatch.setattr(recorder, "failing", failing)
    log_run(tmp_path, [1, 2])
    [kept] = recorder.runs.values()
    assert (logged(kept), len(logged(kept, "samples")), logged(kept, "finished")) == (expected([1, 2]), 2, [(0, True)])
    assert [r.levelno for r in caplog.records if "tracker json: no network" in r.message] == [logging.ERROR]


def test_samples_that_are_refused_hold_up_no_metrics(recorder, tmp_path, monkeypatch, caplog):
    def refuse(self, step, samples):
        raise ValueError("a picture")

    monkeypatch.setattr(recorder, "log_samples", refuse)
    monkeypatch.setattr(trackers, "_SAMPLE_TRIES", 2)
    log_run(tmp_path, [1, 2])
    [kept] = recorder.runs.values()
    assert (logged(kept), logged(kept, "finished")) == (expected([1, 2]), [(0, True)])
    assert [caplog.text.count(words) for words in ("a picture", "left out")] == [1, 2]


def test_an_outage_to_the_end_costs_the_run_nothing(recorder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "failing", range(99))
    monkeypatch.setattr(trackers, "_LAST_WAIT", 0.1)
    log_run(tmp_path, [1, 2])
    assert recorder.runs == {}
    assert len(read_metrics(tmp_path)) == 2
    assert [caplog.text.count(words) for words in ("no network", "does not have everything")] == [1, 1]


def test_a_tracker_that_hangs_is_left_behind(recorder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "call", lambda self: trackers.threading.Event().wait())
    monkeypatch.setattr(trackers, "_LAST_WAIT", 0.0)
    log_run(tmp_path, [1])
    assert "does not have everything" in caplog.text


def test_an_error_ends_the_tracked_run_as_failed(recorder, tmp_path):
    tracked = Trackers(Tracking(("json",)), tmp_path, CONFIG, 0)
    with pytest.raises(UserError), MetricsLog(tmp_path, 1, trackers=tracked):
        raise UserError("the loss is nan")
    [kept] = recorder.runs.values()
    assert logged(kept, "opened") == [(0, ("reverie-jax", tmp_path.name))]
    assert logged(kept, "finished") == [(0, False)]


@pytest.mark.parametrize(
    ("names", "words"), [(("nothing",), "wandb or mlflow"), (("json", "json"), "once"), (("absent",), "pip install")]
)
def test_trackers_that_cannot_be_used_are_named(recorder, monkeypatch, names, words):
    monkeypatch.setitem(trackers.TRACKERS, "absent", Recorder)
    with pytest.raises(UserError, match=f"--tracker {names[0]}.*{words}"):
        Tracking(names)


def wandb_records(path):
    """The records of an offline file: LevelDB's log format behind seven bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (rest := BLOCK - position % BLOCK) < 7:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record, position = record + data[position + 7 : position + 7 + length], position + 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield record
            record = b""


BLOCK = 32768


def read_wandb(folder, tmp_path):
    """Points (step, name, value) of all offline runs, and the ids of the runs."""
    from wandb.proto import wandb_internal_pb2

    points, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            ids |= {record.run.run_id} if record.HasField("run") else set()
            items = record.history.item if record.HasField("history") else ()
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            points += [(row["step"], name, value) for name, value in row.items() if name[0] != "_" and name != "step"]
    return points, ids


def read_mlflow(folder, tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    points = [
        (metric.step, name, metric.value)
        for run in runs
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    ]
    table = client.list_artifacts(runs[0].info.run_id)
    points += [(2, "samples", {})] if any("samples.json" in file.path for file in table) else []
    assert runs[0].data.params["recipe.sequence.length"] == "160"
    assert runs[0].info.status == "FINISHED"
    return points, {run.info.run_id for run in runs}


def read_trackio(folder, tmp_path):
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("mine")
    rows = SQLiteStorage.get_logs("mine", name)
    return [(row["step"], key, row[key]) for row in rows for key in row if key not in ("step", "timestamp")], {name}


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", READERS)
def test_the_real_trackers_have_every_point(name, tmp_path, monkeypatch):
    """Killed after step 3, resumed from step 1: what they cannot know to have is there twice, and nothing is missing."""
    settings = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    for key, value in {**settings, "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(name)
    monkeypatch.setattr(trackers, "_LAST_WAIT", 300.0)
    tracking, folder = Tracking((name,), "mine"), tmp_path / "run"
    log_run(folder, [1, 2, 3], tracking=tracking)
    time.sleep(1.1)  # W&B names the folder of an offline run by the second
    log_run(folder, [2, 3, 4], resumed=1, tracking=tracking)
    points, ids = READERS[name](folder, tmp_path)
    assert ids == {json.loads((folder / "trackers.json").read_text())[name]}
    mlflow = name == "mlflow"
    found = [(step, key, value) for step, key, value in points if not key.startswith("samples")]
    loss = "loss/a_b" if mlflow else "loss/a:b"
    wanted = {(step, *item) for step in range(1, 5) for item in (("loss", 1 / step), (loss, 2.0), ("eval/x", step))}
    assert set(found) == wanted
    assert len(found) == {"wandb": 18, "mlflow": 15, "trackio": 15}[name]
    assert any(key.startswith("samples") for _, key, _ in points)
    with Image.open(folder / "samples" / "0.png") as sample:
        assert sample.size == (24, 24)
