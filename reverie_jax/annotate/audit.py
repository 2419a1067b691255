"""A page of judged rows with their pictures, for a person to look through before anything is trained on them."""

from __future__ import annotations

import importlib.resources
import random
from pathlib import Path

import jinja2

from reverie_jax.annotate.pipeline import JUDGED, KEYS, REASONED, VERDICT, read_stage_rows
from reverie_jax.data.images import thumbnail
from reverie_jax.hosted import images
from reverie_jax.hosted.interface import Refused

SIDE = 280


def write(folder: Path, shown: Path, count: int, seed: int = 0) -> Path:
    """Writes `audit.html`: a random sample of kept rows, and as many of those that were dropped.

    Raises:
        UserError: nothing has been judged yet.
    """
    rows = read_stage_rows(folder / JUDGED, (*KEYS, *REASONED, VERDICT))
    draw = random.Random(seed)
    sample = {}
    for verdict, name in (("no", "kept"), ("yes", "dropped")):
        those = [row for row in rows if row[VERDICT] == verdict]
        chosen = draw.sample(those, min(count, len(those)))
        sample[name] = [row | {"picture": _thumbnail(shown, row["image"])} for row in chosen]
    template = (importlib.resources.files("reverie_jax.annotate") / "audit.html").read_text("utf-8")
    counts = {
        name: sum(row[VERDICT] == verdict for row in rows) for verdict, name in (("no", "kept"), ("yes", "dropped"))
    }
    page = folder / "audit.html"
    page.write_text(
        jinja2.Environment(autoescape=True).from_string(template).render(sample=sample, counts=counts), "utf-8"
    )
    return page


def _thumbnail(folder: Path, name: str) -> str:
    """A small JPEG as a data address; empty where the picture cannot be read."""
    try:
        return thumbnail(images.read(folder, name).encoded, name, SIDE)
    except Refused:
        return ""
