"""The benchmark of a step runs, and its three ways do the same work."""

from __future__ import annotations

import json

import pytest

from benchmarks import train_step


# Compiles two steps and runs torch: more than 20 seconds on busy cores.
@pytest.mark.slow
def test_all_ways_take_the_same_step():
    found = train_step.run(train_step.Args(size="tiny", rounds=1, images=1))
    assert json.loads(json.dumps(found)) == found
    assert list(found["seconds"]) == list(train_step.WAYS)
    for way in train_step.WAYS:
        assert found["losses"][way] == pytest.approx(found["losses"]["peer"], rel=1e-3)
        assert found["losses"][way][0] == pytest.approx(found["losses"]["peer"][0], rel=1e-4)
        assert found["computed"][way]["tokens"] > 0
        rate = found["conversation_tokens"] / found["seconds"][way]["median"]
        assert found["tokens_per_second"][way] == pytest.approx(rate, rel=0.05)
    assert found["compiled_in_rounds"] == 0
    assert found["conversations"] > found["images"]
    assert found["supervised_tokens"] < found["conversation_tokens"]
    assert found["tree_over_peer"].keys() == {"median", "min", "max"}


def test_other_work_is_refused():
    losses = {"peer": [2.0, 1.9], "flat": [2.0, 1.9], "tree": [2.001, 1.9]}
    with pytest.raises(RuntimeError, match="same work"):
        train_step.check(losses, train_step.Args(size="tiny"))
    train_step.check(losses | {"tree": [2.0001, 1.9]}, train_step.Args(size="tiny"))
    # Weights of its own: the peer's loss says nothing there.
    train_step.check(losses | {"peer": [3.0, 2.0]}, train_step.Args(size="7b"))
