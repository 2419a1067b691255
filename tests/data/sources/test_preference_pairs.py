"""Preference pairs in the formats of RLHF-V and RLAIF-V: nothing changed on the way, pairs kept, broken rows named."""

import contextlib
import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reverie_jax.data import sources
from reverie_jax.data.check import check
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.preferences import find_pairs
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import DataError
from tests.data.fakes import (
    kinds,
    png,
    problem_rows,
    read_examples,
    read_records,
    texts,
    write_json_rows,
    write_parquet,
)


def pair_texts(number, **changes):
    return {"question": f"Q{number}?", "chosen": f"good {number}", "rejected": f"bad {number}"} | changes


def rlhf(number, stored=None, values=None, **changes):
    """A row of RLHF-V with its image."""
    row = {
        "ds_name": "RLHF-V",
        "image": {"bytes": png((number % 256, 0, 0)) if stored is None else stored, "path": f"{number}.jpg"},
        "text": json.dumps(pair_texts(number) if values is None else values),
        "origin_dataset": "LLaVA-Instruct",
        "origin_split": json.dumps({"model": "LLaVA", "type": "question answering"}),
        "idx": number,
        "image_path": f"RLHF-V/{number}.jpg",
    }
    return row | changes


def rlaif(number, stored=None, values=None, **changes):
    """A row of RLAIF-V: the texts in columns of their own."""
    row = rlhf(number, stored) | (pair_texts(number) if values is None else values)
    del row["text"]
    return row | {"ds_name": "RLAIF-V", "idx": str(number)} | changes


def with_file(row, name="a.png"):
    """The row as JSON has it: its image is a file."""
    return row | {"image": name, "image_path": name}


def expected(*numbers):
    return [[f"{IMAGE}\nQ{number}?", f"{side} {number}"] for number in numbers for side in ("good", "bad")]


def error_of(function, *args):
    """The message of a DataError: one line."""
    with pytest.raises(DataError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(png((9, number, 0)))
    return folder


# Formats.

FORMATS = {
    "rlhf-v": (rlhf, {}, {}),
    "rlaif-v": (rlaif, {}, {"row_group_size": 2, "compression": "none"}),
    "rlaif-v with logps": (rlaif, {"logps": "[-1.5, [-1.0], -2.5]"}, {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_row_is_a_chosen_and_a_rejected_conversation_about_its_image(tmp_path, name):
    row, changes, options = FORMATS[name]
    path = write_parquet(tmp_path / "a.parquet", [row(number, **changes) for number in range(3)], **options)
    examples, log = read_examples(path)
    assert log == ReadLog()
    assert texts(examples) == expected(0, 1, 2)
    assert kinds(examples) == ["chosen", "rejected"] * 3
    assert [one.conversation.images for one in examples] == [(0,)] * 6
    assert [one.encoded for one in examples[::2]] == [png((number, 0, 0)) for number in range(3)]
    assert {one.conversation.dataset for one in examples} == {name.split()[0]}
    assert [one.where for one in examples[1::2]] == [f"{path}: row {number}" for number in range(3)]


@pytest.mark.parametrize(("name", "row"), [("a.json", rlhf), ("a.jsonl", rlaif)], ids=["rlhf-v", "rlaif-v"])
def test_json_rows_name_their_images(tmp_path, images, name, row):
    named_in_object = row(2, image={"bytes": None, "path": "a.png"}, image_path=None)
    path = write_json_rows(tmp_path / name, [with_file(row(0)), with_file(row(1), "b.png"), named_in_object])
    assert read_examples(path)[1] == ReadLog()
    first, second = read_records(path)
    assert [first.id, second.id] == ["a.png", "b.png"]
    assert [first.image, second.image] == [png((9, 0, 0)), png((9, 1, 0))]
    assert [[turn.text for turn in one.turns] for one in first.conversations] == expected(0, 2)


def said(role, *parts):
    """A message whose content is a list of parts, as Parquet has them."""
    return {"role": role, "content": [{"type": kind, "text": text, "index": None} for kind, text in parts]}


def trl(number, stored=None, **changes):
    """A row of TRL's conversations, with its image."""
    row = rlaif(number, stored)
    prompt = [said("user", ("image", None), ("text", row["question"]))]
    sides = {side: [said("assistant", ("text", row[side]))] for side in ("chosen", "rejected")}
    return {"images": [row["image"]], "prompt": prompt} | sides | changes


def plain(number):
    """Texts in TRL's columns."""
    row = rlaif(number)
    return {"prompt": row.pop("question")} | {name: row[name] for name in ("image", "chosen", "rejected")}


def listed(number):
    """Texts in TRL's columns, the image in a list."""
    row = plain(number)
    return row | {"images": [row["image"]], "image": None}


def factory(number):
    """As LLaMA-Factory writes pairs."""
    row = rlaif(number)
    sides = {side: {"from": "gpt", "value": row[side]} for side in ("chosen", "rejected")}
    turns = [{"from": "human", "value": f"{IMAGE}\n{row['question']}"}]
    return {"conversations": turns, "images": [row["image"]]} | sides


def inside(number):
    """The prompt in both sides."""
    row = trl(number)
    return row | {"prompt": None} | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def test_pairs_as_trl_has_them(tmp_path):
    for make in (trl, plain, listed, factory, inside):
        examples, log = read_examples(write_parquet(tmp_path / "a.parquet", [make(number) for number in range(3)]))
        assert log == ReadLog()
        assert texts(examples) == expected(0, 1, 2)
        assert kinds(examples) == ["chosen", "rejected"] * 3
        assert [one.encoded for one in examples[::2]] == [png((number, 0, 0)) for number in range(3)]


@pytest.mark.parametrize("shown", [0, 2])
def test_only_the_last_answer_of_a_longer_conversation_is_supervised(tmp_path, shown):
    """The image stays at the question that shows it; answers of the prompt are context."""
    prompt = [said("user", ("text", "A?")), said("assistant", ("text", "B")), said("user", ("text", "C?"))]
    prompt[shown]["content"].insert(0, {"type": "image", "text": None, "index": None})
    rows = [trl(0, prompt=prompt), trl(0, prompt=[*prompt[:2], said("user", ("text", "D?"))])]
    examples, log = read_examples(write_parquet(tmp_path / "a.parquet", rows[:1]))
    assert log == ReadLog()
    questions = [f"{IMAGE}\nA?", "C?"] if shown == 0 else ["A?", f"{IMAGE}\nC?"]
    for one, answer in zip(examples, ("good 0", "bad 0"), strict=True):
        turns = one.conversation.turns
        assert [turn.text for turn in turns] == [questions[0], "B", questions[1], answer]
        assert [turn.weight for turn in turns if turn.role == "assistant"] == [0, 1]
    (pair,) = find_pairs("r", [one.conversation for one in examples])
    assert pair[0].turns[:-1] == pair[1].turns[:-1]
    longer = read_examples(write_parquet(tmp_path / "b.parquet", rows))[0]
    assert len({one.conversation.pair for one in longer}) == 2


def test_system_turns_of_pairs_are_noted(tmp_path):
    rows = [trl(n, prompt=[said("system", ("text", "Be brief.")), *trl(n)["prompt"]]) for n in range(2)]
    examples, log = read_examples(write_parquet(tmp_path / "a.parquet", rows))
    assert [text for text, _ in texts(examples)[::2]] == [f"Be brief.\n\n{IMAGE}\nQ{number}?" for number in range(2)]
    assert [" 2 rows" in note for note in log.notes] == [True]


def test_answers_may_be_numbers(tmp_path):
    path = write_json_rows(tmp_path / "a.json", [with_file(rlaif(0, values=pair_texts(0, chosen=3, rejected=4.5)))])
    assert [text for _, text in texts(read_examples(path)[0])] == ["3", "4.5"]


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text.strip() and IMAGE not in text
)


@settings(max_examples=15)
@given(st.lists(st.tuples(words, words, words).filter(lambda t: t[1].strip() != t[2].strip()), min_size=1, max_size=3))
@example([('{"rejected": "x"}', "a\u2028b\n", "  a\\b ")])
def test_no_text_is_changed_on_the_way(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [dict(zip(("question", "chosen", "rejected"), values, strict=True)) for values in drawn]
    one, other = ([row(number, values=one) for number, one in enumerate(rows)] for row in (rlhf, rlaif))
    for path in (
        write_parquet(folder / "rlhf.parquet", one),
        write_parquet(folder / "rlaif.parquet", other),
        write_json_rows(folder / "rlhf.jsonl", list(map(with_file, one))),
    ):
        examples, log = read_examples(path)
        assert log.problems == []
        assert texts(examples) == [
            [f"{IMAGE}\n{question}", answer] for question, *answers in drawn for answer in answers
        ]


@pytest.mark.parametrize("question", [f"{IMAGE}\nQ0?", f"Q0? {IMAGE}", f"{IMAGE}{IMAGE}Q0?"])
def test_a_question_that_has_markers_shows_its_image_once(tmp_path, question):
    path = write_parquet(tmp_path / "a.parquet", [rlhf(0, values=pair_texts(0, question=question))])
    assert [text.count(IMAGE) for text, _ in texts(read_examples(path)[0])] == [1, 1]


# Pairs.


@pytest.mark.parametrize("changes", [{}, {"idx": None}], ids=["idx", "no idx"])
def test_the_sides_of_a_row_have_a_pair_of_their_own(tmp_path, changes):
    path = write_parquet(tmp_path / "a.parquet", [rlhf(number, png(), **changes) for number in range(5)])
    conversations = [one.conversation for one in read_examples(path)[0]]
    assert len({one.pair for one in conversations} - {""}) == 5
    assert [side.turns[1].text for pair in find_pairs("r", conversations) for side in pair] == [
        f"{side} {number}" for number in range(5) for side in ("good", "bad")
    ]


def test_rows_of_one_image_are_one_record_in_a_file_and_over_files(tmp_path, images):
    shown = [0, 1, 0, 2, 1, 0]
    path = write_parquet(tmp_path / "a.parquet", [rlhf(n, png((7, color, 0))) for n, color in enumerate(shown)])
    records = read_records(path)
    assert [record.image for record in records] == [png((7, color, 0)) for color in (0, 1, 2)]
    for color, record in enumerate(records):
        numbers = [number for number, other in enumerate(shown) if other == color]
        assert [[turn.text for turn in one.turns] for one in record.conversations] == expected(*numbers)
    shards = [write_parquet(tmp_path / f"{number}.parquet", [rlhf(number, png())]) for number in range(2)]
    named = (
        write_json_rows(tmp_path / "1.json", [with_file(rlhf(0))]),
        write_json_rows(tmp_path / "2.json", [with_file(rlaif(7))]),
    )
    for paths in (shards, named):
        (record,) = read_records(*paths)
        assert len(find_pairs(record.id, record.conversations)) == 2


def test_different_images_of_one_name_are_records_of_their_own(tmp_path):
    rows = [rlhf(number, png((number, 7, 7)), image_path="same.jpg") for number in range(3)]
    records = read_records(write_parquet(tmp_path / "a.parquet", rows))
    assert [record.image for record in records] == [png((number, 7, 7)) for number in range(3)]
    assert len({record.id for record in records}) == 3


@pytest.mark.parametrize("cap", [2, 4, 6])
def test_a_cap_keeps_or_drops_both_sides_whatever_the_order_of_rows(tmp_path, cap):
    rows = [rlhf(number, png(), idx=None) for number in range(10)]
    (one,) = read_records(MixtureEntry(file=write_parquet(tmp_path / "one.parquet", rows), cap=cap))
    (other,) = read_records(MixtureEntry(file=write_parquet(tmp_path / "other.parquet", rows[::-1]), cap=cap))
    assert 2 * len(find_pairs(one.id, one.conversations)) == len(one.conversations)
    assert {talk.turns for talk in one.conversations} == {talk.turns for talk in other.conversations}


# Broken rows.

NO_IMAGE = {"image": None, "image_path": None}
BROKEN = {
    "cut JSON": rlhf(1, text='{"question": "Q?", "chosen": "a", "rejected": '),
    "a list": rlhf(1, text='["Q?", "a", "b", "rejected"]'),
    "a number": rlhf(1, text="3"),
    "no text": rlhf(1, text=""),
    "nested too deep": rlhf(1, text='"rejected"'.rjust(100_000, "[")),
    "equal but for space": rlhf(1, values=pair_texts(1, rejected=" good 1\n")),
    "empty chosen": rlhf(1, values=pair_texts(1, chosen="")),
    "blank rejected": rlhf(1, values=pair_texts(1, rejected=" \n")),
    "blank question": rlhf(1, values=pair_texts(1, question="\t")),
    "no rejected": rlhf(1, values={"question": "Q?", "chosen": "a"}),
    "chosen is null": rlhf(1, values=pair_texts(1, chosen=None)),
    "chosen is a list": rlhf(1, values=pair_texts(1, chosen=["a"])),
    "no image": rlhf(1, **NO_IMAGE),
    "image without bytes or name": rlhf(1, image={"bytes": None, "path": None}, image_path=None),
    "image of no bytes": rlhf(1, image={"bytes": b"", "path": ""}, image_path=""),
    "marker in chosen": rlhf(1, values=pair_texts(1, chosen=f"see {IMAGE}")),
    "marker in rejected": rlhf(1, values=pair_texts(1, rejected=f"see {IMAGE}")),
    "columns: equal": rlaif(1, values=pair_texts(1, rejected="good 1")),
    "columns: no chosen": rlaif(1, values=pair_texts(1, chosen=None)),
    "columns: blank rejected": rlaif(1, values=pair_texts(1, rejected="  ")),
    "columns: no question": rlaif(1, values=pair_texts(1, question=None)),
    "columns: no image": rlaif(1, **NO_IMAGE),
    "trl: no image": trl(1, images=[]),
    "trl: prompt begins with an answer": trl(1, prompt=[said("assistant", ("text", "B")), *trl(1)["prompt"]]),
    "trl: no last answer": trl(1, rejected=[*trl(1)["rejected"], said("user", ("text", "C?"))]),
    "trl: different answers before": inside(1)
    | {
        side: [*trl(1)["prompt"], said("assistant", ("text", side)), said("user", ("text", "C?")), *trl(1)[side]]
        for side in ("chosen", "rejected")
    },
    "trl: no answer": trl(1, chosen=[]),
    "trl: no prompt": trl(1, prompt=None),
    "trl: other questions": inside(1) | {"chosen": inside(2)["chosen"]},
    "trl: equal": trl(1, chosen=trl(1)["rejected"]),
}


@pytest.mark.parametrize(("row", "kind"), [(rlhf, ""), (rlaif, "columns"), (trl, "trl")])
def test_broken_rows_are_named_and_the_others_are_read(tmp_path, row, kind):
    broken = {name: one for name, one in BROKEN.items() if name.rpartition(":")[0] == kind}
    path = write_parquet(tmp_path / "a.parquet", [row(0), *broken.values(), row(2)])
    examples, log = read_examples(path)
    assert texts(examples) == expected(0, 2)
    assert problem_rows(log) == [str(number + 1) for number in range(len(broken))]
    assert f"{path}: row 1" in error_of(read_records, path)


@pytest.mark.parametrize("text", ['{"question": ', "", None], ids=repr)
def test_a_broken_first_row_does_not_hide_the_format(tmp_path, text):
    path = write_parquet(tmp_path / "a.parquet", [rlhf(0, text=text), rlhf(1), rlhf(2)])
    examples, log = read_examples(path)
    assert texts(examples) == expected(1, 2)
    assert problem_rows(log) == ["0"]


# Images.


@pytest.mark.parametrize("content", [b"not an image", png(size=(60, 60))[:60]], ids=["text", "cut"])
def test_a_stored_image_that_cannot_be_decoded_is_named(tmp_path, content):
    rows = [rlhf(0), rlhf(1, content, image_path="RLHF-V/0.jpg"), rlhf(2)]  # it has the name of another
    path = write_parquet(tmp_path / "a.parquet", rows)
    with read_mixture([MixtureEntry(file=path)], ReadLog()) as mixture:
        assert mixture[0].image == png((0, 0, 0))
        message = error_of(lambda: mixture[1])
        assert mixture[2].image == png((2, 0, 0))
    assert str(path) in message
    assert [one.where for one in check(path, None).problems if one.fatal] == [f"{path}: row 1"] * 2


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "x/../../outside.png"])
def test_an_image_name_outside_the_folder_is_never_read(tmp_path, images, name):
    (tmp_path / "outside.png").write_bytes(png((1, 2, 3)))
    (record,) = read_records(write_parquet(tmp_path / "a.parquet", [rlhf(0, png((4, 5, 6)), image_path=name)]))
    assert record.image == png((4, 5, 6))
    bare = rlhf(0, image={"bytes": None, "path": name}, image_path=name)
    assert name in error_of(read_records, write_parquet(tmp_path / "b.parquet", [bare]))


# Damaged files.


def test_damaged_files_are_errors_that_name_them(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", [rlhf(number) for number in range(6)], row_group_size=2)
    content, path = whole.read_bytes(), tmp_path / "damaged.parquet"
    cut = [content[:size] for size in range(0, len(content), 397)]
    first_page = content[:4] + b"\xff" * 4 + content[8:]
    for damaged in (*cut, b"PAR1", b"PAR1PAR1", b'[{"chosen": 1}]', first_page):
        path.write_bytes(damaged)
        message = error_of(read_examples, path)
        assert message.count(str(path)) == 1
        assert "JSON" not in message
    for offset in range(0, len(content) - 4, 83):
        path.write_bytes(content[:offset] + b"\xff" * 4 + content[offset + 4 :])
        with contextlib.suppress(DataError):  # another error, or one that is not caught, fails the test
            read_examples(path)


def test_reading_does_not_hold_all_images_in_memory(tmp_path):
    rows = [rlhf(number, bytes([number]) * 100_000) for number in range(200)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=10)
    del rows
    tracemalloc.start()
    try:
        next(sources.read(path, ReadLog()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000
