"""What every rule takes an answer or a judge's reply for: tables, and the published steps written a second time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import choice_parsing, gavie, gqa, hallusionbench, llava_bench, mm_vet, mmhal
from reverie_jax.eval.benchmarks.llava_bench import FAILED
from reverie_jax.eval.benchmarks.object_halbench import extract_objects
from reverie_jax.eval.benchmarks.pope import says_yes
from reverie_jax.eval.benchmarks.scienceqa import official
from reverie_jax.eval.benchmarks.vqa_normalization import normalize
from reverie_jax.eval.benchmarks.yes_no import has_no_verdict
from tests.eval.benchmarks.samples import CARS, answer_all, by_answer

PARSED: dict[tuple[str, ...], dict[Any, list[str]]] = {
    # LLaVA splits on spaces alone; VLMEvalKit deletes only the signs of VQA's scorer.
    ("pope", "official", "lmms-eval", "vlmevalkit"): {
        ("yes", "yes", "yes"): ["Yes", "yes"],
        ("no", "no", "no"): ["No", " No "],
        ("yes", "no", "no"): ["NO", "nO", "\nno\n"],
        ("yes", "", "yes"): ["Yes."],
        ("no", "", "no"): ["No.", ",No", "No no", "no cup", "No, there is not.", "# No"],
        ("yes", "", "no"): ["No!", "(No)", "No;", "No\tway", "No\nThere is none", ".no", "1. No", "Dr. No"],
        ("no", "", ""): ["Yes, there is no doubt.", "Yes, no", "There is not a cup", "I see no cup. Yes"],
        ("no", "", "yes"): ["Yes, but not quite"],
        ("yes", "", ""): [
            *("No\nYes", "There isn't", "cannot", "None", "Nothing", "Not", "", "Yes. No", "nein"),
            *("\u4e0d\u662f", "S\xed", "**No**", "'No'", "No:", "Yes.No"),
        ],
    },
    ("mme", "official", "lmms-eval", "vlmevalkit"): {
        ("yes", "yes", "yes"): ["Yes", "yes.", " Yes", "Yes\nbecause it is"],
        ("no", "no", "no"): ["No", "NO!", "  No", "(No)"],
        ("", "no", "no"): ["   No", "1. No"],
        ("", "yes", "yes"): ["   Yes"],
        ("no", "no", ""): ["Not sure", "None", "Know", "No, yes", "Non"],
        ("yes", "yes", ""): ["Eyes", "Yesterday", "Yes and no"],
        ("", "", "yes"): ["The answer is yes", "1. Yes"],
        ("", "", "no"): ["It is no."],
        ("", "yes", ""): ["y"],
        ("", "no", ""): ["N."],
        ("", "", ""): ["N/A", "", "**Yes**", "S\xed", "\u662f", "Nein"],
    },
    ("amber", "official", "lmms-eval", "vlmevalkit"): {
        ("no", "no", "no"): ["No"],
        ("yes", "yes", "yes"): ["Yes"],
        ("", "no", "no"): ["no", "No.", "No, there is not.", "NO", "There is NO dog"],
        ("", "", ""): [""],
        ("", "no", ""): ["Nothing at all"],
        ("", "yes", ""): ["Oh no, yes"],
    },
    ("hallusionbench", "vlmevalkit"): {
        ("yes",): ["Yes", "Yes.", "The answer is yes!"],
        ("no",): ["no", "No, it is not."],
        ("",): ["Yes and no", "none", "I do not know", "", "Eyes", "S\u00ed", "**Yes**"],
    },
    ("seed", "official", "lmms-eval"): {
        ("A", "A"): ["A"],
        ("", "A"): ["a", "A.", "A. One", "AB", "An owl", "apple", " A"],
        ("", ""): ["(A)", "**A**", "The answer is A", "One", "E", "", "\u7b54 A"],
        ("B", "B"): ["B"],
    },
    # The sample has five choices.
    ("scienceqa", "official", "lmms-eval"): {
        ("A", "A"): ["A", "A. wood. The answer is B."],
        ("E", "E"): ["E"],
        ("", ""): [
            *("F", "b. iron", "BB. iron", "(B)", "B)", "**B**", "iron", "", "Answer: B", "The answer is B"),
            *("The answer is B\n", "the answer is B.", "The answer is b.", "The answer is (B)."),
            *("The answer is B. The answer is C.", "The answer is B. The answer is B."),
            *("The correct answer is B.", "\u7b54\u6848\u662fB", "Die Antwort ist B."),
        ],
        ("", "B"): ["b", " B", "B\n", "B.", "B.iron"],
        ("B", "B"): ["B. ", "B. iron", "B. iron\nand more"],
        ("", "F"): ["F. iron"],
        ("B", ""): [
            *("The answer is B.", "The answer is B!", "The answer is B, since it is iron"),
            *("The answer is Basalt.", "So it is iron. The answer is B."),
        ],
    },
    # What the leaderboard infers for CARS without a judge; "Z" is none of the options.
    ("mmbench", "official"): {
        ("A",): ["A", "A blue truck."],  # the article
        ("B",): [
            *("B.", "(B)", "[B]", "**B**", "# B", "{B}", "B: A blue truck", "B: a blue one", "The answer is B"),
            "B. A blue truck",  # two letters among its tokens, so the text decides
            "It is A BLUE TRUCK, is it not",  # its A is the third of eight tokens, so the text decides
            *("It is a blue truck", "the picture shows a blue truck", "B because it is", "\u7b54\u6848\u662f B"),
            "The correct answer is **B** since one clearly sees that it is blue",
            "it is a blue truck".ljust(74, "."),  # twice the options' text: no text is looked for in longer answers
        ],
        ("C",): ["Antwort: C"],
        ("D",): ["THE ANSWER IS D as everyone can see in it"],
        ("",): [
            "B because I think that it really is B",  # the first of them counts
            *("blue truck", "a red car, a blue truck", "b", "(b)", "'B'", '"B"', "`B`", "A or B", "E", ""),
            *("B\nbecause it is blue", "\u7b54\u6848\u662fB", "it is a blue truck".ljust(75, ".")),
        ],
        ("Z",): [
            *("Z", "None, so Z", "Sorry, I can't help with images of people yet.", "I can't process this file."),
            *("I'm sorry, but without the image provided I cannot tell if B", "Cannot determine the answer"),
        ],
    },
    ("mmbench", "lmms-eval"): {
        ("A",): ["A", "A it is", "A or B"],  # the start of an answer ranks above its end
        ("B",): ["B", "(B)", "B.", ":B", "(B).", "B: so", "a blue truck", "It is a blue truck"],
        ("C",): ["My answer is C", "C\nor so", "so C"],
        # A bare A among more than three words is an article.
        ("D",): ["A dog is there", "The correct answer is D, not A"],
        ("",): ["xyz", ""],
    },
}


def right_word(question: Any) -> str:
    """Return the right answer as rules parse it."""
    metadata = question.metadata
    found = next(metadata[key] for key in ("label", "yes", "truth", "answer") if key in metadata)
    if isinstance(found, bool):
        return "yes" if found else "no"
    return "ABCDE"[found] if isinstance(found, int) else found


def parsing_questions(name: str, loaded: Any) -> Any:
    """Return the questions that a table is about: of MMBench those that show CARS in this order, of AMBER yes or no."""
    keep = {"mmbench": lambda q: str(q.id) == "3", "amber": lambda q: q.metadata["category"] != "generative"}
    return dataclasses.replace(loaded, questions=list(filter(keep.get(name), loaded.questions)))


@pytest.mark.parametrize(
    ("table", "answer"), [(table, answer) for table, groups in PARSED.items() for answer in by_answer(groups)], ids=repr
)
def test_answers_are_parsed_by_each_rule(cases, table, answer):
    name, *rules = table
    case, words = cases(name), by_answer(PARSED[table])[answer]
    loaded = parsing_questions(name, case.loaded)
    for rule, word in zip(rules, words, strict=True):
        parsed_answers = case.bench.score(loaded, answer_all(loaded, answer), rule).parsed_answers
        for question, parsed in zip(loaded.questions, parsed_answers, strict=True):
            if parsed.right is not None:
                # POPE's rule takes a side in any case.
                unparsed = has_no_verdict(answer) if (name, rule) == ("pope", "official") else word == ""
                assert (parsed.parsed, parsed.right) == (word, float(word == right_word(question)))
                assert parsed.unparsed is unparsed


def test_answers_without_a_verdict_are_counted_apart():
    found = {False: ["Yes", "No.", "There is not a cup", "**No**"], True: ["", "a cup", "There isn't"]}
    assert {text: has_no_verdict(text) for text in by_answer(found)} == by_answer(found)


# GQA, by LLaVA's converter: full stops at the end go, then lower case.
GQA = {
    "no": ["no", "No", "NO.", "No..."],
    "dark brown": ["Dark brown", "Dark Brown."],
    "": [
        *("No, it is not", "no!", " no", "no .", "no. ", ".no", "'no'", "**no**", "(no)", "", "not", "no\n", "brown"),
        *("The table is dark brown", "dark  brown", "dark-brown", "a dark brown", "nein", "\u4e0d"),
    ],
}


def test_an_answer_to_gqa_must_be_exactly_the_truth():
    for truth, answers in GQA.items():
        assert {answer for answer in answers if gqa.normalize(answer) in ("no", "dark brown")} == set(
            answers if truth else ()
        )
        assert not truth or set(map(gqa.normalize, answers)) == {truth}


# The published steps, in other words.


def pope_steps(text: str) -> bool:
    first = text[: text.find(".")] if "." in text else text
    return not any(token in ("No", "not", "no") for token in first.replace(",", "").split(" "))


def scienceqa_steps(answer: str) -> str:
    if answer in tuple("ABCDE"):
        return answer
    if len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        return answer[0]
    letters, start = [], "The answer is "
    place = answer.find(start)
    while place >= 0:
        letter, behind = answer[place + 14 : place + 15], answer[place + 15 : place + 16]
        hit = letter.isascii() and letter.isupper() and behind not in ("", "\n")
        letters += [letter] if hit else []
        place = answer.find(start, place + (16 if hit else 1))
    return letters[0] if len(letters) == 1 else ""


def mmbench_steps(answer: str, options: Sequence[str] = CARS) -> str:
    letters = "ABCD"[: len(options)]
    refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.")
    refusals += ("I'm sorry, but without the image provided", "Cannot determine the answer")
    if any(refusal in answer for refusal in refusals):
        return "Z"
    tokens = "".join(" " if sign in ".()[],:;!*#{}" else sign for sign in answer).split()
    named = [letter for letter in letters if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - 4:
        return named[0]
    if not named and "Z" in tokens:
        return "Z"
    lower = answer.lower()
    if len(lower) > 2 * sum(map(len, options)):
        return ""
    held = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in lower]
    return held[0] if len(held) == 1 else ""


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": 0, **{word: number for number, word in enumerate(DIGITS)}}
CONTRACTIONS = {"dont": "don't", "cant": "can't", "isnt": "isn't", "whats": "what's", "youre": "you're"}
CONTRACTIONS["oclock"] = "o'clock"


def textvqa_steps(text: str) -> str:
    """Normalize without the full table of contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = stripped = text.replace("\n", " ").replace("\t", " ").strip()
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


OPTIONS = dict(zip("ABCD", CARS, strict=True))
STEPS = {
    "pope": (says_yes, pope_steps, ["No", "no", "not", "Yes", " ", ".", ",", "\n", "!", "N", "o", "a"]),
    "scienceqa": (
        *(official, scienceqa_steps),
        ["A", "B", "b", ".", " ", "The answer is ", "The answer is B", "(", ")", "\n", "F", "iron", ","],
    ),
    "mmbench": (
        *(lambda text: choice_parsing.vlmevalkit(text, OPTIONS), mmbench_steps),
        ["A", "B", "a", "Z", "It is ", "a blue truck", "a dog", " ", ".", "*", "(", ")", "\n", "so ", "and ", "`"],
    ),
    "textvqa": (
        *(normalize, textvqa_steps),
        [*("a", "the", "Stop", "sign", "two", "dont", "'s", "3"), *' .,-/\n!()?"_'],
    ),
}


@pytest.mark.parametrize("name", STEPS)
@given(data=st.data())
def test_any_text_is_parsed_by_the_published_steps(name, data):
    parse, steps, pieces = STEPS[name]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=8)))
    assert parse(text) == steps(text)


def test_the_leaderboards_table_is_that_of_the_steps():
    for answer, (letter,) in by_answer(PARSED["mmbench", "official"]).items():
        if not re.search("(?i)answer is ", answer):  # the steps lack the search for "answer is X"
            assert mmbench_steps(answer) == letter


# TextVQA: spellings of one answer, and of different ones.
SAME = [
    *[("Dakota", "dakota"), ("The Dakota.", "dakota"), ("a dakota, an digital", "dakota digital"), ("two", "2")],
    *[("twenty-one", "twenty one"), ("1,000", "1000"), ("3.5", "3.5"), ("3.", "3"), ("U.S.A.", "usa"), ("Ten", "10")],
    *[
        ("none", "0"),
        ("the", ""),
        ("", "the a an"),
        ("dont stop", "don't stop"),
        ("don't", "dont"),
        ("joe's", "joe 's"),
    ],
    *[("yes/no", "yes no"), ("yes / no", "yes no"), ("e-mail - me", "email me"), ("stop!", "stop"), ('"stop"', "stop")],
    *[("stop\nsign", "stop sign"), ("\u505c", "\u505c"), ("what is it?", "what is it")],
]
DIFFERENT = [
    *[("dakota digital", "dakota"), ("3.5", "35"), (".5", "5"), ("eleven", "11"), ("50%", "50"), ("10:30", "1030")],
    *[("**stop**", "stop"), ("'stop'", "stop"), ("Caf\u00e9", "cafe"), ("x" + "." * 40, "x" + "." * 8)],
]


@pytest.mark.parametrize("function", [normalize, textvqa_steps])
def test_spellings_are_the_same_after_normalization(function):
    assert [pair for pair in SAME + DIFFERENT if function(pair[0]) == function(pair[1])] == SAME


# Replies of judges.


def gavie_reply(relevancy: Any, accuracy: Any, answer: int = 1) -> str:
    """Fill the official skeleton."""
    return (
        f"Relevancy:\nscore of the answer{answer}: {relevancy}\nreason: it does what is asked, 3 times.\n\n"
        f"Accuracy:\nscore of the answer{answer}: {accuracy}\nreason: 2 of 4 things are right."
    )


REPLIES = {
    # Exactly one of "rating: 0" to "rating: 6" must be in the reply.
    mmhal.rating: {
        0: ["Rating: 0"],
        1: ["Rating: 10", "Overall rating: 1."],
        2: ["rating: 2"],
        3: ["Explanation first.\n\nRating: 3, not informative", "**Rating: 3**", "My rating: 3 of 6"],
        4: ["- Rating: 4", "Rating: 4.5"],
        5: ["Rating: 5", "Rating: 5, I say: Rating: 5", "Rating: 5/6"],
        6: ["RATING: 6"],
        None: [
            *("Rating:5", "Rating: [4]", "Rating:  4", "Rating:\n4", "**Rating:** 4", "Rating is 4", "5", ""),
            *("Score: 5", "Rating: 7", "Rating: -1", "Rating: five", "Rating: 2 or Rating: 5"),
        ],
    },
    # Up to the first space, a number from 0 to 1. The official script asks again for anything else, and then takes 0.
    mm_vet.grade: {
        0.0: ["0", "0.0"],
        0.35: ["0.35"],
        0.5: ["0.5", "0.5\n", "0.5 because it is half"],
        0.7: [".7"],
        1.0: ["1.0", "1"],
        None: [
            *("0.5\nbecause", " 0.5", "", "Correctness: 0.5", "1.1", "-0.1", "5", "0.5.", "0.5|", "50%", "half", "nan"),
        ],
    },
    # The first line, commas to spaces, split at each space: two numbers or nothing.
    llava_bench.scores: {
        (8, 7): ["8 7", "8 7\nBecause it is so: 9 1", "8,7", "8 7.", "8 7\r\nBecause"],
        (8.5, 7): ["8.5 7"],
        FAILED: [
            *("8, 7", "8 7 ", " 8 7", "8  7", "\n8 7", "8\t7", "8 7 6", "8 and 7", "Scores: 8 7", "**8 7**", "[8 7]"),
            *("8/10 7/10", "8", "eight seven", "", "Assistant 1: 8 Assistant 2: 7", "8 inf"),
        ],
    },
    # lmms-eval: the first two numbers.
    llava_bench.first_two: {
        (8, 7): [
            *("8 7\nBecause it is so: 9 1", "8,7", "8, 7", "8 7 ", " 8 7", "8  7", "\n8 7", "8\t7", "8 7 6", "8 and 7"),
            *("Scores: 8 7", "**8 7**", "[8 7]"),
        ],
        (8.5, 7): ["8.5 7"],
        (8, 10): ["8/10 7/10"],
        (1, 8): ["Assistant 1: 8 Assistant 2: 7", "Assistant 1: 8\nAssistant 2: 7"],
        FAILED: ["8", "eight seven", ""],
    },
    hallusionbench.parse_code: {
        0: ["incorrect", "INCORRECT", "The answer is not incorrect, it is correct"],
        1: ["correct", "Correct.", "Not correct", "\u201ccorrect\u201d", "correctness is unclear"],
        2: ["unclear", "", "wrong", "true"],
    },
    lambda reply: tuple(map(gavie.scores(reply).get, ("relevancy", "accuracy"))): {
        (8, 6): [
            *(gavie_reply(8, 6), gavie_reply(8, 6).replace("\n", "\r\n"), gavie_reply(8, 6).upper()),
            "Sure.\n\n" + gavie_reply(8, 6) + "\n\nThat is all, 1.",
            "Accuracy:\nscore of the answer1: 6\nreason: x\n\nRelevancy:\nscore of the answer1: 8\nreason: y",
            "Relevancy:\nScore of the Answer1:8\nReason: y\nAccuracy:\nScore of the Answer1:6\nReason: x",
            # The reason speaks of the other heading.
            "Relevancy:\nscore of the answer1: 8\nreason: its accuracy is another thing\n\n"
            "Accuracy:\nscore of the answer1: 6\nreason: relevancy aside",
        ],
        (0, 10): [gavie_reply(0, 10)],
        (8.5, 6.0): [gavie_reply("8.5", "6.0")],
        (None, None): ["", "8 6", "I cannot score this."],
        (8, None): [
            *("Relevancy:\nscore of the answer1: 8\nreason: cut", gavie_reply(8, 11)),
            gavie_reply(8, 6) + "\n" + gavie_reply(8, 5),
        ],
        (None, 6): [
            *("Accuracy:\nscore of the answer1: 6\nreason: cut", gavie_reply("eight", 6), gavie_reply(85, 6)),
            "Relevancy:\nscore of the answer1:\nreason: 7 of them\n\nAccuracy:\nscore of the answer1: 6\nreason: x",
        ],
    },
    lambda reply: ", ".join(found) if (found := extract_objects(reply)) is not None else None: {
        "dog, kite": ['["dog", "kite"]', '[\n  "dog",\n  "kite"\n]', 'Here they are:\n["dog", "kite"]'],
        "kite, dog": ['["dog"]\n["kite", "dog"]'],  # not JSON as a whole: its last line is
        "": ["[]"],
        None: [
            *("", "dog, kite", "No objects.", '["dog", "kite"', '["dog"]\nThat is all.', "[dog, kite]"),
            *("['dog', 'kite']", "()", '"dog"', '{"objects": ["dog"]}', "3", "null"),
        ],
    },
}
"""What the official parser of each judged benchmark reads in a reply; None for nothing."""


@pytest.mark.parametrize("parse", REPLIES)
def test_replies_are_parsed_as_published(parse):
    found = {reply: parse(reply) for groups in REPLIES[parse].values() for reply in groups}
    assert found == by_answer(REPLIES[parse])
