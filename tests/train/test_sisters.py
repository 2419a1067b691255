"""Training MiniGPT-4, mPLUG-Owl and Muffin by the loop, as their recipes do: what changes, meshes, resume, pairs."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from reverie_jax.models.sharding import make_mesh
from reverie_jax.train.preemption import Preempted
from tests.train import tiny

# What each system's recipe trains, and the beginnings of the paths of what changes.
TRAINED = {
    "minigpt4": ({"trainable": "projector"}, ("projector.",)),
    "mplug-owl": ({"trainable": "adapters"}, ("decoder.layers.query.lora", "decoder.layers.value.lora")),
    "muffin": ({"trainable": "all", "freeze_image_experts": True}, ("projector.", "decoder.", "vision.")),
}
_TARGETS = r"decoder\.layers\.(query|value)"


def run(system, folder, **changes):
    config = tiny.SYSTEMS[system]
    options = {"target_modules": _TARGETS, "projector_learning_rate": 1e-2, **TRAINED[system][0], **changes}
    return tiny.run(folder, on=tiny.model(config), processor=tiny.processor(config), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return {system: run(system, tmp_path_factory.mktemp(system) / "run") for system in TRAINED}


@pytest.mark.parametrize("system", TRAINED)
def test_the_loss_falls_and_only_what_is_trained_changes(system, finished):
    done = finished[system]
    assert done.losses[-1] < done.losses[0] - 0.05
    before = dict(tiny.flat(tiny.model(tiny.SYSTEMS[system])))
    changed = set()
    for name, after in tiny.flat(done.model):
        if name not in before or not np.array_equal(before[name], after):
            changed.add(name)
    assert changed
    assert all(name.startswith(TRAINED[system][1]) for name in changed)
    if system == "muffin":
        frozen = {name for name in before if ".image." in name or name.split(".")[1] in ("patch", "cls", "position")}
        frozen = {name for name in frozen if name.startswith("vision.")}
        assert frozen
        assert frozen.isdisjoint(changed)
        assert {name for name in changed if name.startswith("vision.layers.")}
        assert "vision.queries" in changed


@pytest.mark.parametrize("system", TRAINED)
def test_four_devices_give_the_losses_of_one(system, finished, tmp_path):
    other = run(system, tmp_path / "mesh", mesh=make_mesh(1, 2, 2))
    np.testing.assert_allclose(other.losses, finished[system].losses, rtol=2e-4)


@pytest.mark.parametrize("system", ["minigpt4", "mplug-owl"])
def test_cached_features_do_not_change_losses(system, finished, tmp_path):
    cached = run(system, tmp_path / "run", vision_cache=tmp_path / "features")
    np.testing.assert_allclose(cached.losses, finished[system].losses, rtol=1e-5)


@pytest.mark.parametrize("system", TRAINED)
def test_a_stopped_run_resumes_bit_for_bit(system, finished, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        tiny.after_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted):
            run(system, tmp_path / "parts")
    again = run(system, tmp_path / "parts")
    assert again.losses == finished[system].losses
    for (name, a), (_, b) in zip(tiny.flat(finished[system].model), tiny.flat(again.model), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
