"""Loaded samples of all benchmarks."""

import pytest

from tests.eval.benchmarks.samples import SAMPLES, Case, build


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Return a function of a benchmark's name: its sample, loaded once."""
    found: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in found:
            data = SAMPLES[name](tmp_path_factory.mktemp(name))
            found[name] = Case(build(name), build(name).load(data), data)
        return found[name]

    return case
