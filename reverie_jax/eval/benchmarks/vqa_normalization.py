"""EvalAI's normalization of answers.

Sources: MMF (c46b3b3, pythia/tasks/processors.py) and LLaVA (llava/eval/m4c_evaluator.py).
Its slips are kept, because published numbers depend on them.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32
"""The largest number that is dropped: EvalAI passes `re.UNICODE`, which is 32, as the number of replacements."""

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}

# Contractions by what EvalAI replaces with them. Those that no answer in lower case can match are omitted.
_CONTRACTIONS = {
    short: long
    for long, shorts in {
        "ain't": "aint",
        "aren't": "arent",
        "can't": "cant",
        "could've": "couldve",
        "couldn't": "couldnt",
        "couldn't've": "couldn'tve couldnt've",
        "didn't": "didnt",
        "doesn't": "doesnt",
        "don't": "dont",
        "hadn't": "hadnt",
        "hadn't've": "hadnt've hadn'tve",
        "hasn't": "hasnt",
        "haven't": "havent",
        "he'd": "hed",
        "he'd've": "hed've he'dve",
        "he's": "hes",
        "how'd": "howd",
        "how'll": "howll",
        "how's": "hows",
        "isn't": "isnt",
        "it'd": "itd",
        "it'd've": "itd've it'dve",
        "it'll": "itll",
        "ma'am": "maam",
        "mightn't": "mightnt",
        "mightn't've": "mightnt've mightn'tve",
        "might've": "mightve",
        "mustn't": "mustnt",
        "must've": "mustve",
        "needn't": "neednt",
        "not've": "notve",
        "o'clock": "oclock",
        "oughtn't": "oughtnt",
        "'ow's'at": "'ows'at",
        "shan't": "shant",
        "she'd've": "shed've she'dve",
        "should've": "shouldve",
        "shouldn't": "shouldnt",
        "shouldn't've": "shouldnt've shouldn'tve",
        "somebodyd": "somebody'd",
        "somebody'd've": "somebodyd've somebody'dve",
        "somebody'll": "somebodyll",
        "somebody's": "somebodys",
        "someone'd": "someoned",
        "someone'd've": "someoned've someone'dve",
        "someone'll": "someonell",
        "someone's": "someones",
        "something'd": "somethingd",
        "something'd've": "somethingd've something'dve",
        "something'll": "somethingll",
        "that's": "thats",
        "there'd": "thered",
        "there'd've": "thered've there'dve",
        "there're": "therere",
        "there's": "theres",
        "they'd": "theyd",
        "they'd've": "theyd've they'dve",
        "they'll": "theyll",
        "they're": "theyre",
        "they've": "theyve",
        "'twas": "twas",
        "wasn't": "wasnt",
        "we'd've": "wed've we'dve",
        "we've": "weve",
        "weren't": "werent",
        "what'll": "whatll",
        "what're": "whatre",
        "what's": "whats",
        "what've": "whatve",
        "when's": "whens",
        "where'd": "whered",
        "where's": "wheres",
        "where've": "whereve",
        "who'd": "whod",
        "who'd've": "whod've who'dve",
        "who'll": "wholl",
        "who's": "whos",
        "who've": "whove",
        "why'll": "whyll",
        "why're": "whyre",
        "why's": "whys",
        "won't": "wont",
        "would've": "wouldve",
        "wouldn't": "wouldnt",
        "wouldn't've": "wouldnt've wouldn'tve",
        "y'all": "yall",
        "y'all'll": "yall'll y'allll",
        "y'all'd've": "yall'd've y'alld've y'all'dve",
        "you'd": "youd",
        "you'd've": "youd've you'dve",
        "you'll": "youll",
        "you're": "youre",
        "you've": "youve",
    }.items()
    for short in shorts.split()
}


def strip_punctuation(text: str) -> str:
    """Drop punctuation as EvalAI does; VLMEvalKit parses yes and no in the result.

    A mark is deleted if it is next to a space somewhere in the text, or if the text has a number with a comma; otherwise it
    becomes a space. Full stops are deleted unless a digit follows. Colons, asterisks and quotes stay.
    """
    number, stripped = _THOUSANDS.search(text) is not None, text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or number else " ")
    return _FULL_STOP.sub("", stripped, count=_FULL_STOPS)


def normalize(answer: str) -> str:
    """Return an answer in lower case, without most punctuation and articles, with small numbers as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
