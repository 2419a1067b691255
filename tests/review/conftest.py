"""Files to review."""

from __future__ import annotations

import pytest

from reverie_jax.review import marks_file
from tests.hosted.fixtures import reverie
from tests.review.helpers import World

__all__ = ["reverie"]


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    """Do not wait for the disk; the processes that are killed do."""
    monkeypatch.setattr(marks_file.os, "fsync", lambda descriptor: None)


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)
