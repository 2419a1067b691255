"""HTML page of judged rows with their images, to check before training on them."""

from __future__ import annotations

import importlib.resources
import random
from pathlib import Path

import jinja2

from reverie_jax.annotate.files import JUDGED, read_step_rows
from reverie_jax.data.images import thumbnail
from reverie_jax.data.sources.annotated import KEYS, VERDICT
from reverie_jax.files import atomic_write
from reverie_jax.hosted.images import read_image
from reverie_jax.hosted.interface import UnusableError

THUMBNAIL_SIZE = 280
"""Longest side, in pixels."""


def write_audit(folder: Path, images_folder: Path, count: int, seed: int = 0) -> Path:
    """Write `audit.html`, a random sample of `count` kept and `count` dropped rows, and return its path.

    Raises:
        UserError: The step `judge` did not run.
    """
    rows = read_step_rows(folder / JUDGED, (*KEYS, VERDICT))
    rng = random.Random(seed)
    sample, counts = {}, {}
    for verdict, name in (("no", "kept"), ("yes", "dropped")):
        matching = [row for row in rows if row[VERDICT] == verdict]
        chosen = rng.sample(matching, min(count, len(matching)))
        sample[name] = [row | {"thumbnail": _thumbnail(images_folder, row["image"])} for row in chosen]
        counts[name] = len(matching)
    template = (importlib.resources.files("reverie_jax.annotate") / "audit.html").read_text("utf-8")
    page = folder / "audit.html"
    environment = jinja2.Environment(autoescape=True)
    atomic_write(page, environment.from_string(template).render(sample=sample, counts=counts))
    return page


def _thumbnail(folder: Path, name: str) -> str:
    """Return a small JPEG as a data URL; empty if the image cannot be read."""
    try:
        return thumbnail(read_image(folder, name).encoded, name, THUMBNAIL_SIZE)
    except UnusableError:
        return ""
