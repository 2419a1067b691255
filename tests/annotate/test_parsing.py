"""Replies as models really write them: what is understood, what is refused, and never anything in between."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.annotate import parsing
from reverie_jax.annotate.schemas import QuestionSet
from reverie_jax.data import reflection
from reverie_jax.data.reflection import AnnotatedQuestion
from reverie_jax.hosted.interface import Refused

ONE = '{"question": "How many?", "type": "short", "correct_answer": "two", "confusing_answers": ["three"]}'
OTHER = '{"question": "Is it red?", "type": "yes/no", "correct_answer": "Yes", "confusing_answers": ["No"]}'
SEVERAL = '{"question": "How many?", "correct_answer": "two", "confusing_answers": ["three", "four"]}'
HOW_MANY = ("How many?", "short", "two", ["three"])
RED = ("Is it red?", "yes/no", "Yes", ["No"])


def read(text: str, confusing: int = 1) -> list[tuple[str, str, str, list[str]]]:
    found = parsing.questions(text, confusing=confusing)
    return [(one.question, one.type, one.correct_answer, one.confusing_answers) for one in found]


BARE = {
    "one object": (ONE, [HOW_MANY]),
    "a list": (f"[{ONE}, {OTHER}]", [HOW_MANY, RED]),
    "the schema": (f'{{"questions": [{ONE}, {OTHER}]}}', [HOW_MANY, RED]),
    "another name": (f'{{"qa_pairs": [{ONE}]}}', [HOW_MANY]),
    "name and other fields": (f'{{"image": "a cat", "count": 1, "items": [{ONE}]}}', [HOW_MANY]),
    "objects under numbers": (f'{{"1": {ONE}, "2": {OTHER}}}', [HOW_MANY, RED]),
    "white space around": (f"\n\n  {ONE}\t\n", [HOW_MANY]),
    "JSON true and false": ('{"question": "Is it red?", "correct_answer": true, "confusing_answer": false}', [RED]),
    "Python True and False": ("{'question': 'Is it red?', 'correct_answer': True, 'confusing_answer': False}", [RED]),
    "Python list": ("[{'question': 'How many?', 'correct_answer': 'two', 'confusing_answer': 'three'}]", [HOW_MANY]),
    "Python, a trailing comma": ("{'question': 'How many?', 'answer': 'two', 'wrong_answer': 'three',}", [HOW_MANY]),
    "numbers": ('{"question": "How many?", "answer": 2, "wrong_answer": 3}', [("How many?", "short", "2", ["3"])]),
    "a null beside": (
        '{"question": "How many?", "type": null, "correct_answer": "two", "confusing_answer": "three", "id": null}',
        [HOW_MANY],
    ),
    "the original's keys": (
        '[{"question1": "How many?", "correct answer1": "two", "confusing answer1": "three"}]',
        [HOW_MANY],
    ),
    "several groups in one object": (
        '{"question1": "How many?", "correct answer1": "two", "confusing answer1": "three",'
        ' "question2": "Is it red?", "correct answer2": true, "confusing answer2": false}',
        [HOW_MANY, RED],
    ),
    "numbers after an underscore": (
        '{"question_1": "How many?", "correct_answer_1": "two", "confusing_answer_1": "three"}',
        [HOW_MANY],
    ),
    "capitals and spaces": (
        '{"Question": "How many?", "Correct Answer": "two", "Confusing Answer": "three"}',
        [HOW_MANY],
    ),
    "only some keys numbered": (
        # The loopback server's Fault.WRONG_KEYS, which counts as harmless.
        '{"question1": "How many?", "type": "short", "correct answer1": "two", "confusing_answers": ["three"]}',
        [HOW_MANY],
    ),
    "misleading": ('{"question": "How many?", "answer": "two", "misleading_answer": "three"}', [HOW_MANY]),
    "incorrect": ('{"question": "How many?", "answer": "two", "incorrect_answers": ["three"]}', [HOW_MANY]),
    "kinds by another name": (
        '{"question": "How many?", "question_type": "Multiple Choice", "answer": "two", "wrong_answer": "three"}',
        [("How many?", "choice", "two", ["three"])],
    ),
    "an unknown kind": (
        '{"question": "How many?", "type": "counting", "answer": "two", "wrong_answer": "three"}',
        [HOW_MANY],
    ),
    "unicode": (
        '{"question": "Wie viele Äpfel? 🍎", "answer": "zwölf", "wrong_answer": "十二"}',
        [("Wie viele Äpfel? 🍎", "short", "zwölf", ["十二"])],
    ),
    "escaped unicode": (
        '{"question": "\\u4f55\\ud83c\\udf4e?", "answer": "\\u00fc", "wrong_answer": "u"}',
        [("何🍎?", "short", "ü", ["u"])],
    ),
    "line breaks within": (
        '{"question": "Which?\\nA. one\\nB. two", "answer": "A", "wrong_answer": "B"}',
        [("Which?\nA. one\nB. two", "choice", "A", ["B"])],
    ),
    "untidy answers": (
        '{"question": "  How many?  ", "answer": " two\\n", "wrong_answer": [" three ", ""]}',
        [HOW_MANY],
    ),
    "the same question twice": (f"[{ONE}, {ONE}]", [HOW_MANY]),
    "other things in the list": (f'["Here they are:", 3, null, {ONE}, []]', [HOW_MANY]),
    "an unusable one beside": (f'[{{"question": "What?", "correct_answer": "this"}}, {ONE}]', [HOW_MANY]),
}


@pytest.mark.parametrize("name", BARE)
def test_spellings(name: str):
    text, expected = BARE[name]
    assert read(text) == expected


DRESSES = {
    "fence with a tag": "```json\n{}\n```",
    "fence without a tag": "```\n{}\n```",
    "fence in capitals": "```JSON\n{}\n```",
    "fence of Python": "```python\n{}\n```",
    "fence in one line": "```json {} ```",
    "fence that never ends": "```json\n{}",
    "fence after a sentence": "Here is the answer you asked for:\n\n```json\n{}\n```",
    "fence between sentences": "Sure!\n\n```json\n{}\n```\n\nLet me know if you need more (I can do [many] {{kinds}}).",
    "fence with a carriage return": "Sure:\r\n```json\r\n{}\r\n```\r\n",
    "words before": "Here is the answer: {}",
    "words after": "{}\n\nI hope this helps!",
    "words around": "Of course - here it is:\n{}\nAnything else?",
    "a byte-order mark": "\ufeff{}",
}
SHAPES = {
    "an object with one wrong answer": (ONE, [("How many?", "short", "two", ["three"])]),
    "an object with two wrong answers": (SEVERAL, [("How many?", "short", "two", ["three", "four"])]),
    "a list": (f"[{SEVERAL}, {OTHER}]", [("How many?", "short", "two", ["three", "four"]), RED]),
    "the schema": (f'{{"questions": [{SEVERAL}]}}', [("How many?", "short", "two", ["three", "four"])]),
    "Python": (
        "[{'question': 'How many?', 'correct_answer': 'two', 'confusing_answer': 'three', 'sure': True}]",
        [HOW_MANY],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dress", DRESSES)
def test_dresses(dress: str, shape: str):
    text, expected = SHAPES[shape]
    assert read(DRESSES[dress].replace("{{", "{").replace("}}", "}").replace("{}", text), confusing=2) == expected


def test_each_question_in_a_fence_of_its_own():
    """A model that was asked for three questions and writes three blocks has replied in full."""
    assert read(f"First:\n```json\n{ONE}\n```\nSecond:\n```json\n{OTHER}\n```\n") == [HOW_MANY, RED]


REFUSED = {
    "empty": "",
    "blank": " \n\t ",
    "words": "I am sorry, but I cannot help with that.",
    "a page": "<!DOCTYPE html>\n<html><head><title>Error</title></head><body><h1>502</h1></body></html>",
    "null": "null",
    "a number": "42",
    "a string": '"How many? Two."',
    "nothing in a list": "[]",
    "nothing in an object": "{}",
    "no questions": '{"questions": []}',
    "a set, as the original's hint has it": '[{"How many?", "two", "three"}]',
    "a set in a fence": '```json\n[{"How many?", "two", "three"}]\n```',
    "cut off": f'{{"questions": [{ONE}, {{"question": "Is it r',
    "cut off at 60 %": f'{{"questions": [{ONE}]}}'[:60],
    "cut off in a fence": '```json\n{"questions": [{"question": "How ma',
    "no question": '{"correct_answer": "two", "confusing_answer": "three"}',
    "no right answer": '{"question": "How many?", "confusing_answer": "three"}',
    "no wrong answer": '{"question": "How many?", "correct_answer": "two"}',
    "an empty question": '{"question": "  ", "correct_answer": "two", "confusing_answer": "three"}',
    "an empty right answer": '{"question": "How many?", "correct_answer": "", "confusing_answer": "three"}',
    "a null right answer": '{"question": "How many?", "correct_answer": null, "confusing_answer": "three"}',
    "a null wrong answer": '{"question": "How many?", "correct_answer": "two", "confusing_answer": null}',
    "no wrong answers": '{"question": "How many?", "correct_answer": "two", "confusing_answers": []}',
    "wrong is right": '{"question": "How many?", "correct_answer": "two", "confusing_answer": "two"}',
    "wrong is right but for looks": '{"question": "Red?", "correct_answer": "Yes", "confusing_answers": ["yes.", " YES"]}',
    "an object as an answer": '{"question": "How many?", "correct_answer": {"n": 2}, "confusing_answer": "three"}',
    "half a character": '{"question": "How many?", "correct_answer": "\\ud83d", "confusing_answer": "three"}',
    "unknown keys": '{"q": "How many?", "a": "two", "b": "three"}',
    "deep list": "[" * 100_000,
    "deep object": '{"questions":' * 20_000,
    "deep and closed": "[" * 50_000 + "]" * 50_000,
    "deep minus": "-" * 100_000 + "1",
    "deep parentheses": "(" * 10_000 + ")" * 10_000,
    "a long number": "9" * 20_000,
    "code": "__import__('os').system('true')",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(name: str):
    """With a reason of one short line that a table can show."""
    with pytest.raises(Refused) as caught:
        read(REFUSED[name])
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    assert len(reason) < 120


@pytest.mark.parametrize(
    ("asked", "kept"), [(1, ["b"]), (2, ["b", "c"]), (3, ["b", "c", "d"]), (9, ["b", "c", "d", "e"])]
)
@pytest.mark.parametrize(
    "text",
    [
        '{"question": "q", "correct_answer": "a", "confusing_answers": ["b", "A.", "c", "b", "d", "e"]}',
        '{"question": "q", "correct_answer": "a", "confusing_answer1": "b", "confusing_answer2": "c",'
        ' "confusing_answer3": "d", "confusing_answer4": "e"}',
        "{'question': 'q', 'correct_answer': 'a', 'confusing_answers': ('b', 'c', 'd', 'e')}",
    ],
    ids=["a list with the right one and a repeat", "numbered", "a tuple"],
)
def test_as_many_wrong_answers_as_asked(text: str, asked: int, kept: list[str]):
    assert read(text, confusing=asked) == [("q", "short", "a", kept)]


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Is the door open?", "Yes", "yes/no"),
        ("Is the door open?", "no.", "yes/no"),
        ("Is the door open?", "NO", "yes/no"),
        ("Is it?", "None", "short"),
        ("Is it?", "Nobody", "short"),
        ("Which is it? A. a dog B. a cat", "A", "choice"),
        ("Which is it?\nA) a dog\nB) a cat\nC) a cow", "B", "choice"),
        ("Which is it? (A) a dog (B) a cat", "B", "choice"),
        ("Which is it? A: a dog, B: a cat", "A", "choice"),
        ("Which is it?\nA. a dog\nB. a cat", "A. a dog", "choice"),
        ("What is it?", "a dog", "short"),
        ("What is it?", "a dog on a leash", "short"),
        ("What is it?", "a dog that pulls at its leash", "open"),
        ("What does vitamin A do?", "It helps the eyes to see at night.", "open"),
    ],
)
def test_kind_of_a_question_that_says_none(question: str, answer: str, kind: str):
    assert reflection.classify_question(question, answer) == kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Because.", "Because."),
        ("  The dog\nis brown. \n", "The dog\nis brown."),
        ("因为。", "因为。"),
        ('{"a": 1}', '{"a": 1}'),
    ],
)
def test_rationales_are_trimmed_and_otherwise_left_alone(text: str, expected: str):
    assert parsing.rationale(text) == expected


@pytest.mark.parametrize("text", ["", " ", "\n\t\n", "\u00a0"])
def test_an_empty_rationale_is_refused(text: str):
    with pytest.raises(Refused, match="empty"):
        parsing.rationale(text)


NO = [
    "No",
    "no",
    "NO",
    " No",
    " no.",
    "\n\nNo\n",
    "No!",
    "**No**",
    "**No.**",
    "*No*",
    "_No_",
    "__No__",
    '"No"',
    "'no'",
    "(No)",
    "- No",
    "Answer: No",
    "**Answer:** No",
    "Answer:\n\nNo.",
    "Verdict: no",
    "Judgement - No",
    "No, they agree.",
    "No. Both speak of the same dog.",
    "no contradiction",
    "No contradictions were found.",
    "No, the two explanations do not contradict each other.",
]
YES = [
    "Yes",
    " yes",
    "YES!",
    "**Yes**",
    "_Yes_",
    "Answer: Yes",
    "Yes, they contradict each other.",
    "Yes - one says red, the other blue.",
    "Yes.\nThe dog is said to be brown and white.",
    "Yes. One says that there is no cat, the other that there is one.",
    "**Yes**\n\nThere is no way in which both hold.",
]
NEITHER = [
    "",
    "   ",
    "Not sure",
    "Not sure, the analyses differ.",
    "None",
    "Nobody",
    "Nothing",
    "Noted.",
    "Nope-ish",
    "Now",
    "Norway",
    "Yesterday",
    "yesno",
    "N/A",
    "No idea",
    "No idea.",
    "Maybe",
    "Unclear",
    "It depends",
    "I cannot see the picture.",
    "No, not yes",
    "Yes and no",
    "Yes or no?",
    "No/Yes",
    "No\n\nOn second thought: Yes",
    "Yes, because no dog is there.",
    "Nein",
    "Ja",
    "Non",
    "Oui",
    "Sí",
    "Нет",
    "はい",
    "いいえ",
    "<!DOCTYPE html><html><head><title>Error</title></head></html>",
    "42",
]
NOT_A_NO = [
    "No one can tell.",
    "No-one can tell.",
    "No image was provided.",
    "No picture is visible to me, so I cannot judge.",
    "No information is given about the picture.",
    "No comment.",
    "No sé.",
    "No lo sé.",
    "No verdict",
    "No answer",
    "No clear answer",
    "No way to tell",
    "No judgement is possible.",
]
"""They begin with a whole word that looks like a verdict, and are none: to read them as `no` keeps what nobody judged."""


@pytest.mark.parametrize("text", NO)
def test_verdict_no_keeps(text: str):
    assert parsing.verdict(text) == "no"


@pytest.mark.parametrize("text", YES)
def test_verdict_yes_drops(text: str):
    assert parsing.verdict(text) == "yes"


@pytest.mark.parametrize("text", NEITHER)
def test_no_verdict(text: str):
    with pytest.raises(Refused):
        parsing.verdict(text)


@pytest.mark.parametrize("text", NOT_A_NO)
def test_a_no_that_begins_something_else_is_no_verdict(text: str):
    with pytest.raises(Refused):
        parsing.verdict(text)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25).filter(
    lambda text: text == text.strip() and text.strip(" .")
)


def alike(text: str) -> str:
    return text.lower().strip(" .")


@st.composite
def questions(draw: st.DrawFn) -> AnnotatedQuestion:
    right = draw(words)
    wrong = draw(st.lists(words.filter(lambda text: alike(text) != alike(right)), min_size=1, max_size=4, unique=True))
    kind = draw(st.sampled_from(["yes/no", "choice", "short", "open"]))
    return AnnotatedQuestion(question=draw(words), type=kind, correct_answer=right, confusing_answers=wrong)


sets = st.lists(questions(), min_size=1, max_size=4, unique_by=lambda one: one.question).map(
    lambda found: QuestionSet(questions=found)
)
prose = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]{}`"), max_size=40)
FORMS = {
    "JSON": lambda value: json.dumps(value),
    "JSON in Unicode": lambda value: json.dumps(value, ensure_ascii=False),
    "pretty JSON": lambda value: json.dumps(value, indent=4, ensure_ascii=False),
    "Python": repr,
}


@given(made=sets, form=st.sampled_from(sorted(FORMS)), before=prose, after=prose)
@pytest.mark.parametrize(
    "dress", ["{}", "```json\n{}\n```", "```\n{}\n```", "B{}A", "B\n```json\n{}\n```\nA", "B```python\n{}\n```A"]
)
def test_any_set_of_questions_comes_back(dress: str, made: QuestionSet, form: str, before: str, after: str):
    body = FORMS[form](made.model_dump())
    head, _, tail = dress.partition("{}")
    text = head.replace("B", before) + body + tail.replace("A", after)
    assert parsing.questions(text, confusing=4) == made.questions


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str):
    """Nothing but `Refused` is ever raised: a worker that reads a reply cannot die of it."""
    for read_one in (parsing.questions, parsing.rationale, parsing.verdict):
        with contextlib.suppress(Refused):
            read_one(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["question", "question1", "answer", "correct answer1", "confusing_answers", "type", "x", ""]
            ),
            inner,
            max_size=6,
        ),
        max_leaves=20,
    )
)
def test_any_structure_is_read_or_refused(value):
    for text in (json.dumps(value), repr(value)):
        with contextlib.suppress(Refused):
            for one in parsing.questions(text, confusing=2):
                assert one.question.strip()
                assert one.correct_answer.strip()
                assert 1 <= len(one.confusing_answers) <= 2


@pytest.mark.parametrize("text", ["No. Yes.", "Yes.\nNo, wait.", "No.\n\n**Yes**, they do.", "Yes. Actually no."])
def test_a_verdict_taken_back_is_none(text: str):
    with pytest.raises(Refused, match="both"):
        parsing.verdict(text)


def test_latex_commands_survive_a_backslash_that_is_not_doubled():
    asked = (
        r'{"question": "What is $\frac{1}{2} \times 4$?", "correct_answer": "$2 \neq 3$", "confusing_answer": "\rho"}'
    )
    (found,) = parsing.questions(asked.replace("\\\\", "\\"))
    assert found.question == r"What is $\frac{1}{2} \times 4$?"
    assert (found.correct_answer, found.confusing_answers) == (r"$2 \neq 3$", [r"\rho"])
