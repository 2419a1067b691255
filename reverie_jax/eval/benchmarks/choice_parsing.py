"""Which option an answer means: the inference of VLMEvalKit and that of lmms-eval, shared by the multiple-choice benchmarks.

Sources: VLMEvalKit's `matching_util.py` (commit e8e78f05), lmms-eval's `mmbench_evals.py` and `mcq_extract.py` (75571cfe).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NONE = "Z"
"""What VLMEvalKit and its judges call none of the options."""

Options = Mapping[str, str]
"""Texts by letter."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_IS = re.compile(r"answer\s+is\s+\**([a-d])", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""VLMEvalKit's sentences that mean none of the options."""


def lines(options: Options) -> str:
    """Options as LLaVA writes them: `A. text`, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def vlmevalkit(answer: str, options: Options) -> str:
    """VLMEvalKit: by letter, else by text. "Z" for none of the options; "" where it cannot be inferred."""
    return _vlmevalkit_letter(answer, options) or _vlmevalkit_text(answer, options)


def _vlmevalkit_letter(answer: str, letters: Collection[str]) -> str:
    """The only option letter among the words, if it is one of the last four. No article is told from option A.

    Else the first "answer is X", where X need not end there and may be small: "the answer is blue" is B.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE
    words = answer.translate(_MARKS).split()
    said = [letter for letter in letters if letter in words]
    if len(said) == 1 and words.index(said[0]) > len(words) - 5:
        return said[0]
    if not said and NONE in words:
        return NONE
    found = _IS.search(answer)
    return found[1].upper() if found and found[1].upper() in letters else ""


def _vlmevalkit_text(answer: str, options: Options) -> str:
    """The only option whose text is part of the answer; nothing where the answer is twice as long as all options."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    return _only_text(answer, options)


def _only_text(answer: str, options: Options) -> str:
    said = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return said[0] if len(said) == 1 else ""


_WRAPPERS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
"""lmms-eval's spellings of a letter that are a word, tried in this order."""


def lmms(answer: str, options: Options) -> str:
    """lmms-eval without a judge (its `static` mode): MMBench's inference, else the extractor that ranks formats."""
    return _lmms_letter(answer) or _only_text(answer, options) or ranked(answer, list(options))


def _lmms_letter(answer: str) -> str:
    """Letters are A to E, whatever the options are. A bare A among more than three words is taken for an article."""
    words = answer.split()
    said = [letter for letter in "ABCDE" if letter in words]
    if len(said) == 1 and not ("A" in words and len(words) > 3):
        return said[0]
    for wrapper in _WRAPPERS:
        said = [letter for letter in "ABCDE" if wrapper.format(letter) in words]
        if len(said) == 1:
            return said[0]
    return ""


_PHRASES = (
    *(
        "answer is",
        "the answer is",
        "correct answer is",
        "the correct answer is",
        "best answer is",
        "the best answer is",
    ),
    *("correct option is", "the correct option is", "best option is", "the best option is"),
    *("choice is", "the choice is", "correct choice is", "the correct choice is", "my answer is", "my choice is"),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_FORMATS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0
"""Ranks of lmms-eval's formats; the highest that is there counts."""


def ranked(answer: str, letters: Sequence[str]) -> str:
    """lmms-eval's extractor: the letter in the format of the highest rank, the last one of several in it.

    Whatever follows a phrase counts as said by it, letters within words too: it hardly ever finds nothing.
    """
    bare = answer.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    text, bare = f" {bare} ", bare.strip()
    small = text.lower()
    after = [small.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in small]
    found: list[tuple[int, int, str]] = []
    for letter in letters:
        found += [
            (rank, text.rfind(form.format(letter)), letter)
            for form, rank in _FORMATS.items()
            if form.format(letter) in text
        ]
        found += [(_PHRASE, text.find(letter, start), letter) for start in after if letter in text[start:]]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_START, 0, letter))
        if bare.endswith(letter) and not bare[:-1][-1:].isalpha():
            found.append((_END, len(text) - 1, letter))
    found = found or [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else ""
