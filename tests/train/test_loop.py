"""The training loop: what it changes, what it leaves, and that an interruption changes nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data.packing import SequenceShape
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import ResumeError, RunCheckpoints, load_run
from reverie_jax.train.loop import TrainingFailed, train
from reverie_jax.train.metrics import MetricsLog, read_metrics
from reverie_jax.train.step import lora_and_projector
from tests.train import tiny


def leaves(model, part=lora_and_projector):
    _, params, rest = nnx.split(model, part, ...)
    return [np.asarray(x) for x in jax.tree.leaves(params)], [np.asarray(x) for x in jax.tree.leaves(rest)]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def interrupted(recipe, folder, monkeypatch):
    """A run that Ctrl-C ends after five steps."""
    write = MetricsLog.write

    def write_then_stop(self, step, values):
        write(self, step, values)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny.model(), tiny.processor(), tiny.records(), recipe, folder)


def test_adapters_and_projector_move_and_nothing_else(tmp_path):
    model = tiny.model()
    before = dict(tiny.flat(model))
    train(model, tiny.processor(), tiny.records(), tiny.recipe(steps=4), tmp_path)
    after = dict(tiny.flat(model))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.startswith("projector.")}
    assert all(np.abs(after[path]).max() > 0 for path in after if path.endswith("lora_b"))


def test_loss_falls(tmp_path):
    train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=30, learning_rate=2e-2), tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


@pytest.mark.parametrize("shape", [(2, 2, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_a_mesh_gives_the_losses_of_one_device(tmp_path, shape):
    # Twenty steps, dropout on: losses within 1e-4.
    recipe = tiny.recipe(steps=20, batch_size=4)
    train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path / "one")
    train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path / "mesh", mesh=make_mesh(*shape))
    one, mesh = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "mesh"))
    assert len(one) == 20
    assert np.abs(np.asarray(one) - np.asarray(mesh)).max() < 1e-4


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    recipe = tiny.recipe(steps=9, save_steps=3)
    whole = tiny.model()
    train(whole, tiny.processor(), tiny.records(), recipe, tmp_path / "whole")
    interrupted(recipe, tmp_path / "cut", monkeypatch)
    assert len(read_metrics(tmp_path / "cut")) == 5
    again = tiny.model()
    result = train(again, tiny.processor(), tiny.records(), recipe, tmp_path / "cut")
    assert result.steps == 6
    assert same(leaves(whole)[0], leaves(again)[0])
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == list(range(1, 10))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_killed_run_resumes_bit_identical(tmp_path):
    """SIGKILL in mid-run, in a process of its own."""
    command = [sys.executable, "-m", "tests.train.tiny", str(tmp_path / "killed")]
    whole = tiny.model()
    train(whole, tiny.processor(), tiny.records(), tiny.KILL_RECIPE, tmp_path / "whole")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while time.monotonic() < deadline and child.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 14:
            break
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    steps = len(read_metrics(tmp_path / "killed"))
    assert 14 <= steps < tiny.KILL_RECIPE.steps, "the run was not killed in its middle"
    again = tiny.model()
    result = train(again, tiny.processor(), tiny.records(), tiny.KILL_RECIPE, tmp_path / "killed")
    assert 0 < result.steps < tiny.KILL_RECIPE.steps
    assert same(leaves(whole)[0], leaves(again)[0])
    rows = read_metrics(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, tiny.KILL_RECIPE.steps + 1))


def test_checkpoint_resumes_on_another_mesh(tmp_path, monkeypatch):
    recipe = tiny.recipe(steps=6, save_steps=3, batch_size=4)
    whole = tiny.model()
    train(whole, tiny.processor(), tiny.records(), recipe, tmp_path / "whole")
    interrupted(recipe, tmp_path / "cut", monkeypatch)
    again = tiny.model()
    train(again, tiny.processor(), tiny.records(), recipe, tmp_path / "cut", mesh=make_mesh(2, 2, 1))
    for a, b in zip(leaves(whole)[0], leaves(again)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_half_written_checkpoint_never_shadows_the_last_good_one(tmp_path):
    recipe = tiny.recipe(steps=4, save_steps=2)
    train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path)
    newest = tmp_path / "checkpoints" / "4"
    for marker in newest.rglob("commit_success.txt"):
        marker.unlink()
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp")
    saved = RunCheckpoints(tmp_path, recipe, json.loads((tmp_path / "run.json").read_text())["base"])
    assert saved.latest == 2
    saved.close()


def test_checkpoints_hold_no_base_weights(tmp_path):
    model = tiny.model()
    train(model, tiny.processor(), tiny.records(), tiny.recipe(steps=2, save_steps=2), tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    trained, frozen = leaves(model)
    # Parameters and two moments, and some bookkeeping.
    assert size < 3 * sum(x.nbytes for x in trained) + 60_000
    assert sum(x.nbytes for x in frozen) > 60_000


def test_loaded_run_equals_the_model_in_memory(tmp_path):
    trainable_filter = tiny.model()
    train(trainable_filter, tiny.processor(), tiny.records(), tiny.recipe(steps=3), tmp_path)
    loaded = tiny.model()
    load_run(loaded, tmp_path)
    assert same(leaves(trainable_filter)[0], leaves(loaded)[0])
    assert same(leaves(trainable_filter)[1], leaves(loaded)[1])


def test_a_run_on_another_base_is_refused(tmp_path):
    train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path)
    other = VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(7))
    with pytest.raises(ResumeError, match="base"):
        train(other, tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path)
    with pytest.raises(ResumeError, match="base"):
        load_run(VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(7)), tmp_path)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path)
    with pytest.raises(ResumeError, match="recipe"):
        train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=3), tmp_path)


def test_no_resume_refuses_a_folder_with_a_run(tmp_path):
    train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path)
    with pytest.raises(ResumeError, match="already"):
        train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path, resume=False)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(TrainingFailed, match="step 2"):
        train(
            tiny.model(),
            tiny.processor(),
            tiny.records(),
            tiny.recipe(steps=4, learning_rate=float("inf"), warmup_ratio=0.0),
            tmp_path,
        )


def test_metrics_say_what_a_user_needs(tmp_path):
    train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path)
    row = read_metrics(tmp_path)[-1]
    wanted = {"loss", "grad_norm", "rate", "projector_rate", "tokens_per_second", "supervised", "packing", "input_wait"}
    assert wanted <= row.keys()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["steps"] == 2


def test_overrides_change_typed_fields():
    base = recipes.recipe("scenes-rationales")
    changed = recipes.override(base, ["steps=7", "learning_rate=1e-3", "sequence.length=512", "max_grad_norm=none"])
    assert changed == dataclasses.replace(
        base, steps=7, learning_rate=1e-3, sequence=dataclasses.replace(base.row, length=512), max_grad_norm=None
    )


@pytest.mark.parametrize("setting", ["stepz=3", "steps", "steps=many", "sequence=3", "supervision=everything"])
def test_bad_overrides_are_refused(setting):
    with pytest.raises(UserError):
        recipes.override(recipes.recipe("scenes-rationales"), [setting])


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match="scenes-responses"):
        recipes.recipe("scenes-nothing")


def test_recipe_survives_json():
    recipe = tiny.recipe(sequence=SequenceShape(77, 2, 5))
    assert recipes.Recipe.from_json(recipe.to_json()) == recipe


def test_a_last_save_that_fails_at_once_is_an_error(tmp_path, monkeypatch):
    """Also where Orbax raises before anything is under way."""
    from reverie_jax.train import checkpoint

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", full)
    with pytest.raises(TrainingFailed, match="the last checkpoint could not be written"):
        train(tiny.model(), tiny.processor(), tiny.records(), tiny.recipe(steps=2), tmp_path)
    assert len(read_metrics(tmp_path)) == 2
