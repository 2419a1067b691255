"""Fixtures shared by the tests of the annotation pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from reverie_jax.annotate.pipeline import AnnotationJob
from reverie_jax.hosted.interface import RequestSettings
from reverie_jax.hosted.session import RequestConfig
from reverie_jax.hosted.throttle import Limits
from tests.annotate import helpers
from tests.hosted.fixtures import clock, keys, reverie, sdks, zygote

__all__ = ["clock", "keys", "reverie", "sdks", "zygote"]
QUICK = Limits(concurrency=8, backoff=0.001, max_backoff=0.005)


@pytest.fixture
def prompts(tmp_path) -> Path:
    return helpers.write_prompts(tmp_path / "prompts")


@pytest.fixture
def images(tmp_path) -> dict[str, bytes]:
    return helpers.write_images(tmp_path / "images", 6)


@pytest.fixture
def make(tmp_path, prompts, images):
    """Return a function that makes a job over the six images; a server stands for the writer and the judge."""

    def job(server: object = None, provider: str = "openai", out: str = "out", **changes) -> AnnotationJob:
        settings, limits = changes.pop("settings", RequestSettings()), changes.pop("limits", QUICK)
        options = {
            "folder": tmp_path / out,
            "images_folder": tmp_path / "images",
            "images": tuple(images),
            "writer": helpers.MODELS[provider] if server is None else helpers.spec_of(server, provider),
            "questions": 1,
            "prompts": prompts,
            "config": RequestConfig(settings, limits),
        }
        return AnnotationJob(**(options | changes))

    return job
