"""What the model takes; without JAX, so that data and recipes can be read without it."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Int, UInt8


class ModelInputs(NamedTuple):
    """B packed sequences of trees, as the model takes them (`data.packing.Batch.inputs`).

    Attributes:
        tokens: Ids; the placeholder's at the position of an image feature.
        positions: Depth of each token in its tree, its RoPE position.
        ends: One past the last index of each token's subtree (see `models.attention`).
        image_slots: -1 for text, else which of the sequence's M * P image features is here.
        images: Bytes, or the tower's features of the images (floats); zeros where the sequence has fewer than M.
    """

    tokens: Int[Any, "B L"]
    positions: Int[Any, "B L"]
    ends: Int[Any, "B L"]
    image_slots: Int[Any, "B L"]
    images: UInt8[Any, "B M S S 3"] | Float[Any, "B M P W"]
