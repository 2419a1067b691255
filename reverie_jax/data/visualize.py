"""A page of samples: pictures, the trees that their conversations become, and what of them is taught."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.images import thumbnail
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tree import ConversationTree, build_tree

SIDE = 360


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens of one kind in a row: text, or a picture's features.

    Attributes:
        weight: of the loss; 0 where nothing is taught.
        shared: several conversations teach it.
    """

    text: str
    weight: float
    tokens: int
    picture: bool
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class TreeNode:
    """Tokens up to where the tree parts, and what follows."""

    spans: list[Span]
    tree_nodes: list[TreeNode]


def tree_nodes(
    tree: ConversationTree, tokenizer: Any, *, patches: int = 0, shared: Collection[int] = ()
) -> list[TreeNode]:
    """The tree as text, each shared part once.

    Args:
        patches: feature tokens of a picture; 0 where a record shows one at most.
        shared: row indices of tokens that several conversations teach.
    """
    weights = np.zeros(len(tree), np.float32)
    for place, weight in zip(supervised_positions(tree), tree.weight, strict=True):
        weights[place] = weight

    def spans(start: int, past: int) -> list[Span]:
        kinds = [
            (int(tree.image_slots[j]) // patches if patches else 0, 0.0, False)
            if tree.image_slots[j] >= 0
            else (-1, float(weights[j]), j in shared)
            for j in range(start, past)
        ]
        found = []
        for kind, group in itertools.groupby(range(start, past), lambda j: kinds[j - start]):
            places = list(group)
            pieces = [] if kind[0] >= 0 else tokenizer.convert_ids_to_tokens(tree.tokens[places].tolist())
            found.append(Span(_words(pieces, tokenizer), kind[1], len(places), kind[0] >= 0, kind[2]))
        return found

    def below(start: int, stop: int) -> list[TreeNode]:
        found = []
        while start < stop:
            past, end = start + 1, int(tree.ends[start])
            while past < end and int(tree.ends[past]) == end:  # an only child
                past += 1
            found.append(TreeNode(spans(start, past), below(past, end)))
            start = end
        return found

    return below(0, len(tree))


def supervised_positions(tree: ConversationTree) -> list[int]:
    """Row index of the token that each edge predicts."""
    parents = _parents(tree)
    found = []
    for source, target in zip(tree.parent, tree.target, strict=True):
        (place,) = np.flatnonzero((parents == source) & (tree.tokens == target) & (tree.image_slots < 0))
        found.append(int(place))
    return found


def _parents(tree: ConversationTree) -> np.ndarray:
    last: dict[int, int] = {-1: -1}
    found = np.empty(len(tree), np.int64)
    for index, depth in enumerate(tree.positions.tolist()):
        found[index] = last[depth - 1]
        last[depth] = index
    return found


def _words(pieces: list[str], tokenizer: Any) -> str:
    """Pieces as they stand in the text, white space in front included, which `decode` would drop."""
    if not pieces:
        return ""
    # Where the tree parts within a letter of several bytes, neither half can be read.
    first, past = 0, len(pieces)
    while first < past and tokenizer.convert_tokens_to_string(pieces[first:past]).endswith("\ufffd"):
        past -= 1
    while first < past and tokenizer.convert_tokens_to_string(pieces[first:past]).startswith("\ufffd"):
        first += 1
    text = tokenizer.convert_tokens_to_string(pieces[first:past]) if first < past else ""
    if first < past and pieces[first][:1] in ("▁", "Ġ") and not text.startswith(" "):
        text = f" {text}"
    halves = [f"⟨{' '.join(part)}⟩" if part else "" for part in (pieces[:first], pieces[past:])]
    return halves[0] + text + halves[1]


def write(
    page: Path, records: Iterable[ImageRecord], processor: Processor, supervision: Supervision, title: str
) -> int:
    """Writes the page; returns how many records it shows."""
    samples = []
    for record in records:
        tokens = processor.tokens(record.id, supervision(record.conversations))
        tree = build_tree(tokens)
        once = build_tree(dataclasses.replace(one, weights=(one.weights > 0).astype(np.float32)) for one in tokens)
        shared = {place for place, count in zip(supervised_positions(once), once.weight, strict=True) if count > 1}
        samples.append(
            {
                "id": record.id,
                "picture": thumbnail(record.image, record.id, SIDE) if record.image else "",
                "conversations": len(tree.leaves),
                "tokens": len(tree),
                "flat": tree.flat_tokens,
                "taught": len(tree.parent),
                "limbs": tree_nodes(
                    tree, processor.encoder.tokenizer, patches=processor.encoder.patches, shared=shared
                ),
            }
        )
    template = (importlib.resources.files("reverie_jax.data") / "visualize.html").read_text("utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        jinja2.Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(samples=samples, title=title, template=processor.encoder.template.name, supervision=supervision),
        "utf-8",
    )
    return len(samples)
