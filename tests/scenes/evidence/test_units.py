"""The evidence as a whole at a tiny size, in this process; and units that stop half-way."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from reverie_jax.scenes import benchmark, dataset
from reverie_jax.scenes.evidence import run, schedule
from reverie_jax.scenes.evidence.units import DECODERS, PLAIN, SEARCH_SEED, TESTS, Evidence, Sizes, Unit
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
    run.write_page(evidence, choices, quick=True)
    return evidence


def contents(out: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(out)): np.load(path) for path in sorted(out.glob("units/*/*.npy"))}


@pytest.mark.slow
def test_evidence_that_is_stopped_and_resumed_has_the_same_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "take_scenes", lambda *args: take_scenes(*args[:3], min(args[3], 100)))
    evidence = complete(tmp_path / "whole")
    found, columns = contents(tmp_path / "whole"), benchmark.COLUMNS["rationale"].stop
    main = [path.name for path in (tmp_path / "whole" / "units").iterdir() if path.name.endswith("seed0")]
    expected = {f"units/base/{test}-{PLAIN}.npy" for test in TESTS}
    expected |= {f"units/base/test-{decoder}.npy" for decoder in DECODERS}
    expected |= {f"units/{name}/{test}-{PLAIN}.npy" for name in main for test in ("test", "pairs", "compositions")}
    assert expected <= found.keys()
    assert all(counts.shape == (2, columns) and np.isfinite(counts).all() for counts in found.values())
    for name in main:
        facts = evidence.facts(name)
        assert (facts["stats"]["records"], facts["seed"], facts["pictures"]) == (facts["records"], 0, 4)
        assert 0 < facts["records"] <= 4
        assert facts["stats"]["tokens"] < facts["stats"]["flat_tokens"]
    assert "answers against base" in (tmp_path / "whole" / "evidence.md").read_text("utf-8")

    # Stopped while the last unit is evaluated: nothing of it stays, and a later call does what is missing alone.
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    last = next(name for name in main if name.startswith("sentences"))
    shutil.rmtree(tmp_path / "half" / "units" / last)
    (tmp_path / "half" / "evidence.md").unlink()
    evaluate, evaluated = Evidence.evaluate, []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evidence, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path / "half")
    assert not [path for path in (tmp_path / "half" / "units").iterdir() if last in path.name]

    def note(self, model, processor, folder, *arguments, **more):
        evaluated.append(folder.name)
        evaluate(self, model, processor, folder, *arguments, **more)

    monkeypatch.setattr(Evidence, "evaluate", note)
    complete(tmp_path / "half")
    assert len(evaluated) == 1
    again = contents(tmp_path / "half")
    assert again.keys() == found.keys()
    for name, counts in found.items():
        np.testing.assert_array_equal(again[name], counts, err_msg=name)
    assert (tmp_path / "half" / "search.json").read_text() == (tmp_path / "whole" / "search.json").read_text()


def test_a_unit_is_named_by_all_that_it_is_trained_with():
    unit = Unit("answers", 4, 1e-3, 8, 0)
    changes = {"arm": "reflective", "pictures": 8, "learning_rate": 3e-3, "passes": 16, "seed": 1}
    others = [dataclasses.replace(unit, **{field: value}) for field, value in changes.items()]
    assert len({one.name for one in (unit, *others)}) == 6
    recipe = Unit("answers", 4, 3e-3, 16, 5).recipe
    assert (recipe.learning_rate, recipe.projector_learning_rate, recipe.seed) == (3e-3, pytest.approx(3e-4), 5)
    assert recipe.steps * recipe.batch_size == 16
