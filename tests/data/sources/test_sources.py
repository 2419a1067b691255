"""Annotation files as their authors write them, with every variation that is tolerated, and what is not."""

import json

import pytest

from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.mixture import Mixture
from reverie_jax.data.sources import Pictures, ReadLog, reverie
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import DataError
from tests.data.fakes import png

WHY = "Explain why. Including any necessary facts or knowledge"
WHY_NOT = "Explain why this answer is wrong: {}. Including any necessary facts or knowledge."


def said(*texts, keys=("from", "value"), roles=("human", "gpt"), first=0):
    return [{keys[0]: roles[(n + first) % 2], keys[1]: text} for n, text in enumerate(texts)]


def read(tmp_path, rows, name="rows.json", **options):
    path, reading = tmp_path / name, ReadLog()
    text = "\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else json.dumps(rows)
    path.write_text(text, "utf-8")
    return list(sources.read(path, reading, **options)), reading


def spoken(talks):
    return [[turn.text for turn in talk.conversation.turns] for talk in talks]


# LLaVA.


def test_llava_rows(tmp_path):
    rows = [
        {
            "id": "000000033471",
            "image": "coco/a.jpg",
            "conversations": said(f"{IMAGE}\nWhat?", "A cup.", "Whose?", "Mine."),
        },
        {"id": 7, "image": "a.jpg", "conversations": said(f"What?\n{IMAGE}", "A jug.")},
        {"id": "text", "model": "", "conversations": said("Two and two?", "Four.")},
    ]
    talks, reading = read(tmp_path, rows)
    assert reading == ReadLog()
    assert [talk.image for talk in talks] == ["coco/a.jpg", "a.jpg", ""]
    assert spoken(talks)[0] == [f"{IMAGE}\nWhat?", "A cup.", "Whose?", "Mine."]
    assert talks[2].conversation.images == ()
    assert {talk.conversation.dataset for talk in talks} == {"llava"}
    assert {talk.conversation.kind for talk in talks} == {""}


def test_llava_trainers_habits(tmp_path):
    rows = [
        {"image": "a.jpg", "conversations": said("Hello.", "What?", "A cup.", first=1)},  # an answer to nothing
        {"image": "a.jpg", "conversations": said("What?", "A cup.", "Whose?")},  # a question without an answer
        {"image": "a.jpg", "conversations": said(f"{IMAGE} see {IMAGE}\nWhat?", "A cup.")},  # two markers become one
        {"image": "a.jpg", "conversations": said("What?", "A cup.", f"{IMAGE}\nAnd here?", "A jug.")},  # shown later
    ]
    talks, reading = read(tmp_path, rows)
    assert reading.problems == []
    assert spoken(talks)[:2] == [[f"{IMAGE}\nWhat?", "A cup."]] * 2
    assert spoken(talks)[2][0].count(IMAGE) == 1
    assert spoken(talks)[2][0].startswith(f"{IMAGE}\n")
    assert spoken(talks)[3] == ["What?", "A cup.", f"{IMAGE}\nAnd here?", "A jug."]


def test_json_lines_and_messages(tmp_path):
    keys, roles = ("role", "content"), ("user", "assistant")
    rows = [{"images": ["a.jpg"], "messages": said(f"{IMAGE}What?", "A cup.", keys=keys, roles=roles)}]
    talks, _ = read(tmp_path, rows, "rows.jsonl")
    assert talks[0].image == "a.jpg"
    assert spoken(talks) == [[f"{IMAGE}What?", "A cup."]]


def test_unknown_fields_are_told_once(tmp_path):
    rows = [{"image": "a.jpg", "licence": "x", "conversations": said("What?", "A cup.")}] * 3
    _, reading = read(tmp_path, rows)
    assert reading.notes == ["unknown field 'licence' is not used"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"image": ["a.jpg", "b.jpg"], "conversations": said("What?", "A cup.")}, "2 pictures"),
        ({"conversations": said(f"{IMAGE}\nWhat?", "A cup.")}, "without a picture"),
        ({"image": "a.jpg", "conversations": said("What?", f"A {IMAGE}.")}, "only a user shows"),
        ({"image": "a.jpg", "conversations": said("What?", "A cup.", roles=("human", "human"))}, "alternate"),
        ({"image": "a.jpg", "conversations": said("What?", "A cup.", roles=("human", "bing"))}, "human or gpt"),
        ({"image": "a.jpg", "conversations": []}, "at least two"),
        ("row", "not an object"),
    ],
)
def test_rows_that_cannot_be_used_are_all_named(tmp_path, row, why):
    good = {"image": "a.jpg", "conversations": said("What?", "A cup.")}
    talks, reading = read(tmp_path, [good, row, good, row])
    assert len(talks) == 2
    assert [where for where, _ in reading.problems] == [f"{tmp_path / 'rows.json'}: row {n}" for n in (1, 3)]
    assert all(why in reason for _, reason in reading.problems)
    with pytest.raises(DataError, match=r"row 1: .*; 1 more rows"):
        reading.settle()


# REVERIE.


def reflective(image="vg/VG_100K/1.jpg", asked=f"{IMAGE}\nWhat?", answer="A cup.", prompt=WHY, why="It has a handle."):
    return {"id": 1, "image": image, "conversations": said(asked, answer, prompt, why)}


@pytest.mark.parametrize(
    ("prompt", "kind", "quoted"),
    [
        (WHY, "positive", ""),
        ("Explain why.", "positive", ""),
        ("explain why", "positive", ""),
        (WHY_NOT.format("A jug."), "negative", "A jug."),
        (WHY_NOT.format("a jug"), "negative", "a jug"),
        ("Explain why this answer is wrong: No", "negative", "No"),
        ("Explain why this is incorrect: a jug", "negative", "a jug"),
        ("explain why the answer is incorrect: a\njug", "negative", "a\njug"),
    ],
)
def test_prompts_say_the_kind(tmp_path, prompt, kind, quoted):
    assert reverie.explains(prompt) == (kind, quoted)
    talks, reading = read(tmp_path, [reflective(prompt=prompt)])
    assert reading.problems == []
    assert [talk.conversation.kind for talk in talks] == [kind]
    assert {talk.conversation.dataset for talk in talks} == {"reverie"}


def test_a_row_of_another_kind_is_named(tmp_path):
    rows = [reflective(), reflective(), reflective(prompt="And what else?")]
    talks, reading = read(tmp_path, rows)
    assert len(talks) == 2
    assert reading.problems == [
        (f"{tmp_path / 'rows.json'}: row 2", "asks for no rationale that is known: 'And what else?'")
    ]


def test_llava_rows_of_four_turns_are_no_reflections(tmp_path):
    rows = [reflective(prompt="And what else?")] * 3 + [reflective(prompt="Explain why it is red.")]
    talks, reading = read(tmp_path, rows)
    assert (len(talks), reading.problems) == (4, [])
    assert {talk.conversation.kind for talk in talks} == {""}


def test_negative_rows_that_open_with_the_wrong_answer(tmp_path):
    wrong = reflective(answer="A jug.", prompt=WHY_NOT.format("A jug."), why="No spout.")
    talks, reading = read(tmp_path, [wrong, reflective(), reflective(image="other.jpg")])
    assert spoken(talks)[0][1] == "A cup."
    (note,) = reading.notes
    assert note.startswith("1 negative rows opened with the wrong answer")
    _, reading = read(tmp_path, [wrong])
    assert "no row has the right one" in reading.problems[0][1]


def test_six_turns_become_two_conversations(tmp_path):
    keys, roles = ("role", "content"), ("user", "assistant")
    texts = (f"{IMAGE}What?", "A cup.", "Explain why", "A handle.", "Explain why this is incorrect: a jug", "No spout.")
    talks, reading = read(tmp_path, [{"images": ["a.jpg"], "messages": said(*texts, keys=keys, roles=roles)}])
    assert reading.problems == []
    assert spoken(talks) == [list(texts[:4]), [*texts[:2], *texts[4:]]]
    assert [talk.conversation.kind for talk in talks] == ["positive", "negative"]


@pytest.mark.parametrize(
    ("teach", "expected"),
    [
        ("rationales", [("A cup.", 1, "It has a handle."), ("A cup.", 0, "No spout.")]),
        ("positive", [("A cup.", 1, "It has a handle.")]),
        ("negative", [("A cup.", 1, None), ("A cup.", 0, "No spout.")]),
        ("responses", [("A cup.", 1, None)]),
    ],
)
def test_arms_of_the_ablation(tmp_path, teach, expected):
    rows = [reflective(), reflective(prompt=WHY_NOT.format("A jug"), why="No spout.")]
    talks, _ = read(tmp_path, rows)
    kept = Supervision(teach)([talk.conversation for talk in talks])
    found = [(k.turns[1].text, k.turns[1].weight, k.turns[3].text if len(k.turns) > 2 else None) for k in kept]
    assert found == expected


# LRV.


def test_lrv_rows(tmp_path):
    rows = [
        {"image_id": "2373555", "question": " Is there a dog? ", "answer": "There is no dog.", "task": "negative"},
        {"image_id": 7, "question": "What?", "answer": "A cup at (1, 2).", "task": "attribute detection"},
        {"image_id": "vg/9.png", "instruction": "Describe.", "answer": "A cup."},
        {"image_id": "9", "question": "", "answer": "A cup."},
        {"question": "What?", "answer": "A cup."},
    ]
    talks, reading = read(tmp_path, rows)
    assert [talk.image for talk in talks] == ["2373555.jpg", "7.jpg", "vg/9.png"]
    assert [talk.conversation.kind for talk in talks] == ["negative", "", ""]
    assert spoken(talks)[0] == [f"{IMAGE}\nIs there a dog?", "There is no dog."]
    assert [where[-1] for where, _ in reading.problems] == ["3", "4"]


@pytest.mark.parametrize("rows", [[{"a": 1}], [[1]], ["x"]], ids=repr)
def test_files_of_no_known_form(tmp_path, rows):
    with pytest.raises(DataError, match=r"rows\.json: rows of no known form"):
        read(tmp_path, rows)


# Pictures, and several files.


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    for name in ("a.png", "vg/VG_100K/1.jpg", "x/2.jpg", "y/2.jpg"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(png())
    return place


def test_names_with_other_folders_before_them(folder):
    pictures = Pictures(folder)
    assert pictures.find("vg/VG_100K/1.jpg") == pictures.find("1.jpg") == pictures.find("VG_100K/1.jpg")
    assert pictures.find("x/2.jpg") != pictures.find("y/2.jpg")
    with pytest.raises(DataError, match="2 files have that name"):
        pictures.find("2.jpg")
    with pytest.raises(DataError, match="No such file"):
        pictures.find("3.jpg")


def test_one_record_for_what_several_files_say_about_a_picture(tmp_path, folder):
    one, _ = read(tmp_path, [reflective("1.jpg"), reflective("a.png")], "one.json")
    two, _ = read(
        tmp_path,
        [
            {"image": "vg/VG_100K/1.jpg", "conversations": said("Who?", "Me.")},
            {"conversations": said("Two and two?", "Four.")},
        ],
        "two.json",
    )
    pictures = Pictures(folder)
    found = list(Mixture([(one, pictures, None, 1), (two, Pictures(folder), None, 1)]))
    assert [(record.id, len(record.conversations), bool(record.image)) for record in found] == [
        ("1.jpg", 2, True),
        ("a.png", 1, True),
        (f"{tmp_path / 'two.json'}: row 1", 1, False),
    ]
    assert [talk.dataset for talk in found[0].conversations] == ["reverie", "llava"]


def test_equal_names_in_two_folders_are_two_pictures(tmp_path, folder):
    other = tmp_path / "others"
    other.mkdir()
    (other / "a.png").write_bytes(png((1, 2, 3)))
    talks, _ = read(tmp_path, [reflective("a.png")])
    found = list(Mixture([(talks, Pictures(folder), None, 1), (talks, Pictures(other), None, 1)]))
    assert len({record.id for record in found}) == 2
    assert [record.image for record in found] == [png(), png((1, 2, 3))]


def test_pictures_without_a_folder_are_asked_for(tmp_path):
    talks, _ = read(tmp_path, [reflective()])
    with pytest.raises(DataError, match="name the folder of pictures"):
        list(Mixture([(talks, None, None, 1)]))
