"""Take the thoughts of a reasoning model apart from its words: the one place for annotation, judges and answer files."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TAG = r"(?:(?:ant_?)?think(?:ing)?|thoughts?|thought_?process|inner_?monologue|scratch_?pad|reasoning|analysis|seed:think)"
_REASONING = r"""\btype\s*=\s*(?:["']|&quot;|&\#39;)?reasoning\b"""
_MARK = re.compile(
    rf"(?P<open>(?:<|&lt;)\s*{_TAG}\s*(?:>|&gt;)|\[think\]|◁think▷|<\|begin_of_thought\|>|<\|start_thinking\|>"
    r"|<\|inner_prefix\|>|<\|channel>thought"
    rf"|(?P<details><details\b[^<>]*{_REASONING}[^<>]*>|&lt;details\b[^<>]*?{_REASONING}[^<>]*?&gt;))"
    rf"|(?P<close>(?:<|&lt;)\s*/\s*{_TAG}\s*(?:>|&gt;)|\[/think\]|◁/think▷|<\|end_of_thought\|>|<\|end_thinking\|>"
    r"|<\|inner_suffix\|>|<channel\|>|(?P<end_details>(?:<|&lt;)/details\s*(?:>|&gt;)))",
    re.IGNORECASE,
)
"""Marks of DeepSeek, Qwen, GLM, Hunyuan, EXAONE, Seed (tags), Magistral (brackets), Kimi (triangles), Sky, Command, Apertus,
Gemma 4, and Open WebUI's `details`."""
_FINAL = r"<\|channel\|>final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
_THINKING = r"[*_]*thinking(?:\.\.\.|…)[*_]*[ \t]*\n"
_WHOLE = (
    # gpt-oss's channels, with their special tokens or without, and cut off.
    rf"(?:<\|start\|>assistant)?(?:(?:<\|channel\|>)?analysis(?:<\|message\|>)?(?P<thoughts>.*)(?:{_FINAL}|assistantfinal)"
    rf"|{_FINAL})(?P<words>.*?)(?:<\|return\|>|<\|end\|>)?\s*",
    r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)\b(?P<thoughts>.*)(?P<words>)",
    # Granite's two headings, Apriel's (also cut off).
    r"here(?: is|'s) my thought process:(?P<thoughts>.*?)here(?: is|'s) my response:(?P<words>.*)",
    r"here are my reasoning steps:(?P<thoughts>.*?)"
    r"(?:\[begin final response\](?P<words>.*?)(?:\[end final response\].*)?|\Z)",
    # LLaVA-CoT's four parts, also cut off.
    r"<summary>(?P<thoughts>.*?</summary>\s*<caption>.*?)(?:<conclusion>(?P<words>.*?)(?:</conclusion>\s*)?|\Z)",
    # Ollama's command, Poe's quotation, LibreChat's container, a fence.
    _THINKING + r"(?P<thoughts>.*?)\n\s*(?:\.\.\.|…)done thinking\.(?P<words>.*)",
    _THINKING + r"\s*(?P<thoughts>(?:[ \t]*>[^\n]*(?:\n\s*|\Z))+)(?P<words>.*)",
    r":::[ \t]*thinking[ \t]*\n(?P<thoughts>.*?)\n:::[ \t]*(?:\n(?P<words>.*)|\Z)",
    r"```(?:think(?:ing)?|thoughts?|reasoning)[ \t]*\n(?P<thoughts>.*?)\n```[ \t]*(?:\n(?P<words>.*)|\Z)",
)
"""Forms of a whole reply."""
_FORMS = [re.compile(rf"\s*(?:{form})", re.DOTALL | re.IGNORECASE) for form in _WHOLE]
_TOKENS = r"<\|start_response\|>(.*?)(?:<\|end_response\|>)?", r"<\|begin_of_(box|solution)\|>(.*?)(?:<\|end_of_\1\|>)?"
_TAGS = r"<(answer|response|output|final|final_answer|conclusion)>(.*?)(?:</\1>)?"
_BOXES = [re.compile(rf"\s*{box}\s*", re.DOTALL | re.IGNORECASE) for box in (*_TOKENS, _TAGS)]
"""Marks around the words: special tokens of Command, GLM and Sky; and tags, which are words unless thoughts come before."""
_QUOTES = ('""', "''", "``", "“”", "‘’", "«»", "「」", "()")


def split_thoughts(text: str) -> tuple[str, str]:
    """Return (thoughts, words) of a reply; the text itself is the words if it has no mark of thoughts.

    Blocks may be several, and lack a mark: a text up to a closing mark is thoughts if nothing opened them (chat templates
    often end with the opening one), and so is all after an opening mark at the beginning of a line that nothing closes (the
    reply was cut off). A text that is about marks, in quotation marks or within a sentence, has no thoughts.
    """
    for form in _FORMS:
        if whole := form.fullmatch(text):
            more, words = split_thoughts((whole["words"] or "").strip())
            thoughts = f"{whole.groupdict().get('thoughts') or ''}{more}".strip()
            return thoughts, _unbox(words, tags=bool(thoughts))
    if (inner := _unbox(text, tags=False)) is not text:
        return split_thoughts(inner)
    marks = list(_marks(text))
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
    return thoughts.strip(), _unbox(f"{words}{rest}".strip(), tags=True)


def _unbox(text: str, *, tags: bool) -> str:
    """Return the words in a box; without a box, the text itself."""
    for box in _BOXES if tags else _BOXES[:-1]:
        if match := box.fullmatch(text):
            return str(match[match.re.groups]).strip()
    return text


def _marks(text: str) -> Iterator[re.Match[str]]:
    """Yield the marks of a text that are not what it is about; `</details>` is one only after one for thoughts."""
    found = list(_MARK.finditer(text))
    last_close = max((mark.start() for mark in found if mark["close"] and not _is_quoted(text, mark)), default=-1)
    marks: list[re.Match[str]] = []
    opened = details = False
    for mark in found:
        if mark["end_details"] and not details:
            continue
        # In `..."red"</think>"Red"`, the quotation marks are not around the mark: nothing else closes the thoughts.
        if _is_quoted(text, mark) and not (mark["close"] and opened and mark.start() > last_close):
            continue
        opened = bool(mark["open"])
        details = bool(mark["details"]) or (details and not mark["end_details"])
        marks.append(mark)
    skip = False
    for index, mark in enumerate(marks):
        if not skip and mark["open"] and _is_in_sentence(text, mark, marks[index + 1 : index + 2]):
            skip = True
        elif skip:
            skip = False
        else:
            yield mark


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    before, after = text[: mark.start()][-1:], text[mark.end() :][:2].lstrip("\\")[:1]
    return f"{before}{after}" in _QUOTES


def _is_in_sentence(text: str, mark: re.Match[str], following: list[re.Match[str]]) -> bool:
    """Return whether an opening mark and the closing one after it are in the middle of a sentence, which goes on."""
    before = text[: mark.start()].rpartition("\n")[2]
    if not before.strip() or not following or not following[0]["close"]:
        return False
    between, after = text[mark.end() : following[0].start()], text[following[0].end() :].partition("\n")[0].strip()
    return "\n" not in between and re.match(r"[a-z.,;:!?)]", after) is not None and before.strip()[-1:].isalpha()
