"""Fixtures shared with the tests of hosted models."""

from tests.hosted.fixtures import keys, reverie

__all__ = ["keys", "reverie"]
