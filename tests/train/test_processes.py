"""Several processes, kills at random moments, SIGTERM, full disks: what a run leaves is what the undisturbed one leaves.

Runs are processes of their own (`python -m tests.train.tiny`), on fake CPU devices, joined over the loopback.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.train.checkpoint import RunCheckpoints, read_identity
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.step import TrainState, adapt, lora_and_projector, make_optimizer
from tests.train import tiny

STEPS = tiny.KILL_RECIPE.steps


def start(folder, *, processes=1, devices=1, mesh=(1, 1, 1), settings=(), logs=None):
    """The processes of one run."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    started = []
    for number in range(processes):
        command = [sys.executable, "-m", "tests.train.tiny", str(folder), "--mesh", *map(str, mesh)]
        command += ["--distributed", f"127.0.0.1:{port},{processes},{number}"] if processes > 1 else []
        command += ["--set", *settings] if settings else []
        log = ((logs or folder.parent) / f"{folder.name}.{number}.log").open("ab")
        # Every program is kept for the next process: most of a short run is compiling.
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        log.close()
    return started


def end(children, folder, *, seconds=300, logs=None):
    """Waits; on a failure shows what they said."""
    try:
        codes = [child.wait(timeout=seconds) for child in children]
    except subprocess.TimeoutExpired:
        kill(children)
        codes = [None]
    said = "\n".join(path.read_text()[-3000:] for path in sorted((logs or folder.parent).glob(f"{folder.name}.*.log")))
    return codes, said


def kill(children):
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
    for child in children:
        child.wait()


def run(folder, **options):
    codes, said = end(start(folder, **options), folder)
    assert codes == [0] * len(codes), said


def losses(folder):
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def final(folder):
    """The last checkpoint's arrays, byte by byte: what is trained, moments and step."""
    recipe = Recipe.from_json(json.dumps(read_identity(folder)["recipe"]))
    model = tiny.model()
    points = RunCheckpoints(folder, recipe, base_checksums(model))
    adapt(model, recipe)
    params = nnx.state(model, lora_and_projector)
    state = TrainState(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))
    state, _ = points.restore(state)
    points.close()
    assert int(state.step) == recipe.steps
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


FOUR = ("batch_size=4", "save_steps=10")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4), (1, 4, 1)])
def test_four_devices_are_one(tmp_path, mesh):
    run(tmp_path / "one", settings=FOUR)
    run(tmp_path / "four", devices=4, mesh=mesh, settings=FOUR)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_two_processes_of_two_devices_are_one_device(tmp_path, mesh):
    run(tmp_path / "one", settings=FOUR)
    run(tmp_path / "two", processes=2, devices=2, mesh=mesh, settings=FOUR)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    run(tmp_path / "whole", devices=2, mesh=(2, 1, 1), settings=FOUR)
    children = start(tmp_path / "cut", processes=2, devices=1, mesh=(2, 1, 1), settings=FOUR)
    wait_for(tmp_path / "cut", 12, children)
    kill(children)
    assert 10 <= len(read_metrics(tmp_path / "cut")) < STEPS
    run(tmp_path / "cut", devices=4, mesh=(2, 2, 1), settings=FOUR)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def wait_for(folder, lines, children, seconds=200):
    """Until so many steps are logged, or the run has ended."""
    until = time.monotonic() + seconds
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < until and all(child.poll() is None for child in children):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
            return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_change_nothing(tmp_path, processes):
    """Each at a random moment after the run has come a little further; a save is under way in many of them."""
    options = {"processes": processes, "mesh": (processes, 1, 1), "settings": ("save_steps=1", "keep_checkpoints=3")}
    run(tmp_path / "whole", **options)
    draw, kills, saving = random.Random(7), 0, 0
    while kills < 20:
        before = len(read_metrics(tmp_path / "cut")) if (tmp_path / "cut").exists() else 0
        if before >= STEPS - 1:  # done too early: the rest of the kills on a copy of the start
            shutil.rmtree(tmp_path / "cut")
            before = 0
        children = start(tmp_path / "cut", **options)
        wait_for(tmp_path / "cut", before + draw.randint(-1, 3), children)
        time.sleep(draw.random() * 0.15)
        kill(children)
        saving += bool(list((tmp_path / "cut" / "checkpoints").glob("*tmp*")))
        kills += 1
    run(tmp_path / "cut", **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert final(tmp_path / "cut") == final(tmp_path / "whole")
    assert saving, "no kill met a save under way"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_a_second_start_finishes(tmp_path, processes):
    options = {"processes": processes, "mesh": (processes, 1, 1), "settings": ("save_steps=1000",)}
    run(tmp_path / "whole", **options)
    children = start(tmp_path / "cut", **options)
    wait_for(tmp_path / "cut", 8, children)
    children[-1].send_signal(signal.SIGTERM)  # any one of them; the others hear of it
    codes, said = end(children, tmp_path / "cut")
    assert all(codes), said
    done = len(read_metrics(tmp_path / "cut"))
    assert 8 <= done < STEPS, said
    assert re.search(rf"step {done} of {STEPS} is saved", said), said
    assert (tmp_path / "cut" / "checkpoints" / str(done)).exists()
    run(tmp_path / "cut", **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert final(tmp_path / "cut") == final(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs rights that are not here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_reported_and_training_goes_on(small_disk, tmp_path):
    """Saves fail while a ballast fills the disk; when it is gone, the next one is whole, and the run resumes from it."""
    folder, ballast = small_disk / "run", small_disk / "ballast"
    folder.mkdir()
    settings = ("save_steps=50", "steps=400", "keep_checkpoints=1")
    children = start(folder, settings=settings, logs=tmp_path)
    wait_for(folder, 2, children)
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    until = time.monotonic() + 60
    while time.monotonic() < until and "was not written" not in (tmp_path / "run.0.log").read_text():
        time.sleep(0.05)
    ballast.unlink()
    codes, said = end(children, folder, logs=tmp_path)
    assert "was not written" in said
    assert codes == [0], said
    assert json.loads((folder / "run.json").read_text())
    assert (folder / "checkpoints" / "400").exists()
    assert len(losses(folder)) == 400  # lines that found no room were kept
