"""Files to review."""

from __future__ import annotations

import pytest

from tests.hosted.fixtures import reverie
from tests.review.helpers import World

__all__ = ["reverie"]


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)
