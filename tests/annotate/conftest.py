"""Fixtures shared by the tests of hosted models."""

from tests.hosted.fixtures import clock, keys, reverie, zygote

__all__ = ["clock", "keys", "reverie", "zygote"]
