"""The training ids and labels of the sister systems, quirks included: LRV-Instruction's MiniGPT-4, and mPLUG-Owl.

Both tokenize the pieces of a sample apart, so a sentencepiece tokenizer puts a space before each. Muffin tokenizes the whole
text and masks it as original LLaVA's "single" does (`data.llava_tokenization`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from reverie_jax.data.llava_tokenization import LlavaTokenizer
from reverie_jax.data.templates import IMAGE

Spans = Sequence[tuple[int, int, float]]
"""(first character, one past the last, weight) of each answer of a text."""
Weighted = tuple[list[int], list[float]]
"""Token ids, with `IMAGE_TOKEN_INDEX` for each image marker, and the loss weight of each."""


def tokenize_minigpt4(tokenizer: LlavaTokenizer, text: str, spans: Spans) -> Weighted:
    """Return a text tokenized in pieces: what precedes an answer, and the answer with its end, around images as well.

    The trainer pads with the end of sequence and masks all padding; so an end of sequence within an answer is not taught.
    It cuts answers to 160 tokens, their end included; they are whole here.
    """
    pieces, at = [], 0
    for start, stop, weight in spans:
        pieces += [(text[at:start], 0.0), (text[start:stop], weight)]
        at = stop
    ids, weights = _join(tokenizer, [*pieces, (text[at:], 0.0)])
    end = tokenizer.tokenizer.eos_token_id
    return ids, [0.0 if id == end else weight for id, weight in zip(ids, weights, strict=True)]


def tokenize_mplug_owl(tokenizer: LlavaTokenizer, text: str, spans: Spans) -> Weighted:
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
    pieces, at, previous = [], 0, ""
    for chunk in re.split(f"({marks})", text):
        if not chunk and IMAGE in text:
            continue
        if previous == "AI: ":
            weight = next((weight for _, stop, weight in spans if at <= stop), 0.0)
            pieces += [(chunk, weight), (end, weight)]
        else:
            pieces.append((chunk, 0.0))
        at, previous = at + len(chunk), chunk
    return _join(tokenizer, pieces)


def _join(tokenizer: LlavaTokenizer, pieces: Iterable[tuple[str, float]]) -> Weighted:
    """Return the ids of pieces of text, each tokenized by itself, behind one BOS; and their weights."""
    ids = tokenizer.encode_text("")
    weights, begin = [0.0] * len(ids), len(ids)
    for piece, weight in pieces:
        found = tokenizer(piece, True)[begin:]
        ids += found
        weights += [weight] * len(found)
    return ids, weights
