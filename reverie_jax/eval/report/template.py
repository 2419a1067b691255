"""Pieces that HTML reports share: colors, numbers, verdicts, and the templates' environment."""

from __future__ import annotations

import math
from pathlib import Path

import jinja2

COLORS = ("#8a8f98", "#3b7dd8", "#c2571a", "#2a9d6f", "#a05bc4", "#b8901c", "#d0477a", "#3aa3b0")
"""Of runs, in their order."""
FEW = 20
"""An interval over fewer clusters than this is only rough."""


def environment(*folders: Path) -> jinja2.Environment:
    """Return the environment of templates in these folders; they may include `style.html` and import `macros.html`."""
    loader = jinja2.FileSystemLoader([*folders, Path(__file__).parent])
    result = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    result.filters |= {"number": number}
    return result


def number(value: float | None, digits: int, sign: str = "") -> str:
    """Return a number such as "0.812"; a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def verdict(low: float, high: float, clusters: int) -> str:
    """Return what the interval of a difference allows to say; `clusters` is the number that was resampled."""
    if clusters < 2 or not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    rough = "" if clusters >= FEW else f" (rough: {clusters} clusters)"
    return ("higher" if low > 0 else "lower" if high < 0 else "no significant difference") + rough
