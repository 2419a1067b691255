"""Fixtures shared by the tests of hosted models."""

from tests.hosted.fixtures import begin, clock, keys, reverie, sdks, zygote

__all__ = ["begin", "clock", "keys", "reverie", "sdks", "zygote"]
