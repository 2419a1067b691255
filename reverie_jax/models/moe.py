"""Mixture of experts: top-2 routing as MoE-LLaVA has it (`top2gating` in sharded_moe.py of DeepSpeed 0.9.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie_jax.models.config import Routing
from reverie_jax.models.layers import Linear


class RouterStats(NamedTuple):
    """What the routers did, for each of M layers with E experts.

    Attributes:
        aux: Load-balancing loss, the mean over groups; 1 if the first choices are spread evenly.
        load: Share of the assignments that each expert got, before any was dropped.
        dropped: Share of the assignments that were dropped, since the expert had no room.
    """

    aux: Float[Array, "*M"]
    load: Float[Array, "*M E"]
    dropped: Float[Array, "*M"]


class Assignment(NamedTuple):
    """The two experts of each of S tokens of a group, and their weights, which are 0 where the token was dropped.

    Attributes:
        expert: First and second choice.
        slot: Place of the token in that expert, which is beyond its capacity where the token was dropped.
        weight: Of the expert's output; the two add up to 1, or to 0 if both were dropped.
    """

    expert: Int[Array, "2 S"]
    slot: Int[Array, "2 S"]
    weight: Float[Array, "2 S"]


Experts = Callable[[Float[Array, "_ T D"]], Float[Array, "E T D"]]
"""All experts' MLPs, on tokens of their own or all on the same ones."""


def capacity_of(tokens: int, experts: int, routing: Routing) -> int:
    """Return how many tokens of a group an expert takes at most; two choices of each token are placed."""
    if routing.capacity_factor is None:
        return tokens
    room = max(math.ceil(2 * routing.capacity_factor * tokens / experts), routing.min_capacity)
    return min(room, tokens)


def assign_experts(
    logits: Float[Array, "S E"],
    capacity: int,
    *,
    key: PRNGKeyArray | None = None,
    used: Bool[Array, "S"] | None = None,
) -> tuple[Assignment, RouterStats]:
    """Return each token's experts. All first choices are placed before any second one, both in the tokens' order.

    Args:
        logits: Of the router, in float32.
        capacity: Tokens that an expert takes at most.
        key: Draws the second expert by its probability among the others; None takes the likeliest.
        used: Tokens that are routed; all by default.
    """
    count = logits.shape[-1]
    probability = jax.nn.softmax(logits, axis=-1)
    first = jnp.argmax(probability, axis=-1)
    noise = jnp.zeros_like(logits) if key is None else jax.random.gumbel(key, logits.shape, logits.dtype)
    others = jnp.where(jax.nn.one_hot(first, count, dtype=bool), -jnp.inf, logits + noise)
    expert = jnp.stack([first, jnp.argmax(others, axis=-1)])
    routed = jnp.ones(first.shape, bool) if used is None else used
    chosen = jax.nn.one_hot(jnp.where(routed[None], expert, count), count, dtype=jnp.int32)
    # The running count over first choices, then over second ones.
    places = jnp.cumsum(chosen.reshape(-1, count), axis=0).reshape(chosen.shape) - 1
    slot = (places * chosen).sum(-1)
    kept = routed[None] & (slot < capacity)
    weight = jnp.where(kept, jnp.take_along_axis(probability, expert.T, axis=-1).T, jnp.float32(0))
    weight = weight / jnp.maximum(weight.sum(0, keepdims=True), jnp.finfo(jnp.float32).eps)
    share = 1 / jnp.maximum(routed.sum(), 1).astype(jnp.float32)
    mean = jnp.where(routed[:, None], probability, jnp.float32(0)).sum(0) * share
    counts = chosen.sum(1).astype(jnp.float32) * share
    dropped = (routed[None] & ~kept).sum().astype(jnp.float32) * share / 2
    stats = RouterStats(count * (mean * counts[0]).sum(), counts.sum(0) / 2, dropped)
    return Assignment(expert, jnp.where(kept, slot, capacity), weight), stats


def apply_experts(
    experts: Experts,
    router: Linear,
    x: Float[Array, "B L D"],
    routing: Routing | None,
    *,
    key: PRNGKeyArray | None = None,
    used: Bool[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L D"], RouterStats]:
    """Return the weighted sum of each token's experts.

    Args:
        experts: The MLPs.
        router: Linear layer to E logits; it computes in float32.
        x: Normalized hidden states.
        routing: How tokens are routed in training; None is evaluation: no token is dropped, and the second expert is the
            likeliest.
        key: Draws second experts where `routing` says `gumbel`.
        used: Tokens that are not padding, where `routing` masks it.

    Raises:
        ValueError: The sequences are not a multiple of a group's.
    """
    batch, length, width = x.shape
    routing = routing or Routing(capacity_factor=None)
    rows = routing.group or batch
    if batch % rows:
        raise ValueError(f"{batch} sequences cannot be routed in groups of {rows}")
    groups, tokens = batch // rows, rows * length
    flat = x.reshape(groups, tokens, width)
    logits = router(flat.astype(jnp.float32))
    capacity = capacity_of(tokens, logits.shape[-1], routing)
    keys = jax.random.split(key, groups) if key is not None and routing.second_expert == "gumbel" else None
    masks = used.reshape(groups, tokens) if used is not None and routing.mask_padding else None
    assigned, stats = jax.vmap(
        lambda logits, key, used: assign_experts(logits, capacity, key=key, used=used),
        in_axes=(0, None if keys is None else 0, None if masks is None else 0),
    )(logits, keys, masks)
    count = logits.shape[-1]
    if capacity == tokens:
        out = _mix_all(experts, flat, assigned, count)
    else:
        out = _mix_slots(experts, flat, assigned, count, capacity)
    return out.reshape(x.shape), _mean(stats)


def _mean(stats: RouterStats) -> RouterStats:
    return RouterStats(*(value.mean(0) for value in stats))


def _mix_all(experts: Experts, x: Float[Array, "G S D"], assigned: Assignment, count: int) -> Float[Array, "G S D"]:
    """Compute every expert on every token, and weight the two: nothing moves, and devices share out the experts."""
    weights = (jax.nn.one_hot(assigned.expert, count) * assigned.weight[..., None]).sum(1)
    out = experts(x.reshape(1, -1, x.shape[-1]))
    return jnp.einsum("etd,te->td", out, weights.reshape(-1, count).astype(x.dtype)).reshape(x.shape)


def _mix_slots(
    experts: Experts, x: Float[Array, "G S D"], assigned: Assignment, count: int, capacity: int
) -> Float[Array, "G S D"]:
    """Gather each expert's tokens into its slots, and its outputs back to the tokens."""
    groups, tokens, width = x.shape
    place = assigned.expert * (capacity + 1) + assigned.slot  # the last slot of each expert is for dropped tokens
    index = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), 2)

    def fill(place: Int[Array, "2 S"]) -> Int[Array, "E C"]:
        empty = jnp.full((count * (capacity + 1),), tokens, jnp.int32)
        return empty.at[place.ravel()].set(index).reshape(count, capacity + 1)[:, :capacity]

    padded = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    source = jax.vmap(fill)(place).reshape(groups, -1)
    inputs = jnp.take_along_axis(padded, source[..., None], axis=1).reshape(groups, count, capacity, width)
    out = experts(inputs.swapaxes(0, 1).reshape(count, -1, width)).reshape(count, groups, capacity, width)
    out = jnp.pad(out.swapaxes(0, 1), ((0, 0), (0, 0), (0, 1), (0, 0))).reshape(groups, -1, width)
    chosen = jnp.take_along_axis(out, place.reshape(groups, -1, 1), axis=1).reshape(groups, 2, tokens, width)
    return jnp.einsum("gksd,gks->gsd", chosen, assigned.weight.astype(x.dtype))
