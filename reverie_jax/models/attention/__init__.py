"""Attention by one rule: query i sees key j iff j <= i < ends[j].

`ends[j]` is one past the last index of j's subtree in the sequence. Causal attention is `ends = L`; packed trees, padding
(`ends[j] = j + 1`), shared prefixes, preference pairs and batched questions are all this rule. `attend` computes it in the
way that suits the device: in blocks on CPUs, by tokamax or cuDNN on GPUs, by own kernels on TPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from reverie_jax.models.attention import cudnn, tokamax
from reverie_jax.models.attention.blocks import attend_blocks
from reverie_jax.models.attention.dense import attend_chunked, attend_dense, attend_leaves
from reverie_jax.models.attention.flash import flash
from reverie_jax.models.attention.rotary import rope, rope_frequencies
from reverie_jax.models.attention.rule import leaf_visible, visible

__all__ = [
    "attend",
    "attend_blocks",
    "attend_chunked",
    "attend_dense",
    "attend_leaves",
    "flash",
    "leaf_visible",
    "rope",
    "rope_frequencies",
    "visible",
]

_log = logging.getLogger(__name__)

Attention = Callable[..., Any]
"""(q, k, v, ends) -> output, as `attend`."""

DENSE_UP_TO = 255
"""Tokens of a sequence: shorter ones do not gain from blocks."""


def attend(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
) -> Float[Array, "B L H d"]:
    """Compute attention by the rule; `ends=None` lets every query see every key (the vision tower).

    Softmax in float32. Query head h reads key head h // (H / K). The way is chosen at lowering, so also when compiling
    ahead of time for another machine. L x L scores exist in short sequences only.
    """
    if q.shape[1] <= DENSE_UP_TO:
        return attend_dense(q, k, v, ends)
    ways = ways_of(q.dtype, q.shape[-1], causal=ends is not None)
    _log_once(jax.default_backend(), ways)
    return jax.lax.platform_dependent(q, k, v, ends, **ways)


def ways_of(dtype: DTypeLike, width: int, *, causal: bool = True) -> dict[str, Attention]:
    """Return how attention of heads of this dtype and width is computed, by platform; `causal` is whether `ends` is given.

    All ways are traced, and each saves the residuals of all for the backward pass (zeros for the others'): none may be
    L x L. Where the layer is recomputed anyway, XLA merges this recomputation with that one.
    """
    ways: dict[str, Attention] = {"tpu": flash, "cpu": attend_blocks, "default": _ATTEND_CHUNKED}
    if not causal:  # no block can be skipped: larger products use more cores
        ways["cpu"] = _ATTEND_CHUNKED
    if tokamax.is_supported(dtype, width):
        ways["cuda"] = tokamax.attend_tokamax
    elif cudnn.is_supported(dtype, width):
        ways["cuda"] = cudnn.attend_cudnn
    return ways


_ATTEND_CHUNKED = jax.checkpoint(attend_chunked, prevent_cse=False)
_NAMES: dict[Attention, str] = {
    flash: "own TPU kernels",
    tokamax.attend_tokamax: "tokamax's GPU kernels",
    cudnn.attend_cudnn: "cuDNN",
    attend_blocks: "blocks on the CPU",
    _ATTEND_CHUNKED: "chunks of queries, without a kernel (heads or dtype that none takes, or its package is missing)",
}


def _log_once(backend: str, ways: Mapping[str, Attention]) -> None:
    way = _NAMES[ways.get({"gpu": "cuda"}.get(backend, backend), _ATTEND_CHUNKED)]
    if backend != "cpu" and way not in _logged:
        _logged.add(way)
        _log.info("attention on this %s: %s", backend.upper(), way)


_logged: set[str] = set()
