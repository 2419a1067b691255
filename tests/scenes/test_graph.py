"""Scene graphs: splits, the distributions, and what holds of every scene; and their drawings."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie_jax.scenes.draw import render
from reverie_jax.scenes.graph import (
    CATEGORIES,
    COLORS,
    HELD_OUT_PAIRS,
    PARTNER,
    PLACES,
    SIZES,
    TEXTURES,
    Scene,
    World,
    generate_scenes,
    is_held_out_composition,
    relation_between,
    take_scenes,
)
from reverie_jax.scenes.objects import DRAWINGS, draw_roles
from reverie_jax.scenes.pretrain import label_patches
from tests.scenes.makers import BROKEN, SKEWED, TEST, TRAIN, make_object, make_scene, new_things, sample_scene

numbers = st.integers(0, 10**9)


@settings(max_examples=3)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_splits_share_no_graph(one, other):
    keys = [
        {s.graph_key for world in (SKEWED, BROKEN, World.new_pairs()) for s in take_scenes(world, split, seed, 15)}
        for split, seed in zip(("train", "validation", "test"), (one, other, one), strict=True)
    ]
    assert all(not a & b for a, b in itertools.combinations(keys, 2))


@given(numbers, st.randoms(use_true_random=False))
def test_the_split_follows_from_the_objects_alone(number, random):
    scene = sample_scene(number)
    objects = list(scene.objects)
    random.shuffle(objects)
    other = Scene(tuple(objects), "rose", not scene.clutter, scene.seed + 1)
    assert (other.graph_key, other.split) == (scene.graph_key, scene.split)


def test_a_seed_gives_the_same_scenes_and_none_twice():
    assert take_scenes(SKEWED, "train", 0, 50) == TRAIN[:50]
    assert take_scenes(SKEWED, "train", 1, 50) != TRAIN[:50]
    assert len({s.graph_key for s in TRAIN}) == len(TRAIN)
    assert {s.split for s in TRAIN} == {"train"}
    assert next(generate_scenes(SKEWED, "train", 0)) == TRAIN[0]


WORLDS = {  # whether scenes show pairs, and compositions, that are held out of training
    "skewed": ({False}, {True, False}),
    "annotated": ({False}, {False}),
    "broken": ({False}, {False}),
    "new_pairs": ({True}, {False}),
    "new_compositions": ({False}, {True}),
}


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_held_out_of_training_is_shown_by_its_test_scenes_alone(world):
    split = "train" if world in ("skewed", "annotated") else "test"
    shown = [tuple(map(bool, new_things(scene))) for scene in take_scenes(getattr(World, world)(), split, 3, 80)]
    assert tuple(map(set, zip(*shown, strict=True))) == WORLDS[world]


def test_hold_outs_are_those_of_the_shipped_model():
    assert all(len(pair) == 2 and PARTNER[min(pair)] not in pair for pair in HELD_OUT_PAIRS)
    compositions = itertools.product(COLORS, CATEGORIES, ("left of", "right of", "above", "below"))
    held_out = sorted(map(sorted, HELD_OUT_PAIRS)), [c for c in compositions if is_held_out_composition(*c)]
    assert hashlib.sha256(repr(held_out).encode()).hexdigest()[:8] == "a5f578b8"


@given(numbers)
def test_objects_keep_apart_inside_the_image_and_share_colors(number):
    scene, tolerance = sample_scene(number), 1e-4  # positions are rounded to four digits
    for item in scene.objects:
        left, top, right, bottom = item.box
        assert min(left, top) >= -tolerance
        assert max(right, bottom) <= 1 + tolerance
    for a, b in itertools.combinations(scene.objects, 2):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.extent + b.extent) / 2 - 2 * tolerance
    assert 2 <= len(scene.objects) <= 6
    assert 2 <= len(scene.categories) <= 4
    assert all(len({item.color for item in scene.find(category)}) == 1 for category in scene.categories)
    assert sum(scene.counts.values()) == len(scene.objects)


def test_partners_are_together_in_training_and_seldom_in_the_test():
    def partner_rate(scenes: list[Scene]) -> float:
        kinds = [{item.category for item in scene.objects} for scene in scenes]
        return float(np.mean([PARTNER[category] in present for present in kinds for category in present]))

    assert partner_rate(TRAIN) > 0.7
    assert partner_rate(TEST) < 0.3
    assert all(PARTNER[PARTNER[c]] == c != PARTNER[c] for c in CATEGORIES)
    assert sorted(c for members in PLACES.values() for c in members) == sorted(CATEGORIES)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_relations_are_mirrored(ax, ay, bx, by):
    a, b = make_object("cup", x=ax, y=ay), make_object("fork", x=bx, y=by)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    assert relation_between(b, a) == opposite[relation_between(a, b)]
    if relation_between(a, b) == "left of":
        assert bx - ax >= 0.15
    if relation_between(a, b) == "above":
        assert by - ay >= 0.15


@settings(max_examples=10)
@given(numbers, st.sampled_from(COLORS), st.sampled_from([16, 48]))
def test_another_color_changes_an_objects_box_alone(number, color, size):
    scene = sample_scene(number)
    first = scene.objects[0]
    changed = dataclasses.replace(scene, objects=(dataclasses.replace(first, color=color), *scene.objects[1:]))
    pixels = render(scene, size)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
    differs = (pixels != render(changed, size)).any(-1)
    assert differs.any() == (color != first.color)
    rows, columns = np.nonzero(differs)
    left, top, right, bottom = (edge * size for edge in first.box)
    assert ((columns >= left - 1) & (columns <= right + 1) & (rows >= top - 1) & (rows <= bottom + 1)).all()


def test_every_category_has_a_drawing_of_its_own():
    drawings = {render(make_scene(make_object(c, size="large")), 48).tobytes() for c in CATEGORIES}
    assert len(drawings) == len(CATEGORIES)


@given(numbers)
def test_patches_are_labeled_with_the_object_over_their_center(number):
    scene, grid = sample_scene(number), 8
    labels = label_patches(scene, grid)
    assert (labels.shape, labels.dtype) == ((grid * grid, 4), np.int32)
    for index, (row, column) in enumerate(itertools.product(range(grid), range(grid))):
        x, y = (column + 0.5) / grid, (row + 0.5) / grid
        over = [o for o in scene.objects if max(abs(o.x - x), abs(o.y - y)) < o.extent / 2]
        assert len(over) <= 1
        looks = [(o.category, o.color, o.size, o.texture) for o in over] or [(None,) * 4]
        names = [
            (None, *names)[label]
            for names, label in zip((CATEGORIES, COLORS, SIZES, TEXTURES), labels[index], strict=True)
        ]
        assert tuple(names) == looks[0]


def test_objects_are_drawn_as_for_the_shipped_model():
    """drawings.png has the roles of every category's pixels, 48 on a side, one below the other."""
    want = np.asarray(Image.open(Path(__file__).parent / "drawings.png")).reshape(-1, 48, 48)
    got = np.stack([np.asarray(draw_roles(category, 48)) for category in DRAWINGS])
    differing = (got != want).sum((1, 2))
    assert (differing <= 4).all(), dict(
        zip(DRAWINGS, differing.tolist(), strict=True)
    )  # versions of Pillow differ at edges
