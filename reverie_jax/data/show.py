"""A page of samples: pictures, the trees that their conversations become, and what of them is taught."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.images import thumbnail
from reverie_jax.data.processor import Processor
from reverie_jax.data.teaching import Teaching
from reverie_jax.data.tree import ConversationTree, grow

SIDE = 360


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens of one kind in a row: text, or a picture's features.

    Attributes:
        weight: of the loss; 0 where nothing is taught.
    """

    text: str
    weight: float
    tokens: int
    picture: bool


@dataclasses.dataclass(frozen=True)
class Limb:
    """Tokens up to where the tree parts, and what follows."""

    spans: list[Span]
    limbs: list[Limb]


def limbs(tree: ConversationTree, tokenizer: Any) -> list[Limb]:
    """The tree as text, each shared part once."""
    weights = np.zeros(len(tree), np.float32)
    parents = _parents(tree)
    for source, target, weight in zip(tree.source, tree.target, tree.weight, strict=True):
        (place,) = np.flatnonzero((parents == source) & (tree.tokens == target) & (tree.features < 0))
        weights[place] = weight

    def below(start: int, stop: int) -> list[Limb]:
        found = []
        while start < stop:
            past, end = start + 1, int(tree.ends[start])
            while past < end and int(tree.ends[past]) == end:  # an only child
                past += 1
            found.append(Limb(_spans(tree, weights, start, past, tokenizer), below(past, end)))
            start = end
        return found

    return below(0, len(tree))


def _parents(tree: ConversationTree) -> np.ndarray:
    last: dict[int, int] = {-1: -1}
    found = np.empty(len(tree), np.int64)
    for index, depth in enumerate(tree.positions.tolist()):
        found[index] = last[depth - 1]
        last[depth] = index
    return found


def _spans(tree: ConversationTree, weights: np.ndarray, start: int, past: int, tokenizer: Any) -> list[Span]:
    spans = []
    while start < past:
        picture, weight, end = bool(tree.features[start] >= 0), float(weights[start]), start + 1
        while end < past and bool(tree.features[end] >= 0) == picture and float(weights[end]) == weight:
            end += 1
        pieces = [] if picture else tokenizer.convert_ids_to_tokens(tree.tokens[start:end].tolist())
        spans.append(Span(_words(pieces, tokenizer), weight, end - start, picture))
        start = end
    return spans


def _words(pieces: list[str], tokenizer: Any) -> str:
    """Pieces as they stand in the text, white space in front included, which `decode` would drop."""
    if not pieces:
        return ""
    text = tokenizer.convert_tokens_to_string(pieces)
    return f" {text}" if pieces[0][:1] in ("▁", "Ġ") and not text.startswith(" ") else text


def write(page: Path, records: Iterable[ImageRecord], processor: Processor, teaching: Teaching, title: str) -> int:
    """Writes the page; returns how many records it shows."""
    samples = []
    for record in records:
        tree = grow(processor.tokens(record.id, teaching(record.conversations)))
        samples.append(
            {
                "id": record.id,
                "picture": thumbnail(record.image, record.id, SIDE) if record.image else "",
                "conversations": len(tree.leaves),
                "tokens": len(tree),
                "flat": tree.flat_tokens,
                "taught": len(tree.source),
                "limbs": limbs(tree, processor.encoder.tokenizer),
            }
        )
    template = (importlib.resources.files("reverie_jax.data") / "show.html").read_text("utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        jinja2.Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(samples=samples, title=title, template=processor.encoder.template.name, teaching=teaching),
        "utf-8",
    )
    return len(samples)
