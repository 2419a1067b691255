"""Replies as models write them: parsed, or refused with a reason, and nothing else."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.annotate import parsing
from reverie_jax.annotate.schemas import QuestionSet
from reverie_jax.data.reflection import AnnotatedQuestion, classify_question
from reverie_jax.hosted.interface import UnusableError

ONE = '{"question": "How many?", "type": "short", "correct_answer": "two", "confusing_answers": ["three"]}'
OTHER = '{"question": "Is it red?", "type": "yes/no", "correct_answer": "Yes", "confusing_answers": ["No"]}'
SEVERAL = '{"question": "How many?", "correct_answer": "two", "confusing_answers": ["three", "four"]}'
HOW_MANY = ("How many?", "short", "two", ["three"])
RED = ("Is it red?", "yes/no", "Yes", ["No"])


def parse(text: str, max_confusing: int | None = None) -> list[tuple[str, str, str, list[str]]]:
    questions = parsing.parse_questions(text, max_confusing=max_confusing)
    return [(q.question, q.type, q.correct_answer, q.confusing_answers) for q in questions]


def spelled(question: str, right: str, wrong: str, start: str = "", end: str = "") -> str:
    """Return a question with keys of some spelling."""
    return f'{{"{question}": "How many?", "{right}": "two", "{wrong}": "three"{start}}}{end}'


SPELLINGS = [
    (ONE, [HOW_MANY]),
    (f"[{ONE}, {OTHER}]", [HOW_MANY, RED]),
    (f'{{"questions": [{ONE}, {OTHER}]}}', [HOW_MANY, RED]),
    (f'{{"image": "a cat", "count": 1, "items": [{ONE}]}}', [HOW_MANY]),
    (f'{{"1": {ONE}, "2": {OTHER}}}', [HOW_MANY, RED]),
    ('{"question": "Is it red?", "correct_answer": true, "confusing_answer": false, "id": null}', [RED]),
    ("{'question': 'Is it red?', 'correct_answer': True, 'confusing_answer': False}", [RED]),
    ("{'question': 'How many?', 'answer': 'two', 'wrong_answer': 'three',}", [HOW_MANY]),
    ('{"question": "How many?", "answer": 2, "wrong_answer": 3}', [("How many?", "short", "2", ["3"])]),
    (spelled("question1", "correct answer1", "confusing answer1"), [HOW_MANY]),  # as in the original prompt
    (
        '{"question1": "How many?", "correct answer1": "two", "confusing answer1": "three",'
        ' "question2": "Is it red?", "correct answer2": true, "confusing answer2": false}',
        [HOW_MANY, RED],
    ),
    (spelled("question_1", "correct_answer_1", "confusing_answer_1"), [HOW_MANY]),
    (spelled("Question", "Correct Answer", "Confusing Answer"), [HOW_MANY]),
    (spelled("question1", "correct answer1", "confusing_answers"), [HOW_MANY]),
    (spelled("question", "answer", "misleading_answer"), [HOW_MANY]),
    (spelled("question", "right_answer", "incorrect_answers"), [HOW_MANY]),
    (
        spelled("question", "answer", "wrong_answer", ', "question_type": "Multiple Choice"'),
        [("How many?", "choice", "two", ["three"])],
    ),
    (spelled("question", "answer", "wrong_answer", ', "type": "counting"'), [HOW_MANY]),
    (
        '{"question": "\\u4f55\\ud83c\\udf4e? Äpfel 🍎", "answer": "zwölf", "wrong_answer": "十二"}',
        [("何🍎? Äpfel 🍎", "short", "zwölf", ["十二"])],
    ),
    (
        '{"question": "Which?\\nA. one\\nB. two", "answer": "A", "wrong_answer": "B"}',
        [("Which?\nA. one\nB. two", "choice", "A", ["B"])],
    ),
    ('{"question": "  How many?  ", "answer": " two\\n", "wrong_answer": [" three ", ""]}', [HOW_MANY]),
    (f"[{ONE}, {ONE}]", [HOW_MANY]),
    (f'["Here they are:", 3, null, {ONE}, []]', [HOW_MANY]),
    (f'[{{"question": "What?", "correct_answer": "this"}}, {ONE}]', [HOW_MANY]),
    (f"First:\n```json\n{ONE}\n```\nSecond:\n```json\n{OTHER}\n```\n", [HOW_MANY, RED]),
]


@pytest.mark.parametrize(("text", "expected"), SPELLINGS)
def test_spellings(text, expected):
    assert parse(text) == expected


BAD = {
    "question": ["  ", None],
    "correct_answer": [None, {"n": 2}, "\ud83d", "Three.", " THREE"],
    "confusing_answers": [None, []],
}
REFUSED = [
    *(json.dumps(json.loads(ONE) | {key: value}) for key, values in BAD.items() for value in values),
    *(json.dumps({key: value for key, value in json.loads(ONE).items() if key != missing}) for missing in BAD),
    "",
    " \n\t ",
    "I am sorry, but I cannot help with that.",
    "<!DOCTYPE html>\n<html><head><title>Error</title></head><body><h1>502</h1></body></html>",
    "null",
    "42",
    '"How many? Two."',
    "[]",
    "{}",
    '{"questions": []}',
    '```json\n[{"How many?", "two", "three"}]\n```',  # a set, as in the original prompt
    f'{{"questions": [{ONE}, {{"question": "Is it r',
    '```json\n{"questions": [{"question": "How ma',
    '{"q": "How many?", "a": "two", "b": "three"}',
    "[" * 100_000,
    '{"questions":' * 20_000,
    "[" * 50_000 + "]" * 50_000,
    "-" * 100_000 + "1",
    "(" * 10_000 + ")" * 10_000,
    "9" * 20_000,
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_unusable_questions_are_refused_with_a_short_reason(text):
    with pytest.raises(UnusableError) as caught:
        parse(text)
    assert 0 < len(str(caught.value)) < 120
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [1, 2, 3, None])
@pytest.mark.parametrize(
    "text",
    [
        '{"question": "q", "correct_answer": "a", "confusing_answers": ["b", "A.", "c", "b", "d", "e"]}',
        '{"question": "q", "correct_answer": "a", "confusing_answer1": "b", "confusing_answer2": "c",'
        ' "confusing_answer3": "d", "confusing_answer4": "e"}',
        "{'question': 'q', 'correct_answer': 'a', 'confusing_answers': ('b', 'c', 'd', 'e')}",
    ],
)
def test_most_wrong_answers(text, limit):
    """The right answer among them, and repeats, do not count."""
    assert parse(text, limit) == [("q", "short", "a", ["b", "c", "d", "e"][:limit])]


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Is the door open?", "Yes", "yes/no"),
        ("Is the door open?", "no.", "yes/no"),
        ("Is it?", "None", "short"),
        ("Is it?", "Nobody", "short"),
        ("Which is it? A. a dog B. a cat", "A", "choice"),
        ("Which is it?\nA) a dog\nB) a cat\nC) a cow", "B", "choice"),
        ("Which is it? (A) a dog (B) a cat", "B", "choice"),
        ("Which is it? A: a dog, B: a cat", "A", "choice"),
        ("Which is it?\nA. a dog\nB. a cat", "A. a dog", "choice"),
        ("What is it?", "a dog on a leash", "short"),
        ("What is it?", "a dog that pulls at its leash", "open"),
        ("What does vitamin A do?", "It helps the eyes to see at night.", "open"),
    ],
)
def test_type_of_a_question_without_one(question, answer, kind):
    assert classify_question(question, answer) == kind


def test_rationales_are_stripped_and_otherwise_left_alone():
    """But for what can be neither stored nor trained on."""
    assert parsing.parse_rationale("  The dog\nis brown. 因为 \n") == "The dog\nis brown. 因为"
    for boxed in ("<response>It is red.</response>", "```text\nIt is red.\n```"):
        assert parsing.parse_rationale(boxed) == "It is red."
    assert parsing.parse_rationale("```\na\n``` and ```\nb\n```").count("```") == 4
    assert parsing.parse_rationale('{"a": 1}') == '{"a": 1}'
    assert parsing.parse_rationale("In the <image> it is\ud83d red.") == "In the image it is red."
    for text in ("", " ", "\n\t\n", "\u00a0"):
        with pytest.raises(UnusableError):
            parsing.parse_rationale(text)


VERDICTS = {
    "no": r"""No|no|NO| No| no.|\n\nNo\n|No!|**No**|**No.**|*No*|_No_|__No__|"No"|'no'|(No)|- No|Answer: No|**Answer:** No
<answer>No</answer>|<response>\nNo\n</response>|```text\nNo\n```
Answer:\n\nNo.|Verdict: no|Judgement - No|No, they agree.|No. Both speak of the same dog.|no contradiction
No contradictions were found.|No, the two explanations do not contradict each other.""",
    "yes": r"""Yes| yes|YES!|**Yes**|_Yes_|Answer: Yes|Yes, they contradict each other.|Yes - one says red, the other blue.
Yes.\nThe dog is said to be brown and white.|Yes. One says that there is no cat, the other that there is one.
**Yes**\n\nThere is no way in which both hold.""",
    "neither": r"""|   |Not sure|Not sure, they differ.|None|Nobody|Nothing|Noted.|Nope-ish|Now|Norway|Yesterday|yesno
N/A|No idea|No idea.|Maybe|Unclear|It depends|I cannot see the picture.|No, not yes|Yes and no|Yes or no?|No/Yes
No\n\nOn second thought: Yes|Yes, because no dog is there.|Nein|Ja|Non|Oui|Sí|Нет|はい|いいえ|42
<!DOCTYPE html><html><head><title>Error</title></head></html>|No one can tell.|No-one can tell.|No image was provided.
No picture is visible to me, so I cannot judge.|No information is given about the picture.|No comment.|No sé.|No lo sé.
No verdict|No answer|No clear answer|No way to tell|No judgement is possible.|No. Yes.|Yes.\nNo, wait.
No.\n\n**Yes**, they do.|Yes. Actually no.""",
}


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (verdict, text)
        for verdict, lines in VERDICTS.items()
        for text in lines.replace("\n", "|").replace(r"\n", "\n").split("|")
    ],
)
def test_verdicts(verdict, text):
    """Whole words, first in the reply; what begins with another word, or is revoked, is not a verdict."""
    if verdict == "neither":
        with pytest.raises(UnusableError):
            parsing.parse_verdict(text)
    else:
        assert parsing.parse_verdict(text) == verdict


def test_latex_commands_survive_a_backslash_that_is_not_doubled():
    text = '{"question": "What is $\\frac{1}{2} \\times 4$?", "correct_answer": "$2 \\neq 3$", "confusing_answer": "\\rho"}'
    (question,) = parsing.parse_questions(text)
    assert question.question == r"What is $\frac{1}{2} \times 4$?"
    assert (question.correct_answer, question.confusing_answers) == (r"$2 \neq 3$", [r"\rho"])


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25).filter(
    lambda text: text == text.strip() and text.strip(" .")
)


@st.composite
def questions(draw: st.DrawFn) -> AnnotatedQuestion:
    right = draw(words)
    different = words.filter(lambda text: text.lower().strip(" .") != right.lower().strip(" ."))
    wrong = draw(st.lists(different, min_size=1, max_size=4, unique=True))
    kind = draw(st.sampled_from(["yes/no", "choice", "short", "open"]))
    return AnnotatedQuestion(question=draw(words), type=kind, correct_answer=right, confusing_answers=wrong)


sets = st.lists(questions(), min_size=1, max_size=4, unique_by=lambda q: q.question).map(
    lambda found: QuestionSet(questions=found)
)
prose = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]{}`"), max_size=40)
FORMS = {
    "JSON": json.dumps,
    "JSON in Unicode": lambda value: json.dumps(value, ensure_ascii=False),
    "pretty JSON": lambda value: json.dumps(value, indent=4, ensure_ascii=False),
    "Python": repr,
}
AROUND = [
    "{}",
    "\n\n  {}\t\n",
    "\ufeff{}",
    "```json\n{}\n```",
    "```\n{}\n```",
    "```JSON\n{}\n```",
    "```json {} ```",
    "```json\n{}",
]
AROUND += ["B{}A", "B\n```json\n{}\n```\nA (I can do [many] {kinds}).", "B\r\n```python\r\n{}\r\n```\r\nA"]


SHAPES = st.sampled_from(["object", "list", "one"])


@given(sets, SHAPES, st.sampled_from(sorted(FORMS)), st.sampled_from(AROUND), prose, prose)
def test_any_set_of_questions_comes_back(value, shape, form, around, before, after):
    rows = value.model_dump()["questions"]
    content = {"object": {"questions": rows}, "list": rows, "one": rows[0]}[shape]
    head, _, tail = around.partition("{}")
    text = head.replace("B", before) + FORMS[form](content) + tail.replace("A", after)
    assert parsing.parse_questions(text) == value.questions[: 1 if shape == "one" else None]


names = st.sampled_from(["question", "question1", "answer", "correct answer1", "confusing_answers", "type", "x", ""])
values = st.recursive(
    st.sampled_from([None, True, 7, 0.5, float("nan"), "yes", "[", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6),
    max_leaves=6,
)


@given(values, st.text(max_size=60))
def test_anything_is_parsed_or_refused(value, other):
    """No other exception can stop a worker."""
    for text in (json.dumps(value), repr(value), other):
        for parse_any in (parsing.parse_rationale, parsing.parse_verdict, parsing.parse_instructions):
            with contextlib.suppress(UnusableError):
                parse_any(text)
        with contextlib.suppress(UnusableError):
            for question in parsing.parse_questions(text, max_confusing=2):
                assert question.question.strip()
                assert question.correct_answer.strip()
                assert 1 <= len(question.confusing_answers) <= 2
