"""Training batches: the seed alone fixes them, whatever the threads and hosts; and every picture stays with its words."""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data import packing as rows_module
from reverie_jax.data import pipeline as pipeline_module
from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.images import BrokenImage
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.pipeline import packed_sequences, training_batches
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder, Tokens
from tests.data.fakes import IMAGE_ID, WordTokenizer, png

PATCHES, SIDE = 4, 8
SHAPE = SequenceShape(length=160, images=4, edges=120)


def set_window(patch: pytest.MonkeyPatch, size: int) -> None:
    """Trees that are packed together, where either module says so."""
    patch.setattr(rows_module, "WINDOW", size)
    patch.setattr(pipeline_module, "WINDOW", size, raising=False)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows of a few trees, so that a handful of batches sees several."""
    set_window(monkeypatch, 7)


def colour(index: int) -> tuple[int, int, int]:
    return (20 + 9 * index, 250 - 7 * index, 3 + index)


def coded(count: int, seed: int = 0) -> list[ImageRecord]:
    """Records whose first word and whose picture's colour both say which they are; every third shows nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        shown, talks = index % 3 != 2, []
        for question in range(int(rng.integers(1, 4))):
            first = f"{IMAGE}\n" if shown else ""
            asked = f"{first}rec{index} " + " ".join(f"w{w}" for w in rng.integers(0, 9, question + 1))
            said = " ".join(f"a{w}" for w in rng.integers(0, 5, int(rng.integers(1, 5))))
            for kind in ("positive", "negative")[: int(rng.integers(1, 3))]:
                why = " ".join(f"y{w}" for w in rng.integers(0, 9, int(rng.integers(1, 6))))
                turns = (
                    Turn("user", asked),
                    Turn("assistant", said),
                    Turn("user", "Explain why."),
                    Turn("assistant", why),
                )
                talks.append(Conversation(turns, (0,) if shown else (), kind=kind))
        found.append(ImageRecord(f"rec{index}", png(colour(index)) if shown else b"", tuple(talks)))
    return found


class Remembering(Encoder):
    """Conversations come again in every epoch of every test; each is tokenised once."""

    @functools.cache  # noqa: B019
    def __call__(self, conversation: Conversation) -> Tokens:
        return super().__call__(conversation)


RECORDS = coded(17)
PROCESSOR = Processor(Remembering(WordTokenizer(), "llava-hf", PATCHES, IMAGE_ID), SIDE)
NAMES = {PROCESSOR.encoder.tokenizer.encode(f" rec{n}")[0]: n for n in range(99)} | {
    PROCESSOR.encoder.tokenizer.encode(f"\nrec{n}")[0]: n for n in range(99)
}
TEACHING = Supervision()


def batches(source: Sequence[ImageRecord] = RECORDS, *, seed: int = 3, rows: int = 4, **options: Any):
    return training_batches(source, PROCESSOR, SHAPE, rows=rows, supervision=TEACHING, seed=seed, **options)


def own(host: int, hosts: int, rows: int = 4) -> slice:
    return slice(host * rows // hosts, (host + 1) * rows // hosts)


def take(data: grain.IterDataset, count: int, state: dict[str, Any] | None = None) -> list[Batch]:
    """The first batches, or those after a state; the iterator is closed."""
    running = iter(data)
    try:
        if state is not None:
            running.set_state(state)
        return [next(running) for _ in range(count)]
    finally:
        running.close()


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def row_of(batch: Batch, number: int) -> Batch:
    return Batch(*(field[number] for field in batch))


def trees_of(row: Batch) -> list[tuple[int, int, int]]:
    """(record, start, end) of a row's trees, in order."""
    found = []
    place = 0
    while place < len(row.tokens) and (row.tokens[place] or row.ends[place] > place + 1):
        end = int(row.ends[place])
        (number,) = {NAMES[t] for t in row.tokens[place:end].tolist() if t in NAMES}
        found.append((number, place, end))
        place = end
    return found


# Hosts and threads.


@pytest.fixture(scope="module")
def wanted() -> list[Batch]:
    """What one host with one thread gets."""
    with pytest.MonkeyPatch.context() as patch:
        set_window(patch, 7)
        return take(batches(threads=1), 5)


@pytest.mark.parametrize("threads", [None, 5])
def test_threads_change_nothing(wanted, threads):
    assert all(map(equal, take(batches(threads=threads), 5), wanted))


@pytest.mark.parametrize(("hosts", "threads"), [(1, 3), (2, 1), (4, 2)])
def test_the_hosts_parts_are_the_single_hosts_batch(wanted, hosts, threads):
    parts = [take(batches(own=own(host, hosts), threads=threads), 3) for host in range(hosts)]
    for number in range(3):
        assert {len(part[number].tokens) for part in parts} == {4 // hosts}
        joined = Batch(*(np.concatenate(fields) for fields in zip(*(part[number] for part in parts), strict=True)))
        assert equal(joined, wanted[number])


def test_records_on_disk_give_the_same_batches(wanted, tmp_path):
    source = RecordSource(write_records(tmp_path, {"train": RECORDS}))
    assert all(map(equal, take(batches(source, threads=3), 3), wanted))


def test_a_slow_record_changes_nothing(wanted):
    class Slow(Sequence[ImageRecord]):
        def __len__(self) -> int:
            return len(RECORDS)

        def __getitem__(self, index: Any) -> Any:
            time.sleep(0.001 * (index % 4))
            return RECORDS[index]

    assert all(map(equal, take(batches(Slow(), threads=4), 3), wanted))


def test_another_seed_is_another_order(wanted):
    assert not all(map(equal, take(batches(seed=4), 2), wanted))


# States.


def states_and_batches(data: grain.IterDataset, count: int) -> tuple[list[str], list[Batch]]:
    running, states, found = iter(data), [], []
    try:
        for _ in range(count):
            states.append(json.dumps(running.get_state()))
            found.append(next(running))
        return states, found
    finally:
        running.close()


def test_every_state_continues_bit_for_bit_with_other_threads(wanted):
    states, found = states_and_batches(batches(threads=2), 5)
    assert all(map(equal, found, wanted))
    for number, state in enumerate(states):
        rest = take(batches(threads=1 + number % 3), min(2, 5 - number), json.loads(state))
        assert all(map(equal, rest, wanted[number:]))


def test_states_are_saved_within_a_window():
    """Rows are not a multiple of a window's: some states lie inside one, or this file tests less than it says."""
    states, _ = states_and_batches(batches(threads=1), 5)
    assert any('"next_index_in_buffer": ' + str(n) in state for state in states for n in (1, 2, 3))


def test_a_state_of_one_host_serves_any_number_of_hosts(wanted):
    running = iter(batches(own=own(1, 2), threads=1))
    for _ in range(3):
        next(running)
    state = running.get_state()
    running.close()
    parts = [take(batches(own=own(host, 4), threads=2), 2, state) for host in range(4)]
    for number in range(2):
        joined = Batch(*(np.concatenate(fields) for fields in zip(*(part[number] for part in parts), strict=True)))
        assert equal(joined, wanted[3 + number])


def test_a_state_of_one_epoch_is_none_of_another(wanted):
    states, _ = states_and_batches(batches(threads=1), 5)
    assert len(set(states)) == len(states)


def test_a_running_iterator_can_be_set_back(wanted):
    running = iter(batches(threads=2))
    first = running.get_state()
    for _ in range(4):
        next(running)
    later = running.get_state()
    running.set_state(first)
    assert equal(next(running), wanted[0])
    running.set_state(later)
    assert equal(next(running), wanted[4])
    running.close()


# Pictures.


def check_pictures(row: Batch) -> list[int]:
    """Asserts that each tree shows its own colour; returns the records of the row."""
    slot = 0
    trees = trees_of(row)
    for tree, (number, start, end) in enumerate(trees):
        features = row.image_slots[start:end]
        assert row.flat_tokens[tree] >= end - start
        if number % 3 == 2:
            assert (features == -1).all()
            assert IMAGE_ID not in row.tokens[start:end]
            continue
        shown = features[features >= 0]
        assert set(shown.tolist()) == set(range(slot * PATCHES, (slot + 1) * PATCHES))
        assert (row.tokens[start:end][features >= 0] == IMAGE_ID).all()
        assert tuple(row.pixels[slot, SIDE // 2, SIDE // 2].tolist()) == colour(number)
        slot += 1
    assert not row.pixels[slot:].any()
    return [number for number, *_ in trees]


@pytest.mark.parametrize(("hosts", "sharing"), [(1, True), (2, False)])
def test_each_picture_is_in_the_row_of_its_words(hosts, sharing):
    seen = collections.Counter[int]()
    for host in range(hosts):
        for batch in take(batches(threads=3, own=own(host, hosts), prefix_sharing=sharing), 5):
            for number in range(len(batch.tokens)):
                seen.update(check_pictures(row_of(batch, number)))
    assert len(seen) == len(RECORDS)


def test_a_row_of_text_alone_has_no_pixels():
    texts = [record for record in coded(20) if not record.image]
    for batch in take(batches(texts, threads=2), 2):
        assert (batch.weight > 0).any()
        assert batch.pixels.shape == (4, SHAPE.images, SIDE, SIDE, 3)
        assert not batch.pixels.any()
        assert (batch.image_slots == -1).all()


def test_one_picture_in_two_trees_of_a_row_is_there_twice():
    source = [record for record in coded(4) if len(record.conversations) > 1 and record.image][:1]
    (record,) = source
    number = int(record.id.removeprefix("rec"))
    (batch,) = take(batches(source, threads=2, prefix_sharing=False), 1)
    for one in range(4):
        row = row_of(batch, one)
        trees = trees_of(row)
        assert len(trees) > 1
        for slot in range(len(trees)):
            assert tuple(row.pixels[slot, SIDE // 2, SIDE // 2].tolist()) == colour(number)


# What an epoch teaches.

Lesson = tuple[tuple[int, ...], int]


def epoch(source: Sequence[ImageRecord], shape: SequenceShape, sharing: bool) -> Iterator[Batch]:
    numbers = grain.MapDataset.range(len(source)).seed(5).shuffle()
    return iter(packed_sequences(numbers, source, PROCESSOR, shape, TEACHING, prefix_sharing=sharing))


def lessons(rows: Iterator[Batch]) -> tuple[dict[Lesson, float], int]:
    """(weight of each token behind what it follows, tokens of the conversations one by one)."""
    found: dict[Lesson, float] = collections.defaultdict(float)
    flat = 0
    for row in rows:
        flat += int(row.flat_tokens.sum())
        for source, target, weight in zip(row.parent.tolist(), row.target.tolist(), row.weight.tolist(), strict=True):
            if weight:
                before = tuple(int(row.tokens[j]) for j in range(source + 1) if source < row.ends[j])
                found[before, target] += weight
    return dict(found), flat


def by_hand(source: Sequence[ImageRecord]) -> tuple[dict[Lesson, float], int]:
    found: dict[Lesson, float] = collections.defaultdict(float)
    flat = 0
    for record in source:
        for talk in TEACHING(record.conversations):
            tokens = PROCESSOR.encoder(talk)
            flat += len(tokens)
            for place in np.flatnonzero(tokens.weights > 0).tolist():
                found[tuple(tokens.ids[:place].tolist()), int(tokens.ids[place])] += float(tokens.weights[place])
    return dict(found), flat


@settings(max_examples=7)
@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from((0, 2)))
def test_an_epoch_teaches_the_same_shared_or_one_by_one(count, seed, branches):
    source = coded(count, seed)
    shape = SequenceShape(SHAPE.length, SHAPE.images, SHAPE.edges, branches=branches)
    wanted = by_hand(source)
    assert lessons(epoch(source, shape, prefix_sharing=True)) == wanted
    assert lessons(epoch(source, shape, prefix_sharing=False)) == wanted


def test_each_record_is_there_once_an_epoch():
    records = [number for row in epoch(RECORDS, SHAPE, prefix_sharing=True) for number, *_ in trees_of(row)]
    assert sorted(records) == list(range(len(RECORDS)))


def test_epochs_follow_one_another_through_batches():
    """Windows straddle epochs; still every record comes as often as any other, to within two."""
    seen = collections.Counter[int]()
    for batch in take(batches(threads=2), 7):
        for number in range(4):
            seen.update(record for record, *_ in trees_of(row_of(batch, number)))
    assert max(seen.values()) - min(seen.values()) <= 2


# What goes wrong.


def with_broken(index: int) -> list[ImageRecord]:
    broken = coded(8)
    broken[index] = ImageRecord(broken[index].id, broken[index].image[:50], broken[index].conversations)
    return broken


def failure(data: grain.IterDataset) -> BaseException:
    running = iter(data)
    with pytest.raises(BrokenImage) as error:
        collections.deque(itertools.islice(running, 10), maxlen=0)
    running.close()
    return error.value


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "on disk"])
def test_a_broken_picture_names_its_record(tmp_path, threads, stored):
    source: Sequence[ImageRecord] = with_broken(4)
    if stored:
        source = RecordSource(write_records(tmp_path, {"train": source}))
    message = str(failure(batches(source, threads=threads)))
    assert message.startswith("rec4: ")
    assert "\n" not in message


def test_a_lost_shard_names_the_records(tmp_path):
    folder = write_records(tmp_path, {"train": RECORDS})
    source = RecordSource(folder)
    (shard,) = folder.glob("*.array_record*")
    data = batches(source, threads=2)
    shard.write_bytes(bytes(shard.stat().st_size))
    running = iter(data)
    with pytest.raises(ValueError, match=str(folder)) as error:
        next(running)
    assert "\n" not in str(error.value)
    running.close()


# Threads.


def mine(before: set[threading.Thread], *, wait: float = 5.0, most: int = 0) -> set[threading.Thread]:
    """Threads that are alive now and were not before, after some time to end."""
    until = time.monotonic() + wait
    while len(found := set(threading.enumerate()) - before) > most and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("taken", [0, 2])
def test_no_thread_outlives_an_iterator_and_its_data(closed, taken):
    before = set(threading.enumerate())
    data = batches(threads=3)
    running = iter(data)
    for _ in range(taken):
        next(running)
    if closed:
        running.close()
    del running, data
    assert not mine(before)


def test_a_closed_iterator_leaves_but_the_threads_of_its_data():
    before = set(threading.enumerate())
    data = batches(threads=3)
    for _ in range(3):
        running = iter(data)
        next(running)
        running.close()
        with pytest.raises(ValueError, match="closed"):
            next(running)
    del running
    assert len(mine(before, most=3)) <= 3  # those that decode pictures belong to the data
    del data
    assert not mine(before)


def test_no_thread_outlives_an_error():
    before = set(threading.enumerate())
    failure(batches(with_broken(1), threads=3))
    assert not mine(before)


def test_many_iterators_side_by_side_do_not_disturb_one_another(wanted):
    data = batches(threads=2)
    running = [iter(data) for _ in range(3)]
    for number in range(2):
        assert all(equal(next(one), wanted[number]) for one in running)
    for one in running:
        one.close()


@pytest.mark.slow
def test_the_real_window_gives_the_same_with_any_hosts(monkeypatch):
    set_window(monkeypatch, 1024)
    (whole,) = take(batches(threads=2), 1)
    parts = [take(batches(own=own(host, 2), threads=1), 1)[0] for host in range(2)]
    assert equal(Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True))), whole)
    for number in range(4):
        check_pictures(row_of(whole, number))
