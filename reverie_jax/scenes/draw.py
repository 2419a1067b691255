"""Images of scenes: a deterministic drawing of a scene graph, at any size.

Everything is drawn two to four times as large and averaged down, which is the anti-aliasing. `objects` holds the shapes of
the categories; here are their colors, their textures and the backgrounds.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from reverie_jax.scenes.canvas import Role
from reverie_jax.scenes.graph import Scene, SceneObject
from reverie_jax.scenes.objects import draw_roles

Color = tuple[int, int, int]

PAINTS: dict[str, Color] = {
    "red": (218, 32, 38),
    "orange": (250, 134, 16),
    "yellow": (252, 218, 28),
    "green": (42, 158, 68),
    "blue": (38, 98, 222),
    "purple": (130, 52, 178),
    "pink": (252, 138, 190),
    "brown": (126, 76, 38),
}
"""RGB of the names in `graph.COLORS`."""

NEUTRALS: dict[Role, Color] = {
    Role.DARK: (42, 40, 48),
    Role.WHITE: (252, 252, 250),
    Role.GRAY: (176, 178, 184),
    Role.SLATE: (98, 98, 110),
    Role.LEAF: (84, 116, 86),
    Role.WOOD: (150, 128, 106),
    Role.GLOW: (255, 238, 164),
}
"""RGB of the roles that do not follow the object's color."""

WALLS: dict[str, Color] = {
    "cream": (253, 246, 227),
    "sky": (221, 238, 252),
    "mint": (222, 245, 230),
    "grey": (232, 233, 236),
    "rose": (252, 229, 232),
    "sand": (243, 231, 209),
}
"""RGB of the names in `graph.BACKGROUNDS`."""

_WHITE: Color = (255, 255, 255)
_BLACK: Color = (0, 0, 0)
_PATTERN = max(Role) + 1
"""Palette entry of stripes and dots, which `_apply_texture` draws."""


def _mix(a: Color, b: Color, share: float) -> Color:
    """Return `a` with `share` of `b` in it."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return (red, green, blue)


def _palette(color: str) -> list[int]:
    """Return the flat RGB palette by role. Patterns are almost white: half-way colors would look like other colors."""
    paint = PAINTS[color]
    entries = NEUTRALS | {
        Role.EMPTY: _BLACK,
        Role.BODY: paint,
        Role.SHADE: _mix(paint, _BLACK, 0.2),
        Role.LIGHT: _mix(paint, _WHITE, 0.28),
    }
    flat = [channel for role in Role for channel in entries[role]]
    return [*flat, *_mix(paint, _WHITE, 0.82)]


_PALETTES: dict[str, list[int]] = {name: _palette(name) for name in PAINTS}


def _apply_texture(drawing: np.ndarray, texture: str, phase: float) -> np.ndarray:
    """Return `drawing`, an array of roles, with the texture on its main body. `phase` in [0, 1) moves the pattern."""
    if texture == "plain":
        return drawing
    pixels = drawing.shape[0]
    x = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
    if texture == "striped":
        period = 0.18  # of the box's side, measured across the stripes
        pattern = ((x[:, None] - x[None, :]) / (period * 2**0.5) + phase) % 1.0 < 0.4
    else:
        # Rows of dots, every other one shifted: the square lattice turned by 45 degrees.
        pitch = 0.17
        along, across = (x[:, None] + x[None, :]) / 2**0.5, (x[:, None] - x[None, :]) / 2**0.5
        u, v = (along / pitch + phase) % 1.0 - 0.5, (across / pitch + phase) % 1.0 - 0.5
        pattern = u * u + v * v < 0.32**2
    return np.where(pattern & (drawing == Role.BODY), np.uint8(_PATTERN), drawing)


def _put(canvas: Image.Image, obj: SceneObject, rng: np.random.Generator) -> None:
    """Draw an object in its box. It may face either way."""
    phase, flip = float(rng.random()), bool(rng.random() < 0.5)
    side = canvas.width
    # Rounded inwards, so that no pixel of an object is outside of its box.
    left, top = (int(np.ceil(edge * side)) for edge in obj.box[:2])
    pixels = int(obj.extent * side) - 1
    drawing = draw_roles(obj.category, pixels)
    tile = Image.fromarray(_apply_texture(np.asarray(drawing), obj.texture, phase))
    if flip:  # the pattern too: its stripes run across the slanted objects, never along them
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask = tile.point([0] + [255] * 255)
    tile.putpalette(_PALETTES[obj.color])
    canvas.paste(tile.convert("RGB"), (left, top), mask)


def _backdrop(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    """Draw wall and floor, and the clutter on them: pale, low in contrast, and of no object's shape."""
    wall = WALLS[scene.background]
    canvas = Image.new("RGB", (side, side), wall)
    draw = ImageDraw.Draw(canvas)
    horizon = float(rng.uniform(0.6, 0.8)) * side
    draw.rectangle((0, horizon, side, side), fill=_mix(wall, _BLACK, 0.05))
    if not scene.clutter:
        return canvas
    tints = [_mix(wall, paint, 0.12) for paint in PAINTS.values()] + [_mix(wall, _BLACK, 0.09), _mix(wall, _WHITE, 0.7)]
    kinds = rng.choice(5, size=2, replace=False)
    for kind in sorted(kinds):
        tint = tints[rng.integers(len(tints))]
        if kind == 0:  # wallpaper
            step = float(rng.uniform(0.06, 0.14)) * side
            for left in np.arange(float(rng.random()) * step, side, step):
                draw.rectangle((left, 0, left + step * 0.4, horizon), fill=tint)
        elif kind == 1:  # patches of shadow
            for x, y, rx, ry in rng.uniform((0, 0, 0.12, 0.03), (1, 1, 0.3, 0.08), (4, 4)) * side:
                draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=tint)
        elif kind == 2:  # slabs
            for x, y, a, b, c in rng.uniform((0, 0, -0.2, -0.2, -0.2), (1, 1, 0.2, 0.2, 0.2), (5, 5)) * side:
                draw.polygon(((x, y), (x + a, y + b), (x + c, y + a)), fill=tint)
        elif kind == 3:  # lines
            for x, y, u, v in rng.uniform(0, 1, (6, 4)) * side:
                draw.line((x, y, u, v), fill=tint, width=max(1, side // 80))
        else:  # confetti
            for x, y, u, v in rng.uniform((0, 0, -0.02, -0.02), (1, 1, 0.02, 0.02), (40, 4)) * side:
                draw.line((x, y, x + u, y + v), fill=tints[rng.integers(len(tints))], width=max(1, side // 80))
    return canvas


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Draw a scene as uint8 RGB of shape [size, size, 3]; the same arguments give the same image."""
    rng = np.random.default_rng(scene.seed)
    scale = 4 if size <= 256 else 3 if size <= 512 else 2
    canvas = _backdrop(scene, size * scale, rng)
    for obj in scene.objects:
        _put(canvas, obj, rng)
    return np.array(canvas.reduce(scale))
