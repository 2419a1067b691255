"""The Python code of README and docs runs as it is printed, page by page."""

import contextlib
import functools
import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from reverie_jax import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block below `<!-- not run: reason -->` needs what a test does not have, such as a 7B checkpoint.
BLOCK = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [path for path in PAGES if BLOCK.search(path.read_text("utf-8"))]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("cat.png")
    namespace = {"__name__": "docs"}
    for block in BLOCK.findall(path.read_text("utf-8")):
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8"))
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in local if not (path.parent / link).exists()] == []


COMMAND = re.compile(r"^reverie ((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)


@functools.cache
def help_of(*command: str) -> str:
    """Return what `reverie COMMAND --help` prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["reverie", *command, "--help"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code in (0, None), f"reverie {' '.join(command)}"
    return out.getvalue()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_commands_exist(path):
    """Every `reverie ...` line of a page names a command and options that `--help` knows."""
    for block in re.findall(r"^```\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        for line in COMMAND.findall(block):
            words = re.sub(r"\s#.*", "", line.replace("\\\n", " ")).split()
            command = words[: 2 if words[0] in ("data", "scenes") else 1]
            if not command or command[0].startswith("-") or command[0].isupper():
                continue
            known = help_of(*command)
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                positive = option.replace("--no-", "--")
                assert positive in known, f"{path.name}: reverie {' '.join(command)} has no {option}"
