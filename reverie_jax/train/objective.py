"""What training minimises: weighted cross-entropy over the edges of trees."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from reverie_jax.data.rows import Batch
from reverie_jax.models import VisionLanguageModel


class Loss(NamedTuple):
    """Sums over a batch: of weight * -log p(target | source), and of the weights. Their quotient is the loss."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


def edge_loss(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    key: PRNGKeyArray | None = None,
    train_tower: bool = False,
    chunk: int = 512,
) -> Loss:
    """Cross-entropy of the taught edges.

    The LM head runs on edges alone and `chunk` of a row's edges at a time, so B x L x V logits are never built.

    Args:
        key: LoRA dropout; None switches it off.
        chunk: edges of a row whose logits exist together.
    """
    hidden = model.hidden(
        batch.tokens, batch.positions, batch.ends, batch.features, batch.pixels, key=key, train_tower=train_tower
    )
    states = jnp.take_along_axis(hidden, batch.source[:, :, None], axis=1)
    edges = states.shape[1]
    chunks = max(1, -(-edges // chunk))
    padding = chunks * -(-edges // chunks) - edges

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        state, target, weight = part
        logits = model.decoder.logits(state)
        chosen = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + (weight * nll).sum(), None

    parts = (split(states), split(batch.target), split(batch.weight))
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)
    return Loss(total, batch.weight.sum())
