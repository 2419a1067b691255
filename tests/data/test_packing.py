"""Packing: bins against brute force; every tree whole, once, and alone in its sequence; a saved state at every position."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Sequence

import grain
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reverie_jax.data import packing
from reverie_jax.data.packing import (
    WINDOW,
    Batch,
    SequenceShape,
    TreeElement,
    best_subset,
    element_sizes,
    make_element,
    pack,
    pack_sequence,
    stack,
)
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import ConversationTree, build_tree

PATCHES, SIDE = 3, 2
ROOT = 1000
"""Tree number n starts with the token ROOT + n, which identifies it in a sequence."""


# Bins.


def sized(tokens: int, images: int = 0, edges: int = 0, leaves: int = 0) -> TreeElement:
    """An element of these sizes."""
    sizes = {"tokens": tokens, "images": images, "parent": edges, "leaves": leaves, "flat_tokens": 1}
    return {name: np.zeros(size, np.int32) for name, size in sizes.items()}


def bin_pack(elements: Sequence[TreeElement], shape: SequenceShape) -> list[list[int]]:
    return packing.bin_pack([element_sizes(element) for element in elements], shape)


def best_sum(sizes: Sequence[int], room: int, most: int) -> int:
    """The largest sum of at most `most` sizes that is no larger than `room`, by trying all."""
    parts = itertools.chain.from_iterable(itertools.combinations(sizes, count) for count in range(most + 1))
    return max(sum(part) for part in parts if sum(part) <= room)


@given(st.lists(st.integers(1, 40), max_size=9), st.integers(0, 90), st.integers(0, 6))
@example([5], 5, 0)
@example([5, 5, 5], 15, 2)
@example([1], 0, 1)
@example([10**6, 10**6], 2 * 10**6, 2)
def test_best_subset_is_as_good_as_trying_everything(sizes, room, most):
    chosen = best_subset(sizes, room, most)
    assert len(set(chosen)) == len(chosen) <= most
    assert set(chosen) <= set(range(len(sizes)))
    assert sum(sizes[index] for index in chosen) == best_sum(sizes, room, most)


SHAPE = SequenceShape(length=30, images=3, edges=8, questions=4)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(0, 8), st.integers(0, 4)), max_size=14))
def test_every_element_is_in_one_bin_and_no_budget_is_exceeded(sizes):
    bins = bin_pack([sized(*size) for size in sizes], SHAPE)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(sizes)))
    for members in bins:
        used = np.sum([sizes[index] for index in members], axis=0)
        assert (used <= [SHAPE.length, SHAPE.images, SHAPE.edges, SHAPE.questions]).all()
        assert 0 < len(members) <= SHAPE.images


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_each_sequence_is_filled_best_around_the_largest_remaining_tree(sizes, trees):
    remaining = set(range(len(sizes)))
    for members in bin_pack([sized(size) for size in sizes], SequenceShape(length=40, images=trees)):
        largest = max(sizes[index] for index in remaining)
        assert max(sizes[index] for index in members) == largest
        others = sorted(sizes[index] for index in remaining)
        others.remove(largest)
        assert sum(sizes[index] for index in members) == largest + best_sum(others, 40 - largest, trees - 1)
        remaining -= set(members)
    assert not remaining


@pytest.mark.parametrize(
    ("large", "named"),
    [
        ((31, 0, 0, 0), "31 tokens"),
        ((9, 4, 0, 0), "4 images"),
        ((9, 0, 9, 0), "9 edges"),
        ((9, 0, 0, 5), "5 questions"),
    ],
)
def test_an_element_too_large_for_a_sequence_is_an_error(large, named):
    with pytest.raises(ValueError, match=named):
        bin_pack([sized(3), sized(*large), sized(30)], SHAPE)
    with pytest.raises(ValueError, match=named):
        pack_sequence([sized(*large)], SHAPE, PATCHES)


def test_bins_at_the_limits_and_of_equal_trees():
    assert best_subset([3, 4, 9], 9, 2) == [2]  # the fewest that are best
    assert bin_pack([], SHAPE) == []
    assert bin_pack([sized(30, 3, 8, 4), sized(1)], SHAPE) == [[0], [1]]
    assert bin_pack([sized(2)] * 3, SequenceShape(length=30, images=1)) == [[0], [1], [2]]
    assert collections.Counter(map(len, bin_pack([sized(7)] * 20, SHAPE))) == {3: 6, 2: 1}
    with pytest.raises(ValueError, match="4 trees"):
        pack_sequence([sized(2)] * 4, SHAPE, PATCHES)


@pytest.mark.parametrize("kind", ["trees", "uniform", "long tail"])
def test_sequences_are_full_where_trees_are_a_quarter_of_them(kind):
    length = 4096
    rng, quarter = np.random.default_rng(11), length // 4
    drawn = {
        "trees": 0.6 * quarter + rng.gamma(3, 0.4 * quarter / 3, WINDOW),  # an image, and a few conversations
        "uniform": rng.uniform(0.5 * quarter, 1.5 * quarter, WINDOW),
        "long tail": rng.lognormal(np.log(quarter), 0.5, WINDOW),
    }[kind]
    sizes = np.clip(drawn, 1, length).astype(int).tolist()
    bins = bin_pack([sized(size) for size in sizes], SequenceShape(length, 12))
    assert sum(sizes) / (len(bins) * length) >= 0.97


# Sequences.


@dataclasses.dataclass
class Sample:
    tree: ConversationTree
    images: np.ndarray
    questions: list[int]

    def element(self) -> TreeElement:
        return make_element(self.tree, self.images, self.questions, record=1, origin=self.tree.branch + 3)


def sample(number: int, rng: np.random.Generator, supervised: bool) -> Sample:
    """A random tree of up to three conversations after its own root and up to two images."""
    images, conversations = int(rng.integers(0, 3)), []
    for _ in range(rng.integers(1, 4)):
        text = rng.integers(1, 4, rng.integers(1, 6))
        slots = [-1, *range(images * PATCHES), *[-1] * len(text)]
        ids = [ROOT + number, *[7] * images * PATCHES, *text]
        weights = np.zeros(len(ids), np.float32)
        if supervised:
            weights[-len(text) :] = rng.choice([0.0, 1.0, 2.0], len(text))
        conversations.append(Tokens(np.asarray(ids, np.int32), weights, np.asarray(slots, np.int32)))
    pixels = rng.integers(0, 256, (images, SIDE, SIDE, 3)).astype(np.uint8)
    questions = [] if supervised else [100 * number + n for n in range(len(conversations))]
    return Sample(build_tree(conversations), pixels, questions)


def samples_of(count: int, seed: int, supervised: bool = True) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [sample(number, rng, supervised) for number in range(count)]


def packed(samples: list[Sample], shape: SequenceShape, window: int | None = None) -> grain.IterDataset:
    elements = grain.MapDataset.source([one.element() for one in samples])
    return pack(elements.to_iter_dataset(grain.ReadOptions(num_threads=0)), shape, PATCHES, window=window)


def training(length: int, images: int) -> SequenceShape:
    return SequenceShape(length=length, images=images, edges=16)


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def spans(sequence: Batch) -> list[tuple[int, int, int]]:
    """(number, start, end) of the trees of a sequence, in order."""
    starts = np.flatnonzero(sequence.tokens >= ROOT).tolist()
    return [(int(sequence.tokens[start]) - ROOT, start, int(sequence.ends[start])) for start in starts]


def check_sequence(sequence: Batch, samples: list[Sample]) -> list[int]:
    """Compare every tree of a sequence with its sample; return the trees' numbers."""
    edge = leaf = image = 0
    trees = spans(sequence)
    owner = np.full(len(sequence.tokens), -1)  # of each token
    for slot, (number, start, end) in enumerate(trees):
        tree, images = samples[number].tree, samples[number].images
        edges, leaves, span = len(tree.parent), len(samples[number].questions), slice(start, end)
        assert (owner[span] == -1).all()
        owner[span] = number
        assert np.array_equal(sequence.tokens[span], tree.tokens)
        assert np.array_equal(sequence.positions[span], tree.positions)
        assert np.array_equal(sequence.ends[span] - start, tree.ends)
        assert np.array_equal(sequence.images[image : image + len(images)], images)
        shifted = np.where(tree.image_slots >= 0, tree.image_slots + image * PATCHES, -1)
        assert np.array_equal(sequence.image_slots[span], shifted)
        at = slice(edge, edge + edges)
        assert np.array_equal(sequence.parent[at] - start, tree.parent)
        assert np.array_equal(sequence.branch[at] - leaf, tree.branch)
        assert np.array_equal(sequence.origin[at], tree.branch + 3)
        assert np.array_equal(sequence.target[at], tree.target)
        assert np.array_equal(sequence.weight[at], tree.weight)
        assert sequence.questions[leaf : leaf + leaves].tolist() == samples[number].questions
        assert np.array_equal(sequence.leaves[leaf : leaf + leaves] - start, tree.leaves[:leaves])
        assert (sequence.flat_tokens[slot], sequence.records[slot]) == (tree.flat_tokens, 1)
        edge, leaf, image = edge + edges, leaf + leaves, image + len(images)
    # What is left is padding, and no token sees another tree or padding.
    index = np.arange(len(owner))
    empty = owner == -1
    assert np.array_equal(sequence.ends[empty], index[empty] + 1)
    assert (sequence.image_slots[empty] == -1).all()
    assert (sequence.questions[leaf:] == -1).all()
    for rest in (
        *(sequence.tokens[empty], sequence.positions[empty], sequence.images[image:], sequence.leaves[leaf:]),
        *(field[edge:] for field in (sequence.parent, sequence.target, sequence.weight, sequence.branch)),
        *(sequence.origin[edge:], sequence.flat_tokens[len(trees) :], sequence.records[len(trees) :]),
    ):
        assert not rest.any()
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < sequence.ends[None, :])
    owner = np.where(empty, -2 - index, owner)
    assert not sees[owner[:, None] != owner[None, :]].any()
    assert sees.diagonal().all()
    return [number for number, *_ in trees]


@given(
    st.integers(1, 12), st.integers(0, 10**6), st.integers(2, 4), st.booleans(), st.sampled_from((1, 2, 5, 100, None))
)
def test_every_tree_is_in_one_sequence_of_its_window(count, seed, images, supervised, window):
    samples = samples_of(count, seed, supervised)
    shape = training(45, images) if supervised else SequenceShape(length=45, images=images, questions=6)
    sequences = list(packed(samples, shape, window))
    order = [check_sequence(sequence, samples) for sequence in sequences]
    assert sorted(itertools.chain.from_iterable(order)) == list(range(count))
    assert all(sequence.tokens.shape == (45,) for sequence in sequences)
    # Sequences of a window come in the order of their first trees, and trees in the order in which they came.
    size = window or WINDOW
    assert all(numbers == sorted(numbers) and len({n // size for n in numbers}) == 1 for numbers in order)
    assert [numbers[0] for numbers in order] == sorted(numbers[0] for numbers in order)


def test_sequences_have_the_given_shape():
    shape = SequenceShape(length=40, images=2, edges=9, questions=4)
    (sequence,) = packed(samples_of(1, 0), shape)
    lengths = dict.fromkeys(Batch._fields, 9)
    lengths |= dict.fromkeys(("tokens", "positions", "ends", "image_slots"), 40)
    lengths |= {"leaves": 4, "questions": 4, "images": 2, "flat_tokens": 2, "records": 2}
    for name, field in sequence._asdict().items():
        assert field.shape == (lengths[name], *((SIDE, SIDE, 3) if name == "images" else ())), name
        assert field.dtype == {"images": np.uint8, "weight": np.float32}.get(name, np.int32), name


def test_the_default_window_is_one_where_a_sequence_holds_one_tree():
    samples = [dataclasses.replace(one, images=one.images[:1]) for one in samples_of(5, 2)]
    order = [[number for number, *_ in spans(one)] for one in packed(samples, training(60, 1))]
    assert order == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("supervised", [True, False])
def test_empty_sequences_fill_a_batch(supervised):
    samples = samples_of(2, 4, supervised)
    sequences = list(packed(samples, SequenceShape(length=40, images=2, edges=16, questions=3), window=1))
    assert len(sequences) == 2
    batch = stack(sequences, 4)
    assert all(len(field) == 4 for field in batch)
    for number in range(4):
        one = Batch(*(field[number] for field in batch))
        if number < 2:
            assert equal(one, sequences[number])
        else:
            assert check_sequence(one, samples) == []
    assert equal(stack(sequences, 2), Batch(*(field[:2] for field in batch)))


def test_questions_must_match_the_leaves():
    one = samples_of(1, 0)[0]
    with pytest.raises(ValueError, match="questions for"):
        make_element(one.tree, one.images, [1] * (len(one.tree.leaves) + 1))


# States.


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_saved_state_continues_at_every_position(window):
    data = packed(samples_of(14, 4), training(45, 4), window)
    running, states, sequences = iter(data), [], []
    while True:
        states.append(json.dumps(running.get_state()))
        try:
            sequences.append(next(running))
        except StopIteration:
            break
    states.append(json.dumps(running.get_state()))  # after the end
    assert len(sequences) >= 5
    for position, state in enumerate(states):
        resumed = iter(data)
        resumed.set_state(json.loads(state))
        assert position >= len(sequences) or json.dumps(resumed.get_state()) == state
        rest = list(resumed)
        assert len(rest) == max(0, len(sequences) - position)
        assert all(map(equal, rest, sequences[position:]))
    for position in (4, 0, 3, 3, 1):  # a used iterator, back and forth
        running.set_state(json.loads(states[position]))
        assert equal(next(running), sequences[position])
