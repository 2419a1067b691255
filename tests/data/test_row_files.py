"""Rows: every tree of a random stream is found again in the packed rows, whole, once, and seeing nothing else."""

from __future__ import annotations

import dataclasses

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data.packing import Batch, Element, SequenceShape, element, pack, stack
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import ConversationTree, build_tree

PATCHES, SIDE = 3, 2
ROOT = 1000
"""Tree number n starts with the token ROOT + n, by which a row's trees are told apart."""


@dataclasses.dataclass
class Sample:
    tree: ConversationTree
    pixels: np.ndarray
    questions: list[int]

    def element(self) -> Element:
        return element(self.tree, self.pixels, self.questions)


def sample(number: int, rng: np.random.Generator, taught: bool) -> Sample:
    """A random tree behind its own root and its image."""
    talks = []
    for _ in range(rng.integers(1, 4)):
        text = rng.integers(1, 4, rng.integers(1, 6))
        ids = np.asarray([ROOT + number, *[7] * PATCHES, *text], np.int32)
        weights = np.zeros(len(ids), np.float32)
        if taught:
            weights[1 + PATCHES :] = rng.choice([0.0, 1.0, 2.0], len(text))
        features = np.asarray([-1, *range(PATCHES), *[-1] * len(text)], np.int32)
        talks.append(Tokens(ids, weights, features))
    tree = build_tree(talks)
    pixels = rng.integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)
    return Sample(tree, pixels, [] if taught else [100 * number + n for n in range(len(talks))])


def stream(count: int, seed: int, taught: bool = True) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [sample(number, rng, taught) for number in range(count)]


def packed(samples: list[Sample], shape: SequenceShape, window: int | None = None) -> grain.IterDataset:
    source = grain.MapDataset.source([s.element() for s in samples])
    return pack(source.to_iter_dataset(grain.ReadOptions(num_threads=0)), shape, PATCHES, window=window)


def training(tokens: int, images: int) -> SequenceShape:
    return SequenceShape(length=tokens, images=images, edges=16)


def found(row: Batch) -> dict[int, tuple[int, int]]:
    """Where each tree stands in a row: number -> (start, end)."""
    return {int(row.tokens[j]) - ROOT: (j, int(row.ends[j])) for j in np.flatnonzero(row.tokens >= ROOT).tolist()}


def check_row(row: Batch, samples: list[Sample]) -> list[int]:
    """Compares every tree of a row with its sample; returns the trees' numbers."""
    places = found(row)
    filled = np.zeros(len(row.tokens), bool)
    edge_count = leaf_count = 0
    for slot, (number, (start, end)) in enumerate(sorted(places.items(), key=lambda item: item[1])):
        tree = samples[number].tree
        assert end - start == len(tree)
        assert not filled[start:end].any()
        filled[start:end] = True
        here = slice(start, end)
        assert np.array_equal(row.tokens[here], tree.tokens)
        assert np.array_equal(row.positions[here], tree.positions)
        assert np.array_equal(row.ends[here] - start, tree.ends)
        assert np.array_equal(row.pixels[slot], samples[number].pixels[0])
        shifted = np.where(tree.image_slots >= 0, tree.image_slots + slot * PATCHES, -1)
        assert np.array_equal(row.image_slots[here], shifted)
        mine = (row.weight > 0) & (row.parent >= start) & (row.parent < end)
        assert np.array_equal(row.parent[mine] - start, tree.parent)
        for field in ("target", "weight", "branch"):
            assert np.array_equal(getattr(row, field)[mine], getattr(tree, field)), field
        asked = (row.questions >= 0) & (row.leaves >= start) & (row.leaves < end)
        assert row.questions[asked].tolist() == samples[number].questions
        if samples[number].questions:
            assert np.array_equal(row.leaves[asked] - start, tree.leaves)
        assert row.flat_tokens[slot] == tree.flat_tokens
        edge_count, leaf_count = edge_count + len(tree.parent), leaf_count + int(asked.sum())
    assert (row.weight > 0).sum() == edge_count
    assert (row.questions >= 0).sum() == leaf_count
    assert not row.flat_tokens[len(places) :].any()
    check_padding(row, filled)
    check_rule(row, filled)
    return list(places)


def check_padding(row: Batch, filled: np.ndarray) -> None:
    empty = np.flatnonzero(~filled)
    assert np.array_equal(row.ends[empty], empty + 1)
    assert (row.image_slots[empty] == -1).all()
    spare = row.weight == 0
    assert (row.parent[spare] == 0).all()
    assert (row.leaves[row.questions == -1] == 0).all()


def check_rule(row: Batch, filled: np.ndarray) -> None:
    """No token sees another tree or padding; padding sees itself alone."""
    index = np.arange(len(filled))
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < row.ends[None, :])
    owner = np.cumsum(row.tokens >= ROOT) * filled
    owner = np.where(filled, owner, -1 - index)  # every padded place is its own
    assert not sees[owner[:, None] != owner[None, :]].any()
    assert sees.diagonal().all()


@settings(max_examples=25)
@given(
    st.integers(1, 12), st.integers(0, 10**6), st.integers(1, 3), st.integers(20, 60), st.sampled_from((1, 2, 4, 100))
)
def test_every_tree_stands_in_one_row_as_it_is(count, seed, images, length, window):
    samples = stream(count, seed)
    rows = list(packed(samples, training(length, images), window))
    assert sorted(n for row in rows for n in check_row(row, samples)) == list(range(count))
    assert all(len(found(row)) <= images for row in rows)


@settings(max_examples=15)
@given(st.integers(1, 8), st.integers(0, 10**6), st.integers(1, 3))
def test_every_question_keeps_its_leaf(count, seed, images):
    samples = stream(count, seed, taught=False)
    shape = SequenceShape(length=50, images=images, questions=6)
    rows = list(packed(samples, shape))
    assert sorted(n for row in rows for n in check_row(row, samples)) == list(range(count))
    asked = [q for row in rows for q in row.questions.tolist() if q >= 0]
    assert sorted(asked) == sorted(q for s in samples for q in s.questions)


def test_rows_have_the_shape_asked_for():
    shape = SequenceShape(length=40, images=2, edges=9, questions=4)
    (row, *_) = packed(stream(1, 0), shape)
    assert row.tokens.shape == row.positions.shape == row.ends.shape == row.image_slots.shape == (40,)
    assert row.parent.shape == row.target.shape == row.weight.shape == row.branch.shape == (9,)
    assert row.leaves.shape == row.questions.shape == (4,)
    assert row.pixels.shape == (2, SIDE, SIDE, 3)
    assert row.flat_tokens.shape == (2,)
    integers = set(Batch._fields) - {"pixels", "weight"}
    assert {getattr(row, field).dtype for field in integers} == {np.dtype(np.int32)}
    assert (row.pixels.dtype, row.weight.dtype) == (np.uint8, np.float32)


def test_a_tree_that_teaches_nothing_keeps_its_place():
    samples = [*stream(1, 3), *[Sample(s.tree, s.pixels, []) for s in stream(3, 3, taught=False)[1:]]]
    (row,) = packed(samples, training(90, 3))
    assert sorted(check_row(row, samples)) == [0, 1, 2]


@pytest.mark.parametrize("images", [1, 2, 3])
def test_saved_state_continues_as_if_nothing_happened(images):
    data = packed(stream(9, 5), training(45, images), window=4)
    rows, iterator, states = [], iter(data), []
    for _ in range(100):
        states.append(iterator.get_state())
        try:
            rows.append(next(iterator))
        except StopIteration:
            break
    assert len(rows) >= 3
    for start, state in enumerate(states):
        again = iter(data)
        again.set_state(state)
        rest = list(again)
        assert len(rest) == len(rows) - start
        for one, other in zip(rest, rows[start:], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_grain_finds_the_same_output_after_a_checkpoint():
    data = packed(stream(7, 1), training(45, 2), window=3).batch(2)
    # Raises where a restored iterator differs; it asserts itself that there is something to compare.
    assert grain.experimental.assert_equal_output_after_checkpoint(data) is None


def test_blank_rows_fill_a_batch():
    samples = stream(2, 4, taught=False)
    rows = list(packed(samples, SequenceShape(length=40, images=1, questions=3)))
    batch = stack(rows, 4)
    assert all(len(field) == 4 for field in batch)
    for number in range(4):
        row = Batch(*(field[number] for field in batch))
        if number < len(rows):
            assert all(np.array_equal(a, b) for a, b in zip(row, rows[number], strict=True))
        else:
            assert check_row(row, samples) == []
            assert (row.questions == -1).all()
            assert not row.tokens.any()
            assert not row.pixels.any()
            assert not row.flat_tokens.any()


def test_full_batch_is_only_stacked():
    rows = list(packed(stream(3, 4), training(40, 1)))
    batch = stack(rows, 3)
    assert all(np.array_equal(field[1], getattr(rows[1], name)) for name, field in batch._asdict().items())


def test_questions_must_match_the_leaves():
    one = stream(1, 0)[0]
    with pytest.raises(ValueError, match="questions for"):
        element(one.tree, one.pixels, [1] * (len(one.tree.leaves) + 1))


def test_a_tree_may_show_several_images():
    one, other = stream(2, 0)
    shown = np.concatenate([one.pixels, one.pixels])
    elements = [element(one.tree, shown), element(other.tree, other.pixels)]
    shape = SequenceShape(length=len(one.tree) + len(other.tree), images=3, edges=200)
    (packed,) = pack(grain.MapDataset.source(elements).to_iter_dataset(), shape, PATCHES)
    features = packed.image_slots[len(one.tree) :]
    # The second tree's image stands in the third slot.
    assert features[features >= 0].min() == 2 * PATCHES + other.tree.image_slots[other.tree.image_slots >= 0].min()
