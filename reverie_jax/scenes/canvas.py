"""A canvas of roles: shapes in unit-square coordinates, filled with what they are instead of with colors.

Coordinates run from (0, 0), top left, to (1, 1), bottom right, of an object's box; x to the right, y down. Outlines are
drawn outside of a shape, `EDGE` wide, so shapes keep at least that distance from the box's sides.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

Point = tuple[float, float]
Shape = Sequence[Point]

EDGE = 0.03
"""Width of the dark outline, as a fraction of the box's side."""
MARGIN = 0.02
"""Empty border on every side of the box, so that curves that swing out a little are not cut."""


class Role(enum.IntEnum):
    """What a pixel of a drawing is. BODY, SHADE and LIGHT follow the object's color; the others never do."""

    EMPTY = 0
    BODY = 1
    """Main body: the object's color, and its texture."""
    SHADE = 2
    """The object's color, darker and never textured."""
    LIGHT = 3
    """The object's color, paler and never textured."""
    DARK = 4
    WHITE = 5
    GRAY = 6
    SLATE = 7
    LEAF = 8
    WOOD = 9
    GLOW = 10


BODY, SHADE, LIGHT, DARK, WHITE, GRAY = Role.BODY, Role.SHADE, Role.LIGHT, Role.DARK, Role.WHITE, Role.GRAY
SLATE, LEAF, WOOD, GLOW, EMPTY = Role.SLATE, Role.LEAF, Role.WOOD, Role.GLOW, Role.EMPTY


def rect(left: float, top: float, right: float, bottom: float) -> list[Point]:
    """Return an axis-aligned rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def oval(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, end: float = 360) -> list[Point]:
    """Return an ellipse about (x, y), or the part of its rim from `start` to `end` degrees (0 is right, 90 is down)."""
    ry = rx if ry is None else ry
    count = max(6, round(abs(end - start) / 6))
    angles = [math.radians(start + (end - start) * i / count) for i in range(count + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def smooth(points: Shape, closed: bool = True, steps: int = 8) -> list[Point]:
    """Return a Catmull-Rom curve through `points`."""
    n = len(points)
    curve = []
    for i in range(n if closed else n - 1):
        at = [points[j % n] if closed else points[min(max(j, 0), n - 1)] for j in range(i - 1, i + 3)]
        for step in range(steps):
            t = step / steps
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            x, y = (sum(w * p[axis] for w, p in zip(weights, at, strict=True)) / 2 for axis in (0, 1))
            curve.append((x, y))
    return curve if closed else [*curve, points[-1]]


def rotate(points: Shape, degrees: float, scale: float = 1.0) -> list[Point]:
    """Return `points` scaled and turned clockwise about the middle of the box."""
    c, s = math.cos(math.radians(degrees)) * scale, math.sin(math.radians(degrees)) * scale
    return [(0.5 + c * (x - 0.5) - s * (y - 0.5), 0.5 + s * (x - 0.5) + c * (y - 0.5)) for x, y in points]


def mirror(points: Shape) -> list[Point]:
    """Return `points` with left and right exchanged."""
    return [(1 - x, y) for x, y in points]


class Canvas:
    """A square image of roles, `pixels` on a side, on which shapes are drawn in unit-square coordinates."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.image = Image.new("L", (pixels, pixels), Role.EMPTY)
        self._draw = ImageDraw.Draw(self.image)

    def _scaled(self, points: Shape) -> list[Point]:
        scale, shift = self.pixels * (1 - 2 * MARGIN), self.pixels * MARGIN - 0.5
        return [(x * scale + shift, y * scale + shift) for x, y in points]

    def flat(self, role: Role, *shapes: Shape) -> None:
        """Fill shapes, without outline."""
        for shape in shapes:
            self._draw.polygon(self._scaled(shape), fill=int(role))

    def line(self, role: Role, points: Shape, width: float = EDGE) -> None:
        """Draw an open line with round ends and joints."""
        scaled = self._scaled(points)
        pixels = max(1, round(width * self.pixels))
        self._draw.line(scaled, fill=int(role), width=pixels, joint="curve")
        for x, y in (scaled[0], scaled[-1]):
            r = pixels / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=int(role))

    def solid(self, role: Role, *shapes: Shape) -> None:
        """Fill the union of shapes, with a dark outline around the union only."""
        for shape in shapes:
            self.flat(DARK, shape)
            self.line(DARK, [*shape, shape[0]], 2 * EDGE)
        self.flat(role, *shapes)

    def tube(self, role: Role, points: Shape, width: float) -> None:
        """Draw a thick outlined line: handles, stems, posts."""
        self.line(DARK, points, width + 2 * EDGE)
        self.line(role, points, width)

    def hole(self, shape: Shape) -> None:
        """Cut an outlined hole out of what is drawn."""
        self.line(DARK, [*shape, shape[0]], 2 * EDGE)
        self.flat(EMPTY, shape)
