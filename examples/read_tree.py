"""Read a conversation tree: three conversations about one image share its tokens; the tree computes them once."""

from __future__ import annotations

import numpy as np

import reverie_jax
from reverie_jax import Conversation, Turn

QUESTION = "<image>\nIs there a cup in the image?"
CONVERSATIONS = [
    Conversation((Turn("user", QUESTION), Turn("assistant", "Yes."))),
    Conversation(
        (
            Turn("user", QUESTION),
            Turn("assistant", "Yes."),
            Turn("user", "Explain why."),
            Turn("assistant", "A red cup is on the left."),
        )
    ),
    Conversation((Turn("user", "<image>\nDescribe the image."), Turn("assistant", "A red cup and a blue plate."))),
]


def main() -> None:
    """Print the tree's size, its supervised edges, and check the mask against flat conversations."""
    _, processor = reverie_jax.load_model("scenes-base")
    tokens = processor.tokenize("example", CONVERSATIONS)
    tree = reverie_jax.build_tree(tokens)
    print(f"{tree.flat_tokens} tokens one by one, {len(tree)} in the tree")

    # The only mask of the system: query i sees key j if and only if j <= i < ends[j].
    index = np.arange(len(tree))
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < tree.ends[None, :])
    for leaf, flat in zip(tree.leaves, tokens, strict=True):
        assert np.array_equal(tree.tokens[visible[leaf]], flat.ids), "a leaf sees its own conversation and nothing else"

    decode = processor.encoder.tokenizer.decode
    for parent, target, weight in zip(tree.parent, tree.target, tree.weight, strict=True):
        print(
            f"token {parent:3d} {decode([tree.tokens[parent]])!r:12} predicts {decode([target])!r:12} weight {weight:g}"
        )


if __name__ == "__main__":
    main()
