"""MoE-LLaVA's expert layer in NumPy, one token at a time: DeepSpeed 0.9.5's top-2 gate, written from a description of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

EPS = np.finfo(np.float32).eps


@dataclasses.dataclass
class Routing:
    """What the gate decides for a group of S tokens; entry 0 of a pair is the token's first choice, 1 its second.

    Attributes:
        experts: [S, 2]; -1 for tokens that are not used.
        slots: [S, 2], the place in its expert's queue that a choice gets or would get; -1 for tokens that are not used.
        kept: [S, 2], whether that place is within the capacity.
        weights: [S, 2], zero where dropped; a row sums to 1 unless both choices are dropped.
        aux: The auxiliary loss of the group, before its coefficient.
        counts: [E], choices of each expert before any are dropped.
        dropped: How many choices are dropped.
    """

    experts: np.ndarray
    slots: np.ndarray
    kept: np.ndarray
    weights: np.ndarray
    aux: float
    counts: np.ndarray
    dropped: int


def capacity(tokens: int, experts: int, factor: float, minimum: int = 0) -> int:
    """Return how many choices an expert takes from a group of `tokens`, those that are not used counted in."""
    return max(math.ceil(tokens / experts * factor * 2), minimum)


def route(
    logits: np.ndarray,
    *,
    capacity: int,
    noise: np.ndarray | None = None,
    used: np.ndarray | None = None,
    dtype: type = np.float32,
) -> Routing:
    """Route one group of tokens to two experts each.

    Args:
        logits: [S, E].
        noise: [S, E], added to the logits that choose the second expert; None adds nothing.
        used: [S]; tokens where it is False get no expert, take no slot and do not count in the auxiliary loss.
        dtype: Of the softmax; float64 is for finite differences.
    """
    S, E = logits.shape
    experts, slots = np.full((S, 2), -1), np.full((S, 2), -1)
    kept, weights = np.zeros((S, 2), bool), np.zeros((S, 2), dtype)
    tokens = [s for s in range(S) if used is None or used[s]]
    chance = np.zeros((S, E), dtype)
    for s in tokens:
        exp = np.exp(logits[s].astype(dtype) - logits[s].max().astype(dtype))
        chance[s] = exp / exp.sum()
        experts[s, 0] = max(range(E), key=lambda e: chance[s, e])
        sampled = logits[s] if noise is None else logits[s] + noise[s]
        experts[s, 1] = max((e for e in range(E) if e != experts[s, 0]), key=lambda e: sampled[e])
    counts = np.zeros(E, int)
    for choice in (0, 1):  # every first choice is in its queue before any second one
        for s in tokens:
            slots[s, choice] = counts[experts[s, choice]]
            kept[s, choice] = slots[s, choice] < capacity
            counts[experts[s, choice]] += 1
    for s in tokens:
        pair = [chance[s, experts[s, c]] if kept[s, c] else dtype(0) for c in (0, 1)]
        total = max(pair[0] + pair[1], dtype(EPS))
        weights[s] = [pair[0] / total, pair[1] / total]
    aux = 0.0
    for e in range(E if tokens else 0):
        share = sum(experts[s, 0] == e for s in tokens) / len(tokens)
        aux += E * share * sum(float(chance[s, e]) for s in tokens) / len(tokens)
    return Routing(experts, slots, kept, weights, aux, counts, int(2 * len(tokens) - kept.sum()))


def layer(
    x: np.ndarray,
    wg: np.ndarray,
    experts: Sequence[Callable[[np.ndarray], np.ndarray]],
    *,
    capacity: int,
    noise: np.ndarray | None = None,
    used: np.ndarray | None = None,
) -> tuple[np.ndarray, Routing]:
    """Return a MoE layer's output [S, d] for one group, in x's dtype, and its routing.

    Args:
        x: [S, d].
        wg: [E, d], the router's weight.
        experts: A function from [d] to [d] each; `ffn` makes one of tensors.
    """
    routing = route(x.astype(np.float32) @ wg.astype(np.float32).T, capacity=capacity, noise=noise, used=used)
    out = np.zeros_like(x)
    for s in range(len(x)):
        for choice in (0, 1):
            if routing.kept[s, choice]:
                out[s] += routing.weights[s, choice] * experts[routing.experts[s, choice]](x[s])
    return out, routing


def ffn(weights: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return an MLP as a function of one token, in float64, from tensors named as in a checkpoint (`w1.weight`, ...)."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"].astype(float) @ x + weights.get(f"{name}.bias", np.zeros(())).astype(float)

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    if "fc1.weight" in weights:
        return lambda x: linear("fc2", gelu(linear("fc1", x)))
    if "w1.weight" in weights:
        return lambda x: linear("c_proj", linear("w1", x) * silu(linear("w2", x)))
    return lambda x: linear("down_proj", silu(linear("gate_proj", x)) * linear("up_proj", x))
