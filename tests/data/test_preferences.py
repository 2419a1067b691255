"""Pairs of a better and a worse answer, as RLHF-V and RLAIF-V publish them: read whole, kept in pairs, taught by half."""

import itertools
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reverie_jax.data import check as checking
from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.mixture import MixtureEntry, mixture
from reverie_jax.data.preferences import pairs
from reverie_jax.data.sources import ReadLog
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import DataError
from tests.data.fakes import png
from tests.data.test_check import claimed

PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TEXT = pyarrow.string()
ORIGIN = [("origin_dataset", TEXT), ("origin_split", TEXT)]
RLHF_V = pyarrow.schema(
    [("ds_name", TEXT), ("image", PICTURE), ("text", TEXT), *ORIGIN, ("idx", pyarrow.int64()), ("image_path", TEXT)]
)
RLAIF_V = pyarrow.schema(
    [
        *[("ds_name", TEXT), ("image", PICTURE), ("question", TEXT), ("chosen", TEXT), ("rejected", TEXT)],
        *[*ORIGIN, ("idx", TEXT), ("image_path", TEXT)],
    ]
)
LOGPS = RLAIF_V.append(pyarrow.field("logps", TEXT))


def said(number, **changes):
    return {"question": f"Q{number}?", "chosen": f"good {number}", "rejected": f"bad {number}"} | changes


def rlhf(number, picture=None, texts=None, **changes):
    """A row of RLHF-V, its picture in it."""
    row = {
        "ds_name": "RLHF-V",
        "image": {"bytes": png((number % 256, 0, 0)) if picture is None else picture, "path": f"{number}.jpg"},
        "text": json.dumps(said(number) if texts is None else texts),
        "origin_dataset": "LLaVA-Instruct",
        "origin_split": json.dumps({"model": "LLaVA", "type": "question answering"}),
        "idx": number,
        "image_path": f"RLHF-V/{number}.jpg",
    }
    return row | changes


def rlaif(number, picture=None, texts=None, **changes):
    """A row of RLAIF-V: the texts in columns of their own."""
    row = rlhf(number, picture) | (said(number) if texts is None else texts)
    del row["text"]
    return row | {"ds_name": "RLAIF-V", "idx": str(number)} | changes


def filed(row, image="a.png"):
    """The row as JSON has it: its picture is a file."""
    return row | {"image": image, "image_path": image}


def parquet(path, rows, schema=RLHF_V, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, **options)
    return path


def written(path, rows):
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, "utf-8")
    return path


def read(path):
    reading = ReadLog()
    return list(sources.read(path, reading)), reading


def records(*paths, **options):
    with mixture([MixtureEntry(file=path, **options) for path in paths], ReadLog()) as found:
        return list(found)


def spoken(talks):
    return [[turn.text for turn in talk.conversation.turns] for talk in talks]


def wanted(*numbers):
    sides = ("good", "bad")
    return [[f"{IMAGE}\nQ{number}?", f"{side} {number}"] for number in numbers for side in sides]


def by_pair(conversations):
    """The kinds of each pair, in order."""
    found = {}
    for talk in conversations:
        found.setdefault(talk.pair, []).append(talk.kind)
    return found


def one_line(error, *names):
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert str(name) in text


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(png((9, number, 0)))
    return folder


# The published forms.

FORMS = {
    "rlhf-v": (RLHF_V, rlhf),
    "rlaif-v": (RLAIF_V, rlaif),
    "rlaif-v with logps": (LOGPS, lambda number: rlaif(number, logps=json.dumps([-1.5, -0.5, [-1.0], -2.5]))),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_a_chosen_and_a_rejected_conversation_about_its_picture(tmp_path, form):
    schema, row = FORMS[form]
    talks, reading = read(parquet(tmp_path / "a.parquet", [row(number) for number in range(3)], schema))
    assert reading == ReadLog()
    assert spoken(talks) == wanted(0, 1, 2)
    assert [talk.conversation.kind for talk in talks] == ["chosen", "rejected"] * 3
    assert [talk.conversation.images for talk in talks] == [(0,)] * 6
    assert [talk.encoded for talk in talks[::2]] == [png((number, 0, 0)) for number in range(3)]
    assert {talk.conversation.dataset for talk in talks} == {form.split()[0]}
    assert [talk.where for talk in talks[1::2]] == [f"{tmp_path / 'a.parquet'}: row {number}" for number in range(3)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("row", [rlhf, rlaif], ids=["rlhf-v", "rlaif-v"])
def test_json_with_pictures_in_files_says_the_same(tmp_path, pictures, name, row):
    path = written(tmp_path / name, [filed(row(0)), filed(row(1), "b.png"), filed(row(2))])
    talks, reading = read(path)
    assert reading == ReadLog()
    assert spoken(talks) == wanted(0, 1, 2)
    first, second = records(path)
    assert [first.id, second.id] == ["a.png", "b.png"]
    assert [first.image, second.image] == [png((9, 0, 0)), png((9, 1, 0))]
    assert [talk.turns[1].text for talk in first.conversations] == ["good 0", "bad 0", "good 2", "bad 2"]


def test_a_row_may_name_its_picture_in_an_object(tmp_path, pictures):
    row = rlhf(0, image={"bytes": None, "path": "b.png"}, image_path=None)
    (record,) = records(written(tmp_path / "a.json", [row]))
    assert (record.id, record.image) == ("b.png", png((9, 1, 0)))


@pytest.mark.parametrize("options", [{"row_group_size": 1}, {"row_group_size": 17}, {"compression": "none"}], ids=str)
def test_row_groups_and_compression_change_nothing(tmp_path, options):
    rows = [rlhf(number) for number in range(40)]
    plain, _ = read(parquet(tmp_path / "a.parquet", rows))
    other, _ = read(parquet(tmp_path / "b.parquet", rows, **options))
    assert spoken(other) == spoken(plain) == wanted(*range(40))
    assert [talk.encoded for talk in other] == [talk.encoded for talk in plain]


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text.strip() and IMAGE not in text
)


@settings(max_examples=25)
@given(st.lists(st.tuples(words, words, words).filter(lambda t: t[1].strip() != t[2].strip()), min_size=1, max_size=3))
@example([('{"rejected": "x"}', "a\u2028b\n", "  a\\b ")])
def test_no_word_is_changed_on_the_way(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [dict(zip(("question", "chosen", "rejected"), three, strict=True)) for three in texts]
    both = [
        parquet(folder / "rlhf.parquet", [rlhf(number, texts=row) for number, row in enumerate(rows)]),
        parquet(folder / "rlaif.parquet", [rlaif(number, texts=row) for number, row in enumerate(rows)], RLAIF_V),
        written(folder / "rlhf.jsonl", [filed(rlhf(number, texts=row)) for number, row in enumerate(rows)]),
    ]
    for path in both:
        talks, reading = read(path)
        assert reading.problems == []
        assert spoken(talks) == [[f"{IMAGE}\n{q}", side] for q, *sides in texts for side in sides]


def test_a_question_that_shows_its_picture_already_shows_it_once(tmp_path):
    texts = [
        said(0, question=f"{IMAGE}\nQ0?"),
        said(0, question=f"Q0? {IMAGE}"),
        said(0, question=f"{IMAGE}{IMAGE}Q0?"),
    ]
    path = parquet(tmp_path / "a.parquet", [rlhf(number, texts=text) for number, text in enumerate(texts)])
    assert all(question.count(IMAGE) == 1 for question, _ in spoken(read(path)[0]))


# Pairs.


@pytest.mark.parametrize("idx", ["published", "none"])
def test_the_two_sides_of_a_row_share_what_no_other_row_has(tmp_path, idx):
    changes = {} if idx == "published" else {"idx": None}
    talks, _ = read(parquet(tmp_path / "a.parquet", [rlhf(number, png(), **changes) for number in range(5)]))
    found = by_pair(talk.conversation for talk in talks)
    assert list(found.values()) == [["chosen", "rejected"]] * 5
    assert "" not in found
    sides = [[side.turns[1].text for side in pair] for pair in pairs("r", [talk.conversation for talk in talks])]
    assert sides == [[f"good {number}", f"bad {number}"] for number in range(5)]


def test_pairs_of_two_files_stay_apart_in_one_record(tmp_path, pictures):
    one = written(tmp_path / "one.json", [filed(rlhf(0))])
    two = written(tmp_path / "two.json", [filed(rlaif(0, texts=said(7)))])
    (record,) = records(one, two)
    assert len(pairs(record.id, record.conversations)) == 2


def test_identical_pictures_of_several_rows_are_one_record(tmp_path):
    shown = [0, 1, 0, 2, 1, 0]
    path = parquet(tmp_path / "a.parquet", [rlhf(n, png((7, colour, 0))) for n, colour in enumerate(shown)])
    found = records(path)
    assert [record.image for record in found] == [png((7, colour, 0)) for colour in (0, 1, 2)]
    for colour, record in enumerate(found):
        numbers = [n for n, shows in enumerate(shown) if shows == colour]
        assert [[t.text for t in talk.turns] for talk in record.conversations] == wanted(*numbers)
        assert list(by_pair(record.conversations).values()) == [["chosen", "rejected"]] * len(numbers)


def test_different_pictures_of_one_name_are_records_of_their_own(tmp_path):
    rows = [rlhf(n, png((n, 7, 7)), image_path="same.jpg") for n in range(3)]
    found = records(parquet(tmp_path / "a.parquet", rows))
    assert [record.image for record in found] == [png((n, 7, 7)) for n in range(3)]
    assert len({record.id for record in found}) == 3


def test_a_picture_in_two_shards_of_one_dataset_is_one_record(tmp_path):
    one = parquet(tmp_path / "0.parquet", [rlhf(0, png())])
    two = parquet(tmp_path / "1.parquet", [rlhf(1, png())])
    (record,) = records(one, two)
    assert len(record.conversations) == 4


@pytest.mark.parametrize("cap", [2, 4, 6])
def test_a_cap_keeps_or_drops_both_sides_of_a_pair(tmp_path, cap):
    path = parquet(tmp_path / "a.parquet", [rlhf(number, png()) for number in range(10)])
    (record,) = records(path, cap=cap)
    assert 2 * len(pairs(record.id, record.conversations)) == len(record.conversations)


def test_a_cap_keeps_the_same_answers_whatever_the_order_of_rows(tmp_path):
    rows = [rlhf(number, png(), idx=None) for number in range(10)]
    one, other = parquet(tmp_path / "one.parquet", rows), parquet(tmp_path / "other.parquet", rows[::-1])
    (first,), (second,) = records(one, cap=4), records(other, cap=4)
    assert {talk.turns for talk in first.conversations} == {talk.turns for talk in second.conversations}


ARMS = [
    Supervision(*arm, answer_weight=weight)
    for arm in itertools.product(
        ("responses", "positive", "negative", "rationales"),
        ("once", "as-published"),
        ("separate", "positive-first", "negative-first"),
        ("as-written", "bare", "guided-type"),
    )
    for weight in (0.0, 1.0)
]


def test_no_arm_teaches_the_rejected_side(tmp_path):
    rows = [rlhf(0, png()), rlhf(1, png()), rlhf(2, png(), said(2, rejected="good 0"))]
    (record,) = records(parquet(tmp_path / "a.parquet", rows))
    chosen = [talk for talk in record.conversations if talk.kind == "chosen"]
    assert len(chosen) == 3
    for arm in ARMS:
        assert arm(record.conversations) == chosen


# What cannot be used.

BAD = {
    "bad JSON": rlhf(1, text='{"question": "Q?", "chosen": "a", "rejected": '),
    "text no object": rlhf(1, text='["Q?", "a", "b", "rejected"]'),
    "text a number": rlhf(1, text="3"),
    "text empty": rlhf(1, text=""),
    "same answers": rlhf(1, texts=said(1, rejected="good 1")),
    "same answers but for space": rlhf(1, texts=said(1, rejected=" good 1\n")),
    "empty chosen": rlhf(1, texts=said(1, chosen="")),
    "blank rejected": rlhf(1, texts=said(1, rejected=" \n")),
    "blank question": rlhf(1, texts=said(1, question="\t")),
    "no rejected": rlhf(1, texts={"question": "Q?", "chosen": "a"}),
    "null chosen": rlhf(1, texts=said(1, chosen=None)),
    "chosen no text": rlhf(1, texts=said(1, chosen=["a"])),
    "no picture": rlhf(1, image=None, image_path=None),
    "picture without bytes or name": rlhf(1, image={"bytes": None, "path": None}, image_path=None),
    "picture of no bytes": rlhf(1, image={"bytes": b"", "path": ""}, image_path=""),
    "a marker in an answer": rlhf(1, texts=said(1, chosen=f"see {IMAGE}")),
    "a marker in the worse answer": rlhf(1, texts=said(1, rejected=f"see {IMAGE}")),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_broken_row_is_named_and_the_others_are_read(tmp_path, bad):
    path = parquet(tmp_path / "a.parquet", [rlhf(0), bad, rlhf(2), bad])
    talks, reading = read(path)
    assert spoken(talks) == wanted(0, 2)
    assert [where for where, _ in reading.problems] == [f"{path}: row 1", f"{path}: row 3"]
    assert all(why and "\n" not in why for _, why in reading.problems)
    with pytest.raises(DataError) as error:
        records(path)
    one_line(error, f"{path}: row 1", "1 more row")


BAD_COLUMNS = {
    "same answers": rlaif(1, texts=said(1, rejected="good 1")),
    "no chosen": rlaif(1, texts=said(1, chosen=None)),
    "blank rejected": rlaif(1, texts=said(1, rejected="  ")),
    "no question": rlaif(1, texts=said(1, question=None)),
    "no picture": rlaif(1, image=None, image_path=None),
}


@pytest.mark.parametrize("bad", BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_a_broken_row_of_columns_is_named_and_the_others_are_read(tmp_path, bad):
    path = parquet(tmp_path / "a.parquet", [rlaif(0), bad, rlaif(2)], RLAIF_V)
    talks, reading = read(path)
    assert spoken(talks) == wanted(0, 2)
    assert [where for where, _ in reading.problems] == [f"{path}: row 1"]


@pytest.mark.parametrize("text", ['{"question": ', "", None], ids=repr)
def test_a_broken_first_row_does_not_hide_what_the_file_is(tmp_path, text):
    path = parquet(tmp_path / "a.parquet", [rlhf(0, text=text), rlhf(1), rlhf(2)])
    talks, reading = read(path)
    assert spoken(talks) == wanted(1, 2)
    assert [where for where, _ in reading.problems] == [f"{path}: row 0"]


def test_text_nested_too_deep_is_a_broken_row(tmp_path):
    path = written(tmp_path / "a.json", [filed(rlhf(0)), filed(rlhf(1, text="[" * 100_000))])
    talks, reading = read(path)
    assert len(talks) == 2
    assert len(reading.problems) == 1


@pytest.mark.parametrize("bytes_", ["iVBORw0KGgo=", [137, 80, 78, 71]], ids=["base64", "numbers"])
def test_bytes_that_are_no_bytes_are_a_broken_row(tmp_path, pictures, bytes_):
    rows = [filed(rlhf(0)), rlhf(1, image={"bytes": bytes_, "path": "a.png"})]
    with pytest.raises(DataError) as error:
        records(written(tmp_path / "a.json", rows))
    one_line(error, "row 1")


def test_a_picture_in_base64_is_no_file_name(tmp_path, pictures):
    rows = [filed(rlhf(0)), rlhf(1, image="iVBORw0KGgo" * 40, image_path=None)]
    with pytest.raises(DataError) as error:
        records(written(tmp_path / "a.json", rows))
    one_line(error, "pictures")


# Pictures.

HOSTILE = {
    "no picture": b"no picture at all",
    "cut": png(size=(60, 60))[:60],
    "50,000 x 50,000": claimed(50_000, 50_000),
}


@pytest.mark.parametrize("picture", HOSTILE.values(), ids=HOSTILE)
def test_an_embedded_picture_that_cannot_be_opened_is_refused_by_name(tmp_path, picture):
    path = parquet(tmp_path / "a.parquet", [rlhf(0), rlhf(1, picture), rlhf(2)])
    with mixture([MixtureEntry(file=path)], ReadLog()) as found:
        assert found[0].image == png((0, 0, 0))
        with pytest.raises(DataError) as error:
            found[1]
        assert found[2].image == png((2, 0, 0))
    one_line(error, "RLHF-V/1.jpg")
    offenders = checking.check(path, None).offenders
    assert {offender.where for offender in offenders} == {f"{path}: row 1"}
    assert all(offender.fatal for offender in offenders)


def test_an_embedded_picture_that_cannot_be_opened_is_found_again_by_its_file(tmp_path):
    path = parquet(tmp_path / "a.parquet", [rlhf(0), rlhf(1, b"no picture")])
    with pytest.raises(DataError) as error:
        records(path)
    one_line(error, path)


def test_check_opens_every_embedded_picture(tmp_path):
    rows = [rlhf(0, image_path="same.jpg"), rlhf(1, b"no picture", image_path="same.jpg")]
    found = checking.check(parquet(tmp_path / "a.parquet", rows), None)
    assert [offender.where[-5:] for offender in found.offenders if offender.fatal] == ["row 1"] * 2


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "x/../../outside.png"])
def test_a_name_that_leaves_the_folder_is_never_read(tmp_path, pictures, name):
    (tmp_path / "outside.png").write_bytes(png((1, 2, 3)))
    embedded = rlhf(0, png((4, 5, 6)), image_path=name)
    (record,) = records(parquet(tmp_path / "a.parquet", [embedded]))
    assert record.image == png((4, 5, 6))
    bare = rlhf(0, image={"bytes": None, "path": name}, image_path=name)
    with pytest.raises(DataError) as error:
        records(parquet(tmp_path / "b.parquet", [bare]))
    one_line(error, name, "leaves")


# Damaged files.


@pytest.fixture
def whole(tmp_path):
    return parquet(tmp_path / "whole.parquet", [rlhf(number) for number in range(6)], row_group_size=2)


def test_a_truncated_file_is_one_line_that_names_it(tmp_path, whole):
    content, path = whole.read_bytes(), tmp_path / "cut.parquet"
    for size in range(0, len(content), 199):
        path.write_bytes(content[:size])
        with pytest.raises(DataError) as error:
            read(path)
        one_line(error, path)


def test_a_truncated_file_is_not_called_json(tmp_path, whole):
    path = tmp_path / "cut.parquet"
    path.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(DataError) as error:
        read(path)
    assert "JSON" not in str(error.value)
    assert str(error.value).count(str(path)) == 1


def scratched(whole, path, offset):
    content = bytearray(whole.read_bytes())
    content[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(content)
    return path


def test_a_scratched_file_is_read_or_named(tmp_path, whole):
    for offset in range(0, whole.stat().st_size - 4, 41):
        path = scratched(whole, tmp_path / "scratched.parquet", offset)
        told = str(path)
        try:
            read(path)
        except DataError as error:
            told = str(error)
        assert str(path) in told


def test_a_scratched_file_is_one_line(tmp_path, whole):
    path = scratched(whole, tmp_path / "scratched.parquet", 4)
    with pytest.raises(DataError) as error:
        read(path)
    one_line(error, path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b'[{"chosen": 1}]'], ids=repr)
def test_what_is_no_parquet_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    one_line(error, path)


def test_a_file_without_rows_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        read(parquet(tmp_path / "a.parquet", []))
    one_line(error, tmp_path / "a.parquet")


def test_finding_the_form_does_not_hold_the_pictures(tmp_path):
    rows = [rlhf(number, bytes([number]) * 100_000) for number in range(200)]
    path = parquet(tmp_path / "a.parquet", rows, row_group_size=10)
    del rows
    tracemalloc.start()
    try:
        next(sources.read(path, ReadLog()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000
