"""Compiled programs are kept, where the user says, and serve all sizes of a bucket."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from reverie_jax.cli import programs

NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_programs_are_kept_in_the_cache_folder(environment):
    programs.use_cache()
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert folder.startswith(str(environment))
    assert os.path.isdir(folder)
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == programs.MAX_BYTES


def test_the_users_own_folder_wins(environment, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    programs.use_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert not list(environment.iterdir())


def test_without_a_folder_to_write_to_nothing_is_kept(environment, monkeypatch):
    (environment / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(environment / "file"))
    programs.use_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


COUNT = """
import sys
from reverie_jax.cli.programs import use_cache
use_cache()
import jax
misses = []
jax.monitoring.register_event_listener(lambda event, **_: misses.append(event) if event.endswith("cache_misses") else None)
from reverie_jax.cli import main
main()
print(f"compiled {len(misses)}")
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(environment, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")

    def compiled(*arguments):
        command = [sys.executable, "-c", COUNT, "ask", str(tmp_path / "red.png"), *arguments, "--model", "scenes-base"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.rsplit("compiled ", 1)[1])

    assert compiled("Is there a cup?") > 0
    assert compiled("Is there a cup?") == 0
    assert (
        compiled(*(f"Is there a {name}?" for name in ("cup", "dog", "cat", "hat", "key", "fish", "ball", "boat"))) == 0
    )
    assert compiled("What is this?", "Why?", "--max-new-tokens", "65") == 0
