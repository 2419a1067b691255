"""Several annotation files as one set of records: nothing is lost, doubled or invented; caps, weights and digests."""

import dataclasses
import io
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.mixture import Mixture, MixtureEntry, read_mixture, read_mixture_file
from reverie_jax.data.sources import Example, ImageFolder, ReadLog
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import (
    assert_one_line,
    llava_row,
    png,
    read_records,
    saved,
    write_json_rows,
)

NAMES = ("a.png", "b.png", "c.png")
names = st.sampled_from(["", *NAMES])


def make_images(folder):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(png((number, 0, 0)))
    return folder


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return ImageFolder(make_images(tmp_path_factory.mktemp("shared")))


@pytest.fixture
def other(tmp_path):
    """Another folder with another image of the same name."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "a.png").write_bytes(png((9, 9, 9)))
    return tmp_path / "others"


def conversation(question, answer, image, **fields):
    shown = f"{IMAGE}\n{question}" if image else question
    return Conversation((Turn("user", shown), Turn("assistant", answer)), (0,) if image else (), **fields)


def example(number, image, file=0, encoded=b""):
    return Example(image, conversation(f"Q{number}?", f"A{number}.", image), f"f{file}: row {number}", encoded)


def examples(files, embedded=False):
    """Examples of several files, from the names of their images, numbered through."""
    count = itertools.count()

    def encoded(image):
        return png((NAMES.index(image), 0, 0)) if embedded and image else b""

    return [
        [example(next(count), image, file, encoded(image)) for image in images] for file, images in enumerate(files)
    ]


def mix(files, folder, cap=None, **options):
    return Mixture([(file, folder, cap, 1.0) for file in files], **options)


# One record for each image.


@settings(max_examples=40)
@given(files=st.lists(st.lists(names, max_size=6), min_size=1, max_size=3), embedded=st.booleans())
def test_a_record_has_all_conversations_about_an_image_in_order(shared, files, embedded):
    flat = [one for file in examples(files) for one in file]
    order = list(dict.fromkeys(one.image for one in flat if one.image))
    with mix(examples(files, embedded), None if embedded else shared) as mixture:
        records = list(mixture)
        assert (len(mixture), mixture.conversation_count) == (len(records), len(flat))
        assert list(mixture.conversations()) == [(one.image, one.conversation) for one in flat]
    assert [record.id for record in records if record.image] == order
    assert [record.image for record in records if record.image] == [png((NAMES.index(name), 0, 0)) for name in order]
    for record in records:
        expected = [one for one in flat if one.image == record.id] or [one for one in flat if one.where == record.id]
        assert list(record.conversations) == [one.conversation for one in expected]
    assert [record.id for record in records if not record.image] == [one.where for one in flat if not one.image]
    assert records == sorted(records, key=lambda record: not record.image)


def test_one_image_under_several_names_is_one_record(tmp_path, images):
    (images / "deep").mkdir()
    (images / "deep" / "d.png").write_bytes(png())
    rows = [llava_row(name) for name in ("deep/d.png", "d.png", "other/d.png")]
    (record,) = read_records(write_json_rows(tmp_path / "a.json", rows))
    assert (record.id, len(record.conversations)) == ("deep/d.png", 3)


def test_one_name_in_two_folders_is_two_images(tmp_path, images, other):
    one = write_json_rows(tmp_path / "1.json", [llava_row("a.png"), llava_row(None)])
    two = write_json_rows(tmp_path / "2.json", [llava_row("a.png"), llava_row("a.png")])
    records = read_records(one, MixtureEntry(file=two, images=other))
    expected = [(png((0, 0, 0)), 1), (png((9, 9, 9)), 2), (b"", 1)]
    assert [(record.image, len(record.conversations)) for record in records] == expected
    assert len({record.id for record in records}) == 3
    assert (records[0].id, records[2].id) == ("a.png", f"{one}: row 1")


def test_larger_images_are_scaled_down_on_request(tmp_path, images):
    (images / "large.png").write_bytes(saved(Image.new("RGB", (80, 40), (200, 30, 30))))
    path = write_json_rows(tmp_path / "a.json", [llava_row("large.png"), llava_row("a.png")])
    entries = [MixtureEntry(file=path, images=images)]
    with read_mixture(entries, ReadLog()) as full, read_mixture(entries, ReadLog(), max_side=20) as small:
        assert [record.image for record in full] == [(images / name).read_bytes() for name in ("large.png", "a.png")]
        assert Image.open(io.BytesIO(small[0].image)).size == (20, 10)
        assert small[1].image == full[1].image
        assert small.digest(0, 2) != full.digest(0, 2)


# Caps.


def capped(file, cap, seed=0, folder=None):
    with mix([file], folder, cap, seed=seed) as mixture:
        return list(mixture.conversations())


@settings(max_examples=40)
@given(images=st.lists(names, max_size=9), cap=st.integers(1, 10), seed=st.integers(0, 3), data=st.data())
def test_a_cap_keeps_the_same_rows_in_any_order(shared, images, cap, seed, data):
    (file,) = examples([images])
    kept = capped(file, cap, seed, shared)
    assert len(kept) == min(cap, len(file))
    assert kept == capped(file, cap, seed, shared)
    assert {*kept} <= {(one.image, one.conversation) for one in file}
    shuffled = data.draw(st.permutations(file))
    shuffled = [dataclasses.replace(one, where=f"other: row {number}") for number, one in enumerate(shuffled)]
    assert {*capped(shuffled, cap, seed, shared)} == {*kept}
    assert {*kept} <= {*capped(file, cap + 1, seed, shared)}


def test_repeated_rows_count_one_each_and_seeds_draw_different_ones(shared):
    file = [example(0, "a.png")] * 4 + [example(1, "b.png")] * 2
    assert [len(capped(file, cap, folder=shared)) for cap in range(1, 8)] == [1, 2, 3, 4, 5, 6, 6]
    file = [example(number, "a.png") for number in range(12)]
    drawn = [frozenset(capped(file, 4, seed, shared)) for seed in range(30)]
    assert len(set(drawn)) > 20
    assert len(frozenset().union(*drawn)) == 12


def test_each_file_has_its_own_cap(shared):
    files = examples([["a.png"] * 5, ["a.png", "b.png", ""], ["c.png"] * 4])
    with Mixture([(file, shared, cap, 1.0) for file, cap in zip(files, (2, None, 3), strict=True)]) as mixture:
        assert mixture.conversation_count == 2 + 3 + 3
        assert [len(record.conversations) for record in mixture] == [3, 1, 3, 1]


def test_images_without_a_kept_row_are_not_records(tmp_path, images, other):
    rows = [llava_row("a.png"), *(llava_row("b.png", f"Q{n}?", "A.") for n in range(40))]
    first = MixtureEntry(file=write_json_rows(tmp_path / "1.json", rows), cap=1)
    second = MixtureEntry(file=write_json_rows(tmp_path / "2.json", [llava_row("a.png")]), images=other)
    records = read_records(first, second)  # the name is free, since the cap drops the first file's row
    assert [(record.id, len(record.conversations)) for record in records] == [("b.png", 1), ("a.png", 1)]


def test_a_weight_does_not_change_what_a_cap_keeps(tmp_path, images):
    path = write_json_rows(tmp_path / "a.json", [llava_row("a.png", f"Q{number}?", "A.") for number in range(20)])
    one, two = (read_records(MixtureEntry(file=path, cap=4, weight=weight))[0] for weight in (1.0, 2.0))
    assert [c.turns[0].text for c in one.conversations] == [c.turns[0].text for c in two.conversations]


# Weights.


@settings(max_examples=20)
@given(weight=st.floats(0.01, 100), exchanges=st.integers(1, 3))
def test_a_weight_multiplies_the_loss_of_each_answer(shared, weight, exchanges):
    turns = [Turn("assistant", "A.", 0.25) if n % 2 else Turn("user", f"Q{n}?") for n in range(2 * exchanges)]
    turns[0] = Turn("user", f"{IMAGE}\nQ?")
    plain = Conversation(tuple(turns), dataset="s", kind="negative", pair="p")
    with Mixture([([Example("a.png", plain, "f: row 0")], shared, None, weight)]) as mixture:
        (weighted,) = mixture[0].conversations
    expected = [dataclasses.replace(turn, weight=turn.weight * weight) for turn in turns]
    assert weighted == dataclasses.replace(plain, turns=tuple(expected))


# Digests.


def digest(files, folder, start=0, stop=None, **options):
    with mix(files, folder, **options) as mixture:
        return mixture.digest(start, len(mixture) if stop is None else stop)


def changed(old, what):
    """The example with something else in it."""
    question, answer = old.conversation.turns
    turns = {
        "question": (dataclasses.replace(question, text=question.text + " "), answer),
        "answer": (question, dataclasses.replace(answer, text=answer.text + ".")),
        "weight": (question, dataclasses.replace(answer, weight=0.5)),
        "open": (question,),
    }
    fields = {"turns": turns[what]} if what in turns else {what: "rejected"}
    return dataclasses.replace(old, conversation=dataclasses.replace(old.conversation, **fields))


@settings(max_examples=40)
@given(
    files=st.lists(st.lists(names, max_size=6), min_size=1, max_size=3).filter(any),
    what=st.sampled_from(["question", "answer", "weight", "open", "dataset", "kind", "pair"]),
    data=st.data(),
)
def test_a_digest_changes_with_every_word_and_field(shared, files, what, data):
    other, before = examples(files), digest(examples(files), shared)
    assert digest(examples(files), shared, seed=5) == before
    file = data.draw(st.sampled_from([file for file in other if file]))
    index = data.draw(st.integers(0, len(file) - 1))
    file[index] = changed(file[index], what)
    assert digest(other, shared) != before


@settings(max_examples=25)
@given(images=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5), more=names)
def test_a_digest_depends_on_its_records_only(shared, images, more):
    after = digest(examples([[*images, more]]), shared, stop=len(set(images)))
    assert (after == digest(examples([images]), shared)) == (more not in images)


def test_a_digest_changes_with_an_image(tmp_path, images):
    path = write_json_rows(tmp_path / "a.json", [llava_row("a.png"), llava_row("b.png")])

    def digests():
        with read_mixture([MixtureEntry(file=path)], ReadLog()) as mixture:
            return mixture.digest(0, 1), mixture.digest(1, 2)

    before = digests()
    path.write_bytes(path.read_bytes())
    assert digests() == before
    (images / "b.png").write_bytes(png((1, 1, 1), (60, 60)))
    assert digests()[0] == before[0]
    assert digests()[1] != before[1]
    os.utime(images / "a.png", (1, 1))
    assert digests()[0] != before[0]
    one, same, other = (
        digest([[example(0, "a.png", encoded=png(color))]], None) for color in ((1, 2, 3), (1, 2, 3), (1, 2, 4))
    )
    assert one == same != other


# Mixture files.


def test_paths_of_a_mixture_file_are_relative_to_it(tmp_path, images, monkeypatch):
    there = tmp_path / "there"
    write_json_rows(there / "own.json", [llava_row("a.png", "Q0?", "A.")])
    write_json_rows(there / "sub" / "a.json", [llava_row("a.png", "Q1?", "A.")])
    for folder in (there / "images", there / "sub" / "images", there / "named"):
        folder.mkdir()
        (folder / "a.png").write_bytes(png((len(str(folder)), 0, 0)))
    absolute = write_json_rows(tmp_path / "b.json", [llava_row("a.png", "Q2?", "A.")])
    rows = [
        {"file": "own.json"},
        {"file": "sub/a.json"},
        {"file": "sub/a.json", "images": "named"},
        {"file": str(absolute), "images": str(images)},
        {"file": "../b.json"},
    ]
    entries = read_mixture_file(write_json_rows(there / "mixture.json", rows))
    monkeypatch.chdir(tmp_path)
    folders = [there / "images", there / "sub" / "images", there / "named", images, images]
    assert [entry.folder.resolve() for entry in entries] == folders
    records = read_records(*entries)
    assert [len(record.conversations) for record in records] == [1, 1, 1, 2]
    assert [record.image for record in records] == [(folder / "a.png").read_bytes() for folder in folders[:4]]


def test_a_mixture_file_may_set_every_field(tmp_path):
    fields = {"cap": 3, "weight": 0.5, "filtered": False, "splits": ("train", "val")}
    (entry,) = read_mixture_file(write_json_rows(tmp_path / "m.json", [{"file": "a.json", "images": "p"} | fields]))
    assert entry == MixtureEntry(file=tmp_path / "a.json", images=tmp_path / "p", **fields)


BAD_MIXTURES = {
    "not JSON": "[{",
    "a number": "3",
    "an object": '{"file": "a.json"}',
    "no entries": "[]",
    "entry not an object": '["a.json"]',
    "no file": "[{}]",
    "file not a text": '[{"file": 5}]',
    "unknown key": '[{"file": "a.json", "wieght": 2}]',
    "cap 0": '[{"file": "a.json", "cap": 0}]',
    "cap 1.5": '[{"file": "a.json", "cap": 1.5}]',
    "weight 0": '[{"file": "a.json", "weight": 0}]',
    "weight NaN": '[{"file": "a.json", "weight": NaN}]',
    "weight infinite": '[{"file": "a.json", "weight": 1e999}]',
    "weight a text": '[{"file": "a.json", "weight": "much"}]',
    "splits a text": '[{"file": "a.json", "splits": "train"}]',
    "second entry": '[{"file": "a.json"}, {"file": "a.json", "cap": -1}]',
}


@pytest.mark.parametrize("content", BAD_MIXTURES.values(), ids=BAD_MIXTURES)
def test_a_bad_mixture_file_is_named(tmp_path, content):
    path = tmp_path / "mixture.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_mixture_file(path)
    assert_one_line(error, path)


def test_missing_files_and_folders_of_a_mixture_are_named(tmp_path, images):
    good = MixtureEntry(file=write_json_rows(tmp_path / "a.json", [llava_row("a.png")]))
    for bad, name in (
        (MixtureEntry(file=tmp_path / "none.json"), "none.json"),
        (MixtureEntry(file=tmp_path), tmp_path),
        (MixtureEntry(file=good.file, images=tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(DataError) as error:
            read_records(good, bad)
        assert_one_line(error, name)
    with read_mixture([good], ReadLog()) as mixture:
        (images / "a.png").unlink()
        with pytest.raises(DataError, match=r"a\.png"):
            mixture[0]
