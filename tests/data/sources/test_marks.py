"""Marks of reviewers: in every format, what is read with them equals a file that is corrected by hand."""

import copy
import functools
import json
import operator
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.sources import annotated
from reverie_jax.data.sources.marks import Mark, Marks, edit, row_digest, texts
from reverie_jax.errors import DataError
from tests.data.fakes import assert_one_line, llava_row, png, read_examples, write_json_rows, write_parquet

NEW = 'A "new" text: ü\n2'
PAIR = {"question": "Q{}?", "chosen": "C{}", "rejected": "R{}"}
STEP = {key: f"{key} {{}}" for key in annotated.KEYS} | {annotated.VERDICT: "no"}
CHOICE = {"choices": ["x", "y"], "correct_choice_idx": 0, "image_id": 7, "question": "q{}", "rationales": ["w{}"]}
FORMATS = {
    # a row with its number as {}, the path of a text, and where that text is in the row
    "llava": (llava_row("{}.png", "<image>\nQ{}?", "A{}"), "conversations/1/value", ["conversations", 1, "value"]),
    "reverie": (
        llava_row("{}.png", "Q{}?", "A{}", "Explain why.", "W{}"),
        "conversations/3/value",
        ["conversations", 3, "value"],
    ),
    "trl": (
        {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "text", "text": "Q{}"}]}]},
        "messages/0/content/0/text",
        ["messages", 0, "content", 0, "text"],
    ),
    "lrv": ({"image_id": 3, "question": "Q{}?", "answer": "A{}"}, "answer", ["answer"]),
    "mplug_owl": (
        {"image": ["a.png"], "text": "Human: <image>\nHuman: Q{}?\nAI: A{}", "task_type": "x"},
        "text",
        ["text"],
    ),
    "pairs": ({"image": "a.png", **PAIR}, "rejected", ["rejected"]),
    "annotated": (STEP, "incorrect_rationale", ["incorrect_rationale"]),
    "choices": (CHOICE, "rationales/0", ["rationales", 0]),
}
FORMATS["trl"][0]["messages"].append({"role": "assistant", "content": "A{}"})


def numbered(row, number):
    return json.loads(json.dumps(row).replace("{}", str(number)))


def write_marks(path, *marks):
    path.write_text("".join(Mark.model_validate({"reviewer": "a"} | mark).model_dump_json() + "\n" for mark in marks))
    return path


def conversations(path, **options):
    return [(one.image, one.conversation) for one in read_examples(path, **options)[0]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", ["json", "jsonl", "object"])
def test_bad_rows_are_left_out_and_edits_are_read(tmp_path, name, form):
    row, path, place = FORMATS[name]
    rows = [numbered(row, number) for number in range(4)]
    new = "Human: <image>\nHuman: Q?\nAI: " + NEW if name == "mplug_owl" else NEW
    assert path in [text.path for text in texts(rows[1])]
    ids = {f"r{number}": one for number, one in enumerate(rows)}
    digests = [row_digest(one | ({"pid": id} if form == "object" else {})) for id, one in ids.items()]
    marks = write_marks(
        tmp_path / "m.jsonl",
        {"row": digests[0], "mark": "bad"},
        {"row": digests[1], "mark": "good", "edits": {path: new}},
    )
    order = list(ids)
    random.Random(1).shuffle(order)
    by_hand = copy.deepcopy(ids)
    functools.reduce(operator.getitem, place[:-1], by_hand["r1"])[place[-1]] = new
    del by_hand["r0"]
    content = [{id: some[id] for id in order if id in some} for some in (ids, by_hand)]
    suffix = "jsonl" if form == "jsonl" else "json"
    files = [
        write_json_rows(tmp_path / f"{number}.{suffix}", some if form == "object" else list(some.values()))
        for number, some in enumerate(content)
    ]
    read = Marks.read(marks)
    found = conversations(files[0], marks=read)
    assert found == conversations(files[1])
    assert any(NEW in turn.text for _, one in found for turn in one.turns)
    assert conversations(files[0]) != found
    assert read.notes() == [f"{marks}: 1 rows are marked bad and left out", f"{marks}: 1 rows have edited texts"]


def test_texts_within_json_and_within_parquet(tmp_path):
    """RLHF-V's rows: texts are JSON in a column, images are in the file."""
    rows = [
        {"text": json.dumps(numbered(PAIR, number)), "image": {"bytes": png((number, 0, 0)), "path": "a.png"}}
        for number in range(3)
    ]
    file = write_parquet(tmp_path / "a.parquet", rows)
    assert [text.path for text in texts(rows[0])] == ["text/question", "text/chosen", "text/rejected"]
    digests = [row_digest(row) for row in rows]
    assert len(set(digests)) == 3
    marks = write_marks(
        tmp_path / "m", {"row": digests[0], "mark": "bad"}, {"row": digests[2], "edits": {"text/chosen": NEW}}
    )
    rows[2]["text"] = json.dumps(numbered(PAIR, 2) | {"chosen": NEW})
    assert conversations(file, marks=Marks.read(marks)) == conversations(
        write_parquet(tmp_path / "b.parquet", rows[1:])
    )


FOLDED = [
    # lines, and what is left: rows read, NEW is in a text
    ([{"mark": "bad"}, {"mark": ""}], 3, False),
    ([{"mark": "bad"}, {"mark": "good"}], 3, False),
    ([{"mark": "good"}, {"mark": "bad", "reviewer": "b"}], 2, False),
    ([{"mark": "bad"}, {"note": "why"}], 2, False),
    ([{"edits": {"question": NEW}}, {"mark": "good"}], 3, True),
    ([{"edits": {"question": NEW}}, {"edits": {"question": None}}], 3, False),
    ([{"edits": {"question": NEW}}, {"edits": {"question": "other", "chosen": "c"}}], 3, False),
    ([{"edits": {"question": "other"}}, {"edits": {"question": NEW}, "reviewer": "b"}], 3, True),
]


@pytest.mark.parametrize(("lines", "count", "is_new"), FOLDED)
def test_later_lines_win(tmp_path, lines, count, is_new):
    rows = [{"image": "a.png", **numbered(PAIR, number)} for number in range(3)]
    file = write_json_rows(tmp_path / "a.json", rows)
    marks = Marks.read(write_marks(tmp_path / "m", *({"row": row_digest(rows[1])} | line for line in lines)))
    found = conversations(file, marks=marks)
    assert len(found) == 2 * count
    assert any(NEW in turn.text for _, one in found for turn in one.turns) == is_new
    notes = " ".join(marks.notes())
    assert ("marked good by others" in notes) == (count == 2 and len({line.get("reviewer") for line in lines}) == 2)
    assert ("several reviewers" in notes) == any("edits" in line and "reviewer" in line for line in lines)


def test_marks_that_fit_no_row_are_reported(tmp_path):
    rows = [llava_row("a.png", f"Q{number}?", "A") for number in range(9)]
    marks = {"row": "0" * 32, "mark": "bad", "where": "a.json: row 3", "image": "b.png"}
    more = [{"row": row_digest(row), "mark": "bad"} for row in rows]
    path = write_marks(tmp_path / "m", marks, *more)
    rows[:8] = [row | {"id": 2} for row in rows[:8]]  # changed
    file, read = write_json_rows(tmp_path / "a.json", rows), Marks.read(path)
    assert len(conversations(file, marks=read)) == 8
    left_out, counted, *listed = read.notes()
    assert "1 rows" in left_out
    assert "9 marks fit no row" in counted
    assert listed[0] == f"{path}: line 1: fits no row any more: a.json: row 3 b.png"
    assert len(listed) == 5


@pytest.mark.parametrize(("verdict", "mark", "kept"), [("yes", "good", True), ("yes", "", False), (None, "good", True)])
def test_good_keeps_what_the_judge_dropped(tmp_path, verdict, mark, kept):
    rows = [numbered(STEP, number) for number in range(2)]
    rows[0][annotated.VERDICT] = verdict
    file = write_json_rows(tmp_path / "a.json", rows)
    marks = Marks.read(
        write_marks(tmp_path / "m", {"row": row_digest(rows[0]), "mark": mark, "edits": {"question": "n"}})
    )
    assert len(conversations(file, marks=marks)) == (4 if kept else 2)


MARK = '{"row": "%s", "reviewer": "a", "mark": "bad"}' % ("0" * 32)
WRONG = {
    "not JSON": (f"{MARK}\nnonsense\n", "line 2"),
    "another file": ('[{"image": "a.png"}]', "line 1"),
    "unknown field": (MARK.replace("mark", "marks"), "line 1: marks"),
    "unknown mark": (MARK.replace("bad", "ugly"), "line 1: mark"),
    "no reviewer": (MARK.replace('"a"', '""'), "line 1: reviewer"),
    "other digest": (MARK.replace("00", "0"), "line 1: row"),
}


@pytest.mark.parametrize("name", WRONG)
def test_lines_that_are_no_marks_are_named(tmp_path, name):
    text, place = WRONG[name]
    (tmp_path / "m").write_text(text.replace('{"row": ', '{"row":') if name == "not JSON" else text)
    with pytest.raises(DataError) as error:
        Marks.read(tmp_path / "m")
    assert_one_line(error, tmp_path / "m", *place.split(": "))


def test_a_missing_file_and_a_missing_text_are_named(tmp_path):
    with pytest.raises(DataError) as error:
        Marks.read(tmp_path / "none")
    assert_one_line(error, tmp_path / "none")
    row = llava_row("a.png")
    file = write_json_rows(tmp_path / "a.json", [row])
    for path in ("conversations/7/value", "conversations/x/value", "question", "conversations/0/value/x"):
        marks = write_marks(tmp_path / "m", {"row": row_digest(row), "edits": {path: "x"}, "where": "a.json: row 0"})
        with pytest.raises(DataError) as error:
            conversations(file, marks=Marks.read(marks))
        assert_one_line(error, marks, "line 1", path)


@pytest.mark.parametrize("cut", [1, 9, 40, 100])
def test_a_line_that_was_cut_off_says_nothing(tmp_path, cut):
    path = write_marks(tmp_path / "m", {"row": "0" * 32, "mark": "bad"}, {"row": "1" * 32, "mark": "bad"})
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:cut])
    assert list(Marks.read(path).rows) == ["0" * 32]
    path.write_bytes(first + second.rstrip())  # by hand, without its end
    assert len(Marks.read(path).rows) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["conversations", "value", "text", "question", "image", "ü"]), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.data())
def test_any_text_can_be_edited_and_nothing_else_changes(row, data):
    found = texts(row)
    assert len({text.path for text in found}) == len(found)
    digest, before = row_digest(row), copy.deepcopy(row)
    assert digest == row_digest(json.loads(json.dumps(row)))
    if isinstance(row, dict):
        assert digest == row_digest(dict(reversed(row.items())))
    if not found:
        return
    chosen, new = data.draw(st.sampled_from(found)), data.draw(st.text())
    edited = edit(row, {chosen.path: new})
    assert row == before
    others = {text.path: text.text for text in found if text.path != chosen.path}
    after = {text.path: text.text for text in texts(edited)}
    if not new.startswith("{"):
        assert after == others | {chosen.path: new}
