"""TextVQA: answers normalized as EvalAI does, each of ten people left out in turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.benchmarks.textvqa import TextVqa, question_in, soft_accuracy
from reverie_jax.eval.benchmarks.vqa_normalization import normalize
from tests.eval.benchmarks.makers import SHORT, answer_row, textvqa, textvqa_row, write_json, write_lines
from tests.eval.benchmarks.samples import answer_all, check, headline, ids, load

ROWS = [
    textvqa_row(
        34602, "003a", "what is the brand of this camera?", ["dakota"] * 8 + ["nous les gosses", "clos culombu"]
    ),
    textvqa_row(34603, "0054", "what does the small white text spell?", ["copenhagen"] * 10),
    textvqa_row(34604, "0054", "What color is the sign?", ["blue"] * 3 + ["red"] * 7),
    textvqa_row(34605, "0054", "What color is the sign?", ["red"] * 10),
]
TOKENS = {"003a": "DAKOTA, DIGITAL, Single-Use", "0054": "COPENHAGEN, drupalcon"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("textvqa", textvqa(tmp_path_factory.mktemp("textvqa"), ROWS, TOKENS))


def test_prompts_are_those_of_llava(sample):
    _, loaded = sample
    assert [q.text for q in loaded.questions] == [
        f"{row['question']}\nReference OCR token: {TOKENS[row['image_id']]}\n{SHORT}" for row in ROWS
    ]
    assert ids(loaded) == ["34602", "34603", "34604", "34605"]
    assert [q.cluster for q in loaded.questions] == ["003a", "0054", "0054", "0054"]


def test_tokens_may_come_from_rosetta_or_be_missing(tmp_path):
    data = textvqa(tmp_path, ROWS, TOKENS)
    (data / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert load("textvqa", data)[1].questions[1].text == f"What does the small white text spell?\n{SHORT}"
    rows = [{"image_id": "003a", "ocr_tokens": ["DAKOTA", "x"]}]
    write_json(data / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": rows})
    loaded = load("textvqa", data)[1]
    assert loaded.questions[0].text.splitlines()[1] == "Reference OCR token: DAKOTA, x"
    assert loaded.protocol["ocr tokens"] == "Rosetta v0.2"
    write_json(data / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{**rows[0], "ocr_tokens": [3]}]})
    with pytest.raises(BenchmarkError, match="Rosetta"):
        load("textvqa", data)


def test_rows_of_llava_are_matched_by_image_and_prompt(sample, tmp_path):
    """LLaVA's id is that of the image; two questions in the same words are taken in turn."""
    bench, loaded = sample
    rows = [
        answer_row(row["image_id"], q.text, f"answer {q.id}") for row, q in zip(ROWS, loaded.questions, strict=True)
    ]

    def read(rows):
        return answer_files.read_answers(write_lines(tmp_path / "a.jsonl", rows), bench, loaded)

    expected = {id: f"answer {id}" for id in ids(loaded)}
    assert read(rows) == read([rows[1], rows[2], rows[0], rows[3]]) == expected
    assert read([{**row, "prompt": row["prompt"].replace("token: ", "token: x, ")} for row in rows]) == expected
    other = answer_row("0054", f"who is it?\nReference OCR token: a\n{SHORT}", "x")
    ours = [{"question_id": id, "text": "a"} for id in (34602, 34603, 34604, 34604)]
    for wrong in ([*rows, rows[3]], rows[:3], [*rows[:3], other], ours):
        with pytest.raises(BenchmarkError, match=r"a\.jsonl"):
            read(wrong)


LAYOUTS = [
    "OCR tokens: a, b. Question: What Is it? Short answer:",
    "<image>\nWhat is it?\nReference OCR token: a\nSo.",
    "Reference OCR token: a\nWhat is it?\nSo.",
    "What is it?\nSo.",
]


def test_question_is_found_in_every_layout_of_llava():
    assert {question_in(prompt) for prompt in LAYOUTS} == {"what is it?"}
    for prompt in ("What is it?", "OCR tokens: a", "What\nis\nit?"):
        with pytest.raises(ValueError, match=prompt[:3]):
            question_in(prompt)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": 0, **{word: number for number, word in enumerate(DIGITS)}}
CONTRACTIONS = {"dont": "don't", "cant": "can't", "isnt": "isn't", "whats": "what's", "youre": "you're"}
CONTRACTIONS["oclock"] = "o'clock"


def published_steps(text: str) -> str:
    """Normalize again, without the full table of contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        stripped = stripped.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    kept, dropped = [], 0
    for place, letter in enumerate(stripped):
        # At most 32 full stops go: a flag is passed where the published code expects a number.
        if letter == "." and not stripped[place + 1 : place + 2].isdigit() and dropped < 32:
            dropped += 1
        else:
            kept.append(letter)
    words = [str(NUMBERS.get(word, word)) for word in "".join(kept).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


# Spellings of one answer, and of different ones.
SAME = [
    *[("Dakota", "dakota"), ("The Dakota.", "dakota"), ("a dakota, an digital", "dakota digital"), ("two", "2")],
    *[("twenty-one", "twenty one"), ("1,000", "1000"), ("3.5", "3.5"), ("3.", "3"), ("U.S.A.", "usa"), ("Ten", "10")],
    *[("none", "0"), ("the", ""), ("", "the a an"), ("dont stop", "don't stop"), ("don't", "dont")],
    *[
        ("joe's", "joe 's"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("e-mail - me", "email me"),
        ("stop!", "stop"),
    ],
    *[('"stop"', "stop"), ("stop\nsign", "stop sign"), ("\u505c", "\u505c"), ("what is it?", "what is it")],
]
DIFFERENT = [
    *[("dakota digital", "dakota"), ("3.5", "35"), (".5", "5"), ("eleven", "11"), ("50%", "50"), ("10:30", "1030")],
    *[("**stop**", "stop"), ("'stop'", "stop"), ("Caf\u00e9", "cafe"), ("x" + "." * 40, "x" + "." * 8)],
]


@pytest.mark.parametrize(
    ("one", "other", "same"), [(*pair, True) for pair in SAME] + [(*pair, False) for pair in DIFFERENT], ids=repr
)
def test_spellings_are_the_same_after_normalization(one, other, same):
    assert (published_steps(one) == published_steps(other)) is same
    assert (normalize(one) == normalize(other)) is same


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


@given(st.lists(st.sampled_from(PIECES), max_size=7))
def test_any_answer_is_normalized_by_the_published_steps(pieces):
    text = "".join(pieces)
    assert normalize(text) == published_steps(text)


def scored_answer(answer: str, people: list[str]):
    metadata = {"answers": tuple(map(normalize, people)), "question": "what?"}
    return check(TextVqa(), BenchmarkData([Question(1, None, "what?", "a", metadata)], lambda name: b""), {"1": answer})


@pytest.mark.parametrize("agreed", range(11))
def test_score_is_the_mean_over_people_left_out(agreed):
    """Of those left, three must agree. For 0 to 4 people: 0, .3, .6, .9, 1."""
    people = ["stop"] * agreed + [f"other {n}" for n in range(10 - agreed)]
    left_out = [min(1, sum(word == "stop" for word in people[:n] + people[n + 1 :]) / 3) for n in range(10)]
    assert sum(left_out) / 10 == pytest.approx((0, 0.3, 0.6, 0.9, 1)[min(agreed, 4)])
    scored = scored_answer("Stop.", people)
    assert scored.parsed_answers[0].right == soft_accuracy("stop", people) == pytest.approx(sum(left_out) / 10)
    assert headline(scored) == pytest.approx(10 * sum(left_out))


def test_people_agree_after_normalization():
    people = ["Stop", "stop.", "the stop", "STOP", *"abcdef"]
    assert scored_answer("stop!", people).parsed_answers[0].right == 1.0


def test_headline_is_the_mean_in_percent(sample):
    bench, loaded = sample
    answers = answer_all(loaded, ["Dakota", "Stockholm", "blue", "red"])
    scored = check(bench, loaded, answers)
    assert [parsed.right for parsed in scored.parsed_answers] == pytest.approx([1, 0, 0.9, 1])
    assert headline(scored) == pytest.approx(290 / 4)
