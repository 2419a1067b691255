"""Arrows point one way: models <- data <- train, eval <- everything at the top."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "reverie_jax"
ALLOWED = {
    "models": {"models", "errors"},
    "data": {"models", "data", "errors"},
    "train": {"models", "data", "train", "errors"},
    "eval": {"models", "data", "eval", "errors"},
}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("reverie_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "reverie_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("reverie_jax."))


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    wrong = [(str(f.relative_to(PACKAGE)), n) for f in files for n in imports(f) if n not in ALLOWED[room]]
    assert wrong == []


def test_only_checkpoints_touch_files_in_models():
    wrong = [
        path.name
        for path in (PACKAGE / "models").glob("*.py")
        if any(word in path.read_text("utf-8") for word in ("open(", "Path(", "import os", "pathlib"))
    ]
    assert wrong == []


def test_files_can_be_read_in_one_sitting():
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500
    }
    assert long == {}
