"""Training batches: fixed by the seed alone, whatever the threads and hosts; exact resume; every image with its text."""

from __future__ import annotations

import collections
import dataclasses
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

from reverie_jax.data import packing, pipeline
from reverie_jax.data import survey as survey_module
from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.feature_cache import FeatureCache, write_features
from reverie_jax.data.images import BrokenImage, decode, encode_png, random_resized_crop
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.pipeline import (
    ImageQuestions,
    TreeBuilder,
    ordered_batches,
    packed_sequences,
    question_batches,
    training_batches,
)
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.survey import survey
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import IMAGE_ID, WordTokenizer, png

PATCHES, SIDE = 4, 8
SHAPE = SequenceShape(length=160, images=4, edges=120)


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    """Windows of a few trees, so that a handful of batches sees several."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (packing, pipeline, survey_module):
            patch.setattr(module, "WINDOW", 7)
        yield


def color(index: int) -> tuple[int, int, int]:
    return (20 + 9 * index, 250 - 7 * index, 3 + index)


def coded(count: int, seed: int = 0) -> list[ImageRecord]:
    """Records whose first word and whose image's color both say which they are; every third has no image."""
    rng = np.random.default_rng(seed)

    def words(letter: str, kinds: int, count: int) -> str:
        return " ".join(f"{letter}{number}" for number in rng.integers(0, kinds, count))

    records = []
    for index in range(count):
        has_image, conversations = index % 3 != 2, []
        for number in range(int(rng.integers(1, 4))):
            question = f"{IMAGE}\n" * has_image + f"rec{index} {words('w', 9, number + 1)}"
            answer = words("a", 5, int(rng.integers(1, 5)))
            for kind in ("positive", "negative")[: int(rng.integers(1, 3))]:
                texts = (question, answer, "Explain why.", words("y", 9, int(rng.integers(1, 6))))
                turns = tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
                conversations.append(Conversation(turns, (0,) * has_image, kind=kind))
        records.append(ImageRecord(f"rec{index}", png(color(index)) if has_image else b"", tuple(conversations)))
    return records


class CachingEncoder(Encoder):
    """Tokenizes each conversation once; it comes again in every epoch of every test."""

    @functools.cache  # noqa: B019
    def __call__(self, conversation: Conversation) -> Tokens:
        return super().__call__(conversation)


RECORDS = coded(17)
TOKENIZER = WordTokenizer()
BUILDER = TreeBuilder(Processor(CachingEncoder(TOKENIZER, "llava-hf", PATCHES, IMAGE_ID), SIDE), SHAPE, Supervision())
UNSHARED = TreeBuilder(BUILDER.processor, SHAPE, Supervision(), prefix_sharing=False)
NAMES = {TOKENIZER.encode(f"{space}rec{n}")[0]: n for n in range(99) for space in " \n"}


def batches(
    records: Sequence[ImageRecord] = RECORDS, builder: TreeBuilder = BUILDER, *, seed: int = 3, **options: Any
) -> grain.IterDataset:
    return training_batches(records, builder, batch_size=4, seed=seed, **options)


def local(host: int, hosts: int) -> slice:
    return slice(host * 4 // hosts, (host + 1) * 4 // hosts)


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


def concatenate(parts: Sequence[Batch]) -> Batch:
    return Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def sequences_of(batch: Batch) -> list[Batch]:
    return [Batch(*(field[number] for field in batch)) for number in range(len(batch.tokens))]


def trees_of(sequence: Batch) -> list[tuple[int, int, int]]:
    """(record, start, end) of a sequence's trees, in order."""
    trees, start = [], 0
    while start < len(sequence.tokens) and (sequence.tokens[start] or sequence.ends[start] > start + 1):
        end = int(sequence.ends[start])
        (number,) = {NAMES[token] for token in sequence.tokens[start:end].tolist() if token in NAMES}
        trees.append((number, start, end))
        start = end
    return trees


# Order and resume.


@pytest.fixture(scope="module")
def expected() -> list[Batch]:
    """The batches of one host with one thread."""
    return take(batches(threads=1), 5)


@pytest.fixture(scope="module")
def states() -> list[str]:
    """The state before each of these batches, taken on a host of two."""
    running, states = iter(batches(local=local(1, 2), threads=2)), []
    for _ in range(5):
        states.append(json.dumps(running.get_state()))
        next(running)
    running.close()
    return states


@pytest.mark.parametrize("case", ["default threads", "5 threads", "records on disk", "planned", "planned, on disk"])
def test_threads_storage_and_plans_do_not_change_the_batches(expected, case, tmp_path):
    records: Sequence[ImageRecord] = RECORDS
    if "on disk" in case:
        records = RecordSource(write_records(tmp_path, {"train": RECORDS}))
    sizes = survey(records, BUILDER) if "planned" in case else None
    drawn = take(batches(records, threads=None if case == "default threads" else 5, sizes=sizes), 3)
    assert all(map(equal, drawn, expected))


@pytest.mark.parametrize(("hosts", "threads", "planned"), [(2, 1, False), (4, 2, False), (2, 2, True), (4, 1, True)])
def test_hosts_receive_the_parts_of_the_single_hosts_batch_from_any_state(expected, states, hosts, threads, planned):
    options: dict[str, Any] = {"threads": threads, "sizes": survey(RECORDS, BUILDER) if planned else None}
    for number in (0, 3):
        state = json.loads(states[number])
        parts = [take(batches(local=local(host, hosts), **options), 1, state)[0] for host in range(hosts)]
        assert {len(part.tokens) for part in parts} == {4 // hosts}
        assert equal(concatenate(parts), expected[number])


def test_every_state_continues_exactly_with_other_threads(expected, states):
    assert not all(map(equal, take(batches(seed=4), 2), expected))  # another seed, another order
    assert len(set(states)) == len(states)
    # Some states lie within a window, or this file tests less than it says.
    assert any(f'"next_index_in_buffer": {n}' in state for state in states for n in (1, 2, 3))
    for number, state in enumerate(states):
        rest = take(batches(threads=1 + number % 3), min(2, 5 - number), json.loads(state))
        assert all(map(equal, rest, expected[number:]))


def test_a_running_iterator_can_be_set_to_any_state(expected, states):
    running = iter(batches(threads=2))
    for number in (0, 1, 4, 0, 2):
        running.set_state(json.loads(states[number]))
        assert equal(next(running), expected[number])
    running.close()


class Reads(tuple[ImageRecord, ...]):
    """Records that keep which of them were read."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self.read: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        self.read.add(index)
        return super().__getitem__(index)


def paired(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The records with each conversation as both sides of a pair."""
    return [
        dataclasses.replace(
            record,
            conversations=tuple(
                dataclasses.replace(one, kind=kind, pair=str(number))
                for number, one in enumerate(record.conversations)
                for kind in ("chosen", "rejected")
            ),
        )
        for record in records
    ]


@pytest.mark.parametrize("case", ["shared", "unshared", "pairs", "one tree"])
def test_a_host_reads_only_the_records_it_shows_where_sizes_are_known(case):
    shape = dataclasses.replace(SHAPE, images=1 if case == "one tree" else 4, questions=4 * (case == "pairs"))
    supervision = DPOConfig() if case == "pairs" else Supervision()
    builder = TreeBuilder(BUILDER.processor, shape, supervision, prefix_sharing=case != "unshared")
    records = paired(coded(99)) if case == "pairs" else coded(99)
    sizes, options = survey(records, builder), {"builder": builder, "threads": 1}
    whole = take(batches(records, **options), 9)
    running = iter(batches(records, **options))
    state = [next(running) and running.get_state() for _ in range(2)][1]
    running.close()
    for host in range(2):
        reads, part = Reads(records), local(host, 2)
        planned = batches(reads, **options, sizes=sizes, local=part)
        reads.read.clear()  # a random one was read to check its type
        drawn = take(planned, 3, state)
        expected = [Batch(*(field[part] for field in batch)) for batch in whole[2:]]
        assert all(map(equal, drawn, expected))
        numbers = [set(batch.records[batch.records > 0].tolist()) for batch in expected]
        shown, ahead = ({number - 1 for group in some for number in group} for some in (numbers[:3], numbers))
        assert shown <= reads.read <= ahead != set(range(99))


# Images.


def check_images(sequence: Batch) -> list[int]:
    """Check that each tree has the image of its record; return the records of the sequence."""
    slot, trees = 0, trees_of(sequence)
    for tree, (number, start, end) in enumerate(trees):
        slots, tokens = sequence.image_slots[start:end], sequence.tokens[start:end]
        assert sequence.flat_tokens[tree] >= end - start
        assert np.array_equal(tokens == IMAGE_ID, slots >= 0)
        if number % 3 == 2:
            assert (slots == -1).all()
            continue
        assert set(slots[slots >= 0].tolist()) == set(range(slot * PATCHES, (slot + 1) * PATCHES))
        assert tuple(sequence.images[slot, SIDE // 2, SIDE // 2].tolist()) == color(number)
        slot += 1
    assert not sequence.images[slot:].any()
    return [number for number, *_ in trees]


@pytest.mark.parametrize(("hosts", "builder"), [(1, BUILDER), (2, UNSHARED)], ids=["shared", "unshared"])
def test_each_image_is_in_the_sequence_of_its_text(hosts, builder):
    seen = collections.Counter[int]()
    for host in range(hosts):
        for batch in take(batches(RECORDS, builder, threads=3, local=local(host, hosts)), 5):
            for sequence in sequences_of(batch):
                seen.update(check_images(sequence))
    assert len(seen) == len(RECORDS)
    if builder is BUILDER:  # windows span epochs; still every record comes as often as any other, to within two
        assert max(seen.values()) - min(seen.values()) <= 2


# Epochs.

Target = tuple[tuple[int, ...], int]
"""(tokens before, supervised token)"""


def supervised(sequences: Iterator[Batch]) -> tuple[dict[Target, float], int]:
    """(weight of each supervised token after what precedes it, tokens of the conversations without sharing)."""
    weights: dict[Target, float] = collections.defaultdict(float)
    flat = 0
    for one in sequences:
        flat += int(one.flat_tokens.sum())
        for parent, target, weight in zip(one.parent.tolist(), one.target.tolist(), one.weight.tolist(), strict=True):
            if weight:
                before = tuple(int(one.tokens[j]) for j in range(parent + 1) if parent < one.ends[j])
                weights[before, target] += weight
    return dict(weights), flat


def by_hand(records: Sequence[ImageRecord]) -> tuple[dict[Target, float], int]:
    weights: dict[Target, float] = collections.defaultdict(float)
    flat = 0
    for record in records:
        for conversation in Supervision()(record.conversations):
            tokens = BUILDER.processor.encoder(conversation)
            flat += len(tokens)
            for index in np.flatnonzero(tokens.weights > 0).tolist():
                before = tuple(tokens.ids[:index].tolist())
                weights[before, int(tokens.ids[index])] += float(tokens.weights[index])
    return dict(weights), flat


@settings(max_examples=5)
@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from((0, 2)))
def test_an_epoch_supervises_the_same_with_and_without_sharing(count, seed, branches):
    records, indices = coded(count, seed), grain.MapDataset.range(count).seed(5).shuffle()
    shape = SequenceShape(SHAPE.length, SHAPE.images, SHAPE.edges, branches=branches)
    for sharing in (True, False):
        builder = TreeBuilder(BUILDER.processor, shape, Supervision(), sharing)
        assert supervised(iter(packed_sequences(indices, records, builder))) == by_hand(records)


def test_ordered_batches_hold_each_record_once_and_hosts_their_parts():
    whole = list(ordered_batches(RECORDS, BUILDER, batch_size=4))
    assert {len(batch.tokens) for batch in whole} == {4}
    numbers = [number for batch in whole for sequence in sequences_of(batch) for number in check_images(sequence)]
    assert sorted(numbers) == list(range(len(RECORDS)))
    parts = [list(ordered_batches(RECORDS, BUILDER, batch_size=4, local=local(host, 2))) for host in range(2)]
    assert all(equal(concatenate(halves), batch) for *halves, batch in zip(*parts, whole, strict=True))


def test_origins_are_the_datasets_of_the_edges():
    def record(index: int, *datasets: str) -> ImageRecord:
        turns = [(Turn("user", f"rec{index} {name}"), Turn("assistant", f"a {name}")) for name in datasets]
        return ImageRecord(
            f"rec{index}", b"", tuple(Conversation(t, (), name) for t, name in zip(turns, datasets, strict=True))
        )

    records = [record(0, "one", "two"), record(1, "two", "other")]
    stats = survey(records, BUILDER).stats
    assert stats.datasets == ("one", "two", "other")
    builder = TreeBuilder(BUILDER.processor, SHAPE, Supervision(), datasets=("one", "two"))
    (batch,) = ordered_batches(records, builder, batch_size=1)
    origins = zip(batch.target[0].tolist(), batch.origin[0].tolist(), strict=True)
    words = {TOKENIZER.words[target]: origin for target, origin in origins if target in TOKENIZER.words}
    assert (words[" two"], words[" one"], words[" other"]) == (1, 0, 0)
    assert sorted(batch.records[0].tolist()) == [0, 0, 1, 2]


def test_every_epoch_has_every_record_once_in_another_order():
    one_each = TreeBuilder(BUILDER.processor, SequenceShape(160, 1, 120), Supervision())
    drawn = take(batches(builder=one_each), 9)
    numbers = [number for batch in drawn for sequence in sequences_of(batch) for number, *_ in trees_of(sequence)]
    first, second = numbers[: len(RECORDS)], numbers[len(RECORDS) : 2 * len(RECORDS)]
    assert sorted(first) == sorted(second) == list(range(len(RECORDS)))
    assert first != second


def gradient(index: int) -> bytes:
    """A picture by whose pixels one sees what was cropped and flipped."""
    down, across = np.mgrid[:30, :40].astype(np.uint8)
    return encode_png(np.stack([5 * down, 5 * across, np.full_like(down, index)], axis=-1))


PICTURES = [dataclasses.replace(r, image=gradient(n) if r.image else b"") for n, r in enumerate(RECORDS)]


@pytest.mark.parametrize(("crop_scale", "flip"), [(0.5, True), (0.9, False), (None, True)])
def test_crops_and_flips_depend_on_seed_epoch_and_record_alone(crop_scale, flip):
    one_each = TreeBuilder(BUILDER.processor, SequenceShape(160, 1, 120), Supervision())
    options: dict[str, Any] = {"builder": one_each, "crop_scale": crop_scale, "flip": flip}
    running, state, drawn = iter(batches(PICTURES, threads=2, **options)), {}, []
    for number in range(9):
        state = running.get_state() if number == 5 else state
        drawn.append(next(running))
    running.close()
    assert all(map(equal, take(batches(PICTURES, threads=1, **options), 4, json.loads(json.dumps(state))), drawn[5:]))
    half = take(batches(PICTURES, local=local(1, 2), **options), 9)
    assert all(np.array_equal(part.images, whole.images[2:]) for part, whole in zip(half, drawn, strict=True))
    seen = collections.Counter[int]()
    views = collections.defaultdict[int, set[bytes]](set)
    for sequence in (sequence for batch in drawn for sequence in sequences_of(batch)):
        ((number, *_),) = trees_of(sequence)
        rng = np.random.default_rng((3, seen[number], number))
        seen[number] += 1
        if not PICTURES[number].image:
            continue
        whole = decode(PICTURES[number].image, "")
        if crop_scale is None:
            expected = BUILDER.processor.preprocess(PICTURES[number].image, "")[0]
        else:
            expected = random_resized_crop(whole, SIDE, crop_scale, rng)
        mirrored = flip and rng.random() < 0.5
        np.testing.assert_array_equal(sequence.images[0], expected[:, ::-1] if mirrored else expected)
        views[number].add(sequence.images[0].tobytes())
    assert max(map(len, views.values())) > 1, "every epoch shows the same"


def test_both_sides_of_a_pair_see_one_crop():
    text = f"{IMAGE}\nWhat?"
    sides = [
        Conversation((Turn("user", text), Turn("assistant", kind)), (0,), kind=kind, pair="1")
        for kind in ("chosen", "rejected")
    ]
    builder = TreeBuilder(BUILDER.processor, dataclasses.replace(SHAPE, questions=2), DPOConfig())
    records = [ImageRecord("rec0", gradient(0), tuple(sides))]
    (batch,) = take(batches(records, builder, crop_scale=0.5, flip=True), 1)
    slots = {slot for slot in batch.image_slots[0].tolist() if slot >= 0}
    assert len(batch.leaves[0][batch.questions[0] > 0]) == 2 * len(slots) // PATCHES


def test_features_of_whole_images_are_not_cropped(tmp_path):
    write_features(tmp_path / "cache", "key", (2, 3), [np.zeros((2, 3), np.float32)] * len(RECORDS))
    features = FeatureCache(tmp_path / "cache", "key")
    for options in ({"crop_scale": 0.5}, {"flip": True}):
        with pytest.raises(UserError, match=r"--cache-vision.*crop_scale.*flip"):
            batches(features=features, **options)


# Statistics.


def silent(name: str) -> ImageRecord:
    """A record without supervision."""
    return ImageRecord(name, b"", (Conversation((Turn("user", "What?"), Turn("assistant", "A cup.", 0.0)), ()),))


@pytest.mark.parametrize("builder", [BUILDER, UNSHARED], ids=["shared", "unshared"])
def test_statistics_are_those_of_the_trees(builder):
    stats = survey([*RECORDS, silent("silent")], builder).stats
    trees = [built.tree for record in RECORDS for built in builder.build(record)]
    weights, flat = by_hand(RECORDS)
    assert (stats.records, stats.trees, stats.tokens) == (len(RECORDS) + 1, len(trees), sum(map(len, trees)))
    assert (stats.flat_tokens, stats.longest) == (flat, max(map(len, trees)))
    assert stats.edges == sum(len(tree.parent) for tree in trees) >= len(weights)
    assert stats.tokens < flat if builder is BUILDER else stats.tokens == flat
    assert stats.sequences >= len(trees) / SHAPE.images


@pytest.mark.parametrize(
    ("records", "builder", "error", "named"),
    [
        (RECORDS, dataclasses.replace(BUILDER, shape=SequenceShape(10, edges=99)), DataError, "rec0: conversation 0"),
        (RECORDS, dataclasses.replace(BUILDER, shape=SequenceShape(99, edges=1)), DataError, "rec0: conversation 0"),
        (
            *(RECORDS, dataclasses.replace(BUILDER, processor=dataclasses.replace(BUILDER.processor, context=12))),
            *(UserError, "rec0: conversation 0 .* 12"),
        ),
        ([silent("a")], BUILDER, DataError, "supervised"),
        ([silent("a")], dataclasses.replace(BUILDER, supervision=DPOConfig()), DataError, "pair"),
    ],
    ids=["length", "edges", "context", "unsupervised", "no pairs"],
)
def test_data_that_cannot_be_trained_on_is_an_error_before_training(records, builder, error, named):
    with pytest.raises(error, match=named) as caught:
        survey(records, builder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_answers_of_pairs_have_ids(monkeypatch):
    sides = itertools.product("12", ("chosen", "rejected"))
    conversations = [
        Conversation((Turn("user", "What?"), Turn("assistant", f"{kind} {pair}")), (), kind=kind, pair=pair)
        for pair, kind in sides
    ]
    record = ImageRecord("rec0", b"", tuple(conversations))
    builder = TreeBuilder(BUILDER.processor, dataclasses.replace(SHAPE, questions=4), DPOConfig())
    (element,) = builder.elements(record, 3)
    assert element["questions"].tolist() == [3 * 1024 + n for n in range(4)]
    assert element["records"].tolist() == [3]
    monkeypatch.setattr(pipeline, "PAIR_STRIDE", 2)
    with pytest.raises(DataError, match="rec0: 2 pairs"):
        builder.elements(record, 3)


# Questions.


def asked(index: int, ids: Sequence[int], words: int = 1) -> ImageQuestions:
    questions = [(n, Conversation((Turn("user", f"{IMAGE}\n{' '.join([f'x{n}'] * words)}?"),))) for n in ids]
    return ImageQuestions(f"image{index}", functools.partial(png, color(index)), questions)


@pytest.mark.parametrize("hosts", [1, 2])
def test_every_question_is_asked_once_with_its_image(hosts):
    images = [asked(0, range(5)), asked(1, [5]), asked(2, range(6, 9))]
    shape, paths = SequenceShape(length=40, images=1, questions=2), {}
    for host in range(hosts):
        data = question_batches(images, BUILDER.processor, shape, batch_size=4, local=local(host, hosts))
        for batch in data:
            assert len(batch.tokens) == 4 // hosts
            for b, q in np.argwhere(batch.questions >= 0):
                leaf, ends = batch.leaves[b, q], batch.ends[b]
                assert int(batch.questions[b, q]) not in paths
                path = [int(batch.tokens[b, j]) for j in range(leaf + 1) if leaf < ends[j]]
                paths[int(batch.questions[b, q])] = (path, tuple(batch.images[b, 0, SIDE // 2, SIDE // 2].tolist()))
    assert paths == {
        n: (BUILDER.processor.encoder(question).ids.tolist(), color(index))
        for index, image in enumerate(images)
        for n, question in image.questions
    }


def test_a_question_that_does_not_fit_is_an_error_that_names_its_image():
    shape = SequenceShape(length=40, images=1, questions=2)
    with pytest.raises(DataError, match="image7") as error:
        list(question_batches([asked(7, [0], words=60)], BUILDER.processor, shape, batch_size=1))
    assert "\n" not in str(error.value)


# Errors and threads.


def with_broken_image(index: int) -> list[ImageRecord]:
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
def test_a_broken_image_is_an_error_that_names_its_record(tmp_path, threads):
    records: Sequence[ImageRecord] = with_broken_image(4)
    if threads > 1:
        records = RecordSource(write_records(tmp_path, {"train": records}))
    message = str(failure(batches(records, threads=threads)))
    assert message.startswith("rec4: ")
    assert "\n" not in message


def test_a_damaged_shard_is_an_error_that_names_the_folder(tmp_path):
    folder = write_records(tmp_path, {"train": RECORDS})
    data = batches(RecordSource(folder), threads=2)
    (shard,) = folder.glob("*.array_record*")
    shard.write_bytes(bytes(shard.stat().st_size))
    running = iter(data)
    with pytest.raises(ValueError, match=str(folder)) as error:
        next(running)
    assert "\n" not in str(error.value)
    running.close()


def remaining(before: set[threading.Thread], most: int = 0) -> int:
    """The number of threads that did not exist before, once at most `most` remain or after some time."""
    until = time.monotonic() + 30
    while (count := len(set(threading.enumerate()) - before)) > most and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    return count


@pytest.mark.parametrize(("taken", "closed"), [(0, True), (2, False)])
def test_no_thread_outlives_an_iterator_and_its_data(taken, closed):
    before = set(threading.enumerate())
    data = batches(threads=3)
    running = iter(data)
    for _ in range(taken):
        next(running)
    if closed:
        running.close()
        with pytest.raises(ValueError, match="closed"):
            next(running)
        del running
        assert remaining(before, most=3) <= 3  # the threads that decode images belong to the data
    else:
        del running
    del data
    assert remaining(before) == 0


def test_no_thread_outlives_an_error():
    before = set(threading.enumerate())
    failure(batches(with_broken_image(1), threads=3))
    assert remaining(before) == 0
