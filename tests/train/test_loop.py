"""The training loop: what it changes, what it leaves, and that interruptions change nothing."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data import survey as survey_module
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.size_index import write_index
from reverie_jax.data.survey import survey
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import checkpoint, monitor, preemption
from reverie_jax.train.checkpoint import VALIDATION, RunCheckpoints, find_progress, load_run
from reverie_jax.train.identity import ResumeError, read_identity
from reverie_jax.train.metrics import MetricsLog, read_metrics
from reverie_jax.train.monitor import StepMonitor, TrainingFailed
from reverie_jax.train.plan.plan import abstract_step
from reverie_jax.train.preemption import Preempted, Preemption
from reverie_jax.train.step import StepMetrics
from tests.train import tiny


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of a process that was killed after step 5 of 8; its newest checkpoint is that of step 3."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    command = [sys.executable, "-m", "tests.train.tiny", str(folder), "--hang-after", "5"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tiny.wait_for(lambda: len(read_metrics(folder)) == 5 and (folder / "checkpoints" / "3").exists(), child)
    child.kill()
    child.wait()
    return folder


def test_only_adapters_and_projector_change_and_the_loss_falls(finished):
    before, after = dict(tiny.flat(tiny.model())), dict(tiny.flat(finished.model))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("projector.")}
    assert all(np.abs(after[path]).max() > 0 for path in after if path.endswith("lora_b"))
    assert np.mean(finished.losses[-2:]) < np.mean(finished.losses[:2]) - 0.2


def test_metrics_and_profile_are_written(finished):
    row = read_metrics(finished.folder)[-1]
    expected = {"loss", "grad_norm", "learning_rate", "projector_learning_rate", "tokens_per_second", "supervised"}
    assert expected | {"packing", "input_wait", "attention_pairs"} <= row.keys()
    assert list((finished.folder / "tensorboard").glob("events*"))
    assert list((finished.folder / "profile").rglob("*.xplane.pb"))
    assert json.loads((finished.folder / "run.json").read_text())["recipe"]["steps"] == 8


def test_four_devices_give_the_losses_of_one(finished, mesh_run):
    np.testing.assert_allclose(mesh_run[0].losses, finished.losses, rtol=0, atol=1e-4)


def test_a_run_compiles_its_step_once(single_device_run, mesh_run):
    for _, spy in (single_device_run, mesh_run):
        assert spy.programs == [1]


def test_state_is_sharded_as_planned_before_every_step(mesh_run):
    planned = jax.tree.leaves(abstract_step(tiny.CONFIG, tiny.recipe(), make_mesh(1, 2, 2), dtype=jnp.float32).state)
    assert len(mesh_run[1].shardings) == 8
    for state in mesh_run[1].shardings:
        for leaf, (sharding, rank) in zip(planned, state, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, rank)


def assert_continued(resumed, finished, steps):
    """Check that a run took its last `steps` after a resume, and ended as one without an interruption."""
    assert resumed.result.steps == steps
    assert resumed.losses == finished.losses
    tiny.assert_equal(tiny.trained(resumed.model)[0], tiny.trained(finished.model)[0])


def test_killed_process_resumes_bit_for_bit(finished, killed, tmp_path):
    assert_continued(tiny.run(shutil.copytree(killed, tmp_path / "run")), finished, 5)


def test_an_index_of_sizes_replaces_the_survey_and_changes_nothing(finished, killed, tmp_path, monkeypatch):
    source, recipe = RecordSource(write_records(tmp_path, {"train": tiny.records()})), tiny.recipe()
    builder = TreeBuilder(tiny.processor(), recipe.sequence, recipe.supervision)
    write_index(source, survey(source, builder), builder)
    monkeypatch.setattr(survey_module, "survey", None)
    assert_continued(tiny.run(shutil.copytree(killed, tmp_path / "run"), data=source), finished, 5)


def test_checkpoint_resumes_on_a_mesh(finished, killed, tmp_path):
    resumed = tiny.run(shutil.copytree(killed, tmp_path / "run"), mesh=make_mesh(1, 2, 2))
    assert resumed.result.steps == 5
    for a, b in zip(tiny.trained(resumed.model)[0], tiny.trained(finished.model)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, which workers of the test run may lack."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_sigterm_and_ctrl_c_save_and_stop(finished, tmp_path, ctrl_c):
    for number, step, code in ((signal.SIGTERM, 2, 2), (signal.SIGINT, 5, 130)):
        with pytest.MonkeyPatch.context() as patch:
            tiny.after_step(patch, step, functools.partial(os.kill, os.getpid(), number))
            with pytest.raises(Preempted, match=f"step {step} of 8 is saved in {tmp_path}") as stopped:
                tiny.run(tmp_path)
        assert stopped.value.exit_code == code
    assert_continued(tiny.run(tmp_path), finished, 3)


def test_a_second_ctrl_c_stops_at_once(tmp_path, ctrl_c):
    with pytest.MonkeyPatch.context() as patch:
        tiny.after_step(patch, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(read_metrics(tmp_path)) == 2


def test_incomplete_checkpoint_is_ignored(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    newest = folder / "checkpoints" / "8"
    for marker in newest.rglob("commit_success.txt"):
        marker.unlink()
    newest.rename(folder / "checkpoints" / "8.orbax-checkpoint-tmp")
    assert find_progress(folder, tiny.recipe(), tiny.records()) == (6, 8)
    load_run(tiny.model(), folder)
    assert (folder / "checkpoints" / "8.orbax-checkpoint-tmp").exists()  # a run that goes on may be writing it


def test_checkpoints_hold_no_frozen_weights(finished):
    files = (finished.folder / "checkpoints" / "8").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    trained, frozen = tiny.trained(finished.model)
    # Parameters, two moments, and metadata.
    assert size < 3 * sum(x.nbytes for x in trained) + 60_000
    assert sum(x.nbytes for x in frozen) > 60_000


def test_loaded_run_equals_the_trained_model(finished):
    loaded = tiny.model()
    load_run(loaded, finished.folder)
    for part, expected in zip(tiny.trained(loaded), tiny.trained(finished.model), strict=True):
        tiny.assert_equal(part, expected)


def changed(part):
    """The model with one tensor of a part changed; `base_checksums` samples neither head nor embedding."""
    model = tiny.model()
    kernel = {"vision": model.vision.cls, "head": model.decoder.head.kernel, "projector": model.projector.linear1.bias}
    kernel[part].set_value(kernel[part][...] + 1)
    return model


def other_records(**changes):
    first, *rest = tiny.records()
    return tiny.Records([dataclasses.replace(first, **changes), *rest])


class ShiftedWords(tiny.Words):
    """Another tokenizer of the same words."""

    def __call__(self, text, **options):
        found = super().__call__(text, **options)
        return {**found, "input_ids": [id + (id > 3) for id in found["input_ids"]]}


# What differs from the finished run, and how the error names it.
OTHER_RUNS = {
    "base": ({"on": lambda: changed("vision")}, "base model"),
    "head": ({"on": lambda: changed("head")}, "head"),
    "projector": ({"on": lambda: changed("projector")}, "projector"),
    "dtype": ({"on": lambda: VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)}, "dtype"),
    "steps": ({"steps": 3}, "recipe field steps is 3, the run has 8"),
    "sequence": ({"sequence": SequenceShape(170, 2, 80)}, "sequence.length is 170, the run has 160"),
    "image": ({"data": other_records(image=tiny.record(99).image)}, "records"),
    "text": ({"data": other_records(conversations=tiny.record(0).conversations[:1])}, "records"),
    "id": ({"data": other_records(id="another")}, "records"),
    "order": ({"data": tiny.Records(reversed(tiny.records()))}, "records"),
    "tokenizer": ({"processor": Processor.from_config(tiny.CONFIG, ShiftedWords())}, "tokenizer"),
    "not again": ({"resume": False}, "already"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_folder_belongs_to_one_run(finished, name):
    options, words = OTHER_RUNS[name]
    on = options.get("on", tiny.model)()
    with pytest.raises(ResumeError, match=f"{finished.folder}.*{words}"):
        tiny.run(finished.folder, **{**options, "on": on})


def test_two_runs_cannot_train_in_one_folder(tmp_path):
    first = RunCheckpoints(tmp_path, tiny.recipe(), {})
    with pytest.raises(ResumeError, match=f"{tmp_path}.*another run"):
        RunCheckpoints(tmp_path, tiny.recipe(), {})
    RunCheckpoints(tmp_path, tiny.recipe()).close()  # to read is allowed
    first.close()
    RunCheckpoints(tmp_path, tiny.recipe(), {}).close()


def test_progress_is_known_without_a_model(finished, tmp_path):
    assert find_progress(tmp_path, tiny.recipe(), tiny.records()) is None
    # The number of steps, if the data determine it, is the run's own.
    assert find_progress(finished.folder, tiny.recipe(steps=0), tiny.records()).is_complete
    for changes, data in (({"rank": 8}, tiny.records()), ({}, other_records(id="another"))):
        with pytest.raises(ResumeError, match="rank is 8, the run has 4" if changes else "records"):
            find_progress(finished.folder, tiny.recipe(**changes), data)


def test_a_folder_without_a_checkpoint_belongs_to_nobody(finished, tmp_path):
    """What a run of other data left there, which ended before its first save, is not used."""
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(finished.folder / name, tmp_path)
    (tmp_path / "validation.jsonl").write_text(json.dumps({"step": 2, VALIDATION: 1.0}) + "\n")
    run = tiny.run(tmp_path, data=tiny.Records(reversed(tiny.records())))
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))
    assert (tmp_path / "validation.jsonl").read_text() == ""
    assert read_identity(tmp_path)["records"] != read_identity(finished.folder)["records"]
    assert run.losses != finished.losses


def test_a_folder_without_a_run_cannot_be_loaded(tmp_path):
    with pytest.raises(ResumeError, match=r"run\.json"):
        load_run(tiny.model(), tmp_path)
    (tmp_path / "run.json").write_text('{"base": {}}')
    with pytest.raises(ResumeError, match=r"run\.json"):
        load_run(tiny.model(), tmp_path)


def test_state_with_a_bad_loss_is_not_saved(tmp_path, monkeypatch):
    """Also where metrics are read one step late, as on accelerators."""
    monkeypatch.setattr(monitor.jax, "default_backend", lambda: "gpu")
    model = tiny.model()
    model.projector.linear1.bias.set_value(model.projector.linear1.bias[...] * jnp.nan)
    with pytest.raises(TrainingFailed, match=r"step 1: the loss is nan.* r\d+"):
        tiny.run(tmp_path, on=model, save_steps=1)
    assert not (tmp_path / "checkpoints" / "1").exists()


def test_failure_of_the_last_save_is_an_error(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "reverie_jax")

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", fail)
    with pytest.raises(TrainingFailed, match="step 8"):
        tiny.run(tmp_path)
    assert len(read_metrics(tmp_path)) == 8
    assert "checkpoint of step 3 was not written" in caplog.text
    assert "compiling the training step" in caplog.text
    assert "the first step took" in caplog.text


def test_held_out_records_are_validated_and_the_best_checkpoint_is_kept(finished, tmp_path, monkeypatch):
    from reverie_jax.train.validation import Validation

    measure, measured, best_at_3 = Validation.__call__, [], iter([1.0, 3.0, 2.0])

    def ranked(self, params, frozen):
        measured.append(measure(self, params, frozen)[VALIDATION])
        return {VALIDATION: next(best_at_3)}

    monkeypatch.setattr(Validation, "__call__", ranked)
    changes = {"holdout": 3, "keep_checkpoints": 1}
    result = tiny.run(tmp_path, **changes).result
    assert result.stats.records == 9
    assert all(0 < loss < 20 for loss in measured)
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(row["step"], row[VALIDATION]) for row in rows] == [(3, 1.0), (6, 3.0), (8, 2.0)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "8"]
    checkpoints = RunCheckpoints(tmp_path, tiny.recipe(**changes))
    assert (checkpoints.latest, checkpoints.best) == (8, 3)
    checkpoints.close()


def test_epochs_determine_the_steps(tmp_path):
    recipe = tiny.recipe()
    builder = TreeBuilder(tiny.processor(), recipe.sequence, recipe.supervision)
    sequences = survey(tiny.records(), builder).stats.sequences
    assert sequences > 3
    assert tiny.run(tmp_path, steps=0, epochs=8 * recipe.batch_size / sequences).result.steps == 8
    assert recipe.steps_for(1000) == 8
    assert tiny.recipe(steps=0).steps_for(1) == 1


def test_holding_out_everything_is_refused(tmp_path):
    with pytest.raises(UserError, match="holdout=12"):
        tiny.run(tmp_path, holdout=12)


def test_micro_batches_that_a_mesh_cannot_share_are_refused(tmp_path):
    with pytest.raises(UserError, match="micro-batches of 2"):
        tiny.run(tmp_path, mesh=make_mesh(1, 4, 1), gradient_accumulation_steps=2)


def test_a_loss_spike_names_the_records(tmp_path):
    log = MetricsLog(tmp_path, 60)
    recipe = tiny.recipe(loss_spike_threshold=2.0)
    watch = StepMonitor(tiny.model(), tiny.records(), ("",), recipe, make_mesh(), log)

    def step(number, loss):
        counts = dict.fromkeys(StepMetrics._fields, np.float32(1)) | {"loss": np.float32(loss), "sums": {}}
        watch.after(number, StepMetrics(**counts), np.asarray([[1, 0], [4, 9]], np.int32), 0.0)

    with log:
        for number in range(1, 30):
            step(number, 3.0)
        step(30, 4.9)
        with pytest.raises(TrainingFailed, match=r"step 31: .* 3\.000 to 5\.100.* r0, r3, r8$"):
            step(31, 5.1)
    assert len(read_metrics(tmp_path)) == 30


def test_saves_by_time(monkeypatch):
    now = iter([0.0, 59.0, 61.0, 61.0, 100.0, 122.0, 122.0])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(now))
    timed = Preemption(minutes=1.0)
    assert [timed.save_due(step) for step in range(1, 5)] == [False, True, False, True]
    monkeypatch.undo()
    assert not Preemption(minutes=0.0).save_due(1)
