"""The evidence as a whole at a tiny size, in this process; and units that stop half-way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from reverie_jax.scenes import benchmark, dataset
from reverie_jax.scenes.evidence import run, schedule
from reverie_jax.scenes.evidence.units import DECODERS, PLAIN, SEARCH_SEED, TESTS, Evidence, Sizes
from reverie_jax.scenes.graph import take_scenes

SIZES = Sizes(seeds=1, budgets=(4,), main=4, passes=(8,), test=2, held_out=2, validation=2)
ARMS = ("answers", "sentences")


def complete(out: Path) -> Evidence:
    """Run everything as `run.run` does, but for its processes."""
    evidence = Evidence(out, SIZES)
    run._claim(out, SIZES, evidence.model)
    evidence.pictures(SEARCH_SEED)
    evidence.run_base()
    for unit in schedule.search_units(SIZES, ARMS):
        evidence.run(unit)
    choices = schedule.choose(evidence, ARMS)
    for unit in schedule.main_units(SIZES, choices):
        evidence.run(unit)
    run.write_page(evidence, choices, evidence.out, quick=True)
    return evidence


def contents(out: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(out)): np.load(path) for path in sorted(out.glob("units/*/*.npy"))}


@pytest.mark.slow
def test_evidence_that_is_stopped_and_resumed_has_the_same_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "take_scenes", lambda *args: take_scenes(*args[:3], min(args[3], 100)))
    whole, half, evaluate, evaluated = tmp_path / "whole", tmp_path / "half", Evidence.evaluate, []
    evidence = complete(whole)
    found, main = contents(whole), [path.name for path in (whole / "units").glob("*seed0")]
    expected = {f"units/base/{test}-{PLAIN}.npy" for test in TESTS}
    expected |= {f"units/base/test-{decoder}.npy" for decoder in DECODERS}
    expected |= {f"units/{name}/{test}-{PLAIN}.npy" for name in main for test in ("test", "pairs", "compositions")}
    assert expected <= found.keys()
    assert {counts.shape for counts in found.values()} == {(2, benchmark.COLUMNS["rationale"].stop)}
    for facts in map(evidence.facts, main):
        assert 0 < facts["records"] == facts["stats"]["records"] <= facts["pictures"] == 4
        assert facts["stats"]["tokens"] < facts["stats"]["flat_tokens"]
    assert "answers against base" in (whole / "evidence.md").read_text("utf-8")

    # Stopped while the last unit is evaluated: nothing of it stays, and a later call does what is missing alone.
    shutil.copytree(whole, half)
    last = next(name for name in main if name.startswith("sentences"))
    shutil.rmtree(half / "units" / last)

    def stop(self, *arguments, **more):
        evaluated.append(arguments[2].name)
        if len(evaluated) == 1:
            raise KeyboardInterrupt
        evaluate(self, *arguments, **more)

    monkeypatch.setattr(Evidence, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        complete(half)
    assert not list((half / "units").glob(f"*{last}*"))
    complete(half)
    assert len(evaluated) == 2
    assert contents(half).keys() == found.keys()
    for name, counts in contents(half).items():
        np.testing.assert_array_equal(counts, found[name], err_msg=name)
    assert (half / "search.json").read_text() == (whole / "search.json").read_text()
