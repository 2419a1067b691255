"""Notebooks: their commands are known to the CLI; the demo's is executed, at a size of minutes."""

import importlib
import json
import os
import shlex
import sys
import types
from pathlib import Path

import pytest
import tyro

from reverie_jax import cli
from tests.hosted.fixtures import reverie

__all__ = ["reverie"]
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"demo": ["--train-images", "8", "--test-images", "3", "--steps", "1"]}
"""Options that make a command of the demo's notebook small."""


def code(path: Path) -> list[str]:
    """Return the code cells."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(cell[1:])[1:] for cell in code(path) if cell.startswith("!reverie ")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_commands_are_valid(path):
    found = commands(path)
    assert len(found) == sum(cell.startswith("!") for cell in code(path)) > 2
    for words in found:
        tyro.cli(cli.Command, args=words, **cli._OPTIONS)
    with pytest.raises(SystemExit):
        tyro.cli(cli.Command, args=[*found[1], "--no-such-option", "1"], **cli._OPTIONS)


@pytest.mark.slow
def test_the_demo_runs(reverie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.import_module("treescope")  # flax's; later it would look into the IPython below
    shown: list[str] = []
    display = types.SimpleNamespace(IFrame=lambda path, **size: shown.append(path))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    namespace: dict = {}
    for cell in code(EXAMPLES / "demo.ipynb"):
        if cell.startswith("!"):
            words = shlex.split(cell[1:])[1:]
            result = reverie(*words, *SMALL.get(words[0], []))
            assert result[0] == 0, result
        else:
            exec(compile(cell, "demo.ipynb", "exec"), namespace)
    assert shown == ["demo/report.html", "sample.html"]
    assert all(os.path.getsize(path) > 1000 for path in shown)
