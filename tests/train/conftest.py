"""Finished runs that several tests look at."""

import jax
import pytest

from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import loop
from tests.train import tiny


class StepSpy:
    """Stands for `make_step`; keeps the jitted steps and the shardings of every state that they are given."""

    def __init__(self):
        self.steps, self.shardings, self._make = [], [], loop.make_step

    def __call__(self, *args, **options):
        step = self._make(*args, **options)
        self.steps.append(step)

        def run(state, *inputs):
            self.shardings.append([(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(state)])
            return step(state, *inputs)

        return run


def spied_run(folder, **options):
    spy = StepSpy()
    run = tiny.run(folder, make_step=spy, **options)
    spy.programs = [step._cache_size() for step in spy.steps]  # before another module's tests drop them
    return run, spy


@pytest.fixture(scope="session")
def single_device_run(tmp_path_factory):
    """(run, spy) of `tiny.recipe()` on one device, with a profiler trace."""
    return spied_run(tmp_path_factory.mktemp("single") / "run", profile=True)


@pytest.fixture(scope="session")
def finished(single_device_run):
    return single_device_run[0]


@pytest.fixture(scope="session")
def mesh_run(tmp_path_factory):
    """(run, spy) of `tiny.recipe()` on four devices."""
    return spied_run(tmp_path_factory.mktemp("mesh") / "run", mesh=make_mesh(1, 2, 2))
