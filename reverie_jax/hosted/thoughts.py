"""Take the thoughts of a reasoning model apart from its words: the one place for annotation, judges and answer files."""

from __future__ import annotations

import re

_TAG = r"(?:think(?:ing)?|thoughts?|reasoning|analysis|seed:think)"
_MARK = re.compile(
    rf"(?P<open>(?:<|&lt;)\s*{_TAG}\s*(?:>|&gt;)|\[think\]|◁think▷|<\|begin_of_thought\|>|<\|start_thinking\|>"
    r"|<\|inner_prefix\|>|<\|channel>thought)"
    rf"|(?P<close>(?:<|&lt;)\s*/\s*{_TAG}\s*(?:>|&gt;)|\[/think\]|◁/think▷|<\|end_of_thought\|>|<\|end_thinking\|>"
    r"|<\|inner_suffix\|>|<channel\|>)",
    re.IGNORECASE,
)
"""Marks of DeepSeek, Qwen, GLM, Seed (tags), Magistral (brackets), Kimi (triangles), Sky, Command, Apertus and Gemma 4."""
_FINAL = r"<\|channel\|>final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
_CHANNELS = re.compile(
    rf"\s*(?:<\|start\|>assistant)?"
    rf"(?:(?:<\|channel\|>)?analysis(?:<\|message\|>)?(?P<thoughts>.*)(?:{_FINAL}|assistantfinal)|{_FINAL})"
    rf"(?P<words>.*?)(?:<\|return\|>|<\|end\|>)?\s*"
    r"|\s*(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)\b(?P<cut_off>.*)"
    r"|\s*here(?: is|'s) my thought process:(?P<process>.*?)here(?: is|'s) my response:(?P<response>.*)",
    re.DOTALL | re.IGNORECASE,
)
"""Channels of gpt-oss, with their special tokens or without, and cut off; Granite's two headings."""
_RESPONSE = re.compile(r"\s*<\|START_RESPONSE\|>(.*?)(?:<\|END_RESPONSE\|>)?\s*", re.DOTALL)
"""Command's marks around its words."""


def split_thoughts(text: str) -> tuple[str, str]:
    """Return (thoughts, words) of a reply; the text itself is the words if it has no mark of thoughts.

    Blocks may be several, and lack a mark: a text up to a closing mark is thoughts if nothing opened them (chat templates
    often end with the opening one), and so is all after an opening mark at the beginning of a line that nothing closes (the
    reply was cut off).
    """
    if channels := _CHANNELS.fullmatch(text):
        more, words = split_thoughts((channels["words"] or channels["response"] or "").strip())
        return f"{channels['thoughts'] or channels['cut_off'] or channels['process'] or ''}{more}".strip(), words
    if response := _RESPONSE.fullmatch(text):
        return split_thoughts(response[1].strip())
    marks = [mark for mark in _MARK.finditer(text) if not _is_quoted(text, mark)]
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
    if inside:
        return f"{thoughts}{rest}".strip(), words.strip()
    words = f"{words}{rest}".strip()
    response = _RESPONSE.fullmatch(words)
    return thoughts.strip(), response[1].strip() if response else words


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    """Return whether a mark is itself in quotation marks: a text about the mark."""
    before, after = text[: mark.start()][-1:], text[mark.end() :][:2].lstrip("\\")[:1]
    return f"{before}{after}" in ('""', "''", "``", "“”", "‘’", "«»", "「」")
