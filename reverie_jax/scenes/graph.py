"""Scene graphs: what an image shows, exactly, and how likely objects are to appear together.

A `Scene` is the ground truth of one image. The drawing, the questions, the rationales and the scores are functions of it.

In training scenes an object's partner is nearly always present (a cup beside a teapot), as in photographs; from that prior a
model learns to see what is not there. Evaluation scenes break it. Some pairs of categories, and some compositions (a color
of a category in a relation), are held out of training altogether.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np

PAIRS: tuple[tuple[str, str], ...] = (
    ("teapot", "cup"),
    ("plate", "fork"),
    ("vase", "flower"),
    ("lamp", "book"),
    ("apple", "banana"),
    ("cat", "fish"),
    ("dog", "ball"),
    ("tree", "bird"),
    ("hat", "shoe"),
    ("clock", "key"),
    ("cake", "candle"),
    ("house", "car"),
    ("boat", "umbrella"),
    ("pencil", "envelope"),
)
"""Categories that training scenes mostly show together."""

CATEGORIES: tuple[str, ...] = tuple(sorted(name for pair in PAIRS for name in pair))
PARTNER: dict[str, str] = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
PLACES: dict[str, tuple[str, ...]] = {
    "kitchen": ("teapot", "cup", "plate", "fork", "apple", "banana", "cake", "candle"),
    "room": ("vase", "flower", "lamp", "book", "cat", "fish", "clock", "key", "hat", "shoe", "pencil", "envelope"),
    "outdoors": ("tree", "bird", "dog", "ball", "house", "car", "boat", "umbrella"),
}
"""Categories by place: in training scenes further objects mostly come from the same place."""


def _held_out(*words: str, one_in: int) -> bool:
    return int(hashlib.sha256(" ".join(words).encode()).hexdigest()[:8], 16) % one_in == 0


HELD_OUT_PAIRS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in itertools.combinations(CATEGORIES, 2)
    if PARTNER[pair[0]] != pair[1] and _held_out(*pair, one_in=12)
)
"""Categories that training scenes never show together."""


@functools.cache
def is_held_out_composition(color: str, category: str, relation: str) -> bool:
    """Return whether an object of this color and category never stands in this relation to another in tuning scenes."""
    return _held_out(color, category, relation, one_in=20)


COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES: dict[str, float] = {"small": 0.21, "large": 0.31}
"""Side of an object's square bounding box, as a fraction of the image's side."""
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted")
BACKGROUNDS: tuple[str, ...] = ("cream", "sky", "mint", "grey", "rose", "sand")
PLURALS: dict[str, str] = {"fish": "fish", "bus": "buses"}

Presence = Literal["any", "absent", "present"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def plural(category: str) -> str:
    """Return the plural noun for a category ("apple" -> "apples", "fish" -> "fish")."""
    return PLURALS.get(category, category + "s")


@dataclasses.dataclass(frozen=True, order=True)
class SceneObject:
    """One object: its category, looks and position. `x`, `y` are its center in [0, 1], x to the right, y down."""

    category: str
    color: str
    size: str
    texture: str
    x: float
    y: float

    @property
    def extent(self) -> float:
        """Side of the bounding box, as a fraction of the image's side."""
        return SIZES[self.size]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), as fractions of the image's side."""
        half = self.extent / 2
        return (self.x - half, self.y - half, self.x + half, self.y + half)

    @property
    def column(self) -> str:
        """The third of the image that the center is in: "left", "middle" or "right"."""
        return "left" if self.x < 1 / 3 else "right" if self.x > 2 / 3 else "middle"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The ground truth of one image. With `clutter` the background has shapes that are not objects."""

    objects: tuple[SceneObject, ...]
    background: str
    clutter: bool
    seed: int
    """Seed of the drawing's free choices (where stripes and clutter fall); it does not change what the image shows."""

    @property
    def counts(self) -> Counter[str]:
        """Number of objects of each category."""
        return Counter(obj.category for obj in self.objects)

    def find(self, category: str) -> tuple[SceneObject, ...]:
        """Return the objects of a category."""
        return tuple(obj for obj in self.objects if obj.category == category)

    @property
    def categories(self) -> tuple[str, ...]:
        """Distinct categories, from the left of the image to the right."""
        return tuple(dict.fromkeys(t.category for t in sorted(self.objects, key=lambda t: (t.x, t.y))))

    @property
    def relations(self) -> tuple[tuple[str, str, str], ...]:
        """(a, relation, b) for pairs of categories that each appear once and whose relation is clear."""
        single = [c for c in self.categories if self.counts[c] == 1]
        pairs = ((a, relation_between(self.find(a)[0], self.find(b)[0]), b) for a in single for b in single if a != b)
        return tuple((a, relation, b) for a, relation, b in pairs if relation)

    @property
    def held_out_pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of categories of the scene that training scenes never show together."""
        pairs = itertools.combinations(sorted(self.counts), 2)
        return tuple(pair for pair in pairs if frozenset(pair) in HELD_OUT_PAIRS)

    @property
    def held_out_compositions(self) -> tuple[tuple[str, str, str], ...]:
        """Those of `relations` whose first object, with its color, is in a composition held out of tuning."""
        return tuple(
            (a, relation, b)
            for a, relation, b in self.relations
            if is_held_out_composition(self.find(a)[0].color, a, relation)
        )

    @property
    def graph_key(self) -> str:
        """Hash of the scene graph: which objects, with which looks, in which cell of a coarse grid.

        Background, clutter and small shifts are left out, so scenes with different keys differ in what they show.
        """
        rows = sorted((t.category, t.color, t.size, t.texture, int(t.x * 6), int(t.y * 6)) for t in self.objects)
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @property
    def split(self) -> Split:
        """The split of this scene graph: a function of the graph alone, so splits never share one."""
        bucket = int(self.graph_key[:8], 16) % 10
        return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def relation_between(a: SceneObject, b: SceneObject) -> str | None:
    """Return how `a` stands to `b`: "left of", "right of", "above", "below"; None if neither axis is clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 0.15 or abs(abs(dx) - abs(dy)) < 0.05:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


@dataclasses.dataclass(frozen=True)
class World:
    """The distribution that scenes are drawn from.

    Attributes:
        partner: probability that an object's partner is there too.
        same_place: probability that a further object comes from the same place as the first.
        repeat: probability that a category appears two or three times.
        pairs: whether scenes show pairs of categories that are held out of training: all do (`present`), none does
            (`absent`), or as it comes (`any`).
        compositions: the same for compositions that are held out of tuning.
    """

    partner: float = 0.85
    same_place: float = 0.8
    repeat: float = 0.25
    pairs: Presence = "absent"
    compositions: Presence = "any"

    @staticmethod
    def skewed() -> World:
        """Return the distribution of pretraining: partners nearly always appear together."""
        return World()

    @staticmethod
    def annotated() -> World:
        """Return the distribution of tuning: partners appear together far more often than by chance."""
        return World(partner=0.35, compositions="absent")

    @staticmethod
    def broken() -> World:
        """Return the distribution of evaluation: partners seldom appear together, so the prior misleads."""
        return World(partner=0.15, same_place=0.5, compositions="absent")

    @staticmethod
    def new_pairs() -> World:
        """Return the distribution of evaluation, of scenes that show categories that were never seen together."""
        return dataclasses.replace(World.broken(), pairs="present")

    @staticmethod
    def new_compositions() -> World:
        """Return the distribution of evaluation, of scenes that show compositions that tuning never showed."""
        return dataclasses.replace(World.broken(), compositions="present")

    def allows(self, scene: Scene) -> bool:
        """Return whether a scene shows what is held out, or not, as this world wants it."""
        wanted = {"any": (True, False), "absent": (False,), "present": (True,)}
        pairs, compositions = wanted[self.pairs], wanted[self.compositions]
        return bool(scene.held_out_pairs) in pairs and bool(scene.held_out_compositions) in compositions

    def sample(self, rng: np.random.Generator) -> Scene:
        """Draw one scene: two to six objects of two to four categories, none overlapping."""
        categories = self._categories(rng, int(rng.integers(2, 5)))
        kinds: list[str] = []
        for category in categories:
            kinds += [category] * (int(rng.integers(2, 4)) if rng.random() < self.repeat else 1)
        kinds = kinds[:6]
        color_of = {category: COLORS[rng.integers(len(COLORS))] for category in kinds}
        objects = []
        for category, (column, row) in zip(kinds, _cells(rng, len(kinds)), strict=True):
            size = "large" if rng.random() < 0.55 else "small"
            texture = TEXTURES[rng.choice(3, p=(0.6, 0.2, 0.2))]
            slack = (1 / 3 - SIZES[size]) / 2
            x = (column + 0.5) / 3 + rng.uniform(-slack, slack)
            y = (row + 0.5) / 3 + rng.uniform(-slack, slack)
            # Objects of one category share a color: "two red apples" is then one exact fact.
            objects.append(
                SceneObject(category, color_of[category], size, texture, round(float(x), 4), round(float(y), 4))
            )
        return Scene(
            objects=tuple(sorted(objects)),
            background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
            clutter=bool(rng.random() < 0.5),
            seed=int(rng.integers(2**31)),
        )

    def _categories(self, rng: np.random.Generator, wanted: int) -> list[str]:
        chosen: list[str] = [CATEGORIES[rng.integers(len(CATEGORIES))]]
        place = next(name for name, members in PLACES.items() if chosen[0] in members)
        while len(chosen) < wanted:
            last = chosen[-1]
            if PARTNER[last] not in chosen and rng.random() < self.partner:
                chosen.append(PARTNER[last])
                continue
            pool = PLACES[place] if rng.random() < self.same_place else CATEGORIES
            # A partner comes in by the draw above only: its probability is what the world fixes.
            pool = tuple(c for c in pool if c not in chosen and PARTNER[c] not in chosen)
            chosen.append(pool[rng.integers(len(pool))])
        return chosen


def _cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Draw `count` distinct cells of a 3 x 3 grid, as (column, row)."""
    picked = rng.permutation(9)[:count]
    return [(int(cell % 3), int(cell // 3)) for cell in picked]


def generate_scenes(world: World, split: Split, seed: int) -> Iterator[Scene]:
    """Yield scenes of a split without end, no graph twice; the same arguments give the same scenes.

    The split of a scene is a function of its graph; scenes of other splits, and those that show what the world holds out,
    are skipped.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    seen: set[str] = set()
    while True:
        scene = world.sample(rng)
        key = scene.graph_key
        if scene.split == split and key not in seen and world.allows(scene):
            seen.add(key)
            yield scene


def take_scenes(world: World, split: Split, seed: int, count: int) -> list[Scene]:
    """Return the first `count` scenes of `generate_scenes(world, split, seed)`."""
    stream = generate_scenes(world, split, seed)
    return [next(stream) for _ in range(count)]


def count_cooccurrences(sample: list[Scene]) -> dict[str, Counter[str]]:
    """Count in how many scenes of `sample` each category appears with each other one."""
    table: dict[str, Counter[str]] = {category: Counter() for category in CATEGORIES}
    for scene in sample:
        present = set(scene.categories)
        for category in present:
            table[category].update(present - {category})
    return table
