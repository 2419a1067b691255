"""Take the thoughts of a reasoning model apart from its words: the one place for annotation, judges and answer files."""

from __future__ import annotations

import re

_TAG = r"(?:think(?:ing)?|thoughts?|reasoning|analysis|seed:think)"
_MARK = re.compile(
    rf"(?P<open><\s*{_TAG}\s*>|\[think\]|◁think▷|<\|begin_of_thought\|>)"
    rf"|(?P<close><\s*/\s*{_TAG}\s*>|\[/think\]|◁/think▷|<\|end_of_thought\|>)",
    re.IGNORECASE,
)
"""Marks of DeepSeek, Qwen, GLM, Gemma, Seed (tags), Magistral (brackets), Kimi (triangles) and Sky (begin, end)."""
_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>assistant)?(?:<\|channel\|>)?analysis(?:<\|message\|>)?(?P<thoughts>.*)"
    r"(?:<\|channel\|>final<\|message\|>|assistantfinal)(?P<words>.*?)(?:<\|return\|>|<\|end\|>)?\s*",
    re.DOTALL,
)
"""Channels of gpt-oss, with their special tokens or without."""


def split_thoughts(text: str) -> tuple[str, str]:
    """Return (thoughts, words) of a reply; the text itself is the words if it has no mark of thoughts.

    Blocks may be several, and lack a mark: a text up to a closing mark is thoughts if nothing opened them (chat templates
    often end with the opening one), and so is all after an opening mark at the beginning of a line that nothing closes (the
    reply was cut off).
    """
    if channels := _CHANNELS.fullmatch(text):
        more, words = split_thoughts(channels["words"].strip())
        return f"{channels['thoughts']}{more}".strip(), words
    marks = list(_MARK.finditer(text))
    last_close = max((mark.start() for mark in marks if mark["close"]), default=-1)
    thoughts, words = "", ""
    inside, position = False, 0
    for mark in marks:
        between = text[position : mark.start()]
        if mark["close"]:
            thoughts += between if inside else f"{words}{between}"
            words = words if inside else ""
            inside, position = False, mark.end()
        elif not inside and (mark.start() < last_close or not between.rpartition("\n")[2].strip()):
            words += between
            inside, position = True, mark.end()
    if not inside and not position:
        return "", text
    rest = text[position:]
    return (f"{thoughts}{rest}".strip(), words.strip()) if inside else (thoughts.strip(), f"{words}{rest}".strip())
