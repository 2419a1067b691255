"""The whole model on a page: embed images, embed text, put one in the other, run the decoder; then prefill and extend."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from reverie_jax.models.config import VLMConfig
from reverie_jax.models.decoder import KV, Decoder
from reverie_jax.models.layers import Remat
from reverie_jax.models.projector import Projector
from reverie_jax.models.sharding import constrain_rows
from reverie_jax.models.vision import VisionTower, normalize


@runtime_checkable
class RowBatch(Protocol):
    """What the model asks of a batch (`data.packing.Batch`)."""

    @property
    def tokens(self) -> Any: ...
    @property
    def positions(self) -> Any: ...
    @property
    def ends(self) -> Any: ...
    @property
    def image_slots(self) -> Any: ...
    @property
    def pixels(self) -> Any: ...


class VisionLanguageModel(nnx.Module):
    """LLaVA's architecture: CLIP tower, projector, decoder (Liu et al., arXiv 2310.03744).

    Args:
        config: sizes.
        rngs: randomness of the initial parameters.
        dtype: of the base's matrices and of the computation; norms, adapters, softmax and logits are float32 always.
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config, self.compute_dtype = config, dtype
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config.projector, config.vision.hidden, config.text.hidden, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.text, rngs=rngs, dtype=dtype)

    def embed(
        self,
        tokens: Int[Array, "B L"],
        image_slots: Int[Array, "B L"],
        pixels: UInt8[Array, "B M S S 3"] | Float[Array, "B M P W"],
        *,
        train_tower: bool = False,
    ) -> Float[Array, "B L D"]:
        """Token embeddings with image features in the places that wait for them.

        Args:
            tokens: ids; the placeholder's where a feature goes.
            image_slots: -1 for text, else which of the row's M * P features goes here.
            pixels: images of the row as bytes, or the tower's features of them; zeros where the row has fewer than M.
            train_tower: let gradients into the tower (pretraining); it is frozen otherwise.
        """
        batch, images = pixels.shape[:2]
        flat = pixels.reshape(batch * images, *pixels.shape[2:])
        if jnp.issubdtype(pixels.dtype, jnp.floating):
            features = constrain_rows(flat.astype(self.compute_dtype))
        else:
            floats = normalize(flat, self.compute_dtype)
            features = self.vision(floats, self.config.feature_depth, remat="full" if train_tower else "none")
        if not train_tower:
            features = jax.lax.stop_gradient(features)
        features = self.projector(features).reshape(batch, images * features.shape[1], -1)
        placed = jnp.take_along_axis(features, jnp.maximum(image_slots, 0)[:, :, None], axis=1)
        text = self.decoder.embed(tokens, features.dtype)
        return constrain_rows(jnp.where((image_slots >= 0)[:, :, None], placed, text))

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        ends: Int[Array, "B L"],
        image_slots: Int[Array, "B L"],
        pixels: UInt8[Array, "B M S S 3"] | Float[Array, "B M P W"],
        *,
        key: PRNGKeyArray | None = None,
        train_tower: bool = False,
        remat: Remat = "full",
    ) -> Float[Array, "B L D"]:
        """Final hidden states of rows of trees. Logits are `decoder.logits` of the states one wants, and no others."""
        x = self.embed(tokens, image_slots, pixels, train_tower=train_tower)
        return self.decoder(x, positions, ends, key=key, remat=remat)[0]

    def __call__(self, batch: RowBatch) -> Float[Array, "B L V"]:
        """Logits everywhere in a batch's rows, in the order of their trees. For tests and small use: they are large."""
        rows = (batch.tokens, batch.positions, batch.ends, batch.image_slots, batch.pixels)
        return self.decoder.logits(self.hidden(*map(jnp.asarray, rows), remat="none"))

    def prefill(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        ends: Int[Array, "B L"],
        image_slots: Int[Array, "B L"],
        pixels: UInt8[Array, "B M S S 3"] | Float[Array, "B M P W"],
    ) -> tuple[Float[Array, "B L D"], KV]:
        """Hidden states and the row's KV: the one copy that all its leaves decode from."""
        x = self.embed(tokens, image_slots, pixels)
        hidden, kv = self.decoder(x, positions, ends, keep_kv=True, remat="none")
        assert kv is not None
        return hidden, kv

    def extend(
        self,
        tokens: Int[Array, "B Q"],
        positions: Int[Array, "B Q"],
        leaves: Int[Array, "B Q"],
        ends: Int[Array, "B L"],
        step: Int[Array, ""],
        prefix: KV,
        suffix: KV,
    ) -> tuple[Float[Array, "B Q V"], KV]:
        """Appends one token to every leaf's suffix; returns the logits of the next one and the grown suffixes."""
        x = self.decoder.embed(tokens, prefix.k.dtype)
        hidden, suffix = self.decoder.extend(x, positions, leaves, ends, step, prefix, suffix)
        return self.decoder.logits(hidden), suffix
