"""Files as streams of rows, judged rows, and several files as one set of records: nothing is lost, doubled or made up."""

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie_jax.data import check as checking
from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import MAX_PIXELS
from reverie_jax.data.mixture import Mixture, MixtureEntry, mixture, read_parts
from reverie_jax.data.sources import Example, Pictures, ReadLog, Rows, llava
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder
from reverie_jax.data.tree import build_tree
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import IMAGE_ID, Given, WordTokenizer, png
from tests.data.test_check import claimed

NAMES = ("a.png", "b.png", "c.png")


def row(image, *texts, **more):
    """A row of LLaVA's; without a picture where `image` is None."""
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts or ("Q?", "A."))]
    return {"id": 1, "conversations": said} | ({} if image is None else {"image": image}) | more


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, "utf-8")
    return path


def read(path, **options):
    reading = ReadLog()
    return list(sources.read(path, reading, **options)), reading


def records(*parts, **options):
    made = [part if isinstance(part, MixtureEntry) else MixtureEntry(file=part) for part in parts]
    with mixture(made, ReadLog(), **options) as found:
        return list(found)


def one_line(error, *names):
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert str(name) in text


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(png((number, 0, 0)))
    return folder


@pytest.fixture
def small_memory():
    """Runs Python code in a process of its own that is given so little memory."""
    preexec = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"

    def run(code, *words):
        done = [sys.executable, "-c", preexec + code, *map(str, words)]
        return subprocess.run(done, capture_output=True, text=True, timeout=60, check=False)

    return run


# Rows.

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
rows_of_any_kind = st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@given(rows=rows_of_any_kind, plain=st.booleans(), indent=st.sampled_from([None, 2]))
def test_rows_are_what_was_written_each_time(tmp_path_factory, name, rows, plain, indent):
    path = tmp_path_factory.mktemp("rows") / name
    if name == "a.json":
        text = json.dumps(rows, ensure_ascii=plain, indent=indent)
    else:
        text = "\n\n".join(json.dumps(one, ensure_ascii=plain) for one in rows) + "\n"
    path.write_bytes(text.encode("utf-8"))
    found = Rows(path)
    assert list(found) == rows
    assert list(found) == rows
    assert [one for pair in zip(found, found, strict=True) for one in pair] == [one for one in rows for _ in range(2)]


@given(rows=st.dictionaries(texts.filter(bool), st.dictionaries(texts, values, max_size=3), min_size=1, max_size=4))
def test_an_object_of_rows_gives_each_its_id(tmp_path_factory, rows):
    path = written(tmp_path_factory.mktemp("rows") / "a.json", rows)
    for _ in range(2):
        assert list(Rows(path)) == [{"pid": key} | one for key, one in rows.items()]


def test_parquet_gives_its_rows_each_time(tmp_path):
    rows = [{"a": number, "b": [{"c": b"\0\xff", "d": None}], "e": "茶\n"} for number in range(100)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    found = Rows(tmp_path / "a.parquet")
    assert list(found) == rows == list(found)
    assert list(itertools.islice(found, 3)) == rows[:3]


@pytest.mark.parametrize("content", [b'  \n\t[{"a": 1}]', b'\r\n{"7": {"a": 1}}\n', b'[\n{"a": 1}\n]\n\n'], ids=repr)
def test_white_space_around_rows_does_not_matter(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    (found,) = Rows(tmp_path / "a.json")
    assert found["a"] == 1


def test_much_white_space_before_an_object_of_rows_does_not_matter(tmp_path):
    (tmp_path / "a.json").write_text(" " * 100 + '{"7": {"a": 1}}')
    assert list(Rows(tmp_path / "a.json")) == [{"pid": "7", "a": 1}]


GOOD = json.dumps(row("a.png"))
BROKEN = {
    "truncated list": ("a.json", f'[{GOOD}, {{"id": 2, "conv'),
    "list without an end": ("a.json", f"[{GOOD},"),
    "garbage behind a list": ("a.json", f"[{GOOD}] garbage"),
    "two lists": ("a.json", f"[{GOOD}][{GOOD}]"),
    "a comma too many": ("a.json", f"[{GOOD},]"),
    "NaN": ("a.json", '[{"a": NaN}]'),
    "a control character": ("a.json", '[{"a": "\x01"}]'),
    "an unknown escape": ("a.json", '[{"a": "\\x"}]'),
    "empty": ("a.json", ""),
    "white": ("a.json", " \n"),
    "a number": ("a.json", "3"),
    "a text": ("a.json", '"rows"'),
    "null": ("a.json", "null"),
    "an empty list": ("a.json", "[]"),
    "an empty object": ("a.json", "{}"),
    "an object of texts": ("a.json", '{"a": "b"}'),
    "a single row": ("a.json", GOOD),
    "truncated object": ("a.json", f'{{"1": {GOOD}, "2": {{"id"'),
    "garbage behind an object": ("a.json", f'{{"1": {GOOD}}} garbage'),
    "truncated line": ("a.jsonl", f'{GOOD}\n{{"id": 2, "conv'),
    "garbage in a line": ("a.jsonl", f"{GOOD}\n{GOOD} garbage\n"),
    "a list of lines": ("a.jsonl", f"[{GOOD},\n{GOOD}]"),
    "no lines": ("a.jsonl", "\n \n"),
    "deep lines": ("a.jsonl", "[" * 100_000 + "]" * 100_000),
    "not UTF-8": ("a.json", b'[{"a": "\xff"}]'),
    "lines not UTF-8": ("a.jsonl", b'{"a": "\xff"}\n'),
    "UTF-16": ("a.json", f"[{GOOD}]".encode("utf-16")),
    "lines in UTF-16": ("a.jsonl", GOOD.encode("utf-16")),
    "a picture": ("a.json", png()),
    "lines of a picture": ("a.jsonl", png()),
}


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_rows_is_one_line_that_names_it(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        list(Rows(path))
    one_line(error, path)


@settings(max_examples=25)
@given(st.data())
def test_every_beginning_of_a_file_is_refused(tmp_path_factory, data):
    whole = data.draw(st.sampled_from([[row("a.png")] * 2, {"1": row("a.png"), "2": row("b.png")}]))
    text = json.dumps(whole)
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(DataError) as error:
        list(Rows(path))
    one_line(error, path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_json_has_not_is_refused_in_lines_too(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": {value}}}\n')
    with pytest.raises(DataError) as error:
        list(Rows(path))
    one_line(error, path)


def test_rows_may_nest_as_deep_as_anyone_writes_them(tmp_path):
    (tmp_path / "a.json").write_text(f'[{{"a": {"[" * 500}{"]" * 500}}}]')
    assert len(list(Rows(tmp_path / "a.json"))) == 1


@pytest.mark.parametrize("form", ['[{"a": %s}]', '{"1": {"a": %s}}'])
def test_deep_nesting_is_refused_before_it_fills_the_memory(tmp_path, small_memory, form):
    path = tmp_path / "a.json"
    path.write_text(form % ("[" * 30_000 + "]" * 30_000))
    code = """
import sys, pathlib
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError
try:
    list(Rows(pathlib.Path(sys.argv[1])))
except DataError as error:
    print(error)
"""
    done = small_memory(code, path)
    assert done.returncode == 0, done.stderr[-300:]
    assert str(path) in done.stdout


def test_no_row_of_an_object_is_lost_in_silence(tmp_path):
    (tmp_path / "a.json").write_text('{"1": {"a": 1}, "2": 5, "3": {"a": 3}}')
    assert list(Rows(tmp_path / "a.json")) == [{"pid": "1", "a": 1}, 5, {"pid": "3", "a": 3}]
    (tmp_path / "a.json").write_text('{"1": {"a": 1}, "2": 5} garbage')
    with pytest.raises(DataError):
        list(Rows(tmp_path / "a.json"))


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n" * 41 + '{"id": 1,,}\n')
    with pytest.raises(DataError, match=r"\b(line|row) 4[12]\b"):
        list(Rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", ["{}", '{"a": "b"}'])
def test_an_error_names_its_file_once(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError) as error:
        list(Rows(tmp_path / "a.json"))
    assert str(error.value).count(str(tmp_path)) == 1


def test_a_turn_nested_deep_is_a_broken_row():
    nested, reading = [], ReadLog()
    for _ in range(200_000):
        nested = [nested]
    talks = list(llava.talks(Given([row("a.png"), {"conversations": [nested, 3]}]), reading))
    assert (len(talks), [where for where, _ in reading.problems]) == (1, ["f: row 1"])


# Judged rows.


def judged(number=0, **changes):
    """A row of the third stage."""
    return {
        "image": "a.png",
        "question": "Is it day?",
        "correct_answer": "Yes",
        "confusing_answer": f"No {number}",
        "correct_rationale": "The sun shines.",
        "incorrect_rationale": f"No lamp is lit {number}.",
        "gemini_pro_judge": "no",
    } | changes


def kinds(talks):
    return [talk.conversation.kind for talk in talks]


def test_a_judged_row_is_a_positive_and_a_negative_conversation(tmp_path):
    talks, reading = read(written(tmp_path / "a.json", [judged()]))
    assert reading == ReadLog()
    assert kinds(talks) == ["positive", "negative"]
    positive, negative = ([turn.text for turn in talk.conversation.turns] for talk in talks)
    assert positive[:2] == negative[:2] == [f"{IMAGE}\nIs it day?", "Yes"]
    assert "No 0" in negative[2]
    assert (positive[3], negative[3]) == ("The sun shines.", "No lamp is lit 0.")


@pytest.mark.parametrize("verdict", ["no", "No", "NO", " no", "no\n"])
def test_the_judge_keeps_what_it_finds_no_contradiction_in(tmp_path, verdict):
    talks, reading = read(written(tmp_path / "a.json", [judged(gemini_pro_judge=verdict)]))
    assert (len(talks), reading.notes) == (2, [])


@pytest.mark.parametrize(
    "verdict", ["yes", "Yes", "", "None", "Not sure", "nothing", "maybe", None, False, 0, [], ["no"]], ids=repr
)
def test_any_other_verdict_drops_a_row_and_is_counted(tmp_path, verdict):
    path = written(tmp_path / "a.json", [judged(1), judged(2, gemini_pro_judge=verdict), judged(3)])
    talks, reading = read(path)
    assert kinds(talks) == ["positive", "negative", "negative"]
    assert reading.problems == []
    assert reading.notes == [f"{path}: 1 rows without the judge's consent are left out"]
    assert kinds(read(path, filtered=False)[0]) == ["positive", *["negative"] * 3]


def test_rows_that_nobody_judged_are_left_out_unless_all_are_wanted(tmp_path, pictures):
    unjudged = {key: value for key, value in judged().items() if key != "gemini_pro_judge"}
    path = written(tmp_path / "a.json", [unjudged, judged(1)])
    assert [talk.turns[3].text for talk in records(path)[0].conversations] == ["The sun shines.", "No lamp is lit 1."]
    (record,) = records(MixtureEntry(file=path, filtered=False))
    assert [talk.kind for talk in record.conversations] == ["positive", "negative", "negative"]


def test_a_positive_conversation_comes_once_for_each_question(tmp_path):
    rows = [judged(0), judged(1), judged(2, question="Why?"), judged(3), judged(4, image="b.png")]
    talks, _ = read(written(tmp_path / "a.json", rows))
    said = [(talk.image, talk.conversation.turns[0].text[8:]) for talk in talks if talk.conversation.kind == "positive"]
    assert said == [("a.png", "Is it day?"), ("a.png", "Why?"), ("b.png", "Is it day?")]
    assert kinds(talks).count("negative") == 5


@pytest.mark.parametrize("lacking", ["image", "question", "correct_answer", "confusing_answer", "incorrect_rationale"])
@pytest.mark.parametrize("value", [None, 3, ["a"]], ids=repr)
def test_a_judged_row_that_lacks_a_text_is_named(tmp_path, lacking, value):
    path = written(tmp_path / "a.json", [judged(), judged(1, **{lacking: value}), judged(2)])
    talks, reading = read(path)
    assert kinds(talks) == ["positive", "negative", "negative"]
    assert [where for where, _ in reading.problems] == [f"{path}: row 1"]
    assert lacking in reading.problems[0][1]


@pytest.mark.parametrize("lacking", ["image", "question", "correct_answer", "correct_rationale", "incorrect_rationale"])
def test_a_judged_row_with_an_empty_text_is_named(tmp_path, lacking):
    path = written(tmp_path / "a.json", [judged(), judged(1, **{lacking: " "})])
    _, reading = read(path)
    assert [where for where, _ in reading.problems] == [f"{path}: row 1"]


@pytest.mark.parametrize("where", ["question", "correct_answer", "correct_rationale", "incorrect_rationale"])
def test_a_marker_in_a_judged_row_is_named(tmp_path, where):
    path = written(tmp_path / "a.json", [judged(), judged(1, **{where: f"see {IMAGE}"})])
    _, reading = read(path)
    assert [place for place, _ in reading.problems] == [f"{path}: row 1"]


@pytest.mark.parametrize("image_id", [None, ["7"], {"id": 7}], ids=repr)
def test_an_lrv_row_without_a_name_is_named(tmp_path, image_id):
    rows = [{"image_id": 7, "question": "Q?", "answer": "A.", "task": "t"}]
    path = written(tmp_path / "a.json", [*rows, rows[0] | {"image_id": image_id}])
    _, reading = read(path)
    assert [place for place, _ in reading.problems] == [f"{path}: row 1"]


# One record a picture.


def said(question, answer, image, **more):
    shows = f"{IMAGE}\n{question}" if image else question
    return Conversation((Turn("user", shows), Turn("assistant", answer)), (0,) if image else (), **more)


def talk(number, image, place=0, encoded=b""):
    return Example(image, said(f"Q{number}?", f"A{number}.", image), f"f{place}: row {number}", encoded)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(png((number, 0, 0)))
    return folder


shown = st.lists(st.lists(st.sampled_from(["", *NAMES]), max_size=6), min_size=1, max_size=3)


def made(files, embedded=False):
    count = itertools.count()
    return [
        [
            talk(next(count), image, place, png((NAMES.index(image), 0, 0)) if embedded and image else b"")
            for image in images
        ]
        for place, images in enumerate(files)
    ]


@given(files=shown)
def test_a_record_is_a_picture_with_all_its_talk_in_order(shared, files):
    talks = made(files)
    flat = [one for file in talks for one in file]
    order = list(dict.fromkeys(one.image for one in flat if one.image))
    with Mixture([(file, Pictures(shared), None, 1.0) for file in talks]) as found:
        got = list(found)
        assert len(found) == len(got)
        assert found.conversations == len(flat)
        assert [(image, one) for image, one in found.talks()] == [(one.image, one.conversation) for one in flat]
    assert [record.id for record in got if record.image] == order
    assert [record.image for record in got if record.image] == [png((NAMES.index(image), 0, 0)) for image in order]
    for record in got:
        wanted = [one for one in flat if one.image == record.id] or [one for one in flat if one.where == record.id]
        assert list(record.conversations) == [one.conversation for one in wanted]
    text = [record for record in got if not record.image]
    assert [record.id for record in text] == [one.where for one in flat if not one.image]
    assert got == sorted(got, key=lambda record: not record.image)


@given(images=st.lists(st.sampled_from(["", *NAMES]), min_size=1, max_size=8))
def test_embedded_pictures_of_a_file_are_records_by_content(images):
    (talks,) = made([images], embedded=True)
    with Mixture([(talks, None, None, 1.0)]) as found:
        got = [record for record in found if record.image]
    order = list(dict.fromkeys(image for image in images if image))
    assert [record.image for record in got] == [png((NAMES.index(image), 0, 0)) for image in order]
    assert [len(record.conversations) for record in got] == [images.count(image) for image in order]


def test_one_file_of_a_picture_under_two_names_is_one_record(tmp_path, pictures):
    (pictures / "deep").mkdir()
    (pictures / "deep" / "d.png").write_bytes(png())
    (record,) = records(written(tmp_path / "a.json", [row("deep/d.png"), row("d.png"), row("other/d.png")]))
    assert (record.id, len(record.conversations)) == ("deep/d.png", 3)


def test_one_name_in_two_folders_is_two_pictures(tmp_path, pictures):
    other = tmp_path / "others"
    other.mkdir()
    (other / "a.png").write_bytes(png((9, 9, 9)))
    one, two = written(tmp_path / "1.json", [row("a.png")]), written(tmp_path / "2.json", [row("a.png"), row("a.png")])
    found = records(one, MixtureEntry(file=two, pictures=other))
    assert [(record.image, len(record.conversations)) for record in found] == [(png((0, 0, 0)), 1), (png((9, 9, 9)), 2)]
    assert len({record.id for record in found}) == 2


def test_rows_of_text_alone_are_records_of_their_own(tmp_path):
    path = written(tmp_path / "a.json", [row(None, "Two and two?", "Four."), row(None, "Two and two?", "Four.")])
    found = records(path)
    assert [(record.id, record.image) for record in found] == [(f"{path}: row {n}", b"") for n in (0, 1)]


# Caps.


def kept(talks, cap, seed=0, folder=None):
    with Mixture([(talks, folder and Pictures(folder), cap, 1.0)], seed=seed) as found:
        return [(image, conversation) for image, conversation in found.talks()]


@given(
    images=st.lists(st.sampled_from(["", *NAMES]), max_size=9),
    cap=st.integers(1, 10),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_a_cap_keeps_the_same_rows_whatever_their_order(shared, images, cap, seed, data):
    (talks,) = made([images])
    first = kept(talks, cap, seed, shared)
    assert len(first) == min(cap, len(talks))
    assert first == kept(talks, cap, seed, shared)
    assert {*first} <= {(one.image, one.conversation) for one in talks}
    mixed = data.draw(st.permutations(talks))
    mixed = [dataclasses.replace(one, where=f"other: row {number}") for number, one in enumerate(mixed)]
    assert {*kept(mixed, cap, seed, shared)} == {*first}
    wider = kept(talks, cap + 1, seed, shared)
    assert {*first} <= {*wider}


def test_repeated_rows_count_each_for_themselves(shared):
    talks = [talk(0, "a.png")] * 4 + [talk(1, "b.png")] * 2
    assert all(len(kept(talks, cap, folder=shared)) == min(cap, 6) for cap in range(1, 8))


def test_seeds_draw_differently_and_every_row_is_drawn(shared):
    talks = [talk(number, "a.png") for number in range(12)]
    drawn = [frozenset(kept(talks, 4, seed, shared)) for seed in range(30)]
    assert len(set(drawn)) > 20
    assert len(frozenset().union(*drawn)) == 12


def test_a_cap_is_its_parts_own(shared):
    files = made([["a.png"] * 5, ["a.png", "b.png", ""], ["c.png"] * 4])
    with Mixture([(file, Pictures(shared), cap, 1.0) for file, cap in zip(files, (2, None, 3), strict=True)]) as found:
        assert found.conversations == 2 + 3 + 3
        assert [len(record.conversations) for record in found] == [3, 1, 3, 1]


def test_pictures_without_a_row_that_is_kept_are_no_records(shared):
    talks = [talk(number, name) for number, name in enumerate(NAMES)]
    with Mixture([(talks, Pictures(shared), 1, 1.0)]) as found:
        assert len(found) == len(list(found)) == 1
        assert len(found[0].conversations) == 1


def test_a_cap_keeps_the_same_rows_whatever_they_weigh(tmp_path, pictures):
    path = written(tmp_path / "a.json", [row("a.png", f"Q{number}?", "A.") for number in range(20)])
    one, two = (records(MixtureEntry(file=path, cap=4, weight=weight))[0] for weight in (1.0, 2.0))
    assert [talk.turns[0].text for talk in one.conversations] == [talk.turns[0].text for talk in two.conversations]


def test_a_cap_does_not_rename_a_picture(tmp_path, pictures):
    other = tmp_path / "others"
    other.mkdir()
    (other / "a.png").write_bytes(png((9, 9, 9)))
    first = written(tmp_path / "1.json", [row("a.png"), *(row("b.png", f"Q{n}?", "A.") for n in range(40))])
    second = MixtureEntry(file=written(tmp_path / "2.json", [row("a.png")]), pictures=other)
    found = records(MixtureEntry(file=first, cap=1), second)
    assert [record.id for record in found] == ["b.png", "a.png"]


# Weights.


def encoder():
    return Encoder(WordTokenizer(), "llava-hf", 4, IMAGE_ID)


def weights(conversations):
    return [turn.weight for one in conversations for turn in one.turns if turn.role == "assistant"]


@given(weight=st.floats(0.01, 100), turns=st.integers(1, 3))
def test_a_weight_multiplies_the_loss_of_each_answer(shared, weight, turns):
    exchange = [Turn("assistant", "A.", 0.25) if n % 2 else Turn("user", f"Q{n}?") for n in range(2 * turns)]
    exchange[0] = Turn("user", f"{IMAGE}\nQ?")
    plain = Conversation(tuple(exchange), dataset="s", kind="negative", pair="p")
    with Mixture([([Example("a.png", plain, "f: row 0")], Pictures(shared), None, weight)]) as found:
        (got,) = found[0].conversations
    assert weights([got]) == [0.25 * weight] * turns
    assert [turn.text for turn in got.turns] == [turn.text for turn in plain.turns]
    assert (got.dataset, got.kind, got.pair, got.images) == ("s", "negative", "p", (0,))


REFLECTIVE = [
    row("a.png", f"{IMAGE}\nIs it red?", "No", "Explain why.", "It is green."),
    row("a.png", f"{IMAGE}\nIs it red?", "No", "Explain why this answer is wrong: Yes", "It is as green as grass."),
    row("a.png", f"{IMAGE}\nWho?", "Me.", "Explain why.", "I see me."),
]
TALK = [
    row("a.png", f"{IMAGE}\nWho?", "Me.", "And who?", "You."),
    row("a.png", "Who?", "Me."),
    row("a.png", "Where?", "There."),
]


def same_tree(one, other):
    assert all(
        np.array_equal(getattr(one, field), getattr(other, field))
        for field in ("tokens", "positions", "ends", "image_slots", "parent", "target", "weight")
    )


@pytest.mark.parametrize("rows", [REFLECTIVE, TALK], ids=["reflective", "talk"])
@pytest.mark.parametrize("weight", [2, 3])
def test_a_weight_is_as_good_as_repeating_the_rows(tmp_path, pictures, rows, weight):
    path, words, teach = written(tmp_path / "a.json", rows), encoder(), Supervision(answers="as-published")
    (weighed,) = records(MixtureEntry(file=path, weight=weight))
    (repeated,) = records(*[path] * weight)
    assert len(repeated.conversations) == weight * len(weighed.conversations)
    trees = [build_tree([words(one) for one in teach(record.conversations)]) for record in (weighed, repeated)]
    same_tree(*trees)
    assert trees[0].weight.max() >= weight


# Digests.


def digest(files, folder, start=0, stop=None, **options):
    with Mixture([(file, Pictures(folder), None, 1.0) for file in files], **options) as found:
        return found.digest(start, len(found) if stop is None else stop)


@given(files=shown.filter(lambda files: any(files)), data=st.data())
def test_a_digest_changes_when_any_word_does_and_not_before(shared, files, data):
    talks = made(files)
    before = digest(talks, shared)
    assert digest(made(files), shared, seed=5) == before
    part = data.draw(st.sampled_from([n for n, file in enumerate(talks) if file]))
    place = data.draw(st.integers(0, len(talks[part]) - 1))
    old = talks[part][place]
    asked, answer = old.conversation.turns
    changed = [
        (Turn("user", asked.text + " "), answer),
        (asked, Turn("assistant", answer.text + ".")),
        (asked, Turn("assistant", answer.text, 0.5)),
        (asked,),
    ][data.draw(st.integers(0, 3))]
    talks[part][place] = Example(old.image, Conversation(changed, old.conversation.images), old.where)
    assert digest(talks, shared) != before


@given(images=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5), more=st.sampled_from(["", *NAMES]))
def test_a_digest_is_of_its_records_alone(shared, images, more):
    count = len(set(images))
    before = digest(made([images]), shared)
    after = digest(made([[*images, more]]), shared, stop=count)
    assert (after == before) == (more not in images)


@pytest.mark.parametrize("field", ["source", "kind", "pair"])
def test_a_digest_knows_what_a_conversation_is(shared, field):
    plain = said("Q?", "A.", "a.png", dataset="s", kind="chosen", pair="1")
    other = said("Q?", "A.", "a.png", **{"source": "s", "kind": "chosen", "pair": "1"} | {field: "rejected"})
    one, two = ([Example("a.png", conversation, "f: row 0")] for conversation in (plain, other))
    assert digest([one], shared) != digest([two], shared)


def test_a_digest_changes_with_a_pictures_file(tmp_path, pictures):
    path = written(tmp_path / "a.json", [row("a.png"), row("b.png")])

    def found():
        with mixture([MixtureEntry(file=path)], ReadLog()) as made:
            return made.digest(0, 1), made.digest(1, 2)

    before = found()
    assert found() == before
    path.write_bytes(path.read_bytes())
    assert found() == before
    (pictures / "b.png").write_bytes(png((1, 1, 1), (60, 60)))
    assert found()[0] == before[0]
    assert found()[1] != before[1]
    os.utime(pictures / "a.png", (1, 1))
    assert found()[0] != before[0]


def test_a_digest_changes_with_an_embedded_picture():
    def found(colour):
        with Mixture([([talk(0, "a.png", encoded=png(colour))], None, None, 1.0)]) as made:
            return made.digest(0, 1)

    assert found((1, 2, 3)) == found((1, 2, 3))
    assert found((1, 2, 3)) != found((1, 2, 4))


# Mixture files.


def test_paths_of_a_mixture_file_are_relative_to_it(tmp_path, pictures, monkeypatch):
    there = tmp_path / "there"
    written(there / "own.json", [row("a.png", "Q0?", "A.")])
    written(there / "sub" / "a.json", [row("a.png", "Q1?", "A.")])
    for folder in (there / "images", there / "sub" / "images", there / "named"):
        folder.mkdir()
        (folder / "a.png").write_bytes(png((len(str(folder)), 0, 0)))
    absolute = written(tmp_path / "b.json", [row("a.png", "Q2?", "A.")])
    files = [
        {"file": "own.json"},
        {"file": "sub/a.json"},
        {"file": "sub/a.json", "pictures": "named"},
        {"file": str(absolute), "pictures": str(pictures)},
        {"file": "../b.json"},
    ]
    parts = read_parts(written(there / "mixture.json", files))
    monkeypatch.chdir(tmp_path)
    folders = [there / "images", there / "sub" / "images", there / "named", pictures, pictures]
    assert [part.folder.resolve() for part in parts] == folders
    found = records(*parts)
    assert [len(record.conversations) for record in found] == [1, 1, 1, 2]
    assert [record.image for record in found] == [(folder / "a.png").read_bytes() for folder in folders[:4]]


def test_a_mixture_file_says_everything_that_a_part_can_be(tmp_path):
    whole = {"file": "a.json", "pictures": "p", "cap": 3, "weight": 0.5, "filtered": False, "splits": ["train", "val"]}
    (part,) = read_parts(written(tmp_path / "m.json", [whole]))
    assert part == MixtureEntry(
        file=tmp_path / "a.json", pictures=tmp_path / "p", cap=3, weight=0.5, filtered=False, splits=("train", "val")
    )


BAD_MIXTURES = {
    "no JSON": "[{",
    "empty": "",
    "a number": "3",
    "an object": '{"file": "a.json"}',
    "names no file": "[]",
    "a part no object": '["a.json"]',
    "no file": "[{}]",
    "file no text": '[{"file": 5}]',
    "an unknown key": '[{"file": "a.json", "wieght": 2}]',
    "cap 0": '[{"file": "a.json", "cap": 0}]',
    "cap negative": '[{"file": "a.json", "cap": -1}]',
    "cap a half": '[{"file": "a.json", "cap": 1.5}]',
    "weight 0": '[{"file": "a.json", "weight": 0}]',
    "weight negative": '[{"file": "a.json", "weight": -1}]',
    "weight NaN": '[{"file": "a.json", "weight": NaN}]',
    "weight a text": '[{"file": "a.json", "weight": "much"}]',
    "splits a text": '[{"file": "a.json", "splits": "train"}]',
    "the second part": '[{"file": "a.json"}, {"file": "a.json", "cap": 0}]',
    "too deep": "[" * 100_000,
    "not UTF-8": b'[{"file": "\xff"}]',
}


@pytest.mark.parametrize("content", BAD_MIXTURES.values(), ids=BAD_MIXTURES)
def test_a_bad_mixture_file_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "mixture.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_parts(path)
    one_line(error, path)


def test_a_mixture_file_that_is_none_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError) as error:
            read_parts(path)
        one_line(error, path)


@pytest.mark.parametrize("weight", ["Infinity", "1e999"])
def test_a_weight_without_end_is_refused(tmp_path, weight):
    (tmp_path / "mixture.json").write_text(f'[{{"file": "a.json", "weight": {weight}}}]')
    with pytest.raises(UserError):
        read_parts(tmp_path / "mixture.json")


def test_missing_files_and_folders_of_a_mixture_are_named(tmp_path, pictures):
    good = MixtureEntry(file=written(tmp_path / "a.json", [row("a.png")]))
    for bad in (MixtureEntry(file=tmp_path / "none.json"), MixtureEntry(file=good.file, pictures=tmp_path / "nowhere")):
        with pytest.raises(DataError) as error:
            records(good, bad)
        one_line(error, "none.json" if bad.pictures is None else "nowhere")


# Pictures that are traps.


def patched(kind, places, **options):
    """A small file of a kind whose header says other sizes."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, format=kind, **options)
    content = bytearray(buffer.getvalue())
    for place, value in places(content).items():
        content[place : place + len(value)] = value
    return bytes(content)


def start_of_frame(content):
    place = content.index(b"\xff\xc0")
    return {place + 5: (60_000).to_bytes(2, "big") * 2}


def inflating(size):
    """A PNG of 8 x 8 whose text says it is so long."""
    whole = png(size=(8, 8))
    packed = b"Comment\0\0" + zlib.compress(bytes(size), 9)
    chunk = len(packed).to_bytes(4, "big") + b"zTXt" + packed + zlib.crc32(b"zTXt" + packed).to_bytes(4, "big")
    return whole[:33] + chunk + whole[33:]


TRAPS = {
    "png of 50,000 x 50,000": claimed(50_000, 50_000),
    "png just too large": claimed(MAX_PIXELS // 8_000 + 1, 8_000),
    "png that inflates": claimed(12_000, 12_000, zlib.compress(bytes(12_000 * 400), 9)),
    "png whose text inflates": inflating(200_000_000),
    "gif of 65,535 x 65,535": patched("GIF", lambda content: {6: b"\xff" * 4}),
    "bmp of 50,000 x 50,000": patched("BMP", lambda content: {18: (50_000).to_bytes(4, "little") * 2}),
    "jpeg of 60,000 x 60,000": patched("JPEG", start_of_frame),
    "no picture": b"words",
    "nothing": b"",
}


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    for name, content in TRAPS.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_small_and_refused_by_name_in_files(tmp_path, traps, name):
    assert len(TRAPS[name]) < 250_000
    path = written(tmp_path / "a.json", [row(f"{name}.png")])
    with pytest.raises(DataError) as error:
        records(MixtureEntry(file=path, pictures=traps))
    one_line(error, f"{name}.png")
    (offender,) = checking.check(path, traps).offenders
    assert offender.fatal
    assert name in offender.reason


@pytest.mark.parametrize("name", [name for name in TRAPS if TRAPS[name]])
def test_traps_are_refused_by_name_in_parquet(tmp_path, name):
    picture = {"bytes": TRAPS[name], "path": f"{name}.png"}
    answer = {"question": "Q?", "chosen": "A", "rejected": "B", "idx": "0"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": picture} | answer]), tmp_path / "a.parquet")
    with pytest.raises(DataError) as error:
        records(tmp_path / "a.parquet")
    one_line(error, f"{name}.png")


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "BLP"])
def test_damaged_pictures_of_rare_kinds_are_refused_by_name(tmp_path, pictures, kind):
    buffer = io.BytesIO()
    image = Image.new("P" if kind == "BLP" else "RGB", (16, 16), 3)
    image.save(buffer, format=kind)
    damages = {"AVIF": (-30, b"\xff" * 30), "DDS": (80, b"\0" * 4), "BLP": (4, b"\x7f" * 4)}
    place, value = damages[kind]
    content = bytearray(buffer.getvalue())
    place %= len(content)
    content[place : place + len(value)] = value
    (pictures / "a.png").write_bytes(content)
    with pytest.raises(DataError) as error:
        records(written(tmp_path / "a.json", [row("a.png")]))
    one_line(error, "a.png")


ESCAPES = ["../outside.png", "x/../../outside.png", "/etc/hostname", "./../outside.png", "images/../../outside.png"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("form", ["llava", "judged", "lrv"])
def test_a_name_that_leaves_the_folder_is_refused_by_name(tmp_path, pictures, name, form):
    (tmp_path / "outside.png").write_bytes(png((7, 7, 7)))
    rows = {
        "llava": row(name),
        "judged": judged(image=name),
        "lrv": {"image_id": name, "question": "Q?", "answer": "A."},
    }
    path = written(tmp_path / "a.json", [rows[form]])
    with pytest.raises(DataError) as error:
        records(path)
    one_line(error, name)


def test_a_link_that_leaves_the_folder_is_refused_by_name(tmp_path, pictures):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "o.png").write_bytes(png((7, 7, 7)))
    (pictures / "link.png").symlink_to(tmp_path / "outside" / "o.png")
    (pictures / "door").symlink_to(tmp_path / "outside")
    for name in ("link.png", "door/o.png"):
        with pytest.raises(DataError) as error:
            records(written(tmp_path / "a.json", [row(name)]))
        one_line(error, name, "leaves")


def test_a_link_found_by_its_name_alone_cannot_leave_the_folder(tmp_path, pictures):
    (tmp_path / "outside.png").write_bytes(png((7, 7, 7)))
    (pictures / "sub").mkdir()
    (pictures / "sub" / "secret.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError) as error:
        records(written(tmp_path / "a.json", [row("secret.png")]))
    one_line(error, "secret.png")


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "a/" * 3000, "loop.png"], ids=["long name", "long path", "loop"])
def test_names_that_no_file_system_takes_are_refused(tmp_path, pictures, name):
    (pictures / "loop.png").symlink_to(pictures / "loop.png")
    with pytest.raises(DataError) as error:
        records(written(tmp_path / "a.json", [row(name)]))
    one_line(error, pictures)


@pytest.mark.parametrize(
    "name", ["pictures", ".", "a.png/none.png", " a.png", "A.PNG", "nul\0.png", "\ud800.png"], ids=repr
)
def test_names_of_no_file_are_refused_in_one_line(tmp_path, pictures, name):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(name)))
    with pytest.raises(DataError) as error:
        records(path)
    one_line(error, pictures)


def test_larger_pictures_are_scaled_down_on_request_alone(tmp_path, pictures):
    large = Image.new("RGB", (80, 40), (200, 30, 30))
    large.save(pictures / "large.png")
    path = written(tmp_path / "a.json", [row("large.png"), row("a.png")])
    parts = [MixtureEntry(file=path, pictures=pictures)]
    with mixture(parts, ReadLog()) as whole, mixture(parts, ReadLog(), side=20) as small:
        assert [one.image for one in whole] == [(pictures / name).read_bytes() for name in ("large.png", "a.png")]
        assert Image.open(io.BytesIO(small[0].image)).size == (20, 10)
        assert small[1].image == whole[1].image
        assert small.digest(0, 2) != whole.digest(0, 2)
