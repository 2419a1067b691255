"""Fixtures shared by the tests of hosted models."""

from tests.hosted.fixtures import clock, keys, reverie, sdks, zygote

__all__ = ["clock", "keys", "reverie", "sdks", "zygote"]
