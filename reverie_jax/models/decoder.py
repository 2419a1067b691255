"""The language model: a LLaMA-like decoder over packed sequences of trees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie_jax.models.attention import attend, attend_leaves, leaf_visible, rope
from reverie_jax.models.config import TextConfig
from reverie_jax.models.layers import Linear, Remat, RMSNorm, activate, parameter, scan_layers


class KV(NamedTuple):
    """Keys (rotated) and values of all layers: each [N, B, L, K, d], or [N, B, Q, T, K, d] for the leaves' suffixes."""

    k: Float[Array, "..."]
    v: Float[Array, "..."]


class DecoderLayer(nnx.Module):
    """A stack of pre-norm layers: attention, then a gated MLP."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, layers: int, dtype: DTypeLike):
        self.config = config
        width, q_width, kv_width = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        options: Any = {"rngs": rngs, "layers": layers, "dtype": dtype}
        self.norm1 = RMSNorm(width, config.norm_eps, rngs=rngs, layers=layers)
        self.norm2 = RMSNorm(width, config.norm_eps, rngs=rngs, layers=layers)
        if config.fused:
            self.qkv = Linear(width, q_width + 2 * kv_width, ("embed", "heads"), **options)
            self.gate_up = Linear(width, 2 * config.mlp, ("embed", "mlp"), **options)
        else:
            self.query = Linear(width, q_width, ("embed", "heads"), **options)
            self.key = Linear(width, kv_width, ("embed", "heads"), **options)
            self.value = Linear(width, kv_width, ("embed", "heads"), **options)
            self.gate = Linear(width, config.mlp, ("embed", "mlp"), **options)
            self.up = Linear(width, config.mlp, ("embed", "mlp"), **options)
        self.out = Linear(q_width, width, ("heads", "embed"), **options)
        self.down = Linear(config.mlp, width, ("mlp", "embed"), **options)

    def attention_inputs(
        self, x: Float[Array, "B L D"], positions: Int[Array, "B L"], keys: list[PRNGKeyArray | None]
    ) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"], Float[Array, "B L K d"]]:
        """Return queries, keys and values of normalized `x`; queries and keys are rotated."""
        config = self.config
        if config.fused:
            q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
            parts = jnp.split(self.qkv(x, keys[0]), [q_width, q_width + kv_width], axis=-1)
        else:
            parts = [part(x, key) for part, key in zip((self.query, self.key, self.value), keys, strict=True)]
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in parts)
        return rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta), v

    def mlp(self, x: Float[Array, "B L D"], keys: list[PRNGKeyArray | None]) -> Float[Array, "B L D"]:
        """Apply the gated MLP to normalized `x`."""
        if self.config.fused:
            gate, up = jnp.split(self.gate_up(x, keys[0]), 2, axis=-1)
        else:
            gate, up = self.gate(x, keys[0]), self.up(x, keys[1])
        return self.down(activate("silu", gate) * up, keys[2])

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        ends: Int[Array, "B L"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]]]:
        """Return one layer's output, and its keys and values."""
        keys = list(jax.random.split(key, 7)) if key is not None else [None] * 7
        q, k, v = self.attention_inputs(self.norm1(x), positions, keys[:3])
        x = x + self.out(attend(q, k, v, ends).reshape(*x.shape[:2], -1), keys[3])
        return x + self.mlp(self.norm2(x), keys[4:]), (k, v)

    def extend(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "B Q"],
        seen: Bool[Array, "B Q L"],
        step: Int[Array, ""],
        prefix: tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]],
        suffix: tuple[Float[Array, "B Q T K d"], Float[Array, "B Q T K d"]],
    ) -> tuple[Float[Array, "B Q D"], tuple[Float[Array, "B Q T K d"], Float[Array, "B Q T K d"]]]:
        """Return the output of one more token per leaf, and the suffixes with it at index `step`."""
        none: list[PRNGKeyArray | None] = [None] * 3
        q, k, v = self.attention_inputs(self.norm1(x), positions, none)
        suffix = tuple(
            jax.lax.dynamic_update_index_in_dim(cache, new.astype(cache.dtype), step, axis=2)
            for cache, new in zip(suffix, (k, v), strict=True)
        )
        x = x + self.out(attend_leaves(q, prefix, seen, suffix, step).reshape(*x.shape[:2], -1))
        return x + self.mlp(self.norm2(x), none), suffix


class Decoder(nnx.Module):
    """Token embedding, stacked layers, final norm and LM head."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        self.embedding = parameter(rngs, (config.vocab, config.hidden), ("vocab", "embed"), scale=0.02, dtype=dtype)
        self.layers = DecoderLayer(config, rngs=rngs, layers=config.layers, dtype=dtype)
        self.norm = RMSNorm(config.hidden, config.norm_eps, rngs=rngs)
        self.head = Linear(config.hidden, config.vocab, ("embed", "vocab"), rngs=rngs, dtype=dtype)

    def embed(self, tokens: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
        """Return the embeddings of token ids."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        ends: Int[Array, "B L"],
        *,
        key: PRNGKeyArray | None = None,
        keep_kv: bool = False,
        remat: Remat = "full",
    ) -> tuple[Float[Array, "B L D"], KV | None]:
        """Return normalized hidden states, and every layer's keys and values if `keep_kv`.

        Args:
            x: Embeddings (`VisionLanguageModel.embed`).
            positions: As in `ModelInputs`.
            ends: As in `ModelInputs`.
            key: Randomness of LoRA dropout; None disables dropout.
            keep_kv: Return keys and values.
            remat: See `layers.scan_layers`.
        """
        keys = None if key is None else jax.random.split(key, self.config.layers)

        def body(layer: DecoderLayer, x: Array, layer_key: PRNGKeyArray | None = None) -> tuple[Array, KV | None]:
            x, kv = layer(x, positions, ends, layer_key)
            return x, KV(*kv) if keep_kv else None

        x, kv = scan_layers(self.layers, body, x, *(() if keys is None else (keys,)), remat=remat)
        return self.norm(x), kv

    def extend(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "B Q"],
        leaves: Int[Array, "B Q"],
        ends: Int[Array, "B L"],
        step: Int[Array, ""],
        prefix: KV,
        suffix: KV,
    ) -> tuple[Float[Array, "B Q D"], KV]:
        """Decode one more token of each leaf; see `VisionLanguageModel.extend`."""
        seen = leaf_visible(leaves, ends)

        def body(layer: DecoderLayer, x: Array, prefix: KV, suffix: KV) -> tuple[Array, KV]:
            x, kv = layer.extend(x, positions, seen, step, prefix, suffix)
            return x, KV(*kv)

        x, suffix = scan_layers(self.layers, body, x, prefix, suffix, remat="none")
        return self.norm(x), suffix

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return vocabulary logits in float32."""
        return self.head(hidden).astype(jnp.float32)
