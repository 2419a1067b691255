"""The whole model on a page: embed images, embed text, combine them, run the decoder; then prefill and extend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from reverie_jax.models.config import Remat, Routing, VLMConfig
from reverie_jax.models.decoder import Decoder, LayersKV
from reverie_jax.models.inputs import ModelInputs
from reverie_jax.models.moe import RouterStats
from reverie_jax.models.projector import Projector
from reverie_jax.models.sharding import constrain_rows
from reverie_jax.models.vision import VisionTower, normalize


class VisionLanguageModel(nnx.Module):
    """LLaVA's architecture: vision tower, projector, decoder (Liu et al., arXiv 2310.03744); a tower may have a resampler.

    Args:
        config: Sizes.
        rngs: Randomness of the initial parameters.
        dtype: Of the base model's matrices and of the computation; norms, adapters, softmax and logits are always float32.
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config, self.compute_dtype = config, dtype
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.text, rngs=rngs, dtype=dtype)

    def embed(self, inputs: ModelInputs, *, train_tower: bool = False) -> Float[Array, "B L D"]:
        """Return token embeddings, with image features at their positions.

        Args:
            inputs: Packed sequences.
            train_tower: Train the tower too (pretraining); otherwise it gets no gradient.
        """
        batch, images = inputs.images.shape[:2]
        flat = inputs.images.reshape(batch * images, *inputs.images.shape[2:])
        if jnp.issubdtype(inputs.images.dtype, jnp.floating):
            features = constrain_rows(flat.astype(self.compute_dtype))
        else:
            pixels, config = normalize(flat, self.config.vision, self.compute_dtype), self.config
            remat: Remat = "full" if train_tower else "none"
            features = self.vision(pixels, config.feature_depths, select=config.feature_select, remat=remat)
        if not train_tower:
            features = jax.lax.stop_gradient(features)
        features = self.projector(features)
        features = features.reshape(batch, images * features.shape[1], -1)
        slots = inputs.image_slots[:, :, None]
        image_features = jnp.take_along_axis(features, jnp.maximum(slots, 0), axis=1)
        text = self.decoder.embed(inputs.tokens, features.dtype)
        return constrain_rows(jnp.where(slots >= 0, image_features, text))

    def hidden(
        self,
        inputs: ModelInputs,
        *,
        key: PRNGKeyArray | None = None,
        train_tower: bool = False,
        remat: Remat = "full",
    ) -> Float[Array, "B L D"]:
        """Return the final hidden states; `decoder.logits` turns those that are needed into logits.

        Args:
            inputs: Packed sequences.
            key: Randomness of LoRA dropout; None disables dropout.
            train_tower: As for `embed`.
            remat: See `layers.scan_layers`.
        """
        return self.routed_hidden(inputs, None, key=key, train_tower=train_tower, remat=remat)[0]

    def routed_hidden(
        self,
        inputs: ModelInputs,
        routing: Routing | None,
        *,
        key: PRNGKeyArray | None = None,
        train_tower: bool = False,
        remat: Remat = "full",
    ) -> tuple[Float[Array, "B L D"], RouterStats | None]:
        """Return the final hidden states, and what the routers did (None without experts).

        Args:
            inputs: Packed sequences.
            routing: How tokens are routed in training; None is evaluation, which drops none.
            key: Randomness of LoRA dropout and of routing; None disables both.
            train_tower: As for `embed`.
            remat: See `layers.scan_layers`.
        """
        x = self.embed(inputs, train_tower=train_tower)
        out = self.decoder(x, inputs.positions, inputs.ends, key=key, routing=routing, remat=remat)
        return out.hidden, out.router

    def __call__(self, inputs: ModelInputs) -> Float[Array, "B L V"]:
        """Return the logits at every position; for small inputs, since B x L x V values are large."""
        return self.decoder.logits(self.hidden(jax.tree.map(jnp.asarray, inputs), remat="none"))

    def prefill(self, inputs: ModelInputs) -> tuple[Float[Array, "B L D"], LayersKV]:
        """Return the hidden states, and the KV: one copy, from which all leaves decode."""
        out = self.decoder(self.embed(inputs), inputs.positions, inputs.ends, keep_kv=True, remat="none")
        assert out.kv is not None
        return out.hidden, out.kv

    def extend(
        self,
        tokens: Int[Array, "B Q"],
        positions: Int[Array, "B Q"],
        leaves: Int[Array, "B Q"],
        ends: Int[Array, "B L"],
        step: Int[Array, ""],
        prefix: LayersKV,
        suffix: LayersKV,
    ) -> tuple[Float[Array, "B Q V"], LayersKV]:
        """Append one token to every leaf's suffix; return the logits of the next one and the longer suffixes.

        Args:
            tokens: The new tokens.
            positions: Their RoPE positions.
            leaves: Index of each leaf in its sequence.
            ends: As in `ModelInputs`.
            step: Number of tokens that the suffixes already contain.
            prefix: The KV of `prefill`.
            suffix: KV of the decoded tokens; see `decoder.KV`.
        """
        x = self.decoder.embed(tokens, jax.tree.leaves(prefix)[0].dtype)
        hidden, suffix = self.decoder.extend(x, positions, leaves, ends, step, prefix, suffix)
        return self.decoder.logits(hidden), suffix

    def append(
        self, tokens: Int[Array, "B N"], start: Int[Array, ""], kept: LayersKV
    ) -> tuple[Float[Array, "B N D"], LayersKV]:
        """Continue sequences of one conversation each; return the hidden states of the new tokens, and the longer KV.

        Args:
            tokens: The new tokens, none of an image. What only fills the shape comes last; later tokens overwrite its KV.
            start: Index of the first one, and its RoPE position.
            kept: As the KV of `prefill`, with room for `start` + N tokens. What it has from `start` on is overwritten.
        """
        return self.decoder.append(self.decoder.embed(tokens, jax.tree.leaves(kept)[0].dtype), start, kept)
