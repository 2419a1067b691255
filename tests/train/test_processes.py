"""Several processes, kills at random moments, SIGTERM, full disks: a run ends as an undisturbed one.

Runs are processes of their own (`python -m tests.train.tiny`) on fake CPU devices, joined over the loopback.
"""

import contextlib
import gc
import json
import os
import random
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

from reverie_jax.errors import UserError
from reverie_jax.train import loop
from reverie_jax.train.checkpoint import RunCheckpoints
from reverie_jax.train.distributed import join
from reverie_jax.train.identity import read_identity
from reverie_jax.train.metrics import EventFile, MetricsLog, read_metrics
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.samples import read_samples
from reverie_jax.train.step import TrainState, is_lora_or_projector, make_optimizer, make_trainable
from tests.eval.benchmarks import makers
from tests.train import tiny

STEPS = 40
SETTINGS = (f"steps={STEPS}", "save_steps=10")


def start(folder, *, processes=1, devices=1, mesh=(1, 1, 1), settings=(), options=()):
    """Start the processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    children = []
    for index in range(processes):
        command = [sys.executable, "-m", "tests.train.tiny", str(folder), "--mesh", *map(str, mesh)]
        command += ["--distributed", f"127.0.0.1:{port},{processes},{index}"] if processes > 1 else []
        command += [*options, "--set", *SETTINGS, *settings]
        # Every program is cached for the next process: most of a short run is compiling.
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        # Threads of XLA: a collective holds one on each device until its peers arrive, and on two cores there were only two.
        environment["NPROC"] = "16"
        with (folder.parent / f"{folder.name}.{index}.log").open("ab") as log:
            children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return children


def wait(children, folder, *, seconds=300):
    """Return (exit codes, end of the logs) of all processes."""
    try:
        codes = [child.wait(timeout=seconds) for child in children]
    except subprocess.TimeoutExpired:
        kill(children)
        codes = [None]
    logs = sorted(folder.parent.glob(f"{folder.name}.*.log"))
    return codes, "\n".join(path.read_text()[-3000:] for path in logs)


def kill(children):
    for child in children:
        child.kill()  # does nothing if it has ended
    for child in children:
        child.wait()


def run(folder, **options):
    codes, logs = wait(start(folder, **options), folder)
    assert codes == [0] * len(codes), logs


def wait_for_step(folder, step, children, seconds=900):
    """Wait until so many steps are logged, or the run has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        if len(read_metrics(folder)) >= step:
            return
        time.sleep(0.01)


def initial_state(recipe):
    model = tiny.model()
    make_trainable(model, recipe)
    params = nnx.state(model, is_lora_or_projector)
    return TrainState(params, make_optimizer(recipe).init(params), jnp.zeros((), jnp.int32))


def last_state(folder):
    """Return the bytes of all arrays in the last checkpoint: trained parameters, moments and step."""
    recipe = Recipe.from_json(json.dumps(read_identity(folder)["recipe"]))
    checkpoints = RunCheckpoints(folder, recipe)
    state, _ = checkpoints.restore(initial_state(recipe))
    checkpoints.close()
    assert int(state.step) == recipe.steps
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_same_run(folder, other):
    assert tiny.read_losses(folder) == tiny.read_losses(other)
    assert last_state(folder) == last_state(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        *((1, 4, mesh) for mesh in ((4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4), (1, 4, 1))),
        *((2, 2, mesh) for mesh in ((4, 1, 1), (2, 2, 1), (2, 1, 2))),
    ],
)
def test_devices_and_processes_give_the_losses_of_one_device(tmp_path, processes, devices, mesh):
    run(tmp_path / "one")
    run(tmp_path / "many", processes=processes, devices=devices, mesh=mesh)
    assert tiny.read_losses(tmp_path / "many") == pytest.approx(tiny.read_losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_in_one(tmp_path):
    run(tmp_path / "whole", devices=2, mesh=(2, 1, 1))
    children = start(tmp_path / "cut", processes=2, devices=1, mesh=(2, 1, 1))
    wait_for_step(tmp_path / "cut", 12, children)
    kill(children)
    assert 10 <= len(read_metrics(tmp_path / "cut")) < STEPS
    run(tmp_path / "cut", devices=4, mesh=(2, 2, 1))
    assert tiny.read_losses(tmp_path / "cut") == pytest.approx(tiny.read_losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Before the first step: later, losses differ by rounding, and so may answers."""
    rows = [(f"{i}.png", f"Is there a {n}?", "yes") for i in "abc" for n in ("cup", "dog")]
    pope = makers.pope(tmp_path / "pope", random=rows, popular=rows, adversarial=rows)
    options = {"options": ("--pope", str(pope)), "settings": ("steps=4",)}
    run(tmp_path / "one", **options)
    run(tmp_path / "two", processes=2, mesh=(2, 1, 1), **options)
    first = []
    for name in ("one", "two"):
        metrics = read_metrics(tmp_path / name)
        assert [row["step"] for row in metrics if "eval/pope/f1" in row] == [0, 3, 4]
        samples = [row for row in read_samples(tmp_path / name) if row["step"] == 0]
        file = tmp_path / name / "evaluations" / "0" / "pope" / "predictions.jsonl"
        texts = [json.loads(line)["text"] for line in file.read_bytes().splitlines()]
        first.append((metrics[0], samples, texts))
    assert first[0] == first[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_change_nothing(tmp_path, processes):
    """Each at a random moment after the run has progressed a little; many during a save."""
    options = {"processes": processes, "mesh": (processes, 1, 1), "settings": ("save_steps=1", "keep_checkpoints=3")}
    run(tmp_path / "whole", **options)
    rng, kills, saving = random.Random(7), 0, 0
    while kills < 20:
        before = len(read_metrics(tmp_path / "cut"))
        if before >= STEPS - 1:  # finished early: the remaining kills hit a new run
            shutil.rmtree(tmp_path / "cut")
            before = 0
        children = start(tmp_path / "cut", **options)
        wait_for_step(tmp_path / "cut", before + rng.randint(-1, 3), children)
        time.sleep(rng.random() * 0.15)
        kill(children)
        saving += bool(list((tmp_path / "cut" / "checkpoints").glob("*tmp*")))
        kills += 1
    run(tmp_path / "cut", **options)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert saving, "no kill hit a save in progress"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path, processes):
    options = {"processes": processes, "mesh": (processes, 1, 1), "settings": ("save_steps=1000",)}
    run(tmp_path / "whole", **options)
    children = start(tmp_path / "cut", **options)
    wait_for_step(tmp_path / "cut", 8, children)
    children[-1].send_signal(signal.SIGTERM)
    codes, logs = wait(children, tmp_path / "cut")
    assert all(codes), logs
    step = len(read_metrics(tmp_path / "cut"))
    assert 8 <= step < STEPS, logs
    assert f"step {step} of {STEPS} is saved" in logs
    assert (tmp_path / "cut" / "checkpoints" / str(step)).exists()
    run(tmp_path / "cut", **options)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("text", ["here", "127.0.0.1,2,0", "127.0.0.1:80,2", "127.0.0.1:80,2,2", "127.0.0.1:80,0,0"])
def test_bad_addresses_are_refused(text):
    with pytest.raises(UserError, match=f"--distributed {text}"):
        join(text)
    join("")  # does nothing


@pytest.fixture
def small_disk(tmp_path):
    """Folder on a file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast):
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_metrics_wait_for_disk_space(small_disk, caplog):
    values = {"loss": 1.0} | {f"value {index}": 1.0 for index in range(500)}  # more than a page
    with MetricsLog(small_disk / "run", 2) as log:
        fill(small_disk / "ballast")
        log.write(1, values)
        assert "metrics.jsonl cannot be written" in caplog.text
        assert read_metrics(small_disk / "run") == []
        (small_disk / "ballast").unlink()
        log.write(2, values)
    assert [row["step"] for row in read_metrics(small_disk / "run")] == [1, 2]


# Orbax's threads and coroutines of a failed save end with errors that it does not fetch.
a_save_fails = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


def test_an_event_file_ends_quietly_on_a_full_disk(small_disk, caplog):
    """Its writer is a thread that an error would end."""
    file = EventFile(str(small_disk / "events"))
    fill(small_disk / "ballast")
    for _ in range(9):
        file.write(bytes(4096))
        file.flush()
    file.close()
    assert caplog.text.count("events: cannot be written") == 1


# Orbax's other writes of the failed save end after its event loop has.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@a_save_fails
def test_a_failed_save_costs_no_other_and_leaves_nothing(small_disk, caplog):
    state, recipe = initial_state(tiny.recipe()), tiny.recipe(keep_checkpoints=1)
    checkpoints = RunCheckpoints(small_disk / "run", recipe, {})
    fill(small_disk / "ballast")
    for step, succeeds in ((3, False), (6, True), (8, True)):
        checkpoints.save(state._replace(step=jnp.int32(step)), {})
        assert checkpoints.wait() == succeeds
        assert "checkpoint of step 3 was not written" in caplog.text
        (small_disk / "ballast").unlink(missing_ok=True)
    checkpoints.close()
    gc.collect()  # what is left of the failed save ends in this test
    assert [path.name for path in (small_disk / "run" / "checkpoints").iterdir()] == ["8"]


@pytest.mark.slow
@a_save_fails
def test_training_continues_on_a_full_disk(finished, small_disk, monkeypatch, caplog):
    """The save after step 3 fails; the next ones succeed."""
    folder, ballast, opened = small_disk / "run", small_disk / "ballast", []

    def free():
        assert not opened[0].wait()
        ballast.unlink()

    checkpoints = loop.RunCheckpoints
    monkeypatch.setattr(loop, "RunCheckpoints", lambda *args: opened.append(checkpoints(*args)) or opened[-1])
    tiny.after_step(monkeypatch, 2, lambda: fill(ballast))
    tiny.after_step(monkeypatch, 5, free)
    run = tiny.run(folder, keep_checkpoints=1)
    gc.collect()
    assert run.losses == finished.losses
    assert caplog.text.count("was not written") == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["8"]
