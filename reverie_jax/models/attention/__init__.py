"""Attention by one rule: query i sees key j iff j <= i < ends[j].

`ends[j]` is one past the last index of j's subtree in the sequence. Causal attention is `ends = L`; packed trees, padding
(`ends[j] = j + 1`), shared prefixes, preference pairs and batched questions are all this rule. `attend` computes it in the
way that suits the device: in blocks on CPUs, by cuDNN on GPUs, by own kernels on TPUs.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from reverie_jax.models.attention.blocks import attend_blocks
from reverie_jax.models.attention.cudnn import attend_cudnn, is_supported
from reverie_jax.models.attention.dense import attend_chunked, attend_dense, attend_leaves
from reverie_jax.models.attention.flash import flash
from reverie_jax.models.attention.rotary import rope
from reverie_jax.models.attention.rule import leaf_visible, visible

__all__ = ["attend", "attend_blocks", "attend_chunked", "attend_dense", "attend_leaves", "flash", "leaf_visible", "rope", "visible"]

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
    # All ways are traced, and each saves the residuals of all for the backward pass (zeros for the others'): none may be
    # L x L. Where the layer is recomputed anyway, XLA merges this recomputation with that one.
    ways = {"tpu": flash, "cpu": attend_blocks, "default": jax.checkpoint(attend_chunked, prevent_cse=False)}
    if is_supported(q.dtype, q.shape[-1]):
        ways["cuda"] = attend_cudnn
    return jax.lax.platform_dependent(q, k, v, ends, **ways)
