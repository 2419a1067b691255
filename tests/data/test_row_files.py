"""Files of rows in every form: each row is read in each pass, and a broken file is one line that names it."""

import itertools
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie_jax.data import row_files
from reverie_jax.data.row_files import Rows, as_integer, read_items, read_rows, write_rows
from reverie_jax.data.sources import ReadLog, reverie
from reverie_jax.errors import DataError
from tests.data.fakes import Given, assert_one_line, llava_row, png, write_json_rows, write_parquet

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
letters = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | numbers | letters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(letters, values, max_size=3)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@settings(max_examples=50)
@given(
    rows=st.lists(objects, min_size=1, max_size=4),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_rows_are_the_same_in_each_pass(tmp_path_factory, name, rows, ascii, indent, encoding):
    path = tmp_path_factory.mktemp("rows") / name
    if name == "a.json":
        text = json.dumps(rows, ensure_ascii=ascii, indent=indent)
    else:
        text = "\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows) + "\n"
    path.write_bytes(text.encode(encoding))
    result = Rows(path)
    assert list(result) == rows
    assert [row for pair in zip(result, result, strict=True) for row in pair] == [row for row in rows for _ in range(2)]


halves = st.text(st.sampled_from(["\ud83d", "\udbff", "\ude00", "\U0001f600", "a", "\\", "u", "é"]), max_size=6)


@settings(max_examples=60)
@given(
    texts=st.lists(halves, min_size=1, max_size=3),
    form=st.sampled_from(["list", "object", "lines"]),
    encoding=st.sampled_from(["utf-8", "utf-16"]),
)
def test_halves_of_characters_stay_as_they_are(tmp_path_factory, texts, form, encoding):
    """As Python's json reads them; a parser in C makes other characters of them."""
    path = tmp_path_factory.mktemp("halves") / ("a.jsonl" if form == "lines" else "a.json")
    rows = [{"a": json.loads(json.dumps(text))} for text in texts]
    write_json_rows(path, dict(zip("xyz", rows, strict=False)) if form == "object" else rows)
    path.write_bytes(path.read_text("utf-8").encode(encoding))
    assert [row for _, row in Rows(path).items()] == rows


@settings(max_examples=50)
@given(rows=st.dictionaries(letters.filter(bool), objects, min_size=1, max_size=4))
def test_rows_of_an_object_get_their_ids(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.json"
    write_rows(path, rows)
    assert list(Rows(path)) == [row | {"pid": key} for key, row in rows.items()]
    assert list(Rows(path).items()) == list(rows.items())


def test_parquet_rows_are_the_same_in_each_pass(tmp_path):
    rows = [{"a": number, "b": [{"c": b"\0\xff", "d": None}], "e": "茶\n"} for number in range(100)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    result = Rows(tmp_path / "a.parquet")
    assert list(result) == rows == list(result)
    assert list(itertools.islice(result, 3)) == rows[:3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('  \n\t[{"a": 1}]', [{"a": 1}]),
        ('[\n{"a": 1}\n]\n\n', [{"a": 1}]),
        ('\r\n{"7": {"a": 1}}\n', [{"pid": "7", "a": 1}]),
        (" " * 100 + '{"7": {"a": 1}}', [{"pid": "7", "a": 1}]),
        ('{"1": {"a": 1}, "2": 5, "3": {"a": 3}}', [{"pid": "1", "a": 1}, 5, {"pid": "3", "a": 3}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}', [{"a": 1}]),
        ('{"image": {"path": "a"}, "question": "Q"}\n', [{"image": {"path": "a"}, "question": "Q"}]),
        ('\ufeff[{"a": 1}]', [{"a": 1}]),
        ('\ufeff{"7": {"a": 1}}', [{"pid": "7", "a": 1}]),
        ('\ufeff{"a": 1}\r\n\ufeff{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{"a": {"b": 1}, "c": 2}\r\n{"a": 2}\r\n', [{"a": {"b": 1}, "c": 2}, {"a": 2}]),
        ('["a.png"]\n["b.png"]\n', [["a.png"], ["b.png"]]),
        (f'[{{"a": {"[" * 500}{"]" * 500}}}]', None),  # deeper than anyone writes
    ],
    ids=lambda value: repr(value)[:25],
)
def test_forms_of_json_files(tmp_path, content, expected):
    (tmp_path / "a.json").write_text(content, "utf-8")
    rows = list(Rows(tmp_path / "a.json"))
    assert rows == expected if expected else len(rows) == 1


GOOD = json.dumps(llava_row("a.png"))
BROKEN = {
    "garbage after a list": ("a.json", f"[{GOOD}] garbage"),
    "two lists": ("a.json", f"[{GOOD}][{GOOD}]"),
    "a comma too many": ("a.json", f"[{GOOD},]"),
    "NaN": ("a.json", '[{"a": NaN}]'),
    "a control character": ("a.json", '[{"a": "\x01"}]'),
    "an unknown escape": ("a.json", '[{"a": "\\x"}]'),
    "empty": ("a.json", ""),
    "empty lines": ("a.json", " \r\n\n"),
    "a number": ("a.json", "3"),
    "an empty list": ("a.json", "[]"),
    "an empty object": ("a.json", "{}"),
    "a single row over lines": ("a.json", json.dumps(llava_row("a.png"), indent=1)),
    "an id twice": ("a.json", f'{{"1": {GOOD}, "1": {GOOD}}}'),
    "truncated line": ("a.jsonl", f'{GOOD}\n{{"id": 2, "conv'),
    "garbage in a line": ("a.jsonl", f"{GOOD}\n{GOOD} garbage\n"),
    "NaN in a line": ("a.jsonl", '{"a": -Infinity}\n'),
    "no lines": ("a.jsonl", "\n \n"),
    "deep lines": ("a.jsonl", "[" * 100_000 + "]" * 100_000),
    "not UTF-8": ("a.json", b'[{"a": "\xff"}]'),
    "lines not UTF-8": ("a.jsonl", b'{"a": "\xff"}\n'),
    "UTF-16 without a mark": ("a.json", f"[{GOOD}]".encode("utf-16-le")),
    "half of UTF-16": ("a.json", f"[{GOOD}]".encode("utf-16")[:-1]),
    "half of UTF-16 in lines": ("a.jsonl", GOOD.encode("utf-16")[:-1]),
    "an image": ("a.json", png()),
    "a folder": ("a.json", "folder"),
    "not Parquet": ("a.parquet", png()),
    "missing": ("a.json", None),
    "missing Parquet": ("a.parquet", None),
}


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_once(tmp_path, name, content):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert_one_line(error, path)
    assert str(error.value).count(str(tmp_path)) == 1


@settings(max_examples=25)
@given(st.data())
def test_every_truncated_file_is_refused(tmp_path_factory, data):
    rows = data.draw(st.sampled_from([[llava_row("a.png")] * 2, {"1": llava_row("a.png"), "2": llava_row("b.png")}]))
    text = json.dumps(rows)
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert_one_line(error, path)


@pytest.mark.parametrize(("name", "start", "end"), [("a.json", "[", "]"), ("a.jsonl", "", "")])
def test_a_broken_row_is_named_by_its_number(tmp_path, name, start, end):
    (tmp_path / name).write_text(start + (",\n" if start else "\n").join([*[GOOD] * 41, '{"id": 1,,}']) + end)
    with pytest.raises(DataError, match=r"row 41\b"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("constant", ["NaN", "-Infinity", "Infinity"])
@pytest.mark.parametrize("value", ["%s", "[1, %s]", '{"b": %s, "c": 1}'])
@pytest.mark.parametrize("form", ["[%s, %s]", '{"x": %s, "y": %s}', "%s\n%s"])
def test_what_is_no_number_is_named_with_its_row_and_field(tmp_path, form, value, constant):
    """Python and pandas write it, and it is not JSON."""
    field = "b" if "b" in value else "field name"
    bad = '{"q": "NaN", "field name": %s}' % (value % constant)
    (tmp_path / "a.json").write_text(form % ('{"field name": "fine: NaN"}', bad))
    with pytest.raises(DataError, match=f"row 1: .*{field!r} is {constant}, which is not a number") as error:
        read_rows(tmp_path / "a.json")
    assert_one_line(error, tmp_path / "a.json")


@pytest.mark.parametrize("form", ['[{"a": %s}]', '{"1": {"a": %s}}'])
def test_deep_nesting_does_not_fill_the_memory(tmp_path, form):
    path = tmp_path / "a.json"
    path.write_text(form % ("[" * 30_000 + "]" * 30_000))
    code = """
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from reverie_jax.data.row_files import Rows
from reverie_jax.errors import DataError
try:
    list(Rows(pathlib.Path(sys.argv[1])))
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-300:]
    assert str(path) in result.stdout


def test_a_row_without_an_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_MAX_ROW_BYTES", 50_000)
    (tmp_path / "a.json").write_text(f'[{GOOD}, "{"x" * 100_000}')
    with pytest.raises(DataError, match="50,000"):
        read_rows(tmp_path / "a.json")
    write_json_rows(tmp_path / "b.json", [GOOD * 100] * 100)
    assert len(read_rows(tmp_path / "b.json")) == 100  # the limit is of a row, not of the file


def test_a_deeply_nested_turn_is_an_invalid_row():
    nested, log = [], ReadLog()
    for _ in range(200_000):
        nested = [nested]
    examples = list(reverie.read_examples(Given([llava_row("a.png"), {"conversations": [nested, 3]}]), log))
    assert (len(examples), [where for where, _ in log.problems]) == (1, ["f: row 1"])


def test_lists_of_an_object_are_read_by_name(tmp_path):
    path = write_json_rows(tmp_path / "a.json", {"info": {"a": [1]}, "b": [{"c": [0.5]}, 2], "a": [], "d": 3})
    assert {key: list(read_items(path, key)) for key in "abde"} == {"a": [], "b": [{"c": [0.5]}, 2], "d": [], "e": []}
    for content in (None, b'{"b": [1, 2', b'{"b": [NaN]}', b"\xff"):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError) as error:
            list(read_items(path, "b"))
        assert_one_line(error, path)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[
            (7, 7),
            (7.0, 7),
            ("7", 7),
            ("7.0", 7),
            (" 7 ", 7),
            (-7, -7),
            ("-7", -7),
            (10_000_001.0, 10_000_001),
            ("007", 7),
        ],
        *((value, None) for value in (True, None, 7.5, "7.5", "", ".0", "seven", "٧", float("nan"), float("inf"), [7])),
    ],
)
def test_numbers_are_read_as_tables_write_them(value, number):
    assert as_integer(value) == number


FORMS = {"list": "a.json", "object": "a.json", "wrapped": "a.json", "lines": "a.jsonl", "parquet": "a.parquet"}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_some_rows_are_written_in_the_form_they_have(tmp_path_factory, form, data):
    source = tmp_path_factory.mktemp("some") / FORMS[form]
    rows = [{"pid": "same", "a": number, "b": "half \ud83d é"} for number in range(data.draw(st.integers(1, 5)))]
    if form == "parquet":
        write_parquet(source, [row | {"b": [1.5]} for row in rows], row_group_size=2)
    else:
        by_id = {f"k{row['a']}": row for row in rows}
        write_json_rows(source, {"object": by_id, "wrapped": {"annotations": rows}}.get(form, rows))
    items = list(Rows(source).items())
    drop = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    places = [where for where, _ in Rows(source).located()]
    path = source.with_name(f"kept{source.suffix}")
    assert Rows(source).write_some(path, {places[number] for number in drop}) == len(rows) - len(drop)
    kept = Rows(path, min_rows=0)
    assert kept.form == form or len(drop) == len(rows)
    assert list(kept.items()) == [item for number, item in enumerate(items) if number not in drop]
    if form == "lines":
        lines = source.read_bytes().splitlines()
        assert path.read_bytes().splitlines() == [line for number, line in enumerate(lines) if number not in drop]


@pytest.mark.parametrize(
    ("content", "found"),
    {
        '{"annotations": [{"a": 1}, {"a": 2}]}': [{"a": 1}, {"a": 2}],
        '\n{\n "annotations":\n [\n {"a": 1}\n ],\n "info": {"b": [3]}\n}': [{"a": 1}],
        '{"annotations": [{"a": 1}]}\n{"annotations": []}': [{"annotations": [{"a": 1}]}, {"annotations": []}],
        '{"annotations": [1]}': [{"annotations": [1]}],
        '{"annotations": {"a": 1}}': [{"a": 1, "pid": "annotations"}],
    }.items(),
)
def test_rows_may_be_the_annotations_of_an_object(tmp_path, content, found):
    (tmp_path / "a.json").write_text(content)
    assert read_rows(tmp_path / "a.json") == found


@pytest.mark.parametrize("content", [f"[{GOOD},\n{GOOD}]", f"[{GOOD}, {GOOD}]\n"])
def test_a_list_is_a_list_whatever_its_name(tmp_path, content):
    (tmp_path / "a.JSONL").write_text(content)
    assert read_rows(tmp_path / "a.JSONL") == [llava_row("a.png")] * 2
    assert Rows(tmp_path / "a.JSONL").write_some(tmp_path / "kept.jsonl", {f"{tmp_path / 'a.JSONL'}: row 0"}) == 1
    assert read_rows(tmp_path / "kept.jsonl") == [llava_row("a.png")]


def test_minimum_of_rows(tmp_path):
    path = write_json_rows(tmp_path / "a.json", [])
    assert read_rows(path, min_rows=0) == []
    write_rows(path, [{"a": 1}])
    assert read_rows(path, min_rows=1) == [{"a": 1}]
    with pytest.raises(DataError, match=r"a\.json"):
        read_rows(path, min_rows=2)
