"""The benchmark of evaluation runs, and both sides say the same."""

from __future__ import annotations

import json

import pytest

from benchmarks import evaluate


# Compiles and runs torch: more than 20 seconds on busy cores.
@pytest.mark.slow
def test_both_sides_answer_the_same_questions():
    found = evaluate.run(evaluate.Args(size="tiny", images=3, peer_images=2, questions=3, rounds=1, batches=(1, 3)))
    assert json.loads(json.dumps(found)) == found
    assert found["questions_per_second"].keys() == {"ours", "peer"}
    assert found["ours_over_peer"]["median"] > 0
    assert sum(shape["rows"] * shape["batches"] for shape in found["shapes"]) >= 3


def test_pictures_have_numbered_questions():
    shown = evaluate.pictures(evaluate.Args(images=2, questions=18))
    numbers = [number for picture in shown for number, _ in picture.questions]
    assert numbers == list(range(36))
    assert len({talk for _, talk in shown[0].questions}) == 18
