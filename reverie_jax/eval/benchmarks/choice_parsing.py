"""Parsers of the option that an answer means, as VLMEvalKit and lmms-eval infer it for multiple-choice benchmarks.

Sources: VLMEvalKit's `matching_util.py` (commit e8e78f05), lmms-eval's `mmbench_evals.py` and `mcq_extract.py` (75571cfe).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NONE = "Z"
"""VLMEvalKit's letter for none of the options."""

Options = Mapping[str, str]
"""Texts of options by letter."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([a-d])", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""Sentences that VLMEvalKit parses as none of the options."""


def format_options(options: Options) -> str:
    """Return options as LLaVA writes them: `A. text`, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


_LABELED = re.compile(r"(?:^|(?<=\s))(?:\(([A-E])\)|([A-E])[.:)])\s+(.*?)(?=\s+\([A-E]\)\s|\n|$)")
"""An option in a prompt: "A. text" on a line, or "(A) text (B) text" on one."""


def same_options(prompt: str, options: Options) -> bool:
    """Check that no letter stands for another option in a prompt: the answer would be read as that one."""
    shown: dict[str, list[str]] = {}
    for bracketed, plain, text in _LABELED.findall(prompt):
        shown.setdefault(bracketed or plain, []).append(" ".join(text.casefold().split()))
    for letter, text in options.items():
        ours = " ".join(text.casefold().split())
        # A hint may have lists of its own.
        if letter in shown and not any(theirs.startswith(ours) or ours.startswith(theirs) for theirs in shown[letter]):
            return False
    return True


def vlmevalkit(answer: str, options: Options) -> str:
    """Infer as VLMEvalKit, by letter, else by text: "Z" for none of the options, "" for an answer without an option."""
    return _vlmevalkit_letter(answer, options) or _vlmevalkit_text(answer, options)


def _vlmevalkit_letter(answer: str, letters: Collection[str]) -> str:
    """Return the only option letter among the words, if it is one of the last four; an article counts as option A.

    Otherwise the first "answer is X", where X may be the start of a word, in either case: "the answer is blue" is B.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE
    words = answer.translate(_MARKS).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and NONE in words:
        return NONE
    match = _ANSWER_IS.search(answer)
    return match[1].upper() if match and match[1].upper() in letters else ""


def _vlmevalkit_text(answer: str, options: Options) -> str:
    """Return the only option whose text is in the answer, unless the answer is over twice as long as all options."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    return _only_text(answer, options)


def _only_text(answer: str, options: Options) -> str:
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""


_WRAPPERS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
"""Words of a letter that lmms-eval tries, in this order."""


def lmms_eval(answer: str, options: Options) -> str:
    """Infer as lmms-eval without a judge (its `static` mode): by MMBench's inference, else by ranks of formats."""
    return _lmms_eval_letter(answer) or _only_text(answer, options) or ranked(answer, list(options))


def _lmms_eval_letter(answer: str) -> str:
    """Return a letter A to E, whatever the options are. A bare A among more than three words counts as an article."""
    words = answer.split()
    named = [letter for letter in "ABCDE" if letter in words]
    if len(named) == 1 and not ("A" in words and len(words) > 3):
        return named[0]
    for wrapper in _WRAPPERS:
        named = [letter for letter in "ABCDE" if wrapper.format(letter) in words]
        if len(named) == 1:
            return named[0]
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
"""Ranks of lmms-eval's formats; the highest one in an answer counts."""


def ranked(answer: str, letters: Sequence[str]) -> str:
    """Return the letter in the format of the highest rank, the last one of several, as lmms-eval's extractor.

    A letter anywhere after a phrase counts, even within a word, so the extractor rarely returns nothing.
    """
    bare = answer.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    text, bare = f" {bare} ", bare.strip()
    small = text.lower()
    after = [small.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in small]
    candidates: list[tuple[int, int, str]] = []
    for letter in letters:
        candidates += [
            (rank, text.rfind(form.format(letter)), letter)
            for form, rank in _FORMATS.items()
            if form.format(letter) in text
        ]
        candidates += [(_PHRASE, text.find(letter, start), letter) for start in after if letter in text[start:]]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            candidates.append((_START, 0, letter))
        if bare.endswith(letter) and not bare[:-1][-1:].isalpha():
            candidates.append((_END, len(text) - 1, letter))
    candidates = candidates or [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(candidates)[2] if candidates else ""
