"""What training minimises: sums of log-probabilities of the edges of trees, by themselves or in pairs of answers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie_jax.data.packing import Batch
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.layers import Remat


class Loss(NamedTuple):
    """Sums over a batch: of weighted losses, and of what they are divided by. Their quotient is the loss."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


class Rewards(NamedTuple):
    """Sums over a batch's pairs; divided by the number of pairs they are the metrics that DPO trainers log."""

    chosen_reward: Float[Array, ""]
    rejected_reward: Float[Array, ""]
    reward_margin: Float[Array, ""]
    reward_accuracy: Float[Array, ""]


def edge_logps(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    key: PRNGKeyArray | None = None,
    train_tower: bool = False,
    remat: Remat = "full",
    chunk: int = 512,
) -> Float[Array, "B E"]:
    """log p(target | source) of each edge.

    The LM head runs on edges alone and `chunk` of a row's edges at a time, so B x L x V logits are never built.

    Args:
        key: LoRA dropout; None switches it off.
        remat: see `models.layers.scan_layers`.
        chunk: edges of a row whose logits exist together.
    """
    hidden = model.hidden(
        *(batch.tokens, batch.positions, batch.ends, batch.image_slots, batch.pixels),
        key=key,
        train_tower=train_tower,
        remat=remat,
    )
    states = jnp.take_along_axis(hidden, batch.parent[:, :, None], axis=1)
    edges = states.shape[1]
    chunks = max(1, -(-edges // chunk))
    padding = chunks * -(-edges // chunks) - edges

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(none: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        state, target = part
        logits = model.decoder.logits(state)
        chosen = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[..., 0]
        return none, chosen - jax.nn.logsumexp(logits, axis=-1)

    _, found = jax.lax.scan(of_chunk, None, (split(states), split(batch.target)))
    return jnp.moveaxis(found, 0, 1).reshape(states.shape[0], -1)[:, :edges]


def cross_entropy(logps: Float[Array, "B E"], batch: Batch) -> Loss:
    """The sum of weight * -log p, over the sum of weights."""
    return Loss(-(batch.weight * logps).sum(), batch.weight.sum())


def edge_loss(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    key: PRNGKeyArray | None = None,
    train_tower: bool = False,
    chunk: int = 512,
) -> Loss:
    """Cross-entropy of the taught edges; see `edge_logps`."""
    return cross_entropy(edge_logps(model, batch, key=key, train_tower=train_tower, chunk=chunk), batch)


def by_origin(logps: Float[Array, "B E"], batch: Batch, datasets: int) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """`cross_entropy`'s two sums for each of the data's sources."""
    place = batch.origin.reshape(-1)
    losses, weights = -(batch.weight * logps).reshape(-1), batch.weight.reshape(-1)
    return jax.ops.segment_sum(losses, place, datasets), jax.ops.segment_sum(weights, place, datasets)


def answer_sums(logps: Float[Array, "B E"], batch: Batch) -> Float[Array, "B Q"]:
    """s of each answer: the weighted sum of its edges' log-probabilities."""
    answers = batch.leaves.shape[1]
    return jax.vmap(lambda x, place: jax.ops.segment_sum(x, place, num_segments=answers))(
        batch.weight * logps, batch.branch
    )


def preference_loss(
    sums: Float[Array, "B Q"], reference: Float[Array, "B Q"], batch: Batch, preference: DPOConfig
) -> tuple[Loss, Rewards]:
    """DPO's loss over the pairs of a batch (Rafailov et al., arXiv 2305.18290; DDPO of RLHF-V, arXiv 2312.00849).

    Args:
        sums, reference: `answer_sums` of the model and of its reference; chosen and rejected alternate.
    """

    def split(x: Array) -> tuple[Array, Array]:
        return x[:, 0::2], x[:, 1::2]

    here: Bool[Array, "B P"] = split(batch.questions)[0] >= 0
    chosen, rejected = (preference.beta * side for side in split(sums - reference))
    margin = chosen - rejected
    losses = preference.weight * -jax.nn.log_sigmoid(margin) - preference.sft * split(sums)[0]

    def total(x: Array) -> Array:
        return jnp.where(here, x, jnp.zeros_like(x)).sum()

    rewards = Rewards(total(chosen), total(rejected), total(margin), total((margin > 0).astype(jnp.float32)))
    return Loss(total(losses), here.sum().astype(jnp.float32)), rewards
