"""Shapes of the categories: a small drawing function for each, in unit-square coordinates.

A drawing does not choose colors. It fills shapes with *roles* (main body, shade, outline, ...), which `draw` turns into
colors and textures. So a drawing is made once for each size in pixels and reused in every color.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from PIL import Image

from reverie_jax.scenes.canvas import (
    BODY,
    DARK,
    GLOW,
    GRAY,
    LEAF,
    LIGHT,
    SHADE,
    SLATE,
    WHITE,
    WOOD,
    Canvas,
    Point,
    Role,
    Shape,
    mirror,
    oval,
    rect,
    rotate,
    smooth,
)


def _apple(canvas: Canvas) -> None:
    half = [(0.5, 0.3), (0.62, 0.22), (0.8, 0.24), (0.93, 0.45), (0.88, 0.7), (0.74, 0.91), (0.6, 0.94), (0.5, 0.91)]
    canvas.solid(BODY, smooth(half + mirror(half)[-2:0:-1]))
    canvas.line(DARK, smooth([(0.5, 0.36), (0.49, 0.22), (0.44, 0.07)], closed=False), 0.06)
    canvas.solid(LEAF, smooth([(0.53, 0.2), (0.62, 0.07), (0.82, 0.06), (0.74, 0.17)]))
    canvas.line(WHITE, oval(0.4, 0.56, 0.22, 0.22, 170, 235), 0.06)


def _ball(canvas: Canvas) -> None:
    canvas.solid(BODY, oval(0.5, 0.5, 0.45))
    canvas.line(DARK, [(0.5, 0.06), (0.5, 0.94)], 0.04)
    canvas.line(DARK, [(0.06, 0.5), (0.94, 0.5)], 0.04)
    seam = [p for p in oval(-0.02, 0.5, 0.32, 0.42, -62, 62) if math.dist(p, (0.5, 0.5)) < 0.45]
    canvas.line(DARK, seam, 0.04)
    canvas.line(DARK, mirror(seam), 0.04)


def _banana(canvas: Canvas) -> None:
    outer = [(0.87, 0.16), (0.95, 0.42), (0.85, 0.7), (0.6, 0.9), (0.3, 0.93), (0.09, 0.82)]
    inner = [(0.07, 0.75), (0.3, 0.71), (0.53, 0.6), (0.68, 0.42), (0.73, 0.2)]
    canvas.solid(BODY, smooth(outer + inner))
    canvas.solid(WOOD, [(0.73, 0.2), (0.76, 0.05), (0.85, 0.05), (0.87, 0.18)])
    canvas.flat(DARK, oval(0.09, 0.785, 0.055))
    canvas.line(DARK, smooth([(0.82, 0.26), (0.81, 0.48), (0.68, 0.68), (0.46, 0.8), (0.2, 0.81)], closed=False), 0.022)


def _bird(canvas: Canvas) -> None:
    for x in (0.47, 0.6):
        canvas.line(DARK, [(x, 0.8), (x, 0.95), (x + 0.09, 0.95)], 0.04)
    canvas.solid(GLOW, [(0.86, 0.2), (0.97, 0.3), (0.84, 0.37)])
    body = smooth([(0.3, 0.5), (0.52, 0.38), (0.8, 0.45), (0.83, 0.65), (0.62, 0.84), (0.38, 0.78)])
    canvas.solid(BODY, body, oval(0.71, 0.27, 0.2), [(0.42, 0.5), (0.05, 0.36), (0.04, 0.56), (0.42, 0.76)])
    canvas.line(DARK, [(0.05, 0.46), (0.2, 0.53)], 0.025)
    canvas.solid(SHADE, smooth([(0.66, 0.5), (0.62, 0.66), (0.4, 0.74), (0.2, 0.68), (0.36, 0.56), (0.5, 0.46)]))
    canvas.flat(WHITE, oval(0.76, 0.24, 0.07))
    canvas.flat(DARK, oval(0.78, 0.24, 0.04))


def _boat(canvas: Canvas) -> None:
    canvas.line(DARK, [(0.47, 0.05), (0.47, 0.7)], 0.05)
    canvas.solid(BODY, [*smooth([(0.53, 0.08), (0.8, 0.32), (0.9, 0.58)], closed=False), (0.53, 0.58)])
    canvas.solid(WHITE, [(0.41, 0.16), (0.41, 0.58), (0.12, 0.58)])
    canvas.solid(BODY, [(0.05, 0.69), (0.95, 0.69), (0.8, 0.94), (0.22, 0.94)])
    canvas.line(WHITE, [(0.14, 0.77), (0.84, 0.77)], 0.035)


def _book(canvas: Canvas) -> None:
    canvas.solid(WHITE, rect(0.18, 0.7, 0.86, 0.94))
    for y in (0.84, 0.895):
        canvas.line(GRAY, [(0.22, y), (0.86, y)], 0.02)
    canvas.solid(BODY, rect(0.14, 0.06, 0.9, 0.78))
    canvas.solid(SHADE, [(0.14, 0.06), (0.26, 0.06), (0.26, 0.78), (0.2, 0.8), (0.2, 0.94), (0.14, 0.92), (0.1, 0.84)])
    canvas.solid(SHADE, rect(0.1, 0.9, 0.9, 0.94))
    canvas.flat(WHITE, rect(0.37, 0.16, 0.8, 0.42))
    canvas.line(DARK, [(0.43, 0.24), (0.74, 0.24)], 0.035)
    canvas.line(DARK, [(0.43, 0.33), (0.66, 0.33)], 0.035)


def _icing(left: float, right: float, top: float) -> list[Point]:
    """Return icing over the top of a cake's tier, with drips that alternate in length."""
    count = round((right - left) / 0.11)
    step = (right - left) / count
    ends = [(right - (i + 0.5) * step, top + 0.06 + 0.05 * (i % 2)) for i in range(count)]
    return [(left, top), (right, top), *(p for x, y in ends for p in oval(x, y, step / 2, 0.05, 0, 180))]


def _cake(canvas: Canvas) -> None:
    canvas.solid(GRAY, rect(0.04, 0.9, 0.96, 0.94))
    canvas.solid(BODY, rect(0.1, 0.56, 0.9, 0.89))
    canvas.solid(WHITE, _icing(0.1, 0.9, 0.54))
    canvas.solid(BODY, rect(0.25, 0.26, 0.75, 0.53))
    canvas.solid(WHITE, _icing(0.25, 0.75, 0.24))
    canvas.line(DARK, smooth([(0.5, 0.14), (0.53, 0.06), (0.6, 0.04)], closed=False), 0.025)
    canvas.solid(SHADE, oval(0.5, 0.17, 0.07))


def _candle(canvas: Canvas) -> None:
    canvas.tube(SLATE, oval(0.86, 0.82, 0.08), 0.03)
    canvas.solid(SLATE, oval(0.46, 0.85, 0.41, 0.09))
    canvas.solid(BODY, [(0.22, 0.4), (0.7, 0.4), (0.7, 0.83), *oval(0.46, 0.83, 0.24, 0.05, 0, 180)])
    canvas.solid(
        LIGHT,
        [
            (0.22, 0.37),
            (0.7, 0.37),
            (0.7, 0.42),
            *oval(0.62, 0.42, 0.08, 0.04, 0, 180),
            *oval(0.46, 0.5, 0.08, 0.05, 0, 180),
            *oval(0.3, 0.43, 0.08, 0.05, 0, 180),
        ],
    )
    canvas.line(DARK, [(0.46, 0.36), (0.46, 0.27)], 0.04)
    canvas.solid(GLOW, smooth([(0.46, 0.04), (0.56, 0.18), (0.55, 0.26), (0.46, 0.31), (0.37, 0.26), (0.36, 0.18)]))


def _car(canvas: Canvas) -> None:
    cabin = [(0.18, 0.5), (0.3, 0.19), (0.67, 0.19), (0.82, 0.5)]
    canvas.solid(
        BODY,
        cabin,
        smooth(
            [(0.06, 0.55), (0.15, 0.47), (0.8, 0.47), (0.93, 0.55), (0.94, 0.7), (0.9, 0.74), (0.1, 0.74), (0.06, 0.7)],
            steps=4,
        ),
    )
    canvas.solid(WHITE, [(0.29, 0.46), (0.36, 0.27), (0.46, 0.27), (0.46, 0.46)])
    canvas.solid(WHITE, [(0.53, 0.46), (0.53, 0.27), (0.62, 0.27), (0.71, 0.46)])
    canvas.flat(GLOW, oval(0.91, 0.58, 0.045))
    for x in (0.26, 0.75):
        canvas.flat(DARK, oval(x, 0.74, 0.145))
        canvas.flat(GRAY, oval(x, 0.74, 0.07))


def _cat(canvas: Canvas) -> None:
    ear = [(0.1, 0.5), (0.1, 0.06), (0.42, 0.28)]
    canvas.solid(BODY, ear, mirror(ear), oval(0.5, 0.6, 0.43, 0.34))
    inner = [(0.15, 0.34), (0.16, 0.17), (0.29, 0.27)]
    canvas.flat(LIGHT, inner, mirror(inner))
    for side in (1, -1):
        canvas.solid(WHITE, oval(0.5 + side * 0.18, 0.53, 0.085, 0.085))
        canvas.flat(DARK, oval(0.5 + side * 0.18, 0.53, 0.035, 0.085))
        canvas.line(DARK, oval(0.5 + side * 0.075, 0.76, 0.075, 0.07, 0, 180), 0.03)
        for y in (0.66, 0.76):
            canvas.line(DARK, [(0.5 + side * 0.24, 0.69 + (y - 0.7) / 2), (0.5 + side * 0.46, y)], 0.022)
    canvas.flat(DARK, [(0.43, 0.66), (0.57, 0.66), (0.5, 0.76)])


def _clock(canvas: Canvas) -> None:
    for side in (1, -1):
        canvas.line(DARK, [(0.5 + side * 0.24, 0.84), (0.5 + side * 0.34, 0.95)], 0.08)
        canvas.solid(BODY, rotate(oval(0.5, 0.09, 0.16, 0.13, 180, 360), side * 38))
    canvas.line(DARK, [(0.5, 0.2), (0.5, 0.07)], 0.05)
    canvas.line(DARK, [(0.43, 0.07), (0.57, 0.07)], 0.05)
    canvas.solid(BODY, oval(0.5, 0.55, 0.4))
    canvas.solid(WHITE, oval(0.5, 0.55, 0.265))
    for hour in range(0, 12, 3):
        a = math.radians(30 * hour)
        canvas.line(DARK, [(0.5 + r * math.cos(a), 0.55 + r * math.sin(a)) for r in (0.2, 0.25)], 0.03)
    canvas.line(DARK, [(0.5, 0.35), (0.5, 0.55), (0.63, 0.61)], 0.045)


def _cup(canvas: Canvas) -> None:
    for x in (0.3, 0.44, 0.58):
        canvas.line(SLATE, smooth([(x, 0.27), (x - 0.04, 0.2), (x + 0.04, 0.12), (x, 0.05)], closed=False), 0.035)
    canvas.tube(BODY, oval(0.76, 0.54, 0.15, 0.13, -90, 110), 0.05)
    canvas.solid(BODY, oval(0.45, 0.88, 0.41, 0.06))
    bowl = [(0.8, 0.4), (0.76, 0.62), (0.62, 0.84), (0.28, 0.84), (0.14, 0.62), (0.1, 0.4)]
    canvas.solid(BODY, smooth(bowl, closed=False))
    canvas.solid(WHITE, oval(0.45, 0.4, 0.35, 0.06))
    canvas.flat(WOOD, oval(0.45, 0.41, 0.3, 0.04))


def _dog(canvas: Canvas) -> None:
    canvas.solid(
        BODY,
        smooth(
            [
                (0.5, 0.08),
                (0.74, 0.16),
                (0.8, 0.42),
                (0.78, 0.72),
                (0.64, 0.9),
                (0.5, 0.94),
                (0.36, 0.9),
                (0.22, 0.72),
                (0.2, 0.42),
                (0.26, 0.16),
            ]
        ),
    )
    canvas.solid(WHITE, smooth([(0.5, 0.5), (0.66, 0.6), (0.7, 0.76), (0.5, 0.88), (0.3, 0.76), (0.34, 0.6)]))
    canvas.solid(LIGHT, smooth([(0.44, 0.8), (0.56, 0.8), (0.57, 0.9), (0.5, 0.955), (0.43, 0.9)]))
    canvas.flat(DARK, smooth([(0.5, 0.53), (0.62, 0.56), (0.6, 0.65), (0.5, 0.7), (0.4, 0.65), (0.38, 0.56)]))
    canvas.line(DARK, [(0.5, 0.68), (0.5, 0.77)], 0.03)
    canvas.line(DARK, oval(0.5, 0.7, 0.13, 0.09, 20, 160), 0.03)
    ear = smooth([(0.3, 0.13), (0.2, 0.1), (0.06, 0.3), (0.05, 0.58), (0.14, 0.66), (0.24, 0.5), (0.28, 0.3)])
    for side, shape in ((1, mirror(ear)), (-1, ear)):
        canvas.solid(SHADE, shape)
        canvas.flat(WHITE, oval(0.5 + side * 0.14, 0.38, 0.075))
        canvas.flat(DARK, oval(0.5 + side * 0.13, 0.39, 0.055))


def _envelope(canvas: Canvas) -> None:
    canvas.solid(BODY, rect(0.05, 0.18, 0.95, 0.84))
    canvas.line(DARK, [(0.05, 0.84), (0.4, 0.5)])
    canvas.line(DARK, [(0.95, 0.84), (0.6, 0.5)])
    canvas.solid(LIGHT, [(0.05, 0.18), (0.95, 0.18), (0.5, 0.58)])
    canvas.solid(WHITE, oval(0.5, 0.55, 0.075))


def _fish(canvas: Canvas) -> None:
    canvas.solid(
        SHADE,
        smooth([(0.4, 0.32), (0.44, 0.14), (0.66, 0.14), (0.76, 0.36)]),
        [(0.48, 0.7), (0.42, 0.88), (0.62, 0.76)],
    )
    tail = smooth([(0.7, 0.52), (0.95, 0.22), (0.9, 0.52), (0.95, 0.84)])
    canvas.solid(
        BODY,
        tail,
        smooth(
            [
                (0.04, 0.54),
                (0.2, 0.33),
                (0.46, 0.26),
                (0.68, 0.38),
                (0.82, 0.52),
                (0.68, 0.68),
                (0.46, 0.8),
                (0.2, 0.74),
            ]
        ),
    )
    canvas.line(DARK, oval(0.2, 0.53, 0.17, 0.26, -55, 55))
    canvas.line(DARK, oval(0.5, 0.56, 0.1, 0.09, -70, 70), 0.025)
    canvas.flat(WHITE, oval(0.2, 0.47, 0.07))
    canvas.flat(DARK, oval(0.19, 0.47, 0.04))
    canvas.line(DARK, [(0.06, 0.6), (0.14, 0.63)], 0.025)


def _flower(canvas: Canvas) -> None:
    leaf = smooth([(0.5, 0.93), (0.34, 0.9), (0.2, 0.74), (0.4, 0.78)])
    canvas.solid(LEAF, leaf, mirror(leaf), rect(0.48, 0.5, 0.52, 0.94))
    for turn in range(6):
        a = math.radians(60 * turn + 30)
        canvas.solid(BODY, oval(0.5 + 0.22 * math.cos(a), 0.385 + 0.22 * math.sin(a), 0.125))
    canvas.solid(GLOW, oval(0.5, 0.385, 0.11))


def _fork(canvas: Canvas) -> None:
    # Four tines with clear gaps: without them it is a spatula.
    tines = [rect(left, 0.05, left + 0.05, 0.36) for left in (0.25, 0.4, 0.55, 0.7)]
    bowl = smooth([(0.25, 0.33), (0.27, 0.45), (0.42, 0.53), (0.58, 0.53), (0.73, 0.45), (0.75, 0.33)], closed=False)
    handle = smooth([(0.44, 0.46), (0.56, 0.46), (0.55, 0.6), (0.59, 0.9), (0.5, 0.95), (0.41, 0.9), (0.45, 0.6)])
    canvas.solid(BODY, *tines, bowl, handle)


def _hat(canvas: Canvas) -> None:
    brim = [(0.05, 0.7), (0.26, 0.74), (0.5, 0.76), (0.74, 0.74), (0.95, 0.7), (0.86, 0.86), (0.5, 0.92), (0.14, 0.86)]
    canvas.solid(BODY, smooth(brim))
    canvas.solid(
        BODY,
        [
            (0.26, 0.76),
            (0.2, 0.16),
            *oval(0.5, 0.16, 0.3, 0.06, 180, 360),
            (0.74, 0.76),
            *oval(0.5, 0.76, 0.24, 0.06, 0, 180),
        ],
    )
    canvas.flat(
        DARK,
        [
            (0.24, 0.58),
            *oval(0.5, 0.58, 0.255, 0.06, 180, 0),
            (0.75, 0.58),
            (0.74, 0.74),
            *oval(0.5, 0.74, 0.24, 0.06, 0, 180),
            (0.26, 0.74),
        ],
    )
    canvas.solid(LIGHT, oval(0.5, 0.16, 0.3, 0.06))


def _house(canvas: Canvas) -> None:
    canvas.solid(SLATE, rect(0.7, 0.08, 0.82, 0.35))
    canvas.solid(BODY, rect(0.12, 0.37, 0.88, 0.94))
    canvas.solid(SLATE, [(0.05, 0.41), (0.5, 0.06), (0.95, 0.41)])
    canvas.solid(DARK, rect(0.59, 0.64, 0.75, 0.94))
    canvas.flat(WHITE, oval(0.71, 0.79, 0.02))
    canvas.solid(WHITE, rect(0.23, 0.56, 0.45, 0.76))
    canvas.line(DARK, [(0.34, 0.56), (0.34, 0.76)], 0.025)
    canvas.line(DARK, [(0.23, 0.66), (0.45, 0.66)], 0.025)


def _key(canvas: Canvas) -> None:
    parts = (
        oval(0.5, 0.16, 0.21),
        rect(0.43, 0.3, 0.57, 0.99),
        rect(0.5, 0.88, 0.74, 0.97),
        rect(0.5, 0.66, 0.73, 0.75),
    )
    canvas.solid(BODY, *(rotate(part, 44, 0.95) for part in parts))
    canvas.hole(rotate(oval(0.5, 0.14, 0.08), 44, 0.95))


def _lamp(canvas: Canvas) -> None:
    canvas.solid(SLATE, oval(0.5, 0.9, 0.26, 0.05))
    canvas.tube(SLATE, [(0.5, 0.5), (0.5, 0.86)], 0.07)
    canvas.solid(GLOW, oval(0.5, 0.57, 0.1))
    canvas.line(DARK, [(0.74, 0.58), (0.74, 0.74)], 0.025)
    canvas.flat(DARK, oval(0.74, 0.75, 0.03))
    canvas.solid(BODY, [(0.32, 0.06), (0.68, 0.06), (0.93, 0.58), (0.07, 0.58)])


def _pencil(canvas: Canvas) -> None:
    # The middle of the box is at (0.5, 0.5) after turning, so a turned y may leave [0, 1].
    def put(role: Role, shape: Shape) -> None:
        canvas.solid(role, rotate(shape, 45))

    put(GLOW, [(0.37, 0.82), (0.63, 0.82), (0.5, 1.1)])
    canvas.flat(DARK, rotate([(0.44, 0.98), (0.56, 0.98), (0.5, 1.11)], 45))
    put(WHITE, rect(0.37, -0.01, 0.63, 0.08))
    put(GRAY, rect(0.37, 0.08, 0.63, 0.17))
    put(BODY, rect(0.37, 0.17, 0.63, 0.82))
    for x in (0.43, 0.57):
        canvas.line(DARK, rotate([(x, 0.18), (x, 0.8)], 45), 0.02)


def _plate(canvas: Canvas) -> None:
    # A little tilted, with a lip below and a hollow in the middle: a flat disc could be a ball, a coin or a button.
    canvas.solid(SHADE, oval(0.5, 0.56, 0.36, 0.36))
    canvas.solid(BODY, oval(0.5, 0.48, 0.45, 0.38))
    canvas.line(WHITE, oval(0.5, 0.48, 0.4, 0.33), 0.03)
    canvas.flat(SHADE, oval(0.5, 0.49, 0.32, 0.25))
    canvas.flat(BODY, oval(0.5, 0.51, 0.31, 0.23))
    canvas.line(DARK, oval(0.5, 0.49, 0.32, 0.25), 0.022)
    canvas.line(WHITE, oval(0.5, 0.5, 0.23, 0.16, 25, 90), 0.035)


def _shoe(canvas: Canvas) -> None:
    canvas.solid(
        BODY,
        smooth(
            [
                (0.09, 0.3),
                (0.2, 0.36),
                (0.38, 0.24),
                (0.5, 0.4),
                (0.64, 0.54),
                (0.88, 0.6),
                (0.94, 0.78),
                (0.5, 0.8),
                (0.07, 0.78),
                (0.07, 0.55),
            ]
        ),
    )
    canvas.solid(WHITE, [(0.05, 0.76), (0.95, 0.76), *smooth([(0.95, 0.76), (0.9, 0.87), (0.05, 0.87)], closed=False)])
    canvas.solid(WHITE, oval(0.88, 0.7, 0.05, 0.05))
    for x, y in ((0.4, 0.4), (0.49, 0.5), (0.59, 0.58)):
        canvas.line(WHITE, [(x, y), (x + 0.09, y - 0.07)], 0.045)


def _teapot(canvas: Canvas) -> None:
    canvas.tube(BODY, smooth([(0.72, 0.42), (0.92, 0.4), (0.9, 0.62), (0.72, 0.72)], closed=False), 0.06)
    canvas.solid(BODY, smooth([(0.3, 0.78), (0.14, 0.66), (0.04, 0.36), (0.14, 0.34), (0.22, 0.5), (0.34, 0.54)]))
    canvas.solid(BODY, rect(0.34, 0.86, 0.66, 0.92), oval(0.5, 0.6, 0.3, 0.29))
    canvas.solid(SHADE, oval(0.5, 0.13, 0.065))
    canvas.solid(BODY, [*oval(0.5, 0.34, 0.2, 0.14, 180, 360)])


def _tree(canvas: Canvas) -> None:
    canvas.solid(WOOD, [(0.42, 0.55), (0.58, 0.55), (0.6, 0.85), (0.68, 0.95), (0.32, 0.95), (0.4, 0.85)])
    lobes = (
        (0.5, 0.26, 0.21),
        (0.27, 0.37, 0.19),
        (0.73, 0.37, 0.19),
        (0.24, 0.54, 0.18),
        (0.76, 0.54, 0.18),
        (0.5, 0.55, 0.2),
    )
    canvas.solid(BODY, *(oval(*lobe) for lobe in lobes))
    # Where lobes meet. Two arcs side by side would look like eyes.
    canvas.line(DARK, oval(0.27, 0.37, 0.19, 0.19, -10, 50), 0.025)
    canvas.line(DARK, oval(0.76, 0.54, 0.18, 0.18, 180, 245), 0.025)
    canvas.line(DARK, oval(0.5, 0.55, 0.2, 0.2, 150, 200), 0.025)


def _umbrella(canvas: Canvas) -> None:
    canvas.line(DARK, [(0.5, 0.04), (0.5, 0.84)], 0.05)
    canvas.line(DARK, oval(0.59, 0.84, 0.09, 0.09, 180, 10), 0.05)
    scallops = [p for x in (0.8, 0.5, 0.2) for p in oval(x, 0.53, 0.15, 0.06, 0, -180)]
    canvas.solid(BODY, oval(0.5, 0.53, 0.45, 0.41, 180, 360) + scallops)
    for rx in (0.15, -0.15):
        canvas.line(DARK, oval(0.5, 0.53, rx, 0.41, -90, 0))


def _vase(canvas: Canvas) -> None:
    half = [(0.72, 0.1), (0.63, 0.22), (0.64, 0.3), (0.82, 0.46), (0.82, 0.62), (0.68, 0.84), (0.66, 0.94)]
    side = smooth(half, closed=False)
    canvas.solid(BODY, side + mirror(side)[::-1])
    canvas.solid(DARK, oval(0.5, 0.1, 0.22, 0.045))
    zigzag = [(0.2 + 0.1 * i, 0.5 if i % 2 else 0.58) for i in range(7)]
    canvas.line(WHITE, zigzag, 0.04)


DRAWINGS: dict[str, Callable[[Canvas], None]] = {
    "apple": _apple,
    "ball": _ball,
    "banana": _banana,
    "bird": _bird,
    "boat": _boat,
    "book": _book,
    "cake": _cake,
    "candle": _candle,
    "car": _car,
    "cat": _cat,
    "clock": _clock,
    "cup": _cup,
    "dog": _dog,
    "envelope": _envelope,
    "fish": _fish,
    "flower": _flower,
    "fork": _fork,
    "hat": _hat,
    "house": _house,
    "key": _key,
    "lamp": _lamp,
    "pencil": _pencil,
    "plate": _plate,
    "shoe": _shoe,
    "teapot": _teapot,
    "tree": _tree,
    "umbrella": _umbrella,
    "vase": _vase,
}


@functools.lru_cache(maxsize=128)
def draw_roles(category: str, pixels: int) -> Image.Image:
    """Return the drawing of a category: an "L" image of `Role` values, `pixels` on a side. Cached: copy it to change it."""
    canvas = Canvas(pixels)
    DRAWINGS[category](canvas)
    return canvas.image
