"""What each category looks like: one small drawing function per category, in unit-square coordinates.

A drawing does not choose colours. It fills shapes with *roles* (main body, shade, outline, ...), which `draw` turns into
colours and textures. So a drawing is made once per size in pixels and then reused in every colour.
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
    GREY,
    LEAF,
    LIGHT,
    SHADE,
    SLATE,
    WHITE,
    WOOD,
    Pen,
    Point,
    Role,
    Shape,
    mirrored,
    oval,
    rect,
    smooth,
    turned,
)


def _apple(pen: Pen) -> None:
    half = [(0.5, 0.3), (0.62, 0.22), (0.8, 0.24), (0.93, 0.45), (0.88, 0.7), (0.74, 0.91), (0.6, 0.94), (0.5, 0.91)]
    pen.solid(BODY, smooth(half + mirrored(half)[-2:0:-1]))
    pen.line(DARK, smooth([(0.5, 0.36), (0.49, 0.22), (0.44, 0.07)], closed=False), 0.06)
    pen.solid(LEAF, smooth([(0.53, 0.2), (0.62, 0.07), (0.82, 0.06), (0.74, 0.17)]))
    pen.line(WHITE, oval(0.4, 0.56, 0.22, 0.22, 170, 235), 0.06)


def _ball(pen: Pen) -> None:
    pen.solid(BODY, oval(0.5, 0.5, 0.45))
    pen.line(DARK, [(0.5, 0.06), (0.5, 0.94)], 0.04)
    pen.line(DARK, [(0.06, 0.5), (0.94, 0.5)], 0.04)
    seam = [p for p in oval(-0.02, 0.5, 0.32, 0.42, -62, 62) if math.dist(p, (0.5, 0.5)) < 0.45]
    pen.line(DARK, seam, 0.04)
    pen.line(DARK, mirrored(seam), 0.04)


def _banana(pen: Pen) -> None:
    outer = [(0.87, 0.16), (0.95, 0.42), (0.85, 0.7), (0.6, 0.9), (0.3, 0.93), (0.09, 0.82)]
    inner = [(0.07, 0.75), (0.3, 0.71), (0.53, 0.6), (0.68, 0.42), (0.73, 0.2)]
    pen.solid(BODY, smooth(outer + inner))
    pen.solid(WOOD, [(0.73, 0.2), (0.76, 0.05), (0.85, 0.05), (0.87, 0.18)])
    pen.flat(DARK, oval(0.09, 0.785, 0.055))
    pen.line(DARK, smooth([(0.82, 0.26), (0.81, 0.48), (0.68, 0.68), (0.46, 0.8), (0.2, 0.81)], closed=False), 0.022)


def _bird(pen: Pen) -> None:
    for x in (0.47, 0.6):
        pen.line(DARK, [(x, 0.8), (x, 0.95), (x + 0.09, 0.95)], 0.04)
    pen.solid(GLOW, [(0.86, 0.2), (0.97, 0.3), (0.84, 0.37)])
    body = smooth([(0.3, 0.5), (0.52, 0.38), (0.8, 0.45), (0.83, 0.65), (0.62, 0.84), (0.38, 0.78)])
    pen.solid(BODY, body, oval(0.71, 0.27, 0.2), [(0.42, 0.5), (0.05, 0.36), (0.04, 0.56), (0.42, 0.76)])
    pen.line(DARK, [(0.05, 0.46), (0.2, 0.53)], 0.025)
    pen.solid(SHADE, smooth([(0.66, 0.5), (0.62, 0.66), (0.4, 0.74), (0.2, 0.68), (0.36, 0.56), (0.5, 0.46)]))
    pen.flat(WHITE, oval(0.76, 0.24, 0.07))
    pen.flat(DARK, oval(0.78, 0.24, 0.04))


def _boat(pen: Pen) -> None:
    pen.line(DARK, [(0.47, 0.05), (0.47, 0.7)], 0.05)
    pen.solid(BODY, [*smooth([(0.53, 0.08), (0.8, 0.32), (0.9, 0.58)], closed=False), (0.53, 0.58)])
    pen.solid(WHITE, [(0.41, 0.16), (0.41, 0.58), (0.12, 0.58)])
    pen.solid(BODY, [(0.05, 0.69), (0.95, 0.69), (0.8, 0.94), (0.22, 0.94)])
    pen.line(WHITE, [(0.14, 0.77), (0.84, 0.77)], 0.035)


def _book(pen: Pen) -> None:
    pen.solid(WHITE, rect(0.18, 0.7, 0.86, 0.94))
    for y in (0.84, 0.895):
        pen.line(GREY, [(0.22, y), (0.86, y)], 0.02)
    pen.solid(BODY, rect(0.14, 0.06, 0.9, 0.78))
    pen.solid(SHADE, [(0.14, 0.06), (0.26, 0.06), (0.26, 0.78), (0.2, 0.8), (0.2, 0.94), (0.14, 0.92), (0.1, 0.84)])
    pen.solid(SHADE, rect(0.1, 0.9, 0.9, 0.94))
    pen.flat(WHITE, rect(0.37, 0.16, 0.8, 0.42))
    pen.line(DARK, [(0.43, 0.24), (0.74, 0.24)], 0.035)
    pen.line(DARK, [(0.43, 0.33), (0.66, 0.33)], 0.035)


def _icing(left: float, right: float, top: float) -> list[Point]:
    """Icing over the top of a cake's tier, with drips that alternate in length."""
    count = round((right - left) / 0.11)
    step = (right - left) / count
    ends = [(right - (i + 0.5) * step, top + 0.06 + 0.05 * (i % 2)) for i in range(count)]
    return [(left, top), (right, top), *(p for x, y in ends for p in oval(x, y, step / 2, 0.05, 0, 180))]


def _cake(pen: Pen) -> None:
    pen.solid(GREY, rect(0.04, 0.9, 0.96, 0.94))
    pen.solid(BODY, rect(0.1, 0.56, 0.9, 0.89))
    pen.solid(WHITE, _icing(0.1, 0.9, 0.54))
    pen.solid(BODY, rect(0.25, 0.26, 0.75, 0.53))
    pen.solid(WHITE, _icing(0.25, 0.75, 0.24))
    pen.line(DARK, smooth([(0.5, 0.14), (0.53, 0.06), (0.6, 0.04)], closed=False), 0.025)
    pen.solid(SHADE, oval(0.5, 0.17, 0.07))


def _candle(pen: Pen) -> None:
    pen.tube(SLATE, oval(0.86, 0.82, 0.08), 0.03)
    pen.solid(SLATE, oval(0.46, 0.85, 0.41, 0.09))
    pen.solid(BODY, [(0.22, 0.4), (0.7, 0.4), (0.7, 0.83), *oval(0.46, 0.83, 0.24, 0.05, 0, 180)])
    pen.solid(
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
    pen.line(DARK, [(0.46, 0.36), (0.46, 0.27)], 0.04)
    pen.solid(GLOW, smooth([(0.46, 0.04), (0.56, 0.18), (0.55, 0.26), (0.46, 0.31), (0.37, 0.26), (0.36, 0.18)]))


def _car(pen: Pen) -> None:
    cabin = [(0.18, 0.5), (0.3, 0.19), (0.67, 0.19), (0.82, 0.5)]
    pen.solid(
        BODY,
        cabin,
        smooth(
            [(0.06, 0.55), (0.15, 0.47), (0.8, 0.47), (0.93, 0.55), (0.94, 0.7), (0.9, 0.74), (0.1, 0.74), (0.06, 0.7)],
            steps=4,
        ),
    )
    pen.solid(WHITE, [(0.29, 0.46), (0.36, 0.27), (0.46, 0.27), (0.46, 0.46)])
    pen.solid(WHITE, [(0.53, 0.46), (0.53, 0.27), (0.62, 0.27), (0.71, 0.46)])
    pen.flat(GLOW, oval(0.91, 0.58, 0.045))
    for x in (0.26, 0.75):
        pen.flat(DARK, oval(x, 0.74, 0.145))
        pen.flat(GREY, oval(x, 0.74, 0.07))


def _cat(pen: Pen) -> None:
    ear = [(0.1, 0.5), (0.1, 0.06), (0.42, 0.28)]
    pen.solid(BODY, ear, mirrored(ear), oval(0.5, 0.6, 0.43, 0.34))
    inner = [(0.15, 0.34), (0.16, 0.17), (0.29, 0.27)]
    pen.flat(LIGHT, inner, mirrored(inner))
    for side in (1, -1):
        pen.solid(WHITE, oval(0.5 + side * 0.18, 0.53, 0.085, 0.085))
        pen.flat(DARK, oval(0.5 + side * 0.18, 0.53, 0.035, 0.085))
        pen.line(DARK, oval(0.5 + side * 0.075, 0.76, 0.075, 0.07, 0, 180), 0.03)
        for y in (0.66, 0.76):
            pen.line(DARK, [(0.5 + side * 0.24, 0.69 + (y - 0.7) / 2), (0.5 + side * 0.46, y)], 0.022)
    pen.flat(DARK, [(0.43, 0.66), (0.57, 0.66), (0.5, 0.76)])


def _clock(pen: Pen) -> None:
    for side in (1, -1):
        pen.line(DARK, [(0.5 + side * 0.24, 0.84), (0.5 + side * 0.34, 0.95)], 0.08)
        pen.solid(BODY, turned(oval(0.5, 0.09, 0.16, 0.13, 180, 360), side * 38))
    pen.line(DARK, [(0.5, 0.2), (0.5, 0.07)], 0.05)
    pen.line(DARK, [(0.43, 0.07), (0.57, 0.07)], 0.05)
    pen.solid(BODY, oval(0.5, 0.55, 0.4))
    pen.solid(WHITE, oval(0.5, 0.55, 0.265))
    for hour in range(0, 12, 3):
        a = math.radians(30 * hour)
        pen.line(DARK, [(0.5 + r * math.cos(a), 0.55 + r * math.sin(a)) for r in (0.2, 0.25)], 0.03)
    pen.line(DARK, [(0.5, 0.35), (0.5, 0.55), (0.63, 0.61)], 0.045)


def _cup(pen: Pen) -> None:
    for x in (0.3, 0.44, 0.58):
        pen.line(SLATE, smooth([(x, 0.27), (x - 0.04, 0.2), (x + 0.04, 0.12), (x, 0.05)], closed=False), 0.035)
    pen.tube(BODY, oval(0.76, 0.54, 0.15, 0.13, -90, 110), 0.05)
    pen.solid(BODY, oval(0.45, 0.88, 0.41, 0.06))
    bowl = [(0.8, 0.4), (0.76, 0.62), (0.62, 0.84), (0.28, 0.84), (0.14, 0.62), (0.1, 0.4)]
    pen.solid(BODY, smooth(bowl, closed=False))
    pen.solid(WHITE, oval(0.45, 0.4, 0.35, 0.06))
    pen.flat(WOOD, oval(0.45, 0.41, 0.3, 0.04))


def _dog(pen: Pen) -> None:
    pen.solid(
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
    pen.solid(WHITE, smooth([(0.5, 0.5), (0.66, 0.6), (0.7, 0.76), (0.5, 0.88), (0.3, 0.76), (0.34, 0.6)]))
    pen.solid(LIGHT, smooth([(0.44, 0.8), (0.56, 0.8), (0.57, 0.9), (0.5, 0.955), (0.43, 0.9)]))
    pen.flat(DARK, smooth([(0.5, 0.53), (0.62, 0.56), (0.6, 0.65), (0.5, 0.7), (0.4, 0.65), (0.38, 0.56)]))
    pen.line(DARK, [(0.5, 0.68), (0.5, 0.77)], 0.03)
    pen.line(DARK, oval(0.5, 0.7, 0.13, 0.09, 20, 160), 0.03)
    ear = smooth([(0.3, 0.13), (0.2, 0.1), (0.06, 0.3), (0.05, 0.58), (0.14, 0.66), (0.24, 0.5), (0.28, 0.3)])
    for side, shape in ((1, mirrored(ear)), (-1, ear)):
        pen.solid(SHADE, shape)
        pen.flat(WHITE, oval(0.5 + side * 0.14, 0.38, 0.075))
        pen.flat(DARK, oval(0.5 + side * 0.13, 0.39, 0.055))


def _envelope(pen: Pen) -> None:
    pen.solid(BODY, rect(0.05, 0.18, 0.95, 0.84))
    pen.line(DARK, [(0.05, 0.84), (0.4, 0.5)])
    pen.line(DARK, [(0.95, 0.84), (0.6, 0.5)])
    pen.solid(LIGHT, [(0.05, 0.18), (0.95, 0.18), (0.5, 0.58)])
    pen.solid(WHITE, oval(0.5, 0.55, 0.075))


def _fish(pen: Pen) -> None:
    pen.solid(
        SHADE,
        smooth([(0.4, 0.32), (0.44, 0.14), (0.66, 0.14), (0.76, 0.36)]),
        [(0.48, 0.7), (0.42, 0.88), (0.62, 0.76)],
    )
    tail = smooth([(0.7, 0.52), (0.95, 0.22), (0.9, 0.52), (0.95, 0.84)])
    pen.solid(
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
    pen.line(DARK, oval(0.2, 0.53, 0.17, 0.26, -55, 55))
    pen.line(DARK, oval(0.5, 0.56, 0.1, 0.09, -70, 70), 0.025)
    pen.flat(WHITE, oval(0.2, 0.47, 0.07))
    pen.flat(DARK, oval(0.19, 0.47, 0.04))
    pen.line(DARK, [(0.06, 0.6), (0.14, 0.63)], 0.025)


def _flower(pen: Pen) -> None:
    leaf = smooth([(0.5, 0.93), (0.34, 0.9), (0.2, 0.74), (0.4, 0.78)])
    pen.solid(LEAF, leaf, mirrored(leaf), rect(0.48, 0.5, 0.52, 0.94))
    for turn in range(6):
        a = math.radians(60 * turn + 30)
        pen.solid(BODY, oval(0.5 + 0.22 * math.cos(a), 0.385 + 0.22 * math.sin(a), 0.125))
    pen.solid(GLOW, oval(0.5, 0.385, 0.11))


def _fork(pen: Pen) -> None:
    # Four tines with clear gaps: it is a spatula without them.
    tines = [rect(left, 0.05, left + 0.05, 0.36) for left in (0.25, 0.4, 0.55, 0.7)]
    bowl = smooth([(0.25, 0.33), (0.27, 0.45), (0.42, 0.53), (0.58, 0.53), (0.73, 0.45), (0.75, 0.33)], closed=False)
    handle = smooth([(0.44, 0.46), (0.56, 0.46), (0.55, 0.6), (0.59, 0.9), (0.5, 0.95), (0.41, 0.9), (0.45, 0.6)])
    pen.solid(BODY, *tines, bowl, handle)


def _hat(pen: Pen) -> None:
    brim = [(0.05, 0.7), (0.26, 0.74), (0.5, 0.76), (0.74, 0.74), (0.95, 0.7), (0.86, 0.86), (0.5, 0.92), (0.14, 0.86)]
    pen.solid(BODY, smooth(brim))
    pen.solid(
        BODY,
        [
            (0.26, 0.76),
            (0.2, 0.16),
            *oval(0.5, 0.16, 0.3, 0.06, 180, 360),
            (0.74, 0.76),
            *oval(0.5, 0.76, 0.24, 0.06, 0, 180),
        ],
    )
    pen.flat(
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
    pen.solid(LIGHT, oval(0.5, 0.16, 0.3, 0.06))


def _house(pen: Pen) -> None:
    pen.solid(SLATE, rect(0.7, 0.08, 0.82, 0.35))
    pen.solid(BODY, rect(0.12, 0.37, 0.88, 0.94))
    pen.solid(SLATE, [(0.05, 0.41), (0.5, 0.06), (0.95, 0.41)])
    pen.solid(DARK, rect(0.59, 0.64, 0.75, 0.94))
    pen.flat(WHITE, oval(0.71, 0.79, 0.02))
    pen.solid(WHITE, rect(0.23, 0.56, 0.45, 0.76))
    pen.line(DARK, [(0.34, 0.56), (0.34, 0.76)], 0.025)
    pen.line(DARK, [(0.23, 0.66), (0.45, 0.66)], 0.025)


def _key(pen: Pen) -> None:
    parts = (
        oval(0.5, 0.16, 0.21),
        rect(0.43, 0.3, 0.57, 0.99),
        rect(0.5, 0.88, 0.74, 0.97),
        rect(0.5, 0.66, 0.73, 0.75),
    )
    pen.solid(BODY, *(turned(part, 44, 0.95) for part in parts))
    pen.hole(turned(oval(0.5, 0.14, 0.08), 44, 0.95))


def _lamp(pen: Pen) -> None:
    pen.solid(SLATE, oval(0.5, 0.9, 0.26, 0.05))
    pen.tube(SLATE, [(0.5, 0.5), (0.5, 0.86)], 0.07)
    pen.solid(GLOW, oval(0.5, 0.57, 0.1))
    pen.line(DARK, [(0.74, 0.58), (0.74, 0.74)], 0.025)
    pen.flat(DARK, oval(0.74, 0.75, 0.03))
    pen.solid(BODY, [(0.32, 0.06), (0.68, 0.06), (0.93, 0.58), (0.07, 0.58)])


def _pencil(pen: Pen) -> None:
    # The middle of the box is at (0.5, 0.5) after turning, so a turned y may leave [0, 1].
    def put(role: Role, shape: Shape) -> None:
        pen.solid(role, turned(shape, 45))

    put(GLOW, [(0.37, 0.82), (0.63, 0.82), (0.5, 1.1)])
    pen.flat(DARK, turned([(0.44, 0.98), (0.56, 0.98), (0.5, 1.11)], 45))
    put(WHITE, rect(0.37, -0.01, 0.63, 0.08))
    put(GREY, rect(0.37, 0.08, 0.63, 0.17))
    put(BODY, rect(0.37, 0.17, 0.63, 0.82))
    for x in (0.43, 0.57):
        pen.line(DARK, turned([(x, 0.18), (x, 0.8)], 45), 0.02)


def _plate(pen: Pen) -> None:
    # A little tilted, with a lip below and a hollow in the middle: a flat disc could be a ball, a coin or a button.
    pen.solid(SHADE, oval(0.5, 0.56, 0.36, 0.36))
    pen.solid(BODY, oval(0.5, 0.48, 0.45, 0.38))
    pen.line(WHITE, oval(0.5, 0.48, 0.4, 0.33), 0.03)
    pen.flat(SHADE, oval(0.5, 0.49, 0.32, 0.25))
    pen.flat(BODY, oval(0.5, 0.51, 0.31, 0.23))
    pen.line(DARK, oval(0.5, 0.49, 0.32, 0.25), 0.022)
    pen.line(WHITE, oval(0.5, 0.5, 0.23, 0.16, 25, 90), 0.035)


def _shoe(pen: Pen) -> None:
    pen.solid(
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
    pen.solid(WHITE, [(0.05, 0.76), (0.95, 0.76), *smooth([(0.95, 0.76), (0.9, 0.87), (0.05, 0.87)], closed=False)])
    pen.solid(WHITE, oval(0.88, 0.7, 0.05, 0.05))
    for x, y in ((0.4, 0.4), (0.49, 0.5), (0.59, 0.58)):
        pen.line(WHITE, [(x, y), (x + 0.09, y - 0.07)], 0.045)


def _teapot(pen: Pen) -> None:
    pen.tube(BODY, smooth([(0.72, 0.42), (0.92, 0.4), (0.9, 0.62), (0.72, 0.72)], closed=False), 0.06)
    pen.solid(BODY, smooth([(0.3, 0.78), (0.14, 0.66), (0.04, 0.36), (0.14, 0.34), (0.22, 0.5), (0.34, 0.54)]))
    pen.solid(BODY, rect(0.34, 0.86, 0.66, 0.92), oval(0.5, 0.6, 0.3, 0.29))
    pen.solid(SHADE, oval(0.5, 0.13, 0.065))
    pen.solid(BODY, [*oval(0.5, 0.34, 0.2, 0.14, 180, 360)])


def _tree(pen: Pen) -> None:
    pen.solid(WOOD, [(0.42, 0.55), (0.58, 0.55), (0.6, 0.85), (0.68, 0.95), (0.32, 0.95), (0.4, 0.85)])
    lobes = (
        (0.5, 0.26, 0.21),
        (0.27, 0.37, 0.19),
        (0.73, 0.37, 0.19),
        (0.24, 0.54, 0.18),
        (0.76, 0.54, 0.18),
        (0.5, 0.55, 0.2),
    )
    pen.solid(BODY, *(oval(*lobe) for lobe in lobes))
    # Where lobes meet. Two arcs side by side would be eyes.
    pen.line(DARK, oval(0.27, 0.37, 0.19, 0.19, -10, 50), 0.025)
    pen.line(DARK, oval(0.76, 0.54, 0.18, 0.18, 180, 245), 0.025)
    pen.line(DARK, oval(0.5, 0.55, 0.2, 0.2, 150, 200), 0.025)


def _umbrella(pen: Pen) -> None:
    pen.line(DARK, [(0.5, 0.04), (0.5, 0.84)], 0.05)
    pen.line(DARK, oval(0.59, 0.84, 0.09, 0.09, 180, 10), 0.05)
    scallops = [p for x in (0.8, 0.5, 0.2) for p in oval(x, 0.53, 0.15, 0.06, 0, -180)]
    pen.solid(BODY, oval(0.5, 0.53, 0.45, 0.41, 180, 360) + scallops)
    for rx in (0.15, -0.15):
        pen.line(DARK, oval(0.5, 0.53, rx, 0.41, -90, 0))


def _vase(pen: Pen) -> None:
    half = [(0.72, 0.1), (0.63, 0.22), (0.64, 0.3), (0.82, 0.46), (0.82, 0.62), (0.68, 0.84), (0.66, 0.94)]
    side = smooth(half, closed=False)
    pen.solid(BODY, side + mirrored(side)[::-1])
    pen.solid(DARK, oval(0.5, 0.1, 0.22, 0.045))
    zigzag = [(0.2 + 0.1 * i, 0.5 if i % 2 else 0.58) for i in range(7)]
    pen.line(WHITE, zigzag, 0.04)


DRAWINGS: dict[str, Callable[[Pen], None]] = {
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
def roles(category: str, pixels: int) -> Image.Image:
    """The drawing of a category: an "L" image of `Role` values, `pixels` on a side. Shared: copy before changing it."""
    pen = Pen(pixels)
    DRAWINGS[category](pen)
    return pen.image
