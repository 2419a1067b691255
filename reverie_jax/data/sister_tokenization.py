"""The training ids and labels of the sister systems, quirks included: LRV-Instruction's MiniGPT-4, and mPLUG-Owl.

Both tokenize the pieces of a sample apart, so a sentencepiece tokenizer puts a space before each. Muffin tokenizes the whole
text and masks it as original LLaVA's "single" does (`data.llava_tokenization`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from reverie_jax.data.llava_tokenization import LlavaTokenizer, Span
from reverie_jax.data.templates import IMAGE

Piece = tuple[str, float, int, int]
"""A text, and the weight of what lies between two of its characters."""
Weighted = tuple[list[int], list[float]]
"""Token ids, with `IMAGE_TOKEN_INDEX` for each image marker, and the loss weight of each."""


def tokenize_minigpt4(tokenizer: LlavaTokenizer, text: str, spans: Sequence[Span]) -> Weighted:
    """Return a text tokenized in pieces: what precedes an answer, and the answer with its end, around images as well.

    The trainer pads with the end of sequence and masks all padding; so an end of sequence within an answer is not taught.
    It cuts answers to 160 tokens, their end included; they are whole here.
    """
    pieces, at = list[Piece](), 0
    for start, stop, weight, first, last in spans:
        pieces += [(text[at:start], 0.0, 0, 0), (text[start:stop], weight, first - start, last - start)]
        at = stop
    ids, weights = _join(tokenizer, [*pieces, (text[at:], 0.0, 0, 0)])
    end = tokenizer.tokenizer.eos_token_id
    return ids, [0.0 if id == end else weight for id, weight in zip(ids, weights, strict=True)]


def tokenize_mplug_owl(tokenizer: LlavaTokenizer, text: str, spans: Sequence[Span]) -> Weighted:
    r"""Return a text tokenized in the chunks between `<image>`, "AI: " and "\nHuman: ", and these by themselves.

    The chunk after each "AI: " is taught, and followed by the end of sequence: also where a question or an answer contains
    these words, and, in a text with images, the "\nHuman: " after an empty answer.

    Args:
        tokenizer: the tokenizer.
        text: a conversation without ends of sequence.
        spans: its answers. A taught chunk has the weight of the exchange that it is in.
    """
    marks = "AI: |\nHuman: " + (f"|{IMAGE}" if IMAGE in text else "")
    end = tokenizer.tokenizer.eos_token or ""
    pieces, at, previous = list[Piece](), 0, ""
    for chunk in re.split(f"({marks})", text):
        if not chunk and IMAGE in text:
            continue
        size = len(chunk)
        if previous == "AI: ":
            span = next((span for span in spans if at <= span.stop), None)
            weight = span.weight if span else 0.0
            first = max(0, span.first - at) if span and span.start <= at else 0
            pieces += [(chunk, weight, min(first, size), size), (end, weight if first <= size else 0.0, 0, len(end))]
        else:
            pieces.append((chunk, 0.0, 0, size))
        at, previous = at + size, chunk
    return _join(tokenizer, pieces)


def _join(tokenizer: LlavaTokenizer, pieces: Iterable[Piece]) -> Weighted:
    """Return the ids of pieces of text, each tokenized by itself, behind one BOS; and their weights."""
    ids = tokenizer.encode_text("")
    weights, begin = [0.0] * len(ids), len(ids)
    for piece, weight, first, last in pieces:
        found = tokenizer(piece, True)
        start = tokenizer.shared(found, piece[:first], True)[0] if first else begin
        stop = tokenizer.shared(found, piece[:last], True)[1] if last < len(piece) else len(found)
        ids += found[begin:]
        weights += [weight if start <= index < stop else 0.0 for index in range(begin, len(found))]
    return ids, weights
