"""The Dockerfile cannot be built here; what it copies exists, and its pip line resolves for each kind of image."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
EXTRAS = sorted(set(re.findall(r"\bEXTRAS=([\w,]+)", TEXT)))


def test_it_names_what_exists():
    assert EXTRAS == ["web", "web,cuda13", "web,tpu"]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {name for extras in EXTRAS for name in extras.split(",")} <= known.keys()
    copied = [path for line in re.findall(r"^COPY (.*)", TEXT, re.MULTILINE) for path in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    line = re.search(r"^ARG PYTHON=(\S+)", TEXT, re.MULTILINE)[1]
    assert (ROOT / "constraints" / f"py{line.replace('.', '')}.txt").exists()
    assert not re.search(r"https?://|--index-url|--extra-index-url|--trusted-host", TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("extras", EXTRAS)
def test_its_packages_resolve(extras):
    """With the constraints of the Python that runs the tests; needs a package index."""
    constraints = ROOT / "constraints" / f"py{sys.version_info[0]}{sys.version_info[1]}.txt"
    if sys.version_info < (3, 12):
        extras = extras.replace("cuda13", "cuda12")
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--constraint", constraints, f"{ROOT}[{extras}]"]
    found = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
