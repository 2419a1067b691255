"""Packing: the rows of a window against brute force, their budgets, how full they are, and a state at every position."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Sequence

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data.packing import WINDOW, Batch, Element, SequenceShape, fill, pack, row, share_out

PATCHES = 2


def made(number: int, tokens: int, *, pictures: int = 0, edges: int = 0, leaves: int = 0) -> Element:
    """An element of these sizes; every array says whose it is."""
    whose = 1000 + number
    features = np.full(tokens, -1, np.int32)
    shown = min(tokens, pictures * PATCHES)
    features[:shown] = np.arange(shown)
    return {
        "tokens": np.full(tokens, whose, np.int32),
        "positions": np.arange(tokens, dtype=np.int32),
        "ends": np.full(tokens, tokens, np.int32),
        "image_slots": features,
        "pixels": np.full(pictures, number + 1, np.int32),
        "parent": np.zeros(edges, np.int32),
        "target": np.full(edges, whose, np.int32),
        "weight": np.full(edges, number + 1, np.float32),
        "branch": np.arange(edges, dtype=np.int32),
        "origin": np.arange(edges, dtype=np.int32),
        "leaves": np.arange(leaves, dtype=np.int32),
        "questions": np.full(leaves, whose, np.int32),
        "flat_tokens": np.asarray([2 * tokens], np.int32),
        "records": np.asarray([1], np.int32),
    }


def best_sum(sizes: Sequence[int], room: int, most: int) -> int:
    """The largest sum of at most `most` sizes that is no larger than `room`, by trying all."""
    parts = itertools.chain.from_iterable(itertools.combinations(sizes, count) for count in range(most + 1))
    return max(sum(part) for part in parts if sum(part) <= room)


@settings(max_examples=150)
@given(st.lists(st.integers(1, 40), max_size=9), st.integers(0, 90), st.integers(0, 6))
def test_fill_is_as_good_as_trying_everything(sizes, room, most):
    chosen = fill(sizes, room, most)
    assert len(set(chosen)) == len(chosen) <= most
    assert set(chosen) <= set(range(len(sizes)))
    assert sum(sizes[place] for place in chosen) == best_sum(sizes, room, most)


@pytest.mark.parametrize(
    ("sizes", "room", "most", "wanted"),
    [
        ([], 5, 3, []),
        ([5], 4, 3, []),
        ([5], 5, 3, [0]),
        ([5], 5, 0, []),
        ([5, 5, 5], 15, 2, [0, 1]),
        ([3, 4, 9], 9, 1, [2]),  # the smallest count that reaches the most
        ([1], 0, 1, []),
        ([10**6, 10**6], 2 * 10**6, 2, [0, 1]),
    ],
)
def test_fill_at_its_edges(sizes, room, most, wanted):
    found = fill(sizes, room, most)
    assert len(found) == len(wanted)
    assert sum(sizes[place] for place in found) == sum(sizes[place] for place in wanted)


sizes_of_one = st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(0, 8), st.integers(0, 4))
SHAPE = SequenceShape(length=30, images=3, edges=8, questions=4)


def budgets(elements: Sequence[Element], members: Sequence[int]) -> list[int]:
    """Tokens, pictures, taught tokens, questions and trees of a row."""
    names = ("tokens", "pixels", "parent", "leaves", "flat_tokens")
    return [sum(len(elements[number][name]) for number in members) for name in names]


@settings(max_examples=80)
@given(st.lists(sizes_of_one, max_size=14))
def test_every_element_goes_into_one_row_and_no_budget_is_overdrawn(sizes):
    elements = [made(n, t, pictures=p, edges=e, leaves=q) for n, (t, p, e, q) in enumerate(sizes)]
    bins = share_out(elements, SHAPE)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(elements)))
    rooms = [SHAPE.length, SHAPE.images, SHAPE.edges, SHAPE.questions, SHAPE.images]
    for members in bins:
        assert members
        assert all(used <= room for used, room in zip(budgets(elements, members), rooms, strict=True))
        row([elements[number] for number in members], SHAPE, PATCHES)


@settings(max_examples=80)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_each_row_is_filled_best_around_the_largest_that_is_left(sizes, trees):
    elements = [made(number, size) for number, size in enumerate(sizes)]
    left = set(range(len(sizes)))
    for members in share_out(elements, SequenceShape(length=40, images=trees)):
        largest = max(sizes[number] for number in left)
        assert max(sizes[number] for number in members) == largest
        others = sorted(sizes[number] for number in left)
        others.remove(largest)
        best = largest + best_sum(others, 40 - largest, trees - 1)
        assert sum(sizes[number] for number in members) == best
        left -= set(members)
    assert not left


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 4))
def test_no_more_rows_than_twice_the_fewest(sizes, trees):
    found = len(share_out([made(number, size) for number, size in enumerate(sizes)], SequenceShape(12, trees)))
    assert found <= 2 * fewest(sizes, 12, trees)


def fewest(sizes: Sequence[int], room: int, most: int) -> int:
    """Rows of the best packing, by trying all."""
    best = len(sizes)

    def place(number: int, rows: list[tuple[int, int]]) -> None:
        nonlocal best
        if len(rows) >= best and number < len(sizes):
            return
        if number == len(sizes):
            best = min(best, len(rows))
            return
        for at, (used, count) in enumerate(rows):
            if used + sizes[number] <= room and count < most:
                place(number + 1, [*rows[:at], (used + sizes[number], count + 1), *rows[at + 1 :]])
        place(number + 1, [*rows, (sizes[number], 1)])

    place(0, [])
    return best


TOO_LARGE = {
    "tokens": (made(1, 31), "31 tokens for a row of 30"),
    "pictures": (made(1, 10, pictures=4), "4 pixels for a row of 3"),
    "edges": (made(1, 10, edges=9), "9 source for a row of 8"),
    "leaves": (made(1, 10, leaves=5), "5 leaves for a row of 4"),
}


@pytest.mark.parametrize(("large", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_element_too_large_for_any_row_is_an_error(large, message, place):
    elements = [made(0, 3), made(2, 30)]
    elements.insert(place, large)
    with pytest.raises(ValueError, match=message):
        share_out(elements, SHAPE)
    with pytest.raises(ValueError, match=message):
        row([large], SHAPE, PATCHES)
    with pytest.raises(ValueError, match=message):
        list(rows_of(elements, SHAPE))


def test_an_element_as_large_as_the_row_fits():
    elements = [made(0, 30, pictures=3, edges=8, leaves=4), made(1, 1)]
    assert share_out(elements, SHAPE) == [[0], [1]]


def test_nothing_is_shared_out_to_no_rows():
    assert share_out([], SHAPE) == []
    assert list(rows_of([], SHAPE)) == []


def test_a_row_of_one_tree_holds_one_though_more_would_fit():
    elements = [made(number, 2) for number in range(3)]
    assert sorted(share_out(elements, SequenceShape(length=30, images=1))) == [[0], [1], [2]]


# How full rows are.


def lengths(kind: str, count: int, row_length: int) -> list[int]:
    rng = np.random.default_rng(11)
    quarter = row_length // 4
    match kind:
        case "like trees":  # a picture's tokens, and a few conversations
            drawn = 0.6 * quarter + rng.gamma(3, 0.4 * quarter / 3, count)
        case "even":
            drawn = rng.uniform(0.5 * quarter, 1.5 * quarter, count)
        case _:
            drawn = rng.lognormal(np.log(quarter), 0.5, count)
    return np.clip(drawn, 1, row_length).astype(int).tolist()


FULLNESS = {"like trees": 0.97, "even": 0.97, "long tail": 0.97}


@pytest.mark.parametrize(("kind", "least"), FULLNESS.items(), ids=FULLNESS)
def test_rows_are_full_where_trees_are_a_quarter_of_them(kind, least):
    length = 4096
    sizes = lengths(kind, WINDOW, length)
    bins = share_out([made(number, size) for number, size in enumerate(sizes)], SequenceShape(length, 12))
    assert sum(sizes) / (len(bins) * length) >= least


def test_rows_are_full_over_many_windows():
    length, shape = 2048, SequenceShape(2048, 12)
    sizes = lengths("like trees", 2000, length)
    elements = [made(number, size) for number, size in enumerate(sizes)]
    rows = list(rows_of(elements, shape))
    assert sum(sizes) / (len(rows) * length) >= 0.97
    assert sorted(itertools.chain.from_iterable(map(members_of, rows))) == list(range(2000))


# Rows as an iterator.


def rows_of(elements: Sequence[Element], shape: SequenceShape, window: int | None = None) -> grain.IterDataset:
    source = grain.MapDataset.source(elements)
    return pack(source.to_iter_dataset(grain.ReadOptions(num_threads=0)), shape, PATCHES, window=window)


def members_of(one: Batch) -> list[int]:
    """The elements of a row, in the order in which they stand there."""
    return [number - 1000 for number, _ in itertools.groupby(one.tokens[one.tokens > 0].tolist())]


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def various(count: int, seed: int) -> list[Element]:
    rng = np.random.default_rng(seed)
    return [
        made(n, int(rng.integers(1, 31)), pictures=int(rng.integers(0, 3)), edges=int(rng.integers(0, 9)))
        for n in range(count)
    ]


@settings(max_examples=60)
@given(st.integers(0, 12), st.integers(0, 10**6), st.sampled_from((1, 2, 3, 5, 100)))
def test_rows_of_a_window_hold_its_elements_and_no_others(count, seed, window):
    elements = various(count, seed)
    rows = list(rows_of(elements, SHAPE, window))
    order = [members_of(one) for one in rows]
    assert sorted(itertools.chain.from_iterable(order)) == list(range(count))
    number = 0
    for start in range(0, count, window):
        wanted, got = set(range(start, min(start + window, count))), set()
        while got != wanted:
            assert set(order[number]) <= wanted
            got |= set(order[number])
            number += 1
    assert number == len(order)
    # Rows of a window come in the order of their first trees, and trees in the order in which they came.
    assert all(one == sorted(one) for one in order)
    for start in range(0, count, window):
        firsts = [one[0] for one in order if start <= one[0] < start + window]
        assert firsts == sorted(firsts)


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(0, 10**6), st.sampled_from((1, 4, 100)))
def test_each_row_is_its_elements_side_by_side(count, seed, window):
    elements = various(count, seed)
    for one in rows_of(elements, SHAPE, window):
        token = picture = edge = 0
        members = members_of(one)
        for slot, number in enumerate(members):
            wanted = elements[number]
            size, shown, taught = (len(wanted[name]) for name in ("tokens", "pixels", "parent"))
            assert (one.tokens[token : token + size] == 1000 + number).all()
            assert one.positions[token : token + size].tolist() == list(range(size))
            assert (one.ends[token : token + size] == token + size).all()
            assert one.pixels[picture : picture + shown].tolist() == [number + 1] * shown
            mine = one.image_slots[token : token + size]
            assert mine[mine >= 0].tolist() == [
                picture * PATCHES + n for n in range(int((wanted["image_slots"] >= 0).sum()))
            ]
            assert one.weight[edge : edge + taught].tolist() == [number + 1] * taught
            assert (one.parent[edge : edge + taught] == token).all()
            assert one.flat_tokens[slot] == 2 * size
            token, picture, edge = token + size, picture + shown, edge + taught
        assert not one.tokens[token:].any()
        assert one.ends[token:].tolist() == list(range(token + 1, SHAPE.length + 1))
        assert (one.image_slots[token:] == -1).all()
        assert not one.pixels[picture:].any()
        assert not one.weight[edge:].any()
        assert not one.flat_tokens[len(members) :].any()


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_a_state_through_json_continues_at_every_position(window):
    data = rows_of(various(17, 4), SHAPE, window)
    running, states, rows = iter(data), [], []
    while True:
        states.append(json.dumps(running.get_state()))
        try:
            rows.append(next(running))
        except StopIteration:
            break
    states.append(json.dumps(running.get_state()))  # after the end
    assert len(rows) >= 6
    for position, state in enumerate(states):
        again = iter(data)
        again.set_state(json.loads(state))
        assert position >= len(rows) or json.dumps(again.get_state()) == state
        rest = list(again)
        assert len(rest) == max(0, len(rows) - position)
        assert all(map(equal, rest, rows[position:]))


@pytest.mark.parametrize("window", [1, 4])
def test_a_used_iterator_goes_back_and_forth(window):
    data = rows_of(various(12, 9), SHAPE, window)
    running, states, rows = iter(data), [], []
    for _ in range(6):
        states.append(running.get_state())
        rows.append(next(running))
    for position in (5, 0, 3, 3, 1, 4):
        running.set_state(states[position])
        assert equal(next(running), rows[position])


def test_the_order_depends_on_nothing_but_the_elements():
    elements = various(40, 2)
    orders = {json.dumps([members_of(one) for one in rows_of(elements, SHAPE, 16)]) for _ in range(3)}
    assert len(orders) == 1
    same = [made(number, 7) for number in range(20)]  # ties
    bins = [share_out(same, SHAPE) for _ in range(2)]
    assert bins[0] == bins[1]
    assert collections.Counter(map(len, bins[0])) == {3: 6, 2: 1}


def test_the_default_window_is_one_where_a_row_holds_one_tree():
    elements = [made(number, 3 + number) for number in range(5)]
    order = [members_of(one) for one in rows_of(elements, SequenceShape(length=30, images=1))]
    assert order == [[0], [1], [2], [3], [4]]
