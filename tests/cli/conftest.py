"""Fixtures shared by the tests of hosted models."""

from __future__ import annotations

import pytest

from tests.annotate import helpers
from tests.hosted.fixtures import clock, keys, reverie, sdks, zygote

__all__ = ["clock", "keys", "reverie", "sdks", "zygote"]


@pytest.fixture
def images(tmp_path) -> dict[str, bytes]:
    return helpers.write_images(tmp_path / "images", 5)


@pytest.fixture
def annotate(reverie, tmp_path, images):
    """Return a function that runs `reverie annotate STEP` over five images; options are keywords."""
    prompts = helpers.write_prompts(tmp_path / "prompts")

    def run(step: str, writer: str | None = None, *more, **changes) -> tuple[int, str, str]:
        options = {"out": tmp_path / "out", "images": tmp_path / "images", "prompts": prompts, "questions": 1}
        words: list = ["annotate", step]
        for name, value in (options | {"writer": writer} | changes).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
        return reverie(*words, *more)

    return run
