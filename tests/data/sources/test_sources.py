"""Annotation files as their authors write them: the variations that are accepted, and the rows that are reported."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.mixture import MixtureEntry
from reverie_jax.data.sources import ReadLog, reverie
from reverie_jax.data.templates import find_template
from reverie_jax.errors import DataError
from tests.data.fakes import (
    assert_one_line,
    kinds,
    llava_row,
    png,
    problem_rows,
    read_examples,
    read_records,
    talk,
    texts,
    write_json_rows,
    write_parquet,
)

WHY = "Explain why. Including any necessary facts or knowledge"
WHY_WRONG = "Explain why this answer is wrong: {}. Including any necessary facts or knowledge."


def turns(*texts, keys=("from", "value"), roles=("human", "gpt"), first=0):
    return [{keys[0]: roles[(n + first) % 2], keys[1]: text} for n, text in enumerate(texts)]


def messages(*texts):
    return turns(*texts, keys=("role", "content"), roles=("user", "assistant"))


def part(**fields):
    (kind,) = fields
    return {"type": kind, "text": None, "image": None} | fields


def read(tmp_path, rows):
    return read_examples(write_json_rows(tmp_path / "rows.json", rows))


# LLaVA.

LLAVA = {
    "several turns": (llava_row("coco/a.jpg", f"{IMAGE}\nWhat?", "A cup.", "Whose?", "Mine."), None),
    "marker at the end": (llava_row("a.jpg", f"What?\n{IMAGE}", "A jug."), None),
    "marker in a later turn": (llava_row("a.jpg", "What?", "A cup.", f"{IMAGE}\nAnd here?", "A jug."), None),
    "text only": (llava_row(None, "Two and two?", "Four.", model=""), None),
    "no marker": (llava_row("a.jpg", "What?", "A jug."), [f"{IMAGE}\nWhat?", "A jug."]),
    "two markers": (llava_row("a.jpg", f"{IMAGE} see {IMAGE}\nWhat?", "A cup."), [f"{IMAGE}\nsee \nWhat?", "A cup."]),
    "markers of two turns": (
        llava_row("a.jpg", "Hi.", "Hello.", f"{IMAGE}\nWhat?", "A cup.", f"{IMAGE} sure?", "Yes."),
        ["Hi.", "Hello.", f"{IMAGE}\nWhat?", "A cup.", "sure?", "Yes."],
    ),
    "last question left out": (llava_row("a.jpg", "What?", "A cup.", "Whose?"), [f"{IMAGE}\nWhat?", "A cup."]),
    "first answer left out": (
        {"image": "a.jpg", "conversations": turns("Hello.", "What?", "A cup.", first=1)},
        [f"{IMAGE}\nWhat?", "A cup."],
    ),
    "messages and images": (
        {"images": ["a.jpg"], "messages": messages(f"{IMAGE}What?", "A cup.")},
        [f"{IMAGE}What?", "A cup."],
    ),
    "null beside a value": (
        {"image": None, "images": ["a.jpg"], "conversations": None, "messages": messages(f"{IMAGE}What?", "A cup.")},
        [f"{IMAGE}What?", "A cup."],
    ),
    "null in a turn": (
        {"images": ["a.jpg"], "messages": [one | {"from": None, "value": None} for one in messages("What?", "A cup.")]},
        [f"{IMAGE}\nWhat?", "A cup."],
    ),
    "the same image twice": (llava_row("a.jpg", "What?", "A cup.", images=["a.jpg"]), [f"{IMAGE}\nWhat?", "A cup."]),
    "contents in parts": (
        {
            "images": ["a.jpg"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            ],
        },
        [f"{IMAGE}\nWhat?", "A cup."],
    ),
    "contents in parts that name the image, as Parquet has them": (
        {
            "images": None,
            "messages": [
                {"role": "user", "content": [part(text="What?"), part(image="a.jpg"), part(text="Say it.")]},
                {"role": "assistant", "content": [part(text="A cup.")]},
            ],
        },
        [f"What?\n{IMAGE}\nSay it.", "A cup."],
    ),
    "prompt and completion": (
        {"images": ["a.jpg"], "prompt": messages("What?"), "completion": [{"role": "assistant", "content": "A cup."}]},
        [f"{IMAGE}\nWhat?", "A cup."],
    ),
    "prompt and completion as texts": ({"prompt": "What?", "completion": "A cup."}, ["What?", "A cup."]),
    "a system turn, noted": (
        {"images": ["a.jpg"], "messages": [{"role": "system", "content": "Be brief. "}, *messages("What?", "A cup.")]},
        [f"{IMAGE}\nBe brief.\n\nWhat?", "A cup."],
    ),
    "a system turn in parts, noted": (
        {
            "image": "a.jpg",
            "messages": [
                {"role": "system", "content": [part(text="Be brief.")]},
                *messages(f"{IMAGE}\nWhat?", "A cup."),
            ],
        },
        [f"Be brief.\n\n{IMAGE}\nWhat?", "A cup."],
    ),
    "an empty system turn": (
        {"image": "a.jpg", "conversations": [{"from": "system", "value": ""}, *turns("What?", "A cup.")]},
        [f"{IMAGE}\nWhat?", "A cup."],
    ),
    "numbers as answers": (
        {"image": "a.jpg", "conversations": turns("How many?", 7, "How far?", 2.5, "And now?", 8.0)},
        [f"{IMAGE}\nHow many?", "7", "How far?", "2.5", "And now?", "8"],
    ),
    "halves of characters": (
        llava_row("a.jpg", f"{IMAGE}What\ud83d?", "A \ude00cup\U0001f600."),
        [f"{IMAGE}What?", "A cup\U0001f600."],
    ),
}
"""A row, and the texts of its conversation; None if they are as in the row."""


@pytest.mark.parametrize("name", LLAVA)
def test_llava_rows(tmp_path, name):
    row, expected = LLAVA[name]
    (example,), log = read(tmp_path, [row])
    assert log.problems == []
    assert len(log.notes) == any(word in name for word in ("left out", "halves", "noted"))
    assert example.image == ("a.jpg" if f"{IMAGE}" in str(expected) else row.get("image") or "")
    expected = expected or [turn["value"] for turn in row["conversations"]]
    for turn, text in zip(example.conversation.turns, expected, strict=True):
        assert turn.text.split() == text.split()
        assert turn.text.startswith(IMAGE) == text.startswith(IMAGE)
    assert example.conversation.images == ((0,) if example.image else ())
    assert (example.conversation.dataset, example.conversation.kind) == ("llava", "")


def test_unknown_fields_are_noted_once(tmp_path):
    _, log = read(tmp_path, [llava_row("a.jpg", licence="x")] * 3)
    assert len(log.notes) == 1
    assert "licence" in log.notes[0]


HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
BAD_ROWS = {
    "not an object": "row",
    "several images": {"image": ["a.jpg", "b.jpg"], "conversations": [HUMAN, GPT]},
    "images of two fields": llava_row("a.jpg", images=["b.jpg"]),
    "image null in a list": llava_row("", images=[None]),
    "half of a character in a name": llava_row("a\ud83d.jpg"),
    "empty answer": llava_row("a.jpg", "What?", "A cup.", "Whose?", " \n"),
    "image not a text": llava_row("a.jpg") | {"image": 3},
    "marker without an image": llava_row(None, f"{IMAGE}\nWhat?", "A cup."),
    "marker in an answer": llava_row("a.jpg", "What?", f"A {IMAGE}."),
    "no conversations": {"id": 1, "image": "a.jpg", "conversations": None},
    "conversations not a list": llava_row("a.jpg") | {"conversations": "hello"},
    "no turns": llava_row("a.jpg") | {"conversations": []},
    "one turn": llava_row("a.jpg", "What?"),
    "no answer": llava_row("a.jpg") | {"conversations": [GPT, HUMAN]},
    "no value": llava_row("a.jpg") | {"conversations": [{"from": "human"}, GPT]},
    "turn not an object": llava_row("a.jpg") | {"conversations": ["hello", GPT]},
    "unknown role": llava_row("a.jpg") | {"conversations": turns("What?", "A cup.", roles=("human", "bing"))},
    "role not a text": llava_row("a.jpg") | {"conversations": [{"from": ["human"], "value": "x"}, GPT]},
    "two users": llava_row("a.jpg") | {"conversations": turns("What?", "A cup.", roles=("human", "human"))},
    "question not a text": llava_row("a.jpg") | {"conversations": [HUMAN | {"value": 5}, GPT]},
    "answer not a text": llava_row("a.jpg") | {"conversations": [HUMAN, GPT | {"value": None}]},
    "answer a truth value": llava_row("a.jpg") | {"conversations": [HUMAN, GPT | {"value": True}]},
    "system turn later": llava_row("a.jpg") | {"conversations": [HUMAN, {"from": "system", "value": "x"}, GPT]},
    "system turn alone": llava_row("a.jpg") | {"conversations": [{"from": "system", "value": "x"}, GPT]},
    "part of another kind": {"messages": [{"role": "user", "content": [{"type": "video"}]}, GPT]},
    "part that is nothing": {"messages": [{"role": "user", "content": [7]}, GPT]},
    "part without its text": {"messages": [{"role": "user", "content": [{"type": "text"}]}, GPT]},
    "image of a part not given": {"messages": [{"role": "user", "content": [{"type": "image"}]}, GPT]},
    "image at an address": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}, GPT]
    },
}


def test_invalid_rows_are_all_reported(tmp_path):
    examples, log = read(tmp_path, [llava_row("a.jpg"), *BAD_ROWS.values(), llava_row("a.jpg")])
    assert len(examples) == 2
    reported = {int(number) for number in problem_rows(log)}
    assert [name for number, name in enumerate(BAD_ROWS, 1) if number not in reported] == []
    assert log.problems[0][0] == f"{tmp_path / 'rows.json'}: row 1"
    with pytest.raises(DataError, match=rf"row 1: .*\({len(BAD_ROWS) - 1} more") as error:
        log.raise_problems()
    assert_one_line(error)


STORED = {
    "text": turns("What?", "A cup."),
    "rationale": turns("What?", "A cup.", "Explain why.", "It is."),
    "wrong answer": turns("What?", "A jug.", WHY_WRONG.format("A jug."), "It is no jug."),
}


@pytest.mark.parametrize("conversations", STORED.values(), ids=STORED)
@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: [image], lambda image: image["bytes"]])
def test_images_may_be_in_parquet_as_the_datasets_library_writes_them(tmp_path, conversations, wrap):
    colors, right = ((1, 2, 3), (4, 5, 6)), turns("What?", "A cup.", "Explain why.", "It is.")
    contents = [png(color) for color in colors]
    rows = [
        {"image": wrap({"bytes": content, "path": "image.png"}), "conversations": turns}
        for content, turns in zip(contents, (right, conversations), strict=True)
    ]
    examples, log = read_examples(write_parquet(tmp_path / "a.parquet", rows))
    stored = [example.encoded for example in examples]
    if conversations == STORED["wrong answer"]:  # the right answer is about another image of the same name
        assert (stored, len(log.problems)) == (contents[:1], 1)
    else:
        assert (stored, log.problems) == (contents, [])
        assert [record.image for record in read_records(tmp_path / "a.parquet")] == contents


# REVERIE.


def reflective(image="vg/VG_100K/1.jpg", question=f"{IMAGE}\nWhat?", answer="A cup.", prompt=WHY, why="A handle."):
    return llava_row(image, question, answer, prompt, why)


@pytest.mark.parametrize(
    ("prompt", "kind", "quoted"),
    [
        (WHY, "positive", ""),
        ("Explain why.", "positive", ""),
        ("explain why", "positive", ""),
        (WHY_WRONG.format("A jug."), "negative", "A jug."),
        (WHY_WRONG.format("a jug"), "negative", "a jug"),
        ("Explain why this answer is wrong: No", "negative", "No"),
        ("Explain why this is incorrect: a jug", "negative", "a jug"),
        ("explain why the answer is incorrect: a\njug", "negative", "a\njug"),
    ],
)
def test_prompts_give_the_kind(tmp_path, prompt, kind, quoted):
    assert reverie.parse_rationale_prompt(prompt) == (kind, quoted)
    examples, log = read(tmp_path, [reflective(prompt=prompt)])
    assert log.problems == []
    assert [(e.conversation.kind, e.conversation.dataset) for e in examples] == [(kind, "reverie")]


def test_rows_that_ask_for_a_rationale_have_an_image(tmp_path):
    rows = [reflective(), reflective() | {"image": None}, reflective() | {"image": ""}, reflective(None, "What?")]
    examples, log = read(tmp_path, rows)
    assert (kinds(examples), problem_rows(log)) == (["positive", ""], ["1", "2"])
    assert any("1 rows ask for rationales without an image" in note for note in log.notes)


def test_llava_rows_of_four_turns_are_not_reflective(tmp_path):
    rows = [reflective(prompt="And what else?")] * 3 + [reflective(prompt="Explain why it is red.")]
    examples, log = read(tmp_path, rows)
    assert (kinds(examples), log.problems) == ([""] * 4, [])


OTHERS = [
    *(llava_row("a.jpg"), llava_row(None), reflective(None, "What?"), reflective(prompt="And what else?")),
    *(reflective(prompt="Explain why it is red."), reflective(prompt="Explain why this is wrong")),
]
"""Rows of LLaVA's, some of them nearly REVERIE's."""


@settings(max_examples=30)
@given(st.lists(st.sampled_from(range(3 + len(OTHERS))), min_size=1, max_size=12))
def test_each_row_of_a_file_is_read_as_what_it_is(tmp_path_factory, chosen):
    wrong = reflective("b.jpg", answer="A jug.", prompt=WHY_WRONG.format("A jug."), why="No spout.")
    rows = [wrong, reflective("b.jpg"), reflective(), *OTHERS]
    chosen = [1, *chosen]  # which has the right answer of the wrong one
    examples, log = read(tmp_path_factory.mktemp("mixed"), [rows[number] for number in chosen])
    assert log.problems == []
    assert kinds(examples) == [("negative", "positive", "positive", "")[min(number, 3)] for number in chosen]
    assert [e.conversation.dataset for e in examples] == ["reverie" if number < 3 else "llava" for number in chosen]
    assert all(e.conversation.turns[1].text == "A cup." for e in examples if e.conversation.kind)
    theirs = sum(number < 3 for number in chosen)
    said = [note for note in log.notes if f" {theirs} rows ask for rationales, as REVERIE's" in note]
    if theirs < len(chosen):
        first = next(place for place, number in enumerate(chosen) if number >= 3)
        assert f"{len(chosen) - theirs} do not, as LLaVA's (row {first} is" in said[0]
    else:
        assert not said


def test_negative_rows_that_open_with_the_wrong_answer_get_the_right_one(tmp_path):
    wrong = reflective(answer="A jug.", prompt=WHY_WRONG.format("A jug."), why="No spout.")
    examples, log = read(tmp_path, [wrong, reflective(), reflective(image="other.jpg")])
    assert texts(examples)[0][1] == "A cup."
    assert len(log.notes) == 1
    _, log = read(tmp_path, [wrong])
    assert problem_rows(log) == ["0"]


def test_six_turns_become_two_conversations(tmp_path):
    row = (f"{IMAGE}What?", "A cup.", "Explain why", "A handle.", "Explain why this is incorrect: a jug", "No spout.")
    examples, log = read(tmp_path, [{"images": ["a.jpg"], "messages": messages(*row)}])
    assert log.problems == []
    assert texts(examples) == [list(row[:4]), [*row[:2], *row[4:]]]
    assert kinds(examples) == ["positive", "negative"]


letters = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda text: IMAGE not in text and text.strip()
)


@settings(max_examples=20)
@given(st.lists(st.tuples(letters, letters, letters), min_size=1, max_size=4, unique=True))
def test_written_annotations_are_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "ü.png").write_bytes(png())
    conversations = [talk(question, answer, ("Explain why.", why)) for question, answer, why in rows]
    assert reverie.write_annotations(folder / "rows.json", [("7", "ü.png", conversations)]) == len(rows)
    (record,) = read_records(MixtureEntry(file=folder / "rows.json", images=folder))
    assert record.id == "ü.png"
    assert [c.turns for c in record.conversations] == [c.turns for c in conversations]


# LRV.


def test_lrv_rows(tmp_path):
    rows = [
        {"image_id": "2373555", "question": " Is there a dog? ", "answer": "There is no dog.", "task": "negative"},
        {"image_id": 7, "question": "What?", "answer": "A cup at (1, 2).", "task": "attribute detection"},
        {"image_id": 8.0, "question": None, "instruction": "Describe.", "answer": "A cup."},
        {"image_id": "9.0", "question": "What?", "answer": "A cup."},
        {"image_id": "vg/9.png", "instruction": "Describe.", "answer": "A cup."},
        {"image_id": "10", "question": "How many?", "answer": 3},
        {"image_id": "9", "question": "Is it?", "answer": True},
        {"image_id": "9", "question": "", "answer": "A cup."},
        {"question": "What?", "answer": "A cup."},
        *({"image_id": id, "question": "What?", "answer": "A cup."} for id in (None, ["7"], {"id": 7}, True, " ")),
    ]
    examples, log = read(tmp_path, rows)
    assert [example.image for example in examples] == ["2373555.jpg", "7.jpg", "8.jpg", "9.jpg", "vg/9.png", "10.jpg"]
    assert kinds(examples) == ["negative", "", "", "", "", ""]
    assert texts(examples)[-1][1] == "3"
    assert texts(examples)[0] == [f"{IMAGE}\nIs there a dog?", "There is no dog."]
    assert problem_rows(log) == [str(number) for number in range(6, 14)]
    wrapped, log = read(tmp_path, {"annotations": rows[:3]})  # as its trainer wants them
    assert (texts(wrapped), log.problems) == (texts(examples)[:3], [])
    wrapped, log = read(tmp_path, {"annotations": rows[5:7]})
    assert (len(wrapped), problem_rows(log)) == (1, ["1"])


OWL = find_template("mplug_owl").system


def test_mplug_owls_rows(tmp_path):
    talk = "\nHuman: What: AI?\nAI: A\ncup.\nHuman: Whose?\nAI: Mine."
    rows = [
        {"image": ["a.jpg"], "text": f"{OWL}\nHuman: {IMAGE}{talk}", "task_type": "llava_sft"},
        {"text": OWL + talk, "task_type": "quora_chat_sft"},
        {"image": "a.jpg", "text": f"Be kind.\nHuman: What?\nHuman: {IMAGE}\nAI: A cup."},
        {"image": [], "text": "Human: What?\nAI: Mine.\nHuman: And?"},
        *({"image": ["a.jpg"], "text": text} for text in ("Hello.", "\nHuman: What?\nAI: ", "\nAI: Hi.", 3)),
        {"image": ["a.jpg", "b.jpg"], "text": talk},
        {"text": f"\nHuman: {IMAGE}{talk}"},
    ]
    examples, log = read(tmp_path, rows)
    assert [example.image for example in examples] == ["a.jpg", "", "a.jpg", ""]
    said = ["What: AI?", "A\ncup.", "Whose?", "Mine."]
    assert texts(examples) == [
        [f"{IMAGE}\n{said[0]}", *said[1:]],
        said,
        [f"Be kind.\n\nWhat?\n{IMAGE}", "A cup."],
        ["What?", "Mine."],
    ]
    assert problem_rows(log) == [str(number) for number in range(4, 10)]
    assert any("system turn" in note for note in log.notes)


@pytest.mark.parametrize("rows", [[{"a": 1}], [[1]], ["x"]], ids=repr)
def test_unknown_formats_are_refused(tmp_path, rows):
    with pytest.raises(DataError, match=r"rows\.json"):
        read(tmp_path, rows)


FORMS = {
    "turns": llava_row("a.png"),
    "lrv": {"image_id": 7, "question": "What?", "answer": "A cup."},
    "mplug_owl": {"image": ["a.png"], "text": "\nHuman: What?\nAI: A cup."},
    "annotated": {
        **dict.fromkeys(("question", "correct_rationale", "incorrect_rationale"), "Words."),
        **{"image": "a.png", "correct_answer": "A.", "confusing_answer": "B.", "gemini_pro_judge": "no"},
    },
    "pairs": {"image": "a.png", "question": "Q?", "chosen": "A.", "rejected": "B."},
    "scienceqa": {"image": "a.png", "question": "Q?", "choices": ["x", "y"], "answer": 1, "hint": "", "solution": ""},
    "aokvqa": {"image_id": 7, "question": "Q?", "choices": ["x", "y"], "correct_choice_idx": 1, "rationales": ["So."]},
}


@pytest.mark.parametrize("others", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_another_form_is_named(tmp_path, form, others):
    rows = [FORMS[others], FORMS[others], FORMS[form]]
    examples, log = read(tmp_path, rows)
    if form == others or {form, others} == {"scienceqa", "aokvqa"}:
        assert log.problems == []
        assert examples[-1].conversation.dataset == read(tmp_path, [FORMS[form]])[0][-1].conversation.dataset
    else:
        assert problem_rows(log) == ["2"]


# Rows of the annotation pipeline.


def annotated(number=0, **changes):
    return {
        "image": "a.png",
        "question": "Is it day?",
        "correct_answer": "Yes",
        "confusing_answer": f"No {number}",
        "correct_rationale": "The sun shines.",
        "incorrect_rationale": f"No lamp is lit {number}.",
        "gemini_pro_judge": "no",
    } | changes


def test_an_annotated_row_is_a_positive_and_a_negative_conversation(tmp_path):
    examples, log = read(tmp_path, [annotated()])
    assert log == ReadLog()
    assert kinds(examples) == ["positive", "negative"]
    positive, negative = texts(examples)
    assert positive[:2] == negative[:2] == [f"{IMAGE}\nIs it day?", "Yes"]
    assert "No 0" in negative[2]
    assert (positive[3], negative[3]) == ("The sun shines.", "No lamp is lit 0.")


def test_an_annotated_answer_may_be_a_number(tmp_path):
    examples, log = read(tmp_path, [annotated(correct_answer=2, confusing_answer=3.5)])
    assert log.problems == []
    assert [row[1] for row in texts(examples)] == ["2", "2"]
    assert "3.5" in texts(examples)[1][2]


def test_a_question_has_one_positive_conversation(tmp_path):
    rows = [annotated(0), annotated(1), annotated(2, question="Why?"), annotated(3), annotated(4, image="b.png")]
    examples, _ = read(tmp_path, rows)
    positive = [(e.image, e.conversation.turns[0].text[8:]) for e in examples if e.conversation.kind == "positive"]
    assert positive == [("a.png", "Is it day?"), ("a.png", "Why?"), ("b.png", "Is it day?")]
    assert kinds(examples).count("negative") == 5


def test_the_judge_keeps_rows_without_contradiction_and_the_others_are_counted(tmp_path):
    kept, dropped = ["no", "No", " NO", "no\n"], ["yes", "", "Not sure", "nothing", None, False, 0, [], ["no"]]
    rows = [annotated(n, gemini_pro_judge=verdict) for n, verdict in enumerate([*kept, *dropped])]
    rows.append(annotated(99))
    del rows[-1]["gemini_pro_judge"]
    path = write_json_rows(tmp_path / "a.json", rows)
    examples, log = read_examples(path)
    assert (kinds(examples), log.problems) == (["positive", *["negative"] * len(kept)], [])
    assert len(log.notes) == 1
    assert f" {len(dropped) + 1} row" in log.notes[0]
    assert kinds(read_examples(path, filtered=False)[0]) == ["positive", *["negative"] * len(rows)]


TEXT_KEYS = ["image", "question", "correct_answer", "confusing_answer", "correct_rationale", "incorrect_rationale"]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_annotated_rows_without_a_text_are_reported(tmp_path, key):
    marked = [annotated(9, **{key: f"see {IMAGE}"})] if key not in ("image", "confusing_answer") else []
    rows = [annotated(), *(annotated(1, **{key: value}) for value in (None, True, ["a"], " ")), *marked, annotated(2)]
    examples, log = read(tmp_path, rows)
    assert kinds(examples) == ["positive", "negative", "negative"]
    assert problem_rows(log) == [str(number) for number in range(1, len(rows) - 1)]
    assert all(key in reason for _, reason in log.problems[:4])
