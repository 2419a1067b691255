"""Every file in examples/ runs, at a size of seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "read_tree": [],
    "train_custom_dataset": ["--records", "16", "--steps", "2"],
    "evaluate_checkpoint": ["--scenes", "4"],
    "judge_answers": [],
    "plan_run": [],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *ARGUMENTS[name]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
