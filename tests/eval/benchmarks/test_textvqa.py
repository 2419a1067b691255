"""TextVQA: answers normalised as EvalAI does, each of ten people left out in turn."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import SHORT, check, dump, everyone, headline, ids, lines, opened, picture, said

SHOWN = {
    (34602, "003a8ae2ef43b901", "what is the brand of this camera?"): "DAKOTA, DIGITAL, Single-Use",
    (34603, "0054c91397f2fe05", "what does the small white text spell?"): "COPENHAGEN, drupalcon",
    (34604, "0054c91397f2fe05", "What color is the sign?"): "COPENHAGEN, drupalcon",
}


def row(id: int, image: str, question: str, answers: list[str]) -> dict:
    return {
        "question_id": id,
        "image_id": image,
        "question": question,
        "answers": answers,
        "image_width": 1024,
        "image_height": 664,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_classes": ["Camera"],
        "set_name": "val",
    }


ANSWERS = [["dakota"] * 8 + ["nous les gosses", "clos culombu"], ["copenhagen"] * 10, ["blue"] * 3 + ["red"] * 7]


def prompt(key: tuple[int, str, str]) -> str:
    return f"{key[2]}\nReference OCR token: {SHOWN[key]}\nAnswer the question using a single word or phrase."


@pytest.fixture
def data(tmp_path):
    """As LLaVA keeps it: the annotations, its own questions with the words that were read off the picture, pictures."""
    annotations = [row(*key, answers) for key, answers in zip(SHOWN, ANSWERS, strict=True)]
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": annotations}
    dump(tmp_path / "TextVQA_0.5.1_val.json", content)
    made = [
        {"question_id": key[1], "image": f"{key[1]}.jpg", "text": prompt(key), "category": "default"} for key in SHOWN
    ]
    lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", made)
    for _, image, _ in SHOWN:
        picture(tmp_path / "train_images" / f"{image}.jpg")
    return tmp_path


def test_prompt_is_llavas_to_the_character(data):
    _, loaded = opened("textvqa", data)
    assert loaded.questions[0].text == (
        "what is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use\n"
        "Answer the question using a single word or phrase."
    )
    assert [q.text for q in loaded.questions] == [prompt(key) for key in SHOWN]


def test_questions_of_a_picture_are_one_unit_with_ids_of_their_own(data):
    _, loaded = opened("textvqa", data)
    assert len(set(ids(loaded))) == 3
    assert [q.cluster == loaded.questions[1].cluster for q in loaded.questions] == [False, True, True]
    assert all(loaded.read_image(q.image)[:2] == b"\xff\xd8" for q in loaded.questions)


def test_answers_by_llava_are_joined_by_picture_and_question(data, tmp_path):
    """LLaVA's id is the picture's: two questions share it, the prompt tells them apart, in any case of letters."""
    bench, loaded = opened("textvqa", data)
    rows = [said(key[1], prompt(key), f"answer {key[0]}") for key in SHOWN]
    wanted = {str(q.id): f"answer {key[0]}" for q, key in zip(loaded.questions, SHOWN, strict=True)}
    for order in (rows, rows[::-1]):
        assert answer_files.read_answers(lines(tmp_path / "a.jsonl", order), bench, loaded) == wanted
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", [*rows, rows[2]]), bench, loaded)
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", [rows[0], rows[1]]), bench, loaded)
    other = said("0054c91397f2fe05", f"who is it?\nReference OCR token: a\n{SHORT}", "x")
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", [*rows[:2], other]), bench, loaded)


def test_a_question_that_stands_there_twice(data, tmp_path):
    """LLaVA's rows do not tell the two apart, and are taken in turn; ours do, and an id that is repeated is an error."""
    path = data / "TextVQA_0.5.1_val.json"
    content = json.loads(path.read_text())
    content["data"].append({**content["data"][2], "question_id": 34605})
    dump(path, content)
    bench, loaded = opened("textvqa", data)
    keys = [*SHOWN, list(SHOWN)[2]]
    rows = [said(key[1], prompt(key), f"answer {n}") for n, key in enumerate(keys)]
    found = answer_files.read_answers(lines(tmp_path / "a.jsonl", rows), bench, loaded)
    assert found == {"34602": "answer 0", "34603": "answer 1", "34604": "answer 2", "34605": "answer 3"}
    ours = [{"question_id": id, "text": "a"} for id in (34602, 34603, 34604, 34604)]
    with pytest.raises(BenchmarkError, match="34604 stands there twice"):
        answer_files.read_answers(lines(tmp_path / "a.jsonl", ours), bench, loaded)


def test_own_answers_are_joined_by_our_id(data, tmp_path):
    bench, loaded = opened("textvqa", data)
    rows = [{"question_id": q.id, "text": "a"} for q in loaded.questions]
    assert answer_files.read_answers(lines(tmp_path / "a.jsonl", rows), bench, loaded) == everyone(loaded, "a")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"TextVQA_0\.5\.1_val") as error:
        opened("textvqa", tmp_path)
    assert "\n" not in str(error.value)


NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        (0, *range(11)),
        strict=True,
    )
)
CONTRACTIONS = {
    "dont": "don't",
    "cant": "can't",
    "isnt": "isn't",
    "whats": "what's",
    "youre": "you're",
    "oclock": "o'clock",
}


def normal(text: str) -> str:
    """The published steps again, without the full table of contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    done = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        done = done.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    kept, dropped = [], 0
    for place, letter in enumerate(done):
        # At most 32 full stops go: a flag stands where the published code wants a number.
        if letter == "." and not done[place + 1 : place + 2].isdigit() and dropped < 32:
            dropped += 1
        else:
            kept.append(letter)
    words = [str(NUMBERS.get(word, word)) for word in "".join(kept).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


# (answer, another spelling of it, whether they are one after normalising)
SPELLINGS = [
    ("Dakota", "dakota", True),
    ("The Dakota.", "dakota", True),
    ("dakota digital", "dakota", False),
    ("a dakota, an digital", "dakota digital", True),
    ("twenty-one", "twenty one", True),
    ("1,000", "1000", True),
    ("3.5", "35", False),
    ("3.5", "3.5", True),
    ("3.", "3", True),
    (".5", "5", False),
    ("U.S.A.", "usa", True),
    ("two", "2", True),
    ("Ten", "10", True),
    ("none", "0", True),
    ("eleven", "11", False),
    ("the", "", True),
    ("", "the a an", True),
    ("dont stop", "don't stop", True),
    ("don't", "dont", True),
    ("joe's", "joe 's", True),
    ("yes/no", "yes no", True),
    ("yes / no", "yes no", True),
    ("e-mail - me", "email me", True),
    ("stop!", "stop", True),
    ("50%", "50", False),
    ("10:30", "1030", False),
    ('"stop"', "stop", True),
    ("**stop**", "stop", False),
    ("'stop'", "stop", False),
    ("stop\nsign", "stop sign", True),
    ("Caf\u00e9", "cafe", False),
    ("\u505c", "\u505c", True),
    ("what is it?", "what is it", True),
]


def one(folder, answers: list[str]):
    dump(folder / "TextVQA_0.5.1_val.json", {"data": [row(1, "a", "what is it?", answers)]})
    lines(
        folder / "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": "a", "image": "a.jpg", "text": f"what is it?\nReference OCR token: x\n{SHORT}"}],
    )
    bench, loaded = opened("textvqa", folder)
    return bench, loaded, ids(loaded)[0]


@pytest.mark.parametrize(("answer", "other", "same"), SPELLINGS, ids=repr)
def test_spellings_are_one_after_normalising(tmp_path, answer, other, same):
    assert (normal(answer) == normal(other)) is same
    bench, loaded, id = one(tmp_path, [other] * 10)
    assert bench.score(loaded, {id: answer}).parsed_answers[0].right == float(same)
    bench, loaded, id = one(tmp_path, [answer] * 10)
    assert bench.score(loaded, {id: other}).parsed_answers[0].right == float(same)


PIECES = [
    "a",
    "the",
    "Stop",
    "sign",
    "two",
    "dont",
    " ",
    ".",
    ",",
    "-",
    "/",
    "'s",
    "3",
    "\n",
    "!",
    "(",
    ")",
    "?",
    '"',
    "_",
]


@given(st.lists(st.sampled_from(PIECES), max_size=7), st.lists(st.sampled_from(PIECES), max_size=3))
def test_any_answer_is_normalised_by_the_published_steps(tmp_path_factory, pieces, more):
    answer, other = "".join(pieces), "".join(pieces + more)
    bench, loaded, id = one(tmp_path_factory.getbasetemp(), [other] * 10)
    assert bench.score(loaded, {id: answer}).parsed_answers[0].right == float(normal(answer) == normal(other))


def test_no_more_than_32_full_stops_go(tmp_path):
    bench, loaded, id = one(tmp_path, ["x" + "." * 40] * 10)
    assert bench.score(loaded, {id: "x" + "." * 8}).parsed_answers[0].right == 0.0
    assert bench.score(loaded, {id: "x" + "." * 40}).parsed_answers[0].right == 1.0


@pytest.mark.parametrize("agreed", range(11))
def test_share_is_the_mean_over_people_left_out(tmp_path, agreed):
    """Of those left, three must agree. Written out for 0 to 4 people: 0, .3, .6, .9, 1."""
    people = ["stop"] * agreed + [f"other {n}" for n in range(10 - agreed)]
    bench, loaded, id = one(tmp_path, people)
    left_out = [min(1, sum(word == "stop" for word in people[:n] + people[n + 1 :]) / 3) for n in range(10)]
    assert sum(left_out) / 10 == pytest.approx((0, 0.3, 0.6, 0.9, 1)[min(agreed, 4)])
    scored = check(bench, loaded, {id: "Stop."})
    assert scored.parsed_answers[0].right == pytest.approx(sum(left_out) / 10)
    assert headline(scored) == pytest.approx(10 * sum(left_out))


def test_people_agree_after_normalising(tmp_path):
    bench, loaded, id = one(tmp_path, ["Stop", "stop.", "the stop", "STOP", *"abcdef"])
    assert bench.score(loaded, {id: "stop!"}).parsed_answers[0].right == 1.0


def test_empty_answer_earns_nothing_and_no_error(tmp_path):
    bench, loaded, id = one(tmp_path, ["stop"] * 10)
    assert headline(check(bench, loaded, {id: ""})) == 0


def test_headline_is_the_mean_in_percent(data):
    bench, loaded = opened("textvqa", data)
    texts = dict(zip(ids(loaded), ["Dakota", "Stockholm", "blue"], strict=True))
    scored = check(bench, loaded, texts)
    assert [reading.right for reading in scored.parsed_answers] == pytest.approx([1, 0, 0.9])
    assert headline(scored) == pytest.approx(190 / 3)


def test_missing_answer_earns_nothing(data):
    bench, loaded = opened("textvqa", data)
    texts = dict(zip(ids(loaded), ["Dakota", "copenhagen", "blue"], strict=True))
    texts.pop(ids(loaded)[1])
    assert headline(check(bench, loaded, texts)) == pytest.approx(190 / 3)
