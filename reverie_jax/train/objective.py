"""Training objectives: cross-entropy on the supervised edges of trees, and DPO on pairs of answers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie_jax.data.packing import Batch
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.config import Remat, Routing
from reverie_jax.models.moe import RouterStats


class Loss(NamedTuple):
    """Sums of weighted losses and of weights over a batch; the mean loss is total / weight."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


class Rewards(NamedTuple):
    """Sums over a batch's pairs of the metrics that DPO trainers log as means."""

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
    """Return log p(target | parent) of each edge.

    The LM head runs on edges only, `chunk` edges of a sequence at a time: [B, L, V] logits are never materialized.

    Args:
        model: policy or reference.
        batch: packed sequences.
        key: random key of LoRA dropout; None disables dropout.
        train_tower: backpropagate into the vision tower.
        remat: see `models.layers.scan_layers`.
        chunk: edges of a sequence whose logits exist at the same time.
    """
    return routed_edge_logps(model, batch, None, key=key, train_tower=train_tower, remat=remat, chunk=chunk)[0]


def routed_edge_logps(
    model: VisionLanguageModel,
    batch: Batch,
    routing: Routing | None,
    *,
    key: PRNGKeyArray | None = None,
    train_tower: bool = False,
    remat: Remat = "full",
    chunk: int = 512,
) -> tuple[Float[Array, "B E"], RouterStats | None]:
    """Return `edge_logps`, and what the routers of experts did.

    Args:
        model: policy or reference.
        batch: packed sequences.
        routing: how tokens are routed in training; None drops none, as in evaluation.
        key: random key of LoRA dropout and routing; None disables both.
        train_tower: as for `edge_logps`.
        remat: as for `edge_logps`.
        chunk: as for `edge_logps`.
    """
    hidden, router = model.routed_hidden(batch.inputs, routing, key=key, train_tower=train_tower, remat=remat)
    states = jnp.take_along_axis(hidden, batch.parent[:, :, None], axis=1)
    edges = states.shape[1]
    chunks = max(1, -(-edges // chunk))
    padding = chunks * -(-edges // chunks) - edges

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def score_chunk(carry: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        state, target = inputs
        logits = model.decoder.logits(state)
        chosen = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[..., 0]
        return carry, chosen - jax.nn.logsumexp(logits, axis=-1)

    _, logps = jax.lax.scan(score_chunk, None, (split(states), split(batch.target)))
    return jnp.moveaxis(logps, 0, 1).reshape(states.shape[0], -1)[:, :edges], router


def add_router_loss(loss: Loss, router: RouterStats | None, routing: Routing | None) -> Loss:
    """Return a loss whose mean has the routers' load-balancing losses added, summed over layers (see `Routing`)."""
    if router is None or routing is None:
        return loss
    return loss._replace(total=loss.total + routing.aux_coefficient * router.aux.sum() * loss.weight)


def router_sums(router: RouterStats | None) -> dict[str, Array]:
    """Return what to report of a micro-batch's routers; `routers` counts micro-batches. Empty without experts."""
    if router is None:
        return {}
    stopped = jax.lax.stop_gradient(router)
    return {
        "router_aux": stopped.aux.sum(),
        "router_load": stopped.load.mean(0),
        "router_dropped": stopped.dropped.mean(),
        "routers": jnp.ones((), jnp.float32),
    }


def cross_entropy(logps: Float[Array, "B E"], batch: Batch) -> Loss:
    """Return the weighted cross-entropy of the edges."""
    return Loss(-(batch.weight * logps).sum(), batch.weight.sum())


def edge_loss(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    key: PRNGKeyArray | None = None,
    train_tower: bool = False,
    chunk: int = 512,
) -> Loss:
    """Return the cross-entropy of a batch's edges under a model. Arguments as for `edge_logps`."""
    return cross_entropy(edge_logps(model, batch, key=key, train_tower=train_tower, chunk=chunk), batch)


def loss_by_dataset(
    logps: Float[Array, "B E"], batch: Batch, datasets: int
) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """Return the two sums of `cross_entropy` for each of S = `datasets` datasets."""
    dataset = batch.origin.reshape(-1)
    losses, weights = -(batch.weight * logps).reshape(-1), batch.weight.reshape(-1)
    return jax.ops.segment_sum(losses, dataset, datasets), jax.ops.segment_sum(weights, dataset, datasets)


def answer_logps(logps: Float[Array, "B E"], batch: Batch) -> Float[Array, "B Q"]:
    """Return the weighted sum of the log-probabilities of each answer's edges."""
    answers = batch.leaves.shape[1]
    return jax.vmap(lambda x, branch: jax.ops.segment_sum(x, branch, num_segments=answers))(
        batch.weight * logps, batch.branch
    )


def preference_loss(
    policy: Float[Array, "B Q"], reference: Float[Array, "B Q"], batch: Batch, preference: DPOConfig
) -> tuple[Loss, Rewards]:
    """Return the DPO loss of a batch's pairs (Rafailov et al., arXiv 2305.18290; DDPO of RLHF-V, arXiv 2312.00849).

    Args:
        policy: `answer_logps` of the trained model; chosen and rejected answers alternate.
        reference: `answer_logps` of the reference model.
        batch: whose answers these are.
        preference: coefficients of the loss.
    """

    def split(x: Array) -> tuple[Array, Array]:
        return x[:, 0::2], x[:, 1::2]

    filled: Bool[Array, "B P"] = split(batch.questions)[0] >= 0
    chosen, rejected = (preference.beta * side for side in split(policy - reference))
    margin = chosen - rejected
    losses = preference.weight * -jax.nn.log_sigmoid(margin) - preference.sft * split(policy)[0]

    def total(x: Array) -> Array:
        return jnp.where(filled, x, jnp.zeros_like(x)).sum()

    rewards = Rewards(total(chosen), total(rejected), total(margin), total((margin > 0).astype(jnp.float32)))
    return Loss(total(losses), filled.sum().astype(jnp.float32)), rewards
