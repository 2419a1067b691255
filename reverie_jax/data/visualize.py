"""An HTML page of samples: images, the trees of their conversations, and the supervised tokens."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int64

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.images import thumbnail
from reverie_jax.data.processor import Processor
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tree import ConversationTree, build_tree
from reverie_jax.files import atomic_write

THUMBNAIL_SIDE = 360


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind: text of one weight, or image features.

    Attributes:
        text: the text; empty for an image.
        weight: loss weight; 0 if the tokens are not supervised.
        tokens: number of tokens.
        is_image: whether these are image features.
        shared: whether several conversations supervise the tokens.
    """

    text: str
    weight: float
    tokens: int
    is_image: bool
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class TreeNode:
    """Tokens up to where the tree branches, and the branches."""

    spans: list[Span]
    children: list[TreeNode]


def tree_nodes(
    tree: ConversationTree, tokenizer: Any, *, patches: int = 0, shared: Collection[int] = ()
) -> list[TreeNode]:
    """Return the tree as text, each shared part once.

    Args:
        tree: The tree.
        tokenizer: Its tokenizer, of `transformers`.
        patches: Feature tokens of an image; may be 0 if the tree has one image at most.
        shared: Indices of tokens that several conversations supervise.
    """
    weights = np.zeros(len(tree), np.float32)
    weights[supervised_positions(tree)] = tree.weight

    def spans(start: int, stop: int) -> list[Span]:
        # (image number or -1, weight, shared) of each token
        kinds = [
            (int(tree.image_slots[j]) // patches if patches else 0, 0.0, False)
            if tree.image_slots[j] >= 0
            else (-1, float(weights[j]), j in shared)
            for j in range(start, stop)
        ]
        result = []
        for (image, weight, is_shared), group in itertools.groupby(range(start, stop), lambda j: kinds[j - start]):
            indices = list(group)
            pieces = [] if image >= 0 else tokenizer.convert_ids_to_tokens(tree.tokens[indices].tolist())
            result.append(Span(_decode(pieces, tokenizer), weight, len(indices), image >= 0, is_shared))
        return result

    def nodes(start: int, stop: int) -> list[TreeNode]:
        result = []
        while start < stop:
            branch, end = start + 1, int(tree.ends[start])
            while branch < end and int(tree.ends[branch]) == end:  # an only child
                branch += 1
            result.append(TreeNode(spans(start, branch), nodes(branch, end)))
            start = end
        return result

    return nodes(0, len(tree))


def supervised_positions(tree: ConversationTree) -> list[int]:
    """Return the index of the token that each edge predicts."""
    parents = _parents(tree)
    result = []
    for parent, target in zip(tree.parent, tree.target, strict=True):
        (index,) = np.flatnonzero((parents == parent) & (tree.tokens == target) & (tree.image_slots < 0))
        result.append(int(index))
    return result


def _parents(tree: ConversationTree) -> Int64[np.ndarray, "n"]:
    """Return the index of each token's parent; -1 for a root."""
    last: dict[int, int] = {-1: -1}
    parents = np.empty(len(tree), np.int64)
    for index, depth in enumerate(tree.positions.tolist()):
        parents[index] = last[depth - 1]
        last[depth] = index
    return parents


def _decode(pieces: list[str], tokenizer: Any) -> str:
    """Return the text of some tokens, with the leading space that `decode` would drop."""
    if not pieces:
        return ""
    # The tree may branch within a character of several bytes: neither part can be decoded.
    first, stop = 0, len(pieces)
    while first < stop and tokenizer.convert_tokens_to_string(pieces[first:stop]).endswith("\ufffd"):
        stop -= 1
    while first < stop and tokenizer.convert_tokens_to_string(pieces[first:stop]).startswith("\ufffd"):
        first += 1
    text = tokenizer.convert_tokens_to_string(pieces[first:stop]) if first < stop else ""
    if first < stop and pieces[first][:1] in ("▁", "Ġ") and not text.startswith(" "):
        text = f" {text}"
    before, after = (f"⟨{' '.join(part)}⟩" if part else "" for part in (pieces[:first], pieces[stop:]))
    return before + text + after


def write_page(
    path: Path, records: Iterable[ImageRecord], processor: Processor, supervision: Supervision, title: str
) -> int:
    """Write the page; return its number of records.

    Args:
        path: The HTML file.
        records: What to show.
        processor: Tokenizes the conversations.
        supervision: Which tokens are supervised.
        title: Title of the page.

    Raises:
        UserError: A record cannot be used, or the file cannot be written.
    """
    tokenizer, patches = processor.encoder.tokenizer, processor.encoder.patches
    samples = []
    for record in records:
        tokens = processor.tokenize(record.id, supervision(record.conversations))
        tree = build_tree(tokens)
        # With all weights 1, a token's weight is the number of conversations that supervise it.
        counts = build_tree(dataclasses.replace(t, weights=(t.weights > 0).astype(np.float32)) for t in tokens)
        shared = {j for j, count in zip(supervised_positions(counts), counts.weight, strict=True) if count > 1}
        samples.append(
            {
                "id": record.id,
                "image": thumbnail(record.image, record.id, THUMBNAIL_SIDE) if record.image else "",
                "conversations": len(tree.leaves),
                "tokens": len(tree),
                "flat_tokens": tree.flat_tokens,
                "supervised": len(tree.parent),
                "nodes": tree_nodes(tree, tokenizer, patches=patches, shared=shared),
            }
        )
    template = (importlib.resources.files("reverie_jax.data") / "visualize.html").read_text("utf-8")
    html = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    name = processor.encoder.template.name
    atomic_write(path, html.render(samples=samples, title=title, template=name, supervision=supervision))
    return len(samples)
