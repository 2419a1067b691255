"""Where two answers differ, word by word."""

from __future__ import annotations

import difflib
import re

Segments = list[tuple[str, bool]]


def mark_differences(first: str, second: str) -> tuple[Segments, Segments]:
    """Return both texts in segments, each with whether the other text lacks it at this place.

    The segments of a text joined are the text. Words are compared with their punctuation, and without the white space
    between them.
    """
    words = [re.findall(r"\s*\S+|\s+$", text) for text in (first, second)]
    bare = [[word.strip() for word in side] for side in words]
    segments: tuple[Segments, Segments] = [], []
    for tag, *spans in difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_opcodes():
        for side, (start, stop) in enumerate((spans[:2], spans[2:])):
            if text := "".join(words[side][start:stop]):
                segments[side].append((text, tag != "equal"))
    return segments
